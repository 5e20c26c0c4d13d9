"""Films made for the tests of packing, and what damages them."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Picture = NDArray[np.uint8]


def moving(count: int, width: int = 96, height: int = 64) -> list[Picture]:
    """A white square that moves right by 4 pixels a frame, over a grey that rises by 4."""
    pictures = []
    for index in range(count):
        picture = np.full((height, width, 3), (20 + 4 * index) % 250, np.uint8)
        left = 4 * index % max(width - 16, 1)
        picture[8:24, left : left + 16] = 255
        pictures.append(picture)
    return pictures


def film(
    path: Path,
    pictures: Iterable[Picture],
    *,
    codec: str = "libx264",
    fmt: str = "yuv420p",
    rate: int = 10,
    gop: int = 5,
    times: Iterable[int] | None = None,
    options: dict[str, str] | None = None,
    container: dict[str, str] | None = None,
    prepare: Callable[[Any], None] = lambda stream: None,
    convert: Callable[[Any], Any] = lambda frame: frame,
) -> Path:
    """Encode pictures, frame ``i`` at ``times[i] / rate`` seconds."""
    import av

    pictures = list(pictures)
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", options=container or {}) as file:
        stream = file.add_stream(codec, rate=rate, options=options or {})
        stream.height, stream.width = pictures[0].shape[:2]
        stream.pix_fmt, stream.gop_size, stream.max_b_frames = fmt, gop, 0
        stream.time_base, stream.bit_rate = Fraction(1, rate), 8_000_000
        prepare(stream)
        for time, picture in zip(range(len(pictures)) if times is None else times, pictures, strict=True):
            frame = convert(av.VideoFrame.from_ndarray(picture, format="rgb24"))
            frame.pts = time
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    return path


def lossless(path: Path, pictures: Iterable[Picture], **more: Any) -> Path:
    """Encode pictures so that every pixel comes back: PNG in mov, FFV1 in Matroska."""
    codec, fmt = ("png", "rgb24") if path.suffix == ".mov" else ("ffv1", "bgr0")
    return film(path, pictures, codec=codec, fmt=fmt, **more)


def zeroed(path: Path, share: float, count: int) -> Path:
    """Overwrite bytes in the middle of a file's pictures by zeros."""
    content = bytearray(path.read_bytes())
    start = max(content.find(b"mdat") + 8, 600)
    at = start + int((len(content) - start) * share)
    content[at : at + count] = bytes(count)
    path.write_bytes(content)
    return path


def packets(path: Path) -> list[tuple[int, int]]:
    """Position and length of every packet of a film."""
    import av

    with av.open(str(path)) as file:
        return [(packet.pos, packet.size) for packet in file.demux(video=0) if packet.size]


def wiped(path: Path, *ranges: tuple[int, int]) -> Path:
    """Overwrite the bytes of a file from ``a`` to before ``b`` by zeros."""
    content = bytearray(path.read_bytes())
    for a, b in ranges:
        content[a:b] = bytes(b - a)
    path.write_bytes(content)
    return path


def cut(path: Path, share: float) -> Path:
    """Cut a file off."""
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    return path


def with_matrix(path: Path, matrix: tuple[float, float, float, float]) -> Path:
    """Write ``a, b, c, d`` of the display matrix into a mov or mp4 file: ``(x, y)`` is shown at ``(ax+cy, bx+dy)``."""
    content = bytearray(path.read_bytes())
    at = content.find(b"tkhd") + 4 + 40
    a, b, c, d = (round(value * 2**16) for value in matrix)
    content[at : at + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(content)
    return path
