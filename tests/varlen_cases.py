"""Packed sequences, the mask they mean, and attention under it; shared by the tests of ``ops/varlen.py``."""

from __future__ import annotations

import torch
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LENGTHS = [(5,), (4, 4, 4), (7, 1, 1, 9, 2), (0, 3, 3, 0, 6, 0), (3, 5, 3)]
PACKAGES = ["flash_attn", "torch_varlen", "xformers"]


def tensors(tokens: int, heads: int = 4, groups: int = 2, dim: int = 16, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(tokens, heads, dim), (tokens, groups, dim), (tokens, groups, dim)]
    q, k, v = (torch.randn(shape, generator=generator).to(DEVICE) for shape in shapes)
    return [2 * q, k, v]


def starts_of(lengths: tuple[int, ...]) -> Tensor:
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32, device=DEVICE)


def visible(lengths: tuple[int, ...], causal: bool) -> Tensor:
    """Which token may see which, one by one."""
    owner = [s for s, n in enumerate(lengths) for _ in range(n)]
    seen = [[a == b and (j <= i or not causal) for j, b in enumerate(owner)] for i, a in enumerate(owner)]
    return torch.tensor(seen, dtype=torch.bool, device=DEVICE)


def dense(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """Softmax of all scores under a mask, as one writes it, in the dtype of the tensors."""
    share = q.shape[1] // k.shape[1]
    q, k, v = (t.transpose(0, 1) for t in (q, k.repeat_interleave(share, 1), v.repeat_interleave(share, 1)))
    scores = (q @ k.mT) / q.shape[2] ** 0.5
    return (scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v).transpose(0, 1)


def gradient(i: int, q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    return torch.autograd.grad(dense(*leaves, seen).square().sum(), leaves)[i]
