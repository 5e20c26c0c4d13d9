"""Accelerate: let a model that exists run its parts through this package, without a change to its code.

Three classes are recognised: ``vector_quantize_pytorch.FSQ``, ``transformers`` ``Qwen3ForCausalLM``, and this package's
own ``Bottleneck``. An object keeps its identity, parameters, buffers, hooks and state dict: what changes is its class,
to a subclass with another ``forward`` or ``generate``.
"""

from __future__ import annotations

import sys
import types
from itertools import chain
from typing import NamedTuple

import torch
from torch import nn

from flexlam_fast import accelerate_fsq, accelerate_qwen
from flexlam_fast.backend import AUTO, BackendChoice, choose
from flexlam_fast.bottleneck import Bottleneck
from flexlam_fast.checks import describe
from flexlam_fast.errors import InputError
from flexlam_fast.swapped import Change, Swapped, noted

_FOREIGN = (accelerate_fsq, accelerate_qwen)  # the classes of others, a file each


class Part(NamedTuple):
    """One recognised module: where it is, its class, the backend it runs on now (None: not swapped), and why."""

    path: str
    kind: str
    backend: str | None
    reason: str


class Acceleration:
    """What :func:`accelerate` did; ``str()`` of it is for people. As a context manager it undoes itself at the end.

    What was swapped asks at every call whether it still computes what the original does, and takes the original's own
    method where it does not. ``str()`` has a line for each that would do so now (``paused``) or has done so in a call
    (``earlier``), with the reason.

    Attributes:
        swapped: the modules that run through this package now, in the order of ``named_modules()``.
        left: those that were recognised and left as they are, each with one sentence why.
    """

    def __init__(self, root: str, swapped: list[Part], left: list[Part], changes: list[Change]) -> None:
        self.swapped, self.left = tuple(swapped), tuple(left)
        self._root, self._changes = root, changes
        self._modules = [change.module for change in changes]

    def paused(self) -> dict[str, str]:
        """Which of the swapped modules, by path, a call would find on the original's own method now, each with why."""
        found = {part.path: _obstacle(module) for part, module in zip(self.swapped, self._modules, strict=False)}
        return {path: why for path, why in found.items() if why is not None}

    def undo(self) -> None:
        """Make every swapped module what it was; a second call does nothing.

        A module whose class or backend somebody else has changed since is left as it is.
        """
        while self._changes:
            module, name, before, after = self._changes.pop()
            if getattr(module, name) == after:
                setattr(module, name, before)
        self._modules = []  # nothing is swapped any more, and nothing is kept

    def __enter__(self) -> Acceleration:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()

    def __str__(self) -> str:
        if not self.swapped and not self.left:
            return f"accelerate: found no FSQ, Qwen3ForCausalLM or Bottleneck in {self._root}"
        lines = [f"accelerate: {len(self.swapped)} swapped, {len(self.left)} left"]
        wide = max(len(part.path or self._root) for part in (*self.swapped, *self.left))
        for verb, parts in (("swapped", self.swapped), ("left", self.left)):
            for path, kind, backend, reason in parts:
                lines.append(f"  {verb:<7}  {path or self._root:<{wide}}  {kind}: {backend or reason}")
        lines += self._on_the_original(wide)
        why = dict.fromkeys((part.backend, part.reason) for part in self.swapped)
        return "\n".join([*lines, *(f"  {backend}: {reason}" for backend, reason in why)])

    def _on_the_original(self, wide: int) -> list[str]:
        """A line for every swapped module that the original would answer for now, or has answered for."""
        paused, lines = self.paused(), []
        for (path, kind, *_), module in zip(self.swapped, self._modules, strict=False):
            now, earlier = paused.get(path), noted(module)
            verb, why = ("paused", now) if now else ("earlier", f"a call went to the original: {earlier}")
            if now or earlier:
                lines.append(f"  {verb:<7}  {path or self._root:<{wide}}  {kind}: {why}")
        return lines

    __repr__ = __str__  # a prompt shows it without a print


