"""What an evaluation needs of a policy, and one decision with its wall time."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from flexlam_fast.config import FlexLAMConfig
from flexlam_fast.types import Decision

#: Latency protocol (design section 3; paper B.6).
WARMUP, MEASURED = 20, 100


class Actor(Protocol):
    """A policy as evaluations see it; ``flexlam_fast.Policy`` is one."""

    cfg: FlexLAMConfig

    def reset(self, batch_size: int = 1, seed: int = 0, *, sessions: Sequence[int] | None = None) -> None:
        """Start new episodes: all of them, or only those of ``sessions``."""

    def act(self, frames: np.ndarray[Any, Any], budget: int) -> Decision:
        """Decide for every session."""
        ...

    def describe(self) -> str:
        """Say in one line what this is."""
        ...


class Timed(NamedTuple):
    """Actions of one decision, the first discrete dimension of each session, and the milliseconds it took."""

    actions: list[int]
    ms: float


def decide(actor: Actor, frames: NDArray[np.uint8], budget: int) -> Timed:
    """Act once; the time runs from the frames on the host to the actions on the host."""
    start = time.perf_counter()
    decision = actor.act(frames, budget=budget)
    actions = decision.actions.discrete[:, 0].tolist()  # waits for the device
    return Timed(actions, (time.perf_counter() - start) * 1e3)


def time_decisions(
    actor: Actor, frames: NDArray[np.uint8], budget: int, warmup: int = WARMUP, measured: int = MEASURED
) -> tuple[float, ...]:
    """Milliseconds of ``measured`` decisions in one session, after ``warmup`` that do not count.

    Args:
        actor: whose decisions; it is reset.
        frames: uint8 ``[n,H,W,3]`` in the order they were filmed; they start again when there are too few.
        budget: ``k``.
        warmup: decisions before the first that counts.
        measured: decisions that count.
    """
    actor.reset(1)
    times = [decide(actor, frames[i % len(frames)][None], budget).ms for i in range(warmup + measured)]
    return tuple(times[warmup:])
