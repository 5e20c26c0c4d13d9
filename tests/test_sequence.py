"""Sequence model: the window rule as a mask, ``transformers`` Qwen3 as the outside oracle, and exact RoPE."""

from __future__ import annotations

import dataclasses
import importlib
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from flexlam_fast.config import BottleneckConfig, FlexLAMConfig, SequenceConfig
from flexlam_fast.errors import BudgetError, InputError
from flexlam_fast.sequence.layout import CODES, OBSERVATION, Layout, Placed, context, history_layout
from flexlam_fast.sequence.model import SequenceModel, rotate, rotation
from flexlam_fast.testing import assert_within_budget


def rule(t: int, window: int, stride: int) -> list[tuple[int, int]]:
    """Design section 3, word for word: the segments ``(s, kind)`` of the decision at ``t``, in time order."""
    first = t - (window - 1)
    observations = {(s, OBSERVATION) for s in range(t) if s % stride == 0 and first <= s < t}
    codes = {(s, CODES) for s in range(t) if first <= s < t}
    return [*sorted(observations | codes), (t, OBSERVATION)]


def shaped(slots: int, side: int, window: int, stride: int, **more: Any) -> FlexLAMConfig:
    """A configuration with ``side * side`` tokens per frame."""
    sequence: dict[str, Any] = dict(hidden=16, intermediate=32, layers=2, heads=2, kv_heads=2, head_dim=8, patch=8)
    tiny = FlexLAMConfig.preset("tiny")
    return dataclasses.replace(
        tiny,
        frame=8 * side,
        bottleneck=BottleneckConfig(slots=slots),
        encoder=dataclasses.replace(tiny.encoder, patch=8),
        sequence=SequenceConfig(**{**sequence, "window": window, "stride": stride, **more}),
    )


def attended(layout: Layout, token: int) -> set[tuple[int, int, bool]]:
    """Segments ``(frame, kind, scratch)`` that a token attends to, each wholly or, for its own, up to itself."""
    row, found = layout.mask[token], set()
    for s in layout.segments:
        part = row[s.start : s.start + s.length]
        own = s.start <= token < s.start + s.length
        if own:
            assert part.tolist() == [s.start + j <= token for j in range(s.length)], "causal within a segment"
        elif part.any():
            assert part.all(), "a segment is in context wholly or not at all"
        if own or part.any():
            found.add((s.frame, s.kind, s.scratch))
    return found


def in_window(s: Placed, entered: int, window: int, stride: int, phase: int) -> set[tuple[int, int, bool]]:
    """What ``s`` must attend to by the rule: the context at the decision it entered at, up to itself in time."""
    seen = {(f - phase, kind, False) for f, kind in rule(entered + phase, window, stride) if f >= phase}
    return {x for x in seen if (x[0], x[1]) < (s.frame, s.kind)} | {(s.frame, s.kind, s.scratch)}


@settings(max_examples=120, deadline=None)
@given(
    st.integers(2, 9), st.integers(1, 6), st.integers(1, 5), st.integers(1, 2), st.integers(1, 30),
    st.integers(0, 5), st.sampled_from(["all", "last"]),
)  # fmt: skip
def test_every_token_attends_to_exactly_its_context(
    window: int, stride: int, slots: int, side: int, frames: int, phase: int, decisions: str
) -> None:
    phase %= stride
    cfg = shaped(slots, side, window, stride)
    layout = history_layout(cfg, frames, phase, decisions)
    patches = side * side
    chosen = range(frames) if decisions == "all" else [frames - 1]
    blocks = {(s.frame, s.kind, s.scratch) for s in layout.segments}
    expected = {(i, OBSERVATION, False) for i in range(frames) if (phase + i) % stride == 0 or i in chosen}
    expected |= {(i, CODES, False) for i in range(frames - 1)}
    expected |= {(i, CODES, True) for i in chosen if slots > 1}
    assert blocks == expected
    assert len(layout.segments) == len(blocks)
    assert sum(s.length for s in layout.segments) == len(layout.positions) == len(layout.mask)
    for s in layout.segments:
        # an observation enters when it is seen, codes when the next frame has come, scratch codes at their own decision
        entered = s.frame if s.kind == OBSERVATION or s.scratch else s.frame + 1
        for token in (s.start, s.start + s.length - 1):
            assert attended(layout, token) == in_window(s, entered, window, stride, phase)
        assert s.length == (patches if s.kind == OBSERVATION else slots - 1 if s.scratch else slots)


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 9), st.integers(1, 6), st.integers(1, 5), st.integers(1, 20), st.integers(0, 5))
def test_positions_count_persistent_tokens_and_only_grow(
    window: int, stride: int, slots: int, frames: int, phase: int
) -> None:
    phase %= stride
    cfg = shaped(slots, 2, window, stride)
    layout = history_layout(cfg, frames, phase, "all")
    place = {
        (s.frame, s.kind, s.scratch): layout.positions[s.start : s.start + s.length].tolist() for s in layout.segments
    }
    count = 0  # of persistent tokens, as a session would count them
    for t in range(frames):
        if t:
            assert place[t - 1, CODES, False] == list(range(count, count + slots))
            count += slots
        assert place[t, OBSERVATION, False] == list(range(count, count + 4))
        after = count + 4
        if slots > 1:
            assert place[t, CODES, True] == list(range(after, after + slots - 1))
        count = after if (phase + t) % stride == 0 else count


