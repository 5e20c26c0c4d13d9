"""Collection: the same arguments give the same bytes, however many processes play."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("vizdoom")
pytest.importorskip("pyarrow")

from flexlam_fast.data.collect import EVALUATION_SEED, collect
from flexlam_fast.data.experts import make_expert
from flexlam_fast.data.play import play
from flexlam_fast.data.store import EpisodeStore
from flexlam_fast.data.vizdoom import DoomEnv
from flexlam_fast.errors import InputError, StorageError
from flexlam_fast.types import VIZDOOM_ACTIONS

SCENARIOS = ("my_way_home", "defend_the_center")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> EpisodeStore:
    path = tmp_path_factory.mktemp("collect") / "one"
    return collect(path, SCENARIOS, steps=(200, 60), seed=3, workers=1, progress=False)


def test_workers_change_no_byte(small: EpisodeStore, tmp_path: Path) -> None:
    other = collect(tmp_path / "two", SCENARIOS, steps=(200, 60), seed=3, workers=2, progress=False)
    for name in sorted(os.listdir(small.path)):
        assert (other.path / name).read_bytes() == (small.path / name).read_bytes(), name
    assert os.listdir(tmp_path) == ["two"]


def test_another_seed_is_another_data_set(small: EpisodeStore, tmp_path: Path) -> None:
    other = collect(tmp_path / "set", SCENARIOS[:1], steps=(50,), seed=4, workers=1, progress=False)
    first = other.take(np.array([0]))
    assert (first != small.take(np.array([0]))).any()


def test_what_is_collected(small: EpisodeStore) -> None:
    assert small.tasks == SCENARIOS
    assert small.action_names == VIZDOOM_ACTIONS
    assert small.frame_shape == (64, 64, 3)
    for task, steps in zip(SCENARIOS, (200, 60), strict=True):
        train = small.transitions("train", [task])
        assert len(train) >= steps
        lengths = [e.frames - 1 for e in small.episodes if e.task == task and e.split == "train"]
        assert sum(lengths[:-1]) < steps or len(lengths) == 1  # it stopped with the episode that reached the number
        assert len(small.transitions("test", [task])) > 0
    seeds = {split: {(e.task, e.seed) for e in small.episodes if e.split == split} for split in ("train", "test")}
    assert not seeds["train"] & seeds["test"]
    assert len(seeds["train"]) + len(seeds["test"]) == len(small.episodes)
    assert all(3_000_000 <= e.seed < 4_000_000 < EVALUATION_SEED for e in small.episodes)


def test_the_recorded_actions_make_the_recorded_frames(small: EpisodeStore) -> None:
    """Replaying an episode's actions from its seed shows its frames, bit for bit, and earns its return."""
    for episode in (small.episodes[0], small.episodes[-1]):
        steps = np.arange(episode.first, episode.first + episode.frames)
        frames = small.take(steps)
        with DoomEnv(episode.task) as env:
            np.testing.assert_array_equal(env.reset(episode.seed), frames[0])
            earned = []
            for frame, action in zip(frames[1:], small.actions[steps], strict=False):
                step = env.step(int(action))
                np.testing.assert_array_equal(step.frame, frame)
                earned.append(step.reward)
        np.testing.assert_allclose(small.rewards[steps[:-1]], earned, rtol=1e-6)
        assert episode.ret == pytest.approx(float(small.rewards[steps].sum()), abs=1e-4)


def test_noise_is_the_share_of_random_decisions() -> None:
    """Where the expert never strafes, strafing counts a third of the random decisions (2 of 6 actions)."""
    strafes = [VIZDOOM_ACTIONS.index("MOVE_LEFT"), VIZDOOM_ACTIONS.index("MOVE_RIGHT")]
    with DoomEnv("my_way_home", oracle=True) as env:
        noisy = np.concatenate([play(env, make_expert("my_way_home"), seed, 0.3).actions for seed in range(8)])
        clean = play(env, make_expert("my_way_home"), 0, 0.0).actions
        alone = play(env, make_expert("my_way_home"), 0, 1.0).actions
    assert not np.isin(clean, strafes).any()
    assert np.isin(noisy, strafes).mean() == pytest.approx(0.1, abs=0.04)
    assert np.isin(alone, strafes).mean() == pytest.approx(1 / 3, abs=0.12)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"scenarios": ("chess",)}, "scenarios: expected some of"),
        ({"scenarios": ()}, "scenarios: expected some of"),
        ({"scenarios": ("take_cover", "take_cover")}, "scenarios: expected some of .*, each once"),
        ({"scenarios": "take_cover"}, "scenarios: expected some of"),
        ({"steps": (1, 2, 3)}, "steps: expected 1 or 2 numbers"),
        ({"steps": ()}, r"steps: expected integers in 1\.\.20000000, got \(\)"),
        ({"steps": 5}, r"steps: expected integers in 1\.\.20000000, got 5"),
        ({"steps": (0,)}, r"steps: expected an integer in 1\.\.20000000, got 0"),
        ({"steps": (10**30,)}, "steps: expected an integer in"),
        ({"seed": 1000}, r"seed: expected an integer in 0\.\.999"),
        ({"seed": True}, r"seed: expected an integer in 0\.\.999"),
        ({"noise": 1.5}, r"noise: expected a number in 0\.\.1"),
        ({"noise": float("nan")}, r"noise: expected a number in 0\.\.1, got nan"),
        ({"test_fraction": 0.6}, r"test_fraction: expected a number in 0\.\.0\.5"),
        ({"workers": 0}, r"workers: expected an integer in 1\.\.1024"),
    ],
)
def test_refuses_what_does_not_fit(tmp_path: Path, change: dict[str, object], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        collect(tmp_path / "set", **({"scenarios": SCENARIOS, "steps": (10,)} | change))  # type: ignore[arg-type]
    assert os.listdir(tmp_path) == []


def test_existing_target_is_refused_before_play(small: EpisodeStore) -> None:
    with pytest.raises(StorageError, match="expected a new directory"):
        collect(small.path, SCENARIOS, steps=(10**7,), progress=False)


def test_no_test_split_when_none_is_asked_for(tmp_path: Path) -> None:
    store = collect(tmp_path / "set", ("take_cover",), steps=(20,), test_fraction=0, workers=1, progress=False)
    assert {e.split for e in store.episodes} == {"train"}
