"""Policy: one decision from a frame to an action, at any budget (design section 3; paper Algorithm 1, B.5)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flexlam_fast.ambient import fp32_by_default, isolated
from flexlam_fast.backend import DTYPES as DTYPES
from flexlam_fast.backend import TRITON, check_weights_dtype, choose, find_device
from flexlam_fast.checks import check_budget, check_finite, check_number, check_tensor, describe
from flexlam_fast.config import FlexLAMConfig, check_config
from flexlam_fast.deadline import LatencyTable, measure
from flexlam_fast.errors import BackendError, BudgetError, CacheError, InputError
from flexlam_fast.graphs import GraphedLoop
from flexlam_fast.lam import LatentActionModel
from flexlam_fast.loop import DecisionLoop, How, stages_of
from flexlam_fast.pretrained import Pretrained
from flexlam_fast.sequence.cache import PagedCache
from flexlam_fast.sequence.model import SequenceModel
from flexlam_fast.translator import Translator
from flexlam_fast.types import Actions, Decision

MAX_SESSIONS = 1_000_000
SEEDS = -(2**63), 2**64 - 1  # that torch takes


class Policy(Pretrained):
    """A LAM, a sequence model and a translator that act together.

    Sessions are independent episodes that share one pool of pages; each is at its own frame ``t``. A decision encodes
    the newest transition, appends its code block and the newest frame to the cache, generates ``k`` codes, fills the
    other slots with the null latent, and translates.
    """

    @isolated
    def __init__(
        self,
        cfg: FlexLAMConfig,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        backend: str = "auto",
        seed: int = 0,
        pages: torch.dtype | None = None,
        graphs: bool = True,
        attention: str = "auto",
    ) -> None:
        """Build a policy with random weights drawn from ``seed``.

        Args:
            cfg: the model.
            device: where it lives.
            dtype: float32, bfloat16 or float16, of the weights; the bottleneck's arithmetic is always float32.
            backend: ``"auto"`` or a name (see ``flexlam_fast.backend``).
            seed: of the random weights.
            pages: dtype of cached keys and values, one of the same; None takes ``dtype``.
            graphs: on a GPU with fused kernels, capture a decision as one CUDA graph; otherwise this says nothing.
            attention: of the encoder: ``"auto"``, ``"flash_attn"``, ``"xformers"``, ``"sdpa"``, ``"triton"`` or
                ``"reference"`` (see ``flexlam_fast.ops.attention``).

        Raises:
            BackendError: a backend or attention asked for by name that cannot run here, or fused kernels with
                ``pages`` of another dtype than the weights.
            InputError: another dtype.
        """
        for name, kind in (("dtype", dtype), ("pages", dtype if pages is None else pages)):
            check_weights_dtype(name, kind)
        check_config(cfg)
        check_number("seed", seed, *SEEDS, integer=True)
        self.cfg, self.device, self.dtype = cfg, find_device(device), dtype
        self.pages = dtype if pages is None else pages
        self.backend = choose(backend, self.device)
        if self.backend.name == TRITON and self.pages != dtype:
            expected = f"{_name(dtype)}, the dtype of the weights, with backend {TRITON!r}"
            raise BackendError(f"pages: expected {expected}, got {_name(self.pages)}")
        self.latencies: dict[int, LatencyTable] = {}  # by batch size, from warmup()
        self.warmed: dict[tuple[int, float, int | None], LatencyTable] = {}  # also by temperature and top_k
        with torch.random.fork_rng(devices=[]), fp32_by_default():
            torch.manual_seed(int(seed))
            self.lam = LatentActionModel(cfg, backend)
            self.sequence = SequenceModel(cfg)
            self.translator = Translator(cfg)
        self.attention = self.lam.settle(self.device, dtype, self.backend.name, attention)
        for part in (self.sequence, self.translator):
            part.to(self.device, dtype).eval().requires_grad_(False)
        modules = self.lam, self.sequence, self.translator
        self.stages = stages_of(*modules, self.backend.name, self.device, self.pages)
        if attention != "auto":  # in the encoder's own modules
            self.stages = self.stages._replace(encoder=None)
        self.graphs = graphs and self.device.type == "cuda" and self.stages.capturable
        self._make_pool(1, 0)
        self.reset()

    def describe(self) -> str:
        """Say in one line what this policy is and which backend it took, and why."""
        graphs = ", one CUDA graph per decision" if self.graphs else ""
        where = f"{self.device} in {_name(self.dtype)}{graphs}"
        chosen = f"{self.backend.name}: {self.backend.reason}; attention by {self.attention.name}"
        return f"FlexLAM ({self.sizes()}) on {where}; {chosen}"

    @property
    def cache(self) -> PagedCache:
        """The pool of pages: print it to see where every session is; ``verify()`` checks its bookkeeping."""
        return self.loop.cache

    @property
    def previous(self) -> Actions:
        """The last action of every session, on the device; -1 and 0 before the first."""
        return self.loop.previous

    @isolated
    def reset(
        self,
        batch_size: int = 1,
        seed: int = 0,
        *,
        sessions: Sequence[int] | None = None,
        capacity: int | None = None,
    ) -> None:
        """Start new episodes.

        With the capacity there is already, the pool and the graphs of it are used again. Another capacity makes a new
        pool and, on a GPU, captures anew what :meth:`warmup` had measured.

        Args:
            batch_size: number of sessions that are open then, ``0..batch_size - 1``, when all start anew.
            seed: of everything drawn at random while acting: codes at a temperature above 0, and :meth:`imagine`.
            sessions: only these sessions start a new episode, at their next frame; the others go on undisturbed.
            capacity: sessions that the pool has pages for; more may be opened up to it. None takes ``batch_size``.

        Raises:
            InputError: a batch size below 1, a capacity below that, or a session that there is not.
        """
        if sessions is not None:
            chosen = self._open_ones(sessions)
            self.cache.reset(chosen)
            self.loop.forget(chosen)
            return
        batch_size = check_budget("batch_size", batch_size, 1, MAX_SESSIONS)
        room = check_budget("capacity", batch_size if capacity is None else capacity, batch_size, MAX_SESSIONS)
        seed = int(check_number("seed", seed, *SEEDS, integer=True))
        if room == self.cache.capacity:
            self.loop.restart(seed)
        else:
            self._make_pool(room, seed)
            self._prepare()
        self.cache.open(batch_size)
        self.generator = torch.Generator(self.device).manual_seed(seed)

    @isolated
    def open(self, count: int = 1) -> list[int]:
        """Open further sessions in the pool and return their numbers.

        Raises:
            CacheError: the pool has too few free pages; it says how many are needed and how many there are.
        """
        opened = self.cache.open(count)
        self.loop.forget(opened)
        return opened

    @isolated
    def close(self, sessions: Sequence[int]) -> None:
        """End sessions; their pages are free for others.

        Raises:
            InputError: a session that is not open.
        """
        self.cache.close(self._open_ones(sessions))

    @isolated
    @torch.no_grad()
    def act(
        self,
        frames: Tensor | np.ndarray[Any, Any],
        budget: int | None = None,
        *,
        deadline_ms: float | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        sessions: Sequence[int] | None = None,
    ) -> Decision:
        """Decide for every open session, or for some (paper Algorithm 1).

        Args:
            frames: uint8 ``[B, H, W, C]``, the newest frame of each session that acts, NumPy or torch, host or device.
            budget: ``k``, within ``1..K``; may change at every decision.
            deadline_ms: in place of ``budget``: take the largest budget whose p99 :meth:`warmup` measured to fit into
                so many milliseconds. The Decision says which one it was.
            temperature: of the codes; 0 is greedy, None takes the configuration's.
            top_k: draw from so many most likely codes; None draws from all.
            sessions: which act, in the order of ``frames``; None means all that are open, in ascending order.

        Returns:
            Decision: actions on the host, the generated codes, the budget, and the frame index of each session.

        Raises:
            BudgetError: ``budget`` outside ``1..K``, or both or neither of ``budget`` and ``deadline_ms``.
            InputError: frames of another shape or dtype; a float frame with NaN is named as such; a session that is
                not open; a deadline that no budget keeps, or without a warm-up (with graphs: for this temperature and
                top_k, because a decision with a deadline never captures one).
        """
        acting = self.cache.opened if sessions is None else self._open_ones(sessions)
        if not acting:
            raise InputError("sessions: expected at least one that acts, got none")
        drawing = self._drawing(temperature, top_k)
        how = How(self._budget(budget, deadline_ms, len(acting), drawing), *drawing)
        host = self._frames(frames, len(acting))
        self.stages.refresh()
        decide = partial(self.loop.decide, self.stages, how)
        if self.graphed is not None:
            actions, codes, t = self.graphed.decide(how, decide, host, acting)
        else:
            actions, codes, t = decide(host.to(self.device), torch.tensor(acting, device=self.device)).cpu()
        self.stages.check()
        return Decision(actions, codes, how.budget, t)

    @isolated
    def warmup(
        self,
        budgets: Sequence[int] | None = None,
        *,
        batch_size: int | None = None,
        warm: int = 20,
        rounds: int = 100,
        temperature: float | None = None,
        top_k: int | None = None,
    ) -> LatencyTable:
        """Measure what a decision takes on this machine, with full windows, for ``deadline_ms`` to choose by.

        Sessions are not disturbed: the decisions are made in others, on random frames. On a GPU with fused kernels the
        graphs of what was measured are captured for the sessions that are open, so that no later decision waits for it.

        Args:
            budgets: which ``k``; None takes the powers of two up to K, and K.
            batch_size: how many sessions act at once; None takes as many as there are now.
            warm: decisions per budget before the measured ones.
            rounds: measured decisions per budget; the paper takes 100 (B.6).
            temperature: of the codes, as in :meth:`act`.
            top_k: likewise.

        Returns:
            The table, which the policy keeps for this batch size; print it.

        Raises:
            BudgetError: a budget outside ``1..K``, or no round to measure.
        """
        slots = self.cfg.bottleneck.slots
        chosen = sorted({*(2**i for i in range(slots.bit_length())), slots})
        if budgets is not None:
            if not isinstance(budgets, Sequence) or isinstance(budgets, str | bytes) or not budgets:
                raise BudgetError(f"budgets: expected integers in 1..{slots}, got {describe(budgets)}")
            chosen = [check_budget("budgets", k, 1, slots) for k in budgets]
        warm, rounds = check_budget("warm", warm, 0, 1_000_000), check_budget("rounds", rounds, 1, 1_000_000)
        batch = check_budget(
            "batch_size", len(self.cache.opened) if batch_size is None else batch_size, 1, MAX_SESSIONS
        )
        drawing = self._drawing(temperature, top_k)
        state = self.loop, self.graphed, self.generator
        try:
            self._make_pool(batch, 0)
            self._prepare({(batch, *drawing): chosen})
            self.cache.open(batch)
            size = (batch, self.cfg.frame, self.cfg.frame, self.cfg.channels)
            frames = torch.randint(0, 256, size, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
            for _ in range(self.cfg.sequence.window + 1):
                self.act(frames, min(chosen), temperature=drawing[0], top_k=drawing[1])
            table = measure(
                lambda k: self.act(frames, k, temperature=drawing[0], top_k=drawing[1]), batch, chosen, warm, rounds
            )
        finally:
            self.loop, self.graphed, self.generator = state
        self.latencies[batch] = self.warmed[batch, *drawing] = table
        self._prepare()
        return table

    @isolated
    @torch.no_grad()
    def imagine(self, decision: Decision, steps: int | None = None) -> Tensor:
        """Decode the frame that each session's decision expects next, uint8 ``[B, H, W, C]`` on the host.

        The decision is the last one of the open sessions, all of them.
        """
        latents = self.lam.latents(decision.codes.to(self.device), decision.budget)
        opened = torch.tensor(self.cache.opened, device=self.device)
        return self.lam.decode(self.loop.pixels[opened].float(), latents, steps, self.generator).cpu()

    def _make_pool(self, capacity: int, seed: int) -> None:
        self.loop = DecisionLoop(self.cfg, capacity, self.device, self.dtype, self.pages, seed)
        self.graphed = GraphedLoop(self.loop) if self.graphs else None

    @isolated
    @torch.no_grad()
    def _prepare(self, wanted: dict[tuple[int, float, int | None], list[int]] | None = None) -> None:
        """Capture budgets by batch size, temperature and top_k that are not there yet, the largest first, whose memory
        the others share; None is all that was measured."""
        if self.graphed is None:
            return
        if wanted is None:
            wanted = {key: [row.budget for row in table.rows] for key, table in self.warmed.items()}
        self.stages.refresh()
        for (batch, temperature, top_k), budgets in wanted.items():
            size = (batch, self.cfg.frame, self.cfg.frame, self.cfg.channels)
            for k in sorted(budgets, reverse=True) if batch <= self.cache.capacity else ():
                how = How(k, temperature, top_k)
                self.graphed.prepare(how, partial(self.loop.decide, self.stages, how), size, keep=True)

    def _budget(
        self, budget: int | None, deadline_ms: float | None, batch: int, drawing: tuple[float, int | None]
    ) -> int:
        slots = self.cfg.bottleneck.slots
        if (budget is None) == (deadline_ms is None):
            got = "neither" if budget is None else "both"
            raise BudgetError(f"budget: expected an integer in 1..{slots} or deadline_ms, got {got}")
        if deadline_ms is None:
            return check_budget("budget", budget, 1, slots)
        table = self.warmed.get((batch, *drawing), self.latencies.get(batch))
        if table is None:
            raise InputError(f"deadline_ms: expected a warm-up first, policy.warmup(batch_size={batch}), got none")
        if self.graphed is not None:
            ready = tuple(row for row in table.rows if self.graphed.has(How(row.budget, *drawing), batch))
            if not ready:
                call = f"policy.warmup(batch_size={batch}, temperature={drawing[0]:g}, top_k={drawing[1]})"
                raise InputError(f"deadline_ms: expected a warm-up that captured such decisions, {call}, got none")
            table = table._replace(rows=ready)
        return table.largest_within(deadline_ms)

    def _drawing(self, temperature: float | None, top_k: int | None) -> tuple[float, int | None]:
        temperature = self.cfg.sequence.temperature if temperature is None else temperature
        temperature = float(check_number("temperature", temperature, 0, math.inf))
        most = self.cfg.bottleneck.codebook_size
        return temperature, None if top_k is None else check_budget("top_k", top_k, 1, most)

    def _open_ones(self, sessions: Sequence[int]) -> list[int]:
        try:
            return self.cache.check_open(sessions)
        except CacheError as error:
            raise InputError(str(error)) from None

    def _frames(self, frames: Tensor | np.ndarray[Any, Any], batch: int) -> Tensor:
        if isinstance(frames, np.ndarray) and frames.dtype.kind in "buif":
            frames = torch.from_numpy(frames.copy())  # torch cannot share a read-only array or negative strides
        if isinstance(frames, Tensor):
            check_finite("frames", frames)
        size = self.cfg.frame
        check_tensor("frames", frames, [batch, size, size, self.cfg.channels], torch.uint8)
        assert isinstance(frames, Tensor)  # for type checkers: the line above has made sure
        return frames


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
