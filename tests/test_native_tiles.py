"""The append by matrix tiles (AMX): attention of many tokens, and all layers in one call, against the references."""

from __future__ import annotations

import copy
import dataclasses
import math
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from native_cases import BUILT
from paged_cases import Pages, pages
from small import small_config
from torch import Tensor

from flexlam_fast.config import BottleneckConfig, EncoderConfig, FlexLAMConfig
from flexlam_fast.encoder import Encoder, NativeEncoder
from flexlam_fast.errors import InputError
from flexlam_fast.ops import native_decode
from flexlam_fast.ops import paged_reference as reference
from flexlam_fast.ops.block import Entry
from flexlam_fast.policy import Policy
from flexlam_fast.sequence.cache import PagedCache
from flexlam_fast.sequence.model import SequenceModel
from flexlam_fast.sequence.native import NativeBlock, TileStep
from flexlam_fast.testing import assert_within_budget

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))
from parity import compare

CPU, BF16 = torch.device("cpu"), torch.bfloat16


def has_tiles() -> bool:
    if not BUILT:
        return False
    from flexlam_fast import _C

    return _C.takes_tiles(64, 64, native_decode.TYPES[BF16])


pytestmark = [
    pytest.mark.skipif(not has_tiles(), reason="no matrix tiles for bf16, or no extension"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="the cases are on the GPU"),
]


