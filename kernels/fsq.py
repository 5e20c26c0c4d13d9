"""FSQ with retained prefix and null fill: one launch forward, one backward, one from codes back.

A row of a tile is a *group* of tokens: as many as a 16-byte word has elements, so that a group of ``[d]`` latents
starts and ends on a 16-byte border for any ``d``, and loads and stores are 16 bytes wide. Columns beyond the group are
padding up to a power of two. What few tokens are left over go through the same kernels with groups of one.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from flexlam_fast.kernels.pieces import add_up, count_digits, draw_length, round_to, slope, spread_out, value_of
from torch import Tensor

from flexlam_fast.ops.reference import level_table
from flexlam_fast.ops.thresholds import thresholds

INTERPRETED = triton.knobs.runtime.interpret
ELEMENTS = 2048  # of a tile: four 16-byte words of fp32 for each of 128 threads
PROGRAMS = 1056  # of a backward grid, at most: 8 for each of an H100's 132 processors; fixed, so that sums are too


@triton.jit
def _retained(group, column, keep_ptr, keep_out_ptr, seed_ptr, edges_ptr, first, end, SLOTS: tl.constexpr,
              DIM: tl.constexpr, GROUP: tl.constexpr, SAMPLE: tl.constexpr, BITS: tl.constexpr):  # fmt: skip
    """Say which elements belong to retained slots; with SAMPLE, draw the lengths and write them down."""
    in_group = column // DIM
    if SLOTS % GROUP == 0:  # a group lies in one block
        start = first + group * GROUP
        block = start // SLOTS
        slot = (start - block * SLOTS).to(tl.int32)
        if SAMPLE:
            keep = draw_length(block, seed_ptr, edges_ptr, SLOTS, BITS)
            tl.store(keep_out_ptr + block, keep, mask=(slot == 0) & (start < end))
        else:
            keep = tl.load(keep_ptr + block, mask=start < end, other=0)
        kept = slot[:, None] + in_group[None, :] < keep[:, None]
    else:
        token = first + group[:, None] * GROUP + in_group[None, :]
        block = token // SLOTS
        slot = (token - block * SLOTS).to(tl.int32)
        there = (token < end) & (column < GROUP * DIM)[None, :]
        if SAMPLE:
            keep = draw_length(block, seed_ptr, edges_ptr, SLOTS, BITS)
            tl.store(keep_out_ptr + block, keep, mask=there & (slot == 0) & (column % DIM == 0)[None, :])
        else:
            keep = tl.load(keep_ptr + block, mask=there, other=0)
        kept = slot < keep
    return kept


@triton.jit
def fsq_forward_kernel(z_ptr, latents_ptr, codes_ptr, keep_ptr, null_ptr, seed_ptr, edges_ptr, table_ptr, weight_ptr,
                       first, end, SLOTS: tl.constexpr, DIM: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr,
                       ROWS: tl.constexpr, STEPS: tl.constexpr, PREFIX: tl.constexpr, SAMPLE: tl.constexpr,
                       BITS: tl.constexpr, INTERPRET: tl.constexpr):  # fmt: skip
    """Tokens ``first..end`` of z ``[tokens, DIM]``, whole groups, to latents and codes."""
    # where am I
    group = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    here = first + group * GROUP < end
    mask = here[:, None] & (column < GROUP * DIM)[None, :]
    at = (tl.cast(first, tl.int64) * DIM + tl.program_id(0).to(tl.int64) * (ROWS * GROUP * DIM)) + (
        tl.arange(0, ROWS)[:, None] * (GROUP * DIM) + column[None, :]
    )

    # load
    z = tl.load(z_ptr + at, mask=mask, other=0.0).to(tl.float32)
    half_width = tl.load(table_ptr + 2 * WIDTH + column)[None, :]
    high = tl.load(table_ptr + 3 * WIDTH + column)[None, :]
    low = tl.load(table_ptr + 4 * WIDTH + column)[None, :]
    weight = tl.load(weight_ptr + column)[None, :]

    # compute in fp32
    digits = count_digits(z, table_ptr, column, WIDTH, STEPS)
    value = tl.where(z == z, value_of(digits, half_width, high, low), z)
    codes = add_up(digits * weight, column // DIM, ROWS, GROUP, DIM, WIDTH)
    if PREFIX:
        null = tl.load(null_ptr + column % DIM)[None, :]
        kept = _retained(
            group, column, keep_ptr, keep_ptr, seed_ptr, edges_ptr, first, end, SLOTS, DIM, GROUP, SAMPLE, BITS
        )
        value = tl.where(kept, value, null)

    # store
    tl.store(latents_ptr + at, round_to(value, latents_ptr.dtype.element_ty, INTERPRET), mask=mask)
    token = (first + tl.program_id(0).to(tl.int64) * (ROWS * GROUP)) + (
        tl.arange(0, ROWS)[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    )
    tl.store(codes_ptr + token, codes, mask=here[:, None])


@triton.jit
def fsq_backward_kernel(grad_ptr, z_ptr, grad_z_ptr, sums_ptr, keep_ptr, table_ptr, first, end, tiles,
                        SLOTS: tl.constexpr, DIM: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr,
                        ROWS: tl.constexpr, PREFIX: tl.constexpr, WITH_NULL: tl.constexpr,
                        INTERPRET: tl.constexpr):  # fmt: skip
    """Gradient of z, and one partial sum ``[WIDTH]`` a program of the null's."""
    # where am I
    column = tl.arange(0, WIDTH)
    row = tl.arange(0, ROWS)
    shift = tl.load(table_ptr + column)[None, :]
    gain = tl.load(table_ptr + WIDTH + column)[None, :]
    sums = tl.zeros([ROWS, WIDTH], tl.float32)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        start = tl.cast(tile, tl.int64) * ROWS
        group = start + row
        mask = (first + group * GROUP < end)[:, None] & (column < GROUP * DIM)[None, :]
        at = (tl.cast(first, tl.int64) * DIM + start * (GROUP * DIM)) + (row[:, None] * (GROUP * DIM) + column[None, :])

        # load
        grad = tl.load(grad_ptr + at, mask=mask, other=0.0).to(tl.float32)
        z = tl.load(z_ptr + at, mask=mask, other=0.0).to(tl.float32)

        # compute in fp32
        down = grad * gain * slope(z + shift)
        if PREFIX:
            kept = _retained(
                group, column, keep_ptr, keep_ptr, keep_ptr, keep_ptr, first, end, SLOTS, DIM, GROUP, False, 1
            )
            down = tl.where(kept, down, 0.0)
            if WITH_NULL:
                sums += tl.where(kept, 0.0, grad)

        # store
        tl.store(grad_z_ptr + at, round_to(down, grad_z_ptr.dtype.element_ty, INTERPRET), mask=mask)
    if WITH_NULL:
        tl.store(sums_ptr + tl.program_id(0) * WIDTH + column, tl.sum(sums, axis=0))


