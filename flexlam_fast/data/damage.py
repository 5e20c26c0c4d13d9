"""Which frames of a damaged video can be kept: what a bad packet takes with it, up to the next key frame."""

from __future__ import annotations

import itertools
import math
from bisect import bisect_left, bisect_right, insort
from collections.abc import Sequence
from typing import Any

#: Bytes between two packets of one file, at most, where none of them is lost: headers of blocks and clusters.
MAX_OVERHEAD = 100
EMPTY_CHUNK = 8  # bytes of an AVI file for a frame that is left out on purpose
CUT_SECONDS = 1.0  # a longer jump of the clock to a key frame is a cut, not a loss
IRREGULAR = 1.5  # frame durations from a packet to the next one


class Damage:
    """Packets are numbered in the order of decoding. A bad one spoils itself and what is predicted from it.

    That is every packet up to the next key frame, and of those behind it the ones that are shown before it.
    """

    def __init__(self) -> None:
        self.leading = 0
        self._bad: list[float] = []  # ascending
        self._known: set[float] = set()  # the same
        self._keys: list[int] = []
        self._times: dict[int, int | None] = {}

    def key(self, number: int, pts: int | None) -> None:
        """A key frame; where it stays good, damage ends."""
        self._keys.append(number)
        self._times[number] = pts

    def bad(self, number: float) -> None:
        """A packet that is damaged; ``n - 0.5`` for packets that are missing before ``n``."""
        if number not in self._known:
            self._known.add(number)
            insort(self._bad, number)

    def spoils(self, number: int, pts: int | None) -> bool:
        """Whether the frame of this packet is damaged."""
        if not self._bad:
            return False
        key = self._key_before(number + 1)
        if self.within(key, number):
            return True
        shown_at = self._times.get(key)
        if pts is None or shown_at is None or not key < number or pts >= shown_at:
            return False
        leading = self.within(self._key_before(key), key)
        self.leading += leading
        return leading

    def within(self, after: float, upto: float) -> bool:
        """Whether a bad packet has a number above ``after`` and at most ``upto``."""
        return bisect_right(self._bad, upto) > bisect_right(self._bad, after)

    def extent(self, packets: int) -> tuple[int, int]:
        """How many frames of a file of so many packets are damaged, and in how many places."""
        lost, places, end = self.leading, 0, 0
        healthy = [*(key for key in self._keys if key not in self._known), packets]
        for number in self._bad:
            if number >= end:
                start = math.ceil(number)
                end = healthy[bisect_left(healthy, start)]
                lost, places = lost + end - start, places + 1
        return lost, places

    def _key_before(self, number: int) -> int:
        """The last good key frame before a packet; -1 for none."""
        index = bisect_left(self._keys, number) - 1
        while index >= 0 and self._keys[index] in self._known:
            index -= 1
        return self._keys[index] if index >= 0 else -1


def torn(window: Sequence[Any], before: Any, overhead: int, container: str, rate: float) -> float | None:
    """Judge the first packet of a window by what the demuxer says and by what stands around it.

    Args:
        window: the packet and up to a few that follow it.
        before: the packet before it, or None.
        overhead: bytes of the file between its data and that of the packet before it, of whatever stream; -1 if
            reading failed between them.
        container: FFmpeg's name of the format.
        rate: frames per second.

    Returns:
        0 if it is damaged, -0.5 if packets are missing before it, None if it seems whole.
    """
    if overhead < 0:
        return -0.5
    first, near = window[0], [*([before] if before is not None else []), *window]
    steps = [
        float((b.dts - a.dts) * b.time_base) * rate
        for a, b in itertools.pairwise(near)
        if a.dts is not None and b.dts is not None
    ]
    if container == "mpegts" and first.is_corrupt:
        # Of a continuity counter that jumps. It does so without loss where files are joined: then the clock starts
        # again, or a key frame follows, in time or much later. The mark stands up to two packets before the place.
        if any(step < 0 for step in steps):
            return None
        longest = max(steps, default=0)
        joined = longest <= IRREGULAR or longest > rate * CUT_SECONDS
        return None if joined and any(p.is_keyframe for p in window[1:]) else 0
    if container == "mpeg":
        return None  # marks every packet of the last chunk of a file that is cut anywhere in it
    if first.is_corrupt:
        return 0
    irregular = any(not 0 <= step <= IRREGULAR for step in steps)
    allowed = MAX_OVERHEAD + EMPTY_CHUNK * max(steps, default=0)
    return -0.5 if overhead > allowed and irregular else None
