"""Stage 1: the latent action model on action-free transitions (paper A.6, section 4.1)."""

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
from flexlam_fast.errors import DataError
from flexlam_fast.flow import logit_normal
from flexlam_fast.lam import LamLoss, LatentActionModel
from flexlam_fast.layers import normalise
from flexlam_fast.train.health import CodebookHealth
from flexlam_fast.train.random import generator, pick, uniform


class LamStage:
    """Encoder, bottleneck and decoder under the rectified-flow loss, with retained prefixes drawn per example."""

    name = "lam"

    def __init__(self, cfg: FlexLAMConfig, store: EpisodeStore, batch: int, seed: int, device: torch.device) -> None:
        self.cfg, self.store, self.batch, self.seed, self.device = cfg, store, batch, seed, device
        self.train = transitions(store, "train", cfg)
        self.test = transitions(store, "test", cfg)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.model = LatentActionModel(cfg, "reference").to(device)
        self.health = CodebookHealth(cfg.bottleneck.slots, cfg.bottleneck.codebook_size)

    def loss(self, step: int) -> Tensor:
        """The loss of one step."""
        out = lam_loss(self.model, self.store, self.train, self.batch, self.device, (self.seed, self.name, step))
        self.health.update(out.codes)
        return out.loss

    def report(self) -> Mapping[str, Any]:
        """Codebook health since the last report."""
        return self.health.report()

    def validate(self) -> Mapping[str, float]:
        """Loss on held-out transitions, with the same prefixes, times and noise at every validation."""
        total = 0.0
        for i in range(8):
            out = lam_loss(self.model, self.store, self.test, self.batch, self.device, (self.seed, "lam-test", i))
            total += float(out.flow)
        return {"val/loss": total / 8}

    def identity(self) -> Mapping[str, Any]:
        """Data, seed and batch."""
        return {"data": self.store.fingerprint, "seed": self.seed, "batch": self.batch}


def transitions(store: EpisodeStore, split: str, cfg: FlexLAMConfig) -> NDArray[np.int64]:
    """Global indices of the split's transitions, after checking that the frames are the model's.

    Raises:
        DataError: frames of another size, or a split without a single transition.
    """
    wanted = (cfg.frame, cfg.frame, cfg.channels)
    if tuple(store.frame_shape) != wanted:
        raise DataError(f"{store.path}: expected frames {list(wanted)}, got {list(store.frame_shape)}")
    found = store.transitions(split)
    if not len(found):
        raise DataError(f"{store.path}: expected {split} transitions, got none")
    return found


def lam_loss(
    model: LatentActionModel,
    store: EpisodeStore,
    pool: NDArray[np.int64],
    batch: int,
    device: torch.device,
    where: tuple[int, str, int],
) -> LamLoss:
    """Draw one batch at ``where`` = (seed, stage, step) from ``pool``, and its loss."""
    size, channels = model.cfg.frame, model.cfg.channels
    chosen, shares, times, noise = [], [], [], []
    for sample in range(batch):
        g = generator(*where, sample)
        chosen.append(pool[pick(len(pool), g)])
        shares.append(uniform(g))
        times.append(torch.randn((), generator=g))
        noise.append(torch.randn((channels, size, size), generator=g))
    index = np.asarray(chosen, dtype=np.int64)
    frames = torch.from_numpy(store.take(np.stack([index, index + 1]))).to(device)
    now, following = normalise(frames)
    keep = sample_prefix(model.cfg.bottleneck, torch.stack(shares)).to(device)
    tau = logit_normal(torch.stack(times), model.cfg.decoder.tau_mean).to(device)
    return model.loss(now, following, keep, torch.stack(noise).to(device), tau)
