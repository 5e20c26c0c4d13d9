"""Reads a data set of packed episodes: frames stay on disk, memory-mapped; actions and rewards are held in memory."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from flexlam_fast.data import manifest as layout
from flexlam_fast.data.arguments import as_array
from flexlam_fast.data.extras import need
from flexlam_fast.data.manifest import SPLITS, Episode, FileRecord, Manifest
from flexlam_fast.data.names import shown
from flexlam_fast.data.writer import EpisodeWriter
from flexlam_fast.errors import DataError, InputError
from flexlam_fast.values import check_path
from flexlam_fast.values import shown as describe

__all__ = ["Episode", "EpisodeStore", "EpisodeWriter"]


class EpisodeStore:
    """Every frame of a data set has one global index ``0 .. num_frames - 1``, in the order of the episodes.

    Attributes:
        path: the directory.
        episodes: the episodes, by index.
        tasks: what was played or filmed.
        action_names: the vocabulary of ``actions``.
        frame_shape: ``(H, W, 3)``.
        num_frames: frames in all.
        actions: int64 ``[num_frames]``, the action taken at each frame, -1 where none is known.
        rewards: float32 ``[num_frames]``, what it earned.
        previous_actions: int64 ``[num_frames]``, the action before, -1 at an episode's first frame.
        labelled: whether any action is known.
        fingerprint: sha256 of the manifest's content; two data sets with the same one are the same.
    """

    def __init__(
        self,
        path: Path,
        manifest: Manifest,
        episodes: tuple[Episode, ...],
        shards: list[NDArray[np.uint8]],
        actions: NDArray[np.int64],
        rewards: NDArray[np.float32],
    ) -> None:
        self.path = path
        self.episodes = episodes
        self.tasks = manifest.tasks
        self.action_names = manifest.action_names
        self.frame_shape = manifest.frame_shape
        self.num_frames = manifest.num_frames
        self.actions = actions
        self.rewards = rewards
        # An episode's last action is -1, so the one before the next episode's first frame is -1 as well.
        self.previous_actions = np.concatenate([np.full(1, -1), actions[:-1]])
        self.labelled = bool((actions >= 0).any())
        self.fingerprint = layout.fingerprint(manifest)
        self._manifest = manifest
        self._shards = shards
        self._starts = np.cumsum([0] + [len(s) for s in shards])

    @classmethod
    def open(cls, path: str | Path) -> EpisodeStore:
        """Open a data set; sizes and small files are checked in full, frames by :meth:`verify`.

        Raises:
            InputError: if ``path`` is no path.
            DataError: naming the file that is missing, truncated or damaged, and how.
        """
        directory = check_path("path", path)
        manifest = layout.load(directory)
        episodes = _read_episodes(directory, manifest)
        shards, steps = [], []
        for shard in manifest.shards:
            shards.append(_map_frames(directory, shard.frames, (shard.length, *manifest.frame_shape)))
            steps.append(_read_table(directory, shard.steps))
        table = {n: np.concatenate([s[n] for s in steps]) for n in ("episode", "action", "reward")}
        owners = np.repeat(np.arange(len(episodes)), [e.frames for e in episodes])
        if not np.array_equal(table["episode"], owners):
            raise DataError(f"{shown(directory)}: expected steps of the episodes listed, got those of others")
        actions, rewards = table["action"].astype(np.int64), table["reward"].astype(np.float32)
        return cls(directory, manifest, episodes, shards, actions, rewards)

    def take(self, indices: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Gather frames.

        Args:
            indices: global frame indices, integers of any shape.

        Returns:
            uint8 ``[*indices.shape,H,W,3]``, a fresh array.

        Raises:
            InputError: for an index outside ``0 .. num_frames - 1``.
        """
        wanted = as_array("indices", indices)
        flat = wanted.reshape(-1)
        if flat.size and not np.issubdtype(flat.dtype, np.integer):
            raise InputError(f"indices: expected integers in 0..{self.num_frames - 1}, got {describe(indices)}")
        low, high = (int(flat.min()), int(flat.max())) if flat.size else (0, 0)
        if low < 0 or high >= self.num_frames:
            raise InputError(f"indices: expected integers in 0..{self.num_frames - 1}, got {low}..{high}")
        flat = flat.astype(np.int64, copy=False)
        out = np.empty((flat.size, *self.frame_shape), dtype=np.uint8)
        owner = np.searchsorted(self._starts, flat, side="right") - 1
        for number, shard in enumerate(self._shards):
            rows = np.flatnonzero(owner == number)
            if rows.size == flat.size:
                np.take(shard, flat - self._starts[number], axis=0, out=out, mode="clip")  # "raise" would copy twice
                break
            if rows.size:
                out[rows] = shard[flat[rows] - self._starts[number]]
        return out.reshape(*wanted.shape, *self.frame_shape)

    def transitions(self, split: str, tasks: Collection[str] | None = None) -> NDArray[np.int64]:
        """Global indices ``i`` such that frames ``i`` and ``i + 1`` belong to one episode of the split.

        Args:
            split: ``"train"`` or ``"test"``.
            tasks: only these tasks; None for all.

        Returns:
            int64 ``[n]``, ascending.

        Raises:
            InputError: for an unknown split or task.
        """
        if not isinstance(split, str) or split not in SPLITS:
            raise InputError(f"split: expected one of {SPLITS}, got {describe(split)}")
        wanted = self.tasks if tasks is None else tuple(tasks) if isinstance(tasks, Iterable) else ()
        if (
            not wanted
            or isinstance(tasks, (str, bytes))
            or not all(isinstance(t, str) and t in self.tasks for t in wanted)
        ):
            raise InputError(f"tasks: expected some of {self.tasks}, got {describe(tasks)}")
        chosen = [e for e in self.episodes if e.split == split and e.task in wanted]
        ranges = [np.arange(e.first, e.first + e.frames - 1, dtype=np.int64) for e in chosen]
        return np.concatenate(ranges) if ranges else np.empty(0, dtype=np.int64)

    def episode_of(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """Number of the episode, an index of ``episodes``, that each global frame index belongs to."""
        found: NDArray[np.int64] = np.searchsorted([e.first for e in self.episodes], indices, side="right") - 1
        return found

    def expect_transitions(self, split: str, least: int) -> NDArray[np.int64]:
        """:meth:`transitions` of a split that must have at least so many.

        Raises:
            DataError: it has fewer.
        """
        found = self.transitions(split)
        if len(found) < least:
            hint = "; pack keeps one video of two or more for it" if split == "test" else ""
            raise DataError(
                f"{self.path}: expected at least {least} transitions in the {split} split, got {len(found)}{hint}"
            )
        return found

    def check_frames(self, size: int, channels: int) -> None:
        """Check that frames are ``[size, size, channels]``, as a model takes them.

        Raises:
            DataError: they are not.
        """
        wanted, got = (size, size, channels), self.frame_shape
        if got != wanted:
            hint = f"; flexlam-fast pack --size {size} makes such" if channels == got[2] else ""
            raise DataError(f"{self.path}: expected frames {list(wanted)}, got {list(got)}{hint}")

    def __reduce__(self) -> tuple[Any, ...]:
        """In another process, or from a file, the data set is opened again: its frames are not copied."""
        return _reopen, (type(self), self.path.absolute(), self.fingerprint)

    def __copy__(self) -> Self:
        """Share the frames, which cannot be written."""
        twin = type(self).__new__(type(self))
        twin.__dict__.update(self.__dict__)
        for name in ("actions", "rewards", "previous_actions"):
            setattr(twin, name, getattr(self, name).copy())
        return twin

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self.__copy__()

    def verify(self) -> None:
        """Read every frame and compare it with the sums in the manifest.

        Raises:
            DataError: naming the first shard that is damaged.
        """
        for shard in self._manifest.shards:
            path = self.path / shard.frames.name
            with path.open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != shard.frames.sha256:
                    raise DataError(
                        f"{shown(path)}: expected the frames that were written, got other bytes (sha256 differs)"
                    )


def _reopen(kind: type[EpisodeStore], path: Path, fingerprint: str) -> EpisodeStore:
    store = kind.open(path)
    if store.fingerprint != fingerprint:
        raise DataError(f"{path}: expected the data set that was pickled, got another that has taken its place")
    return store


def _check_size(path: Path, record: FileRecord) -> None:
    try:
        size = path.stat().st_size
    except OSError as error:
        raise DataError(f"{shown(path)}: expected {record.bytes} bytes, got {error.strerror or error}") from error
    if size != record.bytes:
        raise DataError(f"{shown(path)}: expected {record.bytes} bytes, got {size}")


def _map_frames(directory: Path, record: FileRecord, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    path = directory / record.name
    _check_size(path, record)
    try:
        frames = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise DataError(f"{shown(path)}: expected an array of frames, got a damaged file ({error})") from error
    if frames.shape != shape or frames.dtype != np.uint8:
        raise DataError(f"{shown(path)}: expected {list(shape)} uint8, got {list(frames.shape)} {frames.dtype}")
    return np.asarray(frames)


def _read_table(directory: Path, record: FileRecord) -> dict[str, NDArray[Any]]:
    pyarrow, parquet = need("pyarrow"), need("pyarrow.parquet")
    path = directory / record.name
    _check_size(path, record)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{shown(path)}: expected {record.bytes} bytes, got {error.strerror or error}") from error
    if hashlib.sha256(content).hexdigest() != record.sha256:
        raise DataError(f"{shown(path)}: expected the table that was written, got a damaged file (sha256 differs)")
    try:
        # Without read-ahead and threads: one of pyarrow's that still runs when the interpreter ends aborts the process.
        table = parquet.ParquetFile(pyarrow.BufferReader(content), pre_buffer=False).read(use_threads=False)
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{shown(path)}: expected a parquet table, got a damaged file") from error
    return {name: table[name].to_numpy(zero_copy_only=False) for name in table.column_names}


def _read_episodes(directory: Path, manifest: Manifest) -> tuple[Episode, ...]:
    table = _read_table(directory, manifest.episodes)
    columns = [table["return" if name == "ret" else name].tolist() for name in Episode._fields]
    episodes = tuple(Episode(*row) for row in zip(*columns, strict=True))
    frames = sum(e.frames for e in episodes)
    if (len(episodes), frames) != (manifest.num_episodes, manifest.num_frames):
        raise DataError(f"{shown(directory)}: expected {manifest.num_frames} frames, got episodes with {frames}")
    return episodes
