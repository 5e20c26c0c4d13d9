"""A linear layer in bf16 whose gradients of weight and bias stay in fp32, for training on a CPU.

Under bf16 autocast torch forms ``grad^T x``, a product over thousands of rows, with its usual matrix product, rounds it
to bf16, and sums the bias by itself. The C++ of ``csrc/linear_train.h`` takes both in one pass by the processor's
matrix tiles. The other two products of a layer are oneDNN's here as there.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flexlam_fast import backend as backends
from flexlam_fast.ambient import outside_autocast
from flexlam_fast.backend import AUTO, NATIVE, REFERENCE, named
from flexlam_fast.checks import check_tensor
from flexlam_fast.ops.arguments import FLOATS, choose_native
from flexlam_fast.ops.contracts import compiled
from flexlam_fast.ops.differentiable import define_differentiable, define_plain
from flexlam_fast.ops.gradients import is_transformed

_HALF = torch.bfloat16


@outside_autocast
def linear_bf16(x: Tensor, weight: Tensor, bias: Tensor | None, *, backend: str | None = AUTO) -> Tensor:
    """Return ``F.linear(x, weight, bias)`` as bf16 autocast does it: of numbers rounded to bf16, rounded once.

    Args:
        x: ``[..., I]`` floating.
        weight: ``[O, I]`` fp32.
        bias: ``[O]`` fp32, or None.
        backend: ``"reference"`` or, on a CPU with AMX and for ``O`` and ``I`` of whole 32s, ``"native"``; None or
            ``"auto"`` takes C++ where it can.

    Returns:
        ``[..., O]`` bf16, differentiable once in all three; C++ does not round gradients of weight and bias to bf16.

    Raises:
        InputError: wrong shape, dtype or device.
        BackendError: a backend asked for by name that cannot run here or does not take such arguments.
    """
    if not isinstance(x, Tensor) or not x.dim() or x.dtype not in FLOATS:
        check_tensor("x", x, ["...", "I"], FLOATS)
    check_tensor("weight", weight, ["O", x.shape[-1]], torch.float32, x.device)
    if bias is not None:
        check_tensor("bias", bias, [weight.shape[0]], torch.float32, x.device)
    name = _pick(named(backend), x.device, *weight.shape)
    x = x.to(_HALF)
    if name == REFERENCE:
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x, weight.to(_HALF), None if bias is None else bias.to(_HALF))
    out: Tensor = _run(x, weight, bias, weight.detach().to(_HALF))
    return out


def takes(device: torch.device, outer: int, inner: int) -> bool:
    """Whether C++ has gradients for a weight ``[outer, inner]`` here."""
    return _pick(AUTO, device, outer, inner) == NATIVE


def linear_rows(x: Tensor, weight: Tensor, bias: Tensor | None, half: Tensor) -> Tensor:
    """``x`` times ``half``, which is ``weight`` in bf16, plus ``bias``; arguments are checked."""
    bias = None if bias is None else bias.to(_HALF)
    # a product with the bias in its last step; torch's own copies the bias into every row first
    if hasattr(torch.ops.mkldnn, "_linear_pointwise") and torch.backends.mkldnn.enabled:
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, half, bias, "none", [], "")
        return out
    return F.linear(x, half, bias)


def linear_input_gradient(grad: Tensor, half: Tensor) -> Tensor:
    """Gradient of the input, of ``half``'s dtype; an op, so that asking for its gradient is refused."""
    return grad @ half


def linear_gradients(grad: Tensor, x: Tensor, bias: bool) -> tuple[Tensor, Tensor]:
    """Gradients of the weight, fp32 ``[O, I]``, and of the bias, fp32 ``[O]``, empty without one."""
    outer, inner = grad.shape[-1], x.shape[-1]
    grad, x = _rows(grad), _rows(x)
    weight = grad.new_empty((outer, inner), dtype=torch.float32)
    sums = grad.new_empty(outer if bias else 0, dtype=torch.float32)
    compiled(NATIVE).linear_gradients(
        grad.data_ptr(),
        x.data_ptr(),
        grad.stride(0),
        x.stride(0),
        weight.data_ptr(),
        sums.data_ptr() if bias else 0,
        len(grad),
        outer,
        inner,
        torch.get_num_threads(),
    )
    return weight, sums


def _rows(x: Tensor) -> Tensor:
    """``[..., W]`` as rows whose numbers are neighbours."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, _, bias, half = inputs
    ctx.bias = bias is not None
    ctx.save_for_backward(x, half)


def _gradient(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, half = ctx.saved_tensors
    wanted = ctx.needs_input_grad
    dx = _run_input_gradient(grad, half) if wanted[0] else None
    if not (wanted[1] or wanted[2]):
        return dx, None, None, None
    weight, bias = _run_gradients(grad, x, ctx.bias)
    return dx, weight, bias if ctx.bias else None, None


_run_input_gradient = define_plain(
    "(Tensor grad, Tensor half) -> Tensor",
    linear_input_gradient,
    lambda grad, half: grad.new_empty((*grad.shape[:-1], half.shape[1])),
)
_run_gradients = define_plain(
    "(Tensor grad, Tensor x, bool bias) -> (Tensor, Tensor)",
    linear_gradients,
    lambda grad, x, bias: (
        grad.new_empty((grad.shape[-1], x.shape[-1]), dtype=torch.float32),
        grad.new_empty(grad.shape[-1] if bias else 0, dtype=torch.float32),
    ),
)
_run = define_differentiable(
    "(Tensor x, Tensor weight, Tensor? bias, Tensor half) -> Tensor",
    linear_rows,
    lambda x, weight, bias, half: x.new_empty((*x.shape[:-1], len(half))),
    _keep,
    _gradient,
)


@lru_cache(maxsize=256)
def _known_pick(backend: str, device: torch.device, outer: int, inner: int) -> str:
    fits = any(status.name == NATIVE and status.available for status in backends.probe(device))
    takes = fits and device.type == "cpu" and compiled(NATIVE).takes_linear(outer, inner)
    wanted, got = "AMX and widths of whole 32s", f"a weight of {outer} x {inner}"
    return choose_native(backend, device, takes, wanted, got)


def _pick(backend: str, device: torch.device, outer: int, inner: int) -> str:
    if backend == AUTO and is_transformed():
        return REFERENCE
    return _known_pick(backend, device, outer, inner)


# a backend is no part of a traced graph; see arguments.pick
_pick._dynamo_marked_constant = True  # type: ignore[attr-defined]
