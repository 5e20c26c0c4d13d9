"""What codes do to the picture: its quality at each budget, beside copying, swapped codes and unrelated frames.

Swapped codes are those of another transition: worse than no codes at all where the decoder obeys what they say. An
unrelated pair is a present frame and a next one of different episodes, as at a cut of a film: codes that lead there
too hold the picture, and not what was done.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from flexlam_fast.data.store import EpisodeStore
from flexlam_fast.evaluate.decoding import decode_codes, draw_transitions
from flexlam_fast.evaluate.fidelity import change, psnr, ssim
from flexlam_fast.evaluate.summary import Score, score
from flexlam_fast.lam import LatentActionModel

CHUNK = 64
COPY, SWAPPED = "copy o_t", "swapped codes"


class Quality(NamedTuple):
    """PSNR in dB and SSIM over transitions, all and the half that changes most."""

    psnr: Score
    ssim: Score
    moving: Score


class PictureProbe(NamedTuple):
    """Quality by name (copying, ``k=...``, swapped codes); ``obeyed`` is the PSNR of a transition's own codes over
    swapped ones, in dB; ``leaked`` the share of the squared error on all unrelated pairs together that the codes take
    away, None where the test split is one episode and knows no such pairs."""

    quality: dict[str, Quality]
    obeyed: Score
    leaked: Score | None
    transitions: int

    def gain(self, moving: bool = False) -> float:
        """PSNR of all codes over none, in dB."""
        names = [name for name in self.quality if name.startswith("k=")]
        first, last = (self.quality[name] for name in (names[0], names[-1]))
        return last.moving.mean - first.moving.mean if moving else last.psnr.mean - first.psnr.mean

    def json(self) -> dict[str, Any]:
        """Every figure with its interval."""
        rows = {
            name: {part: {"mean": s.mean, "ci95": s.ci95} for part, s in quality._asdict().items()}
            for name, quality in self.quality.items()
        }
        found = (("obeyed", self.obeyed), ("leaked", self.leaked))
        both = {name: None if s is None else {"mean": s.mean, "ci95": s.ci95} for name, s in found}
        return {"quality": rows, **both, "transitions": self.transitions}


class _Guesses(NamedTuple):
    """Of one batch: PSNR ``[names, B]``, SSIM likewise, how much moves ``[B]``, and the squared errors on unrelated
    pairs ``[2, B]``, without codes and with all of them."""

    psnr: Tensor
    ssim: Tensor
    moves: Tensor
    cuts: Tensor


def probe_pictures(
    lam: LatentActionModel,
    store: EpisodeStore,
    budgets: Sequence[int],
    *,
    transitions: int,
    seed: int,
    progress: bool,
) -> PictureProbe:
    """Decode held-out transitions in every way.

    Args:
        lam: the model.
        store: its test split is used.
        budgets: values of ``k``, ascending, 0 and ``K`` among them.
        transitions: how many, at most; an even number of at least 4.
        seed: of the choice, the pairing and the noise, which is the same for every way.
        progress: whether to show a bar.
    """
    index, others, foreign = _chosen(store, transitions, seed)
    parts = [
        _guess(lam, store, index[rows], others[rows], budgets, seed + int(rows[0]))
        for rows in tqdm(np.array_split(np.arange(len(index)), -(-len(index) // CHUNK)), desc="decode", unit="batch",
                         disable=not progress)
    ]  # fmt: skip
    quality = [torch.cat([getattr(part, name) for part in parts], dim=1) for name in ("psnr", "ssim")]
    moves, cuts = torch.cat([part.moves for part in parts]), torch.cat([part.cuts for part in parts], dim=1)
    half = moves.argsort(descending=True, stable=True)[: len(moves) // 2]
    names = [COPY, *(f"k={k}" for k in budgets), SWAPPED]
    rows = {
        name: Quality(score(p.tolist()), score(s.tolist()), score(p[half].tolist()))
        for name, p, s in zip(names, *quality, strict=True)
    }
    obeyed = quality[0][names.index(f"k={max(budgets)}")] - quality[0][-1]
    return PictureProbe(rows, score(obeyed.tolist()), _share(*cuts) if foreign else None, len(index))


def _share(without: Tensor, with_codes: Tensor) -> Score:
    """Which part of all pairs' error the codes take away, with the interval of a jackknife over pairs."""

    def of(a: Tensor, b: Tensor) -> Tensor:
        return 1 - b / a.clamp_min(1e-9)

    n, a, b = len(without), without.double(), with_codes.double()
    whole, each = of(a.sum(), b.sum()), of(a.sum() - a, b.sum() - b)
    return score((n * whole - (n - 1) * each).tolist())._replace(mean=float(whole))


def _chosen(store: EpisodeStore, transitions: int, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64], bool]:
    """Transitions of the test split, for each another one, and whether all of those are of another episode."""
    index, random = draw_transitions(store, 4, transitions, seed), np.random.default_rng([seed, 1])
    owners = store.episode_of(index)
    others = np.empty_like(index)
    for i, owner in enumerate(owners):
        foreign = index[owners != owner]
        others[i] = random.choice(foreign if len(foreign) else np.delete(index, i))
    return index, others, len(set(owners.tolist())) > 1


@torch.no_grad()
def _guess(
    lam: LatentActionModel,
    store: EpisodeStore,
    index: NDArray[np.int64],
    others: NDArray[np.int64],
    budgets: Sequence[int],
    seed: int,
) -> _Guesses:
    device, most = next(lam.parameters()).device, max(budgets)
    now, following, elsewhere, beyond = (
        torch.from_numpy(store.take(rows)).to(device) for rows in (index, index + 1, others, others + 1)
    )
    codes, foreign, cut = lam.encode(now, following), lam.encode(elsewhere, beyond), lam.encode(now, beyond)
    guesses = [
        now.cpu(),
        *(decode_codes(lam, now, codes, k, seed) for k in budgets),
        decode_codes(lam, now, foreign, most, seed),
    ]
    truth, unrelated = following.cpu(), beyond.cpu()
    without, with_codes = (
        _error(frames, unrelated)
        for frames in (guesses[1 + list(budgets).index(0)], decode_codes(lam, now, cut, most, seed))
    )
    return _Guesses(
        torch.stack([psnr(guess, truth) for guess in guesses]),
        torch.stack([ssim(guess, truth) for guess in guesses]),
        change(now.cpu(), truth),
        torch.stack([without, with_codes]),
    )


def _error(frames: Tensor, truth: Tensor) -> Tensor:
    return (frames.float() - truth.float()).square().mean((1, 2, 3))
