"""Writes a data set of packed episodes: all of it, or nothing at the target."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from flexlam_fast.data.arguments import (
    as_array,
    check_action_names,
    check_frame_shape,
    check_text,
    column,
)
from flexlam_fast.data.extras import need
from flexlam_fast.data.folders import check_target, sync, unwritten
from flexlam_fast.data.manifest import EPISODES, MANIFEST, SPLITS, Episode, Manifest, Shard, dump
from flexlam_fast.data.shards import SHARD_BYTES, FrameShards, spans, write_file
from flexlam_fast.data.stale import publish, workfolder
from flexlam_fast.errors import InputError
from flexlam_fast.values import check_number, check_path

MAX_SEED = np.iinfo(np.int64).max


class _Steps(NamedTuple):
    """Actions int16 ``[n]`` and rewards float32 ``[n]`` of consecutive frames."""

    actions: NDArray[np.int16]
    rewards: NDArray[np.float32]


class EpisodeWriter:
    """Collects episodes into a temporary directory beside ``path``, which is renamed to ``path`` at the end.

    Used as a context manager. When the block raises, or the disk is full, nothing is left behind and whatever stood at
    ``path`` is untouched; what a killed process left behind is removed by the next writer to the same ``path``. Frames
    go to disk as they come: memory holds the actions and rewards alone.

    Args:
        path: the directory to make.
        frame_shape: ``(H, W, 3)``.
        action_names: the vocabulary that actions index; empty for data without actions.
        overwrite: whether a data set that already stands at ``path`` may be replaced.
        shard_bytes: about how large a shard of frames becomes.

    Raises:
        InputError: for an argument of the wrong type or out of range.
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
        self.path = check_path("path", path)
        self._overwrite = overwrite
        self._shape = check_frame_shape(frame_shape)
        self._names = check_action_names(action_names)
        self._shard_bytes = int(check_number("shard_bytes", shard_bytes, 1, math.inf, integer=True))
        check_target(self.path, overwrite)
        self._episodes: list[Episode] = []
        self._steps: list[_Steps] = []
        self._splits: dict[tuple[str, int], str] = {}
        self._open = False
        self._shards: FrameShards | None = None
        self._work: Path | None = None
        self._cleanup = ExitStack()

    def __enter__(self) -> Self:
        self._work = self._cleanup.enter_context(workfolder(self.path)) / "made"
        try:
            self._work.mkdir(0o755)
        except OSError as error:
            self._cleanup.close()
            raise unwritten(self.path, error) from error
        self._shards = FrameShards(self._work, self.path, self._shape, self._shard_bytes)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._work is not None
        assert self._shards is not None
        try:
            if error is None:
                complete(self._work, self.path, self._shards, self._names, self._episodes, self._steps)
                self._publish(self._work)
        finally:
            self._shards.close()
            self._work = self._shards = None
            self._cleanup.close()

    def _publish(self, made: Path) -> None:
        check_target(self.path, self._overwrite)
        try:
            sync(made)
            publish(made, self.path, made.parent)
            sync(self.path.parent)
        except OSError as error:
            raise unwritten(self.path, error) from error

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
        self._check_frames(frames, 2)
        count = len(frames)
        taken = np.append(self._check_actions(actions, count - 1), np.int16(-1))
        earned, total = np.zeros(count), 0.0
        if rewards is not None:
            known = count if np.shape(as_array("rewards", rewards)) == (count,) else count - 1
            earned[:known] = column("rewards", rewards, known, np.floating)
            total = float(np.sum(rewards, dtype=np.float64))
        with self.episode(task, split, seed, source) as episode:
            episode.append(frames, taken, earned)
            episode.total = total

    @contextmanager
    def episode(self, task: str, split: str, seed: int = -1, source: str = "") -> Iterator[EpisodeInProgress]:
        """Append one episode piece by piece, so that it need not fit in memory.

        Used as a context manager around calls of :meth:`EpisodeInProgress.append`. When the block raises, the episode
        is left out and the writer can go on with another one. The arguments are those of :meth:`add`.

        Raises:
            InputError: if an argument does not fit, another episode is open, or this one ends with fewer than two
                frames or with an action at its last frame.
            StorageError: if the disk is full or forbidden.
        """
        if self._shards is None or self._open:
            came = "one in which another episode is open" if self._open else "a closed one"
            raise InputError(f"add: expected a writer used as `with EpisodeWriter(...) as writer`, got {came}")
        seed = self._check_labels(task, split, seed, source)
        progress = EpisodeInProgress(self, self._shards)
        first, steps, self._open = self._shards.frames, len(self._steps), True
        try:
            yield progress
            count = self._shards.frames - first
            if count < 2:
                raise InputError(f"frames: expected at least 2 in an episode, got {count}")
            if self._steps[-1].actions[-1] != -1:
                raise InputError("actions: expected -1 at the last frame of an episode, which leads to none, got more")
        except BaseException:
            self._shards.truncate(first)
            del self._steps[steps:]
            raise
        finally:
            self._open = False
        if seed >= 0:
            self._splits[task, seed] = split
        self._episodes.append(Episode(len(self._episodes), task, split, first, count, seed, progress.total, source))

    def _check_labels(self, task: str, split: str, seed: int, source: str) -> int:
        check_text("task", task)
        check_text("source", source, empty=True)
        if not isinstance(split, str) or split not in SPLITS:
            raise InputError(f"split: expected one of {SPLITS}, got {split!r}")
        seed = int(check_number("seed", seed, -1, MAX_SEED, integer=True))
        if seed >= 0 and self._splits.get((task, seed), split) != split:
            raise InputError(f"seed: expected one split per seed of {task}, got {seed} in both train and test")
        return seed

    def _check_frames(self, frames: NDArray[np.uint8], least: int) -> None:
        fits = isinstance(frames, np.ndarray) and frames.dtype == np.uint8 and frames.shape[1:] == self._shape
        if not fits or frames.ndim != 4 or len(frames) < least:
            came = f"{list(frames.shape)} {frames.dtype}" if isinstance(frames, np.ndarray) else type(frames).__name__
            raise InputError(f"frames: expected [n >= {least},{','.join(map(str, self._shape))}] uint8, got {came}")

    def _check_actions(self, actions: ArrayLike | None, count: int) -> NDArray[np.int16]:
        if actions is None:
            return np.full(count, -1, np.int16)
        taken = column("actions", actions, count, np.integer)
        low, high = (int(taken.min()), int(taken.max())) if count else (-1, -1)
        if low < -1 or high >= len(self._names):
            raise InputError(f"actions: expected -1..{len(self._names) - 1}, got {low}..{high}")
        return taken.astype(np.int16)


