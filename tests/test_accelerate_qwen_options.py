"""Options of an accelerated Qwen3's ``generate``: what is not plain greedy is the original's to answer."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from qwen_cases import GREEDY, note_ways, prompt_of, qwen
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList
from transformers.generation import MaxLengthCriteria, StoppingCriteriaList, TemperatureLogitsWarper, TextStreamer

from flexlam_fast.accelerate import accelerate


@pytest.fixture
def ours(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The ways that generated, in order."""
    return note_ways(monkeypatch)


HARMLESS: dict[str, dict[str, Any]] = {
    "mask of ones": dict(attention_mask=torch.ones(2, 20, dtype=torch.int64)),
    "bool mask": dict(attention_mask=torch.ones(2, 20, dtype=torch.bool)),
    "sampling options without sampling": dict(temperature=0.6, top_k=20, top_p=0.95),
    "options that are off": dict(num_beams=1, output_scores=False, return_dict_in_generate=False, synced_gpus=False),
    "nothing": dict(logits_processor=None, streamer=None, past_key_values=None),
    "repetition penalty of 1": dict(repetition_penalty=1.0, no_repeat_ngram_size=0),
    "pad token that is not there": dict(pad_token_id=4),
}


@pytest.mark.parametrize("case", HARMLESS)
def test_options_that_say_nothing_are_no_obstacle(case: str, ours: list[str]) -> None:
    theirs, prompt = qwen(), prompt_of(2, 20)
    assert not bool((prompt == 4).any())
    hf = copy.deepcopy(theirs)
    accelerate(hf)
    expected = theirs.generate(prompt, **GREEDY, **HARMLESS[case])
    assert torch.equal(hf.generate(prompt, **GREEDY, **HARMLESS[case]), expected)
    assert torch.equal(hf.generate(input_ids=prompt, **GREEDY, **HARMLESS[case]), expected)
    assert len(ours) == 2


class Silent(TextStreamer):
    """Swallows tokens."""

    def __init__(self) -> None:
        pass

    def put(self, value: Tensor) -> None:
        pass

    def end(self) -> None:
        pass


OTHERS: dict[str, Callable[[], dict[str, Any]]] = {
    "sampling": lambda: dict(do_sample=True),
    "beams": lambda: dict(num_beams=2),
    "several returned": lambda: dict(num_beams=2, num_return_sequences=2),
    "min_new_tokens": lambda: dict(min_new_tokens=3, eos_token_id=5),
    "min_length": lambda: dict(min_length=30, eos_token_id=5),
    "repetition_penalty": lambda: dict(repetition_penalty=1.3),
    "no_repeat_ngram_size": lambda: dict(no_repeat_ngram_size=2),
    "encoder_repetition_penalty": lambda: dict(encoder_repetition_penalty=1.5),
    "suppress_tokens": lambda: dict(suppress_tokens=[3, 4]),
    "begin_suppress_tokens": lambda: dict(begin_suppress_tokens=[3]),
    "bad_words_ids": lambda: dict(bad_words_ids=[[5]]),
    "sequence_bias": lambda: dict(sequence_bias=[[[5], -3.0]]),
    "forced_eos_token_id": lambda: dict(forced_eos_token_id=7),
    "guidance_scale": lambda: dict(guidance_scale=1.5),
    "renormalize_logits": lambda: dict(renormalize_logits=True),
    "max_time": lambda: dict(max_time=100.0),
    "use_cache": lambda: dict(use_cache=False),
    "cache_implementation": lambda: dict(cache_implementation="static"),
    "dict": lambda: dict(return_dict_in_generate=True),
    "scores": lambda: dict(return_dict_in_generate=True, output_scores=True),
    "logits": lambda: dict(return_dict_in_generate=True, output_logits=True),
    "logits_processor": lambda: dict(logits_processor=LogitsProcessorList([TemperatureLogitsWarper(2.0)])),
    "stopping_criteria": lambda: dict(stopping_criteria=StoppingCriteriaList([MaxLengthCriteria(23)])),
    "prefix_allowed_tokens_fn": lambda: dict(prefix_allowed_tokens_fn=lambda batch, ids: [1, 2, 3]),
    "streamer": lambda: dict(streamer=Silent()),
    "assistant_model": lambda: dict(assistant_model=qwen(num_hidden_layers=1)),
    "prompt_lookup_num_tokens": lambda: dict(prompt_lookup_num_tokens=3),
    "position_ids": lambda: dict(position_ids=torch.arange(3, 23).unsqueeze(0)),
    "left padding": lambda: dict(attention_mask=(torch.arange(20) > 3).long().unsqueeze(0)),
    "padding that is inferred": lambda: dict(pad_token_id=int(prompt_of(1, 20)[0, 0])),
    "inputs_embeds": lambda: dict(inputs_embeds=torch.randn(1, 20, 64)),
    "an unknown option in a configuration": lambda: dict(
        generation_config=GenerationConfig(**GREEDY, brand_new_option=3), max_new_tokens=None, do_sample=None
    ),
}


