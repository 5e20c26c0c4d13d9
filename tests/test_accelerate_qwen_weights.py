"""Weights of an accelerated Qwen3: shared, held once, obeyed when they change, and let go with the model."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from native_cases import PLAIN
from qwen_cases import GREEDY, QWEN, note_ways, prompt_of, qwen
from torch import nn
from transformers import Qwen3Config, Qwen3ForCausalLM

from flexlam_fast.accelerate import accelerate
from flexlam_fast.accelerate_qwen import mirror_of
from flexlam_fast.errors import BackendError


@pytest.fixture
def ours(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The ways that generated, in order."""
    return note_ways(monkeypatch)


def in_place(hf: Any) -> None:
    with torch.no_grad():
        for i, p in enumerate(hf.parameters()):
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(i)), alpha=0.3)


def by_optimizer(hf: Any) -> None:
    optimizer = torch.optim.SGD(hf.parameters(), lr=1.0)
    hf(prompt_of(1, 20), labels=prompt_of(1, 20)).loss.backward()
    optimizer.step()


def assigned(hf: Any) -> None:
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    hf.model.layers[1].self_attn.q_proj.weight = nn.Parameter(weight)


def loaded(hf: Any) -> None:
    other = qwen(num_attention_heads=4)
    in_place(other)
    hf.load_state_dict(other.state_dict(), assign=True)


def doubled(hf: Any) -> None:
    in_place(hf)
    hf.double()


@pytest.mark.parametrize("change", [in_place, by_optimizer, assigned, loaded, doubled])
def test_weights_that_change_are_obeyed(change: Callable[[Any], None], ours: list[str]) -> None:
    theirs, prompt = qwen(), prompt_of(1, 20)
    hf = copy.deepcopy(theirs)
    accelerate(hf)
    before = hf.generate(prompt, **GREEDY)
    for model in (theirs, hf):
        change(model)
    expected = theirs.generate(prompt, **GREEDY)
    assert torch.equal(hf.generate(prompt, **GREEDY), expected)
    assert not torch.equal(expected, before)
    assert len(ours) == 2


def test_a_model_that_is_cast_or_moved_takes_the_way_that_is_best_there() -> None:
    pytest.importorskip("triton")
    chosen, named = qwen(), qwen()
    accelerate(chosen)
    accelerate(named, "triton")
    before = mirror_of(chosen).way("auto")
    assert mirror_of(chosen).way("auto") is before
    for hf in (chosen, named):
        hf.double()
    assert mirror_of(chosen).way("auto") is not before
    with pytest.raises(BackendError, match=r"^backend: expected float32, .* for 'triton', got 96 in float64$"):
        named.generate(prompt_of(1, 5), **GREEDY)


def test_weights_are_shared_and_held_once() -> None:
    hf = qwen()
    accelerate(hf)
    parameters = [id(p) for p in hf.parameters()]
    hf.generate(prompt_of(1, 5), **GREEDY)
    assert [id(p) for p in hf.parameters()] == parameters
    mirror = mirror_of(hf)
    ours = {id(p) for name, p in mirror.model.named_parameters() if not name.startswith("observe")}
    assert ours == set(parameters)
    held = {t.untyped_storage().data_ptr() for layer in mirror.runner.layers for t in (layer.qkv, layer.gate_up)}
    attention = [getattr(layer.self_attn, f"{name}_proj") for layer in hf.model.layers for name in "qkv"]
    assert {part.weight.untyped_storage().data_ptr() for part in attention} < held
    packed = [layer.qkv for layer in mirror.runner.layers]
    hf.generate(prompt_of(1, 5), **GREEDY)
    assert all(layer.qkv is old for layer, old in zip(mirror.runner.layers, packed, strict=True)), "packed once"


def test_training_works_after_inference_mode() -> None:
    hf = qwen()
    accelerate(hf)
    with torch.inference_mode():
        hf.generate(prompt_of(1, 5), **GREEDY)
    hf(prompt_of(1, 20), labels=prompt_of(1, 20)).loss.backward()
    assert all(p.grad is not None for p in hf.parameters())


def test_half_precision_runs_unless_its_frequencies_were_rounded(ours: list[str]) -> None:
    hf = qwen().to(torch.bfloat16)
    (part,) = accelerate(hf).left
    assert "its inv_freq are not those of theta 10000: .to() rounds them like weights" in part.reason
    fresh = Qwen3ForCausalLM(Qwen3Config(**QWEN)).model.rotary_emb.inv_freq
    hf.model.rotary_emb.inv_freq = fresh
    theirs = copy.deepcopy(hf)
    accelerate(hf)
    got, expected = (model.generate(prompt_of(3, 20), **GREEDY)[:, 20:] for model in (hf, theirs))
    assert ours == [PLAIN.__name__]
    assert float((got[:, 0] == expected[:, 0]).float().mean()) > 0.6, "bf16 parts close choices"


def test_what_was_made_for_a_model_goes_with_it() -> None:
    home = sys.modules["flexlam_fast.accelerate_qwen"]
    hf = qwen()
    accelerate(hf)
    hf.generate(prompt_of(1, 5), **GREEDY)
    before = len(home._mirrors)
    del hf
    assert len(home._mirrors) < before