class EpisodeInProgress:
    """An episode that is being written, see :meth:`EpisodeWriter.episode`; ``total`` is the sum of its rewards."""

    def __init__(self, writer: EpisodeWriter, shards: FrameShards) -> None:
        self.total = 0.0
        self._writer, self._shards = writer, shards

    def append(
        self, frames: NDArray[np.uint8], actions: ArrayLike | None = None, rewards: ArrayLike | None = None
    ) -> None:
        """Append frames to the episode.

        Args:
            frames: uint8 ``[n,H,W,3]``, any ``n``.
            actions: integers ``[n]``, the action taken at each of these frames, -1 where none is known and at the
                episode's last frame; None for none.
            rewards: floats ``[n]``, what each action earned; None for zeros.

        Raises:
            InputError: if a shape, dtype or action does not fit.
            StorageError: if the disk is full or forbidden.
        """
        writer = self._writer
        writer._check_frames(frames, 0)
        count = len(frames)
        taken = writer._check_actions(actions, count)
        earned = np.zeros(count) if rewards is None else column("rewards", rewards, count, np.floating)
        self._shards.append(frames)
        if count:
            writer._steps.append(_Steps(taken, earned.astype(np.float32)))
            self.total += float(np.sum(earned, dtype=np.float64))


def complete(
    folder: Path,
    target: Path,
    shards: FrameShards,
    action_names: Sequence[str],
    episodes: Sequence[Episode],
    steps: Sequence[_Steps] = (),
) -> None:
    """Write all that a data set needs beside its frames: steps, the list of episodes, the manifest.

    Args:
        folder: where the shards are, and the rest goes.
        target: where the folder will be, for messages.
        shards: the frames.
        action_names: the vocabulary that actions index.
        episodes: in the order of their frames.
        steps: actions and rewards of all frames; empty for none.

    Raises:
        InputError: if there is no episode.
        StorageError: if the disk is full or forbidden.
    """
    if not episodes:
        raise InputError("episodes: expected at least one, got none")
    owners = np.repeat(np.arange(len(episodes), dtype=np.int32), [e.frames for e in episodes])
    actions = np.concatenate([s.actions for s in steps]) if steps else np.full(len(owners), -1, np.int16)
    rewards = np.concatenate([s.rewards for s in steps]) if steps else np.zeros(len(owners), np.float32)
    frames, made = shards.finish(), []
    for number, ((length, record), rows) in enumerate(zip(frames, spans([n for n, _ in frames]), strict=True)):
        table = parquet({"episode": owners[rows], "action": actions[rows], "reward": rewards[rows]})
        made.append(Shard(length, record, write_file(folder, target, f"steps-{number:05d}.parquet", table)))
    columns: dict[str, Any] = {
        "return" if field == "ret" else field: [getattr(e, field) for e in episodes] for field in Episode._fields
    }
    listing = write_file(folder, target, EPISODES, parquet(columns))
    tasks = tuple(dict.fromkeys(e.task for e in episodes))
    height, width, _ = shards.shape
    manifest = Manifest(
        (height, width, 3), tuple(action_names), tasks, tuple(made), listing, len(episodes), len(owners)
    )
    write_file(folder, target, MANIFEST, dump(manifest))


def parquet(columns: dict[str, Any]) -> bytes:
    """The bytes of a parquet file with the given columns."""
    pyarrow, pq = need("pyarrow"), need("pyarrow.parquet")
    sizes = {"index": pyarrow.int32(), "first": pyarrow.int64(), "frames": pyarrow.int64(), "seed": pyarrow.int64()}
    arrays = {name: pyarrow.array(values, type=sizes.get(name)) for name, values in columns.items()}
    buffer = io.BytesIO()
    pq.write_table(pyarrow.table(arrays), buffer)
    return buffer.getvalue()
