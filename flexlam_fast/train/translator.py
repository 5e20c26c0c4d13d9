"""Stage 3: the translator on a small labelled subset, with the LAM frozen (paper section 4.2, A.6)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flexlam_fast.bottleneck import sample_prefix
from flexlam_fast.config import FlexLAMConfig
from flexlam_fast.data.store import EpisodeStore
from flexlam_fast.errors import DataError, InputError
from flexlam_fast.lam import LatentActionModel
from flexlam_fast.train.random import generator, pick, uniform
from flexlam_fast.translator import Translator, encode_actions, translator_loss
from flexlam_fast.types import Actions

VALIDATION_LABELS = 2048


def choose_labels(
    store: EpisodeStore, split: str, labels: float, seed: int, task: str | None = None
) -> NDArray[np.int64]:
    """Choose the labelled transitions, the same for the same seed.

    Args:
        store: the data; only transitions with a known action count.
        split: ``"train"`` or ``"test"``.
        labels: below 1 a share of the split's transitions, otherwise a count.
        seed: of the choice.
        task: all labels from this task (the narrow-source test, paper section 5.3); None for the same number from
            every task (paper: "uniformly across tasks").

    Raises:
        DataError: there are no labelled transitions.
        InputError: more labels than there are, or none.
    """
    tasks = [task] if task is not None else list(store.tasks)
    pools = [store.transitions(split, [name]) for name in tasks]
    pools = [p[store.actions[p] >= 0] for p in pools]
    if not any(len(p) for p in pools):
        raise DataError(f"{store.path}: expected labelled {split} transitions, got none")
    count = round(labels * len(store.transitions(split))) if labels < 1 else round(labels)
    available = sum(len(p) for p in pools)
    if not 1 <= count <= available:
        raise InputError(f"labels: expected 1..{available} labelled transitions, got {count}")
    order = [np.random.default_rng([seed, i]).permutation(p) for i, p in enumerate(pools)]
    taken: list[np.int64] = []
    for rank in range(max(len(p) for p in pools)):  # round-robin: tasks differ by one label at most while they last
        taken += [p[rank] for p in order if rank < len(p)]
        if len(taken) >= count:
            break
    return np.sort(np.asarray(taken[:count], dtype=np.int64))


def action_targets(store: EpisodeStore, index: NDArray[np.int64]) -> tuple[Actions, Actions]:
    """Actions taken at the frames ``index``, and the actions before them."""
    empty = torch.zeros(len(index), 0)
    now, before = (
        torch.from_numpy(table[index]).long().unsqueeze(1) for table in (store.actions, store.previous_actions)
    )
    return Actions(now, empty), Actions(before, empty)


class TranslatorStage:
    """Cross-entropy of the true action given null-filled latents, under the prefix distribution of the LAM."""

    name = "translator"

    def __init__(
        self,
        cfg: FlexLAMConfig,
        store: EpisodeStore,
        lam: LatentActionModel,
        codes: NDArray[np.int32],
        labelled: NDArray[np.int64],
        batch: int,
        seed: int,
        device: torch.device,
        source: str = "",
    ) -> None:
        check_actions(cfg, store)
        self.cfg, self.store, self.lam, self.codes, self.labelled = cfg, store, lam, codes, labelled
        self.batch, self.seed, self.device, self.source = batch, seed, device, source
        held_out = len(store.transitions("test"))
        self.test = choose_labels(store, "test", float(min(VALIDATION_LABELS, held_out)), seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.model = Translator(cfg).to(device)
        self.right = self.seen = 0

    def loss(self, step: int) -> Tensor:
        """The loss of one step."""
        generators = [generator(self.seed, self.name, step, sample) for sample in range(self.batch)]
        index = self.labelled[[pick(len(self.labelled), g) for g in generators]]
        keep = sample_prefix(self.cfg.bottleneck, torch.stack([uniform(g) for g in generators]))
        loss, right = self._loss(index, keep)
        self.right, self.seen = self.right + right, self.seen + len(index)
        return loss

    def report(self) -> Mapping[str, Any]:
        """Share of actions predicted right since the last report."""
        share = self.right / max(1, self.seen)
        self.right = self.seen = 0
        return {"accuracy": share, "labels": len(self.labelled)}

    def validate(self) -> Mapping[str, float]:
        """Loss on held-out transitions averaged over a ladder of budgets, and the accuracy at each of them."""
        metrics, total = {}, 0.0
        ladder = self.cfg.bottleneck.ladder
        for k in ladder:
            loss, right = self._loss(self.test, torch.full((len(self.test),), k))
            metrics[f"val/accuracy_k{k}"] = right / len(self.test)
            total += float(loss)
        return {"val/loss": total / len(ladder), **metrics}

    def identity(self) -> Mapping[str, Any]:
        """Data, labels, the LAM, seed and batch."""
        chosen = [len(self.labelled), int(self.labelled.sum())]
        base = {"data": self.store.fingerprint, "lam": self.source, "seed": self.seed, "batch": self.batch}
        return {**base, "labels": chosen}

    def _loss(self, index: NDArray[np.int64], keep: Tensor) -> tuple[Tensor, int]:
        codes = torch.from_numpy(np.asarray(self.codes[index])).to(self.device)
        with torch.no_grad():
            latents = self.lam.latents(codes, keep.to(self.device))
        target, before = action_targets(self.store, index)
        target = Actions(*(part.to(self.device) for part in target))
        out = self.model(latents, encode_actions(before, self.cfg.translator).to(self.device))
        right = int((out.logits[0].argmax(-1) == target.discrete[:, 0]).sum())
        return translator_loss(out, target), right


def check_actions(cfg: FlexLAMConfig, store: EpisodeStore) -> None:
    """Check that the data's actions are the translator's.

    Raises:
        DataError: another vocabulary, or no actions at all.
    """
    names = tuple(store.action_names)
    wanted = cfg.translator.names
    if not store.labelled:
        raise DataError(f"{store.path}: expected actions, got action-free episodes")
    if (wanted and names != wanted) or cfg.translator.discrete != (len(names),):
        raise DataError(f"{store.path}: expected actions {list(wanted or cfg.translator.discrete)}, got {list(names)}")
