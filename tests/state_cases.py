"""States that torch can be in around a call, as context managers; shared by the tests of ``ff.accelerate``."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextlib.contextmanager
def default_device(device: str) -> Iterator[None]:
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


class Functions(TorchFunctionMode):
    """Sees every function."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class Operations(TorchDispatchMode):
    """Sees every operation."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


State = Callable[[], contextlib.AbstractContextManager[Any]]
#: In these the package runs a quantizer, because its results are the original's.
RUN: dict[str, State] = {
    "nothing": contextlib.nullcontext,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "autocast off": lambda: torch.autocast("cpu", enabled=False),
    "inference mode": torch.inference_mode,
    "no_grad": torch.no_grad,
    "default device": lambda: default_device("meta"),
    "device context": lambda: torch.device("meta"),
    "deterministic": deterministic,
}
#: In these the original does, and the word that names the reason.
LEFT: dict[str, tuple[State, str]] = {
    "float64": (lambda: default_dtype(torch.float64), "torch.float64"),
    "bfloat16": (lambda: default_dtype(torch.bfloat16), "torch.bfloat16"),
    "function mode": (Functions, "Functions is on"),
    "dispatch mode": (Operations, "Operations is on"),
    "flop counter": (lambda: FlopCounterMode(display=False), "FlopCounterMode is on"),
}


@contextlib.contextmanager
def replaced(holder: Any, name: str, value: Any) -> Iterator[None]:
    """Put ``value`` in the place of an attribute of a class or module, or of an entry of a table, for a while."""
    table = hasattr(type(holder), "__setitem__")
    had = name in (holder if table else vars(holder))
    old = (holder[name] if table else getattr(holder, name)) if had else None
    put = holder.__setitem__ if table else lambda n, v: setattr(holder, n, v)
    put(name, value)
    try:
        yield
    finally:
        if had:
            put(name, old)
        elif table:
            del holder[name]
        else:
            delattr(holder, name)


def halved(old: Callable[..., Any]) -> Callable[..., Any]:
    """``old``, whose results are halved if they are numbers in tensors."""

    def half(*args: Any, **kwargs: Any) -> Any:
        out = old(*args, **kwargs)
        return tuple(map(halve, out)) if isinstance(out, tuple) else halve(out)

    def halve(out: Any) -> Any:
        if not isinstance(out, torch.Tensor) or out.dtype == torch.bool:
            return out
        return out * 0.5 if out.is_floating_point() else out // 2

    return half
