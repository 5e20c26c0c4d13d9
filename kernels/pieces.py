"""Pieces that the bottleneck's kernels share: rounding, retained lengths, digits, codes."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def round_to(x, DTYPE: tl.constexpr, INTERPRETED: tl.constexpr):
    """Cast fp32 to ``DTYPE``, to nearest even; Triton's interpreter would cut bf16 off instead."""
    if INTERPRETED and tl.bfloat16 == DTYPE:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = tl.where(x == x, rounded, bits | 0x400000).to(tl.float32, bitcast=True)
    return x.to(DTYPE)


@triton.jit
def inverse_root(x):
    """Return ``1 / sqrt(x)`` of a number that scales a whole row, each operation rounded to nearest.

    Plain ``1.0 / tl.sqrt(x)`` is two approximate instructions on a GPU, whose errors every element of the row shares.
    """
    return tl.div_rn(1.0, tl.sqrt_rn(x))


@triton.jit
def draw_length(block, seed_ptr, edges_ptr, SLOTS: tl.constexpr, BITS: tl.constexpr):
    """Return the retained length of each ``block`` (int64): Philox at its counter, then a search of the edges."""
    at = tl.load(seed_ptr + 1) + block
    low, high = (at & 0xFFFFFFFF).to(tl.uint32), ((at >> 32) & 0xFFFFFFFF).to(tl.uint32)
    zero = low * 0
    word, _, _, _ = tl.philox(tl.load(seed_ptr), low, high, zero, zero)
    word = word.to(tl.int64) & 0xFFFFFFFF
    keep = tl.zeros_like(word).to(tl.int32)
    for i in tl.static_range(BITS):
        half = 1 << (BITS - 1 - i)
        edge = tl.load(edges_ptr + keep + half - 1, mask=keep + half <= SLOTS, other=1 << 40)
        keep = tl.where(word >= edge, keep + half, keep)
    return keep


@triton.jit
def count_digits(z, table_ptr, column, WIDTH: tl.constexpr, STEPS: tl.constexpr):
    """Count the thresholds at or below ``z [rows, WIDTH]``; rows 5 and on of the table hold them."""
    digits = tl.zeros(z.shape, tl.int32)
    if STEPS <= 16:
        for j in tl.static_range(STEPS):
            digits += (z >= tl.load(table_ptr + (5 + j) * WIDTH + column)[None, :]).to(tl.int32)
    else:
        for j in range(STEPS):
            digits += (z >= tl.load(table_ptr + (5 + j) * WIDTH + column)[None, :]).to(tl.int32)
    return digits


@triton.jit
def value_of(digits, half_width, high, low):
    """Return ``(digits - half_width) / half_width`` rounded as a division rounds it, by its reciprocal in two parts.

    ``high`` has 16 bits, so its product is exact, and ``low`` holds the rest. IEEE division would cost a subroutine.
    """
    q = digits.to(tl.float32) - half_width
    return q * high + q * low


@triton.jit
def _sum_of(part, token, which: tl.constexpr):
    return tl.sum(tl.where(token[None, :] == which, part, 0), axis=1)


@triton.jit
def add_up(part, token, ROWS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr):
    """Sum ``part [ROWS, WIDTH]`` over the channels of each of ``GROUP`` tokens: ``[ROWS, GROUP]``."""
    # one return at the end: what follows a return under a constexpr is compiled all the same
    if GROUP * DIM == WIDTH:
        out = tl.sum(tl.reshape(part, [ROWS, GROUP, DIM]), axis=2)
    elif GROUP == 1:
        out = tl.reshape(tl.sum(part, axis=1), [ROWS, 1])
    else:
        even = tl.join(_sum_of(part, token, 0), _sum_of(part, token, GROUP // 2))
        odd = tl.join(_sum_of(part, token, GROUP // 4), _sum_of(part, token, GROUP // 2 + GROUP // 4))
        parts = tl.join(even, odd)  # [ROWS, halves, quarters], the order of a reshape
        if GROUP == 8:
            even = tl.join(_sum_of(part, token, 1), _sum_of(part, token, 5))
            odd = tl.join(_sum_of(part, token, 3), _sum_of(part, token, 7))
            parts = tl.join(parts, tl.join(even, odd))
        out = tl.reshape(parts, [ROWS, GROUP])
    return out


@triton.jit
def spread_out(per_token, token, GROUP: tl.constexpr):
    """Repeat ``per_token [rows, GROUP]`` over the columns of each token: ``[rows, width]``."""
    index = tl.arange(0, GROUP)
    out = tl.zeros([per_token.shape[0], token.shape[0]], per_token.dtype)
    for g in tl.static_range(GROUP):
        one = tl.sum(tl.where(index[None, :] == g, per_token, 0), axis=1)
        out = tl.where(token[None, :] == g, one[:, None], out)
    return out


@triton.jit
def slope(x):
    """Return ``sech(x)**2``, the derivative of tanh, without the cancellation of ``1 - tanh(x)**2``."""
    e = tl.exp(-2.0 * tl.abs(x))
    s = 1.0 + e
    return 4.0 * e / (s * s)
