"""Optional stage: the action loss updates encoder and bottleneck together with the translator (paper section 6.3)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from flexlam_fast.bottleneck import sample_prefix
from flexlam_fast.config import FlexLAMConfig
from flexlam_fast.data.store import EpisodeStore
from flexlam_fast.lam import LatentActionModel
from flexlam_fast.layers import normalise
from flexlam_fast.train.health import CodebookHealth
from flexlam_fast.train.lam import lam_loss, transitions
from flexlam_fast.train.random import generator, pick, uniform
from flexlam_fast.train.translator import VALIDATION_LABELS, action_targets, check_actions, choose_labels
from flexlam_fast.translator import Translator, encode_actions, translator_loss


class JointModel(nn.Module):
    """A LAM and a translator that are trained together."""

    def __init__(self, lam: LatentActionModel, translator: Translator) -> None:
        super().__init__()
        self.lam = lam
        self.translator = translator


class JointStage:
    """The LAM's own loss on action-free transitions plus the action loss, through the codes, on labelled ones.

    The codes change their meaning: a sequence model must be trained (again) on what comes out.
    """

    name = "joint"

    def __init__(
        self,
        cfg: FlexLAMConfig,
        store: EpisodeStore,
        model: JointModel,
        labelled: NDArray[np.int64],
        batch: int,
        seed: int,
        device: torch.device,
        source: str = "",
        weight: float = 1.0,
    ) -> None:
        check_actions(cfg, store)
        self.cfg, self.store, self.labelled = cfg, store, labelled
        self.batch, self.seed, self.device, self.source, self.weight = batch, seed, device, source, weight
        self.train = transitions(store, "train", cfg)
        held_out = len(store.transitions("test"))
        self.test = choose_labels(store, "test", float(min(VALIDATION_LABELS, held_out)), seed)
        self.model = model.to(device)
        self.health = CodebookHealth(cfg.bottleneck.slots, cfg.bottleneck.codebook_size)
        self.action_loss = 0.0

    def loss(self, step: int) -> Tensor:
        """The loss of one step: LAM loss plus ``weight`` times action loss."""
        out = lam_loss(self.model.lam, self.store, self.train, self.batch, self.device, (self.seed, "joint", step))
        self.health.update(out.codes)
        generators = [generator(self.seed, "joint-labels", step, sample) for sample in range(self.batch)]
        index = self.labelled[[pick(len(self.labelled), g) for g in generators]]
        keep = sample_prefix(self.cfg.bottleneck, torch.stack([uniform(g) for g in generators]))
        action, _ = self._translate(index, self._encode(index), keep)
        self.action_loss = float(action.detach())
        return out.loss + self.weight * action

    def report(self) -> Mapping[str, Any]:
        """The newest action loss, and codebook health since the last report."""
        return {"action_loss": self.action_loss, **self.health.report()}

    def validate(self) -> Mapping[str, float]:
        """Translator loss on held-out transitions over a ladder of budgets, and the accuracy at each."""
        ladder = self.cfg.bottleneck.ladder
        right, total = dict.fromkeys(ladder, 0), 0.0
        for rows in np.array_split(self.test, max(1, len(self.test) // 256)):
            z = self._encode(rows)
            for k in ladder:
                loss, hits = self._translate(rows, z, torch.full((len(rows),), k))
                total += float(loss) * len(rows) / len(self.test) / len(ladder)
                right[k] += hits
        return {"val/loss": total, **{f"val/accuracy_k{k}": n / len(self.test) for k, n in right.items()}}

    def identity(self) -> Mapping[str, Any]:
        """Data, labels, the checkpoints it starts from, weight, seed and batch."""
        chosen = [len(self.labelled), int(self.labelled.sum())]
        base = {"data": self.store.fingerprint, "source": self.source, "seed": self.seed, "batch": self.batch}
        return {**base, "labels": chosen, "weight": self.weight}

    def _encode(self, index: NDArray[np.int64]) -> Tensor:
        """Slot outputs ``[B, K, d]`` of the transitions, before FSQ."""
        now, following = normalise(torch.from_numpy(self.store.take(np.stack([index, index + 1]))).to(self.device))
        z: Tensor = self.model.lam.encoder(now, following)
        return z

    def _translate(self, index: NDArray[np.int64], z: Tensor, keep: Tensor) -> tuple[Tensor, int]:
        latents = self.model.lam.bottleneck(z, keep.to(self.device)).latents
        target, before = (type(a)(*(part.to(self.device) for part in a)) for a in action_targets(self.store, index))
        out = self.model.translator(latents, encode_actions(before, self.cfg.translator))
        right = int((out.logits[0].argmax(-1) == target.discrete[:, 0]).sum())
        return translator_loss(out, target), right
