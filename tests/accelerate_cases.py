"""FSQs of every layout beside their originals, and a model of several; shared by the tests of ``ff.accelerate``."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flexlam_fast import ops
from flexlam_fast.accelerate import accelerate
from flexlam_fast.backend import choose
from flexlam_fast.bottleneck import Bottleneck
from flexlam_fast.config import BottleneckConfig

vector_quantize = pytest.importorskip("vector_quantize_pytorch")
FSQ = vector_quantize.FSQ

L = [8, 5, 5, 5]
BACKENDS = sorted({"reference", choose("auto", "cpu").name})

#: Options of an FSQ and the shape of an input; between them every layout and every harmless option of ``FSQ``.
CASES: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "plain": (dict(levels=L), (3, 7, 4)),
    "other levels": (dict(levels=[7, 3, 16]), (2, 9, 3)),
    "one level": (dict(levels=[5]), (2, 9, 1)),
    "one slot": (dict(levels=L), (1, 1, 4)),
    "no blocks": (dict(levels=L), (0, 7, 4)),
    "no slots": (dict(levels=L), (3, 0, 4)),
    "projections": (dict(levels=L, dim=10), (3, 7, 10)),
    "projections without bias": (dict(levels=L, dim=10, projection_has_bias=False), (3, 7, 10)),
    "two codebooks": (dict(levels=L, num_codebooks=2), (3, 7, 8)),
    "three codebooks, projections": (dict(levels=[8, 5], num_codebooks=3, dim=5), (3, 7, 5)),
    "codebook dimension kept": (dict(levels=L, keep_num_codebooks_dim=True), (3, 7, 4)),
    "channel first": (dict(levels=L, channel_first=True), (3, 4, 7)),
    "channel first, vectors": (dict(levels=L, channel_first=True), (3, 4)),
    "channel first, projections": (dict(levels=L, channel_first=True, dim=6), (3, 6, 7)),
    "image": (dict(levels=L), (2, 4, 3, 5)),
    "image, projections, two codebooks": (dict(levels=L, dim=6, num_codebooks=2), (2, 6, 3, 5)),
    "image, two codebooks": (dict(levels=L, num_codebooks=2), (2, 8, 3, 5)),
    "image, codebook dimension kept": (dict(levels=L, keep_num_codebooks_dim=True), (2, 4, 3, 5)),
    "video": (dict(levels=L), (2, 4, 2, 3, 5)),
    "video, channel first": (dict(levels=L, channel_first=True, dim=3), (2, 3, 2, 3, 5)),
    "scale": (dict(levels=L, scale=2.0), (3, 7, 4)),
    "no indices": (dict(levels=L, return_indices=False), (3, 7, 4)),
    "no indices, image": (dict(levels=L, return_indices=False, dim=6), (2, 6, 3, 5)),
    "no indices, many levels": (dict(levels=[17] * 6, return_indices=False), (3, 7, 6)),
    "nothing forced": (dict(levels=L, force_quantization_f32=False), (3, 7, 4)),
    "nothing forced, projections": (dict(levels=L, force_quantization_f32=False, dim=6), (3, 7, 6)),
    "every dtype allowed": (dict(levels=L, allowed_dtypes=(torch.float32, torch.bfloat16, torch.float16)), (3, 7, 4)),
    "no dtype allowed": (dict(levels=L, allowed_dtypes=(), dim=6), (3, 7, 6)),
}


class Mine(FSQ):
    """A user's own quantizer."""


class Model(nn.Module):
    """Quantizers at three depths, one of them under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = FSQ(L, dim=6)
        self.again = self.first
        self.inner = nn.ModuleDict({"deep": nn.Sequential(nn.Linear(6, 4), FSQ(L)), "odd": Mine(L)})
        self.bottleneck = Bottleneck(BottleneckConfig(levels=tuple(L), slots=7))

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, codes = self.again(self.first(z)[0])
        y, more = self.inner["deep"](x)
        return self.bottleneck(y).latents, codes, more


def pair(backend: str = "reference", **options: Any) -> tuple[FSQ, FSQ]:
    """An accelerated FSQ and the original with the same weights."""
    ours = FSQ(**options)
    theirs = copy.deepcopy(ours)
    record = accelerate(ours, backend)
    assert [part.backend for part in record.swapped] == [backend]
    assert type(ours) is not FSQ
    return ours, theirs


def assert_same(ours: Any, theirs: Any) -> None:
    """Latents equal to the bit, in shape, dtype and layout; codes too, or None on both sides."""
    assert type(ours) is tuple
    assert len(ours) == len(theirs) == 2
    for mine, original in zip(ours, theirs, strict=True):
        if original is None:
            assert mine is None
            continue
        assert (mine.shape, mine.dtype) == (original.shape, original.dtype)
        assert mine.is_contiguous() == original.is_contiguous()
        assert torch.equal(mine, original)


def through_ops(monkeypatch: pytest.MonkeyPatch) -> list[str | None]:
    """Note every backend that ``ops.fsq`` is called with."""
    seen: list[str | None] = []
    real = ops.fsq

    def noting(z: Tensor, levels: Any, *, backend: str | None = None) -> tuple[Tensor, Tensor]:
        seen.append(backend)
        return real(z, levels, backend=backend)

    monkeypatch.setattr(ops, "fsq", noting)
    return seen
