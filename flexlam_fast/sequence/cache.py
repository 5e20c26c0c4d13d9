"""A plain, correct cache of segments: what a batch of sessions has in context, and at which decision each one is.

Every segment has a home: ``Z_s`` in slot ``s mod (window - 1)`` of the code ring, a kept ``O_s`` in slot
``(s / stride)`` modulo the ring of observations, a fresh ``O_t`` and the scratch codes in regions of their own. So a
window slides by overwriting, and the order in memory means nothing: time is in the RoPE positions, membership in the
mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from flexlam_fast.config import FlexLAMConfig
from flexlam_fast.errors import CacheError

EMPTY = -1


class Placement(NamedTuple):
    """Where new tokens go: memory ``slots`` and RoPE ``positions [B, N]``, and what they see, ``mask [B, 1, N, S]``."""

    slots: Tensor
    positions: Tensor
    mask: Tensor


class SegmentCache:
    """Keys and values of ``batch`` independent sessions, ``[layers, batch, kv_heads, S, head_dim]``.

    ``t [batch]`` is the index of the newest frame, -1 before the first; ``count [batch]`` counts persistent tokens.
    """

    def __init__(self, cfg: FlexLAMConfig, batch: int, device: torch.device, dtype: torch.dtype) -> None:
        seq = cfg.sequence
        self.window, self.stride = seq.window, seq.stride
        self.slots, self.patches = cfg.bottleneck.slots, cfg.tokens_per_frame
        self.kept = -(-seq.window // seq.stride)  # most grid frames among `window` consecutive ones
        self.code_base = (self.kept + 1) * self.patches
        self.scratch_base = self.code_base + (seq.window - 1) * self.slots
        size = self.scratch_base + self.slots
        self.k = torch.zeros(seq.layers, batch, seq.kv_heads, size, seq.head_dim, device=device, dtype=dtype)
        self.v = torch.zeros_like(self.k)
        self.o_frame = torch.full((batch, self.kept + 1), EMPTY, device=device)
        self.z_frame = torch.full((batch, self.window - 1), EMPTY, device=device)
        self.t = torch.full((batch,), -1, device=device)
        self.count = torch.zeros(batch, dtype=torch.int64, device=device)
        self.scratch = 0
        self.pending: Tensor | None = None

    @property
    def batch(self) -> int:
        """Number of sessions."""
        return self.t.shape[0]

    def reset(self, sessions: Sequence[int] | None = None) -> None:
        """Forget some sessions (None: all); their next frame is frame 0 again."""
        which = slice(None) if sessions is None else torch.tensor(list(sessions), dtype=torch.int64)
        self.o_frame[which] = EMPTY
        self.z_frame[which] = EMPTY
        self.t[which] = -1
        self.count[which] = 0
        self.scratch = 0

    def place_append(self) -> Placement:
        """Slide every window to the next frame and place ``Z_{t-1}`` and ``O_t`` (K + tokens per frame, one prefill).

        A session at its first frame has no ``Z``: its tokens are computed beside the others' and seen by nobody.
        """
        old_t = self.t
        self.t = t = old_t + 1
        started = old_t >= 0
        floor = (t - self.window + 1).unsqueeze(1)
        kept = (self.o_frame % self.stride == 0) & (self.o_frame >= floor)
        self.o_frame.masked_fill_(~kept, EMPTY)  # drops what left the window, and the frame that was only the latest
        self.z_frame.masked_fill_(self.z_frame < floor, EMPTY)
        before = self._visible()
        z_home, o_home = old_t.clamp_min(0) % (self.window - 1), self._observation_home(t)
        rows = torch.arange(self.batch, device=t.device)
        self.z_frame[rows, z_home] = torch.where(started, old_t, self.z_frame[rows, z_home])
        self.o_frame[rows, o_home] = t
        z_tokens = self.code_base + z_home.unsqueeze(1) * self.slots + torch.arange(self.slots, device=t.device)
        o_tokens = o_home.unsqueeze(1) * self.patches + torch.arange(self.patches, device=t.device)
        slots = torch.cat([z_tokens, o_tokens], dim=1)
        z_first = self.count
        o_first = z_first + torch.where(started, self.slots, 0)
        positions = torch.cat(
            [
                z_first.unsqueeze(1) + torch.arange(self.slots, device=t.device),
                o_first.unsqueeze(1) + torch.arange(self.patches, device=t.device),
            ],
            dim=1,
        )
        self.count = o_first + torch.where(t % self.stride == 0, self.patches, 0)
        self.next_position = o_first + self.patches
        self.scratch = 0
        return Placement(slots, positions, self._append_mask(before, slots, started))

    def place_scratch(self) -> Placement:
        """Place one generated code after ``O_t``; it is seen by later codes of the same decision and never kept."""
        if self.scratch >= self.slots:
            raise CacheError(f"scratch: expected at most {self.slots} codes in a decision, got one more")
        slot = torch.full((self.batch, 1), self.scratch_base + self.scratch, device=self.t.device)
        positions = (self.next_position + self.scratch).unsqueeze(1)
        self.scratch += 1
        seen = self._visible()
        seen[:, self.scratch_base : self.scratch_base + self.scratch] = True
        return Placement(slot, positions, seen.view(self.batch, 1, 1, -1))

    def write_to(self, placement: Placement) -> SegmentCache:
        """Make :meth:`update` write where ``placement`` says."""
        self.pending = placement.slots
        return self

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write ``k``, ``v`` ``[B, kv_heads, N, D]`` of a layer at the pending slots; return all of its slots."""
        if self.pending is None:
            raise CacheError("update: expected a placement first, got none")
        index = self.pending.view(self.batch, 1, -1, 1).expand(k.shape)
        self.k[layer].scatter_(2, index, k.to(self.k.dtype))
        self.v[layer].scatter_(2, index, v.to(self.v.dtype))
        return self.k[layer], self.v[layer]

    def _observation_home(self, t: Tensor) -> Tensor:
        return torch.where(t % self.stride == 0, t // self.stride % self.kept, self.kept)

    def _visible(self) -> Tensor:
        """Memory slots that hold a segment in context, bool ``[B, S]``, scratch excluded."""
        seen = torch.zeros(self.batch, self.k.shape[3], dtype=torch.bool, device=self.t.device)
        seen[:, : self.code_base] = (self.o_frame >= 0).repeat_interleave(self.patches, dim=1)
        seen[:, self.code_base : self.scratch_base] = (self.z_frame >= 0).repeat_interleave(self.slots, dim=1)
        return seen

    def _append_mask(self, before: Tensor, slots: Tensor, started: Tensor) -> Tensor:
        tokens = slots.shape[1]
        own = torch.ones(tokens, tokens, dtype=torch.bool, device=slots.device).tril().repeat(self.batch, 1, 1)
        # a session without Z: its O does not see the padding, which still sees itself so that softmax has a term
        own[:, self.slots :, : self.slots] &= started.view(-1, 1, 1)
        mask = before.unsqueeze(1).repeat(1, tokens, 1)
        mask.scatter_(2, slots.unsqueeze(1).expand(-1, tokens, -1), own)
        return mask.unsqueeze(1)
