"""Codes to action scores in one launch: null-filled latents, stem, hourglass blocks and heads (paper A.4, Table 7).

A program takes 16 rows, the fewest that tensor cores multiply, through the whole network and keeps them on chip, so
that a batch of any size gives a row the same bits. Weights stream past a chunk of hidden units at a time: a chunk's
rows of ``down`` and of ``up`` lie together, ``[hidden, wide]``, and the next chunk is on its way while one is used.

At batch 1 one processor reads all weights, 1.28 MB in half precision for dmlab: an estimated 11 us at 64 bytes a clock
(112 GB/s). More programs would need a grid barrier, or a launch (1.3 us in a graph), after each of 11 dependent
products.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from flexlam_fast.kernels.pieces import inverse_root, round_to, value_of

INTERPRETED = triton.knobs.runtime.interpret
ROWS = 16  # of a program: the height of a matrix instruction
STAGES = 3  # one chunk in use, one that has come, one on its way
BUFFERS = 128 * 1024  # bytes for the two chunks at rest; with the rows themselves 144 KiB of an H100's 227


class Tile(NamedTuple):
    """Hidden units (and stem inputs) at a time, padded wide and head sizes, and warps."""

    chunk: int
    width: int
    heads: int
    warps: int


def tile_of(wide: int, actions: int, size: int) -> Tile:
    """Choose a tile for weights of ``size`` bytes: 32 units where two chunks fit on chip, else an instruction's 16.

    fp32 always takes 16: without tensor cores, 32 spill. Eight warps, because rows of 512 and their products would take
    236 registers a thread with four (128 with eight).
    """
    width = triton.next_power_of_2(max(wide, 16))
    chunk = 32 if size == 2 and 2 * 2 * 32 * width * size <= BUFFERS else 16  # two chunks, of down and of up
    return Tile(chunk, width, triton.next_power_of_2(max(actions, 16)), 8)


@triton.jit
def _operand(x, DTYPE: tl.constexpr, INTERPRET: tl.constexpr):
    """Round fp32 to the weights' dtype for a product; in the interpreter, which multiplies bf16 wrongly, fp32 again."""
    x = round_to(x, DTYPE, INTERPRET)
    if INTERPRET:
        x = x.to(tl.float32)
    return x


@triton.jit
def _weights(pointer, row, rows, column, columns, INTERPRET: tl.constexpr):
    """Load rows of a matrix ``[rows, columns]``; zeros beyond it."""
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    tile = tl.load(pointer + (row[:, None] * columns + column[None, :]), mask=inside, other=0.0)
    if INTERPRET:
        tile = tile.to(tl.float32)
    return tile


