"""Packs a folder of videos into a data set of episodes without actions: the command ``flexlam-fast pack``."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from flexlam_fast.data.extras import need
from flexlam_fast.data.store import EpisodeStore
from flexlam_fast.data.writer import EpisodeWriter
from flexlam_fast.errors import DataError, InputError

#: File names that count as videos; other files in the folder are left alone.
SUFFIXES = frozenset(
    {".avi", ".flv", ".gif", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ogv", ".ts", ".webm", ".wmv"}
)


def pack(
    videos: Path,
    output: Path,
    *,
    fps: float | None = None,
    size: int = 64,
    test_fraction: float = 0.1,
    overwrite: bool = False,
    progress: bool = True,
) -> EpisodeStore:
    """Decode every video below a folder and write it as one episode each.

    Frames are scaled so that the shorter side is ``size``, then cut to the square in the middle. The task of a video is
    the subfolder it stands in, ``video`` for the folder itself. Which split it belongs to follows from its name alone,
    except that a folder of at least two videos always has both splits.

    Args:
        videos: the folder, searched through all its subfolders.
        output: the directory to make.
        fps: frames per second to keep, by the videos' own clocks (the paper uses 1.6); frames are never doubled; None
            keeps all.
        size: side of the square frames in pixels.
        test_fraction: share of the videos that form the test split, 0 to 0.5.
        overwrite: whether a data set at ``output`` may be replaced.
        progress: whether to show a bar.

    Returns:
        The finished data set, opened.

    Raises:
        DataError: for a folder without videos, or naming the video that cannot be read or has fewer than two frames.
        InputError: for an argument out of range.
        StorageError: if ``output`` exists or cannot be written.
    """
    if size < 1 or not 0 <= test_fraction <= 0.5 or (fps is not None and not 0 < fps < float("inf")):
        raise InputError(
            f"pack: expected size >= 1, test_fraction 0 to 0.5, fps > 0, got {size}, {test_fraction}, {fps}"
        )
    need("av")
    with EpisodeWriter(output, (size, size, 3), (), overwrite=overwrite) as writer:
        paths = _find(videos)
        for path in paths:  # all of them before the first is decoded in full, which may take hours
            _at_least_two(path, list(islice(_decode(path, None, size), 2)), "")
        tests = _tests([p.relative_to(videos).as_posix() for p in paths], test_fraction)
        for path in tqdm(paths, unit="video", disable=not progress):
            frames = _at_least_two(path, list(_decode(path, fps, size)), f" at {fps} per second" if fps else "")
            name = path.relative_to(videos)
            task = name.parent.as_posix() if name.parent.name else "video"
            split = "test" if name.as_posix() in tests else "train"
            writer.add(np.stack(frames), None, None, task, split, source=name.as_posix())
    return EpisodeStore.open(output)


def _find(videos: Path) -> list[Path]:
    if not videos.is_dir():
        raise DataError(f"{videos}: expected a folder of videos, got {'a file' if videos.exists() else 'nothing'}")
    found = sorted(p for p in videos.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
    paths = [p for p in found if not p.name.startswith(".")]
    if not paths:
        raise DataError(f"{videos}: expected at least one video ({', '.join(sorted(SUFFIXES))}), got none")
    return paths


def _tests(names: Sequence[str], fraction: float) -> set[str]:
    """Names whose hash, as a number in [0, 1), lies below the fraction; of two names or more never none or all."""
    shares = sorted((int.from_bytes(hashlib.sha256(n.encode()).digest()[:8], "big") / 2**64, n) for n in names)
    chosen = sum(share < fraction for share, _ in shares)
    if fraction > 0:
        chosen = min(max(chosen, 1), len(names) - 1)
    return {name for _, name in shares[:chosen]}


def _at_least_two(path: Path, frames: list[NDArray[np.uint8]], kept: str) -> list[NDArray[np.uint8]]:
    if len(frames) < 2:
        raise DataError(f"{path}: expected a video of at least two frames, got {len(frames)}{kept}")
    return frames


def _decode(path: Path, fps: float | None, size: int) -> Iterator[NDArray[np.uint8]]:
    """Yield uint8 ``[size,size,3]`` frames, thinned to ``fps``."""
    av = need("av")
    try:
        if path.stat().st_size == 0:
            raise DataError(f"{path}: expected a video, got an empty file")
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise DataError(f"{path}: expected a video, got a file without a video stream")
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            start, due = None, 0
            for number, frame in enumerate(container.decode(stream)):
                if fps is not None:
                    clock = frame.time if frame.time is not None else number / float(stream.average_rate or 25)
                    start = clock if start is None else start
                    ticks = (clock - start) * fps + 1e-6  # clocks are rounded to the file's time base
                    if ticks < due:
                        continue
                    due = int(ticks) + 1
                yield _square(frame, size)
    except (av.FFmpegError, OSError, EOFError, ValueError) as error:
        raise DataError(f"{path}: expected a video, got a file that cannot be decoded ({error})") from error


def _square(frame: Any, size: int) -> NDArray[np.uint8]:
    scale = size / min(frame.width, frame.height)
    width, height = (max(size, round(n * scale)) for n in (frame.width, frame.height))
    small = frame.reformat(width=width, height=height, format="rgb24", interpolation="AREA").to_ndarray()
    top, left = (height - size) // 2, (width - size) // 2
    return np.ascontiguousarray(small[top : top + size, left : left + size])
