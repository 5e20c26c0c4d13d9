"""The way through the sequence model by CUDA on a GPU: a block of codes in one launch. Not yet run on a GPU.

What is observed goes through the fused kernels where Triton is installed, and else through the model's own forward: 128
tokens at once are matrix products, which both do well. Neither reads anything back to the host.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flexlam_fast.backend import TRITON, probe
from flexlam_fast.ops.block_cuda import CudaBlockEngine, refusal
from flexlam_fast.sequence.cache import PagedCache, Placement
from flexlam_fast.sequence.decode import Runner
from flexlam_fast.sequence.eager import Eager
from flexlam_fast.sequence.fused import Fused
from flexlam_fast.sequence.layers import Layer, pack, tensors_of
from flexlam_fast.sequence.model import SequenceModel
from flexlam_fast.sequence.sampling import PlainChoice, Sampling


class CudaBlock(PlainChoice):
    """``together`` for what is observed, and one launch for a block of codes, over pages of any of the three dtypes."""

    def __init__(self, model: SequenceModel, together: Fused | Eager) -> None:
        self.model, self.together = model, together
        self.layers: list[Layer] = []
        self._engines: list[CudaBlockEngine] = []  # those of before too: a captured graph may go on launching them

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy packs its own model, and makes engines of it, when it first runs."""
        return type(self), (self.model, self.together)

    @property
    def capturable(self) -> bool:
        """Whether a decision this way may be captured in a CUDA graph: with the kernels for which that is usual."""
        return isinstance(self.together, Fused)

    def prepare(self, cache: PagedCache, place: Placement) -> Any:
        """Work out what all layers share."""
        return self.together.prepare(cache, place)

    def logits(self, x: Tensor, step: Any) -> Tensor:
        """Embedded tokens ``[B, N, hidden]`` through all layers; logits ``[B, C]`` of the last one."""
        return self.together.logits(x, step)

    def block(
        self,
        cache: PagedCache,
        place: Placement,
        first: Tensor,
        k: int,
        sampling: Sampling | None,
        *,
        given: Tensor | None = None,
        logits: Tensor | None = None,
    ) -> Tensor:
        """Codes int32 ``[B, k]`` at ``place``, from the logits ``[B, C]`` of the first.

        ``given`` and ``logits`` are those of :meth:`CudaBlockEngine.generate`.
        """
        draw = None if sampling is None else sampling.drawing(k, first.shape[1])
        spot = cache.spot(place)
        engine = self.engine(cache, place.table.shape[1])
        return engine.generate(cache.k, cache.v, spot, first.float(), k, draw, given=given, logits=logits)

    def check(self) -> None:
        """Say whether a launch that has run lost a barrier; see :meth:`CudaBlockEngine.check`."""
        for engine in self._engines:
            engine.check()

    def engine(self, cache: PagedCache, entries: int) -> CudaBlockEngine:
        """The engine of the weights as they stand, for pages like those of ``cache``, ``entries`` a session."""
        self.layers = pack(self.model, self.layers)
        weights, seq = tensors_of(self.model, self.layers), self.model.cfg.sequence
        pages = cache.k.dtype, cache.page, entries
        for engine in reversed(self._engines):
            if (engine.pages, engine.page, engine.entries) == pages and engine.reads(weights):
                return engine
        self._engines.append(CudaBlockEngine(weights, seq.rope_theta, seq.rms_eps, *pages))
        return self._engines[-1]


def cuda_runner(model: SequenceModel, device: torch.device, pages: torch.dtype) -> Runner:
    """The way of backend ``native`` on a GPU: :class:`CudaBlock` where the engine takes the model, else ``Eager``."""
    cfg, dtype = model.cfg, model.head.weight.dtype
    entries = PagedCache(cfg, 0, torch.device("cpu"), pages).session_pages  # no session takes no memory
    if refusal(cfg, dtype, pages, entries, device):
        return Eager(model)
    triton = any(status.name == TRITON and status.available for status in probe(device))
    return CudaBlock(model, Fused(model) if triton and pages == dtype else Eager(model))
