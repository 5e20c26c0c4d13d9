"""How well held-out transitions are decoded at each budget: the command ``flexlam-fast reconstruct``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from flexlam_fast.checks import check_budget
from flexlam_fast.data.extras import need
from flexlam_fast.data.store import EpisodeStore
from flexlam_fast.evaluate.decoding import Pairs, check_budgets, decode_at, draw_transitions
from flexlam_fast.evaluate.fidelity import change, psnr, ssim
from flexlam_fast.evaluate.files import make_folder, write
from flexlam_fast.evaluate.load import load_lam
from flexlam_fast.evaluate.strip import StripRow, pick, save_strip, strip_rows
from flexlam_fast.evaluate.summary import Score, fixed, score
from flexlam_fast.lam import LatentActionModel

#: Transitions decoded at once.
CHUNK = 64
#: Transitions that are asked for at least: the half that moves has an interval only if it is two.
FEWEST = 4
COPY = "copy o_t"
NOTE = (
    "PSNR and SSIM are means over images with 95% intervals, data range 255, the same noise at every k; an identical "
    "image counts as 60 dB. 'Moving' is the half of the transitions that change most. LPIPS is not reported: its "
    "backbone would have to be downloaded."
)


class Quality(NamedTuple):
    """PSNR in dB and SSIM over some transitions."""

    psnr: Score
    ssim: Score


class ReconstructionRow(NamedTuple):
    """One way to guess ``o_{t+1}``, on all transitions and on the moving half; ``budget`` None is copying ``o_t``."""

    budget: int | None
    every: Quality
    moving: Quality

    @property
    def label(self) -> str:
        """How tables call it."""
        return COPY if self.budget is None else f"k={self.budget}"


class Reconstruction(NamedTuple):
    """The rows, copying first, then the budgets in the order asked for; how many transitions, and the seed."""

    rows: tuple[ReconstructionRow, ...]
    transitions: int
    seed: int

    def json(self) -> dict[str, Any]:
        """Return the rows by label."""
        rows = {row.label: {"all": _plain(row.every), "moving": _plain(row.moving)} for row in self.rows}
        return {"rows": rows, "transitions": self.transitions, "seed": self.seed, "note": NOTE}

    def markdown(self) -> str:
        """Return the table in Markdown, which reads well on a terminal too."""
        lines = [
            "| decoded from | PSNR dB, all   | SSIM, all     | PSNR dB, moving | SSIM, moving  |",
            "| ------------ | -------------: | ------------: | --------------: | ------------: |",
        ]
        for row in self.rows:
            cells = [fixed(q, d) for part in (row.every, row.moving) for q, d in ((part.psnr, 2), (part.ssim, 3))]
            widths = (14, 13, 15, 13)
            lines.append(
                f"| {row.label:<12} | " + " | ".join(c.rjust(w) for c, w in zip(cells, widths, strict=True)) + " |"
            )
        return "\n".join(lines) + f"\n\n{self.transitions} held-out transitions. {NOTE}\n"


def reconstruct(
    checkpoint: str | Path,
    data: Path,
    *,
    budgets: tuple[int, ...] | None = None,
    transitions: int = 256,
    seed: int = 0,
    output: Path | None = Path("out/reconstruct"),
    device: str = "auto",
    progress: bool = True,
) -> Reconstruction:
    """Decode held-out transitions at several budgets and compare them with the truth.

    Args:
        checkpoint: a run, its stage lam or joint, a checkpoint of it, a policy, or the name of a shipped one.
        data: a data set of packed episodes; its test split is used.
        budgets: values of k; 0 decodes from nulls alone; None takes 0, 1, 2, 4, ... and K.
        transitions: how many, drawn from the test split; all of them if there are fewer.
        seed: of the draw and of the noise.
        output: folder for reconstruct.json, reconstruct.md and strip.png.
        device: where to run; auto takes a GPU where there is one.
        progress: whether to show a bar.

    Returns:
        The table.

    Raises:
        FlexLAMError: one sentence for whatever cannot be read, written, or has the wrong size.
    """
    lam, store = load_lam(checkpoint, device), EpisodeStore.open(data)
    return reconstruct_lam(lam, store, budgets, transitions=transitions, seed=seed, output=output, progress=progress)


def reconstruct_lam(
    lam: LatentActionModel,
    store: EpisodeStore,
    budgets: Sequence[int] | None = None,
    *,
    transitions: int = 256,
    seed: int = 0,
    output: Path | None = None,
    progress: bool = True,
) -> Reconstruction:
    """Do what :func:`reconstruct` does with a model and a data set that are open already."""
    bottleneck = lam.cfg.bottleneck
    chosen = check_budgets((0, *bottleneck.ladder) if budgets is None else budgets, bottleneck.slots)
    indices = _draw(lam, store, transitions, seed)
    need("torchmetrics")
    if output is not None:
        need("PIL")  # better now than after the work
        make_folder(output)
    parts: list[Tensor] = []
    moves: list[Tensor] = []
    for start in tqdm(range(0, len(indices), CHUNK), unit="batch", desc="decode", disable=not progress):
        few = indices[start : start + CHUNK]
        pairs = Pairs.of(store.take(few), store.take(few + 1))
        guesses = [pairs.now, *decode_at(lam, pairs, chosen, seed + start)]
        parts.append(torch.stack([torch.stack([psnr(g, pairs.following), ssim(g, pairs.following)]) for g in guesses]))
        moves.append(change(pairs.now, pairs.following))
    result = _summarise(torch.cat(parts, dim=2), torch.cat(moves), chosen, seed)
    if output is not None:
        write(output / "reconstruct.json", json.dumps(result.json(), indent=2) + "\n")
        write(output / "reconstruct.md", result.markdown())
        rows = _strip(lam, store, indices, torch.cat(moves).numpy(), chosen, seed)
        save_strip(rows, chosen, output / "strip.png")
    return result


def _draw(lam: LatentActionModel, store: EpisodeStore, transitions: int, seed: int) -> NDArray[np.int64]:
    check_budget("transitions", transitions, FEWEST, 2**31 - 1)
    check_budget("seed", seed, 0, 2**32 - 1)
    store.check_frames(lam.cfg.frame, lam.cfg.channels)
    return draw_transitions(store, FEWEST, transitions, seed)


def _summarise(values: Tensor, moves: Tensor, budgets: tuple[int, ...], seed: int) -> Reconstruction:
    """``values [guesses, (psnr, ssim), n]``; the moving half is the one above the median change."""
    half = moves.argsort(descending=True, stable=True)[: len(moves) // 2]

    def quality(of: Tensor) -> Quality:
        return Quality(score(of[0].tolist()), score(of[1].tolist()))

    labels: tuple[int | None, ...] = (None, *budgets)
    rows = [ReconstructionRow(k, quality(v), quality(v[:, half])) for k, v in zip(labels, values, strict=True)]
    return Reconstruction(tuple(rows), len(moves), seed)


def _strip(
    lam: LatentActionModel,
    store: EpisodeStore,
    indices: NDArray[np.int64],
    moves: NDArray[np.float32],
    budgets: tuple[int, ...],
    seed: int,
) -> list[StripRow]:
    """Two transitions of every task, at most eight in all, among those that move."""
    tasks = np.array([store.episodes[i].task for i in store.episode_of(indices)])
    chosen: list[int] = []
    for task in sorted(set(tasks))[:8]:
        mine = np.flatnonzero(tasks == task)
        chosen += [int(mine[i]) for i in pick(moves[mine], 2)]
    frames = indices[chosen[:8]]
    pairs = Pairs.of(store.take(frames), store.take(frames + 1))
    return strip_rows([str(t) for t in tasks[chosen[:8]]], pairs, decode_at(lam, pairs, budgets, seed))


def _plain(quality: Quality) -> dict[str, Any]:
    return {
        name: {"mean": value.mean, "ci95": value.ci95}
        for name, value in (("psnr", quality.psnr), ("ssim", quality.ssim))
    }
