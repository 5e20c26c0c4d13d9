"""Packing videos: every frame arrives, thinned and cut as asked; what is no video is named and leaves nothing."""

from __future__ import annotations

import os
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

av = pytest.importorskip("av")
pytest.importorskip("pyarrow")

from flexlam_fast.data.video import pack  # noqa: E402
from flexlam_fast.errors import DataError, InputError  # noqa: E402

CODECS = {".mp4": "mpeg4", ".mkv": "ffv1", ".avi": "mpeg4", ".mov": "mpeg4", ".webm": "libvpx"}


def encode(path: Path, count: int, width: int = 96, height: int = 64, rate: int = 10) -> None:
    """Film a white square that moves right by 4 pixels a frame, over a grey that rises by 4."""
    path.parent.mkdir(parents=True, exist_ok=True)
    codec = CODECS[path.suffix]
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.time_base = width, height, Fraction(1, rate)
        stream.pix_fmt = "bgr0" if codec == "ffv1" else "yuv420p"
        stream.bit_rate = 4_000_000
        container.start_encoding()  # so that there is a file even without frames
        for index in range(count):
            image = np.full((height, width, 3), 20 + 4 * index, np.uint8)
            image[8:24, 4 * index : 4 * index + 16] = 255
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts = index
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


@pytest.mark.parametrize("suffix", CODECS)
def test_every_container(tmp_path: Path, suffix: str) -> None:
    encode(tmp_path / "in" / f"clip{suffix}", 12)
    store = pack(tmp_path / "in", tmp_path / "out", size=32, progress=False)
    frames = store.take(np.arange(store.num_frames))
    assert frames.shape == (12, 32, 32, 3)
    assert not store.labelled
    assert (store.rewards == 0).all()
    episode = store.episodes[0]
    assert (episode.task, episode.split, episode.source) == ("video", "train", f"clip{suffix}")
    # 96x64 becomes 48x32, of which columns 8..40 stay; the lower half is the rising grey.
    greys = frames[:, 20:, :, :].mean(axis=(1, 2, 3))
    np.testing.assert_allclose(greys, 20 + 4 * np.arange(12), atol=4)
    white = frames[8, 4:12].astype(int).sum(-1) > 600
    assert abs(np.flatnonzero(white.all(0)).mean() - ((4 * 8 + 7.5) / 2 - 8)) < 2


def test_lossless_frames_at_their_own_size_are_exact(tmp_path: Path) -> None:
    encode(tmp_path / "in" / "clip.mkv", 5, width=64, height=64)
    store = pack(tmp_path / "in", tmp_path / "out", size=64, progress=False)
    for index, frame in enumerate(store.take(np.arange(5))):
        expected = np.full((64, 64, 3), 20 + 4 * index, np.uint8)
        expected[8:24, 4 * index : 4 * index + 16] = 255
        np.testing.assert_array_equal(frame, expected)


@pytest.mark.parametrize(
    ("fps", "kept"), [(10, range(30)), (5, range(0, 30, 2)), (1.6, (0, 7, 13, 19, 25)), (60, range(30))]
)
def test_thinning_by_the_clock(tmp_path: Path, fps: float, kept: range) -> None:
    """At 10 frames a second, 1.6 keeps the first frame at or after 0, 0.625, 1.25, 1.875 and 2.5 seconds."""
    encode(tmp_path / "in" / "clip.mkv", 30, width=64, height=64)
    store = pack(tmp_path / "in", tmp_path / "out", fps=fps, size=16, progress=False)
    greys = store.take(np.arange(store.num_frames))[:, 15, 0, 0]
    np.testing.assert_array_equal(greys, 20 + 4 * np.array(kept))


def test_splits_and_tasks(tmp_path: Path) -> None:
    names = [f"{'pour' if i % 2 else 'fold'}/clip{i}.mkv" for i in range(8)]
    for name in names:
        encode(tmp_path / "in" / name, 3, width=32, height=32)
    (tmp_path / "in" / "README.txt").write_text("not a video")
    store = pack(tmp_path / "in", tmp_path / "out", size=32, test_fraction=0.4, progress=False)
    assert {e.source: e.task for e in store.episodes} == {n: n.split("/")[0] for n in names}
    tests = {e.source for e in store.episodes if e.split == "test"}
    assert 0 < len(tests) < 8
    again = pack(tmp_path / "in", tmp_path / "again", size=32, test_fraction=0.4, progress=False)
    assert again.fingerprint == store.fingerprint
    # The split is a matter of the name: without some train videos the test videos are the same.
    for name in sorted(set(names) - tests)[:2]:
        (tmp_path / "in" / name).unlink()
    fewer = pack(tmp_path / "in", tmp_path / "fewer", size=32, test_fraction=0.4, progress=False)
    assert {e.source for e in fewer.episodes if e.split == "test"} == tests


