"""Plain sequences over growing pages: every way through the layers gives what recomputing everything gives."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from native_cases import BUILT, needs_extension
from torch import Tensor

from flexlam_fast.config import BottleneckConfig, FlexLAMConfig, SequenceConfig
from flexlam_fast.errors import BackendError
from flexlam_fast.sequence import plain
from flexlam_fast.sequence.decode import Runner
from flexlam_fast.sequence.eager import Eager
from flexlam_fast.sequence.fused import Fused
from flexlam_fast.sequence.model import SequenceModel
from flexlam_fast.sequence.plain import PAGE, GrowingPages, PlainNative, PlainPacked, generate, runner_of

SIZES = SequenceConfig(hidden=48, intermediate=64, layers=2, heads=4, kv_heads=2, head_dim=16, places=True)
WAYS: dict[str, Callable[[SequenceModel], Runner]] = {
    "eager": Eager,
    "packed": PlainPacked,
    "fused, reference": lambda model: Fused(model, "reference"),
}


def model_of(
    seq: SequenceConfig = SIZES, dtype: torch.dtype = torch.float64, levels: tuple[int, ...] = (8, 5, 5, 5)
) -> SequenceModel:
    """A model whose greedy codes are clear choices that vary."""
    torch.manual_seed(0)
    cfg = dataclasses.replace(FlexLAMConfig.preset("tiny"), bottleneck=BottleneckConfig(levels, slots=60), sequence=seq)
    model = SequenceModel(cfg).to(dtype).eval()
    for p in model.parameters():
        wide = p.dim() > 1
        torch.nn.init.normal_(p, mean=0.0 if wide else 1.0, std=2 * p.shape[-1] ** -0.5 if wide else 0.2)
    return model.requires_grad_(False)


def recomputed(model: SequenceModel, codes: Tensor, k: int) -> Tensor:
    """Greedy codes without any cache."""
    for _ in range(k):
        positions = torch.arange(codes.shape[1])
        hidden = model(model.embed_codes(codes, positions % model.cfg.bottleneck.slots), positions)
        codes = torch.cat([codes, model.logits(hidden[:, -1:]).argmax(-1)], dim=1)
    return codes[:, -k:].to(torch.int32)


def prompt_of(batch: int, tokens: int) -> Tensor:
    return torch.randint(0, 1000, (batch, tokens), generator=torch.Generator().manual_seed(tokens))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("batch", "tokens", "k"), [(1, 1, 3), (3, 63, 4), (2, 64, 70), (1, 130, 5), (1, 7, 1)])
def test_codes_are_those_of_recomputing_everything(way: str, batch: int, tokens: int, k: int) -> None:
    model, prompt = model_of(), prompt_of(batch, tokens)
    expected = recomputed(model, prompt, k)
    got = generate(WAYS[way](model), prompt, k)
    assert got.dtype == torch.int32
    assert torch.equal(got, expected)
    assert k < 5 or len(expected[0].unique()) > k // 3, "the comparison should not be of one code repeated"


@pytest.mark.parametrize("way", WAYS)
def test_a_prompt_that_enters_in_parts_gives_the_same(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompt = model_of(), prompt_of(2, 150)
    expected = recomputed(model, prompt, 3)
    entered: list[int] = []
    place = GrowingPages.place

    def noting(self: GrowingPages, tokens: int) -> Any:
        entered.append(tokens)
        return place(self, tokens)

    monkeypatch.setattr(GrowingPages, "place", noting)
    monkeypatch.setattr(plain, "PREFILL", 100)  # a page of each row, at least
    assert torch.equal(generate(WAYS[way](model), prompt, 3), expected)
    assert entered == [64, 64, 22, 2]


@pytest.mark.parametrize("way", WAYS)
def test_pages_grow_in_the_middle_without_a_trace(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompt = model_of(), prompt_of(2, 40)
    expected = recomputed(model, prompt, 150)
    sizes: list[int] = []
    reserve = GrowingPages.reserve

    def noting(self: GrowingPages, tokens: int) -> None:
        reserve(self, tokens)
        sizes.append(self.size)

    monkeypatch.setattr(GrowingPages, "reserve", noting)
    assert torch.equal(generate(WAYS[way](model), prompt, 150), expected)
    assert sorted(set(sizes)) == [128, 192], "two pages at first, then as many as are ever needed"


def test_pages_at_least_double_up_to_the_most_that_are_needed() -> None:
    pages = GrowingPages(SIZES, 2, 1000, torch.device("cpu"))
    seen = []
    for tokens in (1, 64, 65, 129, 300, 600, 1000):
        pages.reserve(tokens)
        seen.append(pages.size // PAGE)
        assert pages.k.shape == pages.v.shape == (2, 2 * seen[-1], PAGE, 2, 16)
    assert seen == [1, 1, 2, 4, 8, 16, 16]


def test_growing_keeps_every_row_in_its_place() -> None:
    pages = GrowingPages(SIZES, 3, 1000, torch.device("cpu"))
    pages.reserve(PAGE)
    place = pages.place(50)
    keys = torch.randn(2, 3, 50, 2, 16)
    for layer in range(2):
        pages.k[layer].view(-1, 2, 16)[pages.rows(place)] = keys[layer]
        pages.v[layer].view(-1, 2, 16)[pages.rows(place)] = -keys[layer]
    later = pages.place(60)
    assert pages.size == 2 * PAGE
    for layer in range(2):
        held = pages.k[layer].view(3, pages.size, 2, 16)
        assert torch.equal(held[:, :50], keys[layer])
        assert torch.equal(pages.v[layer].view(3, pages.size, 2, 16), -held)
        assert int(held[:, 50:].count_nonzero()) == 0
    assert later.slots.tolist() == [list(range(50, 110))] * 3
    assert later.start.tolist() == [50] * 3
    assert later.context.tolist() == [0] * 3
    assert later.table.tolist() == [[0, 1], [2, 3], [4, 5]]
    assert pages.rows(later)[:, 0].tolist() == [50, 178, 306]


def test_a_token_sees_those_up_to_itself() -> None:
    pages = GrowingPages(SIZES, 2, 200, torch.device("cpu"))
    pages.place(70)
    mask = pages.mask(pages.place(5))
    assert mask.shape == (2, 1, 5, 128)
    assert mask.sum(-1).tolist() == [[[71, 72, 73, 74, 75]]] * 2
    assert bool(mask[:, :, 0, :71].all())


def test_it_ends_where_it_is_told_to() -> None:
    model, prompt = model_of(), prompt_of(2, 9)
    whole = generate(PlainPacked(model), prompt, 20)
    asked: list[list[int]] = []

    def stop(code: Tensor) -> bool:
        asked.append(code.tolist())
        return len(asked) == 7

    assert torch.equal(generate(PlainPacked(model), prompt, 20, stop), whole[:, :7])
    assert asked == whole[:, :7].T.tolist()


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    model, prompt = model_of(dtype=torch.float32), prompt_of(3, 70)
    together = generate(runner_of(model), prompt, 20)
    for b in range(3):
        assert torch.equal(generate(runner_of(model), prompt[b : b + 1], 20), together[b : b + 1])


@needs_extension
@pytest.mark.parametrize("batch", [1, 3])
def test_native_codes_are_those_of_recomputing_everything(batch: int) -> None:
    """Beyond a page of codes, whose keys later ones read."""
    model, prompt = model_of(dtype=torch.float32), prompt_of(batch, 70)
    assert torch.equal(generate(PlainNative(model), prompt, 80), recomputed(model, prompt, 80))


def test_fused_kernels_in_the_interpreter_give_the_same_codes() -> None:
    pytest.importorskip("triton")
    seq = dataclasses.replace(SIZES, hidden=32, intermediate=32, layers=1, heads=2, kv_heads=1)
    model, prompt = model_of(seq, torch.float32, (8, 5)), prompt_of(1, 63) % 40
    runner = runner_of(model, "triton")
    assert isinstance(runner, Fused)
    assert torch.equal(generate(runner, prompt, 3), recomputed(model, prompt, 3))


def test_what_one_way_has_packed_is_taken_by_the_next() -> None:
    model, prompt = model_of(), prompt_of(1, 5)
    first = PlainPacked(model)
    generate(first, prompt, 2)
    model.generate(prompt, 2)
    held = [layer.qkv for layer in first.layers]
    generate(first, prompt, 2)
    assert all(layer.qkv is old for layer, old in zip(first.layers, held, strict=True))


def test_the_way_is_chosen_by_name_and_device() -> None:
    pytest.importorskip("triton")
    model = model_of(dtype=torch.float32)
    found = PlainNative if BUILT else PlainPacked
    assert type(runner_of(model)) is found
    assert type(runner_of(model, "native")) is found
    assert type(runner_of(model.double(), "native")) is PlainPacked
    model.float()
    assert type(runner_of(model, "reference")) is Eager
    odd = model_of(dataclasses.replace(SIZES, head_dim=24), torch.float32)
    with pytest.raises(BackendError, match=r"^backend: expected a head dimension that is a power of two .*, got 24$"):
        runner_of(odd, "triton")
    with pytest.raises(BackendError, match=r"^backend: expected one of .*, got 'nonsense'$"):
        runner_of(model, "nonsense")


@pytest.mark.parametrize("grad", [True, False])
def test_a_model_can_be_trained_after_it_has_generated_in_inference_mode(grad: bool) -> None:
    model, prompt = model_of(dtype=torch.float32).requires_grad_(grad), prompt_of(1, 5)
    with torch.inference_mode():
        model.generate(prompt, 3)
    model.requires_grad_(True)
    positions = torch.arange(5)
    model.logits(model(model.embed_codes(prompt, positions), positions)).sum().backward()
    assert all(block.q.weight.grad is not None for block in model.blocks)


def test_autocast_changes_no_token() -> None:
    model, prompt = model_of(dtype=torch.float32), prompt_of(2, 5)
    plain = model.generate(prompt, 9)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model.generate(prompt, 9), plain)
        assert not torch.equal(generate(Eager(model), prompt, 9), plain)  # it does change the modules' own


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_kernels_on_a_gpu_agree_with_the_reference(dtype: torch.dtype) -> None:
    seq = dataclasses.replace(SIZES, hidden=256, intermediate=512, heads=4, kv_heads=2, head_dim=64)
    model, prompt = model_of(seq, dtype).cuda(), prompt_of(3, 700).cuda()
    runner = runner_of(model)
    assert isinstance(runner, Fused)
    got, expected = generate(runner, prompt, 100), generate(Eager(model), prompt, 100)
    # in bf16 one close pair of logits parts a row's codes for good
    same = (got[:, :8] == expected[:, :8]).float().mean()
    assert float(same) == 1.0 if dtype == torch.float32 else float(same) > 0.6
