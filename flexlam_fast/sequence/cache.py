"""The paged cache: keys and values of many independent sessions in one pool (design section 3).

A page holds the ``P`` tokens of (a part of) one segment. What a session can ever have in context is bounded by the
window, so all its pages are reserved when it opens and nothing can run out in mid-episode. Inside the reservation
every segment has a home: ``Z_s`` at ``s mod (window - 1)`` of a ring of blocks, a kept ``O_s`` at ``s / stride`` modulo
a ring of observations, a fresh ``O_t`` and the scratch codes in pages of their own. So a window slides by overwriting,
and the order in memory means nothing: time is in the RoPE positions, membership in the page table.

All that changes from one decision to the next is computed on the device from each session's frame index, without a
word to the host, so that a captured graph goes on being right while windows slide.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from flexlam_fast.checks import check_budget, check_list, check_number
from flexlam_fast.config import FlexLAMConfig
from flexlam_fast.errors import CacheError
from flexlam_fast.ops.block import Spot
from flexlam_fast.sequence.audit import audit, print_session

EMPTY = -1


class Placement(NamedTuple):
    """Where ``N`` new tokens of ``B`` sessions go and what they see.

    sessions int64 ``[B]``; slots int64 ``[B, N]``, token places within the session's reservation; positions int64
    ``[B, N]`` for RoPE. table int32 ``[B, pages of a session]`` names pages of the pool: the first ``context`` int32
    ``[B]`` are seen in full; the new tokens' own pages follow in order, and token ``n`` is number ``start + n`` in them
    (``start`` int32 ``[B]``), seeing those up to itself. A negative number is padding: it sees the context at most.
    ``starts`` int32 ``[N, B]``, where there, has each token's own number, so that a column is a view and no launch.
    """

    sessions: Tensor
    slots: Tensor
    positions: Tensor
    table: Tensor
    context: Tensor
    start: Tensor
    starts: Tensor | None = None

    def column(self, j: int) -> Placement:
        """Token ``j`` alone."""
        start = self.start + j if self.starts is None else self.starts[j]
        slots, positions = self.slots[:, j : j + 1], self.positions[:, j : j + 1]
        return self._replace(slots=slots, positions=positions, start=start, starts=None)


class PagedCache:
    """A pool of pages for ``capacity`` sessions, and the bookkeeping of those that are open.

    ``k``, ``v``: ``[layers, pages, P, kv_heads, head_dim]``. ``t [capacity]`` is the index of a session's newest frame,
    -1 before the first; ``count [capacity]`` counts its persistent tokens; ``o_frame`` and ``z_frame`` say which
    frame's segment each home holds.
    """

    def __init__(self, cfg: FlexLAMConfig, capacity: int, device: torch.device, dtype: torch.dtype) -> None:
        seq = cfg.sequence
        self.window, self.stride, self.page = seq.window, seq.stride, cfg.page
        self.slots, self.patches = cfg.bottleneck.slots, cfg.tokens_per_frame
        self.kept = -(-seq.window // seq.stride)  # most grid frames among `window` consecutive ones
        self.code_base = (self.kept + 1) * self.patches
        self.scratch_base = self.code_base + (seq.window - 1) * self.slots
        self.size = self.scratch_base + self.slots  # tokens of a reservation
        self.session_pages = self.size // self.page
        self.capacity = capacity
        shape = (seq.layers, capacity * self.session_pages, self.page, seq.kv_heads, seq.head_dim)
        self.k = torch.zeros(shape, device=device, dtype=dtype)
        self.v = torch.zeros_like(self.k)
        self.o_frame = torch.full((capacity, self.kept + 1), EMPTY, device=device)
        self.z_frame = torch.full((capacity, self.window - 1), EMPTY, device=device)
        self.t = torch.full((capacity,), -1, device=device)
        self.count = torch.zeros(capacity, dtype=torch.int64, device=device)
        self.free = list(range(capacity))[::-1]
        self._tokens = torch.arange(max(self.size, self.patches + self.slots), device=device)

    @property
    def opened(self) -> list[int]:
        """Ids of the open sessions, in ascending order."""
        return sorted(set(range(self.capacity)) - set(self.free))

    def open(self, count: int = 1) -> list[int]:
        """Reserve the pages of ``count`` new sessions and return their ids.

        Raises:
            CacheError: there are too few free pages; none has been taken then.
        """
        check_budget("count", count, 1, 1_000_000)
        if count > len(self.free):
            need, have = count * self.session_pages, len(self.free) * self.session_pages
            total = self.capacity * self.session_pages
            raise CacheError(f"sessions: expected {need} free pages for {count} more, got {have} of {total}")
        return [self.free.pop() for _ in range(count)]

    def close(self, sessions: Sequence[int]) -> None:
        """End sessions and give their pages back.

        Raises:
            CacheError: one that is not open, or named twice.
        """
        chosen = self.check_open(sessions)
        self._forget(chosen)
        self.free += chosen[::-1]

    def reset(self, sessions: Sequence[int] | None = None) -> None:
        """Forget what some open sessions saw (None: all); their next frame is frame 0 again."""
        self._forget(self.opened if sessions is None else self.check_open(sessions))

    def restart(self) -> None:
        """End all sessions and forget everything, pages too, in place: what was captured over this pool stays right."""
        self._forget(list(range(self.capacity)))
        self.free = list(range(self.capacity))[::-1]
        self.k.zero_()
        self.v.zero_()

    def check_open(self, sessions: Sequence[int]) -> list[int]:
        """Return ``sessions`` as a list of integers.

        Raises:
            CacheError: one that is not open, or named twice.
        """
        # a tensor's elements are tensors
        given = sessions.tolist() if isinstance(sessions, Tensor) and sessions.dim() else sessions
        numbers = check_list("sessions", given, "integers")
        chosen = [int(check_number("sessions", n, -(2**63), 2**63 - 1, integer=True)) for n in numbers]
        closed = set(self.free)
        wrong = [s for s in chosen if not 0 <= s < self.capacity or s in closed]
        if wrong or len(set(chosen)) < len(chosen):
            raise CacheError(f"sessions: expected open ones, each once, of {_short(self.opened)}, got {_short(chosen)}")
        return chosen

    def place_append(self, sessions: Tensor) -> Placement:
        """Slide the windows of ``sessions`` int64 ``[B]`` to the next frame and place ``Z_{t-1}`` and ``O_t``.

        These are K + tokens per frame tokens, one prefill. A session at its first frame has no ``Z``: those tokens are
        padding, which is written to scratch and seen by nobody.
        """
        old_t, o_frame, z_frame = self.t[sessions], self.o_frame[sessions], self.z_frame[sessions]
        t = old_t + 1
        started = (old_t >= 0).unsqueeze(1)
        floor = (t - self.window + 1).unsqueeze(1)
        # drops what left the window, and the frame that was only the latest
        o_frame.masked_fill_((o_frame % self.stride != 0) | (o_frame < floor), EMPTY)
        z_frame.masked_fill_(z_frame < floor, EMPTY)
        before = torch.cat([o_frame >= 0, z_frame >= 0], dim=1)
        z_home = (old_t.clamp_min(0) % (self.window - 1)).unsqueeze(1)
        o_home = torch.where(t % self.stride == 0, t // self.stride % self.kept, self.kept).unsqueeze(1)
        z_frame.scatter_(1, z_home, torch.where(started, old_t.unsqueeze(1), z_frame.gather(1, z_home)))
        o_frame.scatter_(1, o_home, t.unsqueeze(1))
        z_slots = torch.where(started, self.code_base + z_home * self.slots, self.scratch_base)
        o_slots = o_home * self.patches + self._tokens[: self.patches]
        first = self.count[sessions].unsqueeze(1)
        o_first = first + started * self.slots
        positions = torch.cat([first + self._tokens[: self.slots], o_first + self._tokens[: self.patches]], dim=1)
        count = o_first.squeeze(1) + torch.where(t % self.stride == 0, self.patches, 0)
        for ours, new in ((self.t, t), (self.o_frame, o_frame), (self.z_frame, z_frame), (self.count, count)):
            ours.index_copy_(0, sessions, new)
        slots = torch.cat([z_slots + self._tokens[: self.slots], o_slots], dim=1)
        table, context = self._table(sessions, before, z_home, o_home, started)
        start = torch.where(started.squeeze(1), 0, -self.slots).to(torch.int32)
        return Placement(sessions, slots, positions, table, context, start)

    def place_codes(self, append: Placement) -> Placement:
        """Place the K codes of the decision that ``append`` began: seen by later ones of them, and never kept."""
        positions = append.positions[:, -1:] + 1 + self._tokens[: self.slots]
        slots = (self.scratch_base + self._tokens[: self.slots]).expand(len(positions), -1)
        started = append.start == 0
        entered = torch.where(started, self.slots + self.patches, self.patches) // self.page
        starts = self._tokens[: self.slots].to(torch.int32).unsqueeze(1).repeat(1, len(positions))
        return append._replace(
            slots=slots,
            positions=positions,
            context=append.context + entered.to(torch.int32),
            start=starts[0],
            starts=starts,
        )

    def rows(self, place: Placement) -> Tensor:
        """Where the tokens of ``place`` stand in the pool, int64 ``[B, N]``, counted in tokens."""
        return place.sessions.unsqueeze(1) * self.size + place.slots

    def spot(self, place: Placement) -> Spot:
        """The same for an engine."""
        return Spot(place.table, place.context, self.rows(place), place.positions)

    def mask(self, place: Placement) -> Tensor:
        """What the tokens of ``place`` see, bool ``[B, 1, N, S]`` over the reservation of their session.

        Padding that sees nothing sees its own place, so that softmax has a term.
        """
        batch, tokens = place.slots.shape
        per, pages = self.page, self.session_pages
        index = self._tokens[:pages].expand(batch, pages)
        home = (place.table - place.sessions.unsqueeze(1).to(torch.int32) * pages).long().clamp(0, pages - 1)
        order = torch.full((batch, pages), pages, device=index.device).scatter_reduce(
            1, home, index, reduce="amin", include_self=True
        )  # where in the table each page stands
        order = order.repeat_interleave(per, dim=1)  # [B, S]
        context = place.context.unsqueeze(1)
        number = (order - context) * per + self._tokens[: self.size] % per  # own tokens count from 0
        own = (place.start.unsqueeze(1) + self._tokens[:tokens]).unsqueeze(2)  # [B, N, 1]
        seen = (order < context).unsqueeze(1) | ((number >= 0).unsqueeze(1) & (number.unsqueeze(1) <= own))
        alone = (own < 0) & (place.slots.unsqueeze(2) == self._tokens[: self.size])
        return (seen | alone).unsqueeze(1)

    def verify(self) -> None:
        """Check everything the bookkeeping promises against the window rule, from the sessions' frame indices alone.

        Raises:
            CacheError: naming the first promise that does not hold.
        """
        audit(self)

    def __str__(self) -> str:
        used = self.capacity - len(self.free)
        head = (
            f"{used} of {self.capacity} sessions open, {used * self.session_pages} of "
            f"{self.capacity * self.session_pages} pages of {self.page} tokens taken"
        )
        return "\n".join([head, *(print_session(self, s) for s in self.opened)])

    def _forget(self, sessions: list[int]) -> None:
        which = torch.tensor(sessions, dtype=torch.int64, device=self.t.device)
        for state, start in ((self.o_frame, EMPTY), (self.z_frame, EMPTY), (self.t, -1), (self.count, 0)):
            state.index_fill_(0, which, start)

    def _table(
        self, sessions: Tensor, before: Tensor, z_home: Tensor, o_home: Tensor, started: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Page table: what was in context, then ``Z``'s pages, ``O``'s, and the scratch; and how many were there."""
        z_pages, o_pages, pages = self.slots // self.page, self.patches // self.page, self.session_pages
        homes = self.kept + 1
        seen = torch.cat(
            [before[:, :homes].repeat_interleave(o_pages, 1), before[:, homes:].repeat_interleave(z_pages, 1)], dim=1
        )
        context = seen.sum(1, keepdim=True)
        spare = pages  # one entry more than there is, where all that is unseen goes
        table = torch.zeros(len(sessions), pages + 1, dtype=torch.int64, device=sessions.device)
        table.scatter_(1, torch.where(seen, seen.cumsum(1) - 1, spare), self._tokens[: seen.shape[1]].expand_as(seen))
        shift = torch.where(started, z_pages, 0)
        z_at = torch.where(started, context + self._tokens[:z_pages], spare)
        table.scatter_(1, z_at, homes * o_pages + z_home * z_pages + self._tokens[:z_pages])
        table.scatter_(1, context + shift + self._tokens[:o_pages], o_home * o_pages + self._tokens[:o_pages])
        scratch = (pages - z_pages + self._tokens[:z_pages]).expand_as(z_at)
        table.scatter_(1, context + shift + o_pages + self._tokens[:z_pages], scratch)
        table = table[:, :pages] + sessions.unsqueeze(1) * pages
        return table.to(torch.int32), context.squeeze(1).to(torch.int32)


def _short(numbers: list[int]) -> str:
    text = ", ".join(map(str, numbers[:8]))
    return f"[{text}{', ...' if len(numbers) > 8 else ''}]"
