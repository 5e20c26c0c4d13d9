"""Norms of rows with what stands behind them, and gated residual sums: forward, backward, and the sums over rows.

A program takes a tile of rows of one group, whose scale, shift or gate it loads once. Backward, it goes through every
``pieces``-th tile of its group and leaves one partial sum, which another launch adds in order; both cuts depend on
shapes alone. Rows may be any number of elements apart.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from flexlam_fast.kernels.pieces import inverse_root, round_to

ELEMENTS = 2048  # of a tile: 16 for each of 128 threads, and backward twice as many sums
PROGRAMS = 1056  # of a backward grid, about: 8 for each of an H100's 132 processors; fixed, so that sums are too


class Tile(NamedTuple):
    """Rows of a tile, its columns up to a power of two, and the warps of a program."""

    rows: int
    span: int
    warps: int


def tile_of(count: int, width: int) -> Tile:
    """How groups of ``count`` rows of ``width`` are cut up."""
    span = triton.next_power_of_2(width)
    rows = max(1, min(ELEMENTS // span, triton.next_power_of_2(count)))
    return Tile(rows, span, max(4, min(16, rows * span // 512)))


def pieces_of(groups: int, count: int, rows: int) -> int:
    """Into how many partial sums a group's rows go."""
    return max(1, min(triton.cdiv(count, rows), PROGRAMS // groups))


def joined_of(pieces: int) -> tuple[int, int]:
    """Partial sums and columns of a tile that adds them: one after the other, 1,056 would wait an estimated 90 us."""
    parts = min(64, triton.next_power_of_2(pieces))
    return parts, min(128, ELEMENTS // parts)


@triton.jit
def _factor(scale_ptr, at, there, ONE: tl.constexpr):
    """The scale of a group as what is multiplied by."""
    factor = tl.load(scale_ptr + at, mask=there, other=0.0).to(tl.float32)[None, :]
    return factor + 1.0 if ONE else factor


@triton.jit
def _tile(ptr, group, row, column, group_stride, row_stride, mask):
    """Rows of a group of a tensor, wherever they stand, in fp32; zeros where there are none."""
    at = (group * group_stride + row.to(tl.int64) * row_stride)[:, None] + column[None, :]
    return tl.load(ptr + at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def norm_kernel(x_ptr, scale_ptr, shift_ptr, out_ptr, stats_ptr, x_group, x_row, scale_group, shift_group, groups,
                count, tiles, eps, WIDTH: tl.constexpr, SPAN: tl.constexpr, ROWS: tl.constexpr, CENTER: tl.constexpr,
                ONE: tl.constexpr, SHIFT: tl.constexpr, INTERPRET: tl.constexpr):  # fmt: skip
    """One tile of ``out = y * scale + shift``, and each row's 1/deviation and, with CENTER, mean."""
    # where am I
    group = (tl.program_id(0) // tiles).to(tl.int64)
    index = (tl.program_id(0) % tiles) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, SPAN)
    there, here = column < WIDTH, index < count
    mask = here[:, None] & there[None, :]
    row = group * count + index

    # load
    y = _tile(x_ptr, group, index, column, x_group, x_row, mask)
    factor = _factor(scale_ptr, group * scale_group + column, there, ONE)

    # compute in fp32
    if CENTER:
        mean = tl.sum(y, axis=1) / WIDTH
        y = tl.where(mask, y - mean[:, None], 0.0)
    rstd = inverse_root(tl.sum(y * y, axis=1) / WIDTH + eps)
    y = y * rstd[:, None]
    if not CENTER:
        y = round_to(y, x_ptr.dtype.element_ty, INTERPRET).to(tl.float32)
    y = y * factor
    if SHIFT:
        y += tl.load(shift_ptr + group * shift_group + column, mask=there, other=0.0).to(tl.float32)[None, :]

    # store
    at = row[:, None] * WIDTH + column[None, :]
    tl.store(out_ptr + at, round_to(y, out_ptr.dtype.element_ty, INTERPRET), mask=mask)
    tl.store(stats_ptr + row, rstd, mask=here)
    if CENTER:
        tl.store(stats_ptr + tl.cast(groups, tl.int64) * count + row, mean, mask=here)


@triton.jit
def norm_backward_kernel(grad_ptr, x_ptr, scale_ptr, stats_ptr, dx_ptr, sums_ptr, grad_group, grad_row, x_group, x_row,
                         scale_group, groups, count, tiles, pieces, WIDTH: tl.constexpr, SPAN: tl.constexpr,
                         ROWS: tl.constexpr, CENTER: tl.constexpr, ONE: tl.constexpr, SHIFT: tl.constexpr,
                         INTERPRET: tl.constexpr):  # fmt: skip
    """Gradient of x, and a program's partial sums ``[2 or 1, SPAN]`` of the scale's gradient and the shift's.

    With y the normed row and h = grad * factor, dx = (h - mean(h) - y * mean(h * y)) * rstd; without CENTER no mean(h).
    """
    # where am I
    group = (tl.program_id(0) // pieces).to(tl.int64)
    column = tl.arange(0, SPAN)
    there = column < WIDTH
    factor = _factor(scale_ptr, group * scale_group + column, there, ONE)
    dscale = tl.zeros([ROWS, SPAN], tl.float32)
    dshift = tl.zeros([ROWS, SPAN], tl.float32)
    for tile in range(tl.program_id(0) % pieces, tiles, pieces):
        index = tile * ROWS + tl.arange(0, ROWS)
        here = index < count
        mask = here[:, None] & there[None, :]
        row = group * count + index

        # load
        grad = _tile(grad_ptr, group, index, column, grad_group, grad_row, mask)
        y = _tile(x_ptr, group, index, column, x_group, x_row, mask)
        rstd = tl.load(stats_ptr + row, mask=here, other=0.0)[:, None]

        # compute in fp32
        if CENTER:
            y -= tl.load(stats_ptr + tl.cast(groups, tl.int64) * count + row, mask=here, other=0.0)[:, None]
        y = y * rstd
        h = grad * factor
        down = h - y * (tl.sum(h * y, axis=1) / WIDTH)[:, None]
        if CENTER:
            down -= (tl.sum(h, axis=1) / WIDTH)[:, None]
            dscale += grad * y
        else:  # what the scale was multiplied with
            dscale += grad * round_to(y, x_ptr.dtype.element_ty, INTERPRET).to(tl.float32)
        if SHIFT:
            dshift += grad

        # store
        at = row[:, None] * WIDTH + column[None, :]
        tl.store(dx_ptr + at, round_to(down * rstd, dx_ptr.dtype.element_ty, INTERPRET), mask=mask)
    at = tl.program_id(0).to(tl.int64) * (2 * SPAN if SHIFT else SPAN) + column
    tl.store(sums_ptr + at, tl.sum(dscale, axis=0))
    if SHIFT:
        tl.store(sums_ptr + at + SPAN, tl.sum(dshift, axis=0))


@triton.jit
def gate_kernel(x_ptr, y_ptr, gate_ptr, out_ptr, x_group, x_row, y_group, y_row, gate_group, count, tiles,
                WIDTH: tl.constexpr, SPAN: tl.constexpr, ROWS: tl.constexpr, INTERPRET: tl.constexpr):  # fmt: skip
    """One tile of ``out = x + gate * y``."""
    # where am I
    group = (tl.program_id(0) // tiles).to(tl.int64)
    index = (tl.program_id(0) % tiles) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, SPAN)
    mask = (index < count)[:, None] & (column < WIDTH)[None, :]

    # load
    x = _tile(x_ptr, group, index, column, x_group, x_row, mask)
    y = _tile(y_ptr, group, index, column, y_group, y_row, mask)
    gate = _factor(gate_ptr, group * gate_group + column, column < WIDTH, False)

    # compute in fp32
    out = x + gate * y

    # store
    at = (group * count + index)[:, None] * WIDTH + column[None, :]
    tl.store(out_ptr + at, round_to(out, out_ptr.dtype.element_ty, INTERPRET), mask=mask)


@triton.jit
def gate_backward_kernel(grad_ptr, y_ptr, gate_ptr, dy_ptr, sums_ptr, grad_group, grad_row, y_group, y_row, gate_group,
                         count, tiles, pieces, WIDTH: tl.constexpr, SPAN: tl.constexpr, ROWS: tl.constexpr,
                         INTERPRET: tl.constexpr):  # fmt: skip
    """Gradient of y, and a program's partial sum ``[SPAN]`` of the gate's."""
    # where am I
    group = (tl.program_id(0) // pieces).to(tl.int64)
    column = tl.arange(0, SPAN)
    there = column < WIDTH
    gate = _factor(gate_ptr, group * gate_group + column, there, False)
    sums = tl.zeros([ROWS, SPAN], tl.float32)
    for tile in range(tl.program_id(0) % pieces, tiles, pieces):
        index = tile * ROWS + tl.arange(0, ROWS)
        mask = (index < count)[:, None] & there[None, :]

        # load
        grad = _tile(grad_ptr, group, index, column, grad_group, grad_row, mask)
        y = _tile(y_ptr, group, index, column, y_group, y_row, mask)

        # compute in fp32
        sums += grad * y

        # store
        at = (group * count + index)[:, None] * WIDTH + column[None, :]
        tl.store(dy_ptr + at, round_to(grad * gate, dy_ptr.dtype.element_ty, INTERPRET), mask=mask)
    tl.store(sums_ptr + tl.program_id(0).to(tl.int64) * SPAN + column, tl.sum(sums, axis=0))


@triton.jit
def join_kernel(sums_ptr, first_ptr, second_ptr, pieces, WIDTH: tl.constexpr, SPAN: tl.constexpr, BOTH: tl.constexpr,
                PARTS: tl.constexpr, BLOCK: tl.constexpr, INTERPRET: tl.constexpr):  # fmt: skip
    """Add a group's partial sums ``[pieces, 2 or 1, SPAN]``, PARTS at a time; with BOTH there are two results."""
    # where am I
    group = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = column < WIDTH
    step: tl.constexpr = 2 * SPAN if BOTH else SPAN
    first = tl.zeros([PARTS, BLOCK], tl.float32)
    second = tl.zeros([PARTS, BLOCK], tl.float32)

    # load, and compute in fp32
    for start in range(0, pieces, PARTS):
        piece = start + tl.arange(0, PARTS)
        mask = (piece < pieces)[:, None] & there[None, :]
        at = sums_ptr + ((group * pieces + piece) * step)[:, None] + column[None, :]
        first += tl.load(at, mask=mask, other=0.0)
        if BOTH:
            second += tl.load(at + SPAN, mask=mask, other=0.0)

    # store
    to = group * WIDTH + column
    tl.store(first_ptr + to, round_to(tl.sum(first, axis=0), first_ptr.dtype.element_ty, INTERPRET), mask=there)
    if BOTH:
        tl.store(second_ptr + to, round_to(tl.sum(second, axis=0), second_ptr.dtype.element_ty, INTERPRET), mask=there)
