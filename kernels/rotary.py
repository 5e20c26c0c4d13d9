"""QK-norm and RoPE of training: one launch for queries and keys, and one for their gradients.

A tile is ``[ROWS tokens, heads, half a head]``, twice: channel ``i`` and its partner ``i + D/2`` meet in one thread,
and cosines and sines are loaded once for all heads of queries and keys. Each input is read once and each result written
once, so both launches are bound by memory.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from flexlam_fast.kernels.pieces import round_to

ELEMENTS = 1024  # of half a tile of queries: 8, one 16-byte word of bf16, for each of 128 threads
HEADS = 8  # of a program, at most; cosines and sines are loaded again for the next eight
PROGRAMS = 528  # of a backward grid: 4 for each of an H100's 132 processors; fixed, so that sums are too


class Tile(NamedTuple):
    """How heads are cut up: tokens and heads of a program, programs across heads, and columns up to a power of two."""

    rows: int
    q_heads: int
    k_heads: int
    across: int
    padded: int
    warps: int


def tile_of(heads: int, kv_heads: int, half: int) -> Tile:
    """Return the tile for ``heads`` query and ``kv_heads`` key heads of ``2 half`` channels."""
    padded = triton.next_power_of_2(half)
    q_heads = max(1, min(triton.next_power_of_2(max(heads, 1)), HEADS, ELEMENTS // padded))
    across = max(1, triton.cdiv(heads, q_heads))
    k_heads = triton.next_power_of_2(max(1, triton.cdiv(kv_heads, across)))
    rows = max(1, ELEMENTS // (padded * max(q_heads, k_heads)))
    elements = rows * max(q_heads, k_heads) * padded
    return Tile(rows, q_heads, k_heads, across, padded, max(1, min(16, elements // 256)))


@triton.jit
def _two(ptr, at, mask, HALF: tl.constexpr):
    """Load both halves of heads in fp32."""
    first = tl.load(ptr + at, mask=mask, other=0.0).to(tl.float32)
    return first, tl.load(ptr + at + HALF, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _weight(ptr, i, HALF: tl.constexpr):
    """Both halves of a norm's weight, ``[1, 1, padded]``."""
    first, second = _two(ptr, i, i < HALF, HALF)
    return first[None, None, :], second[None, None, :]


