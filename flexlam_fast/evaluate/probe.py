"""What a latent action model's codes know: the command ``flexlam-fast probe``.

Three ways to fail are told apart: codes that are always the same (collapsed), codes that the decoder does not listen to
(ignored), and codes that hold the next picture in place of what was done (leaking).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from flexlam_fast.checks import check_budget, check_list
from flexlam_fast.data.extras import need
from flexlam_fast.data.store import EpisodeStore
from flexlam_fast.errors import InputError
from flexlam_fast.evaluate.action_probe import MIN_LABELS, ActionProbe, LabelCount, plain, pool_of, probe_actions
from flexlam_fast.evaluate.decoding import check_budgets
from flexlam_fast.evaluate.files import make_folder, write
from flexlam_fast.evaluate.load import load_lam
from flexlam_fast.evaluate.picture_probe import PictureProbe, probe_pictures
from flexlam_fast.evaluate.summary import Score, fixed
from flexlam_fast.lam import LatentActionModel
from flexlam_fast.train.health import CodebookHealth
from flexlam_fast.values import check_path

FILES = ("probe.json", "probe.md")
#: Bits of the slot that says most below which a LAM has collapsed; dB that a transition's own codes must be better than
#: swapped ones; share of the error on unrelated pairs above which codes hold the picture.
COLLAPSED_BITS, IGNORED_DB, LEAKING = 0.1, 0.1, 0.5
#: Held-out transitions whose codes are counted, and that judge what codes know of actions.
JUDGES = 4096


class Usage(NamedTuple):
    """Of held-out codes: bits of every slot, at most ``most``; the share of the codebook that any slot used."""

    bits: tuple[float, ...]
    most: float
    used: float
    transitions: int


class Probe(NamedTuple):
    """Everything that was found; ``actions`` None where the data knows none."""

    pictures: PictureProbe
    usage: Usage
    actions: ActionProbe | None

    def faults(self) -> list[str]:
        """What is wrong with the codes, in the field's words and figures; empty if nothing."""
        found, bits = [], max(self.usage.bits)
        if bits < COLLAPSED_BITS:
            found.append(f"collapsed: no slot has more than {bits:.2f} of {self.usage.most:.1f} bits")
        elif self.pictures.obeyed.mean < IGNORED_DB:
            found.append(
                f"ignored: a transition's own codes decode {self.pictures.obeyed.mean:.2f} dB better than another's"
            )
        leaked = self.pictures.leaked
        if leaked is not None and leaked.mean > LEAKING:
            share = leaked.mean
            found.append(f"leaking: at a cut to another episode the codes take away {share:.0%} of the error")
        return found

    def verdict(self) -> str:
        """One sentence."""
        faults = "; ".join(self.faults())
        if self.actions is None:
            known = "this data has no actions, so what codes know of them was not asked"
        else:
            known = _known(self.actions.counts[-1])
        return f"{faults}; {known}." if faults else f"{known[0].upper()}{known[1:]}."

    def json(self) -> dict[str, Any]:
        """What ``probe.json`` holds."""
        found: dict[str, Any] = {"verdict": self.verdict(), "faults": self.faults()}
        found["usage"] = self.usage._asdict()
        found["pictures"] = self.pictures.json()
        if self.actions is not None:
            found["actions"] = [plain(count) for count in self.actions.counts]
            found["held_out"] = self.actions.held_out
            if self.actions.reversal is not None:
                share, count = self.actions.reversal
                found["reversal"] = {"mean": share.mean, "ci95": share.ci95, "transitions": count}
        return found

    def markdown(self) -> str:
        """Verdict and tables, which read well on a terminal too."""
        parts = [f"**{self.verdict()}**", _picture_table(self.pictures)]
        if self.actions is not None:
            parts += [_action_table(self.actions)]
        bits = " ".join(f"{b:.2f}" for b in self.usage.bits)
        parts.append(
            f"Codes of {self.usage.transitions} held-out transitions: {self.usage.used:.0%} of the codebook used; bits "
            f"of each slot, of {self.usage.most:.2f}: {bits}."
        )
        return "\n\n".join(parts) + "\n"


def probe(
    checkpoint: str | Path,
    data: Path,
    *,
    budgets: tuple[int, ...] | None = None,
    labels: tuple[int, ...] = (1024, 20_000),
    transitions: int = 256,
    seeds: int = 3,
    seed: int = 0,
    output: Path | None = Path("out/probe"),
    device: str = "auto",
    progress: bool = True,
) -> Probe:
    """Ask what the codes of a latent action model know.

    Args:
        checkpoint: a run, its stage lam or joint, a checkpoint of it, a policy, or the name of a shipped one.
        data: packed episodes: codes are learned from on the train split and judged on the test split.
        budgets: values of ``k`` above 0; None takes 1, 2, 4, ... and K, which is always among them.
        labels: how many labelled transitions the small networks learn from, each of at least 10.
        transitions: how many are decoded, at least 4.
        seeds: draws of labels, each with networks of its own, at least 2.
        seed: of everything drawn.
        output: folder for probe.json and probe.md; None writes nothing.
        device: where to run; auto takes a GPU where there is one.
        progress: whether to show bars.

    Raises:
        FlexLAMError: one sentence for whatever cannot be read, written, or has the wrong size.
    """
    check_path("data", data)
    counts = [check_budget("labels", n, MIN_LABELS, 2**31 - 1) for n in check_list("labels", labels, "integers")]
    if not counts:
        raise InputError("labels: expected at least one number, got none")
    check_budget("transitions", transitions, 4, 2**31 - 1)
    check_budget("seeds", seeds, 2, 1000)
    check_budget("seed", seed, 0, 2**32 - 1001)
    need("torchmetrics")
    lam, store = load_lam(checkpoint, device), EpisodeStore.open(data)
    if output is not None:
        make_folder(output, *FILES)
    found = probe_lam(
        lam, store, budgets, labels=counts, transitions=transitions, seeds=seeds, seed=seed, progress=progress
    )
    if output is not None:
        write(output / "probe.json", json.dumps(found.json(), indent=2) + "\n")
        write(output / "probe.md", found.markdown())
    return found


