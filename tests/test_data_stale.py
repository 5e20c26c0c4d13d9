"""Working folders: gone at the end, gone at the next start after a SIGKILL, and never taken from a living owner."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from flexlam_fast.data import stale
from flexlam_fast.data.stale import PREVIOUS, publish, workfolder
from flexlam_fast.errors import StorageError

OWNER = """
import sys
from pathlib import Path
from flexlam_fast.data.stale import workfolder
with workfolder(Path(sys.argv[1])) as folder:
    (folder / "made").mkdir()
    (folder / "made" / "half").write_bytes(b"x")
    print(folder, flush=True)
    sys.stdin.read()
"""


def owner(path: Path) -> tuple[subprocess.Popen[str], Path]:
    """Another process that holds a working folder until its standard input ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    return process, Path(process.stdout.readline().strip())


def kill(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGKILL)
    process.communicate()


def test_what_a_killed_owner_left_goes_and_what_a_living_one_has_stays(tmp_path: Path) -> None:
    path = tmp_path / "set"
    alive, used = owner(path)
    dead, left = owner(path)
    assert used.parent == left.parent == tmp_path
    kill(dead)
    assert (left / "made" / "half").exists()
    with workfolder(path) as mine:
        assert sorted(tmp_path.iterdir()) == sorted([used, mine])
    assert list(tmp_path.iterdir()) == [used]
    alive.communicate("")
    assert alive.returncode == 0
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
    dead, left = owner(path)
    kill(dead)
    path.rename(left / PREVIOUS)
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
