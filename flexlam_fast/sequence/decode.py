"""One decision of the sequence model: append what was observed, then generate k codes (paper Algorithm 1)."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from flexlam_fast.checks import check_budget
from flexlam_fast.ranges import LAYERS, span
from flexlam_fast.sequence.cache import PagedCache, Placement
from flexlam_fast.sequence.model import SequenceModel
from flexlam_fast.sequence.sampling import Sampling


class Runner(Protocol):
    """A way through the layers: ``Eager``, ``Packed`` or ``Fused``."""

    model: SequenceModel

    def prepare(self, cache: PagedCache, place: Placement) -> Any:
        """Work out what all layers share for the tokens of ``place``; its ``column(j)`` is token ``j`` alone."""

    def logits(self, x: Tensor, step: Any) -> Tensor:
        """Embedded tokens ``[B, N, hidden]`` through all layers; logits ``[B, C]`` of the last one."""
        ...

    def ready(self, sampling: Sampling | None, k: int) -> Sampling | None:
        """What a decision of ``k`` codes needs of ``sampling`` before its first code."""

    def choose(self, logits: Tensor, slot: int, sampling: Sampling | None) -> Tensor:
        """Codes int32 ``[B]`` of ``slot`` from ``logits [B, C]``."""
        ...

    def feed(self, logits: Tensor, slot: int, sampling: Sampling | None) -> tuple[Tensor, Tensor]:
        """The code of ``slot`` int32 ``[B]``, and its embedding ``[B, 1, hidden]``."""
        ...


@runtime_checkable
class BlockRunner(Protocol):
    """A way that generates a whole block of codes in one call: ``NativeBlock``."""

    def block(self, cache: PagedCache, place: Placement, first: Tensor, k: int, sampling: Sampling | None) -> Tensor:
        """Codes int32 ``[B, k]`` at ``place``, from the logits ``[B, C]`` of the first."""
        ...


class Appended(NamedTuple):
    """Logits fp32 ``[B, C]`` of the first code of the present block, and where the append stands."""

    logits: Tensor
    place: Placement


@torch.no_grad()
def append(
    runner: Runner, cache: PagedCache, codes: Tensor, pixels: Tensor, sessions: Tensor | None = None
) -> Appended:
    """Append ``Z_{t-1}`` and ``O_t`` to sessions, in one prefill.

    Args:
        runner: the sequence model and how it is run.
        cache: the pool; the sessions that act move to their next frame.
        codes: complete blocks integers ``[B, K]`` of the newest transitions; ignored where a session has none yet.
        pixels: newest frames ``[B, C, H, W]`` in ``[-1, 1]``.
        sessions: which act, int64 ``[B]``; None means all that are open.

    Returns:
        The logits of the first code, and what :func:`generate` needs.
    """
    if sessions is None:
        sessions = torch.tensor(cache.opened, device=pixels.device)
    slots = torch.arange(cache.slots, device=codes.device)
    x = torch.cat([runner.model.embed_codes(codes, slots), runner.model.embed_frames(pixels)], dim=1)
    place = cache.place_append(sessions)
    return Appended(runner.logits(x, runner.prepare(cache, place)), place)


@torch.no_grad()
def generate(runner: Runner, cache: PagedCache, appended: Appended, k: int, sampling: Sampling | None = None) -> Tensor:
    """Codes int32 ``[B, k]`` after an append; ``k - 1`` further passes. ``sampling`` None is greedy.

    Raises:
        BudgetError: ``k`` outside ``1..K``.
    """
    check_budget("k", k, 1, cache.slots)
    if isinstance(runner, BlockRunner):
        return runner.block(cache, cache.place_codes(appended.place), appended.logits, k, sampling)
    chosen, logits, sampling = [], appended.logits, runner.ready(sampling, k)
    steps: Any = runner.prepare(cache, cache.place_codes(appended.place)) if k > 1 else None
    for slot in range(k - 1):
        with span("code", LAYERS, slot):
            code, x = runner.feed(logits, slot, sampling)
            chosen.append(code)
            logits = runner.logits(x, steps.column(slot))
    return torch.stack([*chosen, runner.choose(logits, k - 1, sampling)], dim=1)
