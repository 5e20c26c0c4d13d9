"""Policy: one decision from a frame to an action, at any budget (design section 3; paper Algorithm 1, B.5)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from flexlam_fast.backend import choose
from flexlam_fast.checkpoint import load_checkpoint, match_tensors, save_checkpoint
from flexlam_fast.checks import check_budget, check_finite, check_tensor
from flexlam_fast.config import FlexLAMConfig
from flexlam_fast.deadline import LatencyTable, measure
from flexlam_fast.errors import BudgetError, CheckpointError, ConfigError, InputError
from flexlam_fast.lam import LatentActionModel
from flexlam_fast.layers import normalise
from flexlam_fast.sequence import decode
from flexlam_fast.sequence.cache import SegmentCache
from flexlam_fast.sequence.model import SequenceModel
from flexlam_fast.translator import Translator, encode_actions, no_actions
from flexlam_fast.types import Actions, Decision

ASSETS = Path(__file__).parent / "assets"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Policy:
    """A LAM, a sequence model and a translator that act together.

    Sessions are independent episodes that act as one batch; each is at its own frame ``t``. A decision encodes the
    newest transition, appends its code block and the newest frame to the cache, generates ``k`` codes, fills the other
    slots with the null latent, and translates.
    """

    cache: SegmentCache
    previous: Actions

    def __init__(
        self,
        cfg: FlexLAMConfig,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        backend: str = "auto",
        seed: int = 0,
    ) -> None:
        """Build a policy with random weights drawn from ``seed``.

        Args:
            cfg: the model.
            device: where it lives.
            dtype: float32, bfloat16 or float16, of weights and cache; the bottleneck's arithmetic is always float32.
            backend: ``"auto"`` or a name (see ``flexlam_fast.backend``).
            seed: of the random weights.

        Raises:
            BackendError: a backend asked for by name that cannot run here.
            InputError: another dtype.
        """
        if dtype not in DTYPES.values():
            raise InputError(f"dtype: expected {', '.join(DTYPES)}, got {dtype}")
        self.cfg, self.device, self.dtype = cfg, torch.device(device), dtype
        self.backend = choose(backend, self.device)
        self.latencies: dict[int, LatencyTable] = {}  # by batch size, from warmup()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.lam = LatentActionModel(cfg, backend)
            self.sequence = SequenceModel(cfg)
            self.translator = Translator(cfg)
        for part in (self.lam, self.sequence, self.translator):
            part.to(self.device).eval().requires_grad_(False)
        for stage in (self.lam.encoder, self.lam.decoder, self.sequence, self.translator):
            stage.to(dtype)
        self.reset()

    def describe(self) -> str:
        """Say in one line what this policy is and which backend it took, and why."""
        sizes = ", ".join(f"{name} {_millions(part)}" for name, part in self.parts().items())
        return f"FlexLAM ({sizes}) on {self.device} in {_name(self.dtype)}; {self.backend.name}: {self.backend.reason}"

    def parts(self) -> dict[str, nn.Module]:
        """The three stages by the names that checkpoints use."""
        return {"lam": self.lam, "sequence": self.sequence, "translator": self.translator}

    def reset(self, batch_size: int = 1, seed: int = 0, *, sessions: Sequence[int] | None = None) -> None:
        """Start new episodes.

        Args:
            batch_size: number of sessions, when all of them start anew.
            seed: of everything drawn at random while acting: codes at a temperature above 0, and :meth:`imagine`.
            sessions: only these sessions start a new episode, at their next frame; the others go on undisturbed.

        Raises:
            InputError: a batch size below 1, or a session that there is not.
        """
        if sessions is not None:
            wrong = [i for i in sessions if not 0 <= i < self.cache.batch]
            if wrong:
                raise InputError(f"sessions: expected 0..{self.cache.batch - 1}, got {wrong}")
            self.cache.reset(sessions)
            self.previous.discrete[list(sessions)] = -1
            self.previous.continuous[list(sessions)] = 0.0
            return
        check_budget("batch_size", batch_size, 1, 1_000_000)
        size, channels = self.cfg.frame, self.cfg.channels
        self.cache = SegmentCache(self.cfg, batch_size, self.device, self.dtype)
        self.previous = no_actions(batch_size, self.cfg.translator, self.device)
        self.pixels = torch.zeros(batch_size, channels, size, size, device=self.device, dtype=self.dtype)
        self.generator = torch.Generator(self.device).manual_seed(seed)

    @torch.no_grad()
    def act(
        self,
        frames: Tensor | np.ndarray[Any, Any],
        budget: int | None = None,
        *,
        deadline_ms: float | None = None,
        temperature: float | None = None,
    ) -> Decision:
        """Decide for every session (paper Algorithm 1).

        Args:
            frames: uint8 ``[B, H, W, C]``, the newest frame of each session, NumPy or torch, host or device.
            budget: ``k``, within ``1..K``; may change at every decision.
            deadline_ms: in place of ``budget``: take the largest budget whose p99 :meth:`warmup` measured to fit into
                so many milliseconds. The Decision says which one it was.
            temperature: of the codes; 0 is greedy, None takes the configuration's.

        Returns:
            Decision: actions on the host, the generated codes, the budget, and the frame index of each session.

        Raises:
            BudgetError: ``budget`` outside ``1..K``, or both or neither of ``budget`` and ``deadline_ms``.
            InputError: frames of another shape or dtype; a float frame with NaN is named as such; a deadline that no
                budget keeps, or without a warm-up.
        """
        budget = self._budget(budget, deadline_ms)
        heat = self.cfg.sequence.temperature if temperature is None else temperature
        if not isinstance(heat, int | float) or not 0 <= heat < float("inf"):
            raise InputError(f"temperature: expected a number of at least 0, got {heat!r}")
        pixels = normalise(self._frames(frames).to(self.device)).to(self.dtype)
        if bool((self.cache.t >= 0).any()):
            observed = self.lam.encode(self.pixels, pixels)
        else:
            observed = torch.zeros(len(pixels), self.cfg.bottleneck.slots, dtype=torch.int32, device=self.device)
        logits = decode.append(self.sequence, self.cache, observed, pixels)
        codes = decode.generate(self.sequence, self.cache, logits, budget, heat, self.generator)
        latents = self.lam.latents(codes, budget).to(self.dtype)
        self.previous = self.translator.decide(latents, encode_actions(self.previous, self.cfg.translator))
        self.pixels = pixels
        # copies, so that a later reset does not change a decision that was handed out
        host = Actions(*(part.to("cpu", copy=True) for part in self.previous))
        return Decision(host, codes.cpu(), budget, self.cache.t.to("cpu", copy=True))

    def warmup(
        self, budgets: Sequence[int] | None = None, *, batch_size: int | None = None, warm: int = 20, rounds: int = 100
    ) -> LatencyTable:
        """Measure what a decision takes on this machine, with full windows, for ``deadline_ms`` to choose by.

        Sessions are not disturbed: the decisions are made in others, on random frames.

        Args:
            budgets: which ``k``; None takes the powers of two up to K, and K.
            batch_size: how many sessions act at once; None takes as many as there are now.
            warm: decisions per budget before the measured ones.
            rounds: measured decisions per budget; the paper takes 100 (B.6).

        Returns:
            The table, which the policy keeps for this batch size; print it.

        Raises:
            BudgetError: a budget outside ``1..K``, or no round to measure.
        """
        slots = self.cfg.bottleneck.slots
        chosen = sorted({*(2**i for i in range(slots.bit_length())), slots}) if budgets is None else list(budgets)
        for k in chosen:
            check_budget("budgets", k, 1, slots)
        check_budget("rounds", rounds, 1, 1_000_000)
        batch, state = batch_size or self.cache.batch, (self.cache, self.previous, self.pixels, self.generator)
        try:
            self.reset(batch)
            size = (batch, self.cfg.frame, self.cfg.frame, self.cfg.channels)
            frames = torch.randint(0, 256, size, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
            for _ in range(self.cfg.sequence.window + 1):
                self.act(frames, min(chosen))
            table = measure(lambda k: self.act(frames, k), batch, chosen, warm, rounds)
        finally:
            self.cache, self.previous, self.pixels, self.generator = state
        self.latencies[batch] = table
        return table

    @torch.no_grad()
    def imagine(self, decision: Decision, steps: int | None = None) -> Tensor:
        """Decode the frame that each session's decision expects next, uint8 ``[B, H, W, C]`` on the host."""
        latents = self.lam.latents(decision.codes.to(self.device), decision.budget)
        return self.lam.decode(self.pixels.float(), latents, steps, self.generator).cpu()

    def save_pretrained(
        self, directory: str | Path, *, dtype: torch.dtype | None = None, notes: dict[str, str] | None = None
    ) -> None:
        """Write ``config.json``, ``model.safetensors`` and a manifest of sha256 sums.

        Args:
            directory: where; an older checkpoint there is replaced in one step.
            dtype: of the stored weights; None keeps them as they are.
            notes: further text files by name, for example a training log.

        Raises:
            StorageError: the disk is full or forbids it; what was there before is intact.
        """
        tensors = {name: t.to(dtype) if dtype and t.is_floating_point() else t for name, t in self.state().items()}
        save_checkpoint(directory, tensors, self.cfg.to_json(), extra_text=notes)

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        backend: str = "auto",
    ) -> Policy:
        """Load a policy from a directory, or one that ships with the package by its name.

        Raises:
            CheckpointError: nothing of that name, or a checkpoint that is corrupt, foreign, or of a future version.
            BackendError: a backend asked for by name that cannot run here.
        """
        directory = Path(name)
        if not directory.exists() and str(name) in shipped():
            directory = ASSETS / str(name)
        if not directory.exists() and "/" not in str(name):
            raise CheckpointError(f"{name}: expected a directory or one of {shipped()}, got neither")
        found = load_checkpoint(directory)
        try:
            cfg = FlexLAMConfig.from_json(found.config_json)
        except ConfigError as error:
            raise CheckpointError(f"{directory / 'config.json'}: {error}") from error
        policy = cls(cfg, device=device, dtype=dtype, backend=backend)
        policy.load_state(str(directory / "model.safetensors"), found.tensors)
        return policy

    def state(self) -> dict[str, Tensor]:
        """All weights by name, ``lam.``, ``sequence.`` and ``translator.`` in front."""
        return {f"{part}.{key}": t for part, m in self.parts().items() for key, t in m.state_dict().items()}

    def load_state(self, file: str, tensors: dict[str, Tensor]) -> None:
        """Take over weights of any floating dtype, after checking that names and shapes are exactly this model's.

        Raises:
            CheckpointError: naming ``file`` and the first tensor that does not fit.
        """
        ours = self.state()
        match_tensors(file, {k: t.to(tensors[k].dtype) if k in tensors else t for k, t in ours.items()}, tensors)
        for key, t in ours.items():
            if not tensors[key].is_floating_point() or not bool(torch.isfinite(tensors[key]).all()):
                raise CheckpointError(f"{file}: {key}: expected finite floating numbers, got others")
            t.copy_(tensors[key])

    def _budget(self, budget: int | None, deadline_ms: float | None) -> int:
        slots = self.cfg.bottleneck.slots
        if (budget is None) == (deadline_ms is None):
            got = "neither" if budget is None else "both"
            raise BudgetError(f"budget: expected an integer in 1..{slots} or deadline_ms, got {got}")
        if deadline_ms is None:
            return check_budget("budget", budget, 1, slots)
        table = self.latencies.get(self.cache.batch)
        if table is None:
            size = self.cache.batch
            raise InputError(f"deadline_ms: expected a warm-up first, policy.warmup(batch_size={size}), got none")
        return table.largest_within(deadline_ms)

    def _frames(self, frames: Tensor | np.ndarray[Any, Any]) -> Tensor:
        if isinstance(frames, np.ndarray) and frames.dtype.kind in "buif":
            frames = torch.from_numpy(frames.copy())  # torch cannot share a read-only array or negative strides
        if isinstance(frames, Tensor):
            check_finite("frames", frames)
        size = self.cfg.frame
        check_tensor("frames", frames, [self.cache.batch, size, size, self.cfg.channels], torch.uint8)
        assert isinstance(frames, Tensor)  # for type checkers: the line above has made sure
        return frames


def shipped() -> list[str]:
    """Names of the checkpoints that ship with the package."""
    return sorted(p.name for p in ASSETS.iterdir() if (p / "config.json").is_file()) if ASSETS.is_dir() else []


def _millions(part: nn.Module) -> str:
    return f"{sum(p.numel() for p in part.parameters()) / 1e6:.2f}M"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