def accelerate(module: nn.Module, backend: str = AUTO) -> Acceleration:
    """Swap what is recognised in ``module``, the root included, to run through this package.

    Results stay what they were. Of a quantizer, codes are equal, and so are values, shapes and dtypes; gradients agree
    within fp32 rounding. Of a Qwen3, greedy ``generate`` gives the same tokens, unless two logits are as close as
    rounding. What computes another function is left, and what is changed later is obeyed, be it an option, a weight, or
    a function that somebody replaces in the original's library: that call takes the original's own method, as it does
    where something of torch has to see the original's operations. What ``torch.compile`` has compiled sees such changes
    by its guards, but not other numbers in a quantizer's buffers. What is swapped is pickled as the original class.

    Args:
        module: any module; it is changed in place.
        backend: ``"auto"`` takes for every part the fastest that works on its device, or a name, which is then taken
            or refused.

    Returns:
        What was swapped and what was left and why; ``.undo()`` takes it back. Nothing recognised is no error.

    Raises:
        InputError: ``module`` is no ``nn.Module``.
        BackendError: a backend asked for by name that cannot run here; nothing has been swapped then.
    """
    if not isinstance(module, nn.Module):
        raise InputError(f"module: expected an nn.Module, got {describe(module)}")
    root = f"the {type(module).__name__} itself"
    swapped: list[Part] = []
    left: list[Part] = []
    changes: list[Change] = []
    kinds = [Bottleneck, *(kind for foreign in _FOREIGN if (kind := foreign.kind()))]
    for path, part in module.named_modules():
        kind = next((kind for kind in kinds if isinstance(part, kind)), None)
        if kind is None:
            continue
        choice, change = _decide(part, kind, backend)
        if isinstance(change, str):
            left.append(Part(path, kind.__name__, None, change))
        else:
            swapped.append(Part(path, kind.__name__, *choice))
            changes.append(change)
    if not swapped and not left:
        choose(backend, _device(module))  # a name that cannot run is refused here too
    for part, name, _before, after in changes:  # only now, so that an error above has changed nothing
        setattr(part, name, after)
    return Acceleration(root, swapped, left, changes)


def _decide(part: nn.Module, kind: type[nn.Module], backend: str) -> tuple[BackendChoice, Change | str]:
    """The backend for ``part``, and what to change, or in one sentence why nothing is changed."""
    device = _device(part)
    choice = choose(backend, device)
    if isinstance(part, Swapped):
        now = part.plan.backend
        return choice, f"already accelerated, on {now}{'' if now == choice.name else '; undo that first to change it'}"
    if type(part) is not kind:
        return choice, f"{type(part).__name__} is a subclass of {kind.__name__} and may compute something else"
    if device.type == "meta":
        return choice, "it is on the meta device; accelerate it once its numbers are loaded"
    if isinstance(part, Bottleneck):
        choice = accelerate_fsq.narrow(choice, part.levels, device, backend)
        if part.backend == choice.name:
            return choice, f"already accelerated, on {choice.name}"
        # auto stays auto: kernels asked for by name have no rule for torch.func's transforms, auto has the reference
        return choice, Change(part, "backend", part.backend, backend)
    foreign = next(foreign for foreign in _FOREIGN if foreign.kind() is kind)
    return foreign.swap(part, kind, backend, choice)


def _obstacle(module: nn.Module) -> str | None:
    """Why a call of a module that was swapped would take the original's own method now, or None."""
    if isinstance(module, Swapped):
        return module.obstacle(module)
    return None if isinstance(module, Bottleneck) else f"its class is {type(module).__name__} now"


def _device(module: nn.Module) -> torch.device:
    return next(chain(module.parameters(), module.buffers()), torch.empty(0)).device


class _Callable(types.ModuleType):
    """Python names a loaded submodule in its package: this keeps ``ff.accelerate(model)`` a call even then."""

    def __call__(self, module: nn.Module, backend: str = AUTO) -> Acceleration:
        return accelerate(module, backend)


sys.modules[__name__].__class__ = _Callable
