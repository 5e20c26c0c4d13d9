"""Imported first, makes a machine without a GPU look like the GPU image as far as imports and collection go.

CUDA is said to be there, and what the image has not installed cannot be imported. Nothing can run.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch
from gpu import LACKING


class Hidden(MetaPathFinder):
    """Finds nothing, and lets nobody else find what the image lacks."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """Refuse those names."""
        if name.partition(".")[0] in LACKING:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return None


def pretend() -> None:
    """Do so, for this process."""
    sys.meta_path.insert(0, Hidden())
    there: dict[str, Any] = dict(
        is_available=lambda: True,
        device_count=lambda: 1,
        get_device_capability=lambda *_: (9, 0),
        get_device_name=lambda *_: "no GPU, a rehearsal",
    )
    for name, value in there.items():
        setattr(torch.cuda, name, value)


pretend()
