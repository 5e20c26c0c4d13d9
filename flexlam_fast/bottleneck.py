"""Bottleneck: FSQ with retained prefix and null latent, the part that is FlexLAM's own (paper section 4.1)."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor, nn

from flexlam_fast import ops
from flexlam_fast.config import BottleneckConfig


class Quantized(NamedTuple):
    """``latents [B, K, d]`` after null fill, ``codes`` int32 ``[B, K]`` complete."""

    latents: Tensor
    codes: Tensor


class Bottleneck(nn.Module):
    """FSQ with one learned null latent in value space; no other parameters."""

    def __init__(self, cfg: BottleneckConfig, backend: str = "auto") -> None:
        super().__init__()
        self.levels = cfg.levels
        self.slots = cfg.slots
        self.backend = backend
        # off the FSQ lattice from the start, so that an empty slot never looks like a code
        self.null = nn.Parameter(0.3 * torch.randn(cfg.dim))

    def forward(self, z: Tensor, keep: Tensor | None = None) -> Quantized:
        """Slot outputs ``z [B, K, d]`` and retained lengths ``keep [B]`` (None: all) to latents and codes, in fp32."""
        null = None if keep is None else self.null
        return Quantized(*ops.fsq(z.float(), self.levels, keep, null, backend=self.backend))

    def lookup(self, codes: Tensor, keep: Tensor) -> Tensor:
        """Codes ``[B, K]`` and retained lengths ``[B]`` to null-filled latents ``[B, K, d]`` fp32."""
        return ops.codes_to_latents(codes, self.levels, keep, self.null.float(), backend=self.backend)


def prefix_weights(cfg: BottleneckConfig) -> Tensor:
    """The odds ``[K + 1]`` of every retained length ``0..K`` in training (paper A.7), summing to 1, float64."""
    weights = torch.zeros(cfg.slots + 1, dtype=torch.float64)
    if cfg.prefix == "uniform":
        weights += 1.0
    elif cfg.prefix == "full":
        weights[-1] = 1.0
    else:
        weights += torch.tensor(cfg.prefix, dtype=torch.float64)
    return weights / weights.sum()


def sample_prefix(cfg: BottleneckConfig, uniform: Tensor) -> Tensor:
    """Retained lengths int64 ``[B]`` from numbers ``[B]`` uniform in ``[0, 1)``, by inverting the cumulative odds.

    ``prefix="full"`` yields K for every number, which is exactly the Fixed-K baseline.
    """
    return torch.searchsorted(_prefix_edges(cfg, uniform.device), uniform.double(), right=True)


@lru_cache(maxsize=16)
def _prefix_edges(cfg: BottleneckConfig, device: torch.device) -> Tensor:
    return prefix_weights(cfg).cumsum(0)[:-1].to(device)
