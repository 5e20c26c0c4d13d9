"""One decision of the sequence model: append what was observed, then generate k codes greedily (paper Algorithm 1)."""

from __future__ import annotations

import torch
from torch import Tensor

from flexlam_fast.checks import check_budget
from flexlam_fast.sequence.cache import SegmentCache
from flexlam_fast.sequence.model import SequenceModel


@torch.no_grad()
def append(model: SequenceModel, cache: SegmentCache, codes: Tensor, pixels: Tensor) -> Tensor:
    """Append ``Z_{t-1}`` and ``O_t`` to every session, in one prefill.

    Args:
        model: the sequence model.
        cache: the sessions; each moves to its next frame.
        codes: complete blocks integers ``[B, K]`` of the newest transitions; ignored where a session has none yet.
        pixels: newest frames ``[B, C, H, W]`` in ``[-1, 1]``.

    Returns:
        Logits fp32 ``[B, C]`` of the first code of the present block.
    """
    slots = torch.arange(cache.slots, device=codes.device)
    x = torch.cat([model.embed_codes(codes, slots), model.embed_frames(pixels)], dim=1)
    place = cache.place_append()
    hidden = model(x, place.positions, place.mask, cache.write_to(place))
    return model.logits(hidden[:, -1])


@torch.no_grad()
def generate(
    model: SequenceModel,
    cache: SegmentCache,
    logits: Tensor,
    k: int,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Codes int32 ``[B, k]`` from the logits of the first one; ``k - 1`` further passes.

    ``temperature`` 0 is greedy; above, codes are drawn by ``generator`` from the softmax of ``logits / temperature``.

    Raises:
        BudgetError: ``k`` outside ``1..K``.
    """
    check_budget("k", k, 1, cache.slots)
    chosen = [choose(logits, temperature, generator)]
    for slot in range(k - 1):
        x = model.embed_codes(chosen[-1], torch.tensor([slot], device=logits.device))
        place = cache.place_scratch()
        hidden = model(x, place.positions, place.mask, cache.write_to(place))
        chosen.append(choose(model.logits(hidden[:, -1]), temperature, generator))
    return torch.cat(chosen, dim=1).to(torch.int32)


def choose(logits: Tensor, temperature: float, generator: torch.Generator | None) -> Tensor:
    """One code int64 ``[B, 1]`` per row of ``logits [B, C]``."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    below = logits - logits.amax(-1, keepdim=True)  # first, so that a temperature near 0 cannot overflow
    return torch.multinomial((below / temperature).softmax(-1), 1, generator=generator)
