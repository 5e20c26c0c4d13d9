"""``ff.accelerate`` of a ``transformers`` Qwen3: greedy ``generate`` gives the tokens it gave, ends where it did."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from native_cases import PLAIN
from qwen_cases import GREEDY, KINDS, note_ways, prompt_of, qwen
from torch import Tensor
from transformers import GenerationConfig

from flexlam_fast.accelerate import accelerate
from flexlam_fast.sequence import plain


@pytest.fixture
def ours(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The ways that generated, in order."""
    return note_ways(monkeypatch)


def assert_clear(hf: Any, tokens: Tensor, start: int) -> None:
    """What was generated were clear choices, so that rounding cannot part two ways."""
    with torch.no_grad():
        best = hf(tokens[:, :-1]).logits[:, start - 1 :].topk(2).values
    assert float((best[..., 0] - best[..., 1]).min()) > 1e-5 * float(best.abs().max())


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_those_of_the_original(kind: str, backend: str, ours: list[str]) -> None:
    theirs = qwen(**KINDS[kind])
    hf = copy.deepcopy(theirs)
    accelerate(hf, backend)
    for batch, tokens in ((1, 1), (3, 63), (1, 64), (3, 65), (1, 130)):
        prompt = prompt_of(batch, tokens)
        expected = theirs.generate(prompt, max_new_tokens=40, do_sample=False)
        got = hf.generate(prompt, max_new_tokens=40, do_sample=False)
        assert got.dtype == torch.int64
        assert torch.equal(got, expected)
        assert_clear(theirs, expected, tokens)
        assert all(len(row[tokens:].unique()) > 12 for row in expected), "not one token repeated"
    assert ours == [{"auto": PLAIN.__name__, "reference": "Eager"}[backend]] * 5


def test_fused_kernels_in_the_interpreter_give_the_same_tokens(ours: list[str]) -> None:
    pytest.importorskip("triton")
    theirs = qwen(hidden_size=32, intermediate_size=32, num_hidden_layers=1, vocab_size=50)
    hf = copy.deepcopy(theirs)
    record = accelerate(hf, "triton")
    assert record.swapped[0].backend == "triton"
    prompt = prompt_of(1, 63) % 50
    assert torch.equal(hf.generate(prompt, max_new_tokens=3), theirs.generate(prompt, max_new_tokens=3))
    assert ours == ["Fused"]


ENDS: dict[str, dict[str, Any]] = {
    "one": dict(ends=1),
    "a list": dict(ends=3),
    "padded with its own token": dict(ends=2, pad_token_id=4),
    "padded with 0": dict(ends=2, pad_token_id=0),
}


@pytest.mark.parametrize("where", ["arguments", "the model's configuration", "a configuration of the call"])
@pytest.mark.parametrize("case", ENDS)
def test_rows_end_where_the_original_ends_them(case: str, where: str, ours: list[str]) -> None:
    theirs, prompt = qwen(), prompt_of(3, 20)
    assert not bool(((prompt == 0) | (prompt == 4)).any()), "or they would count as padding"
    free = theirs.generate(prompt, **GREEDY)[:, 20:]
    options = dict(ENDS[case])
    ends = [int(free[b, 2 + 3 * b]) for b in range(options.pop("ends"))]  # rows end at different times, or never
    options["eos_token_id"] = ends[0] if case == "one" else ends
    hf = copy.deepcopy(theirs)
    for model in (theirs, hf):
        if where == "the model's configuration":
            model.generation_config.update(**options)
    record = accelerate(hf)
    call: dict[str, Any] = dict(GREEDY)
    if where == "arguments":
        call |= options
    if where == "a configuration of the call":
        call = dict(generation_config=GenerationConfig(**GREEDY, **options))
    expected = theirs.generate(prompt, **call)
    assert torch.equal(hf.generate(prompt, **call), expected)
    assert len(record.swapped) == len(ours) == 1
    assert not torch.equal(expected[:, 20:], free[:, : expected.shape[1] - 20]), "or nothing ended"


def test_it_stops_when_the_last_row_has_ended(ours: list[str]) -> None:
    theirs, prompt = qwen(), prompt_of(3, 20)
    free = theirs.generate(prompt, max_new_tokens=40)[:, 20:]
    ends = [int(free[b, 4 * b + 1]) for b in range(3)]
    hf, asked = copy.deepcopy(theirs), []
    accelerate(hf)
    real = PLAIN.logits

    def counting(self: Any, x: Tensor, step: Any) -> Tensor:
        asked.append(x.shape[1])
        return real(self, x, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PLAIN, "logits", counting)
        got = hf.generate(prompt, max_new_tokens=40, eos_token_id=ends)
    expected = theirs.generate(prompt, max_new_tokens=40, eos_token_id=ends)
    assert torch.equal(got, expected)
    new = expected.shape[1] - 20
    assert new < 12
    assert asked == [20] + [1] * (new - 1)


def test_a_gpu_that_looks_seldom_ends_at_the_same_token(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs, prompt = qwen(), prompt_of(2, 20)
    free = theirs.generate(prompt, max_new_tokens=40)[:, 20:]
    ends = [int(free[0, 3]), int(free[1, 5])]
    hf = copy.deepcopy(theirs)
    accelerate(hf)
    real = plain.generate

    def seldom(runner: Any, codes: Tensor, k: int, stop: Any) -> Tensor:
        stop.every = 16
        out = real(runner, codes, k, stop)
        assert out.shape[1] == 16
        return out

    monkeypatch.setattr(plain, "generate", seldom)
    call = dict(max_new_tokens=40, eos_token_id=ends, pad_token_id=7)
    assert torch.equal(hf.generate(prompt, **call), theirs.generate(prompt, **call))


LENGTHS: dict[str, dict[str, Any]] = {
    "max_length": dict(max_length=29),
    "both": dict(max_length=29, max_new_tokens=5),
    "one": dict(max_new_tokens=1),
    "a configuration": dict(generation_config=GenerationConfig(max_length=25)),
    "a configuration and arguments": dict(generation_config=GenerationConfig(max_length=25), max_new_tokens=3),
}


@pytest.mark.parametrize("case", LENGTHS)
def test_lengths_are_obeyed(case: str, ours: list[str]) -> None:
    theirs, prompt = qwen(), prompt_of(2, 20)
    hf = copy.deepcopy(theirs)
    accelerate(hf)
    assert torch.equal(hf.generate(prompt, **LENGTHS[case]), theirs.generate(prompt, **LENGTHS[case]))
    assert len(ours) == 1