@pytest.mark.parametrize("case", OTHERS)
def test_what_is_not_plain_greedy_is_the_originals_to_answer(case: str, ours: list[str]) -> None:
    theirs = qwen()
    hf = copy.deepcopy(theirs)
    record = accelerate(hf)
    options = {**GREEDY, **OTHERS[case]()}
    prompt = () if case == "inputs_embeds" else (prompt_of(1, 20),)
    if "streamer" in options and options.get("num_beams"):
        options.pop("num_beams")
    torch.manual_seed(1)
    expected = theirs.generate(*prompt, **options)
    torch.manual_seed(1)
    got = hf.generate(*prompt, **options)
    assert ours == []
    assert "a call went to the original: " in str(record)
    assert record.paused() == {}
    if not isinstance(got, Tensor):
        assert type(got) is type(expected)
        got, expected = got.sequences, expected.sequences
    assert torch.equal(got, expected)


@pytest.mark.parametrize(
    "prompt",
    [
        torch.zeros(2, 0, dtype=torch.int64),
        torch.zeros(4, dtype=torch.int64),
        torch.full((1, 4), 1000),
        torch.zeros(1, 4),
        [[1, 2]],
        None,
    ],
    ids=["empty", "one dimension", "beyond the vocabulary", "floats", "a list", "nothing"],
)
def test_wrong_prompts_fail_as_they_did(prompt: Any) -> None:
    theirs = qwen()
    hf = copy.deepcopy(theirs)
    accelerate(hf)
    with pytest.raises(Exception) as expected:  # noqa: PT011
        theirs.generate(prompt, **GREEDY)
    with pytest.raises(expected.type) as got:
        hf.generate(prompt, **GREEDY)
    assert str(got.value) == str(expected.value)


@pytest.mark.parametrize("options", [dict(max_length=20), dict(max_new_tokens=0), dict(max_new_tokens=3, nonsense=1)])
def test_wrong_options_fail_as_they_did(options: dict[str, Any]) -> None:
    theirs = qwen()
    hf = copy.deepcopy(theirs)
    accelerate(hf)
    with pytest.raises(ValueError) as expected:  # noqa: PT011
        theirs.generate(prompt_of(1, 20), **options)
    with pytest.raises(ValueError) as got:  # noqa: PT011
        hf.generate(prompt_of(1, 20), **options)
    assert str(got.value) == str(expected.value)


def test_the_default_length_is_the_originals_to_choose(ours: list[str]) -> None:
    theirs = qwen()
    hf = copy.deepcopy(theirs)
    accelerate(hf)
    assert torch.equal(hf.generate(prompt_of(1, 10)), theirs.generate(prompt_of(1, 10)))
    assert ours == []


def test_autocast_is_the_originals(ours: list[str]) -> None:
    hf = qwen()
    theirs = copy.deepcopy(hf)
    accelerate(hf)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(hf.generate(prompt_of(1, 20), **GREEDY), theirs.generate(prompt_of(1, 20), **GREEDY))
    assert ours == []


def test_hidden_states_asked_for_once_do_not_slow_it_for_good(ours: list[str]) -> None:
    hf, prompt = qwen(), prompt_of(1, 20)
    accelerate(hf)
    hf(prompt, output_hidden_states=True)
    hf.generate(prompt, **GREEDY)
    assert len(ours) == 1
