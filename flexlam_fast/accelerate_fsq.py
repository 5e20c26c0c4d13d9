"""What :mod:`flexlam_fast.accelerate` does for ``vector_quantize_pytorch.FSQ``: the same results through ``ops.fsq``.

An FSQ keeps its identity, parameters, buffers, hooks and state dict: what changes is its class, to a subclass with
another ``forward``.
"""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from operator import itemgetter
from typing import Any, NamedTuple
from weakref import ref

import torch
from torch import Tensor, nn

from flexlam_fast import ops
from flexlam_fast.backend import AUTO, REFERENCE, BackendChoice
from flexlam_fast.errors import BackendError
from flexlam_fast.originals import Watch, reachable
from flexlam_fast.provenance import Place
from flexlam_fast.swapped import Change, Plan, Swapped, interceptor, is_compiling, is_direct, is_plain, note

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
_PACKAGES = ("vector_quantize_pytorch", "einops", "einx", "torch")
_NAME = "AcceleratedFSQ"
_MOST_CODES = 2**20  # above, the original's fp32 has too few bits left to be sure of a code's last one
#: Dtypes for which the original rounds in fp32; it rounds float64 in float64, which no op here does.
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_FP32 = torch.float32


def kind() -> type[nn.Module] | None:
    """The class ``FSQ``, or None where nobody has imported it."""
    return getattr(sys.modules.get(_HOME), "FSQ", None)


def swap(fsq: nn.Module, kind: Any, asked: str, choice: BackendChoice) -> tuple[BackendChoice, Change | str]:
    """The backend for ``fsq``, an FSQ and no subclass, and what to change, or why nothing is changed.

    Raises:
        BackendError: one asked for by name does not take its levels.
    """
    watch, unlike = _watch_of(kind), interceptor() or _strange(fsq, kind)
    if unlike is None:
        levels = tuple(fsq._levels.tolist())  # type: ignore[operator]
        unlike = _option(fsq, levels) or watch.replaced() or _other_levels(fsq, levels)
    if unlike is None:
        choice = narrow(choice, levels, fsq._levels.device, asked)  # type: ignore[arg-type]
        unlike = _mismatch(fsq, levels, choice.name)
    if unlike is not None:
        return choice, unlike
    options = _getter(tuple(name for name in (*_FOREIGN, *_LAYOUT) if name in vars(fsq)))
    plan = Plan(kind, asked, choice.name, watch, levels, options, options(vars(fsq)))
    return choice, Change(fsq, "__class__", kind, _accelerated(plan))


def obstacle(fsq: Any) -> str | None:
    """Why a call of ``fsq``, which was swapped, would take the original's ``forward`` now, or None."""
    if is_compiling():
        return interceptor() or _obstacle_compiled(fsq, fsq.plan)
    plan = vars(type(fsq)).get("plan")
    if plan is None:
        return _subclassed(fsq)
    if _is_unchanged(fsq, plan):
        return None
    why = interceptor() or _option(fsq, plan.levels) or plan.watch.replaced()
    return why or _other_levels(fsq, plan.levels)


def _is_unchanged(fsq: Any, plan: Plan) -> bool:
    """Whether nothing at all has changed since ``fsq`` was swapped: what every call asks, in 2 us."""
    state = fsq.__dict__
    return (
        is_direct()
        and plan.options(state) == plan.values
        and state.keys().isdisjoint(_METHODS)
        and torch.get_default_dtype() is _FP32
        and plan.watch.is_same()
        and _has_levels(state["_buffers"], plan.levels)
    )


def _obstacle_compiled(fsq: Any, plan: Plan) -> str | None:
    """:func:`obstacle` as ``torch.compile`` can trace it; it guards what is read here, but for numbers in buffers."""
    if type(fsq).__name__ != _NAME:
        return _subclassed(fsq)
    for holder, name, value in plan.watch.pairs:
        if getattr(holder, name) is not value:
            return f"{name} was replaced"
    return _option(fsq, plan.levels)


def _subclassed(fsq: Any) -> str:
    return f"its class is {type(fsq).__name__} now, which may compute something else"


@torch.no_grad()
def narrow(choice: BackendChoice, levels: tuple[int, ...], device: torch.device, backend: str) -> BackendChoice:
    """``choice``, or the reference where ``auto`` chose kernels that do not take these levels."""
    try:
        ops.fsq(torch.zeros(1, 1, len(levels), dtype=_FP32, device=device), levels, backend=choice.name)
    except BackendError as error:
        if backend != AUTO:
            raise
        return BackendChoice(REFERENCE, str(error))
    return choice


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


def _option(fsq: Any, levels: tuple[int, ...]) -> str | None:
    """Which option makes another function of ``fsq``, or None; options can be assigned at any time."""
    for name, effect in _FOREIGN.items():
        value = getattr(fsq, name, False)  # 1.22 has fewer options
        if value:
            return f"{name} is {value}, which {effect}"
    own = [name for name in sorted(_METHODS) if name in fsq.__dict__]  # torch 2.11 traces no set operation with it
    if own:
        return f"its {', '.join(own)} was replaced on the object"
    if fsq.num_codebooks > 1 and not fsq.keep_num_codebooks_dim:
        return f"keep_num_codebooks_dim is False with {fsq.num_codebooks} codebooks"
    if min(levels) < 2:
        return f"levels are {list(levels)}, and a level below 2 holds no code"
    if torch.get_default_dtype() != _FP32:
        return f"it forms its constants in torch's default dtype, which is {torch.get_default_dtype()} now"
    size, most = math.prod(levels), _MOST_CODES if fsq.return_indices else 2**31 - 1
    if size > most:
        return f"it has {size} codes, more than {most}, up to which they can be counted exactly"
    return None


