"""Linear layers of the sequence model: RMSNorm before, SwiGLU or residual after, one launch each.

Few rows (a decision of a few sessions) are bound by the latency of reading the weights: a program has one row of x and
a few rows of weights, every load is issued before the first product, and warps hardly wait for one another. Many rows
go through tiles and tensor cores. A row's result depends on nothing but that row and the tile that was chosen.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from flexlam_fast.kernels.pieces import round_to

#: Rows up to which each has programs of its own. They read the weights again, but from L2: 8 rows of the widest layer
#: of dmlab 8 MB, an estimated 1.5 us. A tl.dot padded to 16 rows would make one row wait for up to 64 matrix
#: instructions in a row (width 1024), where a sum over lanes takes 5 shuffles and one exchange between warps.
FEW = 8
PROCESSORS = 120  # programs that fill an H100's 132 processors well enough
MOST = 4096  # elements of weights that a program of the few holds


class Tile(NamedTuple):
    """How one launch is cut: rows, outputs and columns at a time, warps, and stages of the pipeline (0: few rows)."""

    rows: int
    outs: int
    span: int
    warps: int
    stages: int


def tile_of(rows: int, outs: int, inner: int, size: int, gated: bool) -> Tile:
    """Choose a tile for ``rows`` of ``inner`` elements of ``size`` bytes to ``outs``; gated: two matrices of weights.

    Few rows: as many outputs a program as leave every processor one, and a warp for every 16 bytes a lane reads of a
    matrix. Many rows: the largest tile whose programs fill the processors, or the smallest; fp32, which has no tensor
    cores here, stays small, because its products live in registers.
    """
    if rows <= FEW:
        span = triton.next_power_of_2(max(inner, 16))
        block = 1
        while outs >= 2 * block * PROCESSORS and 2 * block * span <= MOST:
            block *= 2
        words = block * span * size // 512
        return Tile(1, block, span, max(1, min(8, words)), 0)
    step = min(128, triton.next_power_of_2(max(inner, 16))) if size == 2 else 32
    shapes = [(128, 64 if gated else 128, 8), (64, 64, 4), (32, 64, 4)] if size == 2 else [(64, 64, 8)]
    for block, across, warps in shapes:
        if triton.cdiv(rows, block) * triton.cdiv(outs, across) >= PROCESSORS:
            # 128 rows and 128 columns at 64 a step are 32 KB a stage, of a processor's 227 KB
            return Tile(block, across, min(step, 64) if block > 32 else step, warps, 3)
    return Tile(32 if rows > 16 else 16, 32, step, 4, 3)


@triton.jit
def _normed(x, scale, norm, DTYPE: tl.constexpr, INTERPRET: tl.constexpr):
    """Return ``x * scale * norm`` in ``DTYPE``, rounded after each product as the module does; fp32 in."""
    y = round_to(x * scale, DTYPE, INTERPRET).to(tl.float32)
    return round_to(y * norm, DTYPE, INTERPRET)


@triton.jit
def _silu(x):
    return x / (1.0 + tl.exp(-x))


@triton.jit
def few_rows_kernel(x_ptr, norm_ptr, weight_ptr, residual_ptr, out_ptr, outs, eps, INNER: tl.constexpr,
                    OUTS: tl.constexpr, SPAN: tl.constexpr, NORM: tl.constexpr, GATED: tl.constexpr,
                    ADD: tl.constexpr, INTERPRET: tl.constexpr):  # fmt: skip
    """Row ``program_id(1)`` of x ``[rows, INNER]`` by OUTS rows of weights ``[outs, INNER]``, gated ``[2 outs, ...]``.

    x and the norm's weight are loaded once per output, not once per program, and the norm is computed per output too:
    the lanes that hold a row of weights then hold all of x that goes with it, and nobody waits at a barrier for x.
    """
    # where am I
    row = tl.program_id(1).to(tl.int64)
    out = tl.program_id(0) * OUTS + tl.arange(0, OUTS)
    column = tl.arange(0, SPAN)
    real = out < outs
    mask = real[:, None] & (column < INNER)[None, :]
    same = tl.zeros([OUTS, 1], tl.int32) + column[None, :]
    at = out.to(tl.int64)[:, None] * INNER + column[None, :]

    # load
    x = tl.load(x_ptr + row * INNER + same, mask=mask, other=0.0)
    weight = tl.load(weight_ptr + at, mask=mask, other=0.0)
    if GATED:
        up = tl.load(weight_ptr + tl.cast(outs, tl.int64) * INNER + at, mask=mask, other=0.0).to(tl.float32)
    if NORM:
        norm = tl.load(norm_ptr + same, mask=mask, other=0.0).to(tl.float32)
    if ADD:
        residual = tl.load(residual_ptr + row * outs + out, mask=real, other=0.0).to(tl.float32)

    # compute in fp32
    x = x.to(tl.float32)
    if NORM:
        scale = tl.rsqrt(tl.sum(x * x, axis=1, keep_dims=True) / INNER + eps)
        x = _normed(x, scale, norm, weight_ptr.dtype.element_ty, INTERPRET).to(tl.float32)
    value = tl.sum(x * weight.to(tl.float32), axis=1)
    if GATED:
        value = _silu(value) * tl.sum(x * up, axis=1)
    if ADD:
        value += residual

    # store
    tl.store(out_ptr + row * outs + out, round_to(value, out_ptr.dtype.element_ty, INTERPRET), mask=real)


@triton.jit
def many_rows_kernel(x_ptr, norm_ptr, weight_ptr, residual_ptr, out_ptr, rows, outs, eps, INNER: tl.constexpr,
                     ROWS: tl.constexpr, OUTS: tl.constexpr, STEP: tl.constexpr, NORM: tl.constexpr,
                     GATED: tl.constexpr, ADD: tl.constexpr, INTERPRET: tl.constexpr):  # fmt: skip
    """A tile ``[ROWS, OUTS]`` of the result, STEP columns of x and of the weights at a time."""
    # where am I: neighbours share rows of x, which are the larger part where there are many
    across = tl.cdiv(outs, OUTS)
    start = (tl.program_id(0) // across).to(tl.int64) * ROWS
    row = tl.arange(0, ROWS)
    out = (tl.program_id(0) % across) * OUTS + tl.arange(0, OUTS)
    here = start + row < rows
    column = tl.arange(0, STEP)
    x_at = x_ptr + start * INNER + (row[:, None] * INNER + column[None, :])
    weight_at = weight_ptr + (out.to(tl.int64)[None, :] * INNER + column[:, None])
    DTYPE: tl.constexpr = weight_ptr.dtype.element_ty
    real = out < outs

    # load and compute in fp32
    scale = tl.zeros([ROWS, 1], tl.float32)
    if NORM:
        squares = tl.zeros([ROWS, STEP], tl.float32)
        for k in tl.range(0, INNER, STEP, loop_unroll_factor=4):
            mask = here[:, None] & (k + column < INNER)[None, :]
            part = tl.load(x_at + k, mask=mask, other=0.0).to(tl.float32)
            squares += part * part
        scale = tl.rsqrt(tl.sum(squares, axis=1, keep_dims=True) / INNER + eps)
    value = tl.zeros([ROWS, OUTS], tl.float32)
    above = tl.zeros([ROWS, OUTS], tl.float32)
    for k in range(0, INNER, STEP):
        inside = k + column < INNER
        x = tl.load(x_at + k, mask=here[:, None] & inside[None, :], other=0.0)
        weight = tl.load(weight_at + k, mask=inside[:, None] & real[None, :], other=0.0)
        if NORM:
            norm = tl.load(norm_ptr + k + column, mask=inside, other=0.0).to(tl.float32)
            x = _normed(x.to(tl.float32), scale, norm[None, :], DTYPE, INTERPRET)
        if INTERPRET:  # its products of bf16 are wrong
            x, weight = x.to(tl.float32), weight.to(tl.float32)
        value = tl.dot(x, weight, value, input_precision="ieee")
        if GATED:
            up = tl.load(
                weight_at + tl.cast(outs, tl.int64) * INNER + k, mask=inside[:, None] & real[None, :], other=0.0
            )
            if INTERPRET:
                up = up.to(tl.float32)
            above = tl.dot(x, up, above, input_precision="ieee")
    if GATED:
        value = _silu(value) * above

    # store
    at = start * outs + (row[:, None] * tl.cast(outs, tl.int64) + out[None, :])
    mask = here[:, None] & real[None, :]
    if ADD:
        value += tl.load(residual_ptr + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, round_to(value, out_ptr.dtype.element_ty, INTERPRET), mask=mask)