@triton.jit
def _angles(ptr, line, tokens, stride_b, stride_n, i, mask, SECOND: tl.constexpr):
    """Cosines or sines ``[rows, 1, padded]`` of both halves; SECOND is 0 where they share theirs."""
    at = (line // tokens) * stride_b + (line % tokens) * stride_n
    first = tl.load(ptr + at[:, None, None] + i[None, None, :], mask=mask, other=0.0).to(tl.float32)
    if SECOND:
        second = tl.load(ptr + at[:, None, None] + SECOND + i[None, None, :], mask=mask, other=0.0).to(tl.float32)
    else:
        second = first
    return first, second


@triton.jit
def _rotated(x_ptr, out_ptr, at, to, mask, weight1, weight2, cos1, cos2, sin1, sin2, eps, HALF: tl.constexpr,
             INTERPRET: tl.constexpr):  # fmt: skip
    """Norm and rotate heads ``[rows, heads, padded]``, and store them."""
    x1, x2 = _two(x_ptr, at, mask, HALF)
    squares = tl.sum(x1 * x1 + x2 * x2, axis=2) * (1.0 / (2 * HALF))
    scale = tl.rsqrt(squares + eps)[:, :, None]
    y1, y2 = x1 * scale * weight1, x2 * scale * weight2
    DTYPE: tl.constexpr = out_ptr.dtype.element_ty
    tl.store(out_ptr + to, round_to(y1 * cos1 - y2 * sin1, DTYPE, INTERPRET), mask=mask)
    tl.store(out_ptr + to + HALF, round_to(y2 * cos2 + y1 * sin2, DTYPE, INTERPRET), mask=mask)


@triton.jit
def _turned_back(x_ptr, grad_ptr, out_ptr, at, grad_at, to, mask, weight1, weight2, cos1, cos2, sin1, sin2, eps,
                 HALF: tl.constexpr, INTERPRET: tl.constexpr):  # fmt: skip
    """Store the gradient of heads; return what each adds to that of the weight."""
    x1, x2 = _two(x_ptr, at, mask, HALF)
    g1, g2 = _two(grad_ptr, grad_at, mask, HALF)
    squares = tl.sum(x1 * x1 + x2 * x2, axis=2) * (1.0 / (2 * HALF))
    scale = tl.rsqrt(squares + eps)[:, :, None]
    n1, n2 = x1 * scale, x2 * scale
    dy1, dy2 = g1 * cos1 + g2 * sin2, g2 * cos2 - g1 * sin1
    dn1, dn2 = dy1 * weight1, dy2 * weight2
    along = (tl.sum(dn1 * n1 + dn2 * n2, axis=2) * (1.0 / (2 * HALF)))[:, :, None]
    DTYPE: tl.constexpr = out_ptr.dtype.element_ty
    tl.store(out_ptr + to, round_to(scale * (dn1 - n1 * along), DTYPE, INTERPRET), mask=mask)
    tl.store(out_ptr + to + HALF, round_to(scale * (dn2 - n2 * along), DTYPE, INTERPRET), mask=mask)
    return dy1 * n1, dy2 * n2


@triton.jit
def _heads_at(line, tokens, head, i, stride_b, stride_n, stride_h):
    """Elements from a tensor's start ``[rows, heads, padded]``."""
    start = (line // tokens) * stride_b + (line % tokens) * stride_n
    return start[:, None, None] + (head.to(tl.int64) * stride_h)[None, :, None] + i[None, None, :]


@triton.jit
def norm_rope_kernel(q_ptr, k_ptr, q_weight_ptr, k_weight_ptr, cos_ptr, sin_ptr, q_out_ptr, k_out_ptr, lines, tokens,
                     q_b, q_n, q_h, k_b, k_n, k_h, angle_b, angle_n, eps, Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr,
                     HALF: tl.constexpr, SECOND: tl.constexpr, ROWS: tl.constexpr, Q_BLOCK: tl.constexpr,
                     K_BLOCK: tl.constexpr, PADDED: tl.constexpr, INTERPRET: tl.constexpr):  # fmt: skip
    """ROWS of ``lines`` tokens, Q_BLOCK heads of queries and K_BLOCK of keys."""
    # where am I
    line = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    q_head = tl.program_id(1) * Q_BLOCK + tl.arange(0, Q_BLOCK)
    k_head = tl.program_id(1) * K_BLOCK + tl.arange(0, K_BLOCK)
    i = tl.arange(0, PADDED)
    there = (line < lines)[:, None, None] & (i < HALF)[None, None, :]
    q_mask, k_mask = there & (q_head < Q_HEADS)[None, :, None], there & (k_head < K_HEADS)[None, :, None]
    D: tl.constexpr = 2 * HALF

    # load what queries and keys share
    cos1, cos2 = _angles(cos_ptr, line, tokens, angle_b, angle_n, i, there, SECOND)
    sin1, sin2 = _angles(sin_ptr, line, tokens, angle_b, angle_n, i, there, SECOND)
    q1, q2 = _weight(q_weight_ptr, i, HALF)
    k1, k2 = _weight(k_weight_ptr, i, HALF)

    # compute in fp32, store
    q_at, q_to = _heads_at(line, tokens, q_head, i, q_b, q_n, q_h), _heads_at(line, 1, q_head, i, Q_HEADS * D, 0, D)
    _rotated(q_ptr, q_out_ptr, q_at, q_to, q_mask, q1, q2, cos1, cos2, sin1, sin2, eps, HALF, INTERPRET)
    k_at, k_to = _heads_at(line, tokens, k_head, i, k_b, k_n, k_h), _heads_at(line, 1, k_head, i, K_HEADS * D, 0, D)
    _rotated(k_ptr, k_out_ptr, k_at, k_to, k_mask, k1, k2, cos1, cos2, sin1, sin2, eps, HALF, INTERPRET)


@triton.jit
def norm_rope_backward_kernel(q_ptr, k_ptr, grad_q_ptr, grad_k_ptr, q_weight_ptr, k_weight_ptr, cos_ptr, sin_ptr,
                              q_out_ptr, k_out_ptr, sums_ptr, lines, tokens, tiles, q_b, q_n, q_h, k_b, k_n, k_h,
                              grad_q_b, grad_q_n, grad_q_h, grad_k_b, grad_k_n, grad_k_h, angle_b, angle_n, eps,
                              Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, HALF: tl.constexpr, SECOND: tl.constexpr,
                              ROWS: tl.constexpr, Q_BLOCK: tl.constexpr, K_BLOCK: tl.constexpr, PADDED: tl.constexpr,
                              INTERPRET: tl.constexpr):  # fmt: skip
    """Gradients of queries and keys, and of each weight one partial sum a program: ``sums [programs, 4, PADDED]``."""
    # where am I
    q_head = tl.program_id(1) * Q_BLOCK + tl.arange(0, Q_BLOCK)
    k_head = tl.program_id(1) * K_BLOCK + tl.arange(0, K_BLOCK)
    i = tl.arange(0, PADDED)
    D: tl.constexpr = 2 * HALF
    q1, q2 = _weight(q_weight_ptr, i, HALF)
    k1, k2 = _weight(k_weight_ptr, i, HALF)
    of_q1, of_q2 = tl.zeros([ROWS, Q_BLOCK, PADDED], tl.float32), tl.zeros([ROWS, Q_BLOCK, PADDED], tl.float32)
    of_k1, of_k2 = tl.zeros([ROWS, K_BLOCK, PADDED], tl.float32), tl.zeros([ROWS, K_BLOCK, PADDED], tl.float32)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        line = tl.cast(tile, tl.int64) * ROWS + tl.arange(0, ROWS)
        there = (line < lines)[:, None, None] & (i < HALF)[None, None, :]
        q_mask, k_mask = there & (q_head < Q_HEADS)[None, :, None], there & (k_head < K_HEADS)[None, :, None]

        # load what queries and keys share
        cos1, cos2 = _angles(cos_ptr, line, tokens, angle_b, angle_n, i, there, SECOND)
        sin1, sin2 = _angles(sin_ptr, line, tokens, angle_b, angle_n, i, there, SECOND)

        # compute in fp32, store; what is masked is zero and adds nothing
        at = _heads_at(line, tokens, q_head, i, q_b, q_n, q_h)
        grad_at = _heads_at(line, tokens, q_head, i, grad_q_b, grad_q_n, grad_q_h)
        to = _heads_at(line, 1, q_head, i, Q_HEADS * D, 0, D)
        add1, add2 = _turned_back(q_ptr, grad_q_ptr, q_out_ptr, at, grad_at, to, q_mask, q1, q2, cos1, cos2, sin1, sin2,
                                  eps, HALF, INTERPRET)  # fmt: skip
        of_q1 += add1
        of_q2 += add2
        at = _heads_at(line, tokens, k_head, i, k_b, k_n, k_h)
        grad_at = _heads_at(line, tokens, k_head, i, grad_k_b, grad_k_n, grad_k_h)
        to = _heads_at(line, 1, k_head, i, K_HEADS * D, 0, D)
        add1, add2 = _turned_back(k_ptr, grad_k_ptr, k_out_ptr, at, grad_at, to, k_mask, k1, k2, cos1, cos2, sin1, sin2,
                                  eps, HALF, INTERPRET)  # fmt: skip
        of_k1 += add1
        of_k2 += add2

    # store the partial sums
    program = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    row = sums_ptr + program * (4 * PADDED) + i
    tl.store(row, tl.sum(tl.sum(of_q1, axis=0), axis=0))
    tl.store(row + PADDED, tl.sum(tl.sum(of_q2, axis=0), axis=0))
    tl.store(row + 2 * PADDED, tl.sum(tl.sum(of_k1, axis=0), axis=0))
    tl.store(row + 3 * PADDED, tl.sum(tl.sum(of_k2, axis=0), axis=0))
