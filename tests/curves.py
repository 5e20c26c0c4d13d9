"""Training by one backend beside plain PyTorch, step by step: ``python tests/curves.py --stage lam --backend triton``.

Rounding grows in training, so no fixed tolerance fits a curve of losses. The measure is plain PyTorch itself, run again
with its first weights changed by their last bits, at random: what that moves the loss of a step, or of one before, a
fast path may move it twice as far. A code at a near tie is a matter of its own: once it flips, gradients differ by much
more than rounding, and it flips in one run some steps sooner than in another. So a changed run counts up to its own
first flip. Where the fast path flips its first code, plain's own latent must be as near to the tie as rounding has
moved latents; from there on the loss may move twice as far as flips move it in the changed runs at any step. Without a
GPU, Triton's kernels run in its interpreter.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from small import small_data
from torch import Tensor
from tqdm import tqdm
from train_cases import BATCH, KINDS, made

from flexlam_fast.backend import REFERENCE
from flexlam_fast.data.store import EpisodeStore
from flexlam_fast.lam import LatentActionModel
from flexlam_fast.ops.reference import level_table
from flexlam_fast.testing import FORWARD_FACTOR
from flexlam_fast.train.loader import to_device
from flexlam_fast.train.loop import Stage, Trainer
from flexlam_fast.train.recipes import Recipe

#: How much of themselves the first weights of the changed runs gain or lose: about the last bit of fp32; of bf16 less,
#: so that some of the weights round to another number and no code flips at once.
NUDGES = {"fp32": 2.0**-22, "bf16": 2.0**-10}
CHANGED = 3
Losses = NDArray[np.float64]


class Curve(NamedTuple):
    """A run beside that of plain PyTorch.

    Attributes:
        losses: of every step.
        end: the last validation loss.
        flips: codes of each step's batch that are not plain's.
        moved: how far the furthest bounded latent of each step is from plain's, in steps of its rounding.
        tie: of plain's latents where this run's first codes flip, the furthest from its tie; 0 without flips.
    """

    losses: Losses
    end: float
    flips: NDArray[np.int64]
    moved: Losses
    tie: float

    def first_flip(self) -> int:
        """The step of the first flip; the number of steps where there is none."""
        return int(np.argmax(self.flips > 0)) if self.flips.any() else len(self.flips)


class Verdict(NamedTuple):
    """A fast curve against its budget.

    Attributes:
        fast: the curve.
        share: the largest share of the loss's budget that a step takes before the first flip, and after.
        end: the share that the last validation loss takes.
        tie: the share that the first flip's distance from a tie takes.
        others: codes that flip in the changed runs.
    """

    fast: Curve
    share: tuple[float, float]
    end: float
    tie: float
    others: tuple[int, ...]

    def holds(self) -> bool:
        """Whether nothing takes more than its budget."""
        return all(share <= 1 for share in (*self.share, self.end, self.tie))

    def __str__(self) -> str:
        steps, first = len(self.fast.losses), self.fast.first_flip()
        flips = (
            f"first flip in step {first}, {self.tie:.2f} of the budget from a tie; after it {self.share[1]:.2f} of the "
            f"loss's; {int(self.fast.flips.sum())} codes flip ({', '.join(map(str, self.others))} in changed runs)"
            if first < steps
            else "no code flips"
        )
        return f"{steps} steps, at most {self.share[0]:.2f} of the budget of losses; {flips}; end {self.end:.2f}"


class Run:
    """A stage in training by a backend; each of its first weights changed by the last bit, drawn from ``seed``."""

    def __init__(
        self, stage: Stage, backend: str, steps: int, device: torch.device, precision: str, seed: int | None = None
    ) -> None:
        self.stage, self.device = stage, device
        self.folder = tempfile.TemporaryDirectory(prefix="curve")  # goes with the run
        recipe, folder = Recipe(steps, BATCH, 1e-3), Path(self.folder.name)
        self.trainer = Trainer(stage, recipe, folder, device=device, precision=precision, backend=backend)
        if seed is not None:
            generator = torch.Generator().manual_seed(seed)
            with torch.no_grad():
                for parameter in self.trainer.parameters.values():
                    signs = torch.randint(0, 2, parameter.shape, generator=generator) * 2 - 1
                    parameter.mul_(1 + NUDGES[precision] * signs.to(device))
        lams = [module for module in stage.model.modules() if isinstance(module, LatentActionModel)]
        self.lam = next((lam for lam in lams if lam.bottleneck.null.requires_grad), None)

    def step(self, index: int) -> tuple[float, Tensor]:
        """Loss of a step, and bounded latents of its batch before it; none where the stage trains no LAM."""
        self.stage.model.train()
        batch = to_device(self.stage.read(index), self.device)
        latents = self.bounded(batch) if self.lam is not None else torch.zeros(0)
        return float(self.trainer.step(batch, self.trainer.recipe.rate(index))), latents

    @torch.no_grad()
    def bounded(self, batch: Any) -> Tensor:
        """Latents as FSQ is about to round them; codes are the same exactly where these round alike."""
        assert self.lam is not None
        parts = [getattr(batch, name) for name in ("frames", "labelled") if hasattr(batch, name)]
        frames = torch.cat([self.stage.frames.on_device(part) for part in parts], dim=1)  # type: ignore[attr-defined]
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.trainer.bf16):
            z = self.lam.encoder.forward_frames(*frames).float()
        table = level_table(self.lam.bottleneck.levels, z.device)
        return ((z + table.shift).tanh() * table.half - table.offset).cpu()

    @torch.no_grad()
    def end(self) -> float:
        """The validation loss."""
        self.stage.model.eval()
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.trainer.bf16):
            return self.stage.validate()["val/loss"]


def compare(
    make: Callable[[], Stage],
    backend: str,
    steps: int,
    device: torch.device,
    precision: str = "fp32",
    quiet: bool = True,
) -> Verdict:
    """Train stages that ``make`` makes, alike in everything: by plain PyTorch, by ``backend``, and the changed runs."""
    runs = [Run(make(), name, steps, device, precision) for name in (REFERENCE, backend)]
    runs += [Run(make(), REFERENCE, steps, device, precision, seed) for seed in range(CHANGED)]
    losses, flips, moved = (np.zeros((len(runs), steps)) for _ in range(3))
    ties = [0.0] * len(runs)
    for index in tqdm(range(steps), disable=quiet):
        plain = torch.zeros(0)
        for i, run in enumerate(runs):
            losses[i, index], latents = run.step(index)
            plain = latents if i == 0 else plain
            if not len(plain):  # no codes in training
                continue
            other = latents.round() != plain.round()
            if other.any() and not flips[i].any():
                ties[i] = float((0.5 - (plain - plain.round()).abs())[other].max())
            flips[i, index] = int(other.any(-1).sum())
            moved[i, index] = float((latents - plain).abs().max())
    ends = [run.end() for run in runs]
    curves = [Curve(losses[i], ends[i], flips[i].astype(int), moved[i], ties[i]) for i in range(len(runs))]
    return judge(curves[0], curves[1], curves[2:])


def judge(plain: Curve, fast: Curve, others: list[Curve]) -> Verdict:
    """A fast curve against the budget that other runs of plain set."""
    away, first = [np.abs(other.losses - plain.losses) for other in others], fast.first_flip()
    least = 2.0**-21 * plain.losses.max()  # what a loss rounds by where no run moves it
    calm = np.max([_before(other, moved) for other, moved in zip(others, away, strict=True)], axis=0)
    budget = FORWARD_FACTOR * np.maximum(calm, least)
    budget[first:] = FORWARD_FACTOR * max(least, *(moved.max() for moved in away))
    share = np.abs(fast.losses - plain.losses) / budget
    end = max(budget[-1], FORWARD_FACTOR * max(abs(other.end - plain.end) for other in others))
    latents = np.max([_before(other, other.moved, 1) for other in others], axis=0)  # which move before codes flip
    tie = fast.tie / (FORWARD_FACTOR * latents[first]) if first < len(share) else 0.0
    before, after = (float(part.max(initial=0.0)) for part in (share[:first], share[first:]))
    flips = tuple(int(other.flips.sum()) for other in others)
    return Verdict(fast, (before, after), abs(fast.end - plain.end) / end, tie, flips)


def _before(run: Curve, moved: Losses, more: int = 0) -> Losses:
    """How far a run has moved at most so far; from ``more`` steps after its own first flip on, until then."""
    most, first = np.maximum.accumulate(moved), run.first_flip() + more
    if first < len(most):
        most[first:] = most[first - 1] if first else 0.0
    return most


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--stage", choices=KINDS, nargs="+", default=KINDS)
    parser.add_argument("--backend", default="triton", help="default: %(default)s")
    parser.add_argument("--precision", choices=tuple(NUDGES), default="fp32", help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=300, help="default: %(default)s")
    asked = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        torch.set_num_threads(1)
        os.environ["TRITON_INTERPRET"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        store = EpisodeStore.open(small_data(Path(folder) / "episodes"))
        verdicts = []
        for kind in asked.stage:
            make = partial(made, kind, store, device)
            verdicts.append(compare(make, asked.backend, asked.steps, device, asked.precision, quiet=False))
            print(f"{kind}, {asked.backend}, {asked.precision}: {verdicts[-1]}", flush=True)
    if not all(verdict.holds() for verdict in verdicts):
        raise SystemExit("over budget")


if __name__ == "__main__":
    main()
