"""Films the scripted experts: the command ``flexlam-fast collect``."""

from __future__ import annotations

import multiprocessing
import multiprocessing.util
import os
import signal
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import NamedTuple, Self

from tqdm import tqdm

from flexlam_fast.data.experts import Player, make_expert
from flexlam_fast.data.game import check_start, skip_trial
from flexlam_fast.data.launch import end_with_parent
from flexlam_fast.data.play import Played, play
from flexlam_fast.data.store import EpisodeStore
from flexlam_fast.data.vizdoom import FRAME_SIZE, SCENARIOS, DoomEnv, check_frame_size
from flexlam_fast.data.writer import EpisodeWriter
from flexlam_fast.errors import InputError, SimulatorError
from flexlam_fast.types import VIZDOOM_ACTIONS
from flexlam_fast.values import check_integers, check_names, check_number, check_path, shown

#: Episode ``i`` of a collection has the seed ``seed * SEED_STRIDE + i``.
SEED_STRIDE = 1_000_000
#: Transitions of a scenario, which fewer than ``SEED_STRIDE`` episodes of any scenario reach; and processes that play.
MAX_STEPS, MAX_WORKERS = 20_000_000, 1024
#: Seeds from here on are never collected: evaluation plays these.
EVALUATION_SEED = 1_000_000_000


class _Job(NamedTuple):
    scenario: str
    seed: int
    noise: float
    size: int


def collect(
    output: Path,
    scenarios: Sequence[str] = tuple(SCENARIOS),
    *,
    steps: Sequence[int] = (20_000,),
    seed: int = 0,
    noise: float = 0.1,
    test_fraction: float = 0.1,
    workers: int = 2,
    size: int = FRAME_SIZE,
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
        size: side of the square frames in pixels, 8 to 120.
        overwrite: whether a data set at ``output`` may be replaced.
        progress: whether to show a bar.

    Returns:
        The finished data set, opened.

    Raises:
        InputError: for an argument out of range.
        SimulatorError: if ViZDoom is missing or stops.
        StorageError: if ``output`` exists or cannot be written.
    """
    output = check_path("output", output)
    targets = _check(scenarios, steps, seed, noise, test_fraction, workers)
    shape = (check_frame_size(size), size, 3)
    period = round(1 / test_fraction) if test_fraction else 0
    with (
        EpisodeWriter(output, shape, VIZDOOM_ACTIONS, overwrite=overwrite) as writer,
        _Players(workers) as players,
        tqdm(total=sum(targets.values()), unit="step", disable=not progress) as bar,
    ):
        for scenario, target in targets.items():
            bar.set_description(scenario)
            _fill(writer, players, scenario, target, period, seed, noise, size, bar)
    return EpisodeStore.open(output)


def _fill(
    writer: EpisodeWriter,
    players: _Players,
    scenario: str,
    target: int,
    period: int,
    seed: int,
    noise: float,
    size: int,
    bar: tqdm[None],
) -> None:
    jobs = (_Job(scenario, seed * SEED_STRIDE + i, noise, size) for i in range(SEED_STRIDE))
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
    names = check_names("scenarios", scenarios, SCENARIOS)
    check_number("seed", seed, 0, EVALUATION_SEED // SEED_STRIDE - 1, integer=True)
    check_number("noise", noise, 0, 1)
    check_number("test_fraction", test_fraction, 0, 0.5)
    check_number("workers", workers, 1, MAX_WORKERS, integer=True)
    counts = check_integers("steps", steps, 1, MAX_STEPS)
    if len(counts) not in (1, len(names)):
        raise InputError(f"steps: expected 1 or {len(names)} numbers, got {shown(counts)}")
    return dict(zip(names, counts * (len(names) if len(counts) == 1 else 1), strict=True))


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
            check_start()  # one sentence here, before processes are started
            # Spawned, not forked: a fork of a process in which torch has started threads may hang.
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(self._workers, context, _sit_down, (os.getpid(),))
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._here is not None:
            self._here.close()
        if self._pool is not None:
            if kind is not None:  # nobody wants the episodes that are being played, so nobody waits for them
                for process in list(self._pool._processes.values()):
                    process.kill()
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
                waiting.append((job, self._submit(job)))
                if len(waiting) > 2 * self._workers:
                    first, result = waiting.popleft()
                    yield first, result.result()
        except BrokenProcessPool as error:
            raise SimulatorError("vizdoom: a playing process ended unexpectedly") from error
        finally:
            for _, result in waiting:
                result.cancel()

    def _submit(self, job: _Job) -> Future[Played]:
        """Hand out a job. The process that this may start never sees Ctrl-C: it is for the one that waits for it."""
        assert self._pool is not None
        before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT,))
        try:
            return self._pool.submit(_play_seated, job)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _Seat:
    """The running game and expert of one process, kept from episode to episode."""

    def __init__(self) -> None:
        self._env: DoomEnv | None = None
        self._expert: Player | None = None

    def play(self, job: _Job) -> Played:
        env = self._env
        if env is None or self._expert is None or (env.scenario, env.size) != (job.scenario, job.size):
            self.close()
            env = self._env = DoomEnv(job.scenario, oracle=True, size=job.size)
            self._expert = make_expert(job.scenario)
        return play(env, self._expert, job.seed, job.noise)

    def close(self) -> None:
        if self._env is not None:
            self._env.close()
            self._env = None


_play_here: Callable[[_Job], Played] | None = None


def _sit_down(parent: int) -> None:
    """Set up a playing process, which ends with its parent; its game is closed when the process ends."""
    global _play_here
    end_with_parent(parent)
    skip_trial()  # the parent has tried, and sees it if this process dies
    seat = _Seat()
    _play_here = seat.play
    multiprocessing.util.Finalize(None, seat.close, exitpriority=10)


def _play_seated(job: _Job) -> Played:
    assert _play_here is not None
    return _play_here(job)
