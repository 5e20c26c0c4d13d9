"""The norm of rows with what stands behind it, which ``adaln``, ``layer_norm`` and ``rms_norm`` share.

Backward keeps ``x`` and, of each row, what it was multiplied with and its mean; everything else is formed again.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flexlam_fast.backend import NATIVE, TRITON
from flexlam_fast.ops import native_rows
from flexlam_fast.ops.contracts import compiled
from flexlam_fast.ops.differentiable import define_differentiable, define_plain


def reference(
    x: Tensor, scale: Tensor, shift: Tensor | None, eps: float, center: bool, one: bool, dtype: torch.dtype
) -> Tensor:
    """The op in plain PyTorch, with the roundings of the modules; fp32 inside, fp64 for an fp64 ``x``."""
    wide = torch.promote_types(x.dtype, torch.float32)
    y = x.to(wide)
    if not center:
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
        return (scale.to(wide) * y.to(x.dtype).to(wide)).to(dtype)
    y = F.layer_norm(y, y.shape[-1:], eps=eps)
    factor = _rows(scale.to(wide)) + 1 if one else _rows(scale.to(wide))
    y = y * factor
    return (y if shift is None else y + _rows(shift.to(wide))).to(dtype)


def _rows(parameter: Tensor) -> Tensor:
    """A parameter of examples ``[B, W]`` beside their tokens; one ``[W]`` stays."""
    return parameter.unsqueeze(1) if parameter.dim() == 2 else parameter


def row_norm(
    x: Tensor,
    scale: Tensor,
    shift: Tensor | None,
    eps: float,
    center: bool,
    one: bool,
    dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """The result in ``dtype``, and fp32 ``[2 or 1, rows]`` of 1/deviation and, with ``center``, mean."""
    args = x, scale, shift, eps, center, one, dtype
    if backend == NATIVE:
        return native_rows.row_norm(compiled(NATIVE), *args)
    return compiled(TRITON, "launch_modulate").row_norm(*args)


def _fake(x: Tensor, scale: Any, shift: Any, eps: float, center: bool, one: bool, dtype: Any, backend: str) -> Any:
    rows = x.shape[:-1].numel()
    return x.new_empty(x.shape, dtype=dtype), x.new_empty((2 if center else 1, rows), dtype=torch.float32)


def row_norm_backward(
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    stats: Tensor,
    shift_dtype: torch.dtype | None,
    center: bool,
    one: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``x``, ``scale`` and shift (empty without ``shift_dtype``), in their dtypes."""
    args = grad, x, scale, stats, shift_dtype, center, one
    if backend == NATIVE:
        return native_rows.row_norm_backward(compiled(NATIVE), *args)
    return compiled(TRITON, "launch_modulate").row_norm_backward(*args)


def _fake_backward(
    grad: Tensor, x: Tensor, scale: Tensor, stats: Any, shift_dtype: Any, center: bool, one: bool, backend: str
) -> Any:
    dshift = x.new_empty(0) if shift_dtype is None else x.new_empty(scale.shape, dtype=shift_dtype)
    return x.new_empty(x.shape), scale.new_empty(scale.shape), dshift


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, scale, shift, _, center, one, _, backend = inputs
    ctx.save_for_backward(x, scale, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # or each backward would fill zeros for what has no gradient
    ctx.rest = None if shift is None else shift.dtype, center, one, backend


def _backward(ctx: Any, grad: Tensor | None, _: Any) -> tuple[Any, ...]:
    if grad is None:
        return (None,) * 8
    x, scale, stats = ctx.saved_tensors
    dx, dscale, dshift = _run_backward(grad, x, scale, stats, *ctx.rest)
    return dx, dscale, None if ctx.rest[0] is None else dshift, None, None, None, None, None


_run_backward = define_plain(
    "(Tensor grad, Tensor x, Tensor scale, Tensor stats, ScalarType? shift_dtype, bool center, bool one, str backend)"
    " -> (Tensor, Tensor, Tensor)",
    row_norm_backward,
    _fake_backward,
)
#: As :func:`row_norm`, with gradients.
run = define_differentiable(
    "(Tensor x, Tensor scale, Tensor? shift, float eps, bool center, bool one, ScalarType dtype, str backend)"
    " -> (Tensor, Tensor)",
    row_norm,
    _fake,
    _setup,
    _backward,
)
