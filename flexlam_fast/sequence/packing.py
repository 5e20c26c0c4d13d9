"""Windows of training as packed rows: only tokens that are there, one window after another, nothing padded.

With ``decisions="last"`` a window of at most ``cfg.sequence.window`` frames never drops a page, so its mask is plain
causal (:func:`is_causal`; design section 3), and a window that is cut at its episode's end is the beginning of a whole
one. A batch is then what attention of packed sequences takes, and windows of one batch may have any phases.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flexlam_fast.errors import InputError
from flexlam_fast.sequence.layout import CODES, OBSERVATION, Layout


class Row(NamedTuple):
    """One window as a sequence, counted from its own start; all int64, on the CPU.

    observed ``[O]``, blocks ``[Z]``: the frames of its observation blocks and code blocks; of_codes bool ``[N]``, token
    ``[N]``: which of the two a token is of, and which element there; positions ``[N]``; source, target, slot ``[M]``:
    the token whose output predicts, which element of the code blocks, and which slot of its block that is.
    """

    observed: Tensor
    blocks: Tensor
    of_codes: Tensor
    token: Tensor
    positions: Tensor
    source: Tensor
    target: Tensor
    slot: Tensor


class Packed(NamedTuple):
    """What a forward of packed windows needs, and its loss.

    observed: int64 ``[O, 2]``, window and frame of every observation block; nothing else of a video is looked at.
    blocks: int64 ``[Z, 2]``, window and frame of every code block.
    tokens: int64 ``[T]``, rows of all observation tokens ``[O * patches, hidden]`` followed by all code tokens
        ``[Z * K, hidden]``; each at most once.
    positions: int64 ``[T]``.
    starts: int32 ``[B + 1]``, where each window's tokens start, and ``T``.
    source: int64 ``[M]``, the token whose output predicts a code.
    target: int64 ``[M]``, which code of the blocks ``[Z * K]``.
    slot: int64 ``[M]``, the slot of that code in its block.
    lengths: tokens of every window, on the host.
    longest: the longest of them.
    """

    observed: Tensor
    blocks: Tensor
    tokens: Tensor
    positions: Tensor
    starts: Tensor
    source: Tensor
    target: Tensor
    slot: Tensor
    lengths: tuple[int, ...]
    longest: int

    def to(self, device: torch.device | str) -> Packed:
        """The same on ``device``; nothing waits for the copies."""
        moved: list[Any] = [t.to(device, non_blocking=True) if isinstance(t, Tensor) else t for t in self]
        return Packed._make(moved)


def is_causal(layout: Layout) -> bool:
    """Whether every token of ``layout`` sees all tokens before it, and stands right behind them."""
    return torch.equal(layout.mask, torch.ones_like(layout.mask).tril()) and torch.equal(
        layout.positions, torch.arange(len(layout.positions), device=layout.positions.device)
    )


class Packer:
    """Packs batches of windows; what a window of one phase and length looks like is worked out once.

    Args:
        layouts: of whole windows with ``decisions="last"``, by phase, as ``history_layout(cfg, window, phase)`` makes.

    Raises:
        InputError: a layout whose mask is not causal; such a configuration keeps the dense mask.
    """

    def __init__(self, layouts: Sequence[Layout]) -> None:
        for phase, layout in enumerate(layouts):
            if not is_causal(layout):
                raise InputError(f"layouts: expected causal masks, got another at phase {phase}")
        self.layouts = tuple(layouts)
        self.window = 1 + max(s.frame for s in self.layouts[0].segments)
        self.patches = max(s.length for s in self.layouts[0].segments if s.kind == OBSERVATION)
        self.slots = 1 + int(self.layouts[0].slot.max())
        self.row = lru_cache(maxsize=None)(self._row)

    def _row(self, phase: int, frames: int) -> Row:
        """A window of ``phase`` of which the first ``frames`` frames have a transition in the episode.

        Tokens go as far as the last one that predicts something. Without any, as for one frame off the grid whose block
        has one slot, the row is empty.
        """
        layout = self.layouts[phase]
        counts = layout.frame.cpu() < frames
        source, frame, slot = (t.cpu()[counts] for t in (layout.source, layout.frame, layout.slot))
        tokens = int(source.max()) + 1 if len(source) else 0
        kept = [s for s in layout.segments if s.start < tokens]
        observed = [s.frame for s in kept if s.kind == OBSERVATION]
        blocks = sorted({s.frame for s in kept if s.kind == CODES} | set(frame.tolist()))
        token = torch.empty(tokens, dtype=torch.int64)
        of_codes = torch.zeros(tokens, dtype=torch.bool)
        for s in kept:
            size, order = (self.slots, blocks) if s.kind == CODES else (self.patches, observed)
            rows = slice(s.start, min(s.start + s.length, tokens))
            of_codes[rows] = s.kind == CODES
            token[rows] = order.index(s.frame) * size + torch.arange(rows.stop - rows.start)
        place = {f: i * self.slots for i, f in enumerate(blocks)}
        target = torch.tensor([place[f] for f in frame.tolist()], dtype=torch.int64) + slot
        seen, made = (torch.tensor(x, dtype=torch.int64) for x in (observed, blocks))
        return Row(seen, made, of_codes, token, layout.positions[:tokens].cpu(), source, target, slot)

    def __call__(self, phases: Sequence[int], frames: Sequence[int]) -> Packed:
        """Pack a batch, longest windows first, so that those of one length stand side by side.

        Args:
            phases: of every window, ``0..stride - 1``.
            frames: how many frames of every window have a transition in its episode, ``1..window``.

        Returns:
            Packed: on the CPU; ``observed`` and ``blocks`` say which window of the batch is where.

        Raises:
            InputError: phases or frames out of range, or not one for each window.
        """
        if len(phases) != len(frames) or not len(frames):
            raise InputError(f"frames: expected one number for each of {len(phases)} windows, got {len(frames)}")
        if not all(0 <= p < len(self.layouts) for p in phases):
            raise InputError(f"phases: expected 0..{len(self.layouts) - 1}, got {list(phases)}")
        if not all(1 <= n <= self.window for n in frames):
            raise InputError(f"frames: expected 1..{self.window}, got {list(frames)}")
        rows = [self.row(int(p), int(n)) for p, n in zip(phases, frames, strict=True)]
        order = sorted(range(len(rows)), key=lambda b: -len(rows[b].token))
        return self._join([rows[b] for b in order], order)

    def _join(self, rows: list[Row], order: list[int]) -> Packed:
        """Rows one after another; ``order`` says which window each is."""
        lengths = tuple(len(row.token) for row in rows)
        starts = [0, *accumulate(lengths)]
        before = [0, *accumulate(len(row.observed) * self.patches for row in rows)]
        codes = [0, *accumulate(len(row.blocks) * self.slots for row in rows)]

        def named(b: int, frames: Tensor) -> Tensor:
            return torch.stack([torch.full_like(frames, b), frames], dim=1)

        places = list(zip(rows, order, starts, before, codes, strict=False))
        return Packed(
            observed=torch.cat([named(b, row.observed) for row, b, *_ in places]),
            blocks=torch.cat([named(b, row.blocks) for row, b, *_ in places]),
            tokens=torch.cat([row.token + torch.where(row.of_codes, before[-1] + z, o) for row, _, _, o, z in places]),
            positions=torch.cat([row.positions for row in rows]),
            starts=torch.tensor(starts, dtype=torch.int32),
            source=torch.cat([row.source + at for row, _, at, _, _ in places]),
            target=torch.cat([row.target + z for row, *_, z in places]),
            slot=torch.cat([row.slot for row in rows]),
            lengths=lengths,
            longest=max(lengths),
        )
