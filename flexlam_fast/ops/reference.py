"""The eager PyTorch statement of every op: the oracle that faster backends are checked against.

No checks and no dispatch here; ``ops/fsq.py`` has those. Arithmetic is fp32 whatever the input dtype is, and code
arithmetic is integer, because bf16 cannot hold a code above 256 (design section 2).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

_EPS = 1e-3  # keeps the outermost levels reachable: tanh never quite gets to 1


class LevelTable(NamedTuple):
    """Constants of one level set, each ``[d]``; floats are fp32, integers int64."""

    half: Tensor
    offset: Tensor
    shift: Tensor
    half_width: Tensor
    levels: Tensor
    basis: Tensor


def level_table(levels: tuple[int, ...], device: torch.device) -> LevelTable:
    """Return the constants of ``levels`` on ``device``, computed once per pair."""
    # what a compiler or a dispatch mode makes of a constant is not for the next caller
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return _level_table(levels, device)
    return _known_table(levels, device)


@lru_cache(maxsize=64)
def _known_table(levels: tuple[int, ...], device: torch.device) -> LevelTable:
    with torch.inference_mode(False):
        return _level_table(levels, device)


def _level_table(levels: tuple[int, ...], device: torch.device) -> LevelTable:
    counts = torch.tensor(levels, dtype=torch.int64, device="cpu")
    half = (counts - 1).to(torch.float32) * (1 + _EPS) / 2
    offset = torch.where(counts % 2 == 0, 0.5, 0.0).to(torch.float32)
    shift = (offset / half).atanh()
    basis = torch.tensor([math.prod(levels[:i]) for i in range(len(levels))], dtype=torch.int64, device="cpu")
    table = LevelTable(half, offset, shift, counts // 2, counts, basis)
    return LevelTable(*(t.to(device) for t in table))


def round_straight_through(x: Tensor) -> Tensor:
    """Round half to even, with the gradient of the identity; the value is the integer itself, not a sum near it."""
    return x.detach().round() + (x - x.detach())


def quantize(z: Tensor, levels: Sequence[int]) -> tuple[Tensor, Tensor]:
    """FSQ without prefix: ``z [..., d]`` to values ``[..., d]`` fp32 (with gradient) and codes ``[...]`` int32."""
    t = level_table(tuple(levels), z.device)
    bounded = (z.float() + t.shift).tanh() * t.half - t.offset
    steps = round_straight_through(bounded)
    digits = bounded.detach().round().to(torch.int64) + t.half_width
    return steps / t.half_width, (digits * t.basis).sum(-1).to(torch.int32)


def dequantize(codes: Tensor, levels: Sequence[int]) -> Tensor:
    """Codes ``[...]`` to values ``[..., d]`` fp32; the inverse of ``quantize`` on its codes."""
    t = level_table(tuple(levels), codes.device)
    digits = codes.to(torch.int64).unsqueeze(-1) // t.basis % t.levels
    return (digits - t.half_width).float() / t.half_width


def retain_prefix(values: Tensor, keep: Tensor | None, null: Tensor | None) -> Tensor:
    """Replace slots ``>= keep`` of ``values [..., K, d]`` by ``null [d]`` (paper section 4.1); ``keep [...]``."""
    if keep is None or null is None:
        return values
    slots = torch.arange(values.shape[-2], device=values.device)
    return torch.where((slots < keep.unsqueeze(-1)).unsqueeze(-1), values, null.to(values.dtype))


def fsq(z: Tensor, levels: Sequence[int], keep: Tensor | None, null: Tensor | None) -> tuple[Tensor, Tensor]:
    """Bound, round, value, code, prefix mask and null fill: latents in ``z``'s dtype and int32 codes."""
    values, codes = quantize(z, levels)
    return retain_prefix(values, keep, null).to(z.dtype), codes


def codes_to_latents(codes: Tensor, levels: Sequence[int], keep: Tensor | None, null: Tensor | None) -> Tensor:
    """Codes to null-filled latents, fp32."""
    return retain_prefix(dequantize(codes, levels), keep, null)


def project(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x [..., W]`` times ``weight [d, W]`` plus ``bias [d]``, fp32, autocast or not."""
    with torch.autocast(x.device.type, enabled=False):
        return torch.nn.functional.linear(x.float(), weight.float(), None if bias is None else bias.float())
