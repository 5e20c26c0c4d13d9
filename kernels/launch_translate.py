"""Launcher of the translator: one launch a call. Arguments are checked."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
from flexlam_fast.kernels import fsq
from flexlam_fast.kernels import translate as kernels
from torch import Tensor

EPS = 1e-5  # of torch's LayerNorm


def translate(
    codes: Tensor,
    k: int,
    levels: tuple[int, ...],
    null: Tensor,
    previous: Tensor,
    weights: Sequence[Tensor],
    slots: int,
) -> Tensor:
    """Codes ``[B, >= k]`` to scores fp32 ``[B, A]``; ``weights`` in the order of ``TranslatorWeights``."""
    codes = codes if codes.stride(-1) == 1 else codes.contiguous()
    stem, down, head = weights[0], weights[4], weights[10]
    (depth, hidden, wide), actions, batch = down.shape, head.shape[0], codes.shape[0]
    out = torch.empty(batch, actions, dtype=torch.float32, device=codes.device)
    if batch:
        floats, _, basis, counts = fsq.columns(levels, 1, codes.device)
        tile = kernels.tile_of(wide, actions, stem.element_size())
        with torch.cuda.device(codes.device if codes.device.type == "cuda" else -1):
            kernels.translate_kernel[(triton.cdiv(batch, kernels.ROWS),)](
                codes, null.float().contiguous(), previous.float().contiguous(), floats, basis, counts,
                *(w.contiguous() for w in weights), out, batch, k, codes.stride(0), SLOTS=slots, DIM=len(levels),
                PADDED=floats.shape[1], CODES=math.prod(levels), ACTIONS=actions, HEADS=tile.heads, WIDE=wide,
                WIDTH=tile.width, HIDDEN=hidden, DEPTH=depth, CHUNK=tile.chunk, ROWS=kernels.ROWS, EPS=EPS,
                INTERPRET=kernels.INTERPRETED, num_warps=tile.warps, num_stages=kernels.STAGES,
            )  # fmt: skip
    return out
