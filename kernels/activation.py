"""GELU by tanh's approximation and SwiGLU: forward and backward, each argument read and each result written once."""

from __future__ import annotations

import triton
import triton.language as tl
from flexlam_fast.kernels.pieces import round_to

BLOCK = 2048  # elements of a program: 16 for each of 128 threads
# tanh's approximation: x * (1 + tanh(y)) / 2 = x * logistic(2 y) with 2 y = x * (A + B * x^2)
A, B = tl.constexpr(1.5957691216057308), tl.constexpr(0.07135481627159586)
MOST = tl.constexpr(10.0)  # where the logistic function is 1 in fp32, and 1e-38 on the other side
MOST_SILU = tl.constexpr(87.0)


@triton.jit
def _clamped(x, most):
    """NaN stays, which a minimum would drop."""
    return tl.where(x > most, most, tl.where(x < -most, -most, x))


@triton.jit
def gelu_kernel(grad_ptr, x_ptr, out_ptr, elements, BACK: tl.constexpr, BLOCK: tl.constexpr, INTERPRET: tl.constexpr):
    """GELU of x, or with BACK grad times its slope."""
    # where am I
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < elements

    # load
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)

    # compute in fp32
    y = _clamped(x, MOST)
    e = tl.exp(-y * (A + B * y * y))
    share = 1.0 / (1.0 + e)
    if BACK:
        grad = tl.load(grad_ptr + at, mask=mask, other=0.0).to(tl.float32)
        out = grad * (share + y * share * (e * share) * (A + 3.0 * B * y * y))
    else:
        out = x * tl.where(x < -MOST, 0.0, share)

    # store
    tl.store(out_ptr + at, round_to(out, out_ptr.dtype.element_ty, INTERPRET), mask=mask)


@triton.jit
def swiglu_kernel(grad_ptr, gate_ptr, up_ptr, out_ptr, other_ptr, gate_row, up_row, width, blocks, BACK: tl.constexpr,
                  BLOCK: tl.constexpr, INTERPRET: tl.constexpr):  # fmt: skip
    """``silu(gate) * up`` of a block of one row, or with BACK the gradients of gate (``out``) and up (``other``)."""
    # where am I
    row = (tl.program_id(0) // blocks).to(tl.int64)
    column = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = column < width
    at = row * width + column

    # load
    x = tl.load(gate_ptr + row * gate_row + column, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_row + column, mask=mask, other=0.0).to(tl.float32)

    # compute in fp32
    y = _clamped(x, MOST_SILU)
    e = tl.exp(-y)
    share = 1.0 / (1.0 + e)
    silu = x * tl.where(x < -MOST_SILU, 0.0, share)
    if BACK:
        grad = tl.load(grad_ptr + at, mask=mask, other=0.0).to(tl.float32)
        out = grad * up * share * (1.0 + y * (e * share))
        tl.store(other_ptr + at, round_to(grad * silu, other_ptr.dtype.element_ty, INTERPRET), mask=mask)
    else:
        out = silu * up

    # store
    tl.store(out_ptr + at, round_to(out, out_ptr.dtype.element_ty, INTERPRET), mask=mask)
