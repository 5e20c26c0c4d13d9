"""Launchers between frames and tokens: tensors to kernels, one launch a call (and a short sum behind the loss).

Arguments are checked. Nothing waits for the device or reads from it, so that calls can be captured in a CUDA graph.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from flexlam_fast.kernels import frames as kernels
from flexlam_fast.kernels.fsq import INTERPRETED
from flexlam_fast.kernels.launch import _on
from torch import Tensor

#: Sums and products are rounded one by one, as in the reference: patches are then the same to the bit.
OPTIONS: dict[str, Any] = dict(BLOCK=kernels.BLOCK, INTERPRET=INTERPRETED, num_warps=4, enable_fp_fusion=False)


def make_patches(
    now: Tensor,
    following: Tensor | None,
    noise: Tensor | None,
    tau: Tensor | None,
    kind: int,
    patch: int,
    gain: float,
    dtype: torch.dtype,
) -> Tensor:
    """Patches of frames, ``[B, N, F]``."""
    batch, height, width, channels = now.shape
    fields = (1 if kind == 0 else 2) * channels * patch * patch
    out = torch.empty(batch, (height // patch) * (width // patch), fields, dtype=dtype, device=now.device)
    if batch:
        # any tensor where there is none, for a kernel that will not look
        reads = [(now if t is None else t).contiguous() for t in (now, following, noise, tau)]
        with _on(now.device):
            kernels.patches_kernel[_grid(now)](*reads, out, gain, KIND=kind, **_sizes(now, patch), **OPTIONS)
    return out


def flow_loss(
    out: Tensor,
    now: Tensor | None,
    following: Tensor,
    noise: Tensor,
    tau: Tensor,
    patch: int,
    floor: float,
    with_error: bool,
) -> tuple[Tensor, Tensor]:
    """The loss, fp32 ``[]``, and with ``with_error`` what its gradient is ``2 / elements`` of, like ``out``."""
    out, following = out.contiguous(), following.contiguous()
    error = out.new_empty(out.shape if with_error else 0)
    grid = _grid(following)
    sums = torch.empty(grid, dtype=torch.float64, device=out.device)
    if out.numel():
        reads = [following if now is None else now.contiguous(), following, noise.contiguous(), tau.contiguous()]
        flags = dict(CHANGE=now is not None, WITH_ERROR=with_error, **_sizes(following, patch), **OPTIONS)
        with _on(out.device):
            kernels.flow_loss_kernel[grid](out, *reads, error if with_error else out, sums, floor, **flags)
    return (sums.sum() / out.numel()).float(), error  # NaN of nothing, as a mean is


def scale_error(grad: Tensor, error: Tensor) -> Tensor:
    """``2 / elements`` times ``grad []`` times ``error``, in its dtype."""
    error = error.contiguous()
    out, count = torch.empty_like(error), error.numel()
    if count:
        with _on(error.device):
            kernels.scale_kernel[(triton.cdiv(count, kernels.BLOCK),)](grad.contiguous(), error, out, count, **OPTIONS)
    return out


def _grid(frames: Tensor) -> tuple[int]:
    """Whole pieces of every sample: so many programs."""
    return (frames.shape[0] * triton.cdiv(frames[0].numel() if frames.shape[0] else 1, kernels.BLOCK),)


def _sizes(frames: Tensor, patch: int) -> dict[str, int]:
    _, height, width, channels = frames.shape
    return dict(HEIGHT=height, WIDTH=width, CHANNELS=channels, PATCH=patch)
