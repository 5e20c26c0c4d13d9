"""The frames of a data set while it is written: appended to shards on disk, never held in memory."""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray

from flexlam_fast.data.folders import unwritten
from flexlam_fast.data.manifest import FileRecord

SHARD_BYTES = 256 * 2**20


class FrameShards:
    """Frames that are appended one after another; which file a frame is in follows from its number alone.

    Every shard but the last has ``shard_frames`` frames, so the first ``n`` frames can be kept, and the rest dropped,
    without any record of how they were appended: :meth:`truncate` undoes, and continues what another process wrote.

    Attributes:
        frames: how many there are.
        shape: of each, ``(H, W, 3)``.
        shard_frames: how many a full shard has.

    Args:
        folder: where the shards are made.
        target: where they will be, for messages.
        frame_shape: ``(H, W, 3)``.
        shard_bytes: about how large a shard becomes.
    """

    def __init__(
        self, folder: Path, target: Path, frame_shape: tuple[int, int, int], shard_bytes: int = SHARD_BYTES
    ) -> None:
        self.frames = 0
        self.shape = frame_shape
        self._folder, self._target = folder, target
        self._frame_bytes = int(np.prod(frame_shape, dtype=object))
        self.shard_frames = max(1, shard_bytes // self._frame_bytes)
        # numpy pads a header so that the number of frames in it can grow in place.
        self._start = len(self._header(self.shard_frames))
        self._file: IO[bytes] | None = None
        self._sums: dict[int, FileRecord] = {}

    def append(self, frames: NDArray[np.uint8]) -> None:
        """Write uint8 ``[n,H,W,3]`` behind the frames that are there.

        Raises:
            StorageError: if the disk is full or forbidden.
        """
        frames = np.ascontiguousarray(frames)
        while len(frames):
            number, inside = divmod(self.frames, self.shard_frames)
            part = frames[: self.shard_frames - inside]
            try:
                self._opened(number, inside).write(memoryview(part.data).cast("B"))
            except OSError as error:
                raise unwritten(self._target / _name(number), error) from error
            self.frames += len(part)
            frames = frames[len(part) :]
            if self.frames % self.shard_frames == 0:
                self._seal(number, self.shard_frames)

    def truncate(self, frames: int) -> bool:
        """Keep the first ``frames`` frames that are on disk and drop all others.

        Returns:
            Whether that many are there; if not, nothing is kept.
        """
        self.close()
        number, inside = divmod(frames, self.shard_frames)
        full = self._start + self.shard_frames * self._frame_bytes
        sizes = [full] * number + ([self._start + inside * self._frame_bytes] if inside else [])
        good = all(_size(self._folder / _name(n)) >= size for n, size in enumerate(sizes))
        self.frames = frames if good else 0
        kept = len(sizes) if good else 0
        self._sums = {n: record for n, record in self._sums.items() if n < self.frames // self.shard_frames}
        for path in self._folder.glob("frames-*.npy"):
            if path.name not in {_name(n) for n in range(kept)}:
                try:
                    path.unlink()
                except OSError as error:
                    raise unwritten(self._target / path.name, error) from error
        return good

    def sync(self) -> None:
        """Have every frame reach the disk.

        Raises:
            StorageError: if the disk is full or forbidden.
        """
        number = self.frames // self.shard_frames
        try:
            if self._file is not None:
                self._file.flush()
                os.fsync(self._file.fileno())
        except OSError as error:
            raise unwritten(self._target / _name(number), error) from error

    def finish(self) -> list[tuple[int, FileRecord]]:
        """Complete the last shard; the number of frames and the record of every shard.

        Raises:
            StorageError: if the disk is full or forbidden.
        """
        self.sync()
        self.close()
        number, inside = divmod(self.frames, self.shard_frames)
        lengths = [self.shard_frames] * number + ([inside] if inside else [])
        for index, length in enumerate(lengths):
            if index not in self._sums:
                self._seal(index, length)
        return [(length, self._sums[index]) for index, length in enumerate(lengths)]

    def close(self) -> None:
        """Let go of the open file; what it holds is not promised to be on disk."""
        file, self._file = self._file, None
        if file is not None:
            with contextlib.suppress(OSError):  # a full disk: append or sync say so to whoever needs the frames
                file.close()

    def _opened(self, number: int, inside: int) -> IO[bytes]:
        if self._file is None:
            path = self._folder / _name(number)
            self._file = path.open("r+b" if inside else "w+b")
            self._file.seek(self._start + inside * self._frame_bytes)
            self._file.truncate()
        return self._file

    def _seal(self, number: int, length: int) -> None:
        """Give a shard its header and take its sum, of what the file holds now."""
        try:
            file = self._opened(number, length)
            file.seek(0)
            file.write(self._header(length))
            file.flush()
            os.fsync(file.fileno())
            file.seek(0)
            digest = hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]
        except OSError as error:
            raise unwritten(self._target / _name(number), error) from error
        finally:
            self.close()
        size = self._start + length * self._frame_bytes
        self._sums[number] = FileRecord(_name(number), size, digest)

    def _header(self, length: int) -> bytes:
        header = io.BytesIO()
        layout = {"descr": "|u1", "fortran_order": False, "shape": (length, *self.shape)}
        np.lib.format.write_array_header_1_0(header, layout)
        return header.getvalue()


def write_file(folder: Path, target: Path, name: str, content: bytes) -> FileRecord:
    """Write and sync a small file of a data set.

    Raises:
        StorageError: if the disk is full or forbidden.
    """
    try:
        with open(folder / name, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise unwritten(target / name, error) from error
    return FileRecord(name, len(content), hashlib.sha256(content).hexdigest())


def spans(lengths: Sequence[int]) -> list[slice]:
    """Consecutive slices of the given lengths."""
    ends = np.cumsum([0, *lengths]).tolist()
    return [slice(a, b) for a, b in itertools.pairwise(ends)]


def _name(number: int) -> str:
    return f"frames-{number:05d}.npy"


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1
