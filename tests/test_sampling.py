"""Codes drawn at a temperature: the distribution is the model's, the draw is the seed's."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from small import small_config

from flexlam_fast.errors import ConfigError, InputError
from flexlam_fast.policy import Policy
from flexlam_fast.sequence.eager import Eager
from flexlam_fast.sequence.model import SequenceModel
from flexlam_fast.sequence.sampling import Sampling

CFG = small_config()
FRAMES = np.random.default_rng(0).integers(0, 256, (6, 2, 16, 16, 3), dtype=np.uint8)


def policy(temperature: float) -> Policy:
    return Policy(dataclasses.replace(CFG, sequence=dataclasses.replace(CFG.sequence, temperature=temperature)))


def codes(acting: Policy, seed: int, **how: float) -> torch.Tensor:
    acting.reset(2, seed)
    return torch.stack([acting.act(frame, 4, **how).codes for frame in FRAMES])


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_codes_are_drawn_from_the_softmax_at_the_temperature(temperature: float) -> None:
    logits = torch.tensor([[0.0, 1.0, -1.0, 2.0, 0.5]])
    way = Eager(SequenceModel(CFG))
    noise = Sampling(temperature, None, torch.tensor([0, 0]), torch.arange(20_000) * 2).prepared(2, 5)
    drawn = torch.cat([way.choose(logits.expand(20_000, -1), slot, noise) for slot in (0, 1)])
    share = torch.bincount(drawn, minlength=5) / len(drawn)
    expected = (logits[0] / temperature).softmax(0)
    deviation = (expected * (1 - expected) / len(drawn)).sqrt()
    assert bool(((share - expected).abs() < 4 * deviation).all())


def test_the_seed_decides_the_draw_and_zero_is_greedy() -> None:
    warm, cold = policy(1.0), policy(0.0)
    assert torch.equal(codes(warm, 1), codes(warm, 1))
    assert not torch.equal(codes(warm, 1), codes(warm, 2))
    assert torch.equal(codes(cold, 1), codes(cold, 2))
    assert torch.equal(codes(warm, 1, temperature=0.0), codes(cold, 1))
    assert torch.equal(codes(cold, 1, temperature=1.0), codes(warm, 1))


def test_bad_temperatures_get_one_sentence() -> None:
    with pytest.raises(InputError, match="temperature: expected a finite number of at least 0, got -1"):
        policy(0.0).act(FRAMES[0], 1, temperature=-1)
    with pytest.raises(InputError, match="temperature: expected a finite number of at least 0, got 'hot'"):
        policy(0.0).act(FRAMES[0], 1, temperature="hot")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="SequenceConfig.temperature: expected a number in .*, got nan"):
        policy(float("nan"))
