"""Films the scripted experts: the command ``flexlam-fast collect``."""

from __future__ import annotations

import multiprocessing
import multiprocessing.util
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import NamedTuple, Self

from tqdm import tqdm

from flexlam_fast.data.experts import Player, make_expert
from flexlam_fast.data.play import Played, play
from flexlam_fast.data.store import EpisodeStore
from flexlam_fast.data.vizdoom import FRAME_SIZE, SCENARIOS, DoomEnv
from flexlam_fast.data.writer import EpisodeWriter
from flexlam_fast.errors import InputError, SimulatorError
from flexlam_fast.types import VIZDOOM_ACTIONS

#: Episode ``i`` of a collection has the seed ``seed * SEED_STRIDE + i``.
SEED_STRIDE = 1_000_000
#: Seeds from here on are never collected: evaluation plays these.
EVALUATION_SEED = 1_000_000_000


class _Job(NamedTuple):
    scenario: str
    seed: int
    noise: float


def collect(
    output: Path,
    scenarios: Sequence[str] = tuple(SCENARIOS),
    *,
    steps: Sequence[int] = (20_000,),
    seed: int = 0,
    noise: float = 0.1,
    test_fraction: float = 0.1,
    workers: int = 2,
    overwrite: bool = False,
    progress: bool = True,
) -> EpisodeStore:
    """Play scenarios with their experts and write the packed episodes; the same arguments give the same bytes.

    Args:
        output: the directory to make.
        scenarios: names of ``SCENARIOS``.
        steps: transitions to reach in the train split, one number for all scenarios or one for each; episodes are
            whole, so a scenario ends a little above it.
        seed: 0 to 999; episode ``i`` is played from ``seed * 1,000,000 + i``.
        noise: share of decisions taken by random bursts, so that the experts are seen to recover.
        test_fraction: share of the episodes that form the test split, 0 to 0.5; above 0 there is at least one.
        workers: processes that play; the result does not depend on it.
        overwrite: whether a data set at ``output`` may be replaced.
        progress: whether to show a bar.

    Returns:
        The finished data set, opened.

    Raises:
        InputError: for an argument out of range.
        SimulatorError: if ViZDoom is missing or stops.
        StorageError: if ``output`` exists or cannot be written.
    """
    targets = _check(scenarios, steps, seed, noise, test_fraction, workers)
    shape = (FRAME_SIZE, FRAME_SIZE, 3)
    period = round(1 / test_fraction) if test_fraction else 0
    with (
        EpisodeWriter(output, shape, VIZDOOM_ACTIONS, overwrite=overwrite) as writer,
        _Players(workers) as players,
        tqdm(total=sum(targets.values()), unit="step", disable=not progress) as bar,
    ):
        for scenario, target in targets.items():
            bar.set_description(scenario)
            _fill(writer, players, scenario, target, period, seed, noise, bar)
    return EpisodeStore.open(output)


def _fill(
    writer: EpisodeWriter,
    players: _Players,
    scenario: str,
    target: int,
    period: int,
    seed: int,
    noise: float,
    bar: tqdm[None],
) -> None:
    jobs = (_Job(scenario, seed * SEED_STRIDE + i, noise) for i in range(SEED_STRIDE))
    done, tested = 0, period == 0
    for index, (job, episode) in enumerate(players.play(jobs)):
        # The second episode of every `period`, so that even the smallest collection has both splits.
        split = "test" if period and index % period == 1 else "train"
        if len(episode.frames) >= 2:
            writer.add(episode.frames, episode.actions[:-1], episode.rewards, scenario, split, job.seed)
        if split == "test":
            tested = True
        else:
            bar.update(min(len(episode.frames) - 1, target - done) if done < target else 0)
            done += len(episode.frames) - 1
        if done >= target and tested:
            return


def _check(
    scenarios: Sequence[str],
    steps: Sequence[int],
    seed: int,
    noise: float,
    test_fraction: float,
    workers: int,
) -> dict[str, int]:
    unknown = sorted(set(scenarios) - set(SCENARIOS))
    if unknown or not scenarios or len(set(scenarios)) < len(scenarios):
        raise InputError(f"scenarios: expected some of {sorted(SCENARIOS)}, each once, got {tuple(scenarios)}")
    if len(steps) not in (1, len(scenarios)) or min(steps) < 1:
        raise InputError(f"steps: expected 1 or {len(scenarios)} positive numbers, got {tuple(steps)}")
    ranges: tuple[tuple[str, float, float, float], ...] = (
        ("seed", seed, 0, EVALUATION_SEED // SEED_STRIDE - 1),
        ("noise", noise, 0, 1),
        ("test_fraction", test_fraction, 0, 0.5),
        ("workers", workers, 1, 1024),
    )
    for name, value, low, high in ranges:
        if not low <= value <= high:
            raise InputError(f"{name}: expected {low} to {high}, got {value!r}")
    counts = list(steps) * (len(scenarios) if len(steps) == 1 else 1)
    return dict(zip(scenarios, counts, strict=True))


class _Players:
    """Processes that play episodes; results come in the order of the jobs, whoever finishes first."""

    def __init__(self, workers: int) -> None:
        self._workers = workers
        self._pool: ProcessPoolExecutor | None = None
        self._here: _Seat | None = None

    def __enter__(self) -> Self:
        if self._workers == 1:
            self._here = _Seat()
        else:
            # Spawned, not forked: a fork of a process in which torch has started threads may hang.
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(self._workers, context, initializer=_sit_down)
        return self

    def __exit__(self, *_: object) -> None:
        if self._here is not None:
            self._here.close()
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def play(self, jobs: Iterator[_Job]) -> Iterator[tuple[_Job, Played]]:
        """Play jobs for as long as results are asked for."""
        if self._pool is None:
            assert self._here is not None
            for job in jobs:
                yield job, self._here.play(job)
            return
        waiting: deque[tuple[_Job, Future[Played]]] = deque()
        try:
            for job in jobs:
                waiting.append((job, self._pool.submit(_play_seated, job)))
                if len(waiting) > 2 * self._workers:
                    first, result = waiting.popleft()
                    yield first, result.result()
        except BrokenProcessPool as error:
            raise SimulatorError("vizdoom: a playing process ended unexpectedly") from error
        finally:
            for _, result in waiting:
                result.cancel()


class _Seat:
    """The running game and expert of one process, kept from episode to episode."""

    def __init__(self) -> None:
        self._env: DoomEnv | None = None
        self._expert: Player | None = None

    def play(self, job: _Job) -> Played:
        if self._env is None or self._expert is None or self._env.scenario != job.scenario:
            self.close()
            self._env = DoomEnv(job.scenario, oracle=True)
            self._expert = make_expert(job.scenario)
        return play(self._env, self._expert, job.seed, job.noise)

    def close(self) -> None:
        if self._env is not None:
            self._env.close()
            self._env = None


_play_here: Callable[[_Job], Played] | None = None


def _sit_down() -> None:
    """Set up a playing process; its game is closed when the process ends."""
    global _play_here
    seat = _Seat()
    _play_here = seat.play
    multiprocessing.util.Finalize(None, seat.close, exitpriority=10)


def _play_seated(job: _Job) -> Played:
    assert _play_here is not None
    return _play_here(job)
