"""Sequence model: ``transformers`` Qwen3 as the outside oracle, and what is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sequence_cases import QWEN, qwen, shaped
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from flexlam_fast.errors import BudgetError, InputError
from flexlam_fast.sequence.model import SequenceModel
from flexlam_fast.testing import assert_within_budget

KINDS: dict[str, dict[str, Any]] = {
    "mha": dict(num_key_value_heads=4),
    "gqa": dict(num_key_value_heads=2, rms_norm_eps=1e-5, tie_word_embeddings=False),
    "mqa": dict(num_key_value_heads=1, head_dim=24, rope_parameters={"rope_type": "default", "rope_theta": 1e6}),
    "tied": dict(num_key_value_heads=4, tie_word_embeddings=True),
    "dmlab": dict(
        hidden_size=256, intermediate_size=1024, num_hidden_layers=12, num_key_value_heads=4, head_dim=64,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    ),
}  # fmt: skip


def exact_qwen3(hf: Any, w: dict[str, Tensor], codes: Tensor) -> Tensor:
    """Logits of Qwen3 written out plainly in fp64, rounding nothing on the way."""
    c = hf.config
    n, groups = codes.shape[1], c.num_attention_heads // c.num_key_value_heads
    inverse = c.rope_parameters["rope_theta"] ** -(torch.arange(0, c.head_dim, 2).double() / c.head_dim)
    angle = torch.arange(n).double()[:, None] * inverse
    cos, sin = angle.cos(), angle.sin()

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return weight * x / (x.square().mean(-1, keepdim=True) + c.rms_norm_eps).sqrt()

    def turn(x: Tensor) -> Tensor:
        a, b = x[..., : c.head_dim // 2], x[..., c.head_dim // 2 :]
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)

    x = w["model.embed_tokens.weight"][codes]
    for i in range(c.num_hidden_layers):
        p = {
            k.removeprefix(f"model.layers.{i}.").removesuffix(".weight"): v
            for k, v in w.items()
            if f".layers.{i}." in k
        }
        y = norm(x, p["input_layernorm"])
        q, k, v = ((y @ p[f"self_attn.{a}_proj"].T).view(*y.shape[:2], -1, c.head_dim).transpose(1, 2) for a in "qkv")
        q, k = turn(norm(q, p["self_attn.q_norm"])), turn(norm(k, p["self_attn.k_norm"]))
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        scores = q @ k.transpose(2, 3) / math.sqrt(c.head_dim) + torch.full((n, n), -torch.inf).triu(1)
        x = x + (scores.softmax(-1) @ v).transpose(1, 2).flatten(2) @ p["self_attn.o_proj"].T
        y = norm(x, p["post_attention_layernorm"])
        x = x + (F.silu(y @ p["mlp.gate_proj"].T) * (y @ p["mlp.up_proj"].T)) @ p["mlp.down_proj"].T
    return norm(x, w["model.norm.weight"]) @ w.get("lm_head.weight", w["model.embed_tokens.weight"]).T


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_logits_equal_those_of_qwen3(kind: str) -> None:
    hf = qwen(**KINDS[kind])
    model = SequenceModel.from_qwen3(hf)
    weights = dict(hf.named_parameters())
    codes = torch.randint(0, 1000, (2, 150), generator=torch.Generator().manual_seed(0))

    def logits(w: dict[str, Tensor], codes: Tensor) -> Tensor:
        if w["model.norm.weight"].dtype == torch.float64:
            return exact_qwen3(hf, w, codes)
        return torch.func.functional_call(hf, w, (codes,)).logits

    positions = torch.arange(150)
    ours = model.logits(model(model.embed_codes(codes, positions), positions))
    assert_within_budget(ours, logits, weights, codes, working_dtype=torch.float32, name="logits")
    double = model.double()
    exact = double.logits(double(double.embed_codes(codes, positions), positions))
    assert exact.dtype == torch.float64
    expected = exact_qwen3(hf, {name: t.double() for name, t in weights.items()}, codes)
    assert float((exact - expected).abs().max()) < 1e-10 * float(expected.abs().max())


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_64_greedy_codes_are_those_of_qwen3(kind: str) -> None:
    hf = qwen(**KINDS[kind])
    model = SequenceModel.from_qwen3(hf)
    codes = torch.randint(0, 1000, (1 if kind == "dmlab" else 3, 40), generator=torch.Generator().manual_seed(1))
    expected = hf.generate(
        codes,
        attention_mask=torch.ones_like(codes),
        max_new_tokens=64,
        min_new_tokens=64,
        do_sample=False,
        pad_token_id=0,
    )[:, 40:]
    ours = model.generate(codes, 64)
    assert ours.dtype == torch.int32
    assert torch.equal(ours, expected.to(torch.int32))
    assert all(len(row.unique()) > 20 for row in ours), "the comparison should not be of one code repeated"


def test_generation_equals_recomputing_everything_at_each_code() -> None:
    torch.manual_seed(0)
    cfg = shaped(5, 2, 4, 2, kv_heads=1, places=True)
    model = SequenceModel(cfg).double().eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    codes = torch.randint(0, 1000, (2, 1))
    with torch.no_grad():
        for _ in range(13):
            positions = torch.arange(codes.shape[1])
            hidden = model(model.embed_codes(codes, positions % 5), positions)
            codes = torch.cat([codes, model.logits(hidden[:, -1:]).argmax(-1)], dim=1)
    assert torch.equal(model.generate(codes[:, :1], 13), codes[:, 1:].to(torch.int32))
    assert torch.equal(model.generate(codes[:, :7], 7), codes[:, 7:].to(torch.int32))


@pytest.mark.parametrize(
    ("codes", "k", "kind", "sentence"),
    [
        (torch.zeros(2, 0, dtype=torch.int64), 3, InputError, r"^codes: expected at least one code in 0\.\.999"),
        (torch.full((1, 3), 1000), 3, InputError, r"^codes: expected at least one code in 0\.\.999"),
        (torch.full((1, 3), -1), 3, InputError, r"^codes: expected at least one code in 0\.\.999"),
        (torch.zeros(3).long(), 3, InputError, r"^codes: expected \[B,N\] int32 or int64, got \[3\] int64 cpu$"),
        (torch.zeros(1, 3), 3, InputError, r"^codes: expected \[B,N\] int32 or int64, got \[1,3\] float32 cpu$"),
        (torch.zeros(1, 3, dtype=torch.int64), 0, BudgetError, r"^k: expected an integer in 1\.\.\d+, got 0$"),
    ],
)  # fmt: skip
def test_generate_refuses_in_one_sentence(codes: Tensor, k: int, kind: type[Exception], sentence: str) -> None:
    model = SequenceModel(shaped(5, 2, 4, 2))
    with pytest.raises(kind, match=sentence):
        model.generate(codes, k)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (dict(attention_bias=True), "biases"),
        (dict(use_sliding_window=True, sliding_window=8, max_window_layers=1), "sliding windows"),
        (dict(rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}), "scaled RoPE"),
        (dict(hidden_act="gelu"), "gelu"),
    ],
)
def test_another_qwen3_is_refused_in_one_sentence(changes: dict[str, Any], sentence: str) -> None:
    hf = Qwen3ForCausalLM(Qwen3Config(**{**QWEN, "num_key_value_heads": 4, **changes}))
    with pytest.raises(InputError, match=f"^hf_model: expected silu without biases, .*, got .*{sentence}"):
        SequenceModel.from_qwen3(hf)


def test_another_kind_of_model_is_refused_in_one_sentence() -> None:
    llama = LlamaConfig(vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    with pytest.raises(InputError, match="^hf_model: expected a Qwen3 model, got 'llama'$"):
        SequenceModel.from_qwen3(LlamaForCausalLM(llama))
    with pytest.raises(InputError, match="^hf_model: expected a transformers Qwen3ForCausalLM, got Linear$"):
        SequenceModel.from_qwen3(torch.nn.Linear(2, 2))
