"""What a training's steps free stays with the process."""

from __future__ import annotations

import subprocess
import sys

import pytest

#: Megabytes that the C library holds after a block of 20 was taken and freed, beyond what it held before. It is asked
#: itself: a count of page faults is zero on systems that do not keep one. No tensor, for what that puts behind its
#: numbers may keep their memory whatever was asked.
HELD = """
import ctypes, sys
from flexlam_fast.train.memory import keep_memory

class Held(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in (
        "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")]

try:
    library = ctypes.CDLL(None)
    ask = library.mallinfo2
except (AttributeError, OSError):
    raise SystemExit(3)
ask.restype, library.malloc.restype = Held, ctypes.c_void_p
library.malloc.argtypes, library.free.argtypes = [ctypes.c_size_t], [ctypes.c_void_p]
if sys.argv[1] == "keep" and not keep_memory():
    raise SystemExit(3)
def megabytes():
    now = ask()
    return (now.arena + now.hblkhd) / 10**6

before = megabytes()
library.free(library.malloc(20 * 10**6))
print(megabytes() - before)
"""


def held(what: str) -> float:
    done = subprocess.run([sys.executable, "-c", HELD, what], capture_output=True, text=True, check=False)
    if done.returncode == 3:
        pytest.skip("another C library")
    assert done.returncode == 0, done.stderr
    return float(done.stdout)


def test_freed_memory_stays_with_the_process() -> None:
    assert held("keep") >= 15  # the heap grows by what it lacked, some hundred KB more or less
    assert held("leave") < 5
