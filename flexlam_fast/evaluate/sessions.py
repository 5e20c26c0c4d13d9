"""Plays many episodes at one budget: several games act as one batch and share one queue of episodes."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import NamedTuple, Self

import numpy as np
from tqdm import tqdm

from flexlam_fast.data.collect import EVALUATION_SEED, SEED_STRIDE
from flexlam_fast.data.vizdoom import FRAME_SIZE, MAX_STEPS, DoomEnv
from flexlam_fast.evaluate.actor import Actor, decide
from flexlam_fast.values import check_number


class Job(NamedTuple):
    """One episode to play: the scenario, and the seed that names the episode."""

    scenario: str
    seed: int


class Outcome(NamedTuple):
    """What came of a job: the return, and the milliseconds of each decision (of the whole batch that it was in)."""

    job: Job
    ret: float
    ms: tuple[float, ...]


def evaluation_seed(seed: int, episode: int) -> int:
    """The seed of episode ``episode``, the same for every agent and disjoint from all that are ever collected.

    Raises:
        InputError: ``seed`` outside 0..999.
    """
    chosen = int(check_number("seed", seed, 0, EVALUATION_SEED // SEED_STRIDE - 1, integer=True))
    return EVALUATION_SEED + chosen * SEED_STRIDE + episode


class Games:
    """Running games by scenario, lent and taken back, so that none is started twice; a context manager.

    ``size`` is the side of their frames.
    """

    def __init__(self, size: int = FRAME_SIZE) -> None:
        self.size = size
        self._idle: dict[str, list[DoomEnv]] = {}
        self._all = ExitStack()

    def lend(self, scenario: str) -> DoomEnv:
        """Hand out a game of ``scenario``, starting one if all are out."""
        waiting = self._idle.setdefault(scenario, [])
        if not waiting:
            env = DoomEnv(scenario, size=self.size)
            self._all.callback(env.close)
            return env
        return waiting.pop()

    def take_back(self, env: DoomEnv) -> None:
        """Accept a game whose episode is over."""
        self._idle[env.scenario].append(env)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._all.close()  # every game, also after one that does not close


class _Seat:
    """One session of the batch. With the queue empty it idles on its last frame: the batch keeps its size."""

    def __init__(self, games: Games) -> None:
        self._games = games
        self._env: DoomEnv | None = None

    def sit(self, job: Job) -> None:
        """Start the episode of ``job``."""
        self._env = self._games.lend(job.scenario)
        self.job, self.ret, self.ms = job, 0.0, list[float]()
        self.frame = self._env.reset(job.seed)

    @property
    def playing(self) -> bool:
        """Whether an episode is running here."""
        return self._env is not None

    def step(self, action: int, ms: float) -> Outcome | None:
        """Execute an action; at the episode's end return what came of it."""
        assert self._env is not None
        self.frame, reward, done = self._env.step(action)
        self.ret += reward
        self.ms.append(ms)
        if not done:
            return None
        self._games.take_back(self._env)
        self._env = None
        return Outcome(self.job, self.ret, tuple(self.ms))


def play_jobs(
    actor: Actor, games: Games, jobs: Sequence[Job], budget: int, sessions: int, seed: int, bar: tqdm[None]
) -> list[Outcome]:
    """Play every job with ``actor`` at one budget.

    Args:
        actor: who decides; it is reset.
        games: where the games come from.
        jobs: the episodes, taken in this order.
        budget: ``k`` of every decision.
        sessions: how many games act as one batch; fewer when there are fewer jobs.
        seed: given to ``actor.reset``.
        bar: advances by ``MAX_STEPS`` for every job.

    Returns:
        The outcomes in the order of ``jobs``.
    """
    queue = deque(jobs)
    seats = [_Seat(games) for _ in range(min(sessions, len(jobs)))]
    for seat in seats:
        seat.sit(queue.popleft())
    actor.reset(len(seats), seed)
    finished: dict[Job, Outcome] = {}
    while len(finished) < len(jobs):
        actions, ms = decide(actor, np.stack([seat.frame for seat in seats]), budget)
        fresh = []
        for number, seat in enumerate(seats):
            if not seat.playing:
                continue
            outcome = seat.step(actions[number], ms)
            bar.update(1)
            if outcome is None:
                continue
            finished[outcome.job] = outcome
            bar.update(max(0, MAX_STEPS - len(outcome.ms)))
            if queue:
                seat.sit(queue.popleft())
                fresh.append(number)
        if fresh:
            actor.reset(sessions=fresh)
    return [finished[job] for job in jobs]
