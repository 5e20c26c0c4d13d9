"""Pages in plain PyTorch: the oracle of ``ops/paged.py``, for any dtype and device. No checks and no dispatch here."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from flexlam_fast.ops.frequencies import rope_frequencies
from flexlam_fast.ops.linear import rms_norm


def write_pages(
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
    """Norm and rotate queries and keys, store keys and values, return the queries ``[B, N, H, D]``."""
    batch, tokens, width = qkv.shape
    kv_heads, dim = k_pages.shape[2:]
    heads = width // dim - 2 * kv_heads
    q, k, v = qkv.reshape(batch, tokens, width // dim, dim).split([heads, kv_heads, kv_heads], dim=2)
    q, k = rotate(rms_norm(q, q_norm, eps), positions, theta), rotate(rms_norm(k, k_norm, eps), positions, theta)
    stored = (rows >= 0) & (rows < k_pages.shape[0] * k_pages.shape[1])
    k_pages.view(-1, kv_heads, dim)[rows[stored]] = k[stored]
    v_pages.view(-1, kv_heads, dim)[rows[stored]] = v[stored]
    return q


def rotate(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """Apply RoPE to ``x [B, N, heads, D]`` at ``positions [B, N]``, pairing channel ``i`` with ``i + D/2``.

    As the sequence model has it: angles in fp64, fp32 inside, ``x``'s dtype out.
    """
    dim = x.shape[-1]
    angle = positions.double()[:, :, None, None] * rope_frequencies(theta, dim, x.device)
    first, second = x.to(torch.promote_types(x.dtype, torch.float32)).chunk(2, dim=-1)
    cos, sin = angle.cos().to(first.dtype), angle.sin().to(first.dtype)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


def paged_attention(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, table: Tensor, context: Tensor, start: Tensor
) -> Tensor:
    """Softmax attention ``[B, N, H, D]`` over the pages that ``table`` names; zeros for a query that sees nothing."""
    batch, entries = table.shape
    pages, page, kv_heads, dim = k_pages.shape
    token = torch.arange(entries * page, device=q.device)
    own = start.unsqueeze(1) + 1 + torch.arange(q.shape[1], device=q.device)
    seen = token < (context.unsqueeze(1) * page + own.clamp_min(0)).unsqueeze(2)  # [B, N, tokens]
    # what nobody sees may be anything, NaN too
    used = seen.any(1)[:, :, None, None]
    index = table.long().clamp(0, pages - 1)
    k, v = (x[index].view(batch, entries * page, kv_heads, dim).masked_fill(~used, 0.0) for x in (k_pages, v_pages))
    grouped = q.shape[2] != kv_heads
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen.unsqueeze(1), enable_gqa=grouped).transpose(1, 2)
    return out.masked_fill(~seen.any(2)[:, :, None, None], 0.0)


def attend_add(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    table: Tensor,
    context: Tensor,
    start: Tensor,
    weight: Tensor,
    residual: Tensor,
) -> Tensor:
    """``residual + attended @ weight.T``, ``[B, N, W]``."""
    attended = paged_attention(q, k_pages, v_pages, table, context, start)
    return residual + F.linear(attended.flatten(2), weight)
