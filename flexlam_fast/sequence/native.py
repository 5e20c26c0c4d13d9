"""The way through the sequence model by C++ on a CPU: what is observed by torch's products, each code by our own ops.

The append is 128 tokens at once, which torch's matrix products do well. A code is one token a session: reading weights,
keys and values once is all there is to do, and calls that do it in few passes are what counts.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from flexlam_fast.backend import NATIVE
from flexlam_fast.sequence.cache import PagedCache, Placement
from flexlam_fast.sequence.fused import Fused, FusedStep
from flexlam_fast.sequence.model import SequenceModel
from flexlam_fast.sequence.packed import Packed
from flexlam_fast.sequence.sampling import PlainChoice


class NativeStep(NamedTuple):
    """New tokens at ``place`` of ``cache``, all together or, as ``codes``, one at a time."""

    cache: PagedCache
    place: Placement
    codes: FusedStep

    def column(self, j: int) -> FusedStep:
        """Token ``j`` alone."""
        return self.codes.column(j)


class Native(PlainChoice):
    """Runs ``model`` over pages of its own dtype; its projections become views of packed ones."""

    def __init__(self, model: SequenceModel) -> None:
        self.model = model
        self.together, self.one = Packed(model), Fused(model, NATIVE)

    def prepare(self, cache: PagedCache, place: Placement) -> NativeStep:
        """Work out what all layers share."""
        return NativeStep(cache, place, self.one.prepare(cache, place))

    def logits(self, x: Tensor, step: NativeStep | FusedStep) -> Tensor:
        """Embedded tokens ``[B, N, hidden]`` through all layers; logits ``[B, C]`` of the last one."""
        if isinstance(step, FusedStep):
            return self.one.logits(x, step)
        return self.together.logits(x, self.together.prepare(step.cache, step.place))
