"""Launchers of the random numbers: one launch a call. Arguments are checked; nothing waits for the device."""

from __future__ import annotations

import torch
import triton
from flexlam_fast.kernels import draws as kernels
from flexlam_fast.kernels.launch import _on
from torch import Tensor

#: Sums and products are rounded one by one, as in the reference: the numbers are then the same to the bit.
OPTIONS = {"enable_fp_fusion": False}
ROWS = 128  # of the kernel of uniform words


def draw_noise(seed: Tensor, streams: Tensor, count: int) -> Tensor:
    """Standard normal numbers fp32 ``[B, count]``."""
    rows, pieces = streams.shape[0], triton.cdiv(count, 4 * kernels.BLOCKS)
    out = torch.empty(rows, count, dtype=torch.float32, device=streams.device)
    if out.numel():
        with _on(out.device):
            kernels.normal_kernel[(rows * pieces,)](
                seed.contiguous(),
                streams.contiguous(),
                out,
                count,
                pieces,
                BLOCKS=kernels.BLOCKS,
                num_warps=4,
                **OPTIONS,
            )
    return out


def draw_words(seed: Tensor, streams: Tensor) -> Tensor:
    """Uniform 32-bit words int64 ``[B]``."""
    rows = streams.shape[0]
    out = torch.empty(rows, dtype=torch.int64, device=streams.device)
    if rows:
        with _on(out.device):
            kernels.words_kernel[(triton.cdiv(rows, ROWS),)](
                seed.contiguous(), streams.contiguous(), out, rows, BLOCK=ROWS, num_warps=4
            )
    return out
