"""How long a decision takes here at each budget, and the largest budget that keeps a deadline (protocol: paper B.6)."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from flexlam_fast.errors import InputError


class Latency(NamedTuple):
    """Milliseconds of a decision with budget ``budget``, host frame in to host action out."""

    budget: int
    mean_ms: float
    p50_ms: float
    p99_ms: float


class LatencyTable(NamedTuple):
    """What a warm-up measured for ``batch`` sessions, smallest budget first; ``str()`` of it is for people."""

    batch: int
    rows: tuple[Latency, ...]

    def largest_within(self, deadline_ms: float) -> int:
        """Return the largest budget whose p99 is at most ``deadline_ms``.

        Raises:
            InputError: no number, or less than the smallest budget's p99 takes.
        """
        if not isinstance(deadline_ms, int | float) or isinstance(deadline_ms, bool) or not deadline_ms > 0:
            raise InputError(f"deadline_ms: expected a number above 0, got {deadline_ms!r}")
        fitting = [row.budget for row in self.rows if row.p99_ms <= deadline_ms]
        if not fitting:
            least = min(self.rows, key=lambda row: row.p99_ms)
            raise InputError(
                f"deadline_ms: expected at least {least.p99_ms:.3g}, the p99 of a decision at k={least.budget} here, "
                f"got {deadline_ms:g}"
            )
        return max(fitting)

    def __str__(self) -> str:
        lines = [f"{'k':>4} {'mean ms':>9} {'p50':>9} {'p99':>9}   batch {self.batch}"]
        lines += [f"{row.budget:>4} {row.mean_ms:>9.3g} {row.p50_ms:>9.3g} {row.p99_ms:>9.3g}" for row in self.rows]
        return "\n".join(lines)


def measure(
    decide: Callable[[int], object], batch: int, budgets: Sequence[int], warm: int, rounds: int
) -> LatencyTable:
    """Time ``decide(k)``, which returns when its action is on the host, for each budget in turn.

    Budgets take turns within a round, so whatever else the machine does in the meantime falls on all of them alike.
    """
    for _ in range(warm):
        for k in budgets:
            decide(k)
    taken: dict[int, list[float]] = {k: [] for k in budgets}
    for _ in range(rounds):
        for k in budgets:
            start = time.perf_counter()
            decide(k)
            taken[k].append(1e3 * (time.perf_counter() - start))
    rows = [Latency(k, float(np.mean(ms)), *map(float, np.percentile(ms, [50, 99]))) for k, ms in taken.items()]
    return LatencyTable(batch, tuple(sorted(rows)))
