"""Codebook health: how much of the codebook a LAM uses."""

from __future__ import annotations

import math

import torch
from torch import Tensor


class CodebookHealth:
    """Counts codes per slot since the last report."""

    def __init__(self, slots: int, size: int) -> None:
        self.size = size
        self.counts = torch.zeros(slots, size, dtype=torch.int64)

    def update(self, codes: Tensor) -> None:
        """Count integer codes ``[B, K]``."""
        flat = codes.detach().long().cpu() + torch.arange(len(self.counts)) * self.size
        self.counts += torch.bincount(flat.flatten(), minlength=self.counts.numel()).view_as(self.counts)

    def report(self) -> dict[str, float | list[float]]:
        """Share of codes used by any slot, and the entropy of each slot in bits; then start counting anew."""
        share = float((self.counts.sum(0) > 0).float().mean())
        p = self.counts / self.counts.sum(1, keepdim=True).clamp_min(1)
        entropy = -(p * p.clamp_min(1e-12).log2()).sum(1)
        self.counts.zero_()
        return {
            "codes/used": share,
            "codes/entropy_bits": [round(float(e), 4) for e in entropy],
            "codes/entropy_max": math.log2(self.size),
        }
