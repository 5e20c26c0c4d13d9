"""Makes square RGB pictures of decoded frames, as a player would show them: turned, stretched, deinterlaced."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flexlam_fast.data.decode import Shown, VideoReader
from flexlam_fast.data.extras import need

#: Numbers of ISO/IEC 23091-2, as FFmpeg has them: the transfers PQ and HLG; primaries; and FFmpeg's of the full range.
HIGH_RANGE = (16, 18)
BT709, BT2020 = 1, 9
FULL_RANGE = 2
MAX_STRETCH = 16.0  # width of a pixel over its height, or the other way round; beyond it a file is in error


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

    def cut(self, frame: Any, pixel_aspect: float) -> NDArray[np.uint8]:
        """Cut the square from a frame whose pixels are ``pixel_aspect`` times as wide as high."""
        size = self._size
        stretch = pixel_aspect if 1 / MAX_STRETCH <= pixel_aspect <= MAX_STRETCH else 1.0
        scale = size / min(frame.width * stretch, frame.height)
        width, height = max(size, round(frame.width * stretch * scale)), max(size, round(frame.height * scale))
        high = int(frame.color_trc) in HIGH_RANGE
        small = self._scaler.reformat(frame, width, height, "rgb48le" if high else "rgb24", interpolation="AREA")
        seen = turned(small.to_ndarray(), display_matrix(frame))
        top, left = (seen.shape[0] - size) // 2, (seen.shape[1] - size) // 2
        square = np.ascontiguousarray(seen[top : top + size, left : left + size])
        return self._on_screen(square, frame) if high else square

    def _on_screen(self, square: NDArray[np.uint16], frame: Any) -> NDArray[np.uint8]:
        """Convert HDR ``[size,size,3]``; FFmpeg takes seconds for the first, since it makes a table for all colours."""
        high = need("av").VideoFrame.from_ndarray(square, format="rgb48le")
        high.color_trc, high.color_primaries, high.color_range = frame.color_trc, BT2020, FULL_RANGE
        shown = self._screen.reformat(high, format="rgb24", dst_color_trc=BT709, dst_color_primaries=BT709)
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


def progressive(reader: VideoReader) -> Iterator[tuple[Shown, float]]:
    """Yield a video's frames and the shape of their pixels, deinterlaced where they are marked as interlaced.

    Each interlaced frame becomes one frame. The filter looks at the frames before and after; it starts anew where
    frames are missing, or change in size or format.
    """
    graph, kind = None, None
    waiting: deque[tuple[Shown, float]] = deque()
    for frame in reader:
        picture, aspect = frame.picture, reader.pixel_aspect
        now = (picture.width, picture.height, picture.format.name)
        if graph is not None and (frame.apart or now != kind):
            yield from _filtered(graph, None, waiting)
            graph = None
        if graph is None and not picture.interlaced_frame:
            yield frame, aspect
            continue
        if graph is None:
            graph, kind = _deinterlacer(picture), now
        waiting.append((frame, aspect))
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


def _filtered(graph: Any, picture: Any, waiting: deque[tuple[Shown, float]]) -> Iterator[tuple[Shown, float]]:
    """Pass a frame through, or the end; what comes out belongs to the frames that went in, one for one."""
    av = need("av")
    graph.push(picture)
    while True:
        try:
            done = graph.pull()
        except (av.BlockingIOError, av.EOFError):
            return
        frame, aspect = waiting.popleft()
        yield frame._replace(picture=done), aspect
