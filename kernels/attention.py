"""Dense attention with an online softmax: a program takes a block of queries of one head past all its keys.

Scores, maxima, sums and outputs stay on chip in fp32; probabilities are rounded to the values' dtype for the second
product, as FlashAttention does. Blocks of keys that every query of the program sees go without a mask.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from flexlam_fast.kernels.pieces import round_to

INTERPRETED = triton.knobs.runtime.interpret
PROCESSORS = 132  # of an H100


class Tile(NamedTuple):
    """Queries of a program, keys at a time, warps, and stages of the loads."""

    rows: int
    columns: int
    warps: int
    stages: int


def tile_of(queries: int, rows_of_heads: int, dim: int, size: int) -> Tile:
    """Choose a tile for ``queries`` in each of ``rows_of_heads`` (batch times heads) of elements of ``size`` bytes.

    Half precision takes 64 queries, the height of Hopper's matrix instruction, to each group of 4 warps: 128 where that
    still fills every processor twice, and 16 where there are no more. fp32 has no tensor cores here, and 32 by 32
    scores are what it holds without spilling; at head size 128 it is 16 by 16 (96 registers; Triton 3.6 spills two
    with 32 columns).
    """
    if size == 4 and dim > 64:
        return Tile(16, 16, 4, 2)
    if size == 4:
        return Tile(16 if queries <= 16 else 32, 32, 4, 2)
    if queries <= 16:
        return Tile(16, 64, 4, 3)
    if rows_of_heads * triton.cdiv(queries, 128) >= 2 * PROCESSORS:
        return Tile(128, 64, 8, 3)
    return Tile(64, 64, 4, 3)


@triton.jit
def _walk(total, top, out, q, k_ptr, v_ptr, k_stride, v_stride, start, end, last, keys, scale, DIM: tl.constexpr,
          COLUMNS: tl.constexpr, MASKED: tl.constexpr, INTERPRET: tl.constexpr):  # fmt: skip
    """Attend to keys ``start..end``; with MASKED only to those up to each row's ``last``."""
    channel = tl.arange(0, DIM)
    for first in range(start, end, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        at, there = column.to(tl.int64)[:, None], (column < keys)[:, None]
        if MASKED:
            k = tl.load(k_ptr + (at * k_stride + channel[None, :]), mask=there, other=0.0)
            v = tl.load(v_ptr + (at * v_stride + channel[None, :]), mask=there, other=0.0)
        else:
            k = tl.load(k_ptr + (at * k_stride + channel[None, :]))
            v = tl.load(v_ptr + (at * v_stride + channel[None, :]))
        if INTERPRET:
            k, v = k.to(tl.float32), v.to(tl.float32)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        if MASKED:
            scores = tl.where(column[None, :] <= last[:, None], scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, axis=1))
        shrink, p = tl.exp2(top - higher), tl.exp2(scores - higher[:, None])
        total, top = total * shrink + tl.sum(p, axis=1), higher
        p = round_to(p, v_ptr.dtype.element_ty, INTERPRET)
        if INTERPRET:
            p = p.to(tl.float32)
        out = tl.dot(p, v, out * shrink[:, None], input_precision="ieee")
    return total, top, out


@triton.jit
def attention_kernel(q_ptr, k_ptr, v_ptr, out_ptr, queries, keys, q_batch, q_token, q_head, k_batch, k_token, k_head,
                     v_batch, v_token, v_head, scale, HEADS: tl.constexpr, GROUPS: tl.constexpr, DIM: tl.constexpr,
                     ROWS: tl.constexpr, COLUMNS: tl.constexpr, CAUSAL: tl.constexpr,
                     INTERPRET: tl.constexpr):  # fmt: skip
    """q ``[B, queries, HEADS, DIM]``, k and v ``[B, keys, GROUPS, DIM]`` to a contiguous ``out`` of q's shape.

    ``scale`` is that of the scores times log2(e): exponentials are taken to base 2.
    """
    # where am I
    block = tl.cdiv(queries, ROWS) - 1 - tl.program_id(0)  # under a causal mask the last block has most to do
    batch, head = (tl.program_id(1) // HEADS).to(tl.int64), tl.program_id(1) % HEADS
    group = (head // (HEADS // GROUPS)).to(tl.int64)
    row, channel = block * ROWS + tl.arange(0, ROWS), tl.arange(0, DIM)
    here = (row < queries)[:, None]
    k_ptr += batch * k_batch + group * k_head
    v_ptr += batch * v_batch + group * v_head

    # load
    at = row.to(tl.int64)[:, None] * q_token + channel[None, :]
    q = tl.load(q_ptr + (batch * q_batch + head.to(tl.int64) * q_head) + at, mask=here, other=0.0)
    if INTERPRET:
        q = q.to(tl.float32)

    # compute in fp32
    total, top = tl.zeros([ROWS], tl.float32), tl.full([ROWS], float("-inf"), tl.float32)
    out = tl.zeros([ROWS, DIM], tl.float32)
    if CAUSAL:
        last = tl.minimum(row + (keys - queries), keys - 1)
        seen = tl.minimum(keys - queries + block * ROWS + 1, keys)  # by every row
        end = tl.minimum(keys - queries + (block + 1) * ROWS, keys)
    else:
        last = tl.zeros([ROWS], tl.int32) + (keys - 1)
        seen, end = keys, keys
    whole = seen // COLUMNS * COLUMNS
    total, top, out = _walk(total, top, out, q, k_ptr, v_ptr, k_token, v_token, 0, whole, last, keys, scale, DIM,
                            COLUMNS, False, INTERPRET)  # fmt: skip
    total, top, out = _walk(total, top, out, q, k_ptr, v_ptr, k_token, v_token, whole, end, last, keys, scale, DIM,
                            COLUMNS, True, INTERPRET)  # fmt: skip
    out = round_to(out / total[:, None], out_ptr.dtype.element_ty, INTERPRET)

    # store
    line = (batch * queries + row)[:, None] * HEADS + head
    tl.store(out_ptr + (line * DIM + channel[None, :]), out, mask=here)
