"""Writing episodes piece by piece, folders that killed writers left, and what the arguments may be."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("pyarrow")

from flexlam_fast.data.store import EpisodeStore, EpisodeWriter
from flexlam_fast.errors import InputError

SHAPE = (4, 5, 3)
NAMES = ("stay", "go")


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@settings(max_examples=20, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=5).filter(lambda p: sum(p) >= 2), min_size=1, max_size=5),
    st.integers(1, 12),
)
def test_pieces_make_the_bytes_of_whole_episodes(
    tmp_path_factory: pytest.TempPathFactory, episodes: list[list[int]], shard_frames: int
) -> None:
    folder, rng = tmp_path_factory.mktemp("w"), np.random.default_rng(0)
    options: dict[str, Any] = {"shard_bytes": shard_frames * math.prod(SHAPE)}
    with (
        EpisodeWriter(folder / "whole", SHAPE, NAMES, **options) as whole,
        EpisodeWriter(folder / "pieces", SHAPE, NAMES, **options) as pieces,
    ):
        for seed, lengths in enumerate(episodes):
            count = sum(lengths)
            frames = rng.integers(0, 256, (count, *SHAPE), dtype=np.uint8)
            actions = np.append(rng.integers(0, 2, count - 1), -1)
            rewards = np.append(rng.integers(0, 9, count - 1) * 0.5, 0)
            whole.add(frames, actions[:-1], rewards[:-1], "a", "train", seed=seed, source="x")
            with pieces.episode("a", "train", seed, "x") as episode:
                ends = np.cumsum(lengths)[:-1]
                parts = (np.split(array, ends) for array in (frames, actions, rewards))
                for some in zip(*parts, strict=True):
                    episode.append(*some)
    assert content(folder / "whole") == content(folder / "pieces")


def fail(writer: EpisodeWriter, frames: np.ndarray, seed: int = 1) -> None:
    with writer.episode("b", "test", seed) as episode:
        episode.append(frames)
        raise ZeroDivisionError


def test_an_episode_that_fails_leaves_no_trace(tmp_path: Path) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (40, *SHAPE), dtype=np.uint8)
    options: dict[str, Any] = {"shard_bytes": 7 * math.prod(SHAPE)}
    with EpisodeWriter(tmp_path / "a", SHAPE, NAMES, **options) as writer:
        writer.add(frames[:5], None, None, "a", "train")
        for some in (frames[:1], frames[:30]):
            with pytest.raises(ZeroDivisionError):
                fail(writer, some)
        writer.add(frames[5:20], None, None, "b", "train", seed=1)
        with pytest.raises(ZeroDivisionError):
            fail(writer, frames, 2)
    with EpisodeWriter(tmp_path / "b", SHAPE, NAMES, **options) as writer:
        writer.add(frames[:5], None, None, "a", "train")
        writer.add(frames[5:20], None, None, "b", "train", seed=1)
    assert content(tmp_path / "a") == content(tmp_path / "b")
    EpisodeStore.open(tmp_path / "a").verify()


def test_mistakes_of_pieces(tmp_path: Path) -> None:
    frames = np.zeros((3, *SHAPE), np.uint8)
    with EpisodeWriter(tmp_path / "set", SHAPE, NAMES) as writer:
        with (
            pytest.raises(InputError, match="frames: expected at least 2 in an episode, got 1"),
            writer.episode("a", "train") as episode,
        ):
            episode.append(frames[:1])
        with (
            pytest.raises(InputError, match="actions: expected -1 at the last frame"),
            writer.episode("a", "train") as episode,
        ):
            episode.append(frames, [0, 1, 0])
        with (
            pytest.raises(InputError, match=r"rewards: expected \[3\] number"),
            writer.episode("a", "train") as episode,
        ):
            episode.append(frames, None, [0.0])
        with writer.episode("a", "train") as episode:
            episode.append(frames)
            with pytest.raises(InputError, match="got one in which another episode is open"):
                writer.add(frames, None, None, "a", "train")
    assert EpisodeStore.open(tmp_path / "set").num_frames == 3
    with pytest.raises(InputError, match="got a closed one"):
        writer.add(frames, None, None, "a", "train")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"path": ""}, "path: expected a path, got ''"),
        ({"path": None}, "path: expected a path, got None"),
        ({"path": "a\0b"}, "path: expected a path"),
        ({"frame_shape": (4, 5)}, r"frame_shape: expected \(height, width, 3\)"),
        ({"frame_shape": (4, 0, 3)}, "frame_shape: expected"),
        ({"frame_shape": (4, 5, 1)}, "frame_shape: expected"),
        ({"frame_shape": (4, 5.0, 3)}, "frame_shape: expected"),
        ({"frame_shape": (True, 5, 3)}, "frame_shape: expected"),
        ({"frame_shape": (10**9, 5, 3)}, "frame_shape: expected"),
        ({"frame_shape": 64}, "frame_shape: expected"),
        ({"action_names": "go"}, "action_names: expected texts"),
        ({"action_names": ("go", "go")}, "action_names: expected texts, each once"),
        ({"action_names": ("", "go")}, "action_names: expected texts"),
        ({"action_names": (1, 2)}, "action_names: expected texts"),
        ({"action_names": ["a"] * 2 + [["b"]]}, "action_names: expected texts"),
        ({"shard_bytes": 0}, "shard_bytes: expected an integer of at least 1, got 0"),
        ({"shard_bytes": -5}, "shard_bytes: expected"),
        ({"shard_bytes": 1e9}, "shard_bytes: expected"),
        ({"shard_bytes": math.nan}, "shard_bytes: expected"),
        ({"shard_bytes": True}, "shard_bytes: expected"),
        ({"shard_bytes": "256"}, "shard_bytes: expected"),
    ],
)
def test_arguments_of_a_writer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], sentence: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=sentence) as caught:
        EpisodeWriter(**({"path": tmp_path / "set", "frame_shape": SHAPE} | change))
    assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"frames": [[1, 2]]}, "frames: expected .* got list"),
        ({"frames": np.zeros((3, 4, 5), np.uint8)}, "frames: expected"),
        ({"actions": [[0, 1], [1]]}, "actions: expected"),
        ({"actions": [True, False]}, "actions: expected"),
        ({"actions": "go"}, "actions: expected"),
        ({"actions": [-2, 0]}, r"actions: expected -1\.\.1, got -2\.\.0"),
        ({"rewards": [1e300, 0.0]}, "rewards: expected finite"),
        ({"rewards": [1j, 0.0]}, "rewards: expected"),
        ({"rewards": ["1", "2"]}, "rewards: expected"),
        ({"rewards": [math.inf, 0.0]}, "rewards: expected finite"),
        ({"task": ""}, "task: expected a text, got ''"),
        ({"task": None}, "task: expected a text"),
        ({"task": "\udcdf"}, "task: expected a text that UTF-8 can hold"),
        ({"source": 5}, "source: expected a text"),
        ({"source": "\udcdf"}, "source: expected a text that UTF-8 can hold"),
        ({"split": ["train"]}, "split: expected one of"),
        ({"split": None}, "split: expected one of"),
        ({"seed": -2}, "seed: expected an integer in -1"),
        ({"seed": 2**63}, "seed: expected an integer in -1"),
        ({"seed": 1.0}, "seed: expected"),
        ({"seed": True}, "seed: expected"),
    ],
)
def test_arguments_of_an_episode(tmp_path: Path, change: dict[str, Any], sentence: str) -> None:
    good = {
        "frames": np.zeros((3, *SHAPE), np.uint8),
        "actions": [0, 1],
        "rewards": [0, 0],
        "task": "a",
        "split": "train",
    }
    with EpisodeWriter(tmp_path / "set", SHAPE, NAMES) as writer:
        with pytest.raises(InputError, match=sentence):
            writer.add(**(good | change))
        writer.add(**good)  # nothing of the one before is left
    store = EpisodeStore.open(tmp_path / "set")
    assert (len(store.episodes), store.num_frames) == (1, 3)


def test_a_shard_larger_than_any_disk_is_one_shard(tmp_path: Path) -> None:
    with EpisodeWriter(tmp_path / "set", SHAPE, shard_bytes=10**30) as writer:
        writer.add(np.zeros((3, *SHAPE), np.uint8), None, None, "a", "train", seed=np.int64(3))
    assert sorted(os.listdir(tmp_path / "set")) == [
        "episodes.parquet", "frames-00000.npy", "manifest.json", "steps-00000.parquet"
    ]  # fmt: skip


READING = """
import os, sys
import pyarrow.parquet
from flexlam_fast.data.store import EpisodeStore
before = len(os.listdir("/proc/self/task"))
EpisodeStore.open(sys.argv[1])
print(len(os.listdir("/proc/self/task")) - before)
"""


def test_reading_starts_no_thread_that_could_outlive_the_interpreter(tmp_path: Path) -> None:
    with EpisodeWriter(tmp_path / "set", SHAPE) as writer:
        writer.add(np.zeros((3, *SHAPE), np.uint8), None, None, "a", "train")
    done = subprocess.run([sys.executable, "-c", READING, str(tmp_path / "set")], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "0\n"), done.stderr
