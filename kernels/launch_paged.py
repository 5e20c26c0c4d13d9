"""Launchers of the decision's attention: the write into pages, attention over them, and its output projection.

Arguments are checked. Nothing here reads a value of the device, so every launch can be captured in a graph.
``flexlam_fast.ops.contracts`` imports this module at the first launch, and nothing else does.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
from flexlam_fast.kernels import paged, rope
from flexlam_fast.kernels.fsq import INTERPRETED
from torch import Tensor


class Parts(NamedTuple):
    """What the splits left: sums ``[B, N, H, S, D]`` fp32 (with one split the result, in its dtype), and ``[.., S]``.

    ``tops`` are the largest scores in units of log2, -inf of a split that saw nothing, and ``sums`` the weights' sums.
    """

    values: Tensor
    tops: Tensor
    sums: Tensor
    splits: int


def page_write(
    qkv: Tensor,
    q_norm: Tensor,
    k_norm: Tensor,
    positions: Tensor,
    rows: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    theta: float,
    eps: float,
) -> Tensor:
    """Norm and rotate queries and keys; store keys and values; return the queries ``[B, N, H, D]``."""
    batch, tokens, _ = qkv.shape
    pages, page, kv_heads, dim = k_pages.shape
    total = qkv.shape[2] // dim
    heads = total - 2 * kv_heads
    q = qkv.new_empty(batch, tokens, heads, dim)
    block = rope.heads_of_a_program(total, dim, qkv.element_size())
    if batch * tokens:
        with _on(qkv.device):
            rope.rope_write_kernel[(batch * tokens, triton.cdiv(total, block))](
                qkv.contiguous(), q_norm.contiguous(), k_norm.contiguous(), positions, rows,
                rope.frequencies(theta, dim, qkv.device), q, k_pages, v_pages, tokens, pages * page,
                *positions.stride(), *rows.stride(), eps, HEADS=heads, KV_HEADS=kv_heads, HALF=dim // 2, BLOCK=block,
                INTERPRET=INTERPRETED, num_warps=1,
            )  # fmt: skip
    return q


def page_attend(q: Tensor, k_pages: Tensor, v_pages: Tensor, table: Tensor, context: Tensor, start: Tensor) -> Tensor:
    """Attention over pages ``[B, N, H, D]``."""
    parts = _attend(q, k_pages, v_pages, table, context, start)
    if parts.splits == 1:
        return parts.values.view(q.shape)
    out = q.new_empty(q.shape)
    lines, dim = math.prod(q.shape[:3]), q.shape[3]
    join = paged.join_of(parts.splits, dim)
    if lines:
        with _on(q.device):
            paged.join_kernel[(triton.cdiv(lines, join.lines),)](
                *parts[:3], out, lines, DIM=dim, SPLITS=parts.splits, PADDED=triton.next_power_of_2(parts.splits),
                LINES=join.lines, CHUNK=join.chunk, INTERPRET=INTERPRETED, num_warps=join.warps,
            )  # fmt: skip
    return out


def page_attend_add(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    table: Tensor,
    context: Tensor,
    start: Tensor,
    weight: Tensor,
    residual: Tensor,
) -> Tensor:
    """Attention over pages, its output projection and the residual ``[B, N, W]``."""
    parts = _attend(q, k_pages, v_pages, table, context, start)
    _, _, heads, dim = q.shape
    rows, width = q.shape[0] * q.shape[1], weight.shape[0]
    out = residual.new_empty(residual.shape)
    tile = paged.projection_of(rows, width, heads, dim, parts.splits)
    if out.numel():
        with _on(q.device):
            paged.project_kernel[(triton.cdiv(rows, tile.rows) * triton.cdiv(width, tile.columns),)](
                *parts[:3], weight.contiguous(), residual.contiguous(), out, rows, width, HEADS=heads, DIM=dim,
                SPLITS=parts.splits, PADDED=triton.next_power_of_2(parts.splits), ROWS=tile.rows,
                COLUMNS=tile.columns, TOGETHER=tile.heads, CHUNK=tile.chunk, INTERPRET=INTERPRETED,
                num_warps=tile.warps, num_stages=tile.stages,
            )  # fmt: skip
    return out


def _attend(q: Tensor, k_pages: Tensor, v_pages: Tensor, table: Tensor, context: Tensor, start: Tensor) -> Parts:
    batch, queries, heads, dim = q.shape
    pages, page, kv_heads, _ = k_pages.shape
    entries = table.shape[1]
    table = table if table.stride(1) == 1 else table.contiguous()
    plan = paged.plan_of(queries, heads // kv_heads, kv_heads, entries, page, dim, q.element_size())
    several = plan.splits > 1
    values = q.new_empty(*q.shape[:3], plan.splits, dim, dtype=torch.float32 if several else q.dtype)
    tops, sums = (q.new_empty(values.shape[:-1] if several else 1, dtype=torch.float32) for _ in range(2))
    programs = batch * kv_heads * plan.splits * plan.blocks
    if programs:
        with _on(q.device):
            paged.attend_kernel[(programs,)](
                q.contiguous(), k_pages, v_pages, table, context, start, values, tops, sums, queries, entries,
                pages - 1, table.stride(0), context.stride(0), start.stride(0), math.log2(math.e) / math.sqrt(dim),
                HEADS=heads, KV_HEADS=kv_heads, DIM=dim, PAGE=page, ROWS=plan.rows, TOKENS=plan.tokens,
                BLOCKS=plan.blocks, SPLITS=plan.splits, PAGES=plan.pages, INTERPRET=INTERPRETED,
                num_warps=plan.warps, num_stages=plan.stages,
            )  # fmt: skip
    return Parts(values, tops, sums, plan.splits)


def _on(device: torch.device) -> torch.cuda.device:
    """Launch on the tensors' device; without one, as in the interpreter, this does nothing."""
    return torch.cuda.device(device if device.type == "cuda" else -1)
