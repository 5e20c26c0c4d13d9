"""Makes square RGB pictures of decoded frames, as a player would show them: turned, stretched, deinterlaced."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from flexlam_fast.data.decode import Shown, VideoReader
from flexlam_fast.data.extras import need

#: Numbers of ISO/IEC 23091-2, as FFmpeg has them: the transfers PQ and HLG; primaries; and FFmpeg's of the full range.
HIGH_RANGE = (16, 18)
BT709, BT2020 = 1, 9
FULL_RANGE = 2
MAX_STRETCH = 16.0  # width of a pixel over its height, or the other way round; beyond it a file is in error


class View(NamedTuple):
    """A frame and how it is to be shown: turned by a display matrix, with pixels so many times as wide as high."""

    frame: Shown
    matrix: NDArray[np.int64]
    pixel_aspect: float


class Squares:
    """Cuts frames to uint8 ``[size,size,3]`` RGB.

    A frame is scaled so that its shorter side, as shown, is ``size``; then the square in the middle is cut out. Colours
    are converted as the frame's matrix and range say, and as BT.601 of limited range where it says nothing. HDR (PQ and
    HLG) is shown as on a BT.709 screen: diffuse white becomes white, what is brighter is cut off.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        made = need("av.video.reformatter").VideoReformatter
        self._scaler, self._screen = made(), made()

    def cut(self, view: View) -> NDArray[np.uint8]:
        """Cut the square from a frame."""
        size, frame, stretch = self._size, view.frame.picture, view.pixel_aspect
        stretch = stretch if 1 / MAX_STRETCH <= stretch <= MAX_STRETCH else 1.0
        scale = size / min(frame.width * stretch, frame.height)
        width, height = max(size, round(frame.width * stretch * scale)), max(size, round(frame.height * scale))
        high = int(frame.color_trc) in HIGH_RANGE
        kind = "rgb48le" if high else "rgb24"
        small = self._scaler.reformat(frame, width, height, kind, interpolation="AREA")
        seen = turned(small.to_ndarray(), view.matrix)
        top, left = (seen.shape[0] - size) // 2, (seen.shape[1] - size) // 2
        square = np.ascontiguousarray(seen[top : top + size, left : left + size])
        return self._on_screen(square, frame) if high else square

    def _on_screen(self, square: NDArray[np.uint16], frame: Any) -> NDArray[np.uint8]:
        """Convert HDR ``[size,size,3]``; FFmpeg takes seconds for the first, since it makes a table for all colours."""
        high = need("av").VideoFrame.from_ndarray(square, format="rgb48le")
        high.color_trc, high.color_primaries, high.color_range = frame.color_trc, BT2020, FULL_RANGE
        shown = self._screen.reformat(high, format="rgb24", dst_color_trc=BT709, dst_color_primaries=BT709, threads=1)
        return shown.to_ndarray()


def display_matrix(frame: Any) -> NDArray[np.int64]:
    """How a frame is to be turned and mirrored: ``[2,2]``, which takes ``(x, y)`` in it to where that is shown."""
    try:
        data = [frame.side_data[i] for i in range(len(frame.side_data))]
        found = [np.frombuffer(bytes(d), np.int32) for d in data if d.type.name == "DISPLAYMATRIX"]
    except ValueError:  # PyAV does not know a kind of side data; without it, mirroring cannot be told
        angle = np.deg2rad(frame.rotation)
        found = [np.array([np.cos(angle), -np.sin(angle), 0, np.sin(angle), np.cos(angle)]) * 2**16]
    if not found or len(found[-1]) < 5:
        return np.eye(2, dtype=np.int64)
    a, b, _, c, d = found[-1][:5].astype(np.int64)
    return np.array([[a, c], [b, d]])


def turned(picture: NDArray[Any], matrix: NDArray[np.int64]) -> NDArray[Any]:
    """Turn and mirror ``[H,W,3]`` by a display matrix, to the nearest quarter turn."""
    (a, c), (b, d) = matrix
    if abs(b) + abs(c) > abs(a) + abs(d):
        picture = picture.transpose(1, 0, 2)
        a, d = c, b
    return picture[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]


def views(reader: VideoReader) -> Iterator[View]:
    """Yield a video's frames as they are to be shown, deinterlaced where they are marked as interlaced.

    Each interlaced frame becomes one frame. The filter looks at the frames before and after; it starts anew where
    frames are missing, or change in size or format.
    """
    graph, kind, known = None, None, None
    matrix = np.eye(2, dtype=np.int64)
    waiting: deque[View] = deque()
    for frame in reader:
        picture = frame.picture
        now = (picture.width, picture.height, picture.format.name)
        # Not for each frame: one whose side data was looked at stays in memory until the next garbage collection.
        if known != (known := (*now, picture.rotation)):
            matrix = display_matrix(picture)
        view = View(frame, matrix, reader.pixel_aspect)
        if graph is not None and (frame.apart or now != kind):
            yield from _filtered(graph, None, waiting)
            graph = None
        if graph is None and not picture.interlaced_frame:
            yield view
            continue
        if graph is None:
            graph, kind = _deinterlacer(picture), now
        waiting.append(view)
        yield from _filtered(graph, picture, waiting)
    if graph is not None:
        yield from _filtered(graph, None, waiting)


def _deinterlacer(picture: Any) -> Any:
    graph = need("av.filter").Graph()
    source = graph.add_buffer(width=picture.width, height=picture.height, format=picture.format, time_base="1/25")
    graph.link_nodes(
        source, graph.add("yadif", "mode=send_frame:deint=interlaced"), graph.add("buffersink")
    ).configure()
    return graph


def _filtered(graph: Any, picture: Any, waiting: deque[View]) -> Iterator[View]:
    """Pass a frame through, or the end; what comes out belongs to the frames that went in, one for one."""
    av = need("av")
    graph.push(picture)
    while True:
        try:
            done = graph.pull()
        except (av.BlockingIOError, av.EOFError):
            return
        view = waiting.popleft()
        yield view._replace(frame=view.frame._replace(picture=done))
