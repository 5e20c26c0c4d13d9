"""Named ranges around the parts of a decision, for profilers; off until someone asks (docs/profiling.md).

A range is what the host does between two lines. What a CUDA graph replays has none: its ranges were seen when it was
captured.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

from flexlam_fast.errors import BackendError, InputError

OFF, STAGES, LAYERS = 0, 1, 2
NVTX, TORCH = "nvtx", "torch"

Make = Callable[[str], AbstractContextManager[object]]


class _Switch(NamedTuple):
    """The finest level that is on, and what makes a range of a name."""

    level: int
    make: Make


#: What :func:`span` returns while its level is off: one object for all, which any number of threads may be inside of.
NOTHING: AbstractContextManager[None] = nullcontext()
_SWITCHED_OFF = _Switch(OFF, lambda name: NOTHING)
#: Level and maker are replaced together, so that a thread never sees a new one with an old one.
_switch = _SWITCHED_OFF


def span(name: str, level: int = STAGES, index: int | None = None) -> AbstractContextManager[object]:
    """Mark what happens inside ``with span("encode"):`` as a range, when ranges of its level are on.

    While they are off it costs about 0.2 us, ``with`` included, and makes nothing. A range that was entered is closed
    by what opened it, in the same thread, also when ranges were switched meanwhile.

    Args:
        name: of the range.
        level: 1 for stages, 2 for what is inside them.
        index: a number to put behind the name, which costs its formatting only when the range is on.
    """
    switch = _switch
    if level > switch.level:
        return NOTHING
    return switch.make(name if index is None else f"{name} {index}")


def set_ranges(level: int, to: str = NVTX) -> None:
    """Switch ranges on or off, for all threads of this process; what is under way ends as it began.

    Args:
        level: 0 is off; 1 marks the stages of a decision, encode, append, codes and translate; 2 also every code and
            every layer.
        to: ``"nvtx"`` for Nsight, by the ``nvtx`` package where there is one, else by PyTorch's; ``"torch"`` for
            ``torch.profiler``, on any device.

    Raises:
        InputError: another level, or another ``to``.
        BackendError: neither the ``nvtx`` package nor a PyTorch with CUDA is there.
    """
    global _switch
    if isinstance(level, bool) or not isinstance(level, int) or not OFF <= level <= LAYERS:
        raise InputError(f"level: expected 0 (off), 1 (stages) or 2 (stages and layers), got {level!r}")
    if to not in (NVTX, TORCH):
        raise InputError(f"to: expected {NVTX!r} or {TORCH!r}, got {to!r}")
    _switch = _Switch(level, _record_function() if to == TORCH else _nvtx()) if level else _SWITCHED_OFF


def _record_function() -> Make:
    make: Make = importlib.import_module("torch.profiler").record_function
    return make


def _nvtx() -> Make:
    """Both write to NVTX's default domain, so that Nsight's filters are the same for both."""
    make: Make
    try:
        make = importlib.import_module("nvtx").annotate
    except ImportError:
        torch = importlib.import_module("torch")
        if not torch.backends.cuda.is_built():
            raise BackendError(
                "set_ranges: expected the nvtx package or a PyTorch built with CUDA, got neither "
                '(pip install nvtx, or to="torch" for torch.profiler)'
            ) from None
        make = torch.cuda.nvtx.range
    return make