@triton.jit
def lookup_kernel(codes_ptr, latents_ptr, keep_ptr, null_ptr, table_ptr, basis_ptr, levels_ptr, first, end,
                  SLOTS: tl.constexpr, DIM: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
                  PREFIX: tl.constexpr):  # fmt: skip
    """Codes of tokens ``first..end`` to null-filled fp32 latents."""
    # where am I
    row, column, index = tl.arange(0, ROWS), tl.arange(0, WIDTH), tl.arange(0, GROUP)
    start = tl.program_id(0).to(tl.int64) * ROWS
    group = start + row
    here = first + group * GROUP < end

    # load
    token = (first + start * GROUP) + (row[:, None] * GROUP + index[None, :])
    code = spread_out(tl.load(codes_ptr + token, mask=here[:, None], other=0), column // DIM, GROUP)
    basis, levels = tl.load(basis_ptr + column)[None, :], tl.load(levels_ptr + column)[None, :]
    half_width = tl.load(table_ptr + 2 * WIDTH + column)[None, :]
    high = tl.load(table_ptr + 3 * WIDTH + column)[None, :]
    low = tl.load(table_ptr + 4 * WIDTH + column)[None, :]

    # compute in fp32
    value = value_of((code // basis) % levels, half_width, high, low)
    if PREFIX:
        null = tl.load(null_ptr + column % DIM)[None, :]
        kept = _retained(group, column, keep_ptr, keep_ptr, keep_ptr, keep_ptr, first, end, SLOTS, DIM, GROUP, False, 1)
        value = tl.where(kept, value, null)

    # store
    at = (tl.cast(first, tl.int64) + start * GROUP) * DIM + (row[:, None] * (GROUP * DIM) + column[None, :])
    tl.store(latents_ptr + at, value, mask=here[:, None] & (column < GROUP * DIM)[None, :])


class Tile(NamedTuple):
    """How tokens ``first..end`` are cut up, and the constants of their columns."""

    first: int
    end: int
    group: int
    width: int
    rows: int
    floats: Tensor  # [5 + steps, width]: shift, gain, half width, its reciprocal in two parts, thresholds
    weight: Tensor  # [width] int32, 0 in padding
    basis: Tensor  # [width] int32, 1 in padding
    counts: Tensor  # [width] int32, 2 in padding

    @property
    def tiles(self) -> int:
        """How many tiles there are."""
        return triton.cdiv((self.end - self.first) // self.group, self.rows)


@lru_cache(maxsize=256)
def columns(levels: tuple[int, ...], group: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the constants of a group's columns, as :class:`Tile` has them."""
    table, borders = level_table(levels, device), thresholds(levels, device)
    gain = table.half / table.half_width
    inverse = 1.0 / table.half_width.double()
    mantissa, exponent = torch.frexp(inverse)
    high = torch.ldexp((mantissa * 2**16).floor(), exponent - 16).float()
    rows = torch.stack([table.shift, gain, table.half_width.float(), high, (inverse - high.double()).float()])
    pad = triton.next_power_of_2(group * len(levels)) - group * len(levels)
    floats = torch.cat([rows, borders]).repeat(1, group)
    fill = (
        torch.tensor([0.0, 0.0, 1.0, 1.0, 0.0] + [torch.nan] * len(borders), dtype=torch.float32, device=device)
        .unsqueeze(1)
        .expand(-1, pad)
    )
    weight, counts = (x.to(torch.int32).repeat(group) for x in (table.basis, table.levels))
    one = torch.ones(pad, dtype=torch.int32, device=device)
    wide = torch.cat([floats, fill], dim=1).contiguous()
    made = wide, torch.cat([weight, 0 * one]), torch.cat([weight, one]), torch.cat([counts, 2 * one])
    settle(device)
    return made


def settle(device: torch.device) -> None:
    """Wait until constants that are to be cached are written: the next caller may be on another stream."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


def tiles_of(tokens: int, levels: tuple[int, ...], size: int, device: torch.device) -> list[Tile]:
    """Cut ``tokens`` of elements of ``size`` bytes into whole 16-byte groups, and what is left over into singles."""
    group = 16 // size
    whole = tokens - tokens % group
    cuts = [(0, whole, group), (whole, tokens, 1)]
    out = []
    for first, end, g in cuts:
        if first < end:
            width = triton.next_power_of_2(g * len(levels))
            rows = max(1, min(ELEMENTS // width, triton.next_power_of_2((end - first) // g)))
            out.append(Tile(first, end, g, width, rows, *columns(levels, g, device)))
    return out
