"""Optional stage: the action loss updates encoder and bottleneck together with the translator (paper section 6.3)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from flexlam_fast.bottleneck import sample_prefix
from flexlam_fast.config import FlexLAMConfig
from flexlam_fast.data.store import EpisodeStore
from flexlam_fast.lam import LatentActionModel
from flexlam_fast.ops.draws import draw_uniform
from flexlam_fast.train.frames import Frames
from flexlam_fast.train.health import CodebookHealth
from flexlam_fast.train.lam import LamBatch, LamKeys, lam_batch, lam_loss, transitions
from flexlam_fast.train.loader import to_device
from flexlam_fast.train.peers import ALONE, Peers
from flexlam_fast.train.random import draw_key, picks
from flexlam_fast.train.translator import (
    VALIDATION_LABELS,
    action_targets,
    check_actions,
    choose_labels,
    translate_labels,
)
from flexlam_fast.translator import Translator


class JointModel(nn.Module):
    """A LAM and a translator that are trained together."""

    def __init__(self, lam: LatentActionModel, translator: Translator) -> None:
        super().__init__()
        self.lam = lam
        self.translator = translator


class JointBatch(NamedTuple):
    """Transitions as in ``LamBatch``, then labelled ones: their frames ``[2, B]`` and actions."""

    frames: Tensor
    streams: Tensor
    labelled: Tensor
    action: Tensor
    before: Tensor


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
        peers: Peers = ALONE,
    ) -> None:
        check_actions(cfg, store)
        self.cfg, self.store, self.labelled, self.peers = cfg, store, labelled, peers
        self.batch, self.seed, self.device, self.source, self.weight = batch, seed, device, source, weight
        self.frames = Frames(store, device)
        self.train = transitions(store, "train", cfg)
        held_out = len(store.transitions("test"))
        self.test = choose_labels(store, "test", float(min(VALIDATION_LABELS, held_out)), seed)
        self.model = model.to(device)
        self.keys, self.label_key = LamKeys.of(seed, self.name, device), draw_key(seed, "joint-labels", device=device)
        self.health = CodebookHealth(cfg.bottleneck.slots, cfg.bottleneck.codebook_size, device)
        self.action_loss = torch.zeros((), device=device)

    def read(self, step: int) -> JointBatch:
        """This process's share of a step's batch, on the host."""
        samples = self.peers.share(self.batch)
        free = lam_batch(self.frames, self.train, (self.seed, self.name, step), samples, self.batch)
        index = self.labelled[picks(len(self.labelled), self.seed, "joint-labels", step, samples)]
        return self._labelled(index, free)

    def loss(self, batch: JointBatch) -> Tensor:
        """The loss of a batch on the device: LAM loss plus ``weight`` times action loss."""
        out = lam_loss(self.model.lam, self.frames, LamBatch(batch.frames, batch.streams), self.keys, self.peers)
        self.health.update(out.codes)
        keep = sample_prefix(self.cfg.bottleneck, draw_uniform(self.label_key, batch.streams))
        action, _ = self._translate(batch, self._encode(batch), keep)
        self.action_loss.copy_(action.detach())
        return out.loss + self.weight * action

    def tallies(self) -> Sequence[Tensor]:
        """What :meth:`loss` counts on the device."""
        return self.health.counts, self.action_loss

    def report(self) -> Mapping[str, Any]:
        """The newest action loss, and codebook health since the last report."""
        newest = float(self.peers.mean(self.action_loss))
        return {"action_loss": newest, **self.health.report(self.peers.total)}

    def validate(self) -> Mapping[str, float]:
        """Translator loss on held-out transitions over a ladder of budgets, and the accuracy at each."""
        ladder = self.cfg.bottleneck.ladder
        right, total = dict.fromkeys(ladder, 0), 0.0
        for rows in np.array_split(self.test, max(1, len(self.test) // 256)):
            batch = to_device(self._labelled(rows, LamBatch(torch.empty(0), torch.empty(0))), self.device)
            z = self._encode(batch)
            for k in ladder:
                loss, hits = self._translate(batch, z, torch.full((len(rows),), k, device=self.device))
                total += float(loss) * len(rows) / len(self.test) / len(ladder)
                right[k] += int(hits)
        return {"val/loss": total, **{f"val/accuracy_k{k}": n / len(self.test) for k, n in right.items()}}

    def identity(self) -> Mapping[str, Any]:
        """Data, labels, the checkpoints it starts from, weight, seed and batch."""
        chosen = [len(self.labelled), int(self.labelled.sum())]
        base = {"data": self.store.fingerprint, "source": self.source, "seed": self.seed, "batch": self.batch}
        return {**base, "labels": chosen, "weight": self.weight}

    def _labelled(self, index: NDArray[np.int64], free: LamBatch) -> JointBatch:
        now, before = action_targets(self.store, index)
        frames = self.frames.read(np.stack([index, index + 1]))
        return JointBatch(*free, frames, now.discrete, before.discrete)

    def _encode(self, batch: JointBatch) -> Tensor:
        """Slot outputs ``[B, K, d]`` of the labelled transitions, before FSQ."""
        return self.model.lam.encoder.forward_frames(*self.frames.on_device(batch.labelled))

    def _translate(self, batch: JointBatch, z: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
        latents = self.model.lam.bottleneck(z, keep).latents
        return translate_labels(self.model.translator, latents, batch.action, batch.before, self.cfg)
