"""Packs a folder of videos into a data set of episodes without actions: the command ``flexlam-fast pack``."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

import flexlam_fast
from flexlam_fast.data.decode import UnsoundVideo, VideoReader
from flexlam_fast.data.extras import need
from flexlam_fast.data.folders import check_target, publish
from flexlam_fast.data.journal import Entry, Journal, Source, opened
from flexlam_fast.data.manifest import Episode
from flexlam_fast.data.names import shown, to_text
from flexlam_fast.data.picture import Squares, views
from flexlam_fast.data.shards import FrameShards
from flexlam_fast.data.store import EpisodeStore
from flexlam_fast.data.writer import complete
from flexlam_fast.errors import DataError
from flexlam_fast.values import check_choice, check_number, check_path

#: File names that count as videos; other files in the folder are left alone.
SUFFIXES = frozenset(
    {".avi", ".flv", ".gif", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ogv", ".ts", ".webm", ".wmv"}
)
MAX_SIZE = 4096
MAX_FPS = 1e6
MAX_ASPECT = 64
ON_ERROR = ("stop", "skip")


def pack(
    videos: str | Path,
    output: str | Path,
    *,
    fps: float | None = None,
    size: int = 64,
    test_fraction: float = 0.1,
    overwrite: bool = False,
    progress: bool = True,
    on_error: str = "stop",
    strict: bool = False,
    report: Callable[[str], None] | None = None,
) -> EpisodeStore:
    """Decode every video below a folder and write it as one episode each.

    Frames are shown as a player would (turned, mirrored, stretched, deinterlaced as the file says), scaled so that the
    shorter side is ``size``, then cut to the square in the middle. The task of a video is the subfolder it stands in,
    ``video`` for the folder itself. Which split it belongs to follows from its name alone, except that a folder of at
    least two videos always has both splits.

    Of a damaged video the undamaged frames are kept. No transition leads across missing frames: there the video is
    split into two episodes. A run that was stopped leaves the finished videos in a hidden folder beside ``output``,
    ``.NAME.pack``; the same call goes on from there and makes the same bytes as one that was not stopped.

    Args:
        videos: the folder, searched through all its subfolders.
        output: the directory to make.
        fps: frames per second to keep, by the videos' own clocks (the paper uses 1.6); frames are never doubled; None
            keeps all.
        size: side of the square frames in pixels, 1 to 4096.
        test_fraction: share of the videos that form the test split, 0 to 0.5.
        overwrite: whether a data set at ``output`` may be replaced.
        progress: whether to show a bar.
        on_error: what a video does that cannot be opened or gives fewer than two frames: ``"stop"`` or ``"skip"``.
        strict: whether a video that is not whole, or is skipped, is an error instead of a warning.
        report: called with every warning and with how to go on after a stop; None writes to stderr.

    Returns:
        The finished data set, opened.

    Raises:
        DataError: for a folder without videos, or naming the video that cannot be read, has fewer than two frames, or
            (``strict``) is not whole.
        InputError: for an argument of the wrong type or out of range.
        StorageError: if ``output`` exists or cannot be written, or another call is packing to it.
    """
    videos, output = check_path("videos", videos), check_path("output", output)
    size = int(check_number("size", size, 1, MAX_SIZE, integer=True))
    fps = None if fps is None else check_number("fps", fps, 0, MAX_FPS, open_low=True)
    test_fraction = check_number("test_fraction", test_fraction, 0, 0.5)
    check_choice("on_error", on_error, ON_ERROR)
    av, _ = need("av"), need("pyarrow")
    target = output if output.name not in ("", "..") else Path(os.path.abspath(output))
    check_target(target, overwrite)
    say = report or _to_stderr
    run = _Run(_find(videos), Squares(size), fps, on_error == "skip" and not strict, strict, progress)
    versions = {"flexlam_fast": flexlam_fast.__version__, "av": av.__version__}
    with opened(target, {"size": size, "fps": fps} | versions) as journal:
        shards = FrameShards(journal.data, target, (size, size, 3))
        try:
            run.resume(journal, shards)
            run.decode(journal, shards)
            complete(journal.data, target, shards, (), run.episodes(journal.entries, test_fraction))
            publish(journal.data, target, overwrite)
        except BaseException:
            if journal.frames:
                done = f"{len(journal.entries)} of {len(run.videos)} videos are done and kept"
                say(f"{done}; the same command goes on from there")
            raise
        finally:
            shards.close()
    for entry, video in zip(journal.entries, run.videos, strict=True):
        if entry.skipped or entry.fault:
            say(f"warning: {f'left out: {entry.skipped}' if entry.skipped else f'{shown(video.path)}: {entry.fault}'}")
    return EpisodeStore.open(output)


class _Video(NamedTuple):
    path: Path
    name: str  # below the folder, as the file system has it
    source: Source


class _Run:
    """The videos of one call of :func:`pack`, and how they are decoded."""

    def __init__(
        self, videos: list[_Video], squares: Squares, fps: float | None, skip: bool, strict: bool, progress: bool
    ) -> None:
        self.videos = videos
        self._squares, self._fps, self._skip, self._strict, self._progress = squares, fps, skip, strict, progress

    def resume(self, journal: Journal, shards: FrameShards) -> None:
        """Keep what an earlier run has done, as far as it is there and allowed now."""
        journal.read([video.source for video in self.videos])
        if not shards.truncate(journal.frames):
            journal.entries.clear()
        journal.rewrite()
        for video, entry in zip(self.videos, journal.entries, strict=False):
            self._allow(video, entry)

    def decode(self, journal: Journal, shards: FrameShards) -> None:
        """Decode all videos that are not done yet."""
        done = len(journal.entries)
        left = self.videos[done:]
        bad = {}
        for video in left:  # all of them before the first is decoded in full, which may take hours
            entry = self._attempt(video, None)
            if entry.skipped:
                bad[video] = entry
        with tqdm(total=len(self.videos), initial=done, unit="video", disable=not self._progress) as bar:
            for video in left:
                bar.set_postfix_str(shown(video.path.name), refresh=False)
                entry = bad.get(video) or self._attempt(video, shards)
                shards.sync()
                journal.add(entry)
                self._allow(video, entry)
                bar.update()

    def episodes(self, entries: Sequence[Entry], test_fraction: float) -> list[Episode]:
        """List the episodes of the data set.

        Raises:
            DataError: if every video was left out.
        """
        packed = [(entry, video) for entry, video in zip(entries, self.videos, strict=True) if entry.episodes]
        if not packed:
            raise DataError(f"videos: expected at least one that can be packed, got none ({entries[0].skipped})")
        tests = _tests([os.fsencode(video.name) for _, video in packed], test_fraction)
        listed: list[Episode] = []
        first = 0
        for entry, video in packed:
            folder = os.path.dirname(video.name)
            task = to_text(folder) if folder else "video"
            split = "test" if os.fsencode(video.name) in tests else "train"
            for count in entry.episodes:
                listed.append(Episode(len(listed), task, split, first, count, -1, 0.0, video.source.name))
                first += count
        return listed

    def _allow(self, video: _Video, entry: Entry) -> None:
        if entry.skipped and not self._skip:
            raise DataError(entry.skipped)
        if entry.fault and self._strict:
            raise DataError(f"{shown(video.path)}: {entry.fault}; strict refuses a video that is not whole")

    def _attempt(self, video: _Video, shards: FrameShards | None) -> Entry:
        """Decode a video into the shards, or only look whether it can be done."""
        start = shards.frames if shards is not None else 0
        try:
            for careful in (False, True):
                try:
                    with VideoReader(video.path, careful) as reader:
                        if shards is None:
                            self._check(video, len(list(islice(reader, 2))), "")
                            return Entry(video.source)
                        shards.truncate(start)
                        return self._write(video, reader, shards)
                except UnsoundVideo:
                    continue
            raise AssertionError("a careful pass goes on to the end")
        except (DataError, need("av").FFmpegError) as error:
            if isinstance(error, DataError):
                reason = str(error)
            else:
                reason = f"{shown(video.path)}: expected pictures that can be converted, got others ({error})"
            if not self._skip:
                raise DataError(reason) from error
            if shards is not None:
                shards.truncate(start)
            return Entry(video.source, skipped=reason)

    def _write(self, video: _Video, reader: VideoReader, shards: FrameShards) -> Entry:
        lengths: list[int] = []
        kept, first = 0, None
        for square, fresh in self._kept(video, reader):
            kept += 1
            if fresh:
                lengths.append(0)
                first = square  # a single frame between two gaps has no transition and is not written
                continue
            if first is not None:
                shards.append(first[None])
                lengths[-1], first = 1, None
            shards.append(square[None])
            lengths[-1] += 1
        episodes = tuple(n for n in lengths if n)
        fault = reader.fault()
        at = f" at {self._fps:g} per second" if self._fps else ""
        self._check(video, kept if len(lengths) < 2 else sum(episodes), at + (f"; {fault}" if fault else ""))
        if len(episodes) > 1:
            fault += f"; packed as {len(episodes)} episodes"
        return Entry(video.source, episodes, fault)

    def _kept(self, video: _Video, reader: VideoReader) -> Iterator[tuple[NDArray[np.uint8], bool]]:
        """Yield the frames that are due by the clock, and whether an episode begins with them."""
        start, due = 0.0, 0
        for number, view in enumerate(views(reader)):
            frame = view.frame
            fresh = number == 0 or frame.apart
            if fresh:
                start, due = frame.seconds, 0
            if self._fps is not None:
                ticks = (frame.seconds - start) * self._fps + 1e-6  # clocks are rounded to the file's time base
                if ticks < due:
                    continue
                due = int(ticks) + 1
            sides = frame.picture.width, frame.picture.height
            if max(sides) > MAX_ASPECT * min(sides):  # scaled to the size they would not fit in memory
                came = f"got {sides[0]}x{sides[1]}"
                raise DataError(f"{shown(video.path)}: expected pictures of sides at most {MAX_ASPECT} to 1, {came}")
            yield self._squares.cut(view), fresh

    def _check(self, video: _Video, frames: int, detail: str) -> None:
        if frames < 2:
            raise DataError(f"{shown(video.path)}: expected a video of at least two frames, got {frames}{detail}")


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr)


def _find(videos: Path) -> list[_Video]:
    if not videos.is_dir():
        came = "a file" if videos.exists() else "nothing"
        raise DataError(f"{shown(videos)}: expected a folder of videos, got {came}")
    found = sorted(p for p in videos.rglob("*") if p.suffix.lower() in SUFFIXES and (p.is_file() or _is_broken(p)))
    paths = [p for p in found if not p.name.startswith(".")]
    if not paths:
        raise DataError(f"{shown(videos)}: expected at least one video ({', '.join(sorted(SUFFIXES))}), got none")
    return [_video(path, path.relative_to(videos).as_posix()) for path in paths]


def _is_broken(path: Path) -> bool:
    return path.is_symlink() and not path.exists()


def _video(path: Path, name: str) -> _Video:
    try:
        status = path.stat()
    except OSError:
        return _Video(path, name, Source(to_text(name), -1, -1))
    return _Video(path, name, Source(to_text(name), status.st_size, status.st_mtime_ns))


def _tests(names: Sequence[bytes], fraction: float) -> set[bytes]:
    """Names whose hash, as a number in [0, 1), lies below the fraction; of two names or more never none or all."""
    shares = sorted((int.from_bytes(hashlib.sha256(n).digest()[:8], "big") / 2**64, n) for n in names)
    chosen = sum(share < fraction for share, _ in shares)
    if fraction > 0:
        chosen = min(max(chosen, 1), len(names) - 1)
    return {name for _, name in shares[:chosen]}
