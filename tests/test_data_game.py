"""Where games run: in a private folder, in any working directory, never longer than their player."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

pytest.importorskip("vizdoom")

from process_cases import alive, descendants, wait_until

from flexlam_fast.data import game
from flexlam_fast.data.vizdoom import MAX_STEPS, DoomEnv
from flexlam_fast.errors import SimulatorError, StorageError

game.load_vizdoom()
linux = pytest.mark.skipif(sys.platform != "linux", reason="the kernel's signal at a parent's death is Linux's")

PLAYER = """
import os, sys
os.rmdir(os.getcwd())
from flexlam_fast.data.vizdoom import MAX_STEPS, DoomEnv
env = DoomEnv("take_cover")
env.reset(0)
print("plays", flush=True)
while True:
    env.step(0)
"""


def shared_memory(commands: Iterable[str]) -> list[str]:
    """What is there of the shared memory of games with these command lines."""
    instances = [found[1] for command in commands if (found := re.search(r"\+viz_instance_id (\w+)", command))]
    assert instances
    return [name for name in os.listdir("/dev/shm") if any(name.endswith(instance) for instance in instances)]


def games(pid: int) -> list[str]:
    """The games that run below a process, without those that are being launched."""
    return [command for command in descendants(pid).values() if command.startswith(game.install_path("vizdoom "))]


def test_nothing_is_written_to_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is anything taken from it, and files in the way of ViZDoom's own do no harm."""
    monkeypatch.chdir(tmp_path)
    for name in ("_vizdoom", "_vizdoom.ini", "vizdoom", "doom2.wad", "freedoom2.wad"):
        (tmp_path / name).write_text("mine", encoding="utf-8")
    with DoomEnv("take_cover") as env:
        first = env.reset(3)
        assert Path.cwd() == tmp_path
    monkeypatch.chdir(tmp_path.parent)
    with DoomEnv("take_cover") as env:
        assert (env.reset(3) == first).all()
    assert {path.read_text(encoding="utf-8") for path in tmp_path.iterdir()} == {"mine"}
    assert len(list(tmp_path.iterdir())) == 5


def test_a_game_can_be_started_again_after_close() -> None:
    env = DoomEnv("take_cover")
    first = env.reset(3)
    env.close()
    env.close()
    assert (env.reset(3) == first).all()
    env.close()


@linux
def test_a_killed_game_is_one_sentence_and_the_next_reset_starts_another() -> None:
    with DoomEnv("take_cover") as env:
        first = env.reset(3)
        (pid,) = [pid for pid, command in descendants(os.getpid()).items() if "+viz_controlled" in command]
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(SimulatorError, match=r"^vizdoom: take_cover stopped: [^\n]+$"):
            list(map(env.step, [0] * MAX_STEPS))
        assert (env.reset(3) == first).all()


@linux
def test_a_game_ends_with_its_killed_player_and_leaves_nothing(tmp_path: Path) -> None:
    """Where the working directory is gone and the temporary one has an odd name."""
    temporary, gone = tmp_path / "a 'b' $c", tmp_path / "gone"
    temporary.mkdir()
    gone.mkdir()
    environment = {**os.environ, "TMPDIR": str(temporary)}
    player = subprocess.Popen(
        [sys.executable, "-c", PLAYER], cwd=gone, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert player.stdout is not None
    assert player.stdout.readline() == b"plays\n"
    children = descendants(player.pid)
    assert len(games(player.pid)) == 1
    assert len(shared_memory(children.values())) == 3
    assert len(list(temporary.iterdir())) == 1
    player.send_signal(signal.SIGKILL)
    player.communicate()
    assert wait_until(lambda: not any(map(alive, children)))
    assert list(temporary.iterdir()) == []
    assert shared_memory(children.values()) == []


def heed_interrupts() -> None:
    """Take SIGINT again: what a shell starts in the background, tests too, ignores it, and children inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@linux
@pytest.mark.parametrize(("number", "status"), [(signal.SIGKILL, -9), (signal.SIGINT, 130)])
def test_workers_games_and_folders_end_with_a_collection(tmp_path: Path, number: int, status: int) -> None:
    """Killed, or stopped by Ctrl-C, which a terminal sends to every process of the command."""
    command = ["-m", "flexlam_fast", "collect", "--output=set", "--scenarios=take_cover", "--steps=10000000"]
    with (tmp_path / "said").open("w", encoding="utf-8") as said:
        main = subprocess.Popen(
            [sys.executable, *command], cwd=tmp_path, stderr=said, start_new_session=True, preexec_fn=heed_interrupts
        )
    assert wait_until(lambda: main.poll() is None and len(games(main.pid)) == 2)
    children = descendants(main.pid)
    assert len(children) >= 5  # two workers with a game each, and the tracker of multiprocessing
    (os.kill if number == signal.SIGKILL else os.killpg)(main.pid, number)
    assert main.wait(30) == status
    assert wait_until(lambda: not any(map(alive, children)))
    assert [path.name for path in tmp_path.iterdir()] == ["said"]
    assert "Traceback" not in (tmp_path / "said").read_text(encoding="utf-8")
    assert shared_memory(children.values()) == []


@linux
def test_where_the_kernel_gives_no_thread_a_directory_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in many containers: games start all the same, but not where the working directory is gone."""
    monkeypatch.setattr(game, "CLONE_FS", 1)  # no flag of ``unshare``, which refuses it
    monkeypatch.chdir(tmp_path)
    with DoomEnv("take_cover") as env:
        env.reset(0)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(SimulatorError, match="^vizdoom: expected a working directory to start in, got: No such file"):
        DoomEnv("take_cover")
    monkeypatch.chdir(tmp_path)


def failing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, script: str) -> None:
    """Have a script in place of the game."""
    original, program = game.install_path, tmp_path / "game"
    program.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    program.chmod(0o700)
    monkeypatch.setattr(game, "install_path", lambda name: str(program) if name == "vizdoom" else original(name))
    monkeypatch.setattr(game, "_works", False)


@pytest.mark.parametrize(
    ("script", "reason"),
    [("echo no luck >&2; echo today; exit 3", "no luck today"), ("exit 0", r"it ended with status -?\d+")],
)
def test_a_game_that_does_not_start_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, reason: str
) -> None:
    failing(monkeypatch, tmp_path, script)
    with (
        DoomEnv("take_cover") as env,
        pytest.raises(SimulatorError, match=f"^vizdoom: the game does not start: {reason}$"),
    ):
        env.reset(0)
    assert not game._works


def test_a_game_that_hangs_at_its_start_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, tmp_path, "exec sleep 60")
    monkeypatch.setattr(game, "TRIAL_SECONDS", 1)
    with pytest.raises(SimulatorError, match="^vizdoom: expected a game within 1 s, got none$"):
        game.check_start()


def test_what_a_machine_lacks_is_said_before_a_game_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with DoomEnv("take_cover") as env:
        with monkeypatch.context() as patch:
            patch.setattr(game, "SHARED_BYTES", 2**60)
            with pytest.raises(SimulatorError, match="^vizdoom: expected 1152921504606846976 bytes free in /dev/shm"):
                env.reset(0)
        with monkeypatch.context() as patch:
            patch.setattr(game.os, "access", lambda *_: False)
            with pytest.raises(SimulatorError, match="^vizdoom: expected a TMPDIR in which programs can be run, got /"):
                env.reset(0)
        with monkeypatch.context() as patch:
            patch.setattr(game.tempfile, "gettempdir", lambda: str(tmp_path / "file"))
            (tmp_path / "file").touch()
            with pytest.raises(StorageError, match="expected to write it"):
                env.reset(0)
        env.reset(0)
