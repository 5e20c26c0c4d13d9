"""Attention over pages: split over the page table, then put together, alone or as the prologue of the projection.

One program attends for one session, one key head, a block of queries and one split, a fixed range of table entries, so
that a single session fills the chip. It leaves an unnormalised sum, the largest score (in units of log2) and the sum of
weights, all fp32. A tile's rows are queries times the heads that share the key head; query ``n`` sees the first
``context * P + start + n + 1`` tokens that the table names, and its context whatever ``start`` is.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import triton
import triton.language as tl
from flexlam_fast.kernels.pieces import round_to

PROCESSORS = 132  # of an H100: what the splits of one session are to fill
MOST_SPLITS = 64  # putting a row together holds all its splits' weights
MOST_SPLITS_OF_MANY = 8  # with more than 16 rows a split leaves whole tiles behind, which are to be written and read


class Plan(NamedTuple):
    """How attention is cut up: rows of queries and tokens of a tile, blocks of queries, splits, pages of a split."""

    rows: int
    tokens: int
    blocks: int
    splits: int
    pages: int
    warps: int
    stages: int


class Join(NamedTuple):
    """How splits are put together: lines and splits of a tile."""

    lines: int
    chunk: int
    warps: int


class Projection(NamedTuple):
    """How splits are put together and projected: rows and columns of a program, heads and splits of a tile.

    Two stages: a third would have 93 kB of splits on their way, and two programs a processor instead of four.
    """

    rows: int
    columns: int
    heads: int
    chunk: int
    warps: int
    stages: int


@lru_cache(maxsize=1024)
def plan_of(queries: int, group: int, kv_heads: int, table: int, page: int, dim: int, size: int) -> Plan:
    """Cut up attention of ``queries`` tokens over a table of so many pages.

    Neither the batch nor what a session has in context counts, so that a session gets the same bits in any company.

    Args:
        queries: tokens a session.
        group: query heads of a key head.
        kv_heads: key heads.
        table: entries of a session's page table.
        page: tokens of a page.
        dim: head dimension.
        size: bytes of an element; fp32 has no matrix instruction and takes smaller tiles, which must fit in registers.
    """
    lines = queries * group
    rows = max(16, min(64 if size < 4 else 16, triton.next_power_of_2(lines)))
    # 64 x 64 for the head dimension 64, 16 kB of keys and values in half precision; no longer than the table
    tokens = max(16, min((64 if size < 4 else 32) * 64 // max(dim, 64), triton.next_power_of_2(table * page)))
    blocks = triton.cdiv(lines, rows)
    most = MOST_SPLITS if lines <= 16 else MOST_SPLITS_OF_MANY
    wanted = max(1, min(most, PROCESSORS // (kv_heads * blocks), table))
    pages = max(triton.cdiv(table, wanted), triton.cdiv(tokens, page))
    warps = 8 if rows * dim > 64 * 64 else 4
    return Plan(rows, tokens, blocks, triton.cdiv(table, pages), pages, warps, 3 if size < 4 else 2)


def join_of(splits: int, dim: int) -> Join:
    """Put one line of a query and a head together in a program: all its splits are in flight at once."""
    return Join(1, max(1, min(triton.next_power_of_2(splits), 4096 // dim)), 4)


def projection_of(rows: int, width: int, heads: int, dim: int, splits: int) -> Projection:
    """Choose the tile of ``rows`` tokens times ``width`` columns.

    Few rows: one a program, without matrix instructions, 8 columns for a single row (32 programs for the width 256) and
    up to 64 as rows fill the chip, because every program puts its row together anew. From 128 rows on: 16 a program.
    """
    few = triton.next_power_of_2(splits)
    if rows >= 128:
        return Projection(16, 32 if rows < 1024 else 64, 1, max(1, min(few, 512 // dim)), 8, 2)
    columns = min(32, max(8, triton.next_power_of_2(rows * width // (4 * PROCESSORS) + 1)))
    together = max(1, min(triton.next_power_of_2(heads), 8192 // (dim * min(few, 32))))
    return Projection(1, columns, together, max(1, min(few, 8192 // dim)), 8, 2)


@triton.jit
def _pool_rows(table_ptr, first, end, last_page, PAGE: tl.constexpr, TOKENS: tl.constexpr):
    """Rows of the pool, int64 ``[TOKENS]``, of a session's tokens from ``first``; entries from ``end`` are not read."""
    token = first + tl.arange(0, TOKENS)
    if PAGE % TOKENS == 0:  # one page
        page = tl.load(table_ptr + first // PAGE)
        page = tl.minimum(tl.maximum(page, 0), last_page).to(tl.int64)
        rows = page * PAGE + (first % PAGE + tl.arange(0, TOKENS))
    else:
        pages = tl.load(table_ptr + token // PAGE, mask=token < end, other=0)
        pages = tl.minimum(tl.maximum(pages, 0), last_page).to(tl.int64)
        rows = pages * PAGE + token % PAGE
    return rows


@triton.jit
def _soften(top, score):
    """Weights of the scores against the new largest one; that, and what all older weights shrink by, come with them."""
    higher = tl.maximum(top, tl.max(score, axis=1))
    base = tl.where(higher == float("-inf"), 0.0, higher)  # of a row that has seen nothing yet
    return higher, tl.exp2(top - base), tl.exp2(score - base[:, None])


@triton.jit
def attend_kernel(q_ptr, k_pages_ptr, v_pages_ptr, table_ptr, context_ptr, start_ptr, out_ptr, tops_ptr, sums_ptr,
                  queries, entries, last_page, table_b, context_b, start_b, scale, HEADS: tl.constexpr,
                  KV_HEADS: tl.constexpr, DIM: tl.constexpr, PAGE: tl.constexpr, ROWS: tl.constexpr,
                  TOKENS: tl.constexpr, BLOCKS: tl.constexpr, SPLITS: tl.constexpr, PAGES: tl.constexpr,
                  INTERPRET: tl.constexpr):  # fmt: skip
    """One split; with SPLITS 1 ``out`` is the result ``[B, queries, HEADS, DIM]``, else fp32 ``[.., SPLITS, DIM]``."""
    # where am I
    GROUP: tl.constexpr = HEADS // KV_HEADS
    DTYPE: tl.constexpr = v_pages_ptr.dtype.element_ty
    WORK: tl.constexpr = tl.float32 if INTERPRET else DTYPE
    block = tl.program_id(0) % BLOCKS
    split = tl.program_id(0) // BLOCKS % SPLITS
    kv_head = tl.program_id(0) // (BLOCKS * SPLITS) % KV_HEADS
    session = (tl.program_id(0) // (BLOCKS * SPLITS * KV_HEADS)).to(tl.int64)
    row = block * ROWS + tl.arange(0, ROWS)
    query = row // GROUP
    here = query < queries
    line = (session * queries + query) * HEADS + (kv_head * GROUP + row % GROUP)
    channel = tl.arange(0, DIM)

    # load
    q = tl.load(q_ptr + line[:, None] * DIM + channel[None, :], mask=here[:, None], other=0.0).to(WORK)
    full = tl.load(context_ptr + session * context_b) * PAGE
    own = tl.load(start_ptr + session * start_b) + 1
    last = tl.minimum(block * ROWS + ROWS - 1, queries * GROUP - 1) // GROUP
    end = tl.minimum(full + tl.maximum(own + last, 0), entries * PAGE)
    first = split * (PAGES * PAGE)
    end = tl.minimum(end, first + PAGES * PAGE)
    seen = tl.minimum(full + tl.maximum(own + query, 0), end)  # a tile may reach into the next split

    # compute in fp32
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    out = tl.zeros([ROWS, DIM], tl.float32)
    for i in range((tl.maximum(end - first, 0) + TOKENS - 1) // TOKENS):
        at = first + i * TOKENS
        token = at + tl.arange(0, TOKENS)
        rows = _pool_rows(table_ptr + session * table_b, at, end, last_page, PAGE, TOKENS) * KV_HEADS + kv_head
        place, there = rows[:, None] * DIM + channel[None, :], (token < end)[:, None]
        k = tl.load(k_pages_ptr + place, mask=there, other=0.0).to(WORK)
        v = tl.load(v_pages_ptr + place, mask=there, other=0.0).to(WORK)
        score = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        score = tl.where(token[None, :] < seen[:, None], score, float("-inf"))
        top, fade, weight = _soften(top, score)
        total = total * fade + tl.sum(weight, axis=1)
        out = tl.dot(round_to(weight, DTYPE, INTERPRET).to(WORK), v, out * fade[:, None], input_precision="ieee")

    # store
    if SPLITS == 1:
        out = out / tl.where(total == 0.0, 1.0, total)[:, None]
        out = round_to(out, out_ptr.dtype.element_ty, INTERPRET)
        tl.store(out_ptr + line[:, None] * DIM + channel[None, :], out, mask=here[:, None])
    else:
        part = line * SPLITS + split
        tl.store(out_ptr + part[:, None] * DIM + channel[None, :], out, mask=here[:, None])
        tl.store(tops_ptr + part, top, mask=here)
        tl.store(sums_ptr + part, total, mask=here)


@triton.jit
def _together(parts_ptr, tops_ptr, sums_ptr, line, here, DIM: tl.constexpr, SPLITS: tl.constexpr, PADDED: tl.constexpr,
              CHUNK: tl.constexpr):  # fmt: skip
    """Attended values fp32 ``[lines, DIM]`` from the splits of each ``line``; zeros where nothing was seen."""
    channel = tl.arange(0, DIM)
    if SPLITS == 1:
        out = tl.load(parts_ptr + line[:, None] * DIM + channel[None, :], mask=here[:, None], other=0.0).to(tl.float32)
    else:
        every = tl.arange(0, PADDED)
        at = line[:, None] * SPLITS + every[None, :]
        mask = here[:, None] & (every < SPLITS)[None, :]
        tops = tl.load(tops_ptr + at, mask=mask, other=float("-inf"))
        sums = tl.load(sums_ptr + at, mask=mask, other=0.0)
        top = tl.max(tops, axis=1)
        top = tl.where(top == float("-inf"), 0.0, top)
        total = tl.sum(tl.exp2(tops - top[:, None]) * sums, axis=1)
        out = tl.zeros([line.shape[0], DIM], tl.float32)
        for first in range(0, SPLITS, CHUNK):
            split = first + tl.arange(0, CHUNK)
            real = here[:, None] & (split < SPLITS)[None, :]
            part = line[:, None] * SPLITS + split[None, :]
            weight = tl.exp2(tl.load(tops_ptr + part, mask=real, other=float("-inf")) - top[:, None])
            place = part[:, :, None] * DIM + channel[None, None, :]
            out += tl.sum(weight[:, :, None] * tl.load(parts_ptr + place, mask=real[:, :, None], other=0.0), axis=1)
        out = out / tl.where(total == 0.0, 1.0, total)[:, None]
    return out


@triton.jit
def join_kernel(parts_ptr, tops_ptr, sums_ptr, out_ptr, lines, DIM: tl.constexpr, SPLITS: tl.constexpr,
                PADDED: tl.constexpr, LINES: tl.constexpr, CHUNK: tl.constexpr, INTERPRET: tl.constexpr):  # fmt: skip
    """Put the splits of LINES lines, of a query and a head each, together."""
    line = tl.program_id(0).to(tl.int64) * LINES + tl.arange(0, LINES)
    here = line < lines
    value = _together(parts_ptr, tops_ptr, sums_ptr, line, here, DIM, SPLITS, PADDED, CHUNK)
    place = line[:, None] * DIM + tl.arange(0, DIM)[None, :]
    tl.store(out_ptr + place, round_to(value, out_ptr.dtype.element_ty, INTERPRET), mask=here[:, None])


@triton.jit
def project_kernel(parts_ptr, tops_ptr, sums_ptr, weight_ptr, residual_ptr, out_ptr, rows, width, HEADS: tl.constexpr,
                   DIM: tl.constexpr, SPLITS: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr,
                   COLUMNS: tl.constexpr, TOGETHER: tl.constexpr, CHUNK: tl.constexpr,
                   INTERPRET: tl.constexpr):  # fmt: skip
    """Splits to ``residual + attended @ weight.T``, TOGETHER heads at a time; with ROWS above 1 one head at a time."""
    # where am I
    DTYPE: tl.constexpr = weight_ptr.dtype.element_ty
    WORK: tl.constexpr = tl.float32 if INTERPRET else DTYPE
    blocks = (width + COLUMNS - 1) // COLUMNS
    row = (tl.program_id(0) // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < width
    at = row[:, None] * width + column[None, :]
    mask = (row < rows)[:, None] & inside[None, :]
    out = tl.load(residual_ptr + at, mask=mask, other=0.0).to(tl.float32)

    # load and compute in fp32
    for head in range(0, HEADS, TOGETHER):
        if ROWS == 1:  # a third axis for the heads: flattened, all warps would hold all of the weights' tile
            heads = head + tl.arange(0, TOGETHER)
            w_mask = inside[:, None, None] & (heads < HEADS)[None, :, None]
            place = column[:, None, None].to(tl.int64) * (HEADS * DIM) + heads[None, :, None] * DIM
            place = place + tl.arange(0, DIM)[None, None, :]
            w = tl.load(weight_ptr + place, mask=w_mask, other=0.0).to(tl.float32)
            line = (tl.program_id(0) // blocks).to(tl.int64) * HEADS + heads
            x = _together(parts_ptr, tops_ptr, sums_ptr, line, heads < HEADS, DIM, SPLITS, PADDED, CHUNK)
            x = round_to(x, DTYPE, INTERPRET).to(tl.float32)
            out += tl.sum(tl.sum(x[None, :, :] * w, axis=2), axis=1)[None, :]
        else:
            place = column[None, :].to(tl.int64) * (HEADS * DIM) + (head * DIM + tl.arange(0, DIM))[:, None]
            w = tl.load(weight_ptr + place, mask=inside[None, :], other=0.0).to(WORK)
            x = _together(parts_ptr, tops_ptr, sums_ptr, row * HEADS + head, row < rows, DIM, SPLITS, PADDED, CHUNK)
            out = tl.dot(round_to(x, DTYPE, INTERPRET).to(WORK), w, out, input_precision="ieee")

    # store
    tl.store(out_ptr + at, round_to(out, out_ptr.dtype.element_ty, INTERPRET), mask=mask)
