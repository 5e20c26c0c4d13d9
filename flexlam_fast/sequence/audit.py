"""What the cache's bookkeeping promises, derived anew from the window rule, and its state in words."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flexlam_fast.errors import CacheError
from flexlam_fast.sequence.layout import CODES, OBSERVATION, context

if TYPE_CHECKING:
    from flexlam_fast.sequence.cache import PagedCache


def audit(cache: PagedCache) -> None:
    """Check every session of ``cache`` (see ``PagedCache.verify``)."""
    free = cache.free
    if len(set(free)) != len(free) or not set(free) <= set(range(cache.capacity)):
        raise CacheError(f"cache: expected each free session once within 0..{cache.capacity - 1}, got {free}")
    ts, counts = cache.t.tolist(), cache.count.tolist()
    observed, coded = cache.o_frame.tolist(), cache.z_frame.tolist()
    for s in range(cache.capacity):
        if s in free and ts[s] != -1:
            raise CacheError(f"cache: expected closed session {s} at t=-1, got {ts[s]}")
        t = ts[s]
        if t < -1:
            raise CacheError(f"cache: expected session {s} at t=-1 or later, got {t}")
        _check("count", s, counts[s], _persistent(cache, t))
        _check("observations", s, observed[s], _homes(cache, t, OBSERVATION))
        _check("code blocks", s, coded[s], _homes(cache, t, CODES))


def _check(what: str, session: int, got: object, expected: object) -> None:
    if got != expected:
        raise CacheError(f"cache: expected {what} {expected} in session {session}, got {got}")


def _persistent(cache: PagedCache, t: int) -> int:
    """Tokens ever kept after frame ``t``: blocks ``0..t-1`` and the observations on the grid."""
    return max(t, 0) * cache.slots + (t // cache.stride + 1) * cache.patches


def _homes(cache: PagedCache, t: int, kind: int) -> list[int]:
    """Which frame's segment each home must hold."""
    homes = [-1] * (cache.kept + 1 if kind == OBSERVATION else cache.window - 1)
    for segment in context(t, cache.window, cache.stride) if t >= 0 else ():
        if segment.kind == kind:
            s, fresh = segment.frame, segment.frame % cache.stride != 0
            home = s % (cache.window - 1) if kind == CODES else cache.kept if fresh else s // cache.stride % cache.kept
            if homes[home] != -1:
                raise CacheError(f"cache: expected one segment in a home, got those of frames {homes[home]} and {s}")
            homes[home] = s
    return homes


def print_session(cache: PagedCache, session: int) -> str:
    """Say where a session is and which page range holds each of its segments, in time order."""
    t, base = int(cache.t[session]), session * cache.session_pages
    o_pages, z_pages = cache.patches // cache.page, cache.slots // cache.page
    held = [(s, CODES, base + cache.code_base // cache.page + i * z_pages, z_pages)
            for i, s in enumerate(cache.z_frame[session].tolist()) if s >= 0]  # fmt: skip
    held += [(s, OBSERVATION, base + i * o_pages, o_pages)
             for i, s in enumerate(cache.o_frame[session].tolist()) if s >= 0]  # fmt: skip
    parts = [
        f"{'OZ'[kind]}{s}@{page}" + (f"-{page + n - 1}" if n > 1 else "")
        for s, kind, page, n in sorted(held, key=lambda x: x[:2])
    ]
    return f"session {session}: t={t}, {int(cache.count[session])} tokens kept: {' '.join(parts) or 'empty'}"
