"""Stage 3: the translator on a small labelled subset, with the LAM frozen (paper section 4.2, A.6)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flexlam_fast.bottleneck import sample_prefix
from flexlam_fast.config import FlexLAMConfig
from flexlam_fast.data.store import EpisodeStore
from flexlam_fast.errors import DataError, InputError
from flexlam_fast.lam import LatentActionModel
from flexlam_fast.ops.draws import draw_uniform
from flexlam_fast.train.loader import to_device
from flexlam_fast.train.peers import ALONE, Peers
from flexlam_fast.train.random import draw_key, picks, streams
from flexlam_fast.translator import Translator, one_hot_actions, translator_loss
from flexlam_fast.types import Actions
from flexlam_fast.values import check_number

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
    check_number("labels", labels, 0, math.inf, open_low=True)
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


class TranslatorBatch(NamedTuple):
    """``codes`` int32 ``[B, K]``; ``action``, ``before`` int64 ``[B, 1]``; ``streams`` int64 ``[B]``."""

    codes: Tensor
    action: Tensor
    before: Tensor
    streams: Tensor


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
        peers: Peers = ALONE,
    ) -> None:
        check_actions(cfg, store)
        self.cfg, self.store, self.lam, self.codes, self.labelled, self.peers = cfg, store, lam, codes, labelled, peers
        self.batch, self.seed, self.device, self.source = batch, seed, device, source
        held_out = len(store.transitions("test"))
        self.test = choose_labels(store, "test", float(min(VALIDATION_LABELS, held_out)), seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.model = Translator(cfg).to(device)
        self.key = draw_key(seed, self.name, "keep", device=device)
        self.hits = torch.zeros(2, dtype=torch.int64, device=device)

    def read(self, step: int) -> TranslatorBatch:
        """This process's share of a step's batch, on the host."""
        samples = self.peers.share(self.batch)
        index = self.labelled[picks(len(self.labelled), self.seed, self.name, step, samples)]
        return self._rows(index, streams(step, samples, self.batch))

    def loss(self, batch: TranslatorBatch) -> Tensor:
        """The loss of a batch on the device."""
        keep = sample_prefix(self.cfg.bottleneck, draw_uniform(self.key, batch.streams))
        loss, right = self._loss(batch, keep)
        self.hits += torch.stack([right, torch.full_like(right, len(keep))])
        return loss

    def tallies(self) -> Sequence[Tensor]:
        """What :meth:`loss` counts on the device."""
        return (self.hits,)

    def report(self) -> Mapping[str, Any]:
        """Share of actions predicted right since the last report."""
        right, seen = self.peers.total(self.hits).tolist()
        self.hits.zero_()
        return {"accuracy": right / max(1, seen), "labels": len(self.labelled)}

    def validate(self) -> Mapping[str, float]:
        """Loss on held-out transitions averaged over a ladder of budgets, and the accuracy at each of them."""
        metrics, total = {}, 0.0
        ladder = self.cfg.bottleneck.ladder
        batch = to_device(self._rows(self.test, torch.arange(len(self.test))), self.device)
        for k in ladder:
            loss, right = self._loss(batch, torch.full((len(self.test),), k, device=self.device))
            metrics[f"val/accuracy_k{k}"] = float(right) / len(self.test)
            total += float(loss)
        return {"val/loss": total / len(ladder), **metrics}

    def identity(self) -> Mapping[str, Any]:
        """Data, labels, the LAM, seed and batch."""
        chosen = [len(self.labelled), int(self.labelled.sum())]
        base = {"data": self.store.fingerprint, "lam": self.source, "seed": self.seed, "batch": self.batch}
        return {**base, "labels": chosen}

    def _rows(self, index: NDArray[np.int64], streams: Tensor) -> TranslatorBatch:
        now, before = action_targets(self.store, index)
        codes = torch.from_numpy(np.asarray(self.codes[index]))
        return TranslatorBatch(codes, now.discrete, before.discrete, streams)

    def _loss(self, batch: TranslatorBatch, keep: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            latents = self.lam.fill(batch.codes, keep)
        return translate_labels(self.model, latents, batch.action, batch.before, self.cfg)


def translate_labels(
    model: Translator, latents: Tensor, action: Tensor, before: Tensor, cfg: FlexLAMConfig
) -> tuple[Tensor, Tensor]:
    """The translator's loss on labelled actions int64 ``[B, 1]``, after those ``before``, and how many it has right."""
    target, previous = (Actions(a, torch.zeros(len(a), 0, device=a.device)) for a in (action, before))
    out = model(latents, one_hot_actions(previous, cfg.translator))
    return translator_loss(out, target), (out.logits[0].argmax(-1) == action[:, 0]).sum()


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
