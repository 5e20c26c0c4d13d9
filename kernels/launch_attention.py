"""Launcher of dense attention: one launch a call. Arguments are checked."""

from __future__ import annotations

import math

import torch
import triton
from flexlam_fast.kernels import attention as kernels
from torch import Tensor


def attention(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """q ``[B, N, H, D]``, k and v ``[B, M, G, D]`` to ``[B, N, H, D]``; only the last dimension must be dense."""
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
    batch, queries, heads, dim = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if out.numel():
        tile = kernels.tile_of(queries, batch * heads, dim, q.element_size())
        with torch.cuda.device(q.device if q.device.type == "cuda" else -1):
            kernels.attention_kernel[(triton.cdiv(queries, tile.rows), batch * heads)](
                q, k, v, out, queries, k.shape[1], *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
                math.log2(math.e) / math.sqrt(dim), HEADS=heads, GROUPS=k.shape[2], DIM=dim, ROWS=tile.rows,
                COLUMNS=tile.columns, CAUSAL=causal, INTERPRET=kernels.INTERPRETED, num_warps=tile.warps,
                num_stages=tile.stages,
            )  # fmt: skip
    return out
