"""What a file says to hold and what comes out are compared; no transition leads across missing frames."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

av = pytest.importorskip("av")
pytest.importorskip("pyarrow")

from video_cases import cut, film, lossless, moving, packets, wiped, zeroed  # noqa: E402

from flexlam_fast.data.store import EpisodeStore  # noqa: E402
from flexlam_fast.data.video import pack  # noqa: E402
from flexlam_fast.errors import DataError, InputError  # noqa: E402

FAST_START = {"movflags": "faststart"}


def packed(folder: Path, **options: object) -> tuple[EpisodeStore, list[str]]:
    said: list[str] = []
    store = pack(folder / "in", folder / "out", size=64, progress=False, report=said.append, **options)  # type: ignore[arg-type]
    return store, said


def numbers(store: EpisodeStore) -> list[list[int]]:
    """Which pictures of :func:`moving` each episode shows, by their grey."""
    greys = store.take(np.arange(store.num_frames))[:, 60, 0, 0].astype(int)
    return [[round((g - 20) / 4) for g in greys[e.first : e.first + e.frames]] for e in store.episodes]


def test_a_damaged_packet_splits_the_episode(tmp_path: Path) -> None:
    """40 frames in groups of 5: what is damaged in a group spoils the rest of it, and no more."""
    zeroed(film(tmp_path / "in" / "a.mp4", moving(40, 64, 64), container=FAST_START), 0.5, 60)
    store, said = packed(tmp_path)
    (before, after) = numbers(store)
    assert before == list(range(len(before)))
    assert after == list(range(40 - len(after), 40))
    assert (40 - len(after)) % 5 == 0
    lost = 40 - len(before) - len(after)
    assert 1 <= lost <= 5
    (line,) = said
    assert line.startswith(f"warning: {tmp_path / 'in' / 'a.mp4'}: expected 40 frames, got {40 - lost}: {lost} lost to")
    assert re.search(r"damage in one place, at [12]\.\d s; packed as 2 episodes$", line)
    assert {e.source for e in store.episodes} == {"a.mp4"}
    steps = np.concatenate([store.transitions(split) for split in ("train", "test")])
    assert len(steps) == store.num_frames - 2


def test_a_damaged_intra_coded_picture_is_left_out_alone(tmp_path: Path) -> None:
    path = lossless(tmp_path / "in" / "a.mov", moving(20, 64, 64))
    start, length = packets(path)[7]
    wiped(path, (start, start + length))
    store, said = packed(tmp_path)
    assert numbers(store) == [list(range(7)), list(range(8, 20))]
    assert "expected 20 frames, got 19: 1 lost to damage in one place, at 0.7 s" in said[0]


def test_concealed_errors_are_no_frames(tmp_path: Path) -> None:
    """MPEG-4 fills what it cannot decode from the frame before, and calls it a frame."""
    path = film(tmp_path / "in" / "a.mp4", moving(40, 64, 64), codec="mpeg4", container=FAST_START, gop=10)
    zeroed(path, 0.5, 40)
    store, said = packed(tmp_path)
    expected = np.concatenate(numbers(store))
    assert len(store.episodes) == 2
    assert len(expected) == len(set(expected)) < 40
    assert f"expected 40 frames, got {len(expected)}: {40 - len(expected)} lost to damage" in said[0]


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".avi", ".flv", ".webm"])
def test_a_file_that_is_cut_off_says_how_much_is_there(tmp_path: Path, suffix: str) -> None:
    codecs = {".avi": "mpeg4", ".flv": "flv", ".webm": "libvpx"}
    container = FAST_START if suffix == ".mp4" else {}
    path = film(
        tmp_path / "in" / f"a{suffix}", moving(50, 64, 64), codec=codecs.get(suffix, "libx264"), container=container
    )
    cut(path, 0.6)
    store, (line,) = packed(tmp_path)
    (kept,) = numbers(store)
    assert kept == list(range(len(kept)))
    assert 2 <= len(kept) < 45
    about = "" if suffix in (".mp4", ".avi") else "about "
    assert f"expected {about}50 frames, got {len(kept)}: " in line
    assert "cut off" in line


def test_missing_bytes_of_a_matroska_file_split_the_episode(tmp_path: Path) -> None:
    """The frames that are gone leave no trace but the bytes that nobody can read, and a step of the clock."""
    path = lossless(tmp_path / "in" / "a.mkv", moving(40, 64, 64), gop=1)
    where = packets(path)
    wiped(path, (where[18][0], where[20][0] + where[20][1] // 2))
    store, (line,) = packed(tmp_path)
    before, after = numbers(store)
    assert before == list(range(18))
    assert after == list(range(after[0], 40))
    assert f"expected about 40 frames, got {store.num_frames}: {after[0] - 18} lost to damage in one place" in line


def test_a_transport_stream_without_some_packets(tmp_path: Path) -> None:
    path = film(tmp_path / "in" / "a.ts", moving(50, 64, 64), rate=25, gop=10)
    content = path.read_bytes()
    at = len(content) // 188 * 2 // 5 * 188
    path.write_bytes(content[:at] + content[at + 5 * 188 :])
    store, (line,) = packed(tmp_path)
    before, after = numbers(store)
    assert before == list(range(len(before)))
    assert after == list(range(after[0], 50))
    assert after[0] % 10 == 0
    assert f"got {store.num_frames}: {50 - store.num_frames} lost to damage in one place" in line


def gif_end(path: Path) -> Path:
    return cut(path, 0.7)


def joined(path: Path) -> None:
    path.write_bytes(path.read_bytes() * 2)


def headless(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[len(content) // 188 // 3 * 188 :])


def paused(index: int) -> int:
    return index if index < 20 else index + 500


#: Files that are whole: name, how they are encoded, what happens to them, and how many frames they have.
WHOLE: dict[str, tuple[dict[str, object], Callable[[Path], None] | None, int]] = {
    "joined.ts": ({"rate": 25}, joined, 80),
    "joined.mpg": ({"rate": 25, "codec": "mpeg2video"}, joined, 80),
    "headless.ts": ({"rate": 25}, headless, -1),
    "paused.mp4": ({"times": [paused(i) for i in range(40)]}, None, 40),
    "paused.mkv": ({"times": [paused(i) for i in range(40)]}, None, 40),
    "paused.ts": ({"times": [paused(i) for i in range(40)]}, None, 40),
    "paused.flv": ({"times": [paused(i) for i in range(40)], "codec": "flv"}, None, 40),
    "paused.avi": ({"times": [paused(i) for i in range(40)], "codec": "mpeg4"}, None, 40),
    "whole.gif": ({"codec": "gif", "fmt": "rgb8"}, None, 40),
    "whole.wmv": ({"codec": "wmv2"}, None, 40),
    "reordered.mp4": ({"prepare": lambda s: setattr(s.codec_context, "max_b_frames", 3)}, None, 40),
    "reordered.avi": ({"codec": "mpeg4", "prepare": lambda s: setattr(s.codec_context, "max_b_frames", 2)}, None, 40),
    "open.mp4": ({"options": {"x264-params": "open-gop=1:bframes=3"}}, None, 40),
    "refresh.mp4": ({"options": {"x264-params": "intra-refresh=1"}, "gop": 20}, None, 40),
    "hidden.webm": ({"codec": "libvpx", "options": {"auto-alt-ref": "1", "lag-in-frames": "16"}, "gop": 30}, None, 40),
    "fragments.mp4": ({"container": {"movflags": "frag_keyframe+empty_moov"}}, None, 40),
}


@pytest.mark.parametrize("name", WHOLE)
def test_no_warning_without_cause(tmp_path: Path, name: str) -> None:
    options, change, count = WHOLE[name]
    path = film(tmp_path / "in" / name, moving(40, 64, 64), **options)  # type: ignore[arg-type]
    if change is not None:
        change(path)
    store, said = packed(tmp_path, strict=True)
    assert said == []
    assert len(store.episodes) == 1
    assert store.num_frames == count or count < 0


def test_an_edit_list_leaves_frames_out_on_purpose(tmp_path: Path) -> None:
    path = film(tmp_path / "in" / "a.mp4", moving(40, 64, 64))
    content = bytearray(path.read_bytes())
    at = content.find(b"elst") + 12  # its first entry: duration in ms, then the time it begins at
    content[at : at + 4] = (2000).to_bytes(4, "big")
    content[at + 4 : at + 8] = (10240).to_bytes(4, "big")  # one second
    path.write_bytes(content)
    store, said = packed(tmp_path)
    assert said == []
    assert numbers(store) == [list(range(10, 30))]


@pytest.mark.parametrize(
    ("fps", "kept"), [(None, range(50)), (5, range(0, 50, 2)), (1.6, (0, 7, 13, 19, 25, 32, 38, 44))]
)
def test_a_clock_that_starts_again_goes_on(tmp_path: Path, fps: float | None, kept: range) -> None:
    """Two films of 25 frames at 10 a second, joined, are thinned as one of 50."""
    for start in (0, 25):
        film(tmp_path / f"{start}.ts", moving(50, 64, 64)[start : start + 25], rate=10)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.ts").write_bytes(b"".join((tmp_path / f"{s}.ts").read_bytes() for s in (0, 25)))
    store, said = packed(tmp_path, fps=fps)
    assert said == []
    assert numbers(store) == [list(kept)]


def test_a_pause_is_time_and_loses_nothing(tmp_path: Path) -> None:
    film(tmp_path / "in" / "a.mkv", moving(40, 64, 64), times=[paused(i) for i in range(40)])
    store, said = packed(tmp_path, fps=5)
    assert said == []
    assert numbers(store) == [[*range(0, 40, 2)]]


def test_strict_refuses_and_keeps_what_is_done(tmp_path: Path) -> None:
    film(tmp_path / "in" / "a.mp4", moving(10, 64, 64))
    cut(film(tmp_path / "in" / "b.mp4", moving(40, 64, 64), container=FAST_START), 0.7)
    said: list[str] = []
    with pytest.raises(DataError, match=r"b\.mp4: expected 40 frames, got \d+: .* cut off.*; strict refuses"):
        pack(tmp_path / "in", tmp_path / "out", progress=False, strict=True, report=said.append)
    assert not (tmp_path / "out").exists()
    assert said == ["2 of 2 videos are done and kept; the same command goes on from there"]
    with pytest.raises(DataError, match=r"b\.mp4: expected 40 frames"):
        pack(tmp_path / "in", tmp_path / "out", progress=False, strict=True, report=said.append)
    store = pack(tmp_path / "in", tmp_path / "out", progress=False, report=said.append)
    assert len(store.episodes) == 2
    assert said[-1].startswith("warning: ")
    assert sorted(os.listdir(tmp_path)) == ["in", "out"]


def test_skip_leaves_out_what_cannot_be_packed(tmp_path: Path) -> None:
    for name in ("b", "d"):
        film(tmp_path / "in" / f"{name}.mp4", moving(8, 64, 64))
    (tmp_path / "in" / "a.mp4").write_bytes(b"I am no film\n" * 99)
    (tmp_path / "in" / "c.mp4").write_bytes(b"")
    film(tmp_path / "in" / "e.mp4", moving(1, 64, 64))
    os.symlink("nowhere", tmp_path / "in" / "f.mp4")
    with pytest.raises(DataError, match=r"a\.mp4: expected a video"):
        packed(tmp_path)
    assert os.listdir(tmp_path) == ["in"]
    store, said = packed(tmp_path, on_error="skip")
    assert [(e.source, e.frames) for e in store.episodes] == [("b.mp4", 8), ("d.mp4", 8)]
    assert {e.split for e in store.episodes} == {"train", "test"}  # of those that are packed
    named = [match[1] for line in said if (match := re.search(r"(\w\.mp4): expected a video", line))]
    assert named == ["a.mp4", "c.mp4", "e.mp4", "f.mp4"]
    assert all(line.startswith("warning: left out: ") for line in said)
    assert "got an empty file" in said[1]
    assert "of at least two frames, got 1" in said[2]
    assert "No such file" in said[3]


def test_skip_that_leaves_nothing_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.mp4").write_bytes(b"I am no film\n" * 99)
    with pytest.raises(DataError, match=r"videos: expected at least one that can be packed, got none \(.*a\.mp4"):
        packed(tmp_path, on_error="skip")
    with pytest.raises(InputError, match="on_error: expected one of"):
        packed(tmp_path, on_error="ignore")
    assert os.listdir(tmp_path) == ["in"]


def test_two_damaged_places_too_close_for_a_transition(tmp_path: Path) -> None:
    """A single frame between two gaps has no transition: it is left out, and counted as one that came."""
    path = lossless(tmp_path / "in" / "a.mov", moving(12, 64, 64))
    wiped(path, *[(start, start + length) for start, length in (packets(path)[i] for i in (5, 7))])
    store, (line,) = packed(tmp_path)
    assert numbers(store) == [list(range(5)), list(range(8, 12))]
    assert "expected 12 frames, got 10: 2 lost to damage in 2 places, the first at 0.5 s; packed as 2 episodes" in line


def test_a_playlist_under_the_name_of_a_video_opens_no_file(tmp_path: Path) -> None:
    film(tmp_path / "secret.ts", moving(8, 64, 64))
    (tmp_path / "in").mkdir()
    for name, text in (
        ("a.ts", f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{tmp_path}/secret.ts\n#EXT-X-ENDLIST\n"),
        ("b.mp4", f"ffconcat version 1.0\nfile '{tmp_path}/secret.ts'\n"),
    ):
        (tmp_path / "in" / name).write_text(text)
    with pytest.raises(DataError, match="got none"):
        packed(tmp_path, on_error="skip")
