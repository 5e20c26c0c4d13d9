"""The encoder's last projection and FSQ in one: ``x [tokens, W]`` is read once, forward and backward.

With d of at most 8 the product is d dot products a token, an eighth of what the memory allows in time, so there is no
matrix instruction here and arithmetic stays fp32. Forward walks over x a few columns at a time; backward, which needs
x again once the gradient of z is known, holds whole rows.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from flexlam_fast.kernels.pieces import round_to, slope, value_of

TILE = 8192  # elements of x that a program holds
CHUNK = 32  # columns of x at a time, forward
FORWARD_ROWS = 256
PROGRAMS = 264  # of a backward grid, at most: two for each of an H100's 132 processors; fixed, so that sums are too


class Tile(NamedTuple):
    """Rows of a program, padded width, warps, and how many programs' worth of rows there are."""

    rows: int
    span: int
    warps: int
    tiles: int


def tile_of(tokens: int, inner: int) -> Tile:
    """Choose a tile for ``tokens`` rows of ``inner`` elements."""
    span = triton.next_power_of_2(max(inner, 16))
    rows = max(1, min(TILE // span, triton.next_power_of_2(max(tokens, 1))))
    return Tile(rows, span, 8 if rows * span > 4096 else 4, triton.cdiv(tokens, rows))


def forward_warps(size: int) -> int:
    """Return how many warps leave each thread 16 bytes of latents, of elements of ``size`` bytes, to store."""
    return 8 if size == 4 else 4


@triton.jit
def _kept(token, tokens, keep_ptr, SLOTS: tl.constexpr, PREFIX: tl.constexpr):
    if not PREFIX:
        return token < tokens
    keep = tl.load(keep_ptr + token // SLOTS, mask=token < tokens, other=0)
    return (token % SLOTS).to(tl.int32) < keep


@triton.jit
def project_forward_kernel(x_ptr, weight_ptr, bias_ptr, latents_ptr, codes_ptr, keep_ptr, null_ptr, table_ptr,
                           basis_ptr, tokens, SLOTS: tl.constexpr, DIM: tl.constexpr, INNER: tl.constexpr,
                           CHUNK: tl.constexpr, ROWS: tl.constexpr, STEPS: tl.constexpr, PREFIX: tl.constexpr,
                           PADDED: tl.constexpr, GROUP: tl.constexpr, INTERPRET: tl.constexpr):  # fmt: skip
    """x ``[tokens, INNER]`` to latents ``[tokens, DIM]`` and codes; GROUP is 1 unless tokens fill whole groups."""
    # where am I
    start = tl.program_id(0).to(tl.int64) * ROWS
    row = tl.arange(0, ROWS)
    token = start + row
    here = token < tokens
    channel = tl.arange(0, PADDED)
    real = channel < DIM

    # load, CHUNK columns at a time
    z = tl.zeros([ROWS, PADDED], tl.float32) + tl.load(bias_ptr + channel, mask=real, other=0.0)[None, :]
    for i in range((INNER + CHUNK - 1) // CHUNK):
        inner = i * CHUNK + tl.arange(0, CHUNK)
        at = start * INNER + (row[:, None] * INNER + inner[None, :])
        x = tl.load(x_ptr + at, mask=here[:, None] & (inner < INNER)[None, :], other=0.0).to(tl.float32)
        for c in tl.static_range(DIM):
            w = tl.load(weight_ptr + c * INNER + inner, mask=inner < INNER, other=0.0)
            z += tl.where((channel == c)[None, :], tl.sum(x * w[None, :], axis=1)[:, None], 0.0)
    kept = _kept(token, tokens, keep_ptr, SLOTS, PREFIX)

    # compute in fp32
    digits = tl.zeros([ROWS, PADDED], tl.int32)
    for j in range(STEPS):
        at_or_above = z >= tl.load(table_ptr + (5 + j) * DIM + channel, mask=real, other=float("inf"))[None, :]
        digits += at_or_above.to(tl.int32)
    codes = tl.sum(digits * tl.load(basis_ptr + channel, mask=real, other=0)[None, :], axis=1)
    half_width = tl.load(table_ptr + 2 * DIM + channel, mask=real, other=1.0)[None, :]
    high = tl.load(table_ptr + 3 * DIM + channel, mask=real, other=1.0)[None, :]
    low = tl.load(table_ptr + 4 * DIM + channel, mask=real, other=0.0)[None, :]
    value = tl.where(z == z, value_of(digits, half_width, high, low), z)
    if PREFIX:
        value = tl.where(kept[:, None], value, tl.load(null_ptr + channel, mask=real, other=0.0)[None, :])

    # store
    if GROUP > 1:  # groups of tokens without their padding, so that words of 16 bytes can be stored for any DIM
        column = tl.arange(0, GROUP * PADDED)
        group = tl.arange(0, ROWS // GROUP)
        source = tl.minimum(column // DIM, GROUP - 1) * PADDED + column % DIM
        index = tl.zeros([ROWS // GROUP, GROUP * PADDED], tl.int32) + source[None, :]
        value = tl.gather(tl.reshape(value, [ROWS // GROUP, GROUP * PADDED]), index, axis=1)
        out = start * DIM + (group[:, None] * (GROUP * DIM) + column[None, :])
        whole = (start + group * GROUP < tokens)[:, None] & (column < GROUP * DIM)[None, :]
    else:
        out = start * DIM + (row[:, None] * DIM + channel[None, :])
        whole = here[:, None] & real[None, :]
    tl.store(latents_ptr + out, round_to(value, latents_ptr.dtype.element_ty, INTERPRET), mask=whole)
    tl.store(codes_ptr + token, codes, mask=here)


@triton.jit
def project_backward_kernel(grad_ptr, x_ptr, weight_ptr, bias_ptr, grad_x_ptr, sums_ptr, keep_ptr, table_ptr, basis_ptr,
                            tokens, tiles, SLOTS: tl.constexpr, DIM: tl.constexpr, INNER: tl.constexpr,
                            SPAN: tl.constexpr, ROWS: tl.constexpr, PREFIX: tl.constexpr,
                            INTERPRET: tl.constexpr):  # fmt: skip
    """Gradients of x, and partial sums a program ``[DIM, SPAN + 2]``: weight, then bias, then null."""
    # where am I
    inner = tl.arange(0, SPAN)
    inside = inner < INNER
    channel = tl.arange(0, 8)
    weights = tl.zeros([8, SPAN], tl.float32)
    biases = tl.zeros([8], tl.float32)
    nulls = tl.zeros([8], tl.float32)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        start = tl.cast(tile, tl.int64) * ROWS
        token = start + tl.arange(0, ROWS)
        here = token < tokens
        mask = here[:, None] & inside[None, :]
        at = start * INNER + (tl.arange(0, ROWS)[:, None] * INNER + inner[None, :])

        # load
        x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
        kept = _kept(token, tokens, keep_ptr, SLOTS, PREFIX)

        # compute in fp32
        down = tl.zeros([ROWS, SPAN], tl.float32)
        for c in tl.static_range(DIM):
            w = tl.load(weight_ptr + c * INNER + inner, mask=inside, other=0.0)
            z = tl.sum(x * w[None, :], axis=1) + tl.load(bias_ptr + c)
            up = tl.load(grad_ptr + token * DIM + c, mask=here, other=0.0).to(tl.float32)
            steep = tl.load(table_ptr + DIM + c) * slope(z + tl.load(table_ptr + c))
            grad_z = tl.where(kept, up * steep, 0.0)
            down += grad_z[:, None] * w[None, :]
            mine = channel == c
            weights += tl.where(mine[:, None], tl.sum(grad_z[:, None] * x, axis=0)[None, :], 0.0)
            biases += tl.where(mine, tl.sum(grad_z, axis=0), 0.0)
            nulls += tl.where(mine, tl.sum(tl.where(kept, 0.0, up), axis=0), 0.0)

        # store
        tl.store(grad_x_ptr + at, round_to(down, grad_x_ptr.dtype.element_ty, INTERPRET), mask=mask)
    out = sums_ptr + (tl.program_id(0) * DIM + channel) * (SPAN + 2)
    tl.store(out[:, None] + inner[None, :], weights, mask=(channel < DIM)[:, None])
    tl.store(out + SPAN, biases, mask=channel < DIM)
    tl.store(out + SPAN + 1, nulls, mask=channel < DIM)
