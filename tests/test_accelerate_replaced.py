"""Functions of another library that somebody has replaced: the original answers, and the record names them."""

from __future__ import annotations

import copy
import sys
from typing import Any

import pytest
import torch
import transformers.models.qwen3.modeling_qwen3 as qwen_home
from accelerate_cases import L, assert_same
from qwen_cases import note_ways, prompt_of, qwen
from state_cases import halved, replaced
from torch import nn
from transformers import DynamicCache, Qwen3ForCausalLM, activations
from transformers.generation.utils import GenerationMixin
from transformers.integrations import sdpa_attention

from flexlam_fast import qwen_obstacles
from flexlam_fast.accelerate import accelerate

vector_quantize = pytest.importorskip("vector_quantize_pytorch")
FSQ = vector_quantize.FSQ
fsq_home = vector_quantize.finite_scalar_quantization

Z = torch.randn(3, 50, 4, generator=torch.Generator().manual_seed(0))
GREEDY: dict[str, Any] = dict(max_new_tokens=4, do_sample=False)
OF_FSQ = [
    (FSQ, "forward"), (FSQ, "quantize"), (FSQ, "bound"), (FSQ, "codes_to_indices"), (FSQ, "_scale_and_shift"),
    (fsq_home, "round_ste"), (fsq_home, "tanh"), (fsq_home, "atanh"), (fsq_home, "rearrange"),
]  # fmt: skip
OF_QWEN = [
    *((getattr(qwen_home, f"Qwen3{name}"), "forward") for name in (
        "MLP", "Attention", "RMSNorm", "DecoderLayer", "Model", "RotaryEmbedding", "ForCausalLM",
    )),
    *((Qwen3ForCausalLM, name) for name in ("generate", "_sample", "prepare_inputs_for_generation", "__call__")),
    *((GenerationMixin, name) for name in ("generate", "_sample", "_get_logits_processor")),
    (nn.Linear, "forward"), (nn.Embedding, "forward"), (activations.SiLUActivation, "forward"),
    (nn.Module, "_call_impl"), (DynamicCache, "update"), (DynamicCache, "get_seq_length"),
    *((nn.functional, name) for name in ("linear", "silu", "embedding", "scaled_dot_product_attention")),
    *((qwen_home, name) for name in ("rotate_half", "apply_rotary_pos_emb", "create_causal_mask")),
    (torch, "rsqrt"), (sdpa_attention, "repeat_kv"), (qwen_home.ALL_ATTENTION_FUNCTIONS, "sdpa"),
    (sys.modules.get("transformers.masking_utils"), "causal_mask_function"),
]  # fmt: skip
# the oldest supported release makes its masks in another way
OF_QWEN = [
    (holder, name) for holder, name in OF_QWEN if holder is qwen_home.ALL_ATTENTION_FUNCTIONS or hasattr(holder, name)
]


def label(place: Any) -> str:
    holder, name = place
    return f"{getattr(holder, '__name__', type(holder).__name__).rpartition('.')[2]}.{name}"


@pytest.mark.parametrize("place", OF_FSQ, ids=label)
def test_a_replaced_function_of_an_fsq_is_used(place: tuple[Any, str]) -> None:
    holder, name = place
    theirs = FSQ(L)
    later, earlier = copy.deepcopy(theirs), copy.deepcopy(theirs)
    record, before = accelerate(later), theirs(Z)
    with replaced(holder, name, halved(getattr(holder, name))):
        expected = theirs(Z)
        sentence = f"{holder.__name__}.{name} was replaced by halved.half of state_cases"
        assert record.paused() == {"": sentence}
        assert f"  paused   the FSQ itself  FSQ: {sentence}" in str(record)
        assert [part.reason for part in accelerate(earlier).left] == [sentence]
        for ours in (later, earlier):
            assert_same(ours(Z), expected)
    assert not all(torch.equal(a, b) for a, b in zip(before, expected, strict=True))
    assert record.paused() == {}
    assert_same(later(Z), before)


def test_a_replaced_function_of_an_fsq_is_used_by_what_was_compiled_before() -> None:
    fsq = FSQ(L)
    theirs = copy.deepcopy(fsq)
    accelerate(fsq)
    torch.compiler.reset()
    compiled = torch.compile(fsq, backend="eager", fullgraph=True)
    assert_same(compiled(Z), theirs(Z))
    for holder, name in ((FSQ, "bound"), (fsq_home, "round_ste")):
        with replaced(holder, name, halved(getattr(holder, name))):
            assert_same(compiled(Z), theirs(Z))


