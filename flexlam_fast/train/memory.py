"""Memory of a training on a CPU: what one step frees the next one takes again."""

from __future__ import annotations

import ctypes

_TRIM, _MAP = (
    -1,
    -3,
)  # of glibc's mallopt: bytes free at the top that are given back, bytes from which a block is mapped
_MOST_MAP, _MOST_TRIM = 32 << 20, (1 << 31) - 1


def keep_memory() -> bool:
    """Tell the C library to keep freed memory instead of giving it back to the system; say whether it can.

    A step frees and takes hundreds of megabytes in blocks of some, which glibc would unmap and map again: each page is
    then cleared once more when it is first touched. Steps of the ``tiny`` LAM were 6% faster without (two cores, 1,180
    page faults a step against 57). It concerns the whole process, so commands do it and the library does not.
    """
    try:
        set_option = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False  # another C library
    return bool(set_option(_MAP, _MOST_MAP)) and bool(set_option(_TRIM, _MOST_TRIM))
