"""Launchers of the activations: tensors to kernels, one launch a call. Arguments are checked.

Nothing here waits for the device or reads from it, so that calls can be captured in a CUDA graph.
"""

from __future__ import annotations

import torch
import triton
from flexlam_fast.kernels import activation as kernels
from flexlam_fast.kernels.fsq import INTERPRETED
from flexlam_fast.kernels.launch import _on
from torch import Tensor

from flexlam_fast.ops.rows import unbroken


def gelu(grad: Tensor | None, x: Tensor) -> Tensor:
    """GELU of ``x``, or with ``grad`` its gradient."""
    x = x.contiguous()
    up = x if grad is None else grad.contiguous()  # any tensor where there is none, for a kernel that will not look
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if out.numel():
        with _on(x.device):
            kernels.gelu_kernel[(triton.cdiv(x.numel(), kernels.BLOCK),)](
                up, x, out, x.numel(), BACK=grad is not None, BLOCK=kernels.BLOCK, INTERPRET=INTERPRETED,
                num_warps=4, enable_fp_fusion=True,
            )  # fmt: skip
    return out


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """``silu(gate) * up``."""
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    _swiglu(None, gate, up, out, out)
    return out


def swiglu_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of ``gate`` and ``up``."""
    dgate, dup = (torch.empty(gate.shape, dtype=gate.dtype, device=gate.device) for _ in range(2))
    _swiglu(grad.contiguous(), gate, up, dgate, dup)
    return dgate, dup


def _swiglu(grad: Tensor | None, gate: Tensor, up: Tensor, out: Tensor, other: Tensor) -> None:
    if not out.numel():
        return
    rows = 1 if gate.is_contiguous() and up.is_contiguous() else out.numel() // out.shape[-1]
    gate, up = (unbroken(t.reshape(rows, -1)) for t in (gate, up))
    width = out.numel() // rows
    block = min(kernels.BLOCK, triton.next_power_of_2(width))
    blocks = triton.cdiv(width, block)
    with _on(out.device):
        kernels.swiglu_kernel[(rows * blocks,)](
            gate if grad is None else grad, gate, up, out, other, gate.stride(0), up.stride(0), width, blocks,
            BACK=grad is not None, BLOCK=block, INTERPRET=INTERPRETED, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
