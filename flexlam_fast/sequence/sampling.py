"""How a decision's codes are chosen from logits and fed back, in plain operations."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from flexlam_fast.ops.block import Draw
from flexlam_fast.ops.sampling import draw, gumbel, reciprocal
from flexlam_fast.sequence.model import SequenceModel


class Sampling(NamedTuple):
    """How codes are drawn: temperature above 0, from the ``top_k`` most likely (None: from all).

    ``seed`` int64 ``[2]`` is the key on the device. ``streams`` int64 ``[B]`` counts, session by session, what has
    been drawn before, so that a session's codes depend on no other session. ``noise`` fp32 ``[B, k, C]`` is what plain
    operations add to the logits of each slot, made for a whole decision at once (60 operations, whatever their size);
    ``by_slot`` int64 ``[k, B]`` is the streams of each slot, for kernels that draw.
    """

    temperature: float
    top_k: int | None
    seed: Tensor
    streams: Tensor
    noise: Tensor | None = None
    by_slot: Tensor | None = None

    def prepared(self, k: int, codes: int) -> Sampling:
        """With the noise for ``k`` slots of ``codes`` codes."""
        rows = len(self.streams)
        streams = (self.streams.unsqueeze(1) + torch.arange(k, device=self.streams.device)).flatten()
        return self._replace(noise=gumbel(self.seed, streams, rows * k, codes).view(rows, k, codes))

    def drawing(self, k: int, codes: int) -> Draw:
        """The same as an engine takes it."""
        noise = self.prepared(k, codes).noise
        assert noise is not None
        return Draw(reciprocal(self.temperature), self.top_k or 0, noise)


class PlainChoice:
    """Choosing codes with a model and plain operations; the plain ways through the layers are this too."""

    model: SequenceModel

    def ready(self, sampling: Sampling | None, k: int) -> Sampling | None:
        """What a decision of ``k`` codes needs of ``sampling`` before its first code."""
        return None if sampling is None else sampling.prepared(k, self.model.cfg.bottleneck.codebook_size)

    def choose(self, logits: Tensor, slot: int, sampling: Sampling | None) -> Tensor:
        """Codes int32 ``[B]`` of ``slot`` from ``logits [B, C]``."""
        if sampling is None or sampling.noise is None:
            return logits.argmax(-1).to(torch.int32)
        chosen = draw(logits, reciprocal(sampling.temperature), sampling.top_k or 0, sampling.noise[:, slot])
        return chosen.to(torch.int32)

    def feed(self, logits: Tensor, slot: int, sampling: Sampling | None) -> tuple[Tensor, Tensor]:
        """The code of ``slot`` int32 ``[B]``, and its embedding ``[B, 1, hidden]``."""
        code = self.choose(logits, slot, sampling)
        slots = torch.arange(slot, slot + 1, device=code.device)
        return code, self.model.embed_codes(code.unsqueeze(1), slots)
