"""A pack that was stopped goes on where it was, and makes what it would have made; memory does not grow with a film."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("av")
pytest.importorskip("pyarrow")

from video_cases import film, lossless, moving

from flexlam_fast.data import video
from flexlam_fast.data.decode import Shown, VideoReader
from flexlam_fast.data.folders import hold, release
from flexlam_fast.data.journal import opened
from flexlam_fast.data.store import EpisodeStore, EpisodeWriter
from flexlam_fast.data.video import pack
from flexlam_fast.errors import DataError, StorageError

LENGTHS = {"a": 12, "b": 7, "c": 9, "d": 11}


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    for name, count in LENGTHS.items():
        lossless(tmp_path / "in" / f"{name}.mkv", moving(count, 32, 32))
    return tmp_path / "in"


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


class Reads:
    """Counts the frames that are decoded of each video in full, and stops in the middle of one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, stop: str = "", error: type[BaseException] = KeyboardInterrupt):
        self.frames: dict[str, int] = {}
        self.error = error
        original = VideoReader.__iter__

        def counted(reader: VideoReader) -> Iterator[Shown]:
            name = reader._packets._path.stem
            for number, frame in enumerate(original(reader)):
                if number > 1:  # the first two are looked at beforehand
                    self.frames[name] = self.frames.get(name, 2) + 1
                if name == stop and number == 5:
                    raise self.error
                yield frame

        monkeypatch.setattr(VideoReader, "__iter__", counted)


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, ZeroDivisionError])
def test_the_same_call_goes_on(
    tmp_path: Path, videos: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    whole = content(pack(videos, tmp_path / "whole", size=32, progress=False).path)
    said: list[str] = []
    with monkeypatch.context() as patch:
        reads = Reads(patch, "c", error)
        with pytest.raises(error):
            pack(videos, tmp_path / "out", size=32, progress=False, report=said.append)
        assert reads.frames == {"a": 12, "b": 7, "c": 6}
    assert said == ["2 of 4 videos are done and kept; the same command goes on from there"]
    assert sorted(os.listdir(tmp_path)) == [".out.pack", "in", "whole"]
    reads = Reads(monkeypatch)
    pack(videos, tmp_path / "out", size=32, progress=False)
    assert reads.frames == {"c": 9, "d": 11}
    assert content(tmp_path / "out") == whole
    assert sorted(os.listdir(tmp_path)) == ["in", "out", "whole"]


def stopped(videos: Path, output: Path, at: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        Reads(patch, at)
        with pytest.raises(KeyboardInterrupt):
            pack(videos, output, size=32, progress=False)


@pytest.mark.parametrize(
    ("change", "again"),
    [
        ("nothing", "cd"),
        ("touched", "bcd"),
        ("replaced", "bcd"),
        ("gone", "cd"),
        ("new", "aa2bcd"),
        ("options", "abcd"),
        ("frames", "abcd"),
        ("journal", "bcd"),
        ("version", "abcd"),
    ],
)
def test_only_what_still_holds_is_kept(
    tmp_path: Path, videos: Path, monkeypatch: pytest.MonkeyPatch, change: str, again: str
) -> None:
    stopped(videos, tmp_path / "out", "c")
    left, options = tmp_path / ".out.pack", {}
    if change == "touched":
        os.utime(videos / "b.mkv", ns=(1, 1))
    elif change == "replaced":
        lossless(videos / "b.mkv", moving(8, 32, 32))
    elif change == "gone":
        (videos / "d.mkv").unlink()
        again = "c"
    elif change == "new":
        lossless(videos / "a2.mkv", moving(4, 32, 32))
        again = "".join(sorted("bcd")) + "2"
    elif change == "options":
        options = {"fps": 5.0}
    elif change == "frames":
        with open(left / "data" / "frames-00000.npy", "r+b") as file:
            file.truncate(12 * 32 * 32 * 3)
    elif change == "journal":
        lines = (left / "journal.jsonl").read_bytes().splitlines(keepends=True)
        (left / "journal.jsonl").write_bytes(b"".join(lines[:-1]) + lines[-1][:-9])
    elif change == "version":
        lines = (left / "journal.jsonl").read_text().splitlines(keepends=True)
        head = json.loads(lines[0])
        head["options"]["av"] = "0.1"
        (left / "journal.jsonl").write_text(json.dumps(head) + "\n" + "".join(lines[1:]))
    reads = Reads(monkeypatch)
    store = pack(videos, tmp_path / "out", size=32, progress=False, **options)  # type: ignore[arg-type]
    assert "".join(name for name in sorted(reads.frames)).replace("a2", "") + "2" * ("a2" in reads.frames) == again
    monkeypatch.undo()
    fresh = pack(videos, tmp_path / "fresh", size=32, progress=False, **options)  # type: ignore[arg-type]
    assert content(store.path) == content(fresh.path)


def test_skipped_videos_are_not_tried_again(tmp_path: Path, videos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    film(videos / "b2.mp4", moving(1, 32, 32))
    with monkeypatch.context() as patch:
        Reads(patch, "c")
        with pytest.raises(KeyboardInterrupt):
            pack(videos, tmp_path / "out", size=32, progress=False, on_error="skip")
    with pytest.raises(DataError, match=r"b2\.mp4: expected a video of at least two frames, got 1"):
        pack(videos, tmp_path / "out", size=32, progress=False)
    reads, said = Reads(monkeypatch), []
    store = pack(videos, tmp_path / "out", size=32, progress=False, on_error="skip", report=said.append)
    assert reads.frames == {"c": 9, "d": 11}
    assert [e.source for e in store.episodes] == ["a.mkv", "b.mkv", "c.mkv", "d.mkv"]
    assert len(said) == 1
    assert "left out" in said[0]


def test_sigkill_and_the_same_command_again(tmp_path: Path, videos: Path) -> None:
    lossless(videos / "e.mkv", [p for _ in range(20) for p in moving(50, 64, 64)])
    command = [sys.executable, "-m", "flexlam_fast", "pack", "--videos", str(videos), "--output", str(tmp_path / "out")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    journal = tmp_path / ".out.pack" / "journal.jsonl"
    until = time.monotonic() + 60
    while time.monotonic() < until and not (journal.exists() and journal.read_bytes().count(b"\n") >= 5):
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out").exists()
    assert journal.read_bytes().count(b"\n") == 5
    with pytest.MonkeyPatch.context() as patch:
        reads = Reads(patch)
        store = pack(videos, tmp_path / "out", progress=False)
    assert list(reads.frames) == ["e"]
    assert content(store.path) == content(pack(videos, tmp_path / "fresh", progress=False).path)
    assert sorted(os.listdir(tmp_path)) == ["fresh", "in", "out"]


def test_one_pack_to_a_target_at_a_time(tmp_path: Path, videos: Path) -> None:
    with opened(tmp_path / "out", {}), pytest.raises(StorageError, match="out: expected one pack to it at a time"):
        pack(videos, tmp_path / "out", size=32, progress=False)
    assert os.listdir(tmp_path) == ["in"]
    pack(videos, tmp_path / "out", size=32, progress=False)


def test_a_file_system_without_locks(tmp_path: Path, videos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    pack(videos, tmp_path / "out", size=32, progress=False)
    (tmp_path / ".set.living.part").mkdir()
    with EpisodeWriter(tmp_path / "set", (4, 5, 3)) as writer:
        writer.add(np.zeros((3, 4, 5, 3), np.uint8), None, None, "a", "train")
    assert sorted(os.listdir(tmp_path)) == [".set.living.part", "in", "out", "set"]


def test_a_folder_of_somebody_else_is_left_alone(tmp_path: Path, videos: Path) -> None:
    (tmp_path / ".out.pack").mkdir()
    (tmp_path / ".out.pack" / "notes.txt").write_text("mine")
    with pytest.raises(StorageError, match=r"\.out\.pack: expected a folder of pack alone, got one with notes\.txt"):
        pack(videos, tmp_path / "out", size=32, progress=False)
    assert os.listdir(tmp_path / ".out.pack") == ["notes.txt"]


def test_a_lock_goes_with_its_folder(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    first = hold(tmp_path / "a")
    assert first is not None
    assert hold(tmp_path / "a") is None
    release(first)
    second = hold(tmp_path / "a")
    assert second is not None
    release(second)
    assert hold(tmp_path / "nowhere") is None


def test_a_data_set_that_comes_meanwhile_is_kept(tmp_path: Path, videos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    complete = video.complete

    def late(*given: object) -> None:
        (tmp_path / "out").mkdir()
        complete(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(video, "complete", late)
    with pytest.raises(StorageError, match="expected a new directory"):
        pack(videos, tmp_path / "out", size=32, progress=False, report=lambda _: None)
    assert os.listdir(tmp_path / "out") == []


PEAK = """
import sys
from flexlam_fast.data.video import pack
pack(sys.argv[1], sys.argv[2], size=512, progress=False)
print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
"""


def test_memory_does_not_grow_with_the_film(tmp_path: Path) -> None:
    """400 frames of 0.8 MB are 315 MB."""
    film(tmp_path / "in" / "a.mp4", [p for _ in range(8) for p in moving(50, 64, 64)], gop=50)
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(tmp_path / "in"), str(tmp_path / "out")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 200 * 1024
    assert EpisodeStore.open(tmp_path / "out").num_frames == 400


def test_a_full_disk_keeps_what_is_done(tmp_path: Path, videos: Path) -> None:
    """The kernel itself refuses the write, in the middle of the second video."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (15 * 32 * 32 * 3, hard))
    try:
        with pytest.raises(StorageError, match=r"frames-00000\.npy: expected to write it, got File too large"):
            pack(videos, tmp_path / "out", size=32, progress=False, report=lambda _: None)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    store = pack(videos, tmp_path / "out", size=32, progress=False)
    assert [e.frames for e in store.episodes] == list(LENGTHS.values())
    greys = store.take(np.arange(12))[:, 30, 0, 0]
    np.testing.assert_array_equal(greys, 20 + 4 * np.arange(12))
