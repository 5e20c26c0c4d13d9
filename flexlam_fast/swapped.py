"""The class that :mod:`flexlam_fast.accelerate` gives to an object of somebody else's, and what it changes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from flexlam_fast.originals import Watch

is_compiling, _is_exporting = torch.compiler.is_compiling, torch.compiler.is_exporting
_tracing, _transform = torch._C._get_tracing_state, torch._C._functorch.peek_interpreter_stack
_count_modes, _count_function_modes = torch._C._len_torch_dispatch_stack, torch._C._len_torch_function_stack
_PLAIN = frozenset((Tensor, nn.Parameter))
#: Why the original answered a call of a swapped module, the last time that it did.
_notes: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()


class Change(NamedTuple):
    """An attribute of a module, and its value before and after."""

    module: nn.Module
    name: str
    before: Any
    after: Any


class Plan(NamedTuple):
    """What a swapped class knows.

    ``asked`` is the backend that every call asks for: with ``auto``, a module that moves to another device goes on
    there. ``backend`` is what that was when it was swapped. ``watch`` notices when somebody replaces functions of the
    original's library. ``levels`` are those of a quantizer, and ``values`` what ``options`` found in its attributes.
    """

    original: type[nn.Module]
    asked: str
    backend: str
    watch: Watch = Watch(list, ())
    levels: tuple[int, ...] = ()
    options: Callable[[Any], Any] = id
    values: Any = None


class Swapped(nn.Module):
    """Stands in front of the original among the bases of a swapped class, with methods that take their place.

    All it knows on top is a class attribute, so that the object itself holds nothing new.
    """

    plan: ClassVar[Plan]

    @staticmethod
    def obstacle(module: Any) -> str | None:
        """Why a call of a swapped ``module`` would take the original's own method now, or None."""
        raise NotImplementedError

    def __reduce_ex__(self, protocol: Any) -> Any:
        # As the original class, so that whoever loads it needs no flexlam_fast. The form of protocol 1 goes with every
        # protocol; that of the later ones is refused for a class that is not the object's own.
        how: Any = super().__reduce_ex__(1)
        return how[0], tuple(self.plan.original if arg is type(self) else arg for arg in how[1]), *how[2:]

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
        twin = memo[id(self)] = self.__class__.__new__(self.__class__)  # a copy in this process stays accelerated
        twin.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return twin


def is_plain(value: Any) -> bool:
    """Whether ``value`` is a tensor and of no subclass, which may have operations of its own."""
    return type(value) in _PLAIN


def is_direct() -> bool:
    """Whether there is no :func:`interceptor`, outside of ``torch.compile``; True is certain, and False is not."""
    return (
        _tracing() is None
        and _transform() is None
        and forward_ad._current_level < 0
        and not _count_modes()
        and (not _count_function_modes() or not _function_modes())
    )


def interceptor() -> str | None:
    """What records, counts or transforms torch's operations now, in one sentence, or None.

    It has to see those of the original: kernels of ours are called past it. ``torch.compile`` is none, because it takes
    our ops into its graph. A look costs 0.3 us.
    """
    if is_compiling():
        return "torch.export records the call" if _is_exporting() else None
    if _tracing() is not None:
        return "torch.jit.trace records the call"
    if _transform() is not None:
        return "a transform of torch.func is applied to the call"
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation is on"
    if _count_modes():
        return f"{type(_get_current_dispatch_mode_stack()[-1]).__name__} is on and has to see every operation"
    if _count_function_modes():
        modes = _function_modes()
        if modes:
            return f"{type(modes[-1]).__name__} is on and has to see every function"
    return None


def _function_modes() -> list[Any]:
    """Modes that see every function of torch; a default device is one too, and of no matter for results here."""
    return [mode for mode in _get_current_function_mode_stack() if not isinstance(mode, DeviceContext)]


def note(module: nn.Module, why: str) -> None:
    """Remember why the original answered a call of ``module``; what is traced is no call, and leaves no note."""
    if not is_compiling():
        _notes[module] = why


def noted(module: nn.Module) -> str | None:
    """Why the original answered a call of ``module`` the last time, or None where it never did."""
    return _notes.get(module)
