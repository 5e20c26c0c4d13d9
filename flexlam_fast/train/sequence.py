"""Stage 2: the sequence model on the codes of a frozen LAM (paper B.1, B.2; design section 3)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flexlam_fast.backend import REFERENCE
from flexlam_fast.config import FlexLAMConfig
from flexlam_fast.data.store import EpisodeStore
from flexlam_fast.errors import DataError
from flexlam_fast.ops.loss import cross_entropy
from flexlam_fast.ops.varlen import Sequences
from flexlam_fast.sequence.layout import CODES, OBSERVATION, Layout, history_layout
from flexlam_fast.sequence.model import SequenceModel
from flexlam_fast.sequence.packing import Packer, is_causal
from flexlam_fast.train.frames import Frames
from flexlam_fast.train.health import CodebookHealth
from flexlam_fast.train.loader import to_device
from flexlam_fast.train.peers import ALONE, Peers
from flexlam_fast.train.random import picks

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


class SequenceBatch(NamedTuple):
    """Windows that share a phase on the stride grid, padded where an episode ends.

    frames: ``[B, T]`` as ``Frames.read`` has them; codes: int64 ``[B, T, K]``; inside: bool ``[B, T]``, False past an
    episode's end; phase: of all windows.
    """

    frames: Tensor
    codes: Tensor
    inside: Tensor
    phase: int


class PackedBatch(NamedTuple):
    """Windows one after another, nothing padded: what stands in them, and the fields of ``sequence.packing.Packed``.

    frames: ``[O]`` as ``Frames.read`` has them, of the observation blocks; codes: int64 ``[Z, K]``, the code blocks;
    first: int64, which of the predictions are of first codes.
    """

    frames: Tensor
    codes: Tensor
    tokens: Tensor
    positions: Tensor
    starts: Tensor
    source: Tensor
    target: Tensor
    first: Tensor
    lengths: tuple[int, ...]
    longest: int

    @property
    def repeats(self) -> bool:
        """Whether other batches have these shapes: those whose windows are all whole do."""
        return len(set(self.lengths)) == 1


class Predictions(NamedTuple):
    """Logits ``[M, C]`` and targets int64 ``[M]`` (IGNORE where there is none); ``first``: which are of first codes.

    ``backend`` is that of the loss.
    """

    logits: Tensor
    target: Tensor
    first: Tensor
    backend: str = REFERENCE

    def targets(self) -> Tensor:
        """How many targets there are."""
        return (self.target != IGNORE).sum()

    def loss(self, count: Tensor | None = None) -> Tensor:
        """Cross-entropy summed over all targets and divided by ``count`` (None: how many there are)."""
        mean = cross_entropy(self.logits, self.target, ignore_index=IGNORE, backend=self.backend)
        return mean if count is None else mean * (self.targets() / count)

    def firsts(self) -> Predictions:
        """Those of first codes alone."""
        return self._replace(logits=self.logits[self.first], target=self.target[self.first])

    def right(self) -> tuple[Tensor, Tensor]:
        """How many targets are the likeliest code, and how many there are."""
        likeliest = self.logits.detach().argmax(-1)
        return ((likeliest == self.target) & (self.target != IGNORE)).sum(), self.targets()


class SequenceStage:
    """Next-code cross-entropy over windows; every sample of a step shares its phase, so that one mask serves all.

    Where that mask is plain causal, as with one decision a window, the fused ops take windows packed without padding.
    """

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
        peers: Peers = ALONE,
    ) -> None:
        self.cfg, self.store, self.codes, self.peers = cfg, store, codes, peers
        self.batch, self.seed, self.device, self.source = batch, seed, device, source
        stride, window = cfg.sequence.stride, cfg.sequence.window
        self.train, self.test = windows(store, "train", stride), windows(store, "test", stride)
        layouts = [history_layout(cfg, window, phase) for phase in range(stride)]
        self.packer = Packer(layouts) if all(is_causal(layout) for layout in layouts) else None
        self.firsts = [torch.nonzero(layout.slot == 0).flatten().to(device) for layout in layouts]
        self.layouts = [_to(layout, device) for layout in layouts]
        self.frames = Frames(store, device)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.model = SequenceModel(cfg).to(device)
        self.health = CodebookHealth(cfg.bottleneck.slots, cfg.bottleneck.codebook_size, device)
        self.hits = torch.zeros(2, dtype=torch.int64, device=device)

    def read(self, step: int) -> SequenceBatch | PackedBatch:
        """This process's share of a step's batch, on the host."""
        phase = int(picks(len(self.train), self.seed, "sequence-phase", step, range(1))[0])
        return self._windows(self.train[phase], (self.seed, self.name, step), self.peers.share(self.batch), phase)

    def loss(self, batch: SequenceBatch | PackedBatch) -> Tensor:
        """The loss of a batch on the device."""
        found = self.predict(batch)
        self.hits += torch.stack(found.firsts().right())
        self.health.update(batch.codes.flatten(0, -2))
        return found.loss(self.peers.mean(found.targets().float()))

    def tallies(self) -> Sequence[Tensor]:
        """What :meth:`loss` counts on the device."""
        return self.health.counts, self.hits

    def report(self) -> Mapping[str, Any]:
        """Share of first codes predicted right, and codebook health, since the last report."""
        right, seen = self.peers.total(self.hits).tolist()
        self.hits.zero_()
        return {"first_code_accuracy": right / max(1, seen), **self.health.report(self.peers.total)}

    def validate(self) -> Mapping[str, float]:
        """Loss on held-out windows, in all and of the first code, and how often the first code is right."""
        total = first_total = share = 0.0
        rounds = 2 * len(self.layouts)
        for i in range(rounds):
            phase = i % len(self.layouts)
            batch = self._windows(self.test[phase], (self.seed, "sequence-test", i), range(self.batch), phase)
            found = self.predict(to_device(batch, self.device))
            first = found.firsts()
            right, seen = first.right()
            total, first_total = total + float(found.loss()), first_total + float(first.loss())
            share += float(right) / float(seen)
        names = ("val/loss", "val/first_code_loss", "val/first_code_accuracy")
        return dict(zip(names, (total / rounds, first_total / rounds, share / rounds), strict=True))

    def identity(self) -> Mapping[str, Any]:
        """Data, the LAM whose codes these are, seed and batch."""
        return {"data": self.store.fingerprint, "lam": self.source, "seed": self.seed, "batch": self.batch}

    def predict(self, batch: SequenceBatch | PackedBatch) -> Predictions:
        """What the model says about a batch on the device."""
        if isinstance(batch, PackedBatch):
            return self._predict_packed(batch)
        layout = self.layouts[batch.phase]
        tokens = embed(self.model, layout, self.frames.on_device(batch.frames), batch.codes)
        hidden = self.model(tokens, layout.positions, layout.mask)[:, layout.source]
        target = batch.codes[:, layout.frame, layout.slot].masked_fill(~batch.inside[:, layout.frame], IGNORE)
        rows = torch.arange(0, target.numel(), target.shape[1], device=target.device)
        first = (rows.unsqueeze(1) + self.firsts[batch.phase]).flatten()
        return Predictions(self.model.head(hidden.flatten(0, 1)), target.flatten(), first, self.model.backend)

    def _predict_packed(self, batch: PackedBatch) -> Predictions:
        model, slots = self.model, torch.arange(batch.codes.shape[1], device=self.device)
        frames = self.frames.on_device(batch.frames)
        parts = model.embed_frames(frames), model.embed_codes(batch.codes, slots)
        tokens = torch.cat([part.flatten(0, 1) for part in parts])[batch.tokens].unsqueeze(0)
        packed = Sequences(batch.starts, batch.longest, batch.lengths)
        hidden = model(tokens, batch.positions, packed=packed)[0, batch.source]
        return Predictions(model.head(hidden), batch.codes.flatten()[batch.target], batch.first, model.backend)

    def _windows(
        self, pool: Windows, where: tuple[int, str, int], samples: range, phase: int
    ) -> SequenceBatch | PackedBatch:
        chosen = picks(len(pool.start), *where, samples)
        start, last = pool.start[chosen], pool.last[chosen]
        if self.packer is not None and self.model.backend != REFERENCE:
            return self._packed(start, last, phase)
        index = start[:, None] + np.arange(self.cfg.sequence.window)
        inside = torch.from_numpy(index <= last[:, None])
        index = np.minimum(index, last[:, None])
        return SequenceBatch(self.frames.read(index), self._codes(index), inside, phase)

    def _packed(self, start: NDArray[np.int64], last: NDArray[np.int64], phase: int) -> PackedBatch:
        assert self.packer is not None
        frames = np.minimum(last - start + 1, self.cfg.sequence.window)
        p = self.packer([phase] * len(start), frames.tolist())
        seen, made = (start[part[:, 0].numpy()] + part[:, 1].numpy() for part in (p.observed, p.blocks))
        first = torch.nonzero(p.slot == 0).flatten()
        rest = p.tokens, p.positions, p.starts, p.source, p.target, first, p.lengths, p.longest
        return PackedBatch(self.frames.read(seen), self._codes(made), *rest)

    def _codes(self, index: NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(np.asarray(self.codes[index])).long()


def embed(model: SequenceModel, layout: Layout, frames: Tensor, codes: Tensor) -> Tensor:
    """Embed every token of a layout.

    Args:
        model: whose embeddings.
        layout: what stands where.
        frames: as ``SequenceModel.embed_frames`` takes them, ``[B, T, ...]``.
        codes: blocks ``[B, T, K]``, kept and scratch alike.

    Returns:
        ``[B, N, hidden]``.
    """
    b, t = frames.shape[:2]
    observed = model.embed_frames(frames.flatten(0, 1)).unflatten(0, (b, t))
    blocks = model.embed_codes(codes.flatten(0, 1), torch.arange(codes.shape[2], device=codes.device)).unflatten(
        0, (b, t)
    )
    source = {OBSERVATION: observed, CODES: blocks}
    return torch.cat([source[s.kind][:, s.frame, : s.length].to(observed.dtype) for s in layout.segments], dim=1)


def _to(layout: Layout, device: torch.device) -> Layout:
    return Layout(layout.segments, *(tensor.to(device) for tensor in layout[1:]))
