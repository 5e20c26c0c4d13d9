"""Hidden working folders that end with the process that made them, also when it is killed by SIGKILL.

Half-made results are written to a hidden folder beside their target and renamed at the end. While a process has such
folders open, a small second one waits for its death (``remover.py``) and removes them then. Where that one was killed
too, or the machine stopped, the next process that writes to the same target removes what is left.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

from flexlam_fast.data import remover
from flexlam_fast.data.remover import LOCK, PREVIOUS, SUFFIX
from flexlam_fast.errors import StorageError


@contextlib.contextmanager
def workfolder(path: Path) -> Iterator[Path]:
    """Make a hidden folder ``.NAME.????????.partial`` beside ``path``, and remove it at the end of the block.

    It holds one file, the lock; the caller's own files are best put into a folder of their own inside, which
    :func:`publish` moves to ``path``. Folders beside ``path`` whose owner is dead are removed first.

    Args:
        path: the target that the folder is for; its parent is made if it is not there.

    Yields:
        The folder, mode 0o700.

    Raises:
        StorageError: if the folder cannot be made.
    """
    name = str(path) if str(path).isprintable() else repr(str(path))
    try:
        path = path.absolute()
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            path.lstat()  # a name that the file system does not take is seen now, not when the work is done
        remover.remove_stale(str(path))
        folder, lock = _make(path)
    except (OSError, ValueError) as error:  # ValueError: a NUL byte in the name
        raise StorageError(f"{name}: expected to write it, got {getattr(error, 'strerror', None) or error}") from error
    owner = os.getpid()
    try:
        with _watcher.watch(path):
            yield folder
    finally:
        if os.getpid() == owner:  # a forked copy of the process must not remove what its parent still uses
            remover.delete(str(folder), str(path))
        os.close(lock)


def publish(made: Path, path: Path, folder: Path) -> None:
    """Rename ``made`` to ``path``; what stands at ``path`` is moved into ``folder`` first and removed with it.

    Where the second rename does not come to pass, because of an error or a kill, the earlier one is put back: at the
    end of the block of :func:`workfolder`, or by whoever removes the folder of a killed process.

    Args:
        made: what is finished, inside ``folder``.
        path: the target.
        folder: the folder of :func:`workfolder`.

    Raises:
        OSError: as the renames raise it.
    """
    if os.path.lexists(path):
        path.rename(folder / PREVIOUS)
    made.rename(path)


def _make(path: Path) -> tuple[Path, int]:
    """Make a folder and lock it; another process that took it for a dead one in between costs another try."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=remover.prefix(str(path)), suffix=SUFFIX, dir=path.parent))
        try:
            lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except FileNotFoundError:
            continue
        except OSError:
            folder.rmdir()
            raise
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            continue
        except OSError:
            return folder, lock  # a file system without locks: nobody else can take it either, so it stays if we die
        if (folder / LOCK).exists():
            return folder, lock
        os.close(lock)


class _Watcher:
    """The second process: started with the first open folder, ended with the last."""

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._owner, self._open = 0, 0

    @contextlib.contextmanager
    def watch(self, path: Path) -> Iterator[None]:
        """Have what is beside ``path`` removed if this process dies in the block."""
        with self._mutex:
            if self._owner != os.getpid():  # a forked copy of the process needs a watcher of its own
                self._process, self._owner, self._open = None, os.getpid(), 0
            self._open += 1
            with contextlib.suppress(OSError):  # without it the next start removes what is left
                self._tell(path)
        owner = self._owner
        try:
            yield
        finally:
            with self._mutex:
                if owner == self._owner == os.getpid():
                    self._open -= 1
                    if self._open == 0:
                        self._end()

    def _tell(self, path: Path) -> None:
        if self._process is None and sys.executable:
            # -I and -S: no module of the user's, and a start of a few milliseconds.
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", remover.__file__],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                cwd="/",
                start_new_session=True,  # Ctrl-C in the terminal must not end it
            )
        if self._process is not None and self._process.stdin is not None:
            os.write(self._process.stdin.fileno(), os.fsencode(path) + b"\0")

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.communicate()


_watcher = _Watcher()
