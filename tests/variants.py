"""What one compilation of a kernel needs to be told; the ``variants_*.py`` files list those that are launched."""

from __future__ import annotations

from typing import Any, NamedTuple

TYPES = {"fp32": 4, "fp16": 2, "bf16": 2}


class Variant(NamedTuple):
    """A kernel, its pointers' and scalars' types by name, its constants, and how it is launched.

    ``aligned`` names the scalars that are multiples of 16; pointers always are. ``stages`` None takes Triton's default.
    """

    kernel: Any
    pointers: dict[str, str]
    scalars: dict[str, str]
    constants: dict[str, Any]
    warps: int
    aligned: tuple[str, ...] = ()
    stages: int | None = None
