"""FSQ as comparisons: the numbers at which the digit of a channel changes.

``round(tanh(z + shift) * half - offset)`` only climbs as ``z`` does, so a digit is the count of thresholds at or below
``z``. The thresholds are found by bisecting the reference itself, bit by bit, on the device where they will be used:
a kernel that compares with them has the reference's codes exactly, without a tanh whose last bit may differ.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from flexlam_fast.ops.reference import level_table

#: Levels a channel may have in the kernels; a channel costs one comparison a level.
MAX_LEVELS = 256
_LARGEST = 0x7F7FFFFF  # the bits of the largest finite fp32


@lru_cache(maxsize=64)
def thresholds(levels: tuple[int, ...], device: torch.device) -> Tensor:
    """Return fp32 ``[max(levels) - 1, d]``: row ``j`` holds the smallest ``z`` whose digit is above ``j``, else NaN,
    which no number reaches, infinity included.

    A digit is ``q + L // 2``, from 0 to ``L - 1``. Computed once per level set and device, in 33 small steps.
    """
    table = level_table(levels, device)
    rank = torch.arange(max(levels) - 1, device=device).unsqueeze(1)
    low = torch.full((max(levels) - 1, len(levels)), -_LARGEST, dtype=torch.int64, device=device)
    high = -low
    for _ in range(33):
        middle = (low + high) >> 1
        bounded = (_float_of(middle) + table.shift).tanh() * table.half - table.offset
        above = bounded.round().to(torch.int64) + table.half_width > rank
        low, high = torch.where(above, low, middle), torch.where(above, middle, high)
    return torch.where(rank < table.levels - 1, _float_of(high), torch.nan).contiguous()


def _float_of(order: Tensor) -> Tensor:
    """Return the fp32 number at each place (int64, 0 for zero) in the order of all finite fp32 numbers."""
    bits = torch.where(order < 0, -order - 2**31, order)
    return bits.to(torch.int32).view(torch.float32)
