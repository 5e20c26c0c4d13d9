"""Decodes transitions at several budgets, with the same noise for all of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flexlam_fast.checks import check_budget, describe
from flexlam_fast.data.store import EpisodeStore
from flexlam_fast.errors import InputError
from flexlam_fast.lam import LatentActionModel


class Pairs(NamedTuple):
    """Transitions: ``now`` and ``following``, both uint8 ``[B, H, W, C]``."""

    now: Tensor
    following: Tensor

    @classmethod
    def of(cls, now: NDArray[np.uint8], following: NDArray[np.uint8]) -> Pairs:
        """Take frames from NumPy."""
        return cls(torch.from_numpy(np.ascontiguousarray(now)), torch.from_numpy(np.ascontiguousarray(following)))


def check_budgets(budgets: Sequence[int], slots: int) -> tuple[int, ...]:
    """Return budgets for decoding, where ``k = 0`` (all null) is allowed.

    Raises:
        BudgetError: for one outside ``0..K``.
        InputError: for none, or one that comes twice.
    """
    if isinstance(budgets, str) or not isinstance(budgets, Iterable):
        raise InputError(f"budgets: expected integers, got {describe(budgets)}")
    chosen = tuple(check_budget("budgets", k, 0, slots) for k in budgets)
    if not chosen or len(set(chosen)) < len(chosen):
        raise InputError(f"budgets: expected at least one, each once, got {chosen}")
    return chosen


@torch.no_grad()
def decode_at(lam: LatentActionModel, pairs: Pairs, budgets: Sequence[int], seed: int) -> list[Tensor]:
    """Encode the transitions once and decode ``o_{t+1}`` at each budget.

    Args:
        lam: the model, on any device.
        pairs: the transitions.
        budgets: values of ``k`` within ``0..K``.
        seed: of the noise, which is the same for every budget.

    Returns:
        One uint8 ``[B, H, W, C]`` on the host per budget.
    """
    device = next(lam.parameters()).device
    now, following = pairs.now.to(device), pairs.following.to(device)
    codes = lam.encode(now, following)
    return [decode_codes(lam, now, codes, k, seed) for k in budgets]


@torch.no_grad()
def decode_codes(lam: LatentActionModel, now: Tensor, codes: Tensor, k: int, seed: int) -> Tensor:
    """Decode what the first ``k`` of ``codes`` make of ``now``, uint8 ``[B, H, W, C]`` on the host; the same noise for
    the same ``seed``."""
    noise = torch.Generator(now.device).manual_seed(seed)
    return lam.decode(now, lam.latents(codes, k), generator=noise).cpu()


def draw_transitions(store: EpisodeStore, least: int, most: int, seed: int) -> NDArray[np.int64]:
    """Global indices, ascending, of at most ``most`` transitions of the test split, which must have ``least``.

    Raises:
        DataError: it has fewer.
    """
    available = store.expect_transitions("test", least)
    return np.sort(np.random.default_rng(seed).choice(available, min(most, len(available)), replace=False))
