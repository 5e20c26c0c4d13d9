"""Accelerate: let a model that exists run its quantizers through this package, without a change to its code.

Two classes are recognised: ``vector_quantize_pytorch.FSQ`` and this package's own ``Bottleneck``. An FSQ keeps its
identity, parameters, buffers, hooks and state dict: what changes is its class, to a subclass with another ``forward``.
"""

from __future__ import annotations

import copy
import inspect
import math
import sys
import types
from functools import cache
from itertools import chain
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from flexlam_fast import ops
from flexlam_fast.backend import AUTO, REFERENCE, BackendChoice, choose
from flexlam_fast.bottleneck import Bottleneck
from flexlam_fast.checks import describe
from flexlam_fast.errors import BackendError, InputError

# An FSQ can only exist where this module is loaded already, so it is looked up and never imported.
_HOME = "vector_quantize_pytorch.finite_scalar_quantization"
#: Options that make another function of an FSQ, and what each of them does.
_FOREIGN = {
    "preserve_symmetry": "rounds to other values",
    "noise_dropout": "adds random offsets in training",
    "bound_hard_clamp": "bounds by a clamp in place of tanh",
    "orthogonal_rotation": "rotates latents before and after rounding",
}
_LAYOUT = ("dim", "num_codebooks", "keep_num_codebooks_dim", "channel_first", "return_indices")
_HARMLESS = ("self", "levels", "scale", "projection_has_bias", "allowed_dtypes", "force_quantization_f32")
_NEEDED = (*_LAYOUT, "_levels", "codebook_dim", "project_in", "project_out", "quantize", "codes_to_indices")
_METHODS = frozenset({"forward", "quantize", "bound", "codes_to_indices", "_scale_and_shift", "maybe_apply_noise"})
_MOST_CODES = 2**20  # above, the original's fp32 has too few bits left to be sure of a code's last one
#: Dtypes for which the original rounds in fp32; it rounds float64 in float64, which no op here does.
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)

_Change = tuple[nn.Module, str, Any, Any]  # an attribute of a module, its value before and after


class Part(NamedTuple):
    """One recognised module: where it is, its class, the backend it runs on now (None: not swapped), and why."""

    path: str
    kind: str
    backend: str | None
    reason: str


class _Plan(NamedTuple):
    original: type[nn.Module]
    levels: tuple[int, ...]
    asked: str  # what every call asks the op for: with ``auto``, a module that moves to another device goes on there
    backend: str  # what that was when it was swapped


class Acceleration:
    """What :func:`accelerate` did; ``str()`` of it is for people. As a context manager it undoes itself at the end.

    Attributes:
        swapped: the modules that run through ``ops.fsq`` now, in the order of ``named_modules()``.
        left: those that were recognised and left as they are, each with one sentence why.
    """

    def __init__(self, root: str, swapped: list[Part], left: list[Part], changes: list[_Change]) -> None:
        self.swapped, self.left = tuple(swapped), tuple(left)
        self._root, self._changes = root, changes

    def undo(self) -> None:
        """Make every swapped module what it was; a second call does nothing.

        A module whose class or backend somebody else has changed since is left as it is.
        """
        while self._changes:
            module, name, before, after = self._changes.pop()
            if getattr(module, name) == after:
                setattr(module, name, before)

    def __enter__(self) -> Acceleration:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()

    def __str__(self) -> str:
        if not self.swapped and not self.left:
            return f"accelerate: found neither an FSQ of vector_quantize_pytorch nor a Bottleneck in {self._root}"
        lines = [f"accelerate: {len(self.swapped)} swapped, {len(self.left)} left"]
        wide = max(len(part.path or self._root) for part in (*self.swapped, *self.left))
        for verb, parts in (("swapped", self.swapped), ("left", self.left)):
            for path, kind, backend, reason in parts:
                lines.append(f"  {verb:<7}  {path or self._root:<{wide}}  {kind}: {backend or reason}")
        why = {part.backend: part.reason for part in self.swapped}
        return "\n".join([*lines, *(f"  {backend}: {reason}" for backend, reason in why.items())])

    __repr__ = __str__  # a prompt shows it without a print


