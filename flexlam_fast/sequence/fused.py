"""The way through the sequence model by fused kernels over pages, six launches a layer and two a code."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from flexlam_fast.backend import TRITON
from flexlam_fast.ops.linear import linear_add, norm_linear, norm_swiglu
from flexlam_fast.ops.paged import attend_add, write_pages
from flexlam_fast.ops.sampling import choose_codes, next_token
from flexlam_fast.ranges import LAYERS, span
from flexlam_fast.sequence.cache import PagedCache, Placement
from flexlam_fast.sequence.layers import Layer, pack
from flexlam_fast.sequence.model import SequenceModel
from flexlam_fast.sequence.sampling import Sampling


class FusedStep(NamedTuple):
    """New tokens at ``place`` of ``cache``, which stand in the pool at ``rows`` int64 ``[B, N]``."""

    cache: PagedCache
    place: Placement
    rows: Tensor

    def column(self, j: int) -> FusedStep:
        """Token ``j`` alone."""
        return self._replace(place=self.place.column(j), rows=self.rows[:, j : j + 1])


class Fused:
    """Runs ``model`` over the cache by the ops of one backend; its projections become views of the packed ones."""

    def __init__(self, model: SequenceModel, backend: str = TRITON) -> None:
        self.model, self.backend = model, backend
        self.layers: list[Layer] = []

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy packs its own model when it first runs."""
        return type(self), (self.model, self.backend)

    def prepare(self, cache: PagedCache, place: Placement) -> FusedStep:
        """Work out what all layers share."""
        self.layers = pack(self.model, self.layers)
        return FusedStep(cache, place, cache.rows(place))

    def logits(self, x: Tensor, step: FusedStep) -> Tensor:
        """Embedded tokens ``[B, N, hidden]`` through all layers; logits fp32 ``[B, C]`` of the last one."""
        for i in range(len(self.layers)):
            with span("layer", LAYERS, i):
                x = self._layer(x, i, step)
        head, eps = self.model.head.weight, self.model.cfg.sequence.rms_eps
        return norm_linear(x[:, -1], self.model.norm.weight, head, eps, fp32_out=True, backend=self.backend)

    def _layer(self, x: Tensor, index: int, step: FusedStep) -> Tensor:
        seq, how, (cache, place, rows) = self.model.cfg.sequence, self.backend, step
        block, qkv, gate_up = self.layers[index]
        k, v, start = cache.k[index], cache.v[index], place.start
        y = norm_linear(x, block.norm1.weight, qkv, seq.rms_eps, backend=how)
        q = write_pages(
            y, block.q_norm.weight, block.k_norm.weight, place.positions, rows, k, v,
            theta=seq.rope_theta, eps=seq.rms_eps, backend=how,
        )  # fmt: skip
        if index == len(self.layers) - 1 and x.shape[1] > 1:  # of the last layer only the last token is asked for
            start = start + (x.shape[1] - 1)
            x, q = x[:, -1:], q[:, -1:]
        x = attend_add(q, k, v, place.table, place.context, start, block.out.weight, x, backend=how)
        y = norm_swiglu(x, block.norm2.weight, gate_up, seq.rms_eps, backend=how)
        return linear_add(y, block.down.weight, x, backend=how)

    def ready(self, sampling: Sampling | None, k: int) -> Sampling | None:
        """Every slot's streams, in one launch before the first code; the kernel draws."""
        if sampling is None:
            return None
        slots = torch.arange(k, device=sampling.streams.device)
        return sampling._replace(by_slot=sampling.streams + slots.unsqueeze(1))

    def choose(self, logits: Tensor, slot: int, sampling: Sampling | None) -> Tensor:
        """Codes int32 ``[B]`` of ``slot`` from ``logits [B, C]``."""
        temperature, top_k, seed, streams = _drawing(sampling, slot)
        return choose_codes(logits, temperature, top_k, seed, streams, backend=self.backend)

    def feed(self, logits: Tensor, slot: int, sampling: Sampling | None) -> tuple[Tensor, Tensor]:
        """The code of ``slot`` int32 ``[B]``, and its embedding ``[B, 1, hidden]``, in one launch."""
        place = self.model.slot_place[slot] if self.model.cfg.sequence.places else None
        weight = self.model.codes.weight
        code, x = next_token(logits, weight, place, *_drawing(sampling, slot), backend=self.backend)
        return code, x.unsqueeze(1)


def _drawing(sampling: Sampling | None, slot: int) -> tuple[float, int | None, Tensor | None, Tensor | None]:
    if sampling is None:
        return 0.0, None, None, None
    streams = sampling.streams + slot if sampling.by_slot is None else sampling.by_slot[slot]
    return sampling.temperature, sampling.top_k, sampling.seed, streams
