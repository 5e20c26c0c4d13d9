"""Retained lengths drawn from a counter: Philox4x32-10 (Salmon et al., 2011), the generator Triton has built in.

Block ``b`` draws from counter ``offset + b`` under key ``seed``, so a length depends on nothing else: not on the batch
it is in, nor on the backend, and a captured graph draws afresh when the offset in its memory has grown.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from flexlam_fast.errors import InputError

MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)


def prefix_edges(slots: int, weights: tuple[float, ...] | None, device: torch.device) -> Tensor:
    """Return int64 ``[K]``: a 32-bit draw ``u`` keeps as many slots as there are edges at or below ``u``.

    Args:
        slots: ``K``.
        weights: odds of the lengths ``0..K``, not negative, not all zero; None: all alike.
        device: where the draws will be made.
    """
    # what a compiler or a dispatch mode makes of a constant is not for the next caller
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return _edges(slots, weights, device)
    return _known_edges(slots, weights, device)


@lru_cache(maxsize=64)
def _known_edges(slots: int, weights: tuple[float, ...] | None, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return _edges(slots, weights, device)


def _edges(slots: int, weights: tuple[float, ...] | None, device: torch.device) -> Tensor:
    if weights is None:
        return torch.tensor(
            [-(-(i << 32) // (slots + 1)) for i in range(1, slots + 1)], dtype=torch.int64, device=device
        )
    odds = list(weights)
    if len(odds) != slots + 1 or not all(math.isfinite(w) and w >= 0 for w in odds) or not sum(odds) > 0:
        raise InputError(f"weights: expected {slots + 1} odds for the lengths 0..{slots}, got {odds!r}")
    total = math.fsum(odds)
    share = [math.fsum(odds[: i + 1]) / total for i in range(slots)]
    return torch.tensor([math.ceil(s * 2**32) for s in share], dtype=torch.int64, device=device)


def draw(seed: Tensor, count: int) -> Tensor:
    """Return the first 32-bit word at counters ``offset..offset + count - 1``, int64 ``[count]``.

    Args:
        seed: int64 ``[2]``: the key and the offset.
        count: how many.
    """
    at = seed[1] + torch.arange(count, dtype=torch.int64, device=seed.device)
    zero = torch.zeros_like(at)
    return first_word(seed[0], at & MASK, (at >> 32) & MASK, zero, zero)


def first_word(key: Tensor, c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor) -> Tensor:
    """Return the first word of Philox4x32-10, int64, under ``key`` int64 at counters of four 32-bit words, int64."""
    return words(key, c0, c1, c2, c3)[0]


def words(key: Tensor, c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return all four words of Philox4x32-10; arguments as :func:`first_word`'s."""
    k0, k1 = key & MASK, (key >> 32) & MASK
    for _ in range(10):
        high0, low0 = _multiply(_MULTIPLIERS[0], c0)
        high1, low1 = _multiply(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _KEY_STEPS[0]) & MASK, (k1 + _KEY_STEPS[1]) & MASK
    return c0, c1, c2, c3


def sample_prefix(seed: Tensor, edges: Tensor, count: int) -> Tensor:
    """Return ``count`` retained lengths, int32, for ``edges`` as :func:`prefix_edges` makes them."""
    return torch.searchsorted(edges, draw(seed, count), right=True).to(torch.int32)


def _multiply(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return the high and low words of the product of two 32-bit numbers, in pieces that fit int64."""
    low = (a & 0xFFFF) * b
    middle = (a >> 16) * b + (low >> 16)
    return middle >> 16, ((middle << 16) | (low & 0xFFFF)) & MASK
