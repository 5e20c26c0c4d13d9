"""Folders in which a data set is made before it takes its place: hidden beside the target, locked while in use."""

from __future__ import annotations

import fcntl
import hashlib
import os
import tempfile
from pathlib import Path

from flexlam_fast.data.manifest import MANIFEST
from flexlam_fast.data.names import shown
from flexlam_fast.errors import StorageError

MAX_NAME_BYTES = 200  # of the 255 that file systems take: room for the rest of a hidden name


def check_target(path: Path, overwrite: bool) -> None:
    """Refuse a target that exists, or with ``overwrite`` one that is no data set, before any work is done.

    Raises:
        StorageError: naming the target.
    """
    if not os.path.lexists(path):
        return
    if not overwrite:
        raise StorageError(f"{shown(path)}: expected a new directory, got one that exists; overwrite replaces it")
    if not (path / MANIFEST).is_file():
        raise StorageError(f"{shown(path)}: expected a data set to replace, got something else")


def hidden(target: Path, suffix: str) -> Path:
    """The path beside ``target``: a dot, its name, and ``suffix``; a very long name is replaced by its hash."""
    name = target.name
    if len(os.fsencode(name)) > MAX_NAME_BYTES:
        name = hashlib.sha256(os.fsencode(name)).hexdigest()
    return target.parent / f".{name}{suffix}"


def hold(folder: Path, *, needed: bool = True) -> int | None:
    """Lock a folder for this process; the kernel gives the lock back when the process ends, however it ends.

    Args:
        folder: what to lock.
        needed: whether a file system that has no locks is as good as a lock of another process.

    Returns:
        A handle to pass to :func:`release`; None if another process holds the lock, or the folder is gone.
    """
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(handle), os.stat(folder)):  # else it was removed, and perhaps made anew, meanwhile
            return handle
    except BlockingIOError:
        pass
    except OSError:
        if not needed:
            return handle
    os.close(handle)
    return None


def release(handle: int | None) -> None:
    """Give back the lock of :func:`hold`."""
    if handle is not None:
        os.close(handle)


def publish(folder: Path, target: Path, overwrite: bool) -> None:
    """Rename a finished folder to its target; a data set that stands there is replaced.

    Raises:
        StorageError: if the target came into being meanwhile, or cannot be written.
    """
    check_target(target, overwrite)
    try:
        folder.chmod(0o755)  # mkdtemp gives 0o700
        sync(folder)
        if target.exists():
            with tempfile.TemporaryDirectory(prefix=hidden(target, ".").name, dir=target.parent) as old:
                target.rename(Path(old) / "old")
                folder.rename(target)
        else:
            folder.rename(target)
        sync(target.parent)
    except OSError as error:
        raise unwritten(target, error) from error


def sync(directory: Path) -> None:
    """Have the names in a directory reach the disk."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def unwritten(path: Path, error: OSError) -> StorageError:
    """The sentence for a write that failed."""
    return StorageError(f"{shown(path)}: expected to write it, got {error.strerror or error}")
