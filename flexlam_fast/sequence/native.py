"""The way through the sequence model by C++ on a CPU: torch's products for what is observed, then a block in one call.

The append is 128 tokens at once, which torch's matrix products do well. A code is one token a session: reading weights,
keys and values once is all there is to do, and going back to Python in between would cost as much again.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from flexlam_fast.backend import NATIVE
from flexlam_fast.ops import native_decode
from flexlam_fast.ops.block import BlockEngine, Entry
from flexlam_fast.ops.contracts import compiled
from flexlam_fast.sequence.cache import PagedCache, Placement
from flexlam_fast.sequence.fused import Fused, FusedStep
from flexlam_fast.sequence.layers import Layer, pack, tensors_of
from flexlam_fast.sequence.model import SequenceModel
from flexlam_fast.sequence.packed import Packed, PackedStep
from flexlam_fast.sequence.sampling import PlainChoice, Sampling


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

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy packs its own model when it first runs."""
        return type(self), (self.model,)

    @property
    def layers(self) -> list[Layer]:
        """The packed weights, which both ways share."""
        return self.one.layers

    def prepare(self, cache: PagedCache, place: Placement) -> NativeStep:
        """Work out what all layers share."""
        return NativeStep(cache, place, self.one.prepare(cache, place))

    def logits(self, x: Tensor, step: NativeStep | FusedStep) -> Tensor:
        """Embedded tokens ``[B, N, hidden]`` through all layers; logits ``[B, C]`` of the last one."""
        if isinstance(step, FusedStep):
            return self.one.logits(x, step)
        return self.together.logits(x, self.together.prepare(step.cache, step.place))


class TileStep(NamedTuple):
    """New tokens at ``place`` of ``cache``, which go through all layers in one call."""

    cache: PagedCache
    place: Placement


class NativeBlock(Packed):
    """A block of codes in one call, over pages of any of the three dtypes; and so what is observed, where the processor
    has matrix tiles for it, else as ``Packed`` does it."""

    def __init__(self, model: SequenceModel) -> None:
        super().__init__(model)
        self._engine: BlockEngine | None = None

    def prepare(self, cache: PagedCache, place: Placement) -> PackedStep | TileStep:  # type: ignore[override]
        """Work out what all layers share."""
        if self.engine().takes(place.slots.shape[1], cache.k):
            return TileStep(cache, place)
        return super().prepare(cache, place)

    def logits(self, x: Tensor, step: PackedStep | TileStep) -> Tensor:
        """Embedded tokens ``[B, N, hidden]`` through all layers; logits ``[B, C]`` of the last one."""
        if isinstance(step, PackedStep):
            return super().logits(x, step)
        cache, place = step
        entry = Entry(place.table, place.context, place.start, cache.rows(place), place.positions)
        return self._prepared().append(cache.k, cache.v, entry, x)

    def norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Root mean square norm of rows ``[..., W]``."""
        return native_decode.norm_rows(compiled(NATIVE), x, weight, eps)

    def swiglu(self, x: Tensor) -> Tensor:
        """Rows ``[..., 2 I]`` of gates and what they gate, one behind the other, to ``[..., I]``."""
        return native_decode.swiglu_rows(compiled(NATIVE), x)

    def _attend(self, qkv: Tensor, layer: Layer, index: int, step: PackedStep) -> Tensor:
        cache, place, block = step.cache, step.place, layer.block
        k, v = cache.k[index], cache.v[index]
        if qkv.dtype != k.dtype or not native_decode.takes_tiles(compiled(NATIVE), k):
            return super()._attend(qkv, layer, index, step)
        norms = block.q_norm.weight, block.k_norm.weight
        seq = self.model.cfg.sequence
        args = qkv, *norms, place.positions, step.rows, k, v, seq.rope_theta, seq.rms_eps
        q = native_decode.page_write(compiled(NATIVE), *args)
        seen = place.table, place.context, place.start
        return native_decode.page_attend(compiled(NATIVE), q, k, v, *seen).flatten(2)

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

        ``given`` and ``logits`` are those of :meth:`BlockEngine.generate`.
        """
        draw = None if sampling is None else sampling.drawing(k, first.shape[1])
        spot = cache.spot(place)
        return self._prepared().generate(cache.k, cache.v, spot, first.float(), k, draw, given=given, logits=logits)

    def _prepared(self) -> BlockEngine:
        """The engine as the last :meth:`prepare` left it: looking at 100 weights takes half a millisecond."""
        return self._engine or self.engine()

    def engine(self) -> BlockEngine:
        """The engine of the weights as they stand."""
        self.layers = pack(self.model, self.layers)
        weights, seq = tensors_of(self.model, self.layers), self.model.cfg.sequence
        if self._engine is None or not self._engine.reads(weights):
            self._engine = BlockEngine(weights, seq.rope_theta, seq.rms_eps)
        return self._engine
