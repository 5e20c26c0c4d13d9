"""Rectified flow: the straight path from noise to the next frame, its target, and the Euler sampler (paper A.5)."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class FlowSample(NamedTuple):
    """A point ``x`` on the path at time ``tau [B]``, and the velocity ``target`` there (both ``[B, C, H, W]``)."""

    x: Tensor
    tau: Tensor
    target: Tensor


def logit_normal(normal: Tensor, mean: float = 0.0) -> Tensor:
    """Flow times in ``(0, 1)`` from standard normal numbers ``[B]``: the logit-normal(mean, 1) distribution."""
    return (normal + mean).sigmoid()


def interpolate(frame: Tensor, noise: Tensor, tau: Tensor) -> FlowSample:
    """``x_tau = (1 - tau) * noise + tau * frame``, target ``frame - noise``; ``tau [B]``."""
    t = tau.view(-1, *([1] * (frame.dim() - 1)))
    return FlowSample((1 - t) * noise + t * frame, tau, frame - noise)


def velocity_of(frame: Tensor, x: Tensor, tau: Tensor, floor: float = 0.05) -> Tensor:
    """Velocity at ``x`` that leads to a predicted clean ``frame``: ``(frame - x) / (1 - tau)``.

    ``1 - tau`` is held above ``floor``, so that the loss stays finite where the path ends.
    """
    rest = (1 - tau).clamp_min(floor).view(-1, *([1] * (frame.dim() - 1)))
    return (frame - x) / rest


def euler(velocity: Callable[[Tensor, Tensor], Tensor], noise: Tensor, steps: int) -> Tensor:
    """Integrate ``velocity(x, tau [B])`` from ``noise`` at time 0 to time 1 in equal steps."""
    x = noise
    for i in range(steps):
        tau = torch.full((noise.shape[0],), i / steps, device=noise.device, dtype=torch.float32)
        x = x + velocity(x, tau) / steps
    return x