@pytest.fixture
def threads() -> Iterator[None]:
    """Puts the number of threads back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def attend(case: Pages) -> Tensor:
    from flexlam_fast import _C

    assert case.q.shape[1] >= native_decode.MANY
    return native_decode.page_attend(_C, *case[:6])


def small_tiles(kv_heads: int = 2, patch: int = 4) -> FlexLAMConfig:
    """Sizes of whole 32s, pages of 16, some queries that fill no block of 16 tokens with ``patch`` 8."""
    cfg = small_config()
    seq = dataclasses.replace(
        cfg.sequence,
        hidden=64,
        intermediate=96,
        heads=4,
        kv_heads=kv_heads,
        head_dim=32,
        layers=3,
        patch=patch,
        window=6,
    )
    return dataclasses.replace(
        cfg, bottleneck=BottleneckConfig((5, 5), slots=16), encoder=EncoderConfig(1, 32, 2, 2, patch=8), sequence=seq
    )


@pytest.mark.parametrize(
    ("tokens", "dim", "page", "entries", "heads", "kv_heads", "context", "start"),
    [
        (128, 64, 64, 9, 2, 2, [5, 0, 7], [0, 17, 0]),
        (33, 32, 16, 20, 4, 2, [16, 1, 0], [3, -20, 0]),
        (16, 96, 32, 12, 3, 1, [9, 0, 2], [0, 5, -16]),
        (47, 128, 16, 40, 2, 1, [35, 20, 0], [1, 0, 0]),
        (16, 160, 16, 4, 1, 1, [1, 1, 1], [0, 1, 2]),  # too wide for tiles: the other way
    ],
)
def test_attention_is_within_the_budget(
    tokens: int, dim: int, page: int, entries: int, heads: int, kv_heads: int, context: list[int], start: list[int]
) -> None:
    sizes = dict(tokens=tokens, heads=heads, kv_heads=kv_heads, dim=dim, page=page, entries=entries)
    case = pages(BF16, context, start, **sizes)
    assert_within_budget(attend(case), reference.paged_attention, *case[:6], working_dtype=BF16)


def test_what_sees_nothing_gives_zeros_and_nan_reaches_its_own_queries_only() -> None:
    case = pages(BF16, [0, 2], [-16, 0], tokens=20, heads=2, kv_heads=2, dim=32, page=16, entries=6)
    out = attend(case)
    assert not out[0, :15].any()
    assert out[0, 16:].any()
    k = case.k.nan_to_num()
    row = int(case.table[1, 2])  # the second session's own first tokens
    k[row, 10, 0] = math.nan
    v = case.v.nan_to_num()
    out = attend(case._replace(k=k, v=v))
    assert not out[1, :10].isnan().any()
    assert bool(out[1, 10:, 0].isnan().all())
    assert not out[1, :, 1].isnan().any()


@pytest.mark.parametrize("scale", [1e-3, 30.0, 1e4])
def test_scores_of_any_size(scale: float) -> None:
    case = pages(BF16, [9, 0], [0, 0], tokens=32, heads=2, kv_heads=2, dim=32, page=32, entries=12)
    case = case._replace(q=case.q * scale)
    assert_within_budget(attend(case), reference.paged_attention, *case[:6], working_dtype=BF16)


@pytest.mark.parametrize("kv_heads", [2, 4, 1])
def test_the_append_is_the_reference_over_many_decisions(kv_heads: int) -> None:
    cfg = small_tiles(kv_heads)
    used = []

    class Noted(NativeBlock):
        def prepare(self, cache: PagedCache, place: object) -> object:  # type: ignore[override]
            used.append(type(step := super().prepare(cache, place)))  # type: ignore[arg-type]
            return step

    found = compare(Noted, cfg, BF16, CPU, 60, 3)
    assert set(used) == {TileStep}
    assert found.holds(), found
    assert found.near_ties <= 0.05 * found.codes


@pytest.mark.usefixtures("threads")
def test_neither_threads_nor_neighbours_change_a_bit() -> None:
    cfg = small_tiles()
    torch.manual_seed(0)
    model = SequenceModel(cfg).requires_grad_(False).to(BF16)
    x = torch.randn(3, 32, 64).to(BF16)
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        for chosen in ([0, 1, 2], [1], [2, 1]):
            cache = PagedCache(cfg, 3, CPU, BF16)
            cache.open(3)
            for _ in range(3):
                place = cache.place_append(torch.tensor(chosen))
            runner = NativeBlock(model)
            step = runner.prepare(cache, place)
            logits = runner.logits(x[chosen], step)
            at, rows = chosen.index(1), slice(cache.session_pages, 2 * cache.session_pages)
            results.append((logits[at], cache.k[:, rows].clone(), cache.v[:, rows].clone()))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_one_sentence_says_what_is_wrong() -> None:
    cfg = small_tiles()
    model = SequenceModel(cfg).requires_grad_(False).to(BF16)
    cache = PagedCache(cfg, 1, CPU, BF16)
    cache.open()
    place = cache.place_append(torch.tensor([0]))
    engine = NativeBlock(model).engine()
    entry, x = (
        Entry(place.table, place.context, place.start, cache.rows(place), place.positions),
        torch.zeros(1, 32, 64),
    )
    k, v = cache.k, cache.v
    for call, sentence in (
        (lambda: engine.append(k, v, entry, x), r"^x: expected \[B,N,64\] bfloat16"),
        (lambda: engine.append(k.float(), v.float(), entry, x.to(BF16)), r"^x: expected tokens, sizes and a processor"),
        (lambda: engine.append(k, v, entry._replace(start=entry.rows), x.to(BF16)), r"^start: expected \[1\] int32"),
        (lambda: engine.append(k, v, entry._replace(rows=entry.start), x.to(BF16)), r"^rows: expected \[1,32\] int64"),
    ):
        with pytest.raises(InputError, match=sentence):
            call()


@pytest.mark.parametrize("preset", ["dmlab", "tiny"])
def test_the_encoder_is_within_the_budget(preset: str) -> None:
    cfg = FlexLAMConfig.preset(preset)
    encoder = Encoder(cfg).requires_grad_(False)
    for p in encoder.parameters():
        if p.dim() == 1:
            p.add_(torch.randn_like(p) * 0.1)
    encoder.to(BF16)
    calls: list[Tensor] = []
    plain = copy.deepcopy(encoder)
    native = NativeEncoder(encoder)
    engine = native._ready()
    assert engine is not None
    engine.run = lambda x, keep, run=engine.run: calls.append(x) or run(x, keep)  # type: ignore[method-assign]

    def reference(now: Tensor, following: Tensor) -> Tensor:
        module = plain.to(now.dtype)
        return module(now, following)

    now, following = (torch.rand(2, 3, cfg.frame, cfg.frame).to(BF16) * 2 - 1 for _ in range(2))
    assert_within_budget(native(now, following), reference, now, following, working_dtype=BF16)
    assert len(calls) == 1
    for p in encoder.parameters():  # elsewhere in memory, other numbers
        p.data = p.data * 0.5
    plain.load_state_dict(encoder.state_dict())
    plain.to(BF16)
    assert_within_budget(native(now, following), reference, now, following, working_dtype=BF16)


def test_other_dtypes_and_sizes_go_by_the_modules() -> None:
    odd = small_config()  # 4 slots and 4 patches: no whole 16
    for kind in (torch.float32, BF16):
        encoder = Encoder(odd).requires_grad_(False).to(kind)
        now, following = (torch.rand(2, 3, 16, 16).to(kind) for _ in range(2))
        assert torch.equal(NativeEncoder(encoder)(now, following), encoder(now, following))


def test_attention_asked_for_by_name_is_taken() -> None:
    for name, native in (("auto", True), ("reference", False)):
        policy = Policy(FlexLAMConfig.preset("tiny"), dtype=BF16, device="cpu", attention=name)
        assert (policy.stages.encoder is not None) is native
    frame = torch.zeros(1, 64, 64, 3, dtype=torch.uint8)
    policy.act(frame, 2)
    assert policy.act(frame, 2).codes.shape == (1, 2)


@pytest.mark.usefixtures("threads")
def test_threads_do_not_change_the_encoders_bits() -> None:
    encoder = Encoder(FlexLAMConfig.preset("tiny")).requires_grad_(False).to(BF16)
    now, following = (torch.rand(3, 3, 64, 64).to(BF16) for _ in range(2))
    found, x = [], encoder.tokens(now, following)
    engine = NativeEncoder(encoder)._ready()
    assert engine is not None
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        found.append(engine.run(x, 16))
    assert all(torch.equal(found[0], other) for other in found[1:])
    assert torch.equal(engine.run(x[1:2], 16)[0], found[0][1])
    with pytest.raises(InputError, match=r"^x: expected whole 16s of tokens, 16 of them to keep, and AMX"):
        engine.run(x[:, :17], 16)
