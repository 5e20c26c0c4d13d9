"""The frequencies of RoPE, the same bits in every backend and on every processor.

At position 10^12 the last bit of a frequency turns an angle by 10^-4. Vectorized powers, such as those of torch, differ
in that bit from processor to processor, so each frequency is a power of the C library, as in ``csrc/decode.cpp``.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor


def rope_frequencies(theta: float, dim: int, device: torch.device) -> Tensor:
    """Return ``theta**(-2i/dim)`` fp64 ``[dim/2]`` on ``device``; on a GPU the first call copies from the host."""
    # what a compiler, a tracer or a dispatch mode makes of a constant is not for the next caller
    traced = torch.compiler.is_compiling() or torch._C._is_tracing() or torch._C._len_torch_dispatch_stack()
    if traced or torch._C._functorch.peek_interpreter_stack() is not None:
        return torch.tensor(_powers(theta, dim), dtype=torch.float64, device=device)
    return _known(theta, dim, device)


@lru_cache(maxsize=64)
def _known(theta: float, dim: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(_powers(theta, dim), dtype=torch.float64, device=device)


def _powers(theta: float, dim: int) -> list[float]:
    return [_power(theta, -2.0 * i / dim) for i in range(dim // 2)]


def _power(base: float, exponent: float) -> float:
    try:
        return math.pow(base, exponent)
    except OverflowError:
        return math.inf
