"""Hidden working folders that are removed with their contents, at the latest at the next start after a SIGKILL.

Half-made results are written to a hidden folder beside their target and renamed at the end. The process that makes the
folder holds a lock (``flock``) on a file in it. The kernel drops the lock when the process ends, however it ends, so a
folder whose lock can be taken has no owner any more, and the next process that writes to the same target removes it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from flexlam_fast.errors import StorageError

LOCK, PREVIOUS, SUFFIX = "lock", "previous", ".partial"


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
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_stale(path)
        folder, lock = _make(path)
    except (OSError, ValueError) as error:  # ValueError: a NUL byte in the name
        name = str(path) if str(path).isprintable() else repr(str(path))
        raise StorageError(f"{name}: expected to write it, got {getattr(error, 'strerror', None) or error}") from error
    owner = os.getpid()
    try:
        yield folder
    finally:
        if os.getpid() == owner:  # a forked copy of the process must not remove what its parent still uses
            _delete(folder, path)
        os.close(lock)


def publish(made: Path, path: Path, folder: Path) -> None:
    """Rename ``made`` to ``path``; what stands at ``path`` is moved into ``folder`` first and removed with it.

    Where the second rename does not come to pass, because of an error or a kill, the earlier one is put back: at the
    end of the block of :func:`workfolder`, or by the next start.

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


def remove_stale(path: Path) -> None:
    """Remove the hidden folders beside ``path`` that a dead process left; those in use stay."""
    name = re.compile(rf"{re.escape(f'.{path.name}.')}[a-z0-9_]{{8}}{re.escape(SUFFIX)}")
    with contextlib.suppress(OSError), os.scandir(path.parent) as entries:
        for entry in entries:
            if name.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False):
                with contextlib.suppress(OSError):
                    _remove_dead(Path(entry.path), path)


def _remove_dead(folder: Path, path: Path) -> None:
    if folder.stat().st_uid != os.geteuid():
        return
    try:
        lock = os.open(folder / LOCK, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        folder.rmdir()  # killed before the lock was made, or after it was removed: empty, or not ours
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _delete(folder, path)
    finally:
        os.close(lock)


def _make(path: Path) -> tuple[Path, int]:
    """Make a folder and lock it; another process that took it for a dead one in between costs another try."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=SUFFIX, dir=path.parent))
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


def _delete(folder: Path, path: Path) -> None:
    """Delete a folder, its lock last: what a kill leaves of it is found again."""
    with contextlib.suppress(OSError):
        if (folder / PREVIOUS).exists() and not os.path.lexists(path):
            (folder / PREVIOUS).rename(path)
        for entry in list(os.scandir(folder)):
            if entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.path, ignore_errors=True)
            elif entry.name != LOCK:
                os.unlink(entry.path)
    shutil.rmtree(folder, ignore_errors=True)
