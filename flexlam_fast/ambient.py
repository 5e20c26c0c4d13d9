"""Calls that give the same whatever torch is set to around them: autocast, inference mode, default dtype and device.

Arithmetic here has the dtypes that its arguments and modules have, so ops leave autocast at their border. Entries that
keep state (a policy's sessions, its weights) leave inference mode and a default device too, and cannot be traced or
transformed: their state would change once, at the trace, and never again.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, TypeVar

import torch

from flexlam_fast.errors import InputError

P = ParamSpec("P")
R = TypeVar("R")

_any_autocast = torch._C._is_any_autocast_enabled
_transform = torch._C._functorch.peek_interpreter_stack
_CPU = torch.device("cpu")
_KINDS = ("cpu", "cuda")  # of devices that this package computes on


def outside_autocast(op: Callable[P, R]) -> Callable[P, R]:
    """``op`` with autocast off on every kind of device: its dtypes are those of its arguments."""

    @functools.wraps(op)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if not _any_autocast():
            return op(*args, **kwargs)
        if torch.compiler.is_compiling():  # which knows the context manager and no setter
            for kind in _KINDS:
                if torch.is_autocast_enabled(kind):
                    with torch.autocast(kind, enabled=False):
                        return call(*args, **kwargs)
            return op(*args, **kwargs)
        with no_autocast():
            return op(*args, **kwargs)

    return call


class no_autocast:  # a context manager, as torch.no_grad; a class, because torch.autocast costs 8 us to enter
    """Within it, autocast is off on every kind of device."""

    def __enter__(self) -> None:
        self.kinds = [kind for kind in _KINDS if torch.is_autocast_enabled(kind)]
        for kind in self.kinds:
            torch.set_autocast_enabled(kind, False)

    def __exit__(self, *_: object) -> None:
        for kind in self.kinds:
            torch.set_autocast_enabled(kind, True)


def isolated(entry: Callable[P, R]) -> Callable[P, R]:
    """``entry``, which keeps state or calls compiled code, outside autocast, inference mode and default devices.

    Raises:
        InputError: a call inside ``torch.jit.trace`` or a transform of ``torch.func``. ``torch.compile`` leaves the
            call as it is.
    """

    @functools.wraps(entry)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch._C._is_tracing() or _transform() is not None:
            where = "torch.jit.trace" if torch._C._is_tracing() else "a transform of torch.func"
            expected = "a call outside torch.jit.trace and torch.func"
            raise InputError(f"{entry.__qualname__}: expected {expected}, got one inside {where}")
        with _plain():
            return entry(*args, **kwargs)

    _never_compile(call)
    return call


def _never_compile(function: Any) -> None:
    """What ``torch.compiler.disable`` does, which imports the compiler and with it a second of waiting."""
    function._torchdynamo_disable = True  # a call is not inlined
    frames = torch._C._dynamo.eval_frame
    skip = frames._FrameAction.SKIP  # nor is the function compiled by itself, nor what it calls
    frames.set_code_exec_strategy(function.__code__, frames._FrameExecStrategy(skip, skip))


@contextlib.contextmanager
def fp32_by_default() -> Iterator[None]:
    """Within it, torch's default dtype is fp32, for building modules. It is one of the process, not of the thread."""
    before = torch.get_default_dtype()
    if before == torch.float32:
        yield
        return
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def _plain() -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        if _any_autocast():
            stack.enter_context(no_autocast())
        if torch.is_inference_mode_enabled():
            # leaving inference mode turns gradients on; where there were none, there are none
            grad = torch.is_grad_enabled()
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.set_grad_enabled(grad))
        if torch.get_default_device() != _CPU:
            stack.enter_context(_CPU)
        yield
