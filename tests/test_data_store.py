"""Packed episodes: what is written is what is read, episodes never run into each other, and damage is noticed."""

from __future__ import annotations

import errno
import io
import json
import os
import resource
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("pyarrow")

from flexlam_fast.data.store import EpisodeStore, EpisodeWriter
from flexlam_fast.errors import DataError, InputError, StorageError

SHAPE = (4, 5, 3)
FRAME_BYTES = 60
NAMES = ("stay", "go")


def write(path: Path, lengths: list[int], shard_frames: int = 7, **options: bool) -> tuple[np.ndarray, np.ndarray]:
    """Write episodes of the given lengths, every third one into the test split; return all frames and actions."""
    rng = np.random.default_rng(len(lengths))
    frames, actions = [], []
    with EpisodeWriter(path, SHAPE, NAMES, shard_bytes=shard_frames * FRAME_BYTES, **options) as writer:
        for index, length in enumerate(lengths):
            frames.append(rng.integers(0, 256, (length, *SHAPE), dtype=np.uint8))
            actions.append(rng.integers(0, 2, length - 1))
            split = "test" if index % 3 == 2 else "train"
            writer.add(frames[-1], actions[-1], actions[-1] * 0.5, f"task{index % 2}", split, seed=index)
    return np.concatenate(frames), np.concatenate([np.append(a, -1) for a in actions])


def test_round_trip_across_shards(tmp_path: Path) -> None:
    frames, actions = write(tmp_path / "set", [5, 20, 2, 9])
    store = EpisodeStore.open(tmp_path / "set")
    assert len(list((tmp_path / "set").glob("frames-*.npy"))) == 6  # 36 frames in shards of 7
    assert (store.num_frames, store.frame_shape, store.action_names) == (36, SHAPE, NAMES)
    assert store.tasks == ("task0", "task1")
    assert store.labelled
    np.testing.assert_array_equal(store.take(np.arange(36)), frames)
    np.testing.assert_array_equal(store.actions, actions)
    np.testing.assert_array_equal(store.rewards, np.where(actions > 0, 0.5, 0).astype(np.float32))
    assert [(e.index, e.first, e.frames, e.seed) for e in store.episodes] == [
        (0, 0, 5, 0), (1, 5, 20, 1), (2, 25, 2, 2), (3, 27, 9, 3)
    ]  # fmt: skip
    assert store.episodes[1].ret == pytest.approx(0.5 * (actions[5:24] > 0).sum())
    store.verify()


