"""Working folders: gone at the end, gone at the next start after a SIGKILL, and never taken from a living owner."""

from __future__ import annotations

import ast
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, Self

import pytest

from flexlam_fast.data import stale
from flexlam_fast.data.stale import PREVIOUS, publish, workfolder
from flexlam_fast.errors import StorageError

OWNER = """
import os, sys
from pathlib import Path
from flexlam_fast.data import stale
with stale.workfolder(Path(sys.argv[1])) as folder:
    (folder / "made").mkdir()
    (folder / "made" / "half").write_bytes(b"x")
    (folder / "also").write_bytes(os.fsencode(sys.argv[1] + ".shared") + b"\\0")
    print(ascii((str(folder), stale._watcher._process.pid)), flush=True)
    sys.stdin.read()
"""


class Owner(NamedTuple):
    """Another process that holds a working folder until its standard input ends."""

    process: subprocess.Popen[str]
    folder: Path
    watcher: int

    @classmethod
    def start(cls, path: Path) -> Self:
        command = [sys.executable, "-c", OWNER, str(path)]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        folder, watcher = ast.literal_eval(process.stdout.readline())
        return cls(process, Path(folder), watcher)

    def kill(self, with_watcher: bool) -> None:
        if with_watcher:
            os.kill(self.watcher, signal.SIGKILL)
        self.process.send_signal(signal.SIGKILL)
        self.process.communicate()


def wait_until(condition: Callable[[], bool], seconds: float = 20.0) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return condition()


def test_a_killed_owner_leaves_nothing(tmp_path: Path) -> None:
    """Whatever the paths are called; the folder of a living owner of the same target stays."""
    path = tmp_path / "a b\n'c\udcff" / "set"
    alive, dead = Owner.start(path), Owner.start(path)
    shared = Path(f"{path}.shared")
    shared.touch()
    assert alive.folder.parent == dead.folder.parent == path.parent
    dead.kill(with_watcher=False)
    assert wait_until(lambda: not dead.folder.exists())
    assert not shared.exists()
    assert list(path.parent.iterdir()) == [alive.folder]
    alive.process.communicate("")
    assert alive.process.returncode == 0
    assert list(path.parent.iterdir()) == []


def test_the_watcher_ends_with_the_last_folder(tmp_path: Path) -> None:
    with workfolder(tmp_path / "a"):
        with workfolder(tmp_path / "b"):
            watcher = stale._watcher._process
            assert watcher is not None
        assert watcher.poll() is None
    assert watcher.poll() is not None
    assert stale._watcher._process is None


def test_the_next_start_removes_what_a_killed_owner_left_and_nothing_of_a_living_one(tmp_path: Path) -> None:
    path = tmp_path / "set"
    alive, dead = Owner.start(path), Owner.start(path)
    dead.kill(with_watcher=True)
    assert (dead.folder / "made" / "half").exists()
    with workfolder(path) as mine:
        assert sorted(tmp_path.iterdir()) == sorted([alive.folder, mine])
    assert list(tmp_path.iterdir()) == [alive.folder]
    alive.process.communicate("")
    assert list(tmp_path.iterdir()) == []


def test_only_its_own_kind_of_folder_is_removed(tmp_path: Path) -> None:
    keep = [".set.backup", ".set.abcdefgh", ".set.abcdefgh1.partial", ".other.abcdefgh.partial", ".set.users00.partial"]
    for name in keep:
        (tmp_path / name).mkdir()
    (tmp_path / ".set.users00.partial" / "thesis").write_text("years of work", encoding="utf-8")  # there is no lock
    (tmp_path / ".set.file0000.partial").write_text("a file", encoding="utf-8")
    (tmp_path / ".set.empty000.partial").mkdir()  # killed before there was a lock
    with workfolder(tmp_path / "set"):
        pass
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*keep, ".set.file0000.partial"])


def test_publishing_replaces_and_a_kill_between_the_renames_loses_nothing(tmp_path: Path) -> None:
    path = tmp_path / "set"
    path.mkdir()
    (path / "old").touch()
    dead = Owner.start(path)
    path.rename(dead.folder / PREVIOUS)
    dead.kill(with_watcher=True)
    with workfolder(path) as folder:
        assert [p.name for p in path.iterdir()] == ["old"]
        (folder / "made").mkdir()
        with pytest.raises(OSError, match="lacking"):
            publish(folder / "lacking", path, folder)
        assert not path.exists()
    assert [p.name for p in path.iterdir()] == ["old"]
    with workfolder(path) as folder:
        (folder / "made").mkdir()
        publish(folder / "made", path, folder)
    assert list(path.iterdir()) == []
    assert list(tmp_path.iterdir()) == [path]


def test_a_target_with_a_very_long_name(tmp_path: Path) -> None:
    path = tmp_path / ("x" * 250)
    dead = Owner.start(path)
    dead.kill(with_watcher=True)
    assert dead.folder.exists()
    with workfolder(path) as folder:
        assert not dead.folder.exists()
        (folder / "made").mkdir()
        publish(folder / "made", path, folder)
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_was_taken_for_a_dead_one_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def mkdtemp(**options: str) -> str:
        made.append(original(**options))
        if len(made) == 1:
            os.rmdir(made[0])
        return made[-1]

    original = stale.tempfile.mkdtemp
    monkeypatch.setattr(stale.tempfile, "mkdtemp", mkdtemp)
    with workfolder(tmp_path / "set") as folder:
        assert str(folder) == made[1]


def test_a_forked_copy_does_not_remove_its_parents_folder(tmp_path: Path) -> None:
    code = OWNER.replace("sys.stdin.read()", "import os\n    if os.fork(): os.wait(); print(folder.exists())")
    command = [sys.executable, "-c", code, str(tmp_path / "set")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "True"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["file/set", "nul\0/set", "long" * 99])
def test_one_sentence_where_no_folder_can_be_made(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").touch()
    working = workfolder(tmp_path / name)
    with pytest.raises(StorageError, match=r"^[^\n\0]*: expected to write it, got [^\n]*$"):
        working.__enter__()
