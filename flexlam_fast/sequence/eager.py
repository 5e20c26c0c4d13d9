"""The reference way through the sequence model in a decision: the model's own forward, masks and all."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from flexlam_fast.errors import CacheError
from flexlam_fast.sequence.cache import PagedCache, Placement
from flexlam_fast.sequence.model import SequenceModel
from flexlam_fast.sequence.sampling import PlainChoice


class EagerStep(NamedTuple):
    """New tokens at ``place`` of ``cache``."""

    cache: PagedCache
    place: Placement

    def column(self, j: int) -> EagerStep:
        """Token ``j`` alone."""
        return self._replace(place=self.place.column(j))


class Eager(PlainChoice):
    """Runs ``model`` over the cache with the plain modules: what the other ways are measured by."""

    def __init__(self, model: SequenceModel) -> None:
        self.model = model

    def prepare(self, cache: PagedCache, place: Placement) -> EagerStep:
        """Work out what all layers share."""
        return EagerStep(cache, place)

    def logits(self, x: Tensor, step: EagerStep) -> Tensor:
        """Embedded tokens ``[B, N, hidden]`` through all layers; logits ``[B, C]`` of the last one."""
        mask, pages = step.cache.mask(step.place), Pages(step.cache, step.place)
        hidden = self.model(x, step.place.positions, mask, pages)
        return self.model.logits(hidden[:, -1])


class Pages:
    """A cache as the model's attention sees it: keys and values ``[B, kv_heads, S, D]`` of the sessions that act."""

    def __init__(self, cache: PagedCache, place: Placement) -> None:
        self.cache, self.place = cache, place
        self.rows = cache.rows(place).flatten()
        # a CPU may look: where all sessions act in order, keys and values need no copy
        self.whole = place.sessions.is_cpu and place.sessions.tolist() == list(range(cache.capacity))

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write ``k``, ``v`` ``[B, kv_heads, N, D]`` of a layer where the placement says; return all of its slots."""
        cache, tokens = self.cache, self.place.slots.numel()
        if k.shape[0] * k.shape[2] != tokens:
            raise CacheError(f"update: expected keys of {tokens} tokens, got {k.shape[0] * k.shape[2]}")
        found = []
        for pool, new in ((cache.k[layer], k), (cache.v[layer], v)):
            flat = pool.view(-1, *pool.shape[2:])
            flat.index_copy_(0, self.rows, new.transpose(1, 2).flatten(0, 1).to(pool.dtype))
            held = pool.view(cache.capacity, cache.size, *pool.shape[2:])
            found.append((held if self.whole else held.index_select(0, self.place.sessions)).transpose(1, 2))
        return found[0], found[1]
