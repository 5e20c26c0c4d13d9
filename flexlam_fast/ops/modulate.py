"""The norms and residual sums around transformer blocks, with what conditions them (paper Table 6, A.5: adaLN-zero)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flexlam_fast.ambient import outside_autocast
from flexlam_fast.backend import NATIVE, REFERENCE, TRITON
from flexlam_fast.ops import native_rows, row_norm
from flexlam_fast.ops.arguments import check_eps
from flexlam_fast.ops.contracts import compiled
from flexlam_fast.ops.differentiable import define_differentiable, define_plain
from flexlam_fast.ops.rows import check_dtype, check_like, check_parameter, check_rows, pick_for


@outside_autocast
def adaln(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    *,
    eps: float = 1e-6,
    dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor:
    """Return ``LayerNorm(x) * (1 + scale) + shift``: how a DiT block is told the flow time.

    Arithmetic is fp32 whatever the dtypes. Sums of gradients over tokens are fp32, in a fixed order. It can be
    differentiated once.

    Args:
        x: ``[B, N, W]`` floating; rows may be any number of elements apart.
        shift: ``[B, W]`` floating, or ``[W]`` for all examples; a chunk of a wider tensor costs no copy.
        scale: likewise, of ``shift``'s shape.
        eps: added to the variance.
        dtype: of the result; None is ``x``'s. A linear layer's, under autocast, saves the cast.
        backend: ``"reference"``, ``"triton"`` or, on a CPU, ``"native"``; None or ``"auto"`` takes Triton on CUDA, for
            widths up to 8,192, and C++ on a CPU.

    Returns:
        ``[B, N, W]`` in ``dtype``, with gradients for ``x``, ``shift`` and ``scale`` in their dtypes.

    Raises:
        InputError: wrong shape, dtype or device.
        BackendError: a backend asked for by name that cannot run here or does not take such arguments.
    """
    check_rows("x", x, dims=3)
    check_parameter("scale", scale, x)
    check_like("shift", shift, scale.shape, x.device)
    check_dtype(dtype)
    return _norm(x, scale, shift, check_eps(eps), True, dtype or x.dtype, backend)


@outside_autocast
def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    eps: float = 1e-5,
    dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor:
    """Return ``nn.LayerNorm``'s result over the last dimension, in ``dtype``; fp32 inside, by :func:`adaln`'s kernels.

    Args:
        x: ``[..., W]`` floating.
        weight: ``[W]`` floating.
        bias: ``[W]`` floating, or None.
        eps: added to the variance.
        dtype: of the result; None is ``x``'s.
        backend: as in :func:`adaln`.

    Returns:
        ``[..., W]`` in ``dtype``, with gradients for ``x``, ``weight`` and ``bias`` in their dtypes.

    Raises:
        InputError: wrong shape, dtype or device.
        BackendError: a backend asked for by name that cannot run here or does not take such arguments.
    """
    check_rows("x", x)
    check_like("weight", weight, x.shape[-1:], x.device)
    if bias is not None:
        check_like("bias", bias, x.shape[-1:], x.device)
    check_dtype(dtype)
    return _norm(x, weight, bias, check_eps(eps), False, dtype or x.dtype, backend)


def _norm(
    x: Tensor, scale: Tensor, shift: Tensor | None, eps: float, one: bool, dtype: torch.dtype, backend: str | None
) -> Tensor:
    name = pick_for(backend, x, scale, shift, dtype, most=x.shape[-1])
    if name == REFERENCE:
        return row_norm.reference(x, scale, shift, eps, True, one, dtype)
    out: Tensor = row_norm.run(x, scale, shift, eps, True, one, dtype, name)[0]
    return out


@outside_autocast
def gate_add(x: Tensor, y: Tensor, gate: Tensor, *, backend: str | None = None) -> Tensor:
    """Return ``x + gate * y``: how a DiT block's halves are added to the residual stream.

    Arithmetic is fp32 whatever the dtypes; the gate's gradient is summed over tokens in fp32 and a fixed order.
    Differentiable once.

    Args:
        x: ``[B, N, W]`` floating, the residual stream.
        y: ``[B, N, W]`` floating, what a half of the block returned.
        gate: ``[B, W]`` floating, or ``[W]`` for all examples; a chunk of a wider tensor costs no copy.
        backend: as in :func:`adaln`.

    Returns:
        ``[B, N, W]`` in ``x``'s dtype, with gradients for ``x`` (the one that comes in, as it is), ``y`` and ``gate``
        in their dtypes.

    Raises:
        InputError: wrong shape, dtype or device.
        BackendError: a backend asked for by name that cannot run here or does not take such arguments.
    """
    check_rows("x", x, dims=3)
    check_like("y", y, x.shape, x.device)
    check_parameter("gate", gate, x)
    name = pick_for(backend, x, y, gate, most=x.shape[-1])
    if name == REFERENCE:
        return reference_gate_add(x, y, gate)
    out: Tensor = _run_gate_add(x, y, gate, name)
    return out


def reference_gate_add(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """:func:`gate_add` in plain PyTorch; fp32 inside, fp64 for an fp64 ``x``."""
    wide = torch.promote_types(x.dtype, torch.float32)
    gate = gate.to(wide).unsqueeze(1) if gate.dim() == 2 else gate.to(wide)
    return (x.to(wide) + gate * y.to(wide)).to(x.dtype)


def gate_add_rows(x: Tensor, y: Tensor, gate: Tensor, backend: str) -> Tensor:
    """Launch the kernel; arguments are checked."""
    if backend == NATIVE:
        return native_rows.gate_add(compiled(NATIVE), x, y, gate)
    return compiled(TRITON, "launch_modulate").gate_add(x, y, gate)


def gate_add_rows_backward(grad: Tensor, y: Tensor, gate: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    """Gradients of ``y`` and ``gate`` in their dtypes; that of ``x`` is ``grad``."""
    if backend == NATIVE:
        return native_rows.gate_add_backward(compiled(NATIVE), grad, y, gate)
    return compiled(TRITON, "launch_modulate").gate_add_backward(grad, y, gate)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, y, gate, ctx.backend = inputs
    ctx.save_for_backward(y, gate)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    dy, dgate = _run_gate_add_backward(grad, *ctx.saved_tensors, ctx.backend)
    return grad, dy, dgate, None


_run_gate_add_backward = define_plain(
    "(Tensor grad, Tensor y, Tensor gate, str backend) -> (Tensor, Tensor)",
    gate_add_rows_backward,
    lambda grad, y, gate, backend: (y.new_empty(y.shape), gate.new_empty(gate.shape)),
)
_run_gate_add = define_differentiable(
    "(Tensor x, Tensor y, Tensor gate, str backend) -> Tensor",
    gate_add_rows,
    lambda x, y, gate, backend: x.new_empty(x.shape),
    _setup,
    _backward,
)