@pytest.mark.parametrize("decisions", ["all", "last"])
@pytest.mark.parametrize(
    ("window", "stride", "slots", "phase"), [(8, 4, 5, 0), (8, 4, 5, 3), (5, 2, 1, 1), (3, 7, 2, 2)]
)
def test_every_code_is_predicted_once_by_the_token_before_it(
    window: int, stride: int, slots: int, phase: int, decisions: str
) -> None:
    frames = 2 * window + 1
    layout = history_layout(shaped(slots, 2, window, stride), frames, phase, decisions)
    asked = list(zip(layout.frame.tolist(), layout.slot.tolist(), strict=True))
    assert len(set(asked)) == len(asked)
    missing = {(i, j) for i in range(frames) for j in range(slots)} - set(asked)
    # nothing stands before the first block of a window that starts off the grid
    assert missing == ({(0, 0)} if decisions == "last" and phase else set())
    places = {(s.frame, s.kind, s.scratch): s for s in layout.segments}
    for source, (i, j) in zip(layout.source.tolist(), asked, strict=True):
        now = decisions == "all" or i == frames - 1
        if now and j == 0:
            o = places[i, OBSERVATION, False]
            assert source == o.start + o.length - 1
        elif now:
            assert source == places[i, CODES, True].start + j - 1
        elif j:
            assert source == places[i, CODES, False].start + j - 1
        else:
            assert int(layout.positions[source]) + 1 == places[i, CODES, False].position
            assert not layout.segments[
                [s.start <= source < s.start + s.length for s in layout.segments].index(True)
            ].scratch


def test_context_is_the_rule_and_dmlab_has_39_segments_of_2496_tokens() -> None:
    for window, stride in [(34, 8), (8, 4), (7, 3), (2, 1), (3, 9)]:
        for t in range(120):
            assert [(s.frame, s.kind) for s in context(t, window, stride)] == rule(t, window, stride)
    cfg = FlexLAMConfig.preset("dmlab")
    most = max(len(context(t, 34, 8)) for t in range(34, 200))
    assert most == 39
    for t in (33, 41, 57):
        layout = history_layout(cfg, t + 1, 0, "last")
        newest = next(s for s in layout.segments if (s.frame, s.kind) == (t, OBSERVATION))
        last = newest.start + newest.length - 1
        assert attended(layout, last) == {(s, kind, False) for s, kind in rule(t, 34, 8)}
        assert len(attended(layout, last)) == 39
        assert int(layout.mask[last].sum()) == 2496
        own = [s for s in layout.segments if s.scratch]
        assert [(s.frame, s.length) for s in own] == [(t, 63)]


QWEN: dict[str, Any] = dict(
    vocab_size=1000, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, head_dim=16
)
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


def qwen(**changes: Any) -> Any:
    """A random Qwen3 whose weights are large enough for its greedy codes to vary."""
    torch.manual_seed(0)
    hf = Qwen3ForCausalLM(Qwen3Config(**{**QWEN, "max_position_embeddings": 4096, **changes})).eval()
    for name, p in hf.named_parameters():
        gain = 1.0 if "embed" in name else 2.0
        torch.nn.init.normal_(
            p, mean=1.0 if p.dim() == 1 else 0.0, std=0.2 if p.dim() == 1 else gain * p.shape[-1] ** -0.5
        )
    return hf


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


def test_angles_at_a_hundred_million_are_as_exact_as_at_one() -> None:
    mp = importlib.import_module("mpmath")
    mp.mp.dps = 40
    positions = [0, 1, 2**24 + 1, 10**8, 10**8 + 1, 10**9 + 7]
    r = rotation(torch.tensor(positions), 64, 1e4)
    assert r.cos.dtype == torch.float32
    assert r.cos.shape == (1, 1, len(positions), 64)
    for row, p in enumerate(positions):
        for i in range(32):
            angle = p * mp.mpf(10000) ** (-mp.mpf(2 * i) / 64)
            for channel in (i, i + 32):
                assert abs(float(r.cos[0, 0, row, channel]) - float(mp.cos(angle))) < 3e-7
                assert abs(float(r.sin[0, 0, row, channel]) - float(mp.sin(angle))) < 3e-7


def test_attention_scores_depend_on_distance_alone_at_any_position() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(1, 2, 50, 64, generator=generator), torch.randn(1, 2, 50, 64, generator=generator)

    def scores(start: int) -> Tensor:
        r = rotation(torch.arange(start, start + 50), 64, 1e4)
        return rotate(q, r).double() @ rotate(k, r).double().transpose(2, 3)

    near = scores(0)
    for start in (1, 4097, 10**8, 10**8 + 12345):
        assert float((scores(start) - near).abs().max()) < 1e-5
    assert float((scores(0) - q.double() @ k.double().transpose(2, 3)).abs().max()) > 1.0


def test_hidden_states_do_not_drift_with_the_position() -> None:
    model = SequenceModel.from_qwen3(qwen(num_key_value_heads=2))
    codes = torch.randint(0, 1000, (1, 60), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        x = model.embed_codes(codes, torch.arange(60))
        near = model(x, torch.arange(60))
        far = model(x, torch.arange(60) + 10**8)
    assert float((far - near).abs().max()) < 1e-4 * float(near.abs().max())


def test_rotation_takes_positions_of_each_session() -> None:
    positions = torch.tensor([[0, 5, 9], [7, 8, 100]])
    r = rotation(positions, 8, 1e4)
    assert r.cos.shape == (2, 1, 3, 8)
    for b in range(2):
        alone = rotation(positions[b], 8, 1e4)
        assert torch.equal(r.sin[b], alone.sin[0])


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
