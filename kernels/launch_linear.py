"""Launchers of the linear layers: tensors to kernels, one launch a call. Arguments are checked.

Nothing here waits for the device or reads from it, so that calls can be captured in a CUDA graph.
"""

from __future__ import annotations

import torch
import triton
from flexlam_fast.kernels import linear as kernels
from flexlam_fast.kernels.fsq import INTERPRETED
from flexlam_fast.kernels.launch import _on
from torch import Tensor


def fused_linear(
    x: Tensor,
    norm: Tensor | None,
    weight: Tensor,
    residual: Tensor | None,
    eps: float,
    gated: bool,
    fp32_out: bool,
) -> Tensor:
    """RMSNorm where there is ``norm``, product, SwiGLU if ``gated``, sum where there is ``residual``."""
    x, weight = x.contiguous(), weight.contiguous()
    inner, outs = x.shape[-1], weight.shape[0] // (2 if gated else 1)
    out = x.new_empty((*x.shape[:-1], outs), dtype=torch.float32 if fp32_out else x.dtype)
    rows = x.numel() // inner
    if not out.numel():
        return out
    tile = kernels.tile_of(rows, outs, inner, x.element_size(), gated)
    # any tensor where there is none, for a kernel that will not look
    tensors = (
        x,
        x if norm is None else norm.contiguous(),
        weight,
        x if residual is None else residual.contiguous(),
        out,
    )
    flags = dict(INNER=inner, OUTS=tile.outs, NORM=norm is not None, GATED=gated, ADD=residual is not None)
    flags |= dict(INTERPRET=INTERPRETED, num_warps=tile.warps, enable_fp_fusion=True)
    across = triton.cdiv(outs, tile.outs)
    with _on(x.device):
        if tile.stages == 0:
            kernels.few_rows_kernel[(across, rows)](*tensors, outs, eps, SPAN=tile.span, **flags)
        else:
            grid = (triton.cdiv(rows, tile.rows) * across,)
            kernels.many_rows_kernel[grid](
                *tensors, rows, outs, eps, ROWS=tile.rows, STEP=tile.span, num_stages=tile.stages, **flags
            )
    return out
