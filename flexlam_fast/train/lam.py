"""Stage 1: the latent action model on action-free transitions (paper A.6, section 4.1)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flexlam_fast.bottleneck import sample_prefix
from flexlam_fast.config import FlexLAMConfig
from flexlam_fast.data.store import EpisodeStore
from flexlam_fast.flow import logit_normal
from flexlam_fast.lam import LamLoss, LatentActionModel
from flexlam_fast.ops.draws import draw_normal, draw_uniform
from flexlam_fast.train.frames import Frames
from flexlam_fast.train.health import CodebookHealth
from flexlam_fast.train.loader import to_device
from flexlam_fast.train.peers import ALONE, Peers
from flexlam_fast.train.random import draw_key, picks, streams


class LamBatch(NamedTuple):
    """``frames`` of o_t and o_{t+1} ``[2, B]`` as ``Frames.read`` has them; ``streams`` int64 ``[B]`` of draws."""

    frames: Tensor
    streams: Tensor


class LamKeys(NamedTuple):
    """Philox keys, int64 ``[2]`` on the device, of prefix lengths, flow times and noise."""

    keep: Tensor
    tau: Tensor
    noise: Tensor

    @classmethod
    def of(cls, seed: int, stage: str, device: torch.device) -> LamKeys:
        """The keys of a stage."""
        return cls(*(draw_key(seed, stage, name, device=device) for name in cls._fields))


class LamStage:
    """Encoder, bottleneck and decoder under the rectified-flow loss, with retained prefixes drawn per example."""

    name = "lam"

    def __init__(
        self,
        cfg: FlexLAMConfig,
        store: EpisodeStore,
        batch: int,
        seed: int,
        device: torch.device,
        peers: Peers = ALONE,
    ) -> None:
        self.cfg, self.store, self.batch, self.seed, self.device, self.peers = cfg, store, batch, seed, device, peers
        self.frames = Frames(store, device)
        self.train = transitions(store, "train", cfg)
        self.test = transitions(store, "test", cfg)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.model = LatentActionModel(cfg, "reference").to(device)
        self.keys, self.test_keys = (LamKeys.of(seed, name, device) for name in (self.name, "lam-test"))
        self.health = CodebookHealth(cfg.bottleneck.slots, cfg.bottleneck.codebook_size, device)

    def read(self, step: int) -> LamBatch:
        """This process's share of a step's batch, on the host."""
        samples = self.peers.share(self.batch)
        return lam_batch(self.frames, self.train, (self.seed, self.name, step), samples, self.batch)

    def loss(self, batch: LamBatch) -> Tensor:
        """The loss of a batch on the device."""
        out = lam_loss(self.model, self.frames, batch, self.keys, self.peers)
        self.health.update(out.codes)
        return out.loss

    def tallies(self) -> Sequence[Tensor]:
        """What :meth:`loss` counts on the device."""
        return (self.health.counts,)

    def report(self) -> Mapping[str, Any]:
        """Codebook health since the last report."""
        return self.health.report(self.peers.total)

    def validate(self) -> Mapping[str, float]:
        """Loss on held-out transitions, with the same prefixes, times and noise at every validation.

        ``val/loss`` is over all prefixes. ``val/loss_k0`` is with no codes, ``val/loss_full`` with all, and
        ``val/loss_swapped`` with all codes of another transition: a decoder that listens has full < k0 < swapped.
        """
        totals: dict[str, float] = {}
        for i in range(8):
            drawn = lam_batch(self.frames, self.test, (self.seed, "lam-test", i), range(self.batch), self.batch)
            batch = to_device(drawn, self.device)
            for name, value in flow_losses(self.model, self.frames, batch, self.test_keys).items():
                totals[name] = totals.get(name, 0.0) + float(value) / 8
        return totals

    def identity(self) -> Mapping[str, Any]:
        """Data, seed and batch."""
        return {"data": self.store.fingerprint, "seed": self.seed, "batch": self.batch}


def flow_losses(model: LatentActionModel, frames: Frames, batch: LamBatch, keys: LamKeys) -> dict[str, Tensor]:
    """What a validation says of a batch, which is encoded once: see :meth:`LamStage.validate`."""
    now, following = frames.on_device(batch.frames)
    keep, tau, noise = _drawn(model, batch, keys, now[0].numel())
    z = model.encoder.forward_frames(now, following)
    own = model.bottleneck(z).latents
    kinds = {
        "val/loss": model.bottleneck(z, keep).latents,
        "val/loss_k0": model.bottleneck(z, torch.zeros_like(keep)).latents,
        "val/loss_full": own,
        "val/loss_swapped": own.roll(1, 0),
    }
    return {name: model.flow_of_frames(now, following, latents, noise, tau) for name, latents in kinds.items()}


def transitions(store: EpisodeStore, split: str, cfg: FlexLAMConfig) -> NDArray[np.int64]:
    """Global indices of the split's transitions, after checking that the frames are the model's.

    Raises:
        DataError: frames of another size, or a split without a single transition.
    """
    store.check_frames(cfg.frame, cfg.channels)
    return store.expect_transitions(split, 1)


def lam_batch(
    frames: Frames, pool: NDArray[np.int64], where: tuple[int, str, int], samples: range, batch: int
) -> LamBatch:
    """Draw ``samples`` of the batch at ``where`` = (seed, stage, step) from ``pool``; ``batch`` is its whole size."""
    index = pool[picks(len(pool), *where, samples)]
    return LamBatch(frames.read(np.stack([index, index + 1])), streams(where[2], samples, batch))


def lam_loss(model: LatentActionModel, frames: Frames, batch: LamBatch, keys: LamKeys, peers: Peers = ALONE) -> LamLoss:
    """The loss of a batch on the device, with prefixes, times and noise drawn there."""
    now, following = frames.on_device(batch.frames)
    keep, tau, noise = _drawn(model, batch, keys, now[0].numel())
    return model.loss_of_frames(now, following, keep, noise, tau, peers.mean)


def _drawn(model: LatentActionModel, batch: LamBatch, keys: LamKeys, numbers: int) -> tuple[Tensor, Tensor, Tensor]:
    """Retained lengths int64 ``[B]``, flow times ``[B]`` and noise fp32 ``[B, numbers]`` of a batch."""
    keep = sample_prefix(model.cfg.bottleneck, draw_uniform(keys.keep, batch.streams))
    tau = logit_normal(draw_normal(keys.tau, batch.streams, 1)[:, 0], model.cfg.decoder.tau_mean)
    return keep, tau, draw_normal(keys.noise, batch.streams, numbers)
