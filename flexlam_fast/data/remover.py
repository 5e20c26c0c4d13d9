"""Removes working folders whose owner is dead; also a program of its own, which needs no other file of the package.

usage: remover.py < PIPE. Targets come in over the pipe, each ended by a NUL byte. When the pipe ends, because the
process at its other end was killed, what that process left beside the targets is removed.

A working folder ``.NAME.????????.partial`` stands beside its target ``NAME``. Its owner holds a lock (``flock``) on a
file in it, which the kernel drops when the owner ends, however it ends: a folder whose lock can be taken has no owner.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
import sys
import time

#: In a working folder: the locked file; what stood at the target before; absolute paths of files that are to be deleted
#: as well, each ended by a NUL byte.
LOCK, PREVIOUS, ALSO = "lock", "previous", "also"
SUFFIX = ".partial"
#: Of the 255 that file systems take: room for the rest of a working folder's name.
MAX_NAME_BYTES = 200
#: Seconds between looks, and looks in all, for a lock that the kernel drops a moment after it closed the pipe.
PAUSE, LOOKS = 0.1, 20


def prefix(path: str) -> str:
    """What the names of the working folders beside ``path`` begin with; a very long name is replaced by its hash."""
    base = os.path.basename(path)
    if len(os.fsencode(base)) > MAX_NAME_BYTES:
        base = hashlib.sha256(os.fsencode(base)).hexdigest()
    return f".{base}."


def remove_stale(path: str) -> int:
    """Remove the working folders beside ``path`` that a dead process left, and return how many are there still."""
    directory = os.path.dirname(path)
    name = re.compile(rf"{re.escape(prefix(path))}[a-z0-9_]{{8}}{re.escape(SUFFIX)}")
    remaining = 0
    with contextlib.suppress(OSError), os.scandir(directory or ".") as entries:
        for entry in entries:
            if name.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False):
                with contextlib.suppress(OSError):
                    _remove_dead(entry.path, path)
                remaining += os.path.exists(entry.path)
    return remaining


def _remove_dead(folder: str, path: str) -> None:
    if os.stat(folder).st_uid != os.geteuid():
        return
    try:
        lock = os.open(os.path.join(folder, LOCK), os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        os.rmdir(folder)  # killed before the lock was made, or after it was removed: empty, or not ours
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        delete(folder, path)
    finally:
        os.close(lock)


def delete(folder: str, path: str) -> None:
    """Delete a working folder, its lock last: what a kill leaves of it is found again.

    What stood at the target before is put back where nothing has replaced it.
    """
    previous, also = os.path.join(folder, PREVIOUS), os.path.join(folder, ALSO)
    with contextlib.suppress(OSError):
        if os.path.lexists(previous) and not os.path.lexists(path):
            os.rename(previous, path)
        if os.path.exists(also):
            with open(also, "rb") as file:
                for name in file.read().split(b"\0")[:-1]:
                    with contextlib.suppress(OSError):
                        os.unlink(name)
        for entry in list(os.scandir(folder)):
            if entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.path, ignore_errors=True)
            elif entry.name != LOCK:
                os.unlink(entry.path)
    shutil.rmtree(folder, ignore_errors=True)


def main() -> None:
    """Read targets until the pipe ends, then remove what is beside them."""
    targets = {os.fsdecode(name) for name in sys.stdin.buffer.read().split(b"\0") if name}
    for _ in range(LOOKS):
        if not sum(remove_stale(path) for path in targets):
            break
        time.sleep(PAUSE)


if __name__ == "__main__":
    main()
