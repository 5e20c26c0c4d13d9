"""Stage 2: the sequence model on the codes of a frozen LAM (paper B.1, B.2; design section 3)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from flexlam_fast.config import FlexLAMConfig
from flexlam_fast.data.store import EpisodeStore
from flexlam_fast.errors import DataError
from flexlam_fast.layers import normalise
from flexlam_fast.sequence.layout import CODES, OBSERVATION, Layout, history_layout
from flexlam_fast.sequence.model import SequenceModel
from flexlam_fast.train.health import CodebookHealth
from flexlam_fast.train.random import generator, pick

IGNORE = -100


class Windows(NamedTuple):
    """Where windows of one phase may start (global index) and the last transition of the episode each is in."""

    start: NDArray[np.int64]
    last: NDArray[np.int64]


def windows(store: EpisodeStore, split: str, stride: int) -> tuple[Windows, ...]:
    """Every start of a window, by its phase on the stride grid of its episode.

    A window may start at any frame that has a transition; one that runs past its episode's end is cut there.
    """
    starts: list[list[NDArray[np.int64]]] = [[] for _ in range(stride)]
    lasts: list[list[NDArray[np.int64]]] = [[] for _ in range(stride)]
    for e in store.episodes:
        if e.split == split and e.frames >= 2:
            for phase in range(stride):
                s = np.arange(e.first + phase, e.first + e.frames - 1, stride, dtype=np.int64)
                starts[phase].append(s)
                lasts[phase].append(np.full(len(s), e.first + e.frames - 2, dtype=np.int64))
    joined = [Windows(np.concatenate(s), np.concatenate(n)) for s, n in zip(starts, lasts, strict=True) if s]
    found = tuple(w for w in joined if len(w.start))
    if len(found) < stride:
        raise DataError(f"{store.path}: expected {split} episodes of at least {stride + 1} frames, got none")
    return found


class SequenceStage:
    """Next-code cross-entropy over windows; every sample of a step shares its phase, so that one mask serves all."""

    name = "sequence"

    def __init__(
        self,
        cfg: FlexLAMConfig,
        store: EpisodeStore,
        codes: NDArray[np.int32],
        batch: int,
        seed: int,
        device: torch.device,
        source: str = "",
    ) -> None:
        self.cfg, self.store, self.codes = cfg, store, codes
        self.batch, self.seed, self.device, self.source = batch, seed, device, source
        stride, window = cfg.sequence.stride, cfg.sequence.window
        self.train, self.test = windows(store, "train", stride), windows(store, "test", stride)
        self.layouts = [_to(history_layout(cfg, window, phase), device) for phase in range(stride)]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.model = SequenceModel(cfg).to(device)
        self.health = CodebookHealth(cfg.bottleneck.slots, cfg.bottleneck.codebook_size)
        self.right = self.seen = 0

    def loss(self, step: int) -> Tensor:
        """The loss of one step."""
        logits, target, slot = self._predict(self.train, (self.seed, self.name, step))
        first = (slot == 0) & (target != IGNORE)
        self.right += int((logits.detach()[first].argmax(-1) == target[first]).sum())
        self.seen += int(first.sum())
        return F.cross_entropy(logits, target, ignore_index=IGNORE)

    def report(self) -> Mapping[str, Any]:
        """Share of first codes predicted right, and codebook health, since the last report."""
        share = self.right / max(1, self.seen)
        self.right = self.seen = 0
        return {"first_code_accuracy": share, **self.health.report()}

    def validate(self) -> Mapping[str, float]:
        """Loss on held-out windows, in all and of the first code, and how often the first code is right."""
        total = first_total = right = 0.0
        rounds = 2 * len(self.layouts)
        for i in range(rounds):
            logits, target, slot = self._predict(self.test, (self.seed, "sequence-test", i), i % len(self.layouts))
            first = (slot == 0) & (target != IGNORE)
            total += float(F.cross_entropy(logits, target, ignore_index=IGNORE))
            first_total += float(F.cross_entropy(logits[first], target[first]))
            right += float((logits[first].argmax(-1) == target[first]).float().mean())
        self.health.report()
        names = ("val/loss", "val/first_code_loss", "val/first_code_accuracy")
        return dict(zip(names, (total / rounds, first_total / rounds, right / rounds), strict=True))

    def identity(self) -> Mapping[str, Any]:
        """Data, the LAM whose codes these are, seed and batch."""
        return {"data": self.store.fingerprint, "lam": self.source, "seed": self.seed, "batch": self.batch}

    def _predict(
        self, pool: tuple[Windows, ...], where: tuple[int, str, int], phase: int | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Logits ``[B * M, C]``, targets and slots ``[B * M]`` of one batch."""
        if phase is None:
            phase = pick(len(pool), generator(*where, "phase"))
        layout = self.layouts[phase]
        chosen = [pick(len(pool[phase].start), generator(*where, sample)) for sample in range(self.batch)]
        start, last = pool[phase].start[chosen], pool[phase].last[chosen]
        index = start[:, None] + np.arange(self.cfg.sequence.window)
        inside = torch.from_numpy(index <= last[:, None]).to(self.device)
        index = np.minimum(index, last[:, None])
        frames = normalise(torch.from_numpy(self.store.take(index)).to(self.device))
        codes = torch.from_numpy(np.asarray(self.codes[index])).long().to(self.device)
        self.health.update(codes.flatten(0, 1))
        hidden = self.model(embed(self.model, layout, frames, codes), layout.positions, layout.mask)
        target = codes[:, layout.frame, layout.slot].masked_fill(~inside[:, layout.frame], IGNORE)
        logits = self.model.logits(hidden[:, layout.source])
        return logits.flatten(0, 1), target.flatten(), layout.slot.repeat(len(index))


def embed(model: SequenceModel, layout: Layout, pixels: Tensor, codes: Tensor) -> Tensor:
    """Embed every token of a layout.

    Args:
        model: whose embeddings.
        layout: what stands where.
        pixels: frames ``[B, T, C, H, W]`` in ``[-1, 1]``.
        codes: blocks ``[B, T, K]``, kept and scratch alike.

    Returns:
        ``[B, N, hidden]``.
    """
    b, t = pixels.shape[:2]
    observed = model.embed_frames(pixels.flatten(0, 1)).unflatten(0, (b, t))
    blocks = model.embed_codes(codes.flatten(0, 1), torch.arange(codes.shape[2], device=codes.device)).unflatten(
        0, (b, t)
    )
    source = {OBSERVATION: observed, CODES: blocks}
    return torch.cat([source[s.kind][:, s.frame, : s.length].to(observed.dtype) for s in layout.segments], dim=1)


def _to(layout: Layout, device: torch.device) -> Layout:
    return Layout(layout.segments, *(tensor.to(device) for tensor in layout[1:]))