def test_take_has_the_shape_of_its_indices(tmp_path: Path) -> None:
    frames, _ = write(tmp_path / "set", [5, 20, 2, 9])
    store = EpisodeStore.open(tmp_path / "set")
    wanted = np.array([[[0, 35], [8, 6]], [[7, 7], [34, 13]]])
    np.testing.assert_array_equal(store.take(wanted), frames[wanted])
    assert store.take(np.empty((0, 2), dtype=np.int64)).shape == (0, 2, *SHAPE)
    assert store.take(np.int64(3)).shape == SHAPE
    for bad in ([36], [-1], [0.5], [float("nan")], [True], ["1"], None, [[1], [1, 2]], [2**70], 1e9, "all"):
        with pytest.raises(InputError, match="indices: expected"):
            store.take(bad)  # type: ignore[arg-type]


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(2, 12), min_size=1, max_size=9), st.integers(1, 30))
def test_transitions_never_cross_an_episode(lengths: list[int], shard_frames: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        frames, actions = write(Path(folder) / "set", lengths, shard_frames)
        store = EpisodeStore.open(Path(folder) / "set")
        owner = np.repeat(np.arange(len(lengths)), lengths)
        every = []
        for split in ("train", "test"):
            inside = store.transitions(split)
            assert len(inside) == sum(n - 1 for i, n in enumerate(lengths) if (i % 3 == 2) == (split == "test"))
            assert (owner[inside] == owner[inside + 1]).all()
            assert {store.episodes[i].split for i in owner[inside]} <= {split}
            assert (store.actions[inside] >= 0).all()
            every.append(inside)
        joined = np.concatenate(every)
        assert len(np.unique(joined)) == len(joined) == sum(lengths) - len(lengths)
        firsts = np.cumsum([0, *lengths[:-1]])
        lasts = np.cumsum(lengths) - 1
        assert (store.previous_actions[firsts] == -1).all()
        assert (store.actions[lasts] == -1).all()
        rest = np.setdiff1d(np.arange(len(owner)), firsts)
        np.testing.assert_array_equal(store.previous_actions[rest], actions[rest - 1])
        np.testing.assert_array_equal(store.take(joined + 1), frames[joined + 1])


def test_every_frame_belongs_to_the_episode_that_holds_it(tmp_path: Path) -> None:
    write(tmp_path / "d", [3, 9, 2, 5])
    store = EpisodeStore.open(tmp_path / "d")
    owners = store.episode_of(np.arange(store.num_frames))
    for number, episode in enumerate(store.episodes):
        assert np.flatnonzero(owners == number).tolist() == list(range(episode.first, episode.first + episode.frames))


def test_transitions_of_some_tasks(tmp_path: Path) -> None:
    write(tmp_path / "set", [5, 20, 2, 9])
    store = EpisodeStore.open(tmp_path / "set")
    np.testing.assert_array_equal(store.transitions("train", ["task0"]), np.arange(4))
    assert len(store.transitions("test", ["task1"])) == 0
    np.testing.assert_array_equal(store.transitions("train", (t for t in ["task0"])), np.arange(4))  # type: ignore[arg-type]
    for bad in (["task2"], "task0", [], 5, [["task0"]], [np.arange(2)], ["task0", None]):
        with pytest.raises(InputError, match="tasks: expected some of"):
            store.transitions("train", bad)  # type: ignore[arg-type]
    for split in ("validation", None, ["train"], np.arange(2)):
        with pytest.raises(InputError, match="split: expected one of"):
            store.transitions(split)  # type: ignore[arg-type]
    for path in ("", None, 5):
        with pytest.raises(InputError, match="path: expected a path"):
            EpisodeStore.open(path)  # type: ignore[arg-type]


def test_a_seed_belongs_to_one_split(tmp_path: Path) -> None:
    frames = np.zeros((3, *SHAPE), dtype=np.uint8)
    with EpisodeWriter(tmp_path / "set", SHAPE) as writer:
        writer.add(frames, None, None, "a", "train", seed=7)
        writer.add(frames, None, None, "b", "test", seed=7)  # another task: fine
        with pytest.raises(InputError, match="seed: expected one split per seed of a, got 7 in both"):
            writer.add(frames, None, None, "a", "test", seed=7)
    assert EpisodeStore.open(tmp_path / "set").num_frames == 6


def test_unlabelled_and_closing_reward(tmp_path: Path) -> None:
    frames = np.zeros((3, *SHAPE), dtype=np.uint8)
    with EpisodeWriter(tmp_path / "set", SHAPE) as writer:
        writer.add(frames, None, [0.25, 0.0, 1.0], "a", "train")
    store = EpisodeStore.open(tmp_path / "set")
    assert not store.labelled
    assert (store.actions == -1).all()
    assert store.episodes[0].ret == 1.25
    np.testing.assert_array_equal(store.rewards, np.array([0.25, 0, 1], dtype=np.float32))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"frames": np.zeros((3, 4, 4, 3), np.uint8)}, r"frames: expected \[n >= 2,4,5,3\] uint8, got \[3, 4, 4, 3\]"),
        ({"frames": np.zeros((3, *SHAPE), np.float32)}, "got .* float32"),
        ({"frames": np.zeros((1, *SHAPE), np.uint8)}, "n >= 2"),
        ({"actions": [0, 1, 0]}, r"actions: expected \[2\] integer"),
        ({"actions": [0, 2]}, r"actions: expected -1\.\.1, got 0\.\.2"),
        ({"actions": [0.0, 1.0]}, "actions: expected .* integer"),
        ({"rewards": [float("nan"), 0.0]}, "rewards: expected finite"),
        ({"split": "validation"}, "split: expected one of"),
    ],
)
def test_refuses_what_does_not_fit(tmp_path: Path, change: dict[str, object], sentence: str) -> None:
    good = {"frames": np.zeros((3, *SHAPE), np.uint8), "actions": [0, 1], "rewards": [0, 0], "split": "train"}
    with pytest.raises(InputError, match=sentence), EpisodeWriter(tmp_path / "set", SHAPE, NAMES) as writer:
        writer.add(task="a", **(good | change))  # type: ignore[arg-type]
    assert os.listdir(tmp_path) == []


def test_no_episode_is_no_data_set(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="at least one"), EpisodeWriter(tmp_path / "set", SHAPE):
        pass
    assert os.listdir(tmp_path) == []


