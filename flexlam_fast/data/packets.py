"""Opens a video file, finds the film in it, and reads its packets, judging each by what the file itself says of it."""

from __future__ import annotations

import io
import itertools
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flexlam_fast.data.damage import torn
from flexlam_fast.data.extras import need
from flexlam_fast.data.names import shown
from flexlam_fast.errors import DataError

LOOKAHEAD = 3  # packets: a demuxer marks one that stands up to two before the place it found damaged
MAX_FAILURES = 10
#: Demuxers that read on after damage and whose packets stand close together: bytes between them are lost packets.
RESYNCING = ("matroska,webm", "flv", "avi")
GIF_END = b"\x3b"


class _File(io.BufferedReader):
    """A file that shows FFmpeg only the suffix of its name: a colon or ``%d`` in a name means something there."""

    def __init__(self, path: Path) -> None:
        super().__init__(io.FileIO(path))
        self.path = path

    @property
    def name(self) -> str:
        return f"video{self.path.suffix if self.path.suffix.isascii() else ''}"


class PacketReader:
    """The packets of the film in a video file: the best of its video streams that is no cover picture.

    Attributes:
        stream: PyAV's stream.
        rate: frames per second, or about that.
        count: how many packets have been read.

    Args:
        path: the file.

    Raises:
        DataError: if it cannot be opened or has no film.
    """

    def __init__(self, path: Path) -> None:
        self.count = 0
        self._path = path
        self._empty = self._position = 0
        self._ends = self._last = 0.0
        self._failure = ""
        try:
            self._file = _File(path)
        except OSError as error:
            raise DataError(f"{shown(path)}: expected a video, got {error.strerror or error}") from error
        try:
            self._container = self._opened()
            self.stream = self._film()
        except BaseException:
            self._file.close()
            raise
        self._format: str = self._container.format.name
        self.rate = float(self.stream.average_rate or self.stream.guessed_rate or 25)

    def _opened(self) -> Any:
        av = need("av")
        if not self._file.peek(1):
            raise DataError(f"{shown(self._path)}: expected a video, got an empty file")
        try:
            # A playlist under a video's name opens no other files.
            return av.open(self._file, options={"protocol_whitelist": "none"})
        except (av.FFmpegError, OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            came = f"a file that cannot be decoded ({reason})"
            raise DataError(f"{shown(self._path)}: expected a video, got {came}") from error

    def _film(self) -> Any:
        """FFmpeg's choice among the video streams, unless that is a picture that stands for the file."""
        streams = self._container.streams
        films = [s for s in streams.video if not _is_still(s)]
        if not films:
            what = "only a picture" if streams.video else "a file without a video stream"
            raise DataError(f"{shown(self._path)}: expected a video, got {what}")
        known = [s for s in films if s.codec_context is not None]
        if not known:
            raise DataError(f"{shown(self._path)}: expected a video, got one of a codec that has no decoder here")
        best = streams.best("video")
        return best if best in known else max(known, key=lambda s: (s.frames, s.width * s.height))

    def close(self) -> None:
        """Close the file."""
        self._container.close()
        self._file.close()

    def seconds(self, ticks: int) -> float:
        """A time or duration of the stream in seconds."""
        base = self.stream.time_base
        return ticks * base.numerator / base.denominator

    def __iter__(self) -> Iterator[tuple[Any, float | None]]:
        """Yield the film's packets, each with what :func:`flexlam_fast.data.damage.torn` says of it."""
        window: deque[tuple[Any, int]] = deque()
        before: Any = None
        for found in itertools.chain(self._demuxed(), [None]):
            if found is not None:
                window.append(found)
            while window and (found is None or len(window) > LOOKAHEAD):
                packet, overhead = window[0]
                verdict = torn([p for p, _ in window], before, overhead, self._format, self.rate)
                self.count += 1
                yield packet, verdict
                before = window.popleft()[0]

    def _demuxed(self) -> Iterator[tuple[Any, int]]:
        """Yield the film's packets, each with the bytes between it and the packet before it, where that means loss."""
        av = need("av")
        end, failures, counts = None, 0, self._format in RESYNCING
        while True:
            try:
                for packet in self._container.demux():
                    mine = packet.stream_index == self.stream.index
                    if not packet.size:  # a frame that is left out, or the end; to a decoder it would mean the end
                        self._empty += mine and packet.dts is not None
                        continue
                    overhead = packet.pos - end if counts and end is not None and packet.pos is not None else 0
                    end = packet.pos + packet.size if packet.pos is not None else None
                    self._position = end or self._position
                    if packet.pts is not None and packet.time_base:
                        self._ends = max(self._ends, float((packet.pts + (packet.duration or 0)) * packet.time_base))
                    if mine:
                        self._last = self.seconds(packet.dts) if packet.dts is not None else self._last
                        yield packet, -1 if failures else overhead
                        failures = 0
                return
            except (av.FFmpegError, OSError) as error:
                failures += 1
                self._failure = getattr(error, "strerror", None) or str(error)
                if failures > MAX_FAILURES:
                    return

    def shortfall(self) -> tuple[str, list[str]]:
        """At the end: what the file was said to hold, and what of it has not come; guesses do not count."""
        parts: list[str] = []
        table = self._format.startswith("mov,")
        fragmented = table and not self.stream.frames
        frames, missing, claimed = 0, 0, 0.0
        if table:
            frames = len(self.stream.index_entries)  # as its edit list leaves them
            missing = frames - self.count - self._empty
        elif self._format == "avi":  # counts the frames that are left out on purpose, too, and so does its clock
            frames = self.stream.frames
            missing = frames - round(self._last * self.rate) - 1
        elif self._format == "gif" and not self._ends_with(GIF_END):
            parts.append("cut off before its end mark")
        if missing > 0:
            parts.append(f"{missing} cut off or missing")
        if self._container.duration and (fragmented or self._format in ("matroska,webm", "flv")):
            claimed = self._container.duration / 1e6
            if claimed - self._ends > max(2 / self.rate, 0.01 * claimed):
                parts.append(f"cut off after {self._ends:.1f} of {claimed:.1f} s")
        size = self._path.stat().st_size
        if fragmented and size - self._position > max(1024, size // 50):
            parts.append(f"the last {size - self._position} of {size} bytes cannot be read")
        if self._failure:
            parts.append(f"reading failed: {self._failure}")
        if not frames and not claimed:
            return "a whole video", parts
        return f"{frames} frames" if frames else f"about {claimed * self.rate:.0f} frames", parts

    def _ends_with(self, mark: bytes) -> bool:
        self._file.seek(-64, io.SEEK_END) if self._path.stat().st_size > 64 else self._file.seek(0)
        return mark in self._file.read()[-8:]


def _is_still(stream: Any) -> bool:
    kinds = type(stream.disposition)
    return bool(stream.disposition & (kinds.attached_pic | kinds.timed_thumbnails | kinds.still_image))
