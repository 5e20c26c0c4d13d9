"""Decodes a video file from end to end: its frames in the order they are shown, and what is not whole about it."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

from flexlam_fast.data.damage import Damage
from flexlam_fast.data.extras import need
from flexlam_fast.data.packets import PacketReader

HELD_BACK = 8  # frames: a damaged frame may be shown after that many which were decoded from it
FLUSHED = 64  # packets: more than any decoder with threads still holds at the end


class UnsoundVideo(Exception):
    """The file is damaged; reading it again with ``careful=True`` tells where, and leaves the damage out."""


class Shown(NamedTuple):
    """A decoded frame, ``seconds`` after the first one; ``apart`` says that frames are missing before it."""

    picture: Any
    seconds: float
    apart: bool


class VideoReader:
    """The film in a video file.

    Used as a context manager. Iterating yields every frame (:class:`Shown`) once. Damage that a first pass meets raises
    :class:`UnsoundVideo`. A second, careful one decodes in a single thread, so that it knows which packet a fault is
    of, and leaves out the damaged frames and those predicted from them: all up to the next key frame.

    Args:
        path: the file.
        careful: whether this is the second pass.

    Raises:
        DataError: if it cannot be opened or has no film.
    """

    def __init__(self, path: Path, careful: bool = False) -> None:
        self.frames = 0
        self._careful = careful
        self._damage = Damage()
        self._pending: dict[int | None, int] = {}  # packets whose frames have not come yet, by time
        self._begun, self._newest, self._lacking = False, -1, 0
        self._now = self._shift = 0.0
        self._first: int | None = None
        self._fault_at: float | None = None
        self._packets = PacketReader(path)
        self._codec = codec = self._packets.stream.codec_context
        codec.thread_type, codec.thread_count = ("NONE", 1) if careful else ("AUTO", 0)
        # So that frames tell their packets. Not with threads: where they let go of such a packet they wait for the
        # interpreter's lock, which is held by whoever closes the decoder and waits for them.
        codec.copy_opaque = careful
        # With threads a concealed error may be marked too late for us to see, so the first pass asks for none.
        codec.options = {} if careful else {"err_detect": "crccheck+bitstream+buffer+explode"}
        self._aspects = self._packets.stream.sample_aspect_ratio, codec.sample_aspect_ratio

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._packets.close()

    @property
    def pixel_aspect(self) -> float:
        """Width of a pixel over its height, of the frame that came last; the container's word counts more."""
        container, codec = self._aspects
        ratio = container if container and container != codec else self._codec.sample_aspect_ratio
        return float(ratio) if ratio else 1.0

    def __iter__(self) -> Iterator[Shown]:
        held: deque[tuple[Any, int]] = deque()
        for found in self._decoded():
            held.append(found)
            if len(held) > (HELD_BACK if self._careful else 0):
                yield from self._settled(*held.popleft())
        while held:
            yield from self._settled(*held.popleft())

    def fault(self) -> str:
        """After the last frame: what the file was said to hold and what came, if that differs; else nothing."""
        expected, parts = self._packets.shortfall()
        damaged, places = self._damage.extent(self._packets.count)
        if places:
            where = "in one place," if places == 1 else f"in {places} places, the first"
            parts.insert(0, f"{max(damaged, self._lacking)} lost to damage {where} at {self._fault_at:.1f} s")
        return f"expected {expected}, got {self.frames}: {'; '.join(parts)}" if parts else ""

    def _settled(self, frame: Any, number: int) -> Iterator[Shown]:
        """Yield a frame that turned out undamaged."""
        if self._damage.spoils(number, frame.pts):
            return
        before, self._now = self._now, self._clock(frame)
        apart = self.frames > 0 and self._damage.within(self._newest, number)
        self._lacking += max(0, round((self._now - before) * self._packets.rate) - 1) if apart else 0
        self.frames, self._newest = self.frames + 1, max(self._newest, number)
        yield Shown(frame, self._now, apart)

    def _clock(self, frame: Any) -> float:
        """Seconds since the first frame; a clock that starts again or stands still goes on by one frame."""
        # By the stream's time base: frames that a decoder gives back at the end do not know theirs.
        step = self._packets.seconds(frame.duration) if frame.duration else 1 / self._packets.rate
        time = self._now - self._shift + step if frame.pts is None else self._packets.seconds(frame.pts)
        if self.frames == 0:
            self._shift = -time
        elif time + self._shift <= self._now:
            self._shift = self._now + step - time
        return time + self._shift

    def _decoded(self) -> Iterator[tuple[Any, int]]:
        """Yield frames with the numbers of their packets, damaged ones too."""
        av = need("av")
        for number, (packet, verdict) in enumerate(self._packets):
            if self._careful:
                packet.opaque = (number,)
            self._first = packet.pts if self._first is None else self._first
            if packet.is_keyframe:
                self._begun = True
                self._damage.key(number, packet.pts)
            if verdict is not None:
                self._note(number + verdict, packet.pts)
            if not packet.is_discard:
                self._pending[packet.pts] = number
            try:
                frames = self._codec.decode(packet)
            except av.FFmpegError:
                self._note(number, packet.pts)
                continue
            yield from self._numbered(frames)
        try:
            frames = self._codec.decode(None)
        except av.FFmpegError:
            frames = []
        yield from self._numbered(frames)
        late = any(number >= self._packets.count - FLUSHED for number in self._pending.values())
        if late and not self._careful and self._codec.name != "vp8":  # whose packets may hold frames that are not shown
            raise UnsoundVideo  # at the end, PyAV swallows errors and the frames behind them

    def _numbered(self, frames: list[Any]) -> Iterator[tuple[Any, int]]:
        for frame in frames:
            number = frame.opaque[0] if frame.opaque else self._packets.count - 1
            self._pending.pop(frame.pts, None)
            if frame.is_corrupt:
                self._note(number, frame.pts)
            self._begun = True
            yield frame, number

    def _note(self, number: float, pts: int | None) -> None:
        """Note damage, unless it is of what stands before the first key frame and cannot be decoded anyhow."""
        if not self._begun:
            return
        if not self._careful:
            raise UnsoundVideo
        if self._fault_at is None:
            first = self._first or 0
            self._fault_at = max(0.0, self._packets.seconds((first if pts is None else pts) - first))
        self._damage.bad(number)
