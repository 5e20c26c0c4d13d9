"""Writes a data set of packed episodes: all of it, or nothing at the target."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from flexlam_fast.data.extras import need
from flexlam_fast.data.manifest import EPISODES, MANIFEST, SPLITS, Episode, FileRecord, Manifest, Shard, dump
from flexlam_fast.data.stale import publish, workfolder
from flexlam_fast.errors import InputError, StorageError

SHARD_BYTES = 256 * 2**20


class EpisodeWriter:
    """Collects episodes into a temporary directory beside ``path``, which is renamed to ``path`` at the end.

    Used as a context manager. When the block raises, or the disk is full, nothing is left behind and whatever stood at
    ``path`` is untouched. What a killed process left behind is removed by the next writer to the same ``path``.

    Args:
        path: the directory to make.
        frame_shape: ``(H, W, 3)``.
        action_names: the vocabulary that actions index; empty for data without actions.
        overwrite: whether a data set that already stands at ``path`` may be replaced.
        shard_bytes: about how large a shard of frames becomes.

    Raises:
        StorageError: if ``path`` exists (without ``overwrite``) or cannot be written.
    """

    def __init__(
        self,
        path: str | Path,
        frame_shape: Sequence[int],
        action_names: Sequence[str] = (),
        *,
        overwrite: bool = False,
        shard_bytes: int = SHARD_BYTES,
    ) -> None:
        self.path = Path(path)
        self._overwrite = overwrite
        check_target(self.path, overwrite)
        if len(frame_shape) != 3 or frame_shape[2] != 3 or min(frame_shape) < 1:
            raise InputError(f"frame_shape: expected (height, width, 3), got {tuple(frame_shape)}")
        self._shape = (int(frame_shape[0]), int(frame_shape[1]), 3)
        self._names = tuple(action_names)
        self._shard_frames = max(1, shard_bytes // int(np.prod(self._shape)))
        self._episodes: list[Episode] = []
        self._shards: list[Shard] = []
        self._pending: list[tuple[NDArray[np.uint8], NDArray[np.int16], NDArray[np.float32], int]] = []
        self._pending_frames = 0
        self._splits: dict[tuple[str, int], str] = {}
        self._work: Path | None = None
        self._cleanup = ExitStack()

    def __enter__(self) -> Self:
        folder = self._cleanup.enter_context(workfolder(self.path))
        self._work = folder / "made"
        try:
            self._work.mkdir(0o755)
        except OSError as error:
            self._cleanup.close()
            raise _storage(self.path, error) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self._finish()
        finally:
            self._work = None
            self._cleanup.close()

    def add(
        self,
        frames: NDArray[np.uint8],
        actions: ArrayLike | None,
        rewards: ArrayLike | None,
        task: str,
        split: str,
        seed: int = -1,
        source: str = "",
    ) -> None:
        """Append one episode.

        Args:
            frames: uint8 ``[n,H,W,3]``, ``n >= 2``.
            actions: integers ``[n-1]``, the action taken at each frame but the last; None for none. -1 is "not known".
            rewards: floats ``[n-1]``, what each action earned, or ``[n]`` where the action that ended the episode, and
                led to no frame, earned something too; None for zeros.
            task: what is played or filmed.
            split: ``"train"`` or ``"test"``.
            seed: what the episode was played from; -1 for none. One seed of a task belongs to one split.
            source: the file the frames came from, if any.

        Raises:
            InputError: if a shape, dtype, action or split does not fit.
            StorageError: if the disk is full or forbidden.
        """
        count = self._check(frames, task, split, seed)
        if actions is None:
            actions = np.full(count - 1, -1)
        taken = np.append(_column("actions", actions, count - 1, np.integer), -1).astype(np.int16)
        low, high = taken[:-1].min(), taken[:-1].max()
        if low < -1 or high >= len(self._names):
            raise InputError(f"actions: expected -1..{len(self._names) - 1}, got {low}..{high}")
        earned = np.zeros(count, np.float32)
        if rewards is not None:
            known = count if np.shape(rewards) == (count,) else count - 1
            earned[:known] = _column("rewards", rewards, known, np.number)
        first = self._episodes[-1].first + self._episodes[-1].frames if self._episodes else 0
        ret = float(np.sum(rewards, dtype=np.float64)) if rewards is not None else 0.0
        self._episodes.append(Episode(len(self._episodes), task, split, first, count, int(seed), ret, source))
        self._pending.append((np.ascontiguousarray(frames), taken, earned, len(self._episodes) - 1))
        self._pending_frames += count
        while self._pending_frames >= self._shard_frames:
            self._flush(self._shard_frames)

    def _check(self, frames: NDArray[np.uint8], task: str, split: str, seed: int) -> int:
        if self._work is None:
            raise InputError("add: expected a writer used as `with EpisodeWriter(...) as writer`, got a closed one")
        fits = isinstance(frames, np.ndarray) and frames.dtype == np.uint8 and frames.shape[1:] == self._shape
        if not fits or len(frames) < 2:
            came = f"{list(frames.shape)} {frames.dtype}" if isinstance(frames, np.ndarray) else type(frames).__name__
            raise InputError(f"frames: expected [n >= 2,{','.join(map(str, self._shape))}] uint8, got {came}")
        if split not in SPLITS:
            raise InputError(f"split: expected one of {SPLITS}, got {split!r}")
        if seed >= 0 and self._splits.setdefault((task, int(seed)), split) != split:
            raise InputError(f"seed: expected one split per seed of {task}, got {seed} in both train and test")
        return len(frames)

    def _flush(self, count: int) -> None:
        """Write the first ``count`` pending frames as a shard."""
        frames: list[NDArray[np.uint8]] = []
        steps: list[tuple[NDArray[np.int16], NDArray[np.float32], NDArray[np.int32]]] = []
        room = count
        while room:
            pixels, actions, rewards, index = self._pending.pop(0)
            if len(pixels) > room:
                self._pending.insert(0, (pixels[room:], actions[room:], rewards[room:], index))
            frames.append(pixels[:room])
            steps.append((actions[:room], rewards[:room], np.full(len(pixels[:room]), index, np.int32)))
            room -= len(frames[-1])
        self._pending_frames -= count
        number = len(self._shards)
        header = io.BytesIO()
        layout = {"descr": "|u1", "fortran_order": False, "shape": (count, *self._shape)}
        np.lib.format.write_array_header_1_0(header, layout)
        columns = {
            "episode": np.concatenate([e for _, _, e in steps]),
            "action": np.concatenate([a for a, _, _ in steps]),
            "reward": np.concatenate([r for _, r, _ in steps]),
        }
        self._shards.append(
            Shard(
                count,
                self._write(f"frames-{number:05d}.npy", [header.getvalue(), *frames]),
                self._write(f"steps-{number:05d}.parquet", [_parquet(columns)]),
            )
        )

    def _finish(self) -> None:
        if not self._episodes:
            raise InputError("episodes: expected at least one, got none")
        if self._pending_frames:
            self._flush(self._pending_frames)
        columns: dict[str, Any] = {
            "return" if field == "ret" else field: [getattr(e, field) for e in self._episodes]
            for field in Episode._fields
        }
        tasks = tuple(dict.fromkeys(e.task for e in self._episodes))
        last = self._episodes[-1]
        listing = self._write(EPISODES, [_parquet(columns)])
        totals = (len(self._episodes), last.first + last.frames)
        self._write(MANIFEST, [dump(Manifest(self._shape, self._names, tasks, tuple(self._shards), listing, *totals))])
        self._publish()

    def _publish(self) -> None:
        assert self._work is not None
        check_target(self.path, self._overwrite)
        try:
            _sync(self._work)
            publish(self._work, self.path, self._work.parent)
            _sync(self.path.parent)
        except OSError as error:
            raise _storage(self.path, error) from error

    def _write(self, name: str, chunks: Iterable[bytes | NDArray[np.uint8]]) -> FileRecord:
        assert self._work is not None
        digest, size = hashlib.sha256(), 0
        try:
            with open(self._work / name, "wb") as file:
                for chunk in chunks:
                    view = memoryview(chunk if isinstance(chunk, bytes) else chunk.data).cast("B")
                    file.write(view)
                    digest.update(view)
                    size += len(view)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise _storage(self.path / name, error) from error
        return FileRecord(name, size, digest.hexdigest())


def check_target(path: Path, overwrite: bool) -> None:
    """Refuse a target that exists, or with ``overwrite`` one that is no data set, before any work is done.

    Raises:
        StorageError: naming the target.
    """
    if not path.exists():
        return
    if not overwrite:
        raise StorageError(f"{path}: expected a new directory, got one that exists; overwrite replaces it")
    if not (path / MANIFEST).is_file():
        raise StorageError(f"{path}: expected a data set to replace, got something else")


def _column(name: str, values: ArrayLike, count: int, kind: type) -> NDArray[Any]:
    array = np.asarray(values)
    if array.shape != (count,) or not (np.issubdtype(array.dtype, kind) or count == 0):
        raise InputError(f"{name}: expected [{count}] {kind.__name__}, got {list(array.shape)} {array.dtype}")
    if not np.isfinite(array).all():
        raise InputError(f"{name}: expected finite values, got NaN or infinite ones")
    return array


def _parquet(columns: dict[str, Any]) -> bytes:
    pyarrow, parquet = need("pyarrow"), need("pyarrow.parquet")
    sizes = {"index": pyarrow.int32(), "first": pyarrow.int64(), "frames": pyarrow.int64(), "seed": pyarrow.int64()}
    arrays = {name: pyarrow.array(values, type=sizes.get(name)) for name, values in columns.items()}
    buffer = io.BytesIO()
    parquet.write_table(pyarrow.table(arrays), buffer)
    return buffer.getvalue()


def _sync(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _storage(path: Path, error: OSError) -> StorageError:
    return StorageError(f"{path}: expected to write it, got {error.strerror or error}")
