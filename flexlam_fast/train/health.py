"""Codebook health: how much of the codebook a LAM uses."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor


class CodebookHealth:
    """Counts codes per slot since the last report, on the device: int64 ``counts [K, C]``."""

    def __init__(self, slots: int, size: int, device: torch.device | None = None) -> None:
        self.size = size
        self.counts = torch.zeros(slots, size, dtype=torch.int64, device=device)
        self._bases = torch.arange(slots, device=device) * size

    def update(self, codes: Tensor) -> None:
        """Count integer codes ``[B, K]``; nothing is read back."""
        flat = (codes.detach().long() + self._bases).flatten()
        self.counts.view(-1).scatter_add_(0, flat, torch.ones_like(flat))

    def report(self, total: Callable[[Tensor], Tensor] | None = None) -> dict[str, float | list[float]]:
        """Share of codes used by any slot, and the entropy of each slot in bits; then start counting anew.

        ``total`` adds the counts of other processes.
        """
        counts = self.counts.cpu() if total is None else total(self.counts).cpu()
        share = float((counts.sum(0) > 0).float().mean())
        p = counts / counts.sum(1, keepdim=True).clamp_min(1)
        entropy = -(p * p.clamp_min(1e-12).log2()).sum(1)
        self.counts.zero_()
        return {
            "codes/used": share,
            "codes/entropy_bits": [round(float(e), 4) for e in entropy],
            "codes/entropy_max": math.log2(self.size),
        }
