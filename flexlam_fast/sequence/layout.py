"""Segments, windows, and the window rule as a dense mask (design section 3; paper B.1).

One function states the rule for training and for checking: given which frames there are, it lays out every token that
is ever computed, says which tokens each one attends to, and which positions predict which codes. A page's keys and
values are computed once, against what was in context when it entered, so a token attends to what its segment saw then.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from flexlam_fast.config import FlexLAMConfig

OBSERVATION, CODES = 0, 1


class Segment(NamedTuple):
    """One block in the sequence: ``kind`` is OBSERVATION or CODES, ``frame`` the ``s`` of ``O_s`` or ``Z_s``."""

    kind: int
    frame: int


class Placed(NamedTuple):
    """A segment: its first token, length, first RoPE position, the decision it entered at, whether it is scratch."""

    kind: int
    frame: int
    start: int
    length: int
    position: int
    entered: int
    scratch: bool


class Layout(NamedTuple):
    """Every token of a history, in one row.

    segments: where each block stands; positions: int64 ``[N]``; mask: bool ``[N, N]``, True where a row attends to a
    column; source, frame, slot: int64 ``[M]``, the token whose output predicts code ``slot`` of block ``Z_frame``.
    """

    segments: tuple[Placed, ...]
    positions: Tensor
    mask: Tensor
    source: Tensor
    frame: Tensor
    slot: Tensor


def context(t: int, window: int, stride: int) -> tuple[Segment, ...]:
    """The segments a decision at frame ``t`` sees, in time order, ``O_t`` last."""
    seen = []
    for s in range(max(0, t - window + 1), t):
        if s % stride == 0:
            seen.append(Segment(OBSERVATION, s))
        seen.append(Segment(CODES, s))
    return (*seen, Segment(OBSERVATION, t))


def history_layout(cfg: FlexLAMConfig, frames: int, phase: int = 0, decisions: str | None = None) -> Layout:
    """Lay out a history of ``frames`` frames, of which frame ``i`` has episode index congruent to ``phase + i``.

    Args:
        cfg: sizes, window and stride.
        frames: how many frames; a training window has ``cfg.sequence.window``, the oracle a whole episode.
        phase: where the window starts on the stride grid, ``0..stride - 1``.
        decisions: ``"all"`` or ``"last"``; None takes the configuration's. A decision adds its ``O_t`` (unless it is
            kept anyway) and ``K - 1`` scratch tokens. Without a decision a block is predicted where it is kept.

    Returns:
        Layout: kept segments first, in time order, then those of the decisions.
    """
    seq, slots, patches = cfg.sequence, cfg.bottleneck.slots, cfg.tokens_per_frame
    mode = decisions or seq.decisions
    chosen = set(range(frames)) if mode == "all" else {frames - 1}
    placed, base, start = [], {}, 0
    for i in range(frames):
        if (phase + i) % seq.stride == 0:
            placed.append(Placed(OBSERVATION, i, start, patches, start, i, False))
            start += patches
        base[i] = start  # persistent tokens before Z_i: where it, or a fresh O_i, takes its positions
        if i < frames - 1:
            placed.append(Placed(CODES, i, start, slots, start, i + 1, False))
            start += slots
    for i in sorted(chosen):
        first = base[i]
        if (phase + i) % seq.stride != 0:
            placed.append(Placed(OBSERVATION, i, start, patches, first, i, False))
            start, first = start + patches, first + patches
        if slots > 1:
            placed.append(Placed(CODES, i, start, slots - 1, first, i, True))
            start += slots - 1
    return _finish(tuple(placed), start, slots, seq.window, seq.stride, phase, chosen)


def _finish(
    placed: tuple[Placed, ...], tokens: int, slots: int, window: int, stride: int, phase: int, chosen: set[int]
) -> Layout:
    positions = torch.cat([torch.arange(s.position, s.position + s.length) for s in placed])
    mask = torch.zeros(tokens, tokens, dtype=torch.bool)
    for q in placed:
        rows = slice(q.start, q.start + q.length)
        for key in placed:
            if key is not q and sees(q, key, window, stride, phase):
                mask[rows, key.start : key.start + key.length] = True
        mask[rows, rows] = torch.ones(q.length, q.length, dtype=torch.bool).tril()
    source: list[int] = []
    frame: list[int] = []
    slot: list[int] = []
    ends = {(s.kind, s.frame, s.scratch): s for s in placed}
    last_kept = -1
    for s in placed:
        if s.kind == CODES and not s.scratch and s.frame not in chosen:
            first = [last_kept] if last_kept >= 0 else []
            tokens_in = [*first, *range(s.start, s.start + slots - 1)]
            source += tokens_in
            frame += [s.frame] * len(tokens_in)
            slot += range(slots - len(tokens_in), slots)
        if not s.scratch:
            last_kept = s.start + s.length - 1
    for i in sorted(chosen):
        seen = ends[(OBSERVATION, i, False)]
        source.append(seen.start + seen.length - 1)
        if slots > 1:
            own = ends[(CODES, i, True)]
            source += range(own.start, own.start + own.length)
        frame += [i] * slots
        slot += range(slots)
    return Layout(placed, positions, mask, *(torch.tensor(x, dtype=torch.int64) for x in (source, frame, slot)))


def sees(query: Placed, key: Placed, window: int, stride: int, phase: int) -> bool:
    """Whether ``key`` was in context, and earlier in time order, when ``query`` entered."""
    if key.scratch or (key.frame, key.kind) >= (query.frame, query.kind):
        return False
    now = query.entered
    if key.frame < now - window + 1:
        return False
    kept = key.kind == CODES or (phase + key.frame) % stride == 0
    return kept or key.frame == now
