"""How close decoded frames come to the real ones: PSNR and SSIM of each image.

LPIPS is not here: its backbone has to be downloaded, and nothing in this package downloads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flexlam_fast.checks import check_tensor
from flexlam_fast.data.extras import need

#: What an identical image counts as: its PSNR is infinite, and one such image would be the whole mean.
CEILING_DB = 60.0


def psnr(frames: Tensor, truth: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image in dB, at most ``CEILING_DB``; data range 255.

    Args:
        frames: uint8 ``[B, H, W, C]``.
        truth: uint8 ``[B, H, W, C]``.

    Returns:
        fp32 ``[B]``.

    Raises:
        DataError: if torchmetrics is not installed.
    """
    metric = need("torchmetrics.functional.image").peak_signal_noise_ratio
    prediction, target = _planes("frames", frames), _planes("truth", truth)
    # torchmetrics sums over the dimensions it is given and keeps the others.
    each: Tensor = metric(prediction, target, data_range=255.0, reduction="none", dim=(1, 2, 3))
    return each.clamp(max=CEILING_DB)


def ssim(frames: Tensor, truth: Tensor) -> Tensor:
    """Structural similarity of each image, 1 for identical ones; shapes as in :func:`psnr`."""
    metric = need("torchmetrics.functional.image").structural_similarity_index_measure
    each: Tensor = metric(_planes("frames", frames), _planes("truth", truth), data_range=255.0, reduction="none")
    return each


def change(now: Tensor, following: Tensor) -> Tensor:
    """Mean absolute difference of consecutive frames in grey levels, fp32 ``[B]``: how much moves."""
    return (_planes("now", now) - _planes("following", following)).abs().mean(dim=(1, 2, 3))


def _planes(name: str, frames: Tensor) -> Tensor:
    check_tensor(name, frames, ["B", "H", "W", "C"], torch.uint8)
    return frames.permute(0, 3, 1, 2).float()
