"""FlexLAM: latent actions of variable length, learned from video without actions.

``import flexlam_fast as ff`` loads nothing but this file; each name below is imported when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flexlam_fast import errors as errors
    from flexlam_fast import ops as ops
    from flexlam_fast.accelerate import accelerate as accelerate
    from flexlam_fast.config import FlexLAMConfig as FlexLAMConfig
    from flexlam_fast.errors import FlexLAMError as FlexLAMError
    from flexlam_fast.lam import LatentActionModel as LatentActionModel
    from flexlam_fast.policy import Policy as Policy
    from flexlam_fast.ranges import set_ranges as set_ranges
    from flexlam_fast.sequence.model import SequenceModel as SequenceModel
    from flexlam_fast.translator import Translator as Translator
    from flexlam_fast.types import Actions as Actions
    from flexlam_fast.types import Decision as Decision

__version__ = "0.1.0"

_HOMES = {
    "Actions": "types",
    "Decision": "types",
    "FlexLAMConfig": "config",
    "FlexLAMError": "errors",
    "LatentActionModel": "lam",
    "Policy": "policy",
    "SequenceModel": "sequence.model",
    "Translator": "translator",
    "accelerate": "accelerate",
    "errors": "errors",
    "ops": "ops",
    "set_ranges": "ranges",
}

__all__ = [
    "Actions",
    "Decision",
    "FlexLAMConfig",
    "FlexLAMError",
    "LatentActionModel",
    "Policy",
    "SequenceModel",
    "Translator",
    "__version__",
    "accelerate",
    "errors",
    "ops",
    "set_ranges",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f"{__name__}.{_HOMES[name]}")
    value = module if name in ("errors", "ops") else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
