"""Sessions of an evaluation: every job is played once, in full, from seeds that no collection meets."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from evaluate_cases import ToyEnv, ToyPolicy, expected, play_toys
from tqdm import tqdm

from flexlam_fast.data.collect import EVALUATION_SEED, SEED_STRIDE
from flexlam_fast.data.vizdoom import MAX_STEPS
from flexlam_fast.errors import InputError
from flexlam_fast.evaluate.actor import time_decisions
from flexlam_fast.evaluate.sessions import Games, Job, evaluation_seed, play_jobs
from flexlam_fast.types import Decision


class StrictPolicy(ToyPolicy):
    """Checks that every running session is at the frame that its game shows."""

    def act(self, frames: np.ndarray[Any, Any], budget: int) -> Decision:
        decision = super().act(frames, budget)
        shown = frames[:, 0, 0, 1].tolist()
        over = [s % 7 + 3 <= t for s, t in zip((frames[:, 0, 0, 0]).tolist(), shown, strict=True)]
        wrong = [i for i, (t, s) in enumerate(zip(self.t, shown, strict=True)) if t != s and not over[i]]
        assert not wrong, f"sessions {wrong} were not reset"
        return decision


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    play_toys(monkeypatch)


JOBS = [Job(name, seed) for name in ("take_cover", "my_way_home") for seed in (0, 5, 1, 9, 30)]


@pytest.mark.parametrize("sessions", [1, 2, 3, 7, 40])
@pytest.mark.usefixtures("toy")
def test_every_job_is_played_once_in_full_whatever_the_batch(sessions: int) -> None:
    policy = StrictPolicy()
    with Games() as games, tqdm(disable=True) as bar:
        outcomes = play_jobs(policy, games, JOBS, 3, sessions, 0, bar)
    assert [o.job for o in outcomes] == JOBS
    assert [o.ret for o in outcomes] == [expected(job, 3) for job in JOBS]
    assert [len(o.ms) for o in outcomes] == [job.seed % 7 + 3 for job in JOBS]
    assert set(policy.batches) == {min(sessions, len(JOBS))}
    assert ToyEnv.started <= 2 * min(sessions, 5)  # games are kept, not started per episode


@pytest.mark.usefixtures("toy")
def test_bar_ends_full() -> None:
    with Games() as games, tqdm(total=len(JOBS) * MAX_STEPS, file=io.StringIO()) as bar:
        play_jobs(ToyPolicy(), games, JOBS, 1, 3, 0, bar)
        assert bar.n == bar.total


def test_evaluation_never_meets_a_collected_seed() -> None:
    collected = range(EVALUATION_SEED)  # seed * SEED_STRIDE + i, with seed below 1000
    assert all(evaluation_seed(s, i) not in collected for s in (0, 999) for i in (0, SEED_STRIDE - 1))
    assert evaluation_seed(999, SEED_STRIDE - 1) < 2**31
    assert len({evaluation_seed(s, i) for s in (0, 1) for i in range(50)}) == 100
    for wrong in (-1, 1000):
        with pytest.raises(InputError, match=f"seed: expected an integer in 0..999, got {wrong}"):
            evaluation_seed(wrong, 0)


def test_latency_protocol_counts_and_discards() -> None:
    policy = ToyPolicy()
    times = time_decisions(policy, np.zeros((7, 64, 64, 3), np.uint8), 2)
    assert len(times) == 100
    assert policy.batches == [1] * 120
    assert min(times) > 0