def accelerate(module: nn.Module, backend: str = AUTO) -> Acceleration:
    """Swap the quantizers in ``module``, the root included, to run through ``flexlam_fast.ops.fsq``.

    Results stay what they were: codes are equal, and so are values, shapes and dtypes; gradients agree within fp32
    rounding. What computes another function is left, and an option that is changed later is obeyed: that call takes
    the original's own ``forward``. An accelerated FSQ is pickled as the original class.

    Args:
        module: any module; it is changed in place.
        backend: ``"auto"`` takes for every quantizer the fastest that works on its device, or a name, which is then
            taken or refused.

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
    changes: list[_Change] = []
    kinds = [Bottleneck, getattr(sys.modules.get(_HOME), "FSQ", Bottleneck)]
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


def _decide(part: nn.Module, kind: type[nn.Module], backend: str) -> tuple[BackendChoice, _Change | str]:
    """The backend for ``part``, and what to change, or in one sentence why nothing is changed."""
    device = _device(part)
    choice = choose(backend, device)
    if isinstance(part, _AcceleratedFSQ):
        now = part.plan.backend
        return choice, f"already accelerated, on {now}{'' if now == choice.name else '; undo that first to change it'}"
    if type(part) is not kind:
        return choice, f"{type(part).__name__} is a subclass of {kind.__name__} and may compute something else"
    if device.type == "meta":
        return choice, "it is on the meta device; accelerate it once its numbers are loaded"
    if isinstance(part, Bottleneck):
        choice = _narrow(choice, part.levels, device, backend)
        if part.backend == choice.name:
            return choice, f"already accelerated, on {choice.name}"
        return choice, (part, "backend", part.backend, choice.name)
    unlike = _strange(part, kind)
    if unlike is None:
        levels = tuple(part._levels.tolist())  # type: ignore[operator]
        unlike = _obstacle(part, levels)
    if unlike is None:
        choice = _narrow(choice, levels, device, backend)
        unlike = _mismatch(part, levels, choice.name)
    if unlike is not None:
        return choice, unlike
    return choice, (part, "__class__", kind, _accelerated(_Plan(kind, levels, backend, choice.name)))


@torch.no_grad()
def _narrow(choice: BackendChoice, levels: tuple[int, ...], device: torch.device, backend: str) -> BackendChoice:
    """``choice``, or the reference where ``auto`` chose kernels that do not take these levels."""
    try:
        ops.fsq(torch.zeros(1, 1, len(levels)).to(device, torch.float32), levels, backend=choice.name)
    except BackendError as error:
        if backend != AUTO:
            raise
        return BackendChoice(REFERENCE, str(error))
    return choice


def _device(module: nn.Module) -> torch.device:
    return next(chain(module.parameters(), module.buffers()), torch.empty(0)).device


def _strange(fsq: Any, kind: type[nn.Module]) -> str | None:
    """What an FSQ of this version has, or lacks, that this file does not know."""
    lacking = [name for name in _NEEDED if not hasattr(fsq, name)]
    if lacking:
        return f"this version of vector_quantize_pytorch has an FSQ without {', '.join(lacking)}"
    for name, option in inspect.signature(kind.__init__).parameters.items():
        known = name in (*_LAYOUT, *_HARMLESS, *_FOREIGN)
        if not known and getattr(fsq, name, fsq) not in (option.default,):
            return f"{name} is an option of a newer vector_quantize_pytorch that is not known here"
    return None


def _obstacle(fsq: Any, levels: tuple[int, ...]) -> str | None:
    """Why ``fsq`` does not compute what ``ops.fsq`` does, or None. Every call asks again: options can be assigned."""
    for name, effect in _FOREIGN.items():
        value = getattr(fsq, name, False)  # 1.22 has fewer options
        if value:
            return f"{name} is {value}, which {effect}"
    if not _METHODS.isdisjoint(fsq.__dict__):
        return f"its {', '.join(sorted(_METHODS & fsq.__dict__.keys()))} was replaced on the object"
    if fsq.num_codebooks > 1 and not fsq.keep_num_codebooks_dim:
        return f"keep_num_codebooks_dim is False with {fsq.num_codebooks} codebooks"
    if min(levels) < 2:
        return f"levels are {list(levels)}, and a level below 2 holds no code"
    if torch.get_default_dtype() != torch.float32:
        return f"it forms its constants in torch's default dtype, which is {torch.get_default_dtype()} now"
    size, most = math.prod(levels), _MOST_CODES if fsq.return_indices else 2**31 - 1
    if size > most:
        return f"it has {size} codes, more than {most}, up to which they can be counted exactly"
    return None


@torch.no_grad()
def _mismatch(fsq: Any, levels: tuple[int, ...], backend: str) -> str | None:
    """Try the formulas of the installed version: other releases may round or count codes in another way."""
    device = fsq._levels.device
    z = torch.linspace(-2.9, 3.1, 61, device=device).view(1, 61, 1) + 0.07 * torch.arange(len(levels), device=device)
    if not torch.allclose(fsq.quantize(z).float(), ops.fsq(z, levels, backend=backend)[0], rtol=0, atol=1e-6):
        return "quantize() of this version gives other values than the formula of FSQ"
    every = torch.arange(math.prod(levels) if fsq.return_indices else 0, dtype=torch.int32, device=device)
    if not torch.equal(fsq.codes_to_indices(ops.codes_to_latents(every, levels, backend=backend)), every):
        return "codes_to_indices() of this version gives other codes than the formula of FSQ"
    return None


class _AcceleratedFSQ(nn.Module):
    """What takes the place of an FSQ's ``forward``; stands in front of the FSQ among the bases of :func:`_accelerated`.

    All it knows on top is a class attribute, so that the object itself holds nothing new.
    """

    plan: ClassVar[_Plan]

    def forward(self: Any, z: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """Latents in, quantized latents and int32 codes out, in the shapes of the original."""
        if args or kwargs or not self._fits(z):
            return super().forward(z, *args, **kwargs)
        moved = z.ndim >= 4 or self.channel_first
        places = (z.shape[0], *z.shape[2:])
        if moved:
            z = z.movedim(1, -1).flatten(1, -2).contiguous()  # einops packs them, and the result's layout follows
        z = self.project_in(z).unflatten(-1, (self.num_codebooks, self.codebook_dim))
        latents, codes = ops.fsq(z, self.plan.levels, backend=self.plan.asked)
        if latents.stride() != z.stride():
            # arithmetic keeps the layout of its input, and a view() of the original's result may rely on that
            latents = torch.empty_like(z).copy_(latents)
        out = self.project_out(latents.flatten(-2))
        if moved:
            out = out.reshape(*places, out.shape[-1]).movedim(-1, 1)
            codes = codes.reshape(*places, self.num_codebooks)
        if not self.return_indices:
            return out, None
        return out, codes if self.keep_num_codebooks_dim else codes.squeeze(-1)

    def _fits(self: Any, z: Tensor) -> bool:
        """Whether this call is plain FSQ in fp32; all others, wrong shapes among them, are the original's to answer."""
        if not isinstance(z, Tensor) or z.ndim < 3 or z.dtype not in _FLOATS:
            return False
        channel = 1 if z.ndim >= 4 or self.channel_first else -1
        return _obstacle(self, self.plan.levels) is None and z.shape[channel] == self.dim

    def __reduce_ex__(self, protocol: Any) -> Any:
        # As the original class, so that whoever loads it needs no flexlam_fast. The form of protocol 1 goes with every
        # protocol; that of the later ones is refused for a class that is not the object's own.
        how: Any = super().__reduce_ex__(1)
        return how[0], tuple(self.plan.original if arg is type(self) else arg for arg in how[1]), *how[2:]

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
        twin = memo[id(self)] = self.__class__.__new__(self.__class__)  # a copy in this process stays accelerated
        twin.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return twin


@cache
def _accelerated(plan: _Plan) -> type[nn.Module]:
    """The subclass of the original FSQ for ``plan``; one for every plan, so that equal plans are equal classes."""
    return type("AcceleratedFSQ", (_AcceleratedFSQ, plan.original), {"plan": plan, "__module__": __name__})


class _Callable(types.ModuleType):
    """Python names a loaded submodule in its package: this keeps ``ff.accelerate(model)`` a call even then."""

    def __call__(self, module: nn.Module, backend: str = AUTO) -> Acceleration:
        return accelerate(module, backend)


sys.modules[__name__].__class__ = _Callable
