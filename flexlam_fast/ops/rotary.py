"""Queries and keys of training on their way to attention: RMS norm of every head, then RoPE, in one launch for both.

The arithmetic is that of ``RMSNorm`` and ``rotate`` in ``flexlam_fast.sequence.model`` (paper B.4, design section 2),
fp32 inside and rounded once, at the end.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flexlam_fast.ambient import outside_autocast
from flexlam_fast.backend import AUTO, NATIVE, REFERENCE, TRITON
from flexlam_fast.checks import check_tensor
from flexlam_fast.errors import InputError
from flexlam_fast.ops import native_sequence
from flexlam_fast.ops.arguments import FLOATS, check_eps
from flexlam_fast.ops.contracts import compiled
from flexlam_fast.ops.differentiable import define_differentiable, define_plain
from flexlam_fast.ops.linear import pick
from flexlam_fast.ops.rows import check_dtype

_ANGLES = (torch.float32, torch.float64)


@outside_autocast
def qk_norm_rope(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    *,
    dtype: torch.dtype | None = None,
    backend: str | None = AUTO,
) -> tuple[Tensor, Tensor]:
    """Norm every head vector of queries and keys and rotate it to its position.

    Args:
        q: ``[B, N, H, D]`` floating, any strides, such as a view of a projection's output; ``D`` is even.
        k: ``[B, N, G, D]`` floating.
        q_weight: ``[D]`` floating, the norm's weight; it may be wider than what it meets, as under autocast.
        k_weight: ``[D]`` floating.
        cos: fp32 ``[N, D]``, shared by the batch, or ``[B, N, D]``; ``D / 2`` columns are used for both halves. Channel
            ``i`` is paired with ``i + D/2``.
        sin: as ``cos``. Neither has a gradient on the compiled backends.
        eps: added to the mean square.
        dtype: of the results; None is ``q``'s.
        backend: ``"reference"``, ``"triton"`` or, on a CPU, ``"native"``; None or ``"auto"`` takes Triton on CUDA and
            C++ on a CPU, the reference for fp64.

    Returns:
        Queries and keys, shaped as they came, contiguous. Gradients go to ``q``, ``k`` and both weights.

    Raises:
        InputError: wrong shape, dtype or device.
        BackendError: a backend asked for by name that cannot run here or does not take such arguments.
    """
    _check(q, k, q_weight, k_weight, cos, sin)
    check_dtype(dtype)
    out, eps = dtype or q.dtype, check_eps(eps)
    kinds = (q.dtype, k.dtype, q_weight.dtype, k_weight.dtype, cos.dtype, out)
    name = pick(backend, q.device, torch.float64 if torch.float64 in kinds else q.dtype, q.shape[-1], native=True)
    if name == REFERENCE:
        return reference(q, q_weight, cos, sin, eps, out), reference(k, k_weight, cos, sin, eps, out)
    return _call(q, k, q_weight, k_weight, cos, sin, eps, out, name)


def reference(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """Norm and rotate ``x [B, N, H, D]`` in plain PyTorch, in at least fp32; arguments as :func:`qk_norm_rope`."""
    wide = torch.promote_types(x.dtype, torch.float32)
    y = x.to(wide)
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps) * weight.to(wide)
    if cos.shape[-1] != x.shape[-1]:
        cos, sin = torch.cat([cos, cos], dim=-1), torch.cat([sin, sin], dim=-1)
    first, second = y.chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    return (y * cos.unsqueeze(-2) + turned * sin.unsqueeze(-2)).to(dtype)


def _check(q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor) -> None:
    check_tensor("q", q, ["B", "N", "H", "D"], FLOATS)
    batch, tokens, _, dim = q.shape
    if dim % 2 or not dim:
        raise InputError(f"q: expected an even number of channels, got {list(q.shape)}")
    check_tensor("k", k, [batch, tokens, "G", dim], FLOATS, q.device)
    check_tensor("q_weight", q_weight, [dim], FLOATS, q.device)
    check_tensor("k_weight", k_weight, [dim], FLOATS, q.device)
    own = isinstance(cos, Tensor) and cos.dim() == 3
    width = dim // 2 if isinstance(cos, Tensor) and cos.shape[-1:] == (dim // 2,) else dim
    check_tensor("cos", cos, [batch, tokens, width] if own else [tokens, width], _ANGLES, q.device)
    check_tensor("sin", sin, list(cos.shape), cos.dtype, q.device)


def norm_rope(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Launch the forward kernel on checked arguments; ``torch.ops.flexlam_fast.norm_rope``."""
    args = q, k, q_weight, k_weight, cos, sin, eps, dtype
    if backend == NATIVE:
        return native_sequence.norm_rope(compiled(NATIVE), *args)
    return compiled(TRITON, "launch_rotary").norm_rope(*args)


def norm_rope_backward(
    grad_q: Tensor,
    grad_k: Tensor,
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of ``q`` and ``k`` in their dtypes and of both weights, fp32 ``[D]``."""
    args = grad_q, grad_k, q, k, q_weight, k_weight, cos, sin, eps
    if backend == NATIVE:
        return native_sequence.norm_rope_backward(compiled(NATIVE), *args)
    return compiled(TRITON, "launch_rotary").norm_rope_backward(*args)


def _fake(q: Tensor, k: Tensor, q_weight: Any, k_weight: Any, cos: Any, sin: Any, eps: Any, dtype: Any, _: str) -> Any:
    return q.new_empty(q.shape, dtype=dtype), k.new_empty(k.shape, dtype=dtype)


def _fake_backward(grad_q: Tensor, grad_k: Tensor, q: Tensor, k: Tensor, q_weight: Tensor, *others: Any) -> Any:
    sums = [q_weight.new_empty(q_weight.shape, dtype=torch.float32) for _ in range(2)]
    return q.new_empty(q.shape), k.new_empty(k.shape), *sums


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.eps, _, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad_q: Tensor, grad_k: Tensor) -> Any:
    _, _, q_weight, k_weight, _, _ = tensors = ctx.saved_tensors
    dq, dk, of_q, of_k = _call_backward(grad_q, grad_k, *tensors, ctx.eps, ctx.backend)
    return dq, dk, of_q.to(q_weight.dtype), of_k.to(k_weight.dtype), None, None, None, None, None


_TENSORS = "Tensor q, Tensor k, Tensor q_weight, Tensor k_weight, Tensor cos, Tensor sin, float eps"
_call_backward = define_plain(
    f"(Tensor grad_q, Tensor grad_k, {_TENSORS}, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    norm_rope_backward,
    _fake_backward,
)
_call = define_differentiable(
    f"({_TENSORS}, ScalarType dtype, str backend) -> (Tensor, Tensor)", norm_rope, _fake, _setup, _backward
)
