"""Where and how ViZDoom's games run: in a private folder, ending with their player, and never taking him along.

ViZDoom's library runs each game as a process that works in the current directory and writes there, and that outlives a
player who is killed. If the game ends before its first frame, the library reads through a null pointer and the player
dies of a segmentation fault. So here a game works in a folder of its own, ``launch.py`` ties its life to the player's,
and before the first one a process of its own tries whether games start on this machine at all.
"""

from __future__ import annotations

import ctypes
import json
import os
import shlex
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TypeVar

from flexlam_fast.data import launch
from flexlam_fast.data.stale import workfolder
from flexlam_fast.errors import SimulatorError, StorageError

#: Linux: the flag of ``unshare`` that gives a thread a current directory of its own.
CLONE_FS = 0x200
#: A game's shared memory grows to 10.7 MB; without that much the kernel kills whoever touches the missing part.
SHARED_MEMORY, SHARED_BYTES = Path("/dev/shm"), 12 * 2**20
#: What the maps take their textures and sounds from.
WAD = "freedoom2.wad"
#: What is tried: the scenario that starts fastest.
SCENARIO = "scenarios/take_cover.cfg"
#: Seconds within which the game that is tried must have started and ended; a busy machine takes one or two.
TRIAL_SECONDS = 120

TRIAL = """
import json, resource, sys
program, wad, scenario, sys.path[:] = json.load(sys.stdin)
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
import vizdoom
game = vizdoom.DoomGame()
game.load_config(scenario)
game.set_vizdoom_path(program)
game.set_doom_game_path(wad)
game.set_window_visible(False)
game.init()
game.close()
"""

T = TypeVar("T")


def game_folder() -> AbstractContextManager[Path]:
    """A private folder below the directory for temporary files, removed at the end, at the latest by the next game.

    Raises:
        SimulatorError: there is no directory for temporary files.
    """
    try:
        return workfolder(Path(tempfile.gettempdir()) / f"flexlam-vizdoom-{os.geteuid()}")
    except OSError as error:
        raise SimulatorError(f"vizdoom: expected a directory for temporary files, got: {error}") from error


def load_vizdoom() -> Any:
    """Import ViZDoom with its environments, and return the module that makes them, ``gymnasium``.

    Raises:
        SimulatorError: it is not installed, or does not load.
    """
    try:
        # In a working directory that is gone, importing vizdoom would abort the process.
        return in_folder(Path("/"), _import)
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError)
        state = "is not installed" if missing else f"does not load ({' '.join(str(error).split())})"
        raise SimulatorError(f'vizdoom: {error.name or "vizdoom"} {state}; pip install "flexlam_fast[demo]"') from error


def _import() -> Any:
    import gymnasium
    import vizdoom.gymnasium_wrapper  # noqa: F401  (registers the ids)

    return gymnasium


def install_path(name: str) -> str:
    """The absolute path of a file that ViZDoom is installed with."""
    vizdoom = sys.modules["vizdoom"]
    return os.path.join(os.path.dirname(os.path.abspath(str(vizdoom.__file__))), name)


def write_launcher(folder: Path, parent: int) -> Path:
    """Write the program that ViZDoom is to start: the game by way of ``launch.py``.

    Args:
        folder: of :func:`game_folder`.
        parent: id of the process that will start it.

    Returns:
        The program.

    Raises:
        SimulatorError: programs cannot be run in the folder.
        StorageError: the folder does not take it.
    """
    program = folder / "vizdoom"
    words = [sys.executable, "-I", "-S", launch.__file__, str(parent), str(folder), install_path("vizdoom")]
    try:
        program.write_bytes(os.fsencode(f'#!/bin/sh\nexec {shlex.join(words)} "$@"\n'))
        program.chmod(0o700)
    except OSError as error:
        raise StorageError(f"{program}: expected to write it, got {error.strerror or error}") from error
    if not os.access(program, os.X_OK):
        raise SimulatorError(f"vizdoom: expected a TMPDIR in which programs can be run, got {folder.parent}")
    return program


def in_folder(folder: Path, call: Callable[[], T]) -> T:
    """Make a call with ``folder`` as the current directory of its thread alone; every other thread keeps its own.

    Where the kernel refuses that (outside Linux, in many containers) the call is made in the process's directory.

    Raises:
        SimulatorError: and that directory is gone, or closed to this user.
    """
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            if sys.platform == "linux" and ctypes.CDLL(None).unshare(CLONE_FS) == 0:
                os.chdir(folder)
            else:
                _check_directory()
            results.append(call())
        except BaseException as error:  # handed to the thread that waits
            errors.append(error)

    thread = threading.Thread(target=run, name="vizdoom")
    thread.start()
    try:
        thread.join()
    finally:
        thread.join()  # an interrupt waits for the call, so that nobody closes a game that is being started
    if errors:
        raise errors[0]
    return results[0]


def _check_directory() -> None:
    try:
        os.stat(os.path.join(os.getcwd(), "."))
    except OSError as error:
        raise SimulatorError(f"vizdoom: expected a working directory to start in, got: {error.strerror}") from error


def check_start() -> None:
    """Make sure that games start on this machine; before a process starts its first, another process tries one.

    Raises:
        SimulatorError: they do not, with the game's own words.
        StorageError: there is no room for temporary files.
    """
    global _works
    load_vizdoom()
    if SHARED_MEMORY.is_dir():
        disk = os.statvfs(SHARED_MEMORY)
        free = disk.f_bavail * disk.f_frsize
        if free < SHARED_BYTES:
            raise SimulatorError(f"vizdoom: expected {SHARED_BYTES} bytes free in {SHARED_MEMORY}, got {free}")
    if not _works and sys.executable:
        _try()
    _works = True


def skip_trial() -> None:
    """Start games without a trial: for a process whose death takes nothing along."""
    global _works
    _works = True


_works = False


def _try() -> None:
    python = [sys.executable, "-I", "-S"]
    with game_folder() as folder:
        command = [*python, launch.__file__, str(os.getpid()), str(folder), *python, "-c", TRIAL]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        with subprocess.Popen(command, cwd="/", **pipes) as process:
            try:
                program = write_launcher(folder, process.pid)
                request = json.dumps([str(program), install_path(WAD), install_path(SCENARIO), sys.path])
                output, _ = process.communicate(request.encode(), TRIAL_SECONDS)
            except subprocess.TimeoutExpired:
                raise SimulatorError(f"vizdoom: expected a game within {TRIAL_SECONDS} s, got none") from None
            finally:
                process.kill()
    if process.returncode:
        lines = [line.strip() for line in output.decode(errors="replace").splitlines() if line.strip()]
        if any(line.startswith("Traceback") for line in lines):
            lines = lines[-1:]
        reason = " ".join(lines)[-200:] or f"it ended with status {process.returncode}"
        raise SimulatorError(f"vizdoom: the game does not start: {reason}")
