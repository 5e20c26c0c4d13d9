"""Frames, noise and times that try what stands between them and tokens; shared by its tests."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from flexlam_fast.flow import interpolate, velocity_of
from flexlam_fast.layers import normalise, patchify, unpatchify

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
#: batch, height, width, channels and patch: whole vectors and others, more columns than C++ takes at a time.
SHAPES = [
    (2, 64, 64, 3, 4),
    (3, 10, 15, 3, 5),
    (2, 16, 24, 3, 8),
    (2, 8, 8, 1, 4),
    (1, 4, 6, 4, 2),
    (1, 4, 516, 3, 4),
    (1, 36, 72, 2, 36),
    (5, 3, 7, 3, 1),
]


class Case(NamedTuple):
    """One batch: frames uint8 ``[B, H, W, C]``, noise ``[B, C H W]``, times ``[B]``, and outputs in patches."""

    now: Tensor
    following: Tensor
    noise: Tensor
    tau: Tensor
    out: Tensor
    patch: int


def case(shape: tuple[int, ...], device: str = "cpu", seed: int = 0) -> Case:
    """A batch with all 256 values, times at both ends of the path, and outputs like pixels."""
    *size, patch = shape
    batch, height, width, channels = size
    generator = torch.Generator().manual_seed(seed)
    frames = torch.randint(0, 256, (2, *size), dtype=torch.uint8, generator=generator)
    pixels = height * width * channels
    noise = torch.randn(batch, pixels, generator=generator)
    tau = torch.rand(batch, generator=generator)
    tau[:2] = torch.tensor([0.0, 1.0])[: len(tau[:2])]
    out = torch.randn(batch, height * width // patch**2, channels * patch**2, generator=generator)
    return Case(*(t.to(device) for t in (frames[0], frames[1], noise, tau, out)), patch)


def plain_tubelets(c: Case, gain: float, dtype: torch.dtype) -> Tensor:
    """As ``Encoder.tokens``."""
    now, following = normalise(c.now), normalise(c.following)
    return torch.cat([patchify(now, c.patch), gain * patchify(following - now, c.patch)], dim=-1).to(dtype)


def plain_flow(c: Case, dtype: torch.dtype) -> Tensor:
    """As ``LatentActionModel.loss`` and ``Decoder.forward``."""
    now, following = normalise(c.now), normalise(c.following)
    sample = interpolate(following, c.noise.view(following.shape), c.tau)
    return patchify(torch.cat([sample.x, now], dim=1), c.patch).to(dtype)


def plain_loss(c: Case, out: Tensor, predict: str) -> Tensor:
    """As ``LatentActionModel.loss`` behind the decoder's head, in fp64 for an fp64 ``out``."""
    wide = torch.promote_types(out.dtype, torch.float32)
    now, following = normalise(c.now).to(wide), normalise(c.following).to(wide)
    sample = interpolate(following, c.noise.to(wide).view(following.shape), c.tau.to(wide))
    velocity = unpixel(out.to(wide), c)
    if predict == "frame":
        velocity = velocity_of(now + velocity, sample.x, sample.tau)
    return (velocity - sample.target).square().mean()


def unpixel(patches: Tensor, c: Case) -> Tensor:
    """``unpatchify``, which is for squares, of frames of any shape."""
    batch, height, width, channels = c.now.shape
    if height == width:
        return unpatchify(patches, c.patch, channels, height)
    x = patches.reshape(batch, height // c.patch, width // c.patch, channels, c.patch, c.patch)
    return x.permute(0, 3, 1, 4, 2, 5).reshape(batch, channels, height, width)
