"""What computes something else than a plain Qwen3 is left, with the reason, and obeyed if changed later."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from qwen_cases import GREEDY, KINDS, QWEN, note_ways, prompt_of, qwen
from torch import nn
from transformers import Qwen3Config, Qwen3ForCausalLM

from flexlam_fast.accelerate import accelerate
from flexlam_fast.accelerate_qwen import obstacle


@pytest.fixture
def ours(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The ways that generated, in order."""
    return note_ways(monkeypatch)


class Mine(Qwen3ForCausalLM):
    """A user's own model."""


def hooked(hf: Any) -> None:
    hf.model.layers[1].mlp.register_forward_hook(lambda m, args, out: out * 2)


def padded_vocabulary(hf: Any) -> None:
    hf.lm_head = nn.Linear(64, 1008, bias=False)


CHANGES: dict[str, tuple[Callable[[Any], object], str]] = {
    "hook": (hooked, "model.layers.1.mlp: its hooks would not fire"),
    "forward": (
        lambda hf: setattr(hf.model.norm, "forward", lambda x: x * 2),
        "model.norm: its forward was replaced on the object",
    ),
    "another head": (padded_vocabulary, "lm_head: expected weights [1000, 64], got [1008, 64]"),
    "bias": (
        lambda hf: setattr(hf.model.layers[0].mlp, "down_proj", nn.Linear(96, 64)),
        "model.layers.0.mlp.down_proj: it has a bias or a max_norm",
    ),
    "another module": (
        lambda hf: setattr(hf.model.layers[0].mlp, "act_fn", nn.GELU()),
        "model.layers.0.mlp.act_fn: GELU is no part of a plain Qwen3 and may compute something else",
    ),
    "epsilon": (
        lambda hf: setattr(hf.model.layers[0].input_layernorm, "variance_epsilon", 0.1),
        "model.layers.0.input_layernorm: its variance_epsilon is 0.1, not 1e-06",
    ),
    "scaling": (
        lambda hf: setattr(hf.model.layers[2].self_attn, "scaling", 0.5),
        "model.layers.2.self_attn: its scaling is 0.5, not 0.25",
    ),
    "window": (
        lambda hf: setattr(hf.model.layers[2].self_attn, "sliding_window", 8),
        "model.layers.2.self_attn: it has a sliding window",
    ),
    "fewer layers": (
        lambda hf: setattr(hf.model, "layers", hf.model.layers[:2]),
        "it has 2 layers, and its configuration says 3",
    ),
    "dropout": (
        lambda hf: setattr(hf.train().model.layers[1].self_attn, "attention_dropout", 0.5),
        "model.layers.1.self_attn: its attention_dropout is 0.5, and it is in training mode",
    ),
    "frequencies": (
        lambda hf: hf.model.rotary_emb.inv_freq.mul_(0.5),
        "model.rotary_emb: its inv_freq are not those of theta 10000",
    ),
    "another dtype": (
        lambda hf: hf.model.layers[0].to(torch.float64),
        "model.layers.0.self_attn.q_proj: its weights are torch.float64 on cpu, those of the head torch.float32 on cpu",
    ),
    "attention": (
        lambda hf: setattr(hf.config, "_attn_implementation_internal", "mine"),
        "its attention is 'mine', which may compute something else",
    ),
}


@pytest.mark.parametrize("case", CHANGES)
def test_what_computes_something_else_is_left_with_the_reason(case: str) -> None:
    hf = qwen()
    change, sentence = CHANGES[case]
    change(hf)
    record = accelerate(nn.ModuleDict({"lam": hf}))
    assert record.swapped == ()
    assert [(part.path, part.kind, part.backend) for part in record.left] == [("lam", "Qwen3ForCausalLM", None)]
    assert record.left[0].reason.startswith(sentence)
    assert "\n" not in record.left[0].reason
    assert type(hf) is Qwen3ForCausalLM


@pytest.mark.parametrize("case", sorted(set(CHANGES) - {"another dtype", "another head", "attention"}))
def test_what_is_changed_later_is_obeyed(case: str, ours: list[str]) -> None:
    theirs, prompt = qwen(), prompt_of(1, 20)
    hf = copy.deepcopy(theirs)
    accelerate(hf)
    before = hf.generate(prompt, **GREEDY)
    outcomes = []
    for model in (theirs, hf):
        torch.manual_seed(3)
        CHANGES[case][0](model)
        try:
            outcomes.append(model.generate(prompt, **GREEDY))
        except Exception as error:
            outcomes.append(str(error))
    assert len(ours) == 1
    one, other = outcomes
    assert one == other if isinstance(one, str) else torch.equal(one, other)
    assert case in ("window", "fewer layers") or not isinstance(one, str)
    assert isinstance(one, str) or case == "window" or not torch.equal(one, before), "or the change was none"


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (dict(attention_bias=True), "got ['biases']"),
        (dict(use_sliding_window=True, sliding_window=8, max_window_layers=1), "got ['sliding windows']"),
        (dict(rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}), "got ['scaled RoPE']"),
        (dict(hidden_act="gelu"), "got gelu"),
    ],
)
def test_other_qwen3s_are_left_with_the_reason(changes: dict[str, Any], sentence: str) -> None:
    hf = Qwen3ForCausalLM(Qwen3Config(**{**QWEN, **changes}))
    (part,) = accelerate(hf).left
    assert part.reason.startswith("hf_model: expected silu without biases")
    assert part.reason.endswith(sentence)
    assert type(hf) is Qwen3ForCausalLM


def test_a_subclass_and_the_meta_device_are_left() -> None:
    mine = Mine(Qwen3Config(**QWEN))
    assert accelerate(mine).left[0].reason == "Mine is a subclass of Qwen3ForCausalLM and may compute something else"
    with torch.device("meta"):
        empty = Qwen3ForCausalLM(Qwen3Config(**QWEN))
    assert accelerate(empty).left[0].reason.startswith("it is on the meta device")


def test_a_plain_qwen3_has_no_obstacle() -> None:
    assert all(obstacle(qwen(**changes)) is None for changes in KINDS.values())
