"""FSQ, its gradient and its null fill as the design states them, inputs that try them; shared by the tests of FSQ."""

from __future__ import annotations

import torch
from torch import Tensor

EPS = 1e-3
L = (8, 5, 5, 5)
KEEP = torch.tensor([0, 3, 6])
SEED = torch.tensor([2**40 + 5, 2**33 + 7])


def bits(x: Tensor) -> Tensor:
    """The bit patterns of fp32 values, so that -0.0 and 0.0 differ."""
    assert x.dtype == torch.float32
    return x.contiguous().view(torch.int32)


def constants(levels: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``half``, ``offset``, ``shift`` and ``L // 2`` of design section 2, formed in fp64."""
    n = torch.tensor(levels, dtype=torch.float64)
    half = (n - 1) * (1 + EPS) / 2
    offset = torch.where(n % 2 == 0, 0.5, 0.0).double()
    return half.to(dtype), offset.to(dtype), (offset / half).atanh().to(dtype), (n // 2).to(dtype)


def near_the_edges(levels: tuple[int, ...]) -> Tensor:
    """``[blocks, 64, d]`` inputs within a few ulps of where the code changes, and far out in the tails."""
    half, offset, shift, _ = constants(levels, torch.float64)
    columns = []
    for i, n in enumerate(levels):
        low = -(n // 2)
        border = torch.arange(low, low + n - 1).double() + 0.5
        edge = (((border + offset[i]) / half[i]).atanh() - shift[i]).float()
        near = [edge]
        for direction in (-torch.inf, torch.inf):
            x = edge
            for _ in range(12):
                x = torch.nextafter(x, torch.full_like(x, direction))
                near.append(x)
        tails = torch.tensor([-1e30, -100.0, -9.1, -0.0, 0.0, 9.1, 100.0, 1e30])
        columns.append(torch.cat([*near, tails]))
    generator = torch.Generator().manual_seed(1)
    rows = 64 * 40
    picked = [c[torch.randint(len(c), (rows,), generator=generator)] for c in columns]
    return torch.stack(picked, dim=1).view(40, 64, len(levels))


def projected(levels: tuple[int, ...], width: int = 24, blocks: int = 6, slots: int = 9) -> tuple[Tensor, ...]:
    """``x``, ``weight``, ``bias``, ``keep``, ``null``."""
    generator = torch.Generator().manual_seed(width)
    x = torch.randn(blocks, slots, width, generator=generator)
    weight = torch.randn(len(levels), width, generator=generator) * width**-0.5
    bias = torch.randn(len(levels), generator=generator) * 0.1
    return x, weight, bias, torch.arange(blocks) % (slots + 1), torch.randn(len(levels), generator=generator)


def straight_through(z: Tensor, weight: Tensor, levels: tuple[int, ...], keep: Tensor) -> Tensor:
    """The gradient of the weighted sum of latents, as the design states it."""
    half, _, shift, half_width = (c.to(z.device) for c in constants(levels, z.dtype))
    grad = weight * (1 - (z + shift).tanh().square()) * half / half_width
    beyond = torch.arange(z.shape[-2], device=z.device) >= keep.unsqueeze(-1)
    return torch.where(beyond.unsqueeze(-1), torch.zeros_like(grad), grad)


def suffix_sum(weight: Tensor, keep: Tensor) -> Tensor:
    beyond = torch.arange(weight.shape[-2], device=weight.device) >= keep.unsqueeze(-1)
    return torch.where(beyond.unsqueeze(-1), weight, torch.zeros_like(weight)).flatten(0, -2).sum(0)
