"""Launchers of the loss: tensors to kernels, two launches forward and one backward. Arguments are checked.

Nothing here waits for the device or reads from it, so that calls can be captured in a CUDA graph.
"""

from __future__ import annotations

import torch
import triton
from flexlam_fast.kernels import loss as kernels
from flexlam_fast.kernels.fsq import INTERPRETED
from flexlam_fast.kernels.launch import _on
from torch import Tensor


def mean_cross_entropy(logits: Tensor, target: Tensor, ignore_index: int) -> tuple[Tensor, Tensor, Tensor]:
    """Mean loss, largest logit and sum of exponentials of every row ``[M, 2]``, and how many targets count; fp32."""
    logits, target = _rows(logits), target.contiguous()
    rows, codes = logits.shape
    kept = torch.empty(rows, 2, dtype=torch.float32, device=logits.device)
    loss, count = (torch.empty((), dtype=torch.float32, device=logits.device) for _ in range(2))
    programs = min(rows, kernels.PROGRAMS)
    sums = torch.empty(programs, 2, dtype=torch.float32, device=logits.device)
    with _on(logits.device):
        if rows:
            kernels.loss_forward_kernel[(programs,)](
                logits, target, kept, sums, rows, ignore_index, CODES=codes, STRIDE=logits.stride(0),
                BLOCK=_block(codes), num_warps=kernels.WARPS, enable_fp_fusion=True,
            )  # fmt: skip
        block = triton.next_power_of_2(max(programs, 1))
        kernels.loss_mean_kernel[(1,)](sums, loss, count, programs, BLOCK=block, num_warps=4)
    return loss, kept, count


def mean_cross_entropy_backward(
    grad: Tensor, logits: Tensor, target: Tensor, kept: Tensor, count: Tensor, ignore_index: int
) -> Tensor:
    """Gradient of the logits, contiguous, in their dtype."""
    logits, target = _rows(logits), target.contiguous()
    rows, codes = logits.shape
    out = logits.new_empty(logits.shape)
    if rows:
        with _on(logits.device):
            kernels.loss_backward_kernel[(rows,)](
                grad, logits, target, kept, count, out, ignore_index, CODES=codes, STRIDE=logits.stride(0),
                BLOCK=_block(codes), INTERPRET=INTERPRETED, num_warps=kernels.WARPS, enable_fp_fusion=True,
            )  # fmt: skip
    return out


def _block(codes: int) -> int:
    return min(kernels.BLOCK, triton.next_power_of_2(codes))


def _rows(logits: Tensor) -> Tensor:
    """Return logits whose columns stand side by side; rows may stand apart."""
    return logits if logits.stride(-1) == 1 or logits.shape[-1] == 1 else logits.contiguous()