def test_two_videos_have_both_splits(tmp_path: Path) -> None:
    for name in ("a.mkv", "b.mkv"):
        encode(tmp_path / "in" / name, 3, width=32, height=32)
    for fraction in (0.001, 0.5):
        store = pack(tmp_path / "in", tmp_path / str(fraction), size=32, test_fraction=fraction, progress=False)
        assert {e.split for e in store.episodes} == {"train", "test"}


def spoil(kind: str, path: Path) -> None:
    if kind == "empty":
        path.write_bytes(b"")
    elif kind == "garbage":
        path.write_bytes(np.random.default_rng(0).bytes(5000))
    elif kind == "text":
        path.write_text("I am a film.\n" * 50)
    elif kind == "one frame":
        encode(path, 1)
    elif kind == "no frame":
        encode(path, 0)
    elif kind == "truncated":
        encode(path, 12)
        path.write_bytes(path.read_bytes()[:300])
    elif kind == "sound only":
        with av.open(str(path), "w") as container:
            stream = container.add_stream("aac", rate=44100)
            sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            sound.sample_rate = 44100
            container.mux(stream.encode(sound))
            container.mux(stream.encode(None))


@pytest.mark.parametrize("kind", ["empty", "garbage", "text", "one frame", "no frame", "truncated", "sound only"])
def test_a_bad_video_is_named_and_leaves_nothing(tmp_path: Path, kind: str) -> None:
    encode(tmp_path / "in" / "a.mp4", 4)
    spoil(kind, tmp_path / "in" / "b.mp4")
    with pytest.raises(DataError, match=r"b\.mp4: expected a video") as caught:
        pack(tmp_path / "in", tmp_path / "out", progress=False)
    assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == ["in"]


def test_too_thin_to_have_a_transition(tmp_path: Path) -> None:
    encode(tmp_path / "in" / "a.mkv", 4)
    with pytest.raises(DataError, match=r"a\.mkv: expected a video of at least two frames, got 1 at 0\.5 per"):
        pack(tmp_path / "in", tmp_path / "out", fps=0.5, progress=False)
    assert os.listdir(tmp_path) == ["in"]


def test_pictures_like_a_thread_are_refused(tmp_path: Path) -> None:
    encode(tmp_path / "in" / "a.mkv", 2, width=2000, height=30)
    with pytest.raises(DataError, match=r"a\.mkv: expected pictures of sides at most 64 to 1, got 2000x30"):
        pack(tmp_path / "in", tmp_path / "out", size=4096, progress=False)
    assert os.listdir(tmp_path) == ["in"]


def test_folders_without_videos(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "notes.txt").write_text("none yet")
    with pytest.raises(DataError, match="in: expected at least one video"):
        pack(tmp_path / "in", tmp_path / "out", progress=False)
    with pytest.raises(DataError, match="nowhere: expected a folder of videos, got nothing"):
        pack(tmp_path / "nowhere", tmp_path / "out", progress=False)
    assert os.listdir(tmp_path) == ["in"]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        *(
            ({"size": bad}, "size: expected an integer in 1")
            for bad in (0, -1, 10**9, 64.0, float("nan"), True, "64", None)
        ),
        *(({"fps": bad}, "fps: expected a number above 0") for bad in (0, -1.6, float("nan"), float("inf"), True, "5")),
        *(({"fps": bad}, "fps: expected a number above 0") for bad in (1e308, 10**400, 1 + 0j)),
        *(({"test_fraction": bad}, "test_fraction: expected a number in 0") for bad in (-0.1, 0.6, float("nan"), None)),
        *(({"on_error": bad}, "on_error: expected one of") for bad in ("ignore", None, ["stop"])),
        *(({"videos": bad}, "videos: expected a path") for bad in ("", None, 5)),
        *(({"output": bad}, "output: expected a path") for bad in ("", None, "a\0b")),
    ],
)
def test_arguments_are_checked_before_anything_is_read(tmp_path: Path, change: dict[str, Any], sentence: str) -> None:
    given = {"videos": tmp_path / "in", "output": tmp_path / "out", "progress": False} | change
    with pytest.raises(InputError, match=sentence) as caught:
        pack(**given)
    assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == []


def test_numbers_of_numpy_and_paths_as_text(tmp_path: Path) -> None:
    encode(tmp_path / "in" / "a.mkv", 4)
    options: dict[str, Any] = {"size": np.int64(16), "fps": np.float32(5), "test_fraction": np.float64(0.1)}
    store = pack(str(tmp_path / "in"), str(tmp_path / "out"), progress=False, **options)
    assert (store.num_frames, store.frame_shape) == (2, (16, 16, 3))
