"""One CUDA graph per batch size and budget: from the staged frame to the staged action in one replay.

A graph is captured when its first decision is asked for. What it reads and writes stays in place: frames and session
numbers come through pinned staging, everything else is the loop's own state on the device, so windows slide, sessions
reset and ragged batches replay the same graph.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flexlam_fast.capture import WARM_RUNS, recording, warming
from flexlam_fast.loop import DecisionLoop, Outcome
from flexlam_fast.types import Actions

#: Graphs kept at once beside those of warm-ups; the one used longest ago gives way. All share one pool of memory.
MAX_GRAPHS = 32

Decide = Callable[[Tensor, Tensor], Outcome]


class Captured(NamedTuple):
    """A graph, the pinned memory that it reads frames and sessions from, and that which it leaves its outcome in."""

    graph: torch.cuda.CUDAGraph
    frames: Tensor
    sessions: Tensor
    outcome: Outcome


class GraphedLoop:
    """Captures and replays decisions of one loop."""

    def __init__(self, loop: DecisionLoop) -> None:
        self.loop, self.device = loop, loop.pixels.device
        self.captured: OrderedDict[tuple[object, ...], Captured] = OrderedDict()
        self.kept: set[tuple[object, ...]] = set()  # those that never give way
        self.pool = torch.cuda.graph_pool_handle()
        self.done = torch.cuda.Event()

    def __reduce__(self) -> tuple[Any, ...]:
        """Graphs belong to the memory they were captured with: a copy captures its own."""
        return type(self), (self.loop,)

    def decide(self, key: tuple[object, ...], decide: Decide, frames: Tensor, sessions: list[int]) -> Outcome:
        """Replay the graph of ``key``, after capturing it if it is new.

        Args:
            key: everything that ``decide`` was made from: budget, temperature, and so on.
            decide: frames uint8 ``[B, H, W, C]`` and sessions int64 ``[B]``, both on the device, to an outcome there.
            frames: uint8 ``[B, H, W, C]``, host or device.
            sessions: their sessions.

        Returns:
            The outcome on the host, in memory of its own.
        """
        found = self.prepare(key, decide, tuple(frames.shape))
        found.frames.copy_(frames)
        found.sessions.copy_(torch.tensor(sessions))
        found.graph.replay()
        self.done.record(torch.cuda.current_stream(self.device))
        self.done.synchronize()
        return _map(torch.clone, found.outcome)

    def prepare(self, key: tuple[object, ...], decide: Decide, shape: tuple[int, ...], keep: bool = False) -> Captured:
        """The graph of ``key`` for frames of ``shape`` ``[B, H, W, C]``, captured now if it is new.

        A capture takes as long as hundreds of decisions; it leaves the sessions as they are. With ``keep`` it never
        gives way to another.
        """
        key = (shape[0], *key)
        if keep:
            self.kept.add(key)
        if key not in self.captured:
            self.captured[key] = self._capture(decide, shape)
            others = [known for known in self.captured if known not in self.kept]
            if len(others) > MAX_GRAPHS:
                del self.captured[others[0]]
        self.captured.move_to_end(key)
        return self.captured[key]

    def has(self, key: tuple[object, ...], batch: int) -> bool:
        """Whether a decision of ``batch`` sessions with ``key`` is a replay."""
        return (batch, *key) in self.captured

    def _capture(self, decide: Decide, shape: tuple[int, ...]) -> Captured:
        device = self.device
        staged = torch.zeros(shape, dtype=torch.uint8, pin_memory=True)
        numbers = torch.arange(shape[0]).pin_memory()
        frames, sessions = staged.to(device), numbers.to(device)

        def run() -> Outcome:
            frames.copy_(staged, non_blocking=True)
            sessions.copy_(numbers, non_blocking=True)
            return decide(frames, sessions)

        with warming(device):
            # They write the pages that the sessions' next decision writes again before anything reads them; what else
            # a decision changes is put back after each.
            kept = [t.clone() for t in self.loop.state()]
            for _ in range(WARM_RUNS):
                outcome = run()
                for state, before in zip(self.loop.state(), kept, strict=True):
                    state.copy_(before)
        left = _map(lambda t: torch.empty(t.shape, dtype=t.dtype, pin_memory=True), outcome)
        graph = torch.cuda.CUDAGraph()
        with recording(graph, self.pool, device):
            for host, result in zip(_flat(left), _flat(run()), strict=True):
                host.copy_(result, non_blocking=True)
        return Captured(graph, staged, numbers, left)


def _map(change: Callable[[Tensor], Tensor], outcome: Outcome) -> Outcome:
    actions, codes, frames = outcome
    return Outcome(Actions(*map(change, actions)), change(codes), change(frames))


def _flat(outcome: Outcome) -> list[Tensor]:
    return [*outcome.actions, outcome.codes, outcome.frames]
