"""The activations of the feed-forward layers: GELU in encoder and decoder, SwiGLU in the sequence model.

Backward keeps the arguments and forms everything else again, in fp32. Differentiable once.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flexlam_fast.ambient import outside_autocast
from flexlam_fast.backend import NATIVE, REFERENCE, TRITON
from flexlam_fast.checks import check_tensor
from flexlam_fast.ops import native_rows
from flexlam_fast.ops.arguments import FLOATS
from flexlam_fast.ops.contracts import compiled
from flexlam_fast.ops.differentiable import define_differentiable, define_plain
from flexlam_fast.ops.rows import pick_for


@outside_autocast
def gelu(x: Tensor, *, backend: str | None = None) -> Tensor:
    """Return ``F.gelu(x, approximate="tanh")``.

    Args:
        x: floating, of any shape.
        backend: ``"reference"``, ``"triton"`` or, on a CPU, ``"native"``; None or ``"auto"`` takes Triton on CUDA and
            C++ on a CPU.

    Returns:
        ``x``'s shape and dtype, with a gradient for ``x``. That is 0 or 1 where ``x`` is infinite.

    Raises:
        InputError: no floating tensor.
        BackendError: a backend asked for by name that cannot run here or does not take such arguments.
    """
    if not isinstance(x, Tensor) or x.dtype not in FLOATS:
        check_tensor("x", x, ["..."], FLOATS)
    name = pick_for(backend, x)
    if name == REFERENCE:
        return F.gelu(x, approximate="tanh")
    out: Tensor = _run_gelu(x, name)
    return out


@outside_autocast
def swiglu(gate: Tensor, up: Tensor, *, backend: str | None = None) -> Tensor:
    """Return ``silu(gate) * up``, rounded once.

    Args:
        gate: ``[..., I]`` floating; halves of one ``[..., 2 I]`` cost no copy.
        up: of ``gate``'s shape and dtype.
        backend: as in :func:`gelu`.

    Returns:
        ``[..., I]`` in ``gate``'s dtype, with gradients for both.

    Raises:
        InputError: wrong shape, dtype or device.
        BackendError: a backend asked for by name that cannot run here or does not take such arguments.
    """
    if not isinstance(gate, Tensor) or gate.dim() < 1 or gate.dtype not in FLOATS:
        check_tensor("gate", gate, ["...", "I"], FLOATS)
    if not isinstance(up, Tensor) or up.shape != gate.shape or up.dtype != gate.dtype or up.device != gate.device:
        check_tensor("up", up, list(gate.shape), gate.dtype, gate.device)
    name = pick_for(backend, gate)
    if name == REFERENCE:
        return reference_swiglu(gate, up)
    out: Tensor = _run_swiglu(gate, up, name)
    return out


def reference_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """:func:`swiglu` in plain PyTorch; fp32 inside, fp64 for fp64."""
    wide = torch.promote_types(gate.dtype, torch.float32)
    return (F.silu(gate.to(wide)) * up.to(wide)).to(gate.dtype)


def gelu_map(x: Tensor, backend: str) -> Tensor:
    """Launch the kernel; arguments are checked."""
    if backend == NATIVE:
        return native_rows.gelu(compiled(NATIVE), None, x)
    return compiled(TRITON, "launch_activation").gelu(None, x)


def gelu_map_backward(grad: Tensor, x: Tensor, backend: str) -> Tensor:
    """The gradient of ``x`` in its dtype."""
    if backend == NATIVE:
        return native_rows.gelu(compiled(NATIVE), grad, x)
    return compiled(TRITON, "launch_activation").gelu(grad, x)


def swiglu_map(gate: Tensor, up: Tensor, backend: str) -> Tensor:
    """Launch the kernel; arguments are checked."""
    if backend == NATIVE:
        return native_rows.swiglu(compiled(NATIVE), gate, up)
    return compiled(TRITON, "launch_activation").swiglu(gate, up)


def swiglu_map_backward(grad: Tensor, gate: Tensor, up: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    """The gradients of ``gate`` and ``up`` in their dtype."""
    if backend == NATIVE:
        return native_rows.swiglu_backward(compiled(NATIVE), grad, gate, up)
    return compiled(TRITON, "launch_activation").swiglu_backward(grad, gate, up)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _gelu_gradient(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return _run_gelu_backward(grad, *ctx.saved_tensors, ctx.backend), None


def _swiglu_gradient(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return *_run_swiglu_backward(grad, *ctx.saved_tensors, ctx.backend), None


def _like(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


_run_gelu_backward = define_plain(
    "(Tensor grad, Tensor x, str backend) -> Tensor", gelu_map_backward, lambda grad, x, backend: _like(x)
)
_run_gelu = define_differentiable(
    "(Tensor x, str backend) -> Tensor", gelu_map, lambda x, backend: _like(x), _keep, _gelu_gradient
)
_run_swiglu_backward = define_plain(
    "(Tensor grad, Tensor gate, Tensor up, str backend) -> (Tensor, Tensor)",
    swiglu_map_backward,
    lambda grad, gate, up, backend: (_like(gate), _like(up)),
)
_run_swiglu = define_differentiable(
    "(Tensor gate, Tensor up, str backend) -> Tensor",
    swiglu_map,
    lambda gate, up, backend: _like(gate),
    _keep,
    _swiglu_gradient,
)
