"""Where the C++ extension is built, its instruction sets; and calls of a chosen one."""

from __future__ import annotations

import functools
from typing import Any

import pytest

from flexlam_fast.backend import probe
from flexlam_fast.sequence.plain import PlainNative, PlainPacked

#: Whether C++ runs here.
BUILT = any(status.name == "native" and status.available for status in probe("cpu"))
needs_extension = pytest.mark.skipif(not BUILT, reason="the extension is not built")


#: The way through plain sequences that ``auto`` takes on a CPU.
PLAIN = PlainNative if BUILT else PlainPacked


def variants() -> list[str]:
    """The instruction sets compiled in that this processor has."""
    if not BUILT:
        return []
    from flexlam_fast import _C

    return _C.build_info()["variants"]


class Forced:
    """The extension as its launchers see it, with one instruction set for every call."""

    def __init__(self, variant: str) -> None:
        self.variant = variant

    def __getattr__(self, name: str) -> Any:
        from flexlam_fast import _C

        return functools.partial(getattr(_C, name), variant=self.variant)


every_variant = pytest.mark.parametrize("variant", variants())