@cache
def _watch_of(kind: Any) -> Watch:
    """Watches what the original's ``forward`` calls."""
    roots = [Place(kind, name) for name in sorted(_METHODS) if hasattr(kind, name)]
    return Watch(lambda: reachable(roots, [_HOME]), _PACKAGES)


@cache
def _getter(names: tuple[str, ...]) -> Callable[[Any], Any]:
    return itemgetter(*names)


class _Read(NamedTuple):
    """Buffers that have been read: the levels, the basis beside them, and the versions of both (None: not counted)."""

    tensor: ref[Tensor]
    basis: ref[Tensor]
    versions: tuple[int, int] | None
    levels: tuple[int, ...]


#: What has been read, by the ids of the buffers of levels.
_known: dict[int, _Read] = {}


def _has_levels(buffers: dict[str, Any], levels: tuple[int, ...]) -> bool:
    """Whether the buffers are known to hold these levels."""
    tensor, basis = buffers.get("_levels"), buffers.get("_basis")
    known = _known.get(id(tensor))
    if known is None or known[0]() is not tensor or known[1]() is not basis or known[3] != levels:
        return False
    return known[2] is None or known[2] == (tensor._version, basis._version)  # type: ignore[union-attr]


def _other_levels(fsq: Any, levels: tuple[int, ...]) -> str | None:
    """Whether somebody has put other numbers into its buffers; a GPU is asked once for each tensor."""
    if _has_levels(fsq._buffers, levels):
        return None
    tensors = [fsq._buffers.get(name) for name in ("_levels", "_basis")]
    expected = levels, tuple(math.prod(levels[:i]) for i in range(len(levels)))
    for name, tensor, numbers in zip(("_levels", "_basis"), tensors, expected, strict=True):
        if tensor is None or (not tensor.is_meta and tuple(tensor.tolist()) != numbers):
            return f"its {name} was changed"
    counted = not any(tensor.is_inference() for tensor in tensors)
    if counted or not tensors[0].is_cpu:  # those of inference mode count no versions, and a CPU may look every time
        (tensor, basis), key = tensors, id(tensors[0])
        versions = (tensor._version, basis._version) if counted else None
        _known[key] = _Read(ref(tensor, lambda _: _known.pop(key, None)), ref(basis), versions, levels)
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


class _AcceleratedFSQ(Swapped):
    """What takes the place of an FSQ's ``forward``."""

    @staticmethod
    def obstacle(module: Any) -> str | None:
        """As :func:`obstacle`."""
        return obstacle(module)

    def forward(self: Any, z: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """Latents in, quantized latents and int32 codes out, in the shapes of the original."""
        plan = getattr(type(self), "plan", None)
        if plan is None:  # somebody has held this method since before an undo
            return type(self).forward(self, z, *args, **kwargs)
        why = "it is called with further arguments" if args or kwargs else obstacle(self) or _misfit(self, z)
        if why is not None:
            note(self, why)
            return plan.original.forward(self, z, *args, **kwargs)
        moved = z.ndim >= 4 or self.channel_first
        if moved:
            places = z.shape[0], *z.shape[2:]
            z = z.movedim(1, -1).flatten(1, -2).contiguous()  # einops packs them, and the result's layout follows
        z = self.project_in(z)
        z = z.view(*z.shape[:-1], self.num_codebooks, self.codebook_dim)
        if z.dtype in _FLOATS and is_plain(z):
            latents, codes = ops.fsq(z, plan.levels, backend=plan.asked)
        else:
            latents, codes = _rounded(self, z)
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


def _rounded(fsq: Any, z: Tensor) -> tuple[Tensor, Tensor]:
    """Latents and codes of what a projection of the user's has made of another type, by the original's own methods."""
    dtype, force = z.dtype, fsq.force_quantization_f32
    with torch.autocast("cuda", enabled=False) if force else nullcontext():
        z = z.float() if force and dtype not in fsq.allowed_dtypes else z
        latents = fsq.quantize(z)
        return latents.to(dtype), fsq.codes_to_indices(latents)


def _misfit(fsq: Any, z: Tensor) -> str | None:
    """Why a call is no plain FSQ in fp32; the original answers it, with an error where the shape is wrong."""
    if not is_plain(z) or z.dtype not in _FLOATS or z.layout is not torch.strided:
        return "its input is no plain tensor in float32, bfloat16 or float16"
    shape = z.shape
    if len(shape) < 3 or shape[1 if len(shape) >= 4 or fsq.channel_first else -1] != fsq.dim:
        return f"its input is no [B, N, {fsq.dim}] or [B, {fsq.dim}, ...]"
    return None


@cache
def _accelerated(plan: Plan) -> type[nn.Module]:
    """The subclass of the original FSQ for ``plan``; one for every plan, so that equal plans are equal classes."""
    return type(_NAME, (_AcceleratedFSQ, plan.original), {"plan": plan, "__module__": __name__})
