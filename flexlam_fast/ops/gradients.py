"""Gradients of the compiled backends' ops, and the way in: straight to the launcher, or through ``torch.ops``.

A plain call pays for neither dispatcher nor schema. Under ``torch.compile``, ``torch.jit.trace``, fake tensors,
functorch or a dispatch mode a call goes through ``torch.ops.flexlam_fast``, where those can see it. Both have the
gradients of this file.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

from flexlam_fast.ops import contracts

Levels = tuple[int, ...]
OPS = torch.ops.flexlam_fast


_PLAIN = frozenset((Tensor, nn.Parameter, type(None)))
_is_compiling, _count_modes = torch.compiler.is_compiling, torch._C._len_torch_dispatch_stack
_is_tracing = torch._C._is_tracing
_transform = torch._C._functorch.peek_interpreter_stack


def is_plain(*tensors: Tensor | None) -> bool:
    """Whether nothing stands between a call and its kernel: no compiler, tracer, mode, transform or tensor subclass."""
    for tensor in tensors:
        if type(tensor) not in _PLAIN:
            return False
    return not (_is_compiling() or _is_tracing() or _count_modes() or _transform() is not None)


def is_transformed() -> bool:
    """Whether functorch or forward-mode differentiation looks on; the compiled ops have a rule for neither."""
    return not _is_compiling() and (_transform() is not None or forward_ad._current_level >= 0)


def wants_gradient(*tensors: Tensor | None) -> bool:
    """Whether autograd is on and one of ``tensors`` asks for it."""
    if torch.is_grad_enabled():
        for t in tensors:
            if t is not None and t.requires_grad:
                return True
    return False


def fsq(z: Tensor, levels: Levels, keep: Tensor | None, null: Tensor | None, backend: str) -> tuple[Tensor, Tensor]:
    """Latents and codes."""
    if not is_plain(z, keep, null):
        return OPS.fsq.default(z, levels, keep, null, backend)
    run = _Fsq.apply if wants_gradient(z, null) else contracts.fsq
    return run(z, levels, keep, null, backend)


def fsq_sample(
    z: Tensor, levels: Levels, null: Tensor, seed: Tensor, edges: Tensor, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Latents, codes and drawn lengths."""
    if not is_plain(z, null, seed):
        return OPS.fsq_sample.default(z, levels, null, seed, edges, backend)
    run = _FsqSample.apply if wants_gradient(z, null) else contracts.fsq_sample
    return run(z, levels, null, seed, edges, backend)


def fsq_project(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    levels: Levels,
    keep: Tensor | None,
    null: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Latents and codes from the encoder's width."""
    if wants_gradient(x, weight, bias, null) or not is_plain(x, weight, bias, keep, null):
        return OPS.fsq_project.default(x, weight, bias, levels, keep, null, backend)
    return contracts.fsq_project(x, weight, bias, levels, keep, null, backend)


def codes_to_latents(codes: Tensor, levels: Levels, keep: Tensor | None, null: Tensor | None, backend: str) -> Tensor:
    """Null-filled latents."""
    if wants_gradient(null) or not is_plain(codes, keep, null):
        return OPS.codes_to_latents.default(codes, levels, keep, null, backend)
    return contracts.codes_to_latents(codes, levels, keep, null, backend)


def _keep_for_backward(
    ctx: Any, z: Tensor, levels: Levels, keep: Tensor | None, null: Tensor | None, backend: str
) -> None:
    ctx.save_for_backward(z, keep)
    ctx.levels, ctx.backend = levels, backend
    ctx.null_dtype = None if null is None or keep is None else null.dtype


def _gradients(ctx: Any, grad: Tensor, run: Any) -> tuple[Tensor, Tensor | None]:
    """Gradients of z and null."""
    z, keep = ctx.saved_tensors
    with_null = ctx.null_dtype is not None
    grad_z, grad_null = run(grad, z, ctx.levels, keep, with_null, ctx.backend)
    return grad_z, grad_null.to(ctx.null_dtype) if with_null else None


class _Fsq(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, levels: Levels, keep: Any, null: Any, backend: str) -> Any:
        latents, codes = contracts.fsq(z, levels, keep, null, backend)
        _keep_for_backward(ctx, z, levels, keep, null, backend)
        ctx.mark_non_differentiable(codes)
        return latents, codes

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Any) -> Any:
        grad_z, grad_null = _gradients(ctx, grad, contracts.fsq_backward)
        return grad_z, None, None, grad_null, None


class _FsqSample(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, levels: Levels, null: Tensor, seed: Tensor, edges: Tensor, backend: str) -> Any:
        latents, codes, keep = contracts.fsq_sample(z, levels, null, seed, edges, backend)
        _keep_for_backward(ctx, z, levels, keep, null, backend)
        ctx.mark_non_differentiable(codes, keep)
        return latents, codes, keep

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Any) -> Any:
        grad_z, grad_null = _gradients(ctx, grad, contracts.fsq_backward)
        return grad_z, None, grad_null, None, None, None


def _setup_fsq(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _keep_for_backward(ctx, *inputs)


def _backward_fsq(ctx: Any, grad: Tensor, _: Any) -> Any:
    grad_z, grad_null = _gradients(ctx, grad, OPS.fsq_backward.default)
    return grad_z, None, None, grad_null, None


def _setup_sample(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    z, levels, null, _, _, backend = inputs
    _keep_for_backward(ctx, z, levels, output[2], null, backend)


def _backward_sample(ctx: Any, grad: Tensor, *_: Any) -> Any:
    grad_z, grad_null = _gradients(ctx, grad, OPS.fsq_backward.default)
    return grad_z, None, grad_null, None, None, None


def _setup_project(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, weight, bias, ctx.levels, keep, null, ctx.backend = inputs
    ctx.save_for_backward(x, weight, bias, keep)
    ctx.null_dtype = None if null is None or keep is None else null.dtype


def _backward_project(ctx: Any, grad: Tensor, _: Any) -> Any:
    x, weight, bias, keep = ctx.saved_tensors
    grads = OPS.fsq_project_backward.default(grad, x, weight, bias, ctx.levels, keep, ctx.backend)
    grad_bias = None if bias is None else grads[2].to(bias.dtype)
    grad_null = None if ctx.null_dtype is None else grads[3].to(ctx.null_dtype)
    return grads[0], grads[1].to(weight.dtype), grad_bias, None, None, grad_null, None


def _setup_lookup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    codes, _, keep, null, _ = inputs
    ctx.save_for_backward(keep)
    ctx.slots, ctx.null_dtype = codes.shape[-1], None if null is None or keep is None else null.dtype


def _backward_lookup(ctx: Any, grad: Tensor) -> Any:
    """The null's gradient sums over the suffix slots; codes are integers and have none."""
    (keep,) = ctx.saved_tensors
    if ctx.null_dtype is None:
        return None, None, None, None, None
    beyond = torch.arange(ctx.slots, device=grad.device) >= keep.unsqueeze(-1)
    total = torch.where(beyond.unsqueeze(-1), grad, 0.0).flatten(0, -2).sum(0)
    return None, None, None, total.to(ctx.null_dtype), None


for _name, _setup, _backward in (
    ("fsq", _setup_fsq, _backward_fsq),
    ("fsq_sample", _setup_sample, _backward_sample),
    ("fsq_project", _setup_project, _backward_project),
    ("codes_to_latents", _setup_lookup, _backward_lookup),
):
    torch.library.register_autograd(f"flexlam_fast::{_name}", _backward, setup_context=_setup, lib=contracts.LIBRARY)
