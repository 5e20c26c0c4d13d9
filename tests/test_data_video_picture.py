"""What a file says of its pictures is obeyed: turned, mirrored, stretched, deinterlaced, in its colours; no cover."""

from __future__ import annotations

import struct
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

av = pytest.importorskip("av")
pytest.importorskip("pyarrow")

from video_cases import Picture, film, lossless, moving, with_matrix  # noqa: E402

from flexlam_fast.data.store import EpisodeStore  # noqa: E402
from flexlam_fast.data.video import pack  # noqa: E402
from flexlam_fast.errors import DataError  # noqa: E402


def packed(folder: Path, size: int) -> tuple[Picture, EpisodeStore]:
    store = pack(folder / "in", folder / f"out{size}", size=size, progress=False)
    return store.take(np.arange(store.num_frames)), store


def corners(height: int = 32, width: int = 32) -> Picture:
    """Four quarters of different colours: no turn or mirroring of it is another one."""
    picture = np.zeros((height, width, 3), np.uint8)
    picture[: height // 2, : width // 2] = (250, 10, 20)
    picture[: height // 2, width // 2 :] = (30, 240, 50)
    picture[height // 2 :, : width // 2] = (60, 70, 230)
    picture[height // 2 :, width // 2 :] = (220, 210, 90)
    return picture


#: a, b, c, d of the matrix, quarter turns to the left, then whether the picture is mirrored.
ORIENTATIONS = [
    ((1, 0, 0, 1), 0, False),
    ((0, -1, 1, 0), 1, False),
    ((-1, 0, 0, -1), 2, False),
    ((0, 1, -1, 0), 3, False),
    ((-1, 0, 0, 1), 0, True),
    ((0, -1, -1, 0), 1, True),
    ((1, 0, 0, -1), 2, True),
    ((0, 1, 1, 0), 3, True),
]


@pytest.mark.parametrize(("matrix", "turns", "mirrored"), ORIENTATIONS)
def test_all_eight_orientations(
    tmp_path: Path, matrix: tuple[float, float, float, float], turns: int, mirrored: bool
) -> None:
    with_matrix(lossless(tmp_path / "in" / "a.mov", [corners()] * 2), matrix)
    frames, _ = packed(tmp_path, 32)
    expected = np.rot90(corners(), turns)
    np.testing.assert_array_equal(frames[0], expected[:, ::-1] if mirrored else expected)


def test_a_slightly_tilted_picture_is_taken_to_the_nearest_quarter_turn(tmp_path: Path) -> None:
    with_matrix(lossless(tmp_path / "in" / "a.mov", [corners()] * 2), (0.2, -0.98, 0.98, 0.2))
    np.testing.assert_array_equal(packed(tmp_path, 32)[0][0], np.rot90(corners()))


@pytest.mark.parametrize("turns", [1, 2, 3])
def test_the_square_is_cut_from_the_picture_as_shown(tmp_path: Path, turns: int) -> None:
    """As if it had been filmed turned, with an odd number of columns left over."""
    picture = np.random.default_rng(0).integers(0, 256, (32, 47, 3), dtype=np.uint8)
    matrix = ORIENTATIONS[turns][0]
    with_matrix(lossless(tmp_path / "in" / "a.mov", [picture] * 2), matrix)
    lossless(tmp_path / "in" / "b.mov", [np.rot90(picture, turns).copy()] * 2)
    frames, _ = packed(tmp_path, 32)
    np.testing.assert_array_equal(frames[0], frames[2])


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".avi", ".ts"])
@pytest.mark.parametrize("aspect", [Fraction(2), Fraction(1, 2)])
def test_pixels_that_are_not_square(tmp_path: Path, suffix: str, aspect: Fraction) -> None:
    """64x64 pixels, twice as wide as high, are a picture of 128x64: the middle half of the columns is seen."""

    def stretch(stream: object) -> None:
        stream.codec_context.sample_aspect_ratio = aspect  # type: ignore[attr-defined]

    picture = np.full((64, 64, 3), 40, np.uint8)
    picture[16:48, 16:48] = 220
    codec = "mpeg4" if suffix == ".avi" else "libx264"
    film(tmp_path / "in" / f"a{suffix}", [picture] * 3, codec=codec, prepare=stretch)
    bright = (packed(tmp_path, 32)[0][1].mean(-1) > 130).astype(int)
    rows, columns = bright[:, 16].sum(), bright[16].sum()
    wide, high = (columns, rows) if aspect > 1 else (rows, columns)
    assert abs(wide - 32) <= 2
    assert abs(high - 16) <= 2


@pytest.mark.parametrize("matrix", ["ITU709", "ITU601", "BT2020"])
@pytest.mark.parametrize("full", [False, True])
def test_colours_as_flagged(tmp_path: Path, matrix: str, full: bool) -> None:
    from av.video.reformatter import ColorRange, Colorspace

    space, span = Colorspace[matrix], ColorRange.JPEG if full else ColorRange.MPEG

    def flag(stream: object) -> None:
        context = stream.codec_context  # type: ignore[attr-defined]
        context.colorspace, context.color_range = int(space), int(span)

    picture = np.full((32, 32, 3), (200, 40, 90), np.uint8)
    film(
        tmp_path / "in" / "a.mp4",
        [picture] * 2,
        prepare=flag,
        convert=lambda f: f.reformat(format="yuv420p", dst_colorspace=space, dst_color_range=span),
    )
    np.testing.assert_allclose(packed(tmp_path, 32)[0][0, 16, 16].astype(int), (200, 40, 90), atol=4)


def test_high_dynamic_range_as_on_a_usual_screen(tmp_path: Path) -> None:
    """Diffuse white is 75 % of the signal of HLG (BT.2408), which phones film in; it and all above it become white."""

    def flag(stream: object) -> None:
        context = stream.codec_context  # type: ignore[attr-defined]
        context.color_trc, context.color_primaries, context.colorspace, context.color_range = 18, 9, 9, 1

    def convert(frame: object) -> object:
        return frame.reformat(format="yuv420p10le", dst_colorspace=9, dst_color_range=1)  # type: ignore[attr-defined]

    picture = np.zeros((32, 64, 3), np.uint8)
    picture[:16, :32] = round(0.15 * 255)
    picture[:16, 32:] = round(0.375 * 255)
    picture[16:, :32] = round(0.77 * 255)
    picture[16:, 32:] = 255
    film(tmp_path / "in" / "a.mp4", [picture] * 2, fmt="yuv420p10le", prepare=flag, convert=convert)
    greys = packed(tmp_path, 32)[0][0].astype(int)
    assert np.abs(greys - greys.mean(-1, keepdims=True)).max() < 6
    dark, half, full, light = (greys[y, x].mean() for y, x in ((8, 8), (8, 24), (24, 8), (24, 24)))
    assert dark < half < full
    assert min(full, light) > 250
    assert half < 130


def test_interlaced_pictures_show_no_comb(tmp_path: Path) -> None:
    """A bar that moves by 12 pixels between the two fields of a frame; frames do not change in number."""
    pictures = []
    for index in range(8):
        picture = np.full((64, 64, 3), 30, np.uint8)
        for field in (0, 1):
            left = 4 + 5 * index + 12 * field
            picture[field::2, left : left + 6] = 230
        pictures.append(picture)
    film(tmp_path / "in" / "a.mp4", pictures, options={"x264-params": "tff=1", "crf": "8"})
    frames, _ = packed(tmp_path, 64)
    assert len(frames) == 8
    greys = frames[2:6, 8:56].mean(-1)
    assert (
        np.abs(np.diff(greys, axis=1)).mean()
        < 0.3 * np.abs(np.diff(np.stack(pictures)[2:6, 8:56].mean(-1), axis=1)).mean()
    )
    shown = [np.flatnonzero(grey.mean(0) > 100).mean() for grey in greys]
    np.testing.assert_allclose(np.diff(shown), 5, atol=1.5)


def test_pictures_that_change_in_size(tmp_path: Path) -> None:
    parts = [film(tmp_path / f"{w}.ts", [corners(h, w)] * 4, rate=25) for h, w in ((64, 64), (96, 128))]
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.ts").write_bytes(b"".join(part.read_bytes() for part in parts))
    frames, store = packed(tmp_path, 32)
    assert [e.frames for e in store.episodes] == [8]
    assert np.abs(frames.astype(int) - corners()).mean(axis=(1, 2, 3)).max() < 8


def add_cover(path: Path, picture: bytes) -> None:
    """Give an mp4 file a cover, of the kind that FFmpeg finds as stream 0."""

    def box(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I4s", 8 + len(content), kind) + content

    cover = box(b"covr", box(b"data", struct.pack(">II", 13, 0) + picture))
    handler = box(b"hdlr", bytes(8) + b"mdirappl" + bytes(9))
    user = box(b"udta", box(b"meta", bytes(4) + handler + box(b"ilst", cover)))
    content, out, at = path.read_bytes(), b"", 0
    while at < len(content):
        length, kind = struct.unpack(">I4s", content[at : at + 8])
        part = content[at : at + length]
        if kind == b"moov":  # behind its header, in front of the tracks
            head = 8 + struct.unpack(">I", part[8:12])[0]
            part = box(b"moov", part[8:head] + user + part[head:])
        out, at = out + part, at + length
    path.write_bytes(out)


def test_a_cover_is_no_film(tmp_path: Path) -> None:
    still = film(tmp_path / "still.mkv", [corners(64, 64)], codec="mjpeg", fmt="yuvj420p")
    with av.open(str(still)) as file:
        picture = next(bytes(packet) for packet in file.demux(video=0) if packet.size)
    path = film(tmp_path / "in" / "a.mp4", moving(6, 64, 64))
    add_cover(path, picture)
    with av.open(str(path)) as file:
        assert [s.codec_context.name for s in file.streams.video] == ["mjpeg", "h264"]
    frames, _ = packed(tmp_path, 64)
    np.testing.assert_allclose(frames[:, 60, 0, 0], 20 + 4 * np.arange(6), atol=4)


def test_sound_with_a_cover_is_no_video(tmp_path: Path) -> None:
    path = tmp_path / "in" / "a.mp4"
    path.parent.mkdir()
    with av.open(str(path), "w") as file:
        stream = file.add_stream("aac", rate=44100)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        sound.sample_rate = 44100
        file.mux(stream.encode(sound))
        file.mux(stream.encode(None))
    with av.open(str(film(tmp_path / "still.mkv", [corners(64, 64)], codec="mjpeg", fmt="yuvj420p"))) as file:
        add_cover(path, next(bytes(packet) for packet in file.demux(video=0) if packet.size))
    with pytest.raises(DataError, match=r"a\.mp4: expected a video, got only a picture"):
        pack(tmp_path / "in", tmp_path / "out", progress=False)