@triton.jit
def _vector(pointer, index, count):
    return tl.load(pointer + index, mask=index < count, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _normed(x, weight_ptr, bias_ptr, column, WIDE: tl.constexpr, EPS: tl.constexpr):
    """LayerNorm of fp32 rows whose columns beyond WIDE are zero; they stay zero."""
    mean = tl.sum(x, axis=1) / WIDE
    away = tl.where((column < WIDE)[None, :], x - mean[:, None], 0.0)
    scale = inverse_root(tl.sum(away * away, axis=1) / WIDE + EPS)
    return away * scale[:, None] * _vector(weight_ptr, column, WIDE) + _vector(bias_ptr, column, WIDE)


@triton.jit
def _inputs(column, row, here, codes_ptr, stride, k, null_ptr, previous_ptr, table_ptr, basis_ptr, levels_ptr,
            SLOTS: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr, CODES: tl.constexpr,
            ACTIONS: tl.constexpr):  # fmt: skip
    """Columns of ``concat(flatten(latents), previous)``, fp32; codes at or beyond ``k`` are not even read."""
    slot, channel, action = column // DIM, column % DIM, column - SLOTS * DIM
    kept = column < k * DIM
    code = tl.load(codes_ptr + (row[:, None] * stride + slot[None, :]), mask=here[:, None] & kept[None, :], other=0)
    code = tl.minimum(tl.maximum(code, 0), CODES - 1).to(tl.int32)
    digits = (code // tl.load(basis_ptr + channel)[None, :]) % tl.load(levels_ptr + channel)[None, :]
    half_width = tl.load(table_ptr + 2 * PADDED + channel)[None, :]
    high, low = tl.load(table_ptr + 3 * PADDED + channel)[None, :], tl.load(table_ptr + 4 * PADDED + channel)[None, :]
    latent = tl.where(kept[None, :], value_of(digits, half_width, high, low), tl.load(null_ptr + channel)[None, :])
    acted = here[:, None] & ((action >= 0) & (action < ACTIONS))[None, :]
    previous = tl.load(previous_ptr + (row[:, None] * ACTIONS + action[None, :]), mask=acted, other=0.0)
    return tl.where((action < 0)[None, :], latent, previous)


@triton.jit(do_not_specialize=["k"])
def translate_kernel(codes_ptr, null_ptr, previous_ptr, table_ptr, basis_ptr, levels_ptr, stem_ptr, stem_bias_ptr,
                     norm_ptr, norm_bias_ptr, down_ptr, down_bias_ptr, up_ptr, up_bias_ptr, final_ptr, final_bias_ptr,
                     head_ptr, head_bias_ptr, out_ptr, batch, k, stride, SLOTS: tl.constexpr, DIM: tl.constexpr,
                     PADDED: tl.constexpr, CODES: tl.constexpr, ACTIONS: tl.constexpr, HEADS: tl.constexpr,
                     WIDE: tl.constexpr, WIDTH: tl.constexpr, HIDDEN: tl.constexpr, DEPTH: tl.constexpr,
                     CHUNK: tl.constexpr, ROWS: tl.constexpr, EPS: tl.constexpr, INTERPRET: tl.constexpr):  # fmt: skip
    """Codes ``[batch, >= k]`` and previous actions ``[batch, ACTIONS]`` to fp32 scores ``[batch, ACTIONS]``."""
    # where am I
    DTYPE: tl.constexpr = stem_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    here = row < batch
    wide, unit, head = tl.arange(0, WIDTH), tl.arange(0, CHUNK), tl.arange(0, HEADS)

    # load and compute in fp32: the stem
    INPUTS: tl.constexpr = SLOTS * DIM + ACTIONS
    x = tl.zeros([ROWS, WIDTH], tl.float32) + _vector(stem_bias_ptr, wide, WIDE)
    for i in range((INPUTS + CHUNK - 1) // CHUNK):
        column = i * CHUNK + unit
        part = _inputs(column, row, here, codes_ptr, stride, k, null_ptr, previous_ptr, table_ptr, basis_ptr,
                       levels_ptr, SLOTS, DIM, PADDED, CODES, ACTIONS)  # fmt: skip
        weight = _weights(stem_ptr, column, INPUTS, wide, WIDE, INTERPRET)
        x = tl.dot(_operand(part, DTYPE, INTERPRET), weight, x, input_precision="ieee")

    # the blocks, as one loop over all chunks, so that loads run ahead from one block into the next
    PARTS: tl.constexpr = (HIDDEN + CHUNK - 1) // CHUNK
    n = _operand(x, DTYPE, INTERPRET)
    for i in range(DEPTH * PARTS):
        block, inner = i // PARTS, (i % PARTS) * CHUNK + unit
        down = _weights(down_ptr + block * HIDDEN * WIDE, inner, HIDDEN, wide, WIDE, INTERPRET)
        up = _weights(up_ptr + block * HIDDEN * WIDE, inner, HIDDEN, wide, WIDE, INTERPRET)
        if i % PARTS == 0:
            normed = _normed(x, norm_ptr + block * WIDE, norm_bias_ptr + block * WIDE, wide, WIDE, EPS)
            n = _operand(normed, DTYPE, INTERPRET)
            x += _vector(up_bias_ptr + block * WIDE, wide, WIDE)
        h = tl.dot(n, tl.trans(down), input_precision="ieee") + _vector(down_bias_ptr + block * HIDDEN, inner, HIDDEN)
        h = 0.5 * h * (1.0 + tl.erf(h * 0.7071067811865476))
        x = tl.dot(_operand(h, DTYPE, INTERPRET), up, x, input_precision="ieee")

    # the heads
    n = _operand(_normed(x, final_ptr, final_bias_ptr, wide, WIDE, EPS), DTYPE, INTERPRET)
    weight = _weights(head_ptr, head, ACTIONS, wide, WIDE, INTERPRET)
    out = tl.dot(n, tl.trans(weight), input_precision="ieee") + _vector(head_bias_ptr, head, ACTIONS)

    # store
    at = row[:, None] * ACTIONS + head[None, :]
    tl.store(out_ptr + at, out, mask=here[:, None] & (head < ACTIONS)[None, :])