def probe_lam(
    lam: LatentActionModel,
    store: EpisodeStore,
    budgets: Sequence[int] | None = None,
    *,
    labels: Sequence[int] = (1024, 20_000),
    transitions: int = 256,
    seeds: int = 3,
    seed: int = 0,
    progress: bool = False,
) -> Probe:
    """:func:`probe` of a model and a data set that are open already."""
    bottleneck = lam.cfg.bottleneck
    given = bottleneck.ladder if budgets is None else budgets
    chosen = sorted({*check_budgets(given, bottleneck.slots), bottleneck.slots} - {0})
    store.check_frames(lam.cfg.frame, lam.cfg.channels)
    pictures = probe_pictures(lam, store, [0, *chosen], transitions=transitions, seed=seed, progress=progress)
    usage = _usage(lam, store, seed)
    actions = probe_actions(lam, store, labels, chosen, held_out=JUDGES, seeds=seeds, seed=seed, progress=progress)
    return Probe(pictures, usage, actions)


def _usage(lam: LatentActionModel, store: EpisodeStore, seed: int) -> Usage:
    held = store.expect_transitions("test", 4)
    order = torch.randperm(len(held), generator=torch.Generator().manual_seed(seed))[:JUDGES].numpy()
    codes, size = pool_of(lam, store, held[order]).codes, lam.cfg.bottleneck.codebook_size
    health = CodebookHealth(lam.cfg.bottleneck.slots, size)
    health.update(codes)
    report: dict[str, Any] = health.report()
    bits = tuple(abs(b) for b in report["codes/entropy_bits"])
    return Usage(bits, report["codes/entropy_max"], report["codes/used"], len(codes))


def _known(count: LabelCount) -> str:
    codes, frames, carried = count.codes[max(count.codes)].mean, count.frames.mean, count.carried()
    if carried is None:
        return (
            f"with {count.labels} labels the frames themselves say no more about the action than the commonest one: "
            f"{frames:.3f} of held-out actions right from frames, {count.commonest.mean:.3f} by that one, {codes:.3f} "
            f"from codes"
        )
    return (
        f"codes carry {carried:.0%} of what the frames say about the action: {codes:.3f} of held-out actions "
        f"are right from codes alone, {frames:.3f} from both frames, {count.commonest.mean:.3f} by the commonest "
        f"action, with {count.labels} labels"
    )


def _picture_table(found: PictureProbe) -> str:
    lines = ["| decoded from | PSNR dB, all | SSIM, all | PSNR dB, moving |", "| --- | ---: | ---: | ---: |"]
    for name, quality in found.quality.items():
        lines.append(f"| {name} | {fixed(quality.psnr, 2)} | {fixed(quality.ssim, 3)} | {fixed(quality.moving, 2)} |")
    return "\n".join(lines) + (
        f"\n\n{found.transitions} held-out transitions, means with 95% intervals; 'moving' is the half that changes "
        f"most. Own codes over swapped ones: {fixed(found.obeyed, 2)} dB. {_cuts(found.leaked)}"
    )


def _cuts(leaked: Score | None) -> str:
    if leaked is None:
        return "The test split is one episode, so there is no cut to another to ask about."
    return f"At a cut to another episode the codes take away {fixed(leaked, 2)} of the squared error."


def _action_table(found: ActionProbe) -> str:
    ks = sorted(found.counts[0].codes)
    heads = [
        "labels",
        "commonest",
        "previous action",
        *(f"codes, k={k}" for k in ks),
        f"k={ks[-1]} + previous",
        "frames",
    ]
    lines = ["| " + " | ".join(heads) + " |", "| " + " | ".join(["---:"] * len(heads)) + " |"]
    for count in found.counts:
        cells = [count.commonest, count.previous, *(count.codes[k] for k in ks), count.together, count.frames]
        first = f"{count.labels} (all)" if count.every else str(count.labels)
        lines.append("| " + " | ".join([first, *(fixed(cell, 3) for cell in cells)]) + " |")
    last = found.counts[-1]
    tasks = ", ".join(f"{task} {fixed(value, 2)}" for task, value in last.tasks.items())
    text = "\n".join(lines) + (
        f"\n\nShare of {found.held_out} held-out actions that are right, evenly over tasks, with 95% intervals over "
        f"draws of labels and networks, or networks alone where those are all labels there are. Codes alone at "
        f"k={ks[-1]} with {last.labels} labels, by task: {tasks}."
    )
    if found.reversal is not None:
        text += (
            f" Of {found.reversal.transitions} transitions played backwards, codes say the opposite action for "
            f"{fixed(found.reversal.share, 2)}."
        )
    return text
