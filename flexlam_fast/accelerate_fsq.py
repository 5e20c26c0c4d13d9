"""What :mod:`flexlam_fast.accelerate` does for ``vector_quantize_pytorch.FSQ``: the same results through ``ops.fsq``.

An FSQ keeps its identity, parameters, buffers, hooks and state dict: what changes is its class, to a subclass with
another ``forward``.
"""

from __future__ import annotations

import inspect
import math
import sys
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from flexlam_fast import ops
from flexlam_fast.backend import AUTO, REFERENCE, BackendChoice
from flexlam_fast.errors import BackendError
from flexlam_fast.swapped import Change, Plan, Swapped

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


def kind() -> type[nn.Module] | None:
    """The class ``FSQ``, or None where nobody has imported it."""
    return getattr(sys.modules.get(_HOME), "FSQ", None)


def swap(
    fsq: nn.Module, kind: type[nn.Module], asked: str, choice: BackendChoice
) -> tuple[BackendChoice, Change | str]:
    """The backend for ``fsq``, an FSQ and no subclass, and what to change, or why nothing is changed.

    Raises:
        BackendError: one asked for by name does not take its levels.
    """
    unlike = _strange(fsq, kind)
    if unlike is None:
        levels = tuple(fsq._levels.tolist())  # type: ignore[operator]
        unlike = _obstacle(fsq, levels)
    if unlike is None:
        choice = narrow(choice, levels, fsq._levels.device, asked)  # type: ignore[arg-type]
        unlike = _mismatch(fsq, levels, choice.name)
    if unlike is not None:
        return choice, unlike
    return choice, Change(fsq, "__class__", kind, _accelerated(Plan(kind, asked, choice.name, levels)))


@torch.no_grad()
def narrow(choice: BackendChoice, levels: tuple[int, ...], device: torch.device, backend: str) -> BackendChoice:
    """``choice``, or the reference where ``auto`` chose kernels that do not take these levels."""
    try:
        ops.fsq(torch.zeros(1, 1, len(levels)).to(device, torch.float32), levels, backend=choice.name)
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


class _AcceleratedFSQ(Swapped):
    """What takes the place of an FSQ's ``forward``."""

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


@cache
def _accelerated(plan: Plan) -> type[nn.Module]:
    """The subclass of the original FSQ for ``plan``; one for every plan, so that equal plans are equal classes."""
    return type("AcceleratedFSQ", (_AcceleratedFSQ, plan.original), {"plan": plan, "__module__": __name__})
