"""Translator: its shape, its loss, and how actions are encoded."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from flexlam_fast.config import BottleneckConfig, FlexLAMConfig, TranslatorConfig
from flexlam_fast.errors import InputError
from flexlam_fast.lam import LatentActionModel
from flexlam_fast.translator import Translator, TranslatorOutput, encode_actions, no_actions, translator_loss
from flexlam_fast.types import Actions


def model(translator: TranslatorConfig, slots: int = 6) -> tuple[FlexLAMConfig, Translator]:
    torch.manual_seed(0)
    tiny = FlexLAMConfig.preset("tiny")
    cfg = dataclasses.replace(tiny, bottleneck=BottleneckConfig(slots=slots), translator=translator)
    return cfg, Translator(cfg).eval()


def acted(discrete: list[list[int]] | list[list[float]], continuous: int = 2) -> Actions:
    return Actions(torch.tensor(discrete), torch.zeros(1, continuous))


MIXED = TranslatorConfig(depth=2, hidden=8, wide=32, discrete=(3, 5), continuous=2)


def test_it_has_the_papers_shape() -> None:
    cfg = FlexLAMConfig.preset("dmlab")
    translator = Translator(cfg)
    assert translator.stem.in_features == 64 * 4 + 15
    shapes = [(b.get_parameter("down.weight").shape, b.get_parameter("up.weight").shape) for b in translator.blocks]
    assert shapes == [((96, 512), (512, 96))] * 5
    assert translator.head.out_features == 15


def test_a_block_is_residual() -> None:
    _, translator = model(MIXED)
    x = torch.randn(3, 32)
    block = translator.blocks[0]
    torch.nn.init.zeros_(block.get_parameter("up.weight"))
    assert torch.equal(block(x), x)


def test_heads_split_into_dimensions() -> None:
    cfg, translator = model(MIXED)
    previous = encode_actions(no_actions(4, cfg.translator, torch.device("cpu")), cfg.translator)
    out = translator(torch.randn(4, 6, 4), previous)
    assert [tuple(x.shape) for x in out.logits] == [(4, 3), (4, 5)]
    assert out.continuous.shape == (4, 2)
    chosen = translator.decide(torch.zeros(4, 6, 4), previous)
    out = translator(torch.zeros(4, 6, 4), previous)
    assert chosen.discrete.dtype == torch.int64
    assert torch.equal(chosen.discrete[:, 1], out.logits[1].argmax(-1))
    assert torch.equal(chosen.continuous, out.continuous)


@pytest.mark.parametrize("kind", [TranslatorConfig(discrete=(), continuous=3), TranslatorConfig(discrete=(2, 2, 9))])
def test_actions_of_one_kind_alone(kind: TranslatorConfig) -> None:
    cfg, translator = model(kind)
    previous = no_actions(2, kind, torch.device("cpu"))
    chosen = translator.decide(torch.zeros(2, 6, 4), encode_actions(previous, kind))
    assert chosen.discrete.shape == (2, len(kind.discrete))
    assert chosen.continuous.shape == (2, kind.continuous)
    assert encode_actions(chosen, kind).shape == (2, kind.action_dim)
    assert cfg.translator.action_dim == sum(kind.discrete) + kind.continuous


def test_latents_and_previous_action_both_matter() -> None:
    cfg, translator = model(MIXED)
    latents = torch.randn(1, 6, 4)
    none = encode_actions(no_actions(1, cfg.translator, torch.device("cpu")), cfg.translator)
    some = encode_actions(Actions(torch.tensor([[1, 4]]), torch.zeros(1, 2)), cfg.translator)
    base = translator(latents, none)
    assert not torch.equal(translator(latents, some).continuous, base.continuous)
    for slot in range(6):
        other = latents.clone()
        other[0, slot, 1] += 1
        assert not torch.equal(translator(other, none).continuous, base.continuous)


def test_actions_are_one_hot_then_continuous_and_none_is_zeros() -> None:
    encoded = encode_actions(Actions(torch.tensor([[0, 4], [-1, 2]]), torch.tensor([[0.5, -1.0], [2.0, 0.0]])), MIXED)
    assert encoded.tolist() == [[1, 0, 0, 0, 0, 0, 0, 1, 0.5, -1], [0, 0, 0, 0, 0, 1, 0, 0, 2, 0]]
    assert encoded.dtype == torch.float32


@pytest.mark.parametrize(
    ("actions", "sentence"),
    [
        (acted([[3, 0]]), r"^actions.discrete: expected -1..2 in dimension 0, got \[3\]$"),
        (acted([[0, -2]]), r"^actions.discrete: expected -1..4 in dimension 1, got \[-2\]$"),
        (acted([[0]]), r"^actions.discrete: expected \[B,2\] int64, got \[1,1\] int64 cpu$"),
        (acted([[0.0, 0.0]]), r"^actions.discrete: expected \[B,2\] int64, got \[1,2\] float32 cpu$"),
        (acted([[0, 0]], 3), r"^actions.continuous: expected \[B,2\] float32, got \[1,3\]"),
    ],
)
def test_wrong_actions_are_refused_in_one_sentence(actions: Actions, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        encode_actions(actions, MIXED)


def test_the_loss_is_cross_entropy_plus_squared_error() -> None:
    first = torch.tensor([[1.0, 2.0, 0.0], [0.0, 0.0, 0.0]])
    second = torch.tensor([[0.0, 1.0, 0.0, 0.0, 0.0], [3.0, 0.0, 0.0, 0.0, 0.0]])
    out = TranslatorOutput((first, second), torch.tensor([[1.0, 0.0], [0.0, 2.0]]))
    target = Actions(torch.tensor([[1, 1], [0, 2]]), torch.tensor([[0.0, 0.0], [0.0, 0.0]]))

    def entropy(logits: Tensor, choice: int) -> float:
        return math.log(sum(math.exp(float(x)) for x in logits)) - float(logits[choice])

    expected = (entropy(first[0], 1) + entropy(first[1], 0)) / 2 + (entropy(second[0], 1) + entropy(second[1], 2)) / 2
    expected += (1 + 0 + 0 + 4) / 4
    assert math.isclose(float(translator_loss(out, target)), expected, rel_tol=1e-6)


def test_the_loss_reaches_every_parameter() -> None:
    cfg, translator = model(MIXED)
    target = Actions(torch.tensor([[1, 4], [0, 0]]), torch.randn(2, 2))
    previous = encode_actions(no_actions(2, cfg.translator, torch.device("cpu")), cfg.translator)
    translator_loss(translator(torch.randn(2, 6, 4), previous), target).backward()
    for name, p in translator.named_parameters():
        assert p.grad is not None, name
        assert bool(p.grad.any()), name


@pytest.mark.parametrize("k", [0, 1, 3, 5, 6])
def test_slots_beyond_the_budget_change_no_bit_of_the_action(k: int) -> None:
    cfg, translator = model(MIXED)
    lam = LatentActionModel(cfg)
    generator = torch.Generator().manual_seed(k)
    codes = torch.randint(0, 1000, (4, 6), generator=generator)
    previous = encode_actions(no_actions(4, cfg.translator, torch.device("cpu")), cfg.translator)
    expected = translator(lam.latents(codes, k), previous)
    for _ in range(10):
        codes[:, k:] = torch.randint(-(2**40), 2**40, (4, 6 - k), generator=generator)
        out = translator(lam.latents(codes, k), previous)
        assert all(torch.equal(a, b) for a, b in zip(out.logits, expected.logits, strict=True))
        assert torch.equal(out.continuous, expected.continuous)
