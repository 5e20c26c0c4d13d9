"""File names of every kind are packed, come back from the data set, and stay on one line of a message."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from flexlam_fast.data.names import from_text, shown, to_text


@given(st.binary(min_size=1, max_size=40).filter(lambda b: b"\0" not in b))
@example(b"stra\xdfe.mp4")
@example(b"file:stra%DFe.mp4")
@example("straße.mp4".encode())
def test_every_name_comes_back(content: bytes) -> None:
    name = os.fsdecode(content)
    text = to_text(name)
    text.encode()
    assert from_text(text) == name
    assert shown(name).isprintable()


def test_names_stand_as_they_are_wherever_they_can() -> None:
    for name in ("a.mp4", "fold/straße 2.mp4", "100%.mp4", "a:b.mp4", "a\nb.mp4", "%DF.mp4"):
        assert to_text(name) == name
    assert to_text(os.fsdecode(b"fold/stra\xdfe 2.mp4")) == "file:fold/stra%DFe%202.mp4"
    assert to_text("file:a.mp4") == "file:file%3Aa.mp4"
    assert shown(os.fsdecode(b"stra\xdfe\n.mp4")) == "stra\\xdfe\\n.mp4"


NAMES = [
    b"2024-05-01T12:30:05.mp4",
    b"concat:a.mp4|b.mp4",
    b"-i.mp4",
    b"clip%03d.gif",
    b"clip%d.mp4",
    b"line\nbreak.mp4",
    b"stra\xdfe.mp4",
    "日本 🎬.mp4".encode(),
    b"file:x.mp4",
    b"x" * 240 + b".mp4",
    b" .mp4",
    b"UPPER.MP4",
    b"http:\\\\x?a=1&b.mp4",
]


@pytest.mark.parametrize("relative", [False, True])
def test_a_folder_of_all_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, relative: bool) -> None:
    pytest.importorskip("av")
    pytest.importorskip("pyarrow")
    from video_cases import film, moving

    from flexlam_fast.data.store import EpisodeStore
    from flexlam_fast.data.video import pack

    folder = os.fsencode(tmp_path) + b"/in/ta\xdfk:1"
    os.makedirs(folder)
    film(tmp_path / "a.mp4", moving(4, 32, 32))
    film(tmp_path / "a.gif", moving(4, 32, 32), codec="gif", fmt="rgb8")
    for name in NAMES:
        source = tmp_path / ("a.gif" if name.endswith(b"gif") else "a.mp4")
        with open(folder + b"/" + name, "wb") as file:
            file.write(source.read_bytes())
    if relative:
        monkeypatch.chdir(os.fsdecode(folder))
    videos = Path(".") if relative else tmp_path / "in"
    pack(videos, tmp_path / "out", size=32, progress=False, strict=True)
    store = EpisodeStore.open(tmp_path / "out")
    parent = b"" if relative else b"ta\xdfk:1/"
    assert sorted(os.fsencode(from_text(e.source)) for e in store.episodes) == sorted(parent + name for name in NAMES)
    assert [from_text(task) for task in store.tasks] == ["video" if relative else os.fsdecode(b"ta\xdfk:1")]
    assert {e.frames for e in store.episodes} == {4}
    assert len(np.unique(store.take(np.arange(store.num_frames))[:, 30, 0, 0])) >= 4


def test_an_output_of_any_name(tmp_path: Path) -> None:
    pytest.importorskip("av")
    pytest.importorskip("pyarrow")
    from video_cases import film, moving

    from flexlam_fast.data.video import pack

    film(tmp_path / "in" / "a.mp4", moving(4, 32, 32))
    for name in (b"o\xdf", b"y" * 255, b"a*[b]", b"-o"):
        output = Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name))
        assert pack(tmp_path / "in", output, size=32, progress=False).num_frames == 4
    assert len(os.listdir(tmp_path)) == 5


def test_a_bad_video_with_a_bad_name_is_one_printable_line(tmp_path: Path) -> None:
    pytest.importorskip("av")
    pytest.importorskip("pyarrow")
    from flexlam_fast.data.video import pack
    from flexlam_fast.errors import DataError

    (tmp_path / "in").mkdir()
    with open(os.fsencode(tmp_path) + b"/in/a\n\xdf.mp4", "wb") as file:
        file.write(b"no film\n" * 99)
    with pytest.raises(DataError, match=r"a\\n\\xdf\.mp4: expected a video, got a file that cannot be") as caught:
        pack(tmp_path / "in", tmp_path / "out", progress=False)
    assert str(caught.value).isprintable()
