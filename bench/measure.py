"""How things are timed: in turns, in one run and process, the order changing from round to round.

A clock times one turn of one side. On a CPU it is the wall clock; on a GPU it is a pair of device events, with the L2
flushed and again with it warm. Whole decisions keep the wall clock on either, and wait for the device.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

WARM_UPS, ROUNDS, SECONDS = 20, 100, 25
OURS = "ours"
MOST_CALLS = 1000

Side = Callable[[], object]


class Turn(NamedTuple):
    """Milliseconds per call of one turn; NaN is what the clock cannot tell.

    ``ms`` is what counts (on a GPU: with the L2 flushed), ``warm`` is with the data still in the L2, ``host`` is what
    the call kept the host busy.
    """

    ms: float
    warm: float = math.nan
    host: float = math.nan


class Clock(Protocol):
    """Times ``calls`` calls of a side in one turn; ``turn_ms`` is how long a turn lasts at least."""

    name: str
    turn_ms: float

    def __call__(self, side: Side, calls: int = 1) -> Turn: ...


class WallClock:
    """``perf_counter`` around a turn of at least 0.2 ms, beside which its own 0.0001 ms does not show.

    Args:
        device: where the work is done.
        wait: whether the work must be done when the clock stops; without, what counts is the host's part alone.
    """

    turn_ms = 0.2

    def __init__(self, device: torch.device, wait: bool = True) -> None:
        self.device, self.wait = device, wait
        self.name = "wall clock" if wait else "wall clock of the host, which does not wait for the device"

    def __call__(self, side: Side, calls: int = 1) -> Turn:
        synchronize(self.device)
        start = time.perf_counter()
        for _ in range(calls):
            side()
        if self.wait:
            synchronize(self.device)
        return Turn(1e3 * (time.perf_counter() - start) / calls)


class DeviceClock:
    """Device events around one call: after the L2 was flushed, and again just after a call that warmed it.

    Gaps in which the device waits for the host lie between the events and count. The flush keeps the device busy while
    the host gets ahead, so that the way to the first kernel does not.
    """

    name, turn_ms = "device events, L2 flushed before each call", 0.0

    def __init__(self, device: torch.device) -> None:
        size = torch.cuda.get_device_properties(device).L2_cache_size
        self.device = device
        self.scratch = torch.empty(max(2 * size // 4, 1), dtype=torch.float32, device=device)  # twice the L2
        self.start, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def __call__(self, side: Side, calls: int = 1) -> Turn:
        synchronize(self.device)
        self.flush()
        ms, host = self.timed(side)
        side()
        torch.cuda._sleep(200_000)  # 0.1 ms in which the host gets ahead, as it does during the flush
        warm, _ = self.timed(side)
        return Turn(ms, warm, host)

    def flush(self) -> None:
        """Write twice the L2, then read that, or the lines left there unwritten (50 MB on an H100) would cost us."""
        self.scratch.zero_()
        self.scratch.sum()

    def timed(self, side: Side) -> tuple[float, float]:
        """Milliseconds of one call on the device, and of the host enqueuing it."""
        self.start.record()
        began = time.perf_counter()
        side()
        host = 1e3 * (time.perf_counter() - began)
        self.end.record()
        self.end.synchronize()
        return self.start.elapsed_time(self.end), host


class Timing(NamedTuple):
    """Every side's turns, how many calls its turn was, and the clock's name; ours is the side ``ours``."""

    turns: dict[str, list[Turn]]
    calls: dict[str, int]
    clock: str

    def taken(self, side: str, what: str = "ms") -> list[float]:
        """Milliseconds of every turn of a side; ``what`` is a field of :class:`Turn`."""
        return [getattr(turn, what) for turn in self.turns[side]]

    def median(self, side: str, what: str = "ms") -> float:
        """Median milliseconds of a side."""
        return float(np.median(self.taken(side, what)))


def in_turns(benchmark: Any, ours: Side, peers: dict[str, Side], clock: Clock, rounds: int) -> Timing:
    """Time ours and every peer in turns, and tell pytest-benchmark what ours took.

    Whatever else the machine does in the meantime falls on all of them alike. There are 20 warm-ups before ``rounds``
    rounds, as in the paper (B.6); ``rounds=0`` takes as many of both, up to 100, as fit into half a minute.
    """
    sides = {OURS: ours, **peers}
    fastest = dict.fromkeys(sides, math.inf)
    start = time.perf_counter()
    for warm in range(1, WARM_UPS + 1):
        for name, turns in take_turns(sides, clock, 1).items():
            fastest[name] = min(fastest[name], turns[0].ms)
        spent = time.perf_counter() - start
        if not rounds and warm > 1 and spent > SECONDS / 5:
            break
    calls = {name: calls_per_turn(ms, clock.turn_ms) for name, ms in fastest.items()}
    per_round = max(spent / warm, sum(1e-3 * fastest[name] * calls[name] for name in sides))
    fitting = min(max(int(SECONDS / per_round), 5), ROUNDS)
    timing = Timing(take_turns(sides, clock, (rounds or fitting) if benchmark.enabled else 1, calls), calls, clock.name)
    tell(benchmark, timing.taken(OURS))
    return timing


def take_turns(
    sides: dict[str, Side], clock: Clock, rounds: int, calls: dict[str, int] | None = None
) -> dict[str, list[Turn]]:
    """Time every side once in each round, in an order that changes from round to round."""
    taken: dict[str, list[Turn]] = {name: [] for name in sides}
    for number in range(rounds):
        for name in order(list(sides), number):
            taken[name].append(clock(sides[name], calls[name] if calls else 1))
    return taken


def order(names: Sequence[str], number: int) -> list[str]:
    """Rotate every second round and reverse the others, so that nobody always runs after the same one."""
    turn = number // 2 % len(names)
    rotated = [*names[turn:], *names[:turn]]
    return rotated[::-1] if number % 2 else rotated


def calls_per_turn(ms: float, least: float) -> int:
    """How many calls of ``ms`` make a turn of at least ``least`` ms: 1 for a long call, 1000 at most."""
    return min(max(math.ceil(least / ms), 1), MOST_CALLS) if ms > 0 else MOST_CALLS


_told = [0.0]


def told_time() -> float:
    """Return the seconds told so far: the timer that the benches give pytest-benchmark, whose table is then ours."""
    return _told[0]


def tell(benchmark: Any, taken: list[float]) -> None:
    """Give pytest-benchmark milliseconds that were taken elsewhere: one round each, through its timer."""
    left = iter(taken)

    def replay() -> None:
        _told[0] += 1e-3 * next(left)

    benchmark.pedantic(replay, rounds=len(taken))


def synchronize(device: torch.device) -> None:
    """Wait for the device; a CPU never lags behind."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def spread(ms: list[float]) -> str:
    """Mean, p50 and p99 of some milliseconds, for people."""
    p50, p99 = np.percentile(ms, [50, 99])
    return f"mean {np.mean(ms):.4g}, p50 {p50:.4g}, p99 {p99:.4g} ms of {len(ms)}"