@pytest.mark.parametrize("place", OF_QWEN, ids=label)
def test_a_replaced_function_of_a_qwen3_is_used(place: tuple[Any, str], monkeypatch: pytest.MonkeyPatch) -> None:
    holder, name = place
    theirs, prompt = qwen(num_hidden_layers=1), prompt_of(1, 20)
    later, earlier = copy.deepcopy(theirs), copy.deepcopy(theirs)
    record = accelerate(later)
    ways, before = note_ways(monkeypatch), theirs.generate(prompt, **GREEDY)
    old = holder[name] if holder is qwen_home.ALL_ATTENTION_FUNCTIONS else getattr(holder, name)
    with replaced(holder, name, halved(old)):
        expected = theirs.generate(prompt, **GREEDY)
        (sentence,) = record.paused().values()
        assert sentence.endswith(f"{name} was replaced by halved.half of state_cases") or "['sdpa']" in sentence
        assert [part.reason for part in accelerate(earlier).left] == [sentence]
        for hf in (later, earlier):
            assert torch.equal(hf.generate(prompt, **GREEDY), expected)
    assert ways == []
    assert record.paused() == {}
    assert torch.equal(later.generate(prompt, **GREEDY), before)
    assert len(ways) == 1


def test_attention_that_is_registered_under_the_name_eager_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs, prompt = qwen(num_hidden_layers=1), prompt_of(1, 20)
    theirs.config._attn_implementation = "eager"
    hf = copy.deepcopy(theirs)
    accelerate(hf)
    ways, table = note_ways(monkeypatch), qwen_home.ALL_ATTENTION_FUNCTIONS
    hf.generate(prompt, **GREEDY)
    with replaced(table, "eager", halved(qwen_home.eager_attention_forward)):
        expected = theirs.generate(prompt, **GREEDY)
        assert torch.equal(hf.generate(prompt, **GREEDY), expected)
    assert len(ways) == 1
    with replaced(qwen_home, "eager_attention_forward", halved(qwen_home.eager_attention_forward)):
        assert torch.equal(hf.generate(prompt, **GREEDY), theirs.generate(prompt, **GREEDY))
    assert len(ways) == 1


def test_a_class_of_another_library_in_the_place_of_one_of_a_qwen3_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    class Qwen3MLP(qwen_home.Qwen3MLP):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * 0.5

    plain = qwen(num_hidden_layers=1)
    assert len(accelerate(copy.deepcopy(plain)).swapped) == 1
    Qwen3MLP.__qualname__ = "Qwen3MLP"
    monkeypatch.setattr(qwen_home, "Qwen3MLP", Qwen3MLP)  # as libraries of kernels do before a model is made
    theirs, prompt = qwen(num_hidden_layers=1), prompt_of(1, 20)
    hf = copy.deepcopy(theirs)
    (part,) = accelerate(hf).left
    assert part.reason.startswith("transformers.models.qwen3.modeling_qwen3.Qwen3MLP was replaced by Qwen3MLP of test_")
    assert torch.equal(hf.generate(prompt, **GREEDY), theirs.generate(prompt, **GREEDY))
    monkeypatch.undo()
    assert len(accelerate(plain).swapped) == 1, "that is over"


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [
        ("MLP", "act_fn", staticmethod(nn.functional.gelu)),
        ("RMSNorm", "variance_epsilon", property(lambda self: 1.0)),
        ("Attention", "is_causal", False),
        ("MLP", "__getattribute__", lambda self, name: object.__getattribute__(self, name)),
    ],
)
def test_what_a_class_puts_before_its_objects_own_is_obeyed(
    kind: str, name: str, value: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs, prompt = qwen(num_hidden_layers=1), prompt_of(1, 20)
    hf = copy.deepcopy(theirs)
    record, ways = accelerate(hf), note_ways(monkeypatch)
    with replaced(getattr(qwen_home, f"Qwen3{kind}"), name, value):
        assert torch.equal(hf.generate(prompt, **GREEDY), theirs.generate(prompt, **GREEDY))
        assert f"{name} was replaced" in record.paused()[""]
    assert ways == []


def test_what_is_new_on_a_class_and_nobody_calls_is_no_obstacle() -> None:
    hf = qwen(num_hidden_layers=1)
    record = accelerate(hf)
    with replaced(qwen_home.Qwen3MLP, "describe", lambda self: "an MLP"), replaced(FSQ, "describe", lambda self: "FSQ"):
        with replaced(GenerationMixin, "stream", lambda self, *args: None):
            qwen_obstacles._watch.cache_clear()  # so that it looks at everything anew
            assert record.paused() == {}
            assert len(accelerate(qwen(num_hidden_layers=1)).swapped) == 1
        assert accelerate(FSQ(L)).left == ()
