"""Processes that tests start and kill: their descendants, and waiting until none is left."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path


def wait_until(condition: Callable[[], object], seconds: float = 60.0) -> bool:
    """Look again and again, and say whether the condition came true in time."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


def _status(pid: int) -> tuple[str, int]:
    """The letter of a process's state, X for none, and the id of its parent."""
    try:
        state, parent = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rsplit(")", 1)[1].split()[:2]
    except OSError:
        return "X", 0
    return state, int(parent)


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and that nobody has waited for does not."""
    return _status(pid)[0] not in "XZ"


def descendants(pid: int) -> dict[int, str]:
    """The command lines of all processes below one."""
    pids = [int(p.name) for p in Path("/proc").iterdir() if p.name.isdigit()]
    parents = {child: _status(child)[1] for child in pids}
    found, front = {}, {pid}
    while front:
        front = {child for child, parent in parents.items() if parent in front}
        for child in front:
            try:
                command = Path(f"/proc/{child}/cmdline").read_bytes()
            except OSError:
                continue
            found[child] = command.decode(errors="replace").replace("\0", " ")
    return found