def test_same_content_same_fingerprint(tmp_path: Path) -> None:
    for name, lengths in (("a", [3, 4]), ("b", [3, 4]), ("c", [4, 3])):
        write(tmp_path / name, lengths)
    a, b, c = (EpisodeStore.open(tmp_path / n).fingerprint for n in "abc")
    assert a == b != c


def interrupted(target: Path) -> None:
    with EpisodeWriter(target, SHAPE, NAMES, overwrite=True) as writer:
        writer.add(np.zeros((3, *SHAPE), np.uint8), None, None, "a", "train")
        raise ZeroDivisionError


def test_existing_targets(tmp_path: Path) -> None:
    target = tmp_path / "set"
    write(target, [3, 4])
    before = EpisodeStore.open(target).fingerprint
    with pytest.raises(StorageError, match="expected a new directory, got one that exists"):
        write(target, [5])
    with pytest.raises(ZeroDivisionError):
        interrupted(target)
    assert EpisodeStore.open(target).fingerprint == before
    write(target, [5], overwrite=True)
    assert EpisodeStore.open(target).num_frames == 5
    assert os.listdir(tmp_path) == ["set"]
    (tmp_path / "home").mkdir()
    with pytest.raises(StorageError, match="expected a data set to replace"):
        write(tmp_path / "home", [5], overwrite=True)


FILES = ("manifest.json", "episodes.parquet", "frames-00001.npy", "steps-00000.parquet")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["missing", "truncated", "empty", "grown"])
def test_damaged_files_are_named_at_open(tmp_path: Path, name: str, damage: str) -> None:
    write(tmp_path / "set", [5, 20, 2, 9])
    path = tmp_path / "set" / name
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes({"truncated": content[:-9], "empty": b"", "grown": content + b"x"}[damage])
    with pytest.raises(DataError, match=name) as caught:
        EpisodeStore.open(tmp_path / "set")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", FILES)
def test_no_flipped_bit_passes(tmp_path: Path, name: str) -> None:
    write(tmp_path / "set", [5, 20, 2, 9])
    path = tmp_path / "set" / name
    content = path.read_bytes()
    intact = EpisodeStore.open(tmp_path / "set")
    rng = np.random.default_rng(0)
    for position in rng.integers(0, 8 * len(content), 60):
        damaged = bytearray(content)
        damaged[position // 8] ^= 1 << (position % 8)
        path.write_bytes(damaged)
        try:
            store = EpisodeStore.open(tmp_path / "set")
            store.verify()
        except DataError:
            continue
        # Only white space of the manifest may differ without notice: it says the same.
        assert name == "manifest.json"
        assert store.fingerprint == intact.fingerprint


def test_foreign_and_future_manifests(tmp_path: Path) -> None:
    write(tmp_path / "set", [5])
    path = tmp_path / "set" / "manifest.json"
    content = json.loads(path.read_text())
    for change, sentence in (({"version": 2}, "expected version 1, got 2"), ({"format": "other"}, "another file")):
        path.write_text(json.dumps(content | change))
        with pytest.raises(DataError, match=sentence):
            EpisodeStore.open(tmp_path / "set")
    path.write_text(json.dumps(content | {"action_names": ["go", "stay"]}))
    with pytest.raises(DataError, match="expected the checksum of its own content"):
        EpisodeStore.open(tmp_path / "set")
    with pytest.raises(DataError, match="nowhere"):
        EpisodeStore.open(tmp_path / "nowhere")


@pytest.mark.parametrize("fail_at", range(6))
def test_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fail_at: int) -> None:
    """The n-th file to be synced finds the disk full: one sentence, and nothing is left."""
    synced = []

    def fsync(handle: int) -> None:
        synced.append(handle)
        if len(synced) == fail_at + 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(StorageError, match="No space left on device") as caught:
        write(tmp_path / "set", [5, 6])
    assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == []


def test_a_real_limit_on_what_can_be_written(tmp_path: Path) -> None:
    """The kernel itself refuses the write, as a full disk would: in the middle of a shard."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(StorageError, match=r"frames-00000\.npy: expected to write it, got File too large"):
            write(tmp_path / "set", [2000], shard_frames=2000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert os.listdir(tmp_path) == []


def test_forbidden_parent(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match="expected to write it"):
        write(tmp_path / "file" / "set", [5])


def test_frames_are_plain_npy(tmp_path: Path) -> None:
    """Anybody can read a shard with numpy alone."""
    frames, _ = write(tmp_path / "set", [5], shard_frames=100)
    content = io.BytesIO((tmp_path / "set" / "frames-00000.npy").read_bytes())
    np.testing.assert_array_equal(np.load(content), frames)
