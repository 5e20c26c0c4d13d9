"""Launchers of QK-norm and RoPE of training: tensors to kernels, one launch a call. Arguments are checked.

Nothing here waits for the device or reads from it, so that calls can be captured in a CUDA graph.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from flexlam_fast.kernels import rotary as kernels
from flexlam_fast.kernels.fsq import INTERPRETED
from flexlam_fast.kernels.launch import _on
from torch import Tensor


def norm_rope(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Norm and rotate ``q [B, N, H, D]`` and ``k [B, N, G, D]``; contiguous, in ``dtype``."""
    q, k, (cos, sin) = _rows(q), _rows(k), _angles(cos, sin)
    out = q.new_empty(q.shape, dtype=dtype), k.new_empty(k.shape, dtype=dtype)
    lines, tile, flags = _shape(q, k, cos)
    if lines and q.numel() + k.numel():
        grid = (triton.cdiv(lines, tile.rows), tile.across)
        strides = *q.stride()[:3], *k.stride()[:3], *_angle_strides(cos)
        with _on(q.device):
            kernels.norm_rope_kernel[grid](
                q, k, q_weight.contiguous(), k_weight.contiguous(), cos, sin, *out, lines, q.shape[1],
                *strides, eps, **flags,
            )  # fmt: skip
    return out


def norm_rope_backward(
    grad_q: Tensor,
    grad_k: Tensor,
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of ``q`` and ``k`` in their dtypes, contiguous, and of both weights, fp32 ``[D]``."""
    grad_q, grad_k, q, k = (_rows(t) for t in (grad_q, grad_k, q, k))
    cos, sin = _angles(cos, sin)
    out, half = (q.new_empty(q.shape), k.new_empty(k.shape)), q.shape[3] // 2
    lines, tile, flags = _shape(q, k, cos)
    if not lines or not q.numel() + k.numel():
        of_q, of_k = (torch.zeros(2 * half, dtype=torch.float32, device=q.device) for _ in range(2))
        return *out, of_q, of_k
    tiles = triton.cdiv(lines, tile.rows)
    grid = (min(tiles, kernels.PROGRAMS), tile.across)
    sums = torch.empty(grid[0] * grid[1], 4, tile.padded, dtype=torch.float32, device=q.device)
    strides = *(s for t in (q, k, grad_q, grad_k) for s in t.stride()[:3]), *_angle_strides(cos)
    with _on(q.device):
        kernels.norm_rope_backward_kernel[grid](
            q, k, grad_q, grad_k, q_weight.contiguous(), k_weight.contiguous(), cos, sin, *out, sums, lines,
            q.shape[1], tiles, *strides, eps, **flags,
        )  # fmt: skip
    # tensors of their own, as the schema promises: views of one would alias
    return *out, sums[:, :2, :half].sum(0).flatten(), sums[:, 2:, :half].sum(0).flatten()


def _shape(q: Tensor, k: Tensor, cos: Tensor) -> tuple[int, kernels.Tile, dict[str, Any]]:
    """Return the number of tokens, the tile, and the constants of both kernels."""
    half = q.shape[3] // 2
    tile = kernels.tile_of(q.shape[2], k.shape[2], half)
    flags: dict[str, Any] = dict(Q_HEADS=q.shape[2], K_HEADS=k.shape[2], HALF=half, SECOND=cos.shape[-1] - half)
    flags |= dict(ROWS=tile.rows, Q_BLOCK=tile.q_heads, K_BLOCK=tile.k_heads, PADDED=tile.padded)
    flags |= dict(INTERPRET=INTERPRETED, num_warps=tile.warps, enable_fp_fusion=True)
    return q.shape[0] * q.shape[1], tile, flags


def _rows(t: Tensor) -> Tensor:
    """Return ``t`` if its channels stand side by side, else a copy in which they do."""
    return t if t.stride(-1) == 1 else t.contiguous()


def _angles(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Return both with the same strides, which are all that the kernel is told."""
    same = cos.stride() == sin.stride() and cos.stride(-1) == 1
    return (cos, sin) if same else (cos.contiguous(), sin.contiguous())


def _angle_strides(cos: Tensor) -> tuple[int, int]:
    return (cos.stride(0) if cos.dim() == 3 else 0, cos.stride(-2))
