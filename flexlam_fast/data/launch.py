"""Runs a game so that it ends with its player; a program of its own, which ViZDoom starts in place of the game.

usage: launch.py PARENT FOLDER GAME [argument ...]. PARENT is the id of the player's process, FOLDER where the game
works and writes its settings, GAME the program. This process becomes the game.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys

ALSO = "also"
#: Linux: the number of ``prctl``'s option that names the signal sent at the parent's death.
PR_SET_PDEATHSIG = 1
#: ViZDoom's shared memory, by the name of the instance that an argument carries.
INSTANCE, SHARED = "+viz_instance_id", ("SM", "MQCtr", "MQDoom")


def end_with_parent(parent: int) -> None:
    """Have the kernel kill this process as soon as the one that started it ends, however it ends (Linux).

    Args:
        parent: id of the process that started this one; if that has ended already, this one ends here.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it ended before the kernel was told
        os._exit(1)


def main(parent: str, folder: str, game: str, *arguments: str) -> None:
    """Become the game, with a folder and a session of its own, and no open files but the standard ones."""
    end_with_parent(int(parent))
    os.chdir(folder)
    if INSTANCE in arguments[:-1]:
        # A killed player and a killed game leave their shared memory behind: whoever removes the folder removes it too.
        name = arguments[arguments.index(INSTANCE) + 1]
        with open(ALSO, "ab") as file:
            file.writelines(os.fsencode(f"/dev/shm/ViZDoom{kind}{name}") + b"\0" for kind in SHARED)
    os.setsid()  # Ctrl-C in the terminal is for the player, who closes the game
    for number in os.listdir("/proc/self/fd") if os.path.isdir("/proc/self/fd") else ():
        with contextlib.suppress(OSError):
            if int(number) > 2:
                os.close(int(number))
    os.execv(game, [game, *arguments])


if __name__ == "__main__":
    main(*sys.argv[1:])
