"""Whatever number or name the public API is given: the right result, or one sentence of a FlexLAMError."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small import small_config

import flexlam_fast as ff
from flexlam_fast.errors import FlexLAMError

#: What a careless caller may hand over; none of it is large and valid, so that nothing here takes long.
ODD = st.one_of(
    st.sampled_from(
        [math.nan, math.inf, -math.inf, -1, 0, -0.0, 0.5, -0.5, 10**9, 10**30, -(10**30), 1e300, 2**63, True, None]
    ),
    st.sampled_from(["", "1", "nan", "auto", b"1", [], (), [1], [0.5], {}, object(), 1j, np.float64("nan")]),
    st.sampled_from([np.int64(2), np.bool_(True), np.array([1, 2]), np.array(2.5), torch.tensor(2), torch.tensor([])]),
    st.integers(1, 4),
)
CFG = small_config()
DRAW = torch.Generator().manual_seed(0)
FRAMES = torch.randint(0, 256, (1, 16, 16, 3), generator=DRAW, dtype=torch.uint8)
X, ROW, WIDE = torch.randn(2, 6, 32, generator=DRAW), torch.ones(32), torch.randn(64, 32, generator=DRAW)
HEADS, PAGES = torch.randn(1, 4, 2, 16, generator=DRAW), torch.randn(2, 4, 1, 16, generator=DRAW)
QKV, ROWS = torch.randn(1, 2, 64, generator=DRAW), torch.tensor([[0, 1]])
LOGITS, SEED = torch.randn(2, 10, generator=DRAW), torch.tensor([1, 2])
LEVELS, NULL, Z = (5, 4), torch.tensor([0.1, 0.2]), torch.randn(1, 4, 2, generator=DRAW)
CODES = torch.tensor([[1, 2, 3, 4]])
NOISE, TAU = torch.randn(1, 768, generator=DRAW), torch.tensor([0.5])
PATCHES = torch.randn(1, 4, 192, generator=DRAW)


def objects() -> tuple[ff.Policy, ff.LatentActionModel, ff.SequenceModel]:
    torch.manual_seed(0)
    return ff.Policy(CFG), ff.LatentActionModel(CFG), ff.SequenceModel(CFG)


POLICY, LAM, MODEL = objects()
LATENTS = LAM.latents(CODES, 2).detach()
DECISION = POLICY.act(FRAMES, budget=2)


def fresh(**how: Any) -> Any:
    """Start over, so that no odd call leaves something behind for the next one."""
    POLICY.reset(**{"batch_size": 1, **how})
    return POLICY.cache.opened


#: name -> a call with one argument open.
CALLS: dict[str, Callable[[Any], Any]] = {
    "Policy seed": lambda v: ff.Policy(CFG, seed=v),
    "Policy dtype": lambda v: ff.Policy(CFG, dtype=v),
    "Policy pages": lambda v: ff.Policy(CFG, pages=v),
    "Policy device": lambda v: ff.Policy(CFG, device=v),
    "Policy backend": lambda v: ff.Policy(CFG, backend=v),
    "Policy attention": lambda v: ff.Policy(CFG, attention=v),
    "Policy cfg": lambda v: ff.Policy(v),
    "Policy.from_pretrained": lambda v: ff.Policy.from_pretrained(v),
    "reset batch_size": lambda v: fresh(batch_size=v),
    "reset capacity": lambda v: fresh(capacity=v),
    "reset seed": lambda v: fresh(seed=v),
    "reset sessions": lambda v: fresh(sessions=v),
    "open": lambda v: (fresh(capacity=3), POLICY.open(v)),
    "close": lambda v: (fresh(), POLICY.close(v)),
    "act frames": lambda v: (fresh(), POLICY.act(v, budget=1)),
    "act budget": lambda v: (fresh(), POLICY.act(FRAMES, budget=v)),
    "act deadline": lambda v: (fresh(), POLICY.act(FRAMES, deadline_ms=v)),
    "act temperature": lambda v: (fresh(), POLICY.act(FRAMES, budget=2, temperature=v)),
    "act top_k": lambda v: (fresh(), POLICY.act(FRAMES, budget=2, temperature=1.0, top_k=v)),
    "act sessions": lambda v: (fresh(), POLICY.act(FRAMES, budget=1, sessions=v)),
    "warmup budgets": lambda v: (fresh(), POLICY.warmup(v, warm=0, rounds=1)),
    "warmup batch_size": lambda v: (fresh(), POLICY.warmup([1], batch_size=v, warm=0, rounds=1)),
    "warmup warm": lambda v: (fresh(), POLICY.warmup([1], warm=min(v, 3) if type(v) is int else v, rounds=1)),
    "warmup rounds": lambda v: (fresh(), POLICY.warmup([1], warm=0, rounds=v)),
    "imagine steps": lambda v: POLICY.imagine(DECISION, steps=v),
    "encode": lambda v: LAM.encode(FRAMES, v),
    "latents codes": lambda v: LAM.latents(v, 2),
    "latents k": lambda v: LAM.latents(CODES, v),
    "decode latents": lambda v: LAM.decode(FRAMES, v),
    "decode steps": lambda v: LAM.decode(FRAMES, LATENTS, steps=v),
    "generate codes": lambda v: MODEL.generate(v, 2),
    "generate k": lambda v: MODEL.generate(CODES, v),
    "from_qwen3": lambda v: ff.SequenceModel.from_qwen3(v),
    "accelerate": lambda v: ff.accelerate(v),
    "accelerate backend": lambda v: ff.accelerate(torch.nn.Linear(2, 2), backend=v),
    "warmup temperature": lambda v: POLICY.warmup([1], warm=0, rounds=1, temperature=v),
    "warmup top_k": lambda v: POLICY.warmup([1], warm=0, rounds=1, top_k=v),
    "set_ranges": lambda v: (ff.set_ranges(v), ff.set_ranges(0)),
    "preset": lambda v: ff.FlexLAMConfig.preset(v),
    "from_json": lambda v: ff.FlexLAMConfig.from_json(v),
    "fsq levels": lambda v: ff.ops.fsq(Z, v),
    "fsq a level": lambda v: ff.ops.fsq(Z, (5, v)),
    "fsq keep": lambda v: ff.ops.fsq(Z, LEVELS, v, NULL),
    "fsq backend": lambda v: ff.ops.fsq(Z, LEVELS, backend=v),
    "fsq_sample weights": lambda v: ff.ops.fsq_sample(Z, LEVELS, NULL, SEED, v),
    "fsq_sample a weight": lambda v: ff.ops.fsq_sample(Z, LEVELS, NULL, SEED, [1, 1, 1, 1, v]),
    "codes_to_latents": lambda v: ff.ops.codes_to_latents(v, LEVELS),
    "norm_linear eps": lambda v: ff.ops.norm_linear(X, ROW, WIDE, v),
    "norm_swiglu eps": lambda v: ff.ops.norm_swiglu(X, ROW, WIDE, v),
    "linear_add": lambda v: ff.ops.linear_add(X, WIDE, v),
    "write_pages theta": lambda v: ff.ops.write_pages(
        QKV, ROW[:16], ROW[:16], ROWS, ROWS, PAGES.clone(), PAGES.clone(), theta=v, eps=1e-6
    ),
    "write_pages eps": lambda v: ff.ops.write_pages(
        QKV, ROW[:16], ROW[:16], ROWS, ROWS, PAGES.clone(), PAGES.clone(), theta=1e4, eps=v
    ),
    "choose_codes temperature": lambda v: ff.ops.choose_codes(LOGITS, v, None, SEED),
    "choose_codes top_k": lambda v: ff.ops.choose_codes(LOGITS, 1.0, v, SEED),
    "attention": lambda v: ff.ops.attention(HEADS, HEADS, HEADS, implementation=v),
    "self_attention scale": lambda v: ff.ops.self_attention(HEADS, HEADS, HEADS, scale=v),
    "self_attention mask": lambda v: ff.ops.self_attention(HEADS, HEADS, HEADS, mask=v),
    "self_attention backend": lambda v: ff.ops.self_attention(HEADS, HEADS, HEADS, backend=v),
    "varlen longest": lambda v: ff.ops.varlen_attention(
        HEADS[0], HEADS[0], HEADS[0], torch.tensor([0, 4], dtype=torch.int32), v
    ),
    "varlen lengths": lambda v: ff.ops.varlen_attention(
        HEADS[0], HEADS[0], HEADS[0], torch.tensor([0, 4], dtype=torch.int32), 4, lengths=v
    ),
    "cross_entropy ignore_index": lambda v: ff.ops.cross_entropy(LOGITS, torch.tensor([1, 2]), ignore_index=v),
    "flow_loss predict": lambda v: ff.ops.flow_loss(PATCHES, FRAMES, FRAMES, NOISE, TAU, predict=v),
    "flow_loss floor": lambda v: ff.ops.flow_loss(PATCHES, FRAMES, FRAMES, NOISE, TAU, predict="frame", floor=v),
    "frame_patches patch": lambda v: ff.ops.frame_patches(FRAMES, v),
    "frame_patches dtype": lambda v: ff.ops.frame_patches(FRAMES, 8, dtype=v),
    "tubelets gain": lambda v: ff.ops.tubelets(FRAMES, FRAMES, 8, v),
    "adaln eps": lambda v: ff.ops.adaln(X, ROW, ROW, eps=v),
    "adaln dtype": lambda v: ff.ops.adaln(X, ROW, ROW, dtype=v),
    "layer_norm eps": lambda v: ff.ops.layer_norm(X, ROW, ROW, eps=v),
    "rms_norm eps": lambda v: ff.ops.rms_norm(X, ROW, v),
    "gate_add": lambda v: ff.ops.gate_add(X, X, v),
    "gelu": lambda v: ff.ops.gelu(v),
    "gelu backend": lambda v: ff.ops.gelu(X, backend=v),
    "qk_norm_rope eps": lambda v: ff.ops.qk_norm_rope(
        HEADS, HEADS, ROW[:16], ROW[:16], torch.ones(4, 16), torch.ones(4, 16), v
    ),
    "draw_normal count": lambda v: ff.ops.draw_normal(SEED, SEED, v),
    "draw_uniform": lambda v: ff.ops.draw_uniform(SEED, v),
    "pack_translator": lambda v: ff.ops.pack_translator(v),
}
# valid, but of a length that nobody would wait for, or more memory than there is
LONG = {"generate k", "draw_normal count", "decode steps", "imagine steps", "warmup rounds"}


@pytest.mark.parametrize("name", CALLS)
@given(value=ODD)
@settings(max_examples=30)
def test_a_call_is_right_or_one_sentence(name: str, value: Any) -> None:
    if name in LONG and type(value) is int and value >= 10**9:
        return
    try:
        result = CALLS[name](value)
    except FlexLAMError as error:
        message = str(error)
    else:
        numbers = [t for t in tensors(result) if t.is_floating_point()]
        assert all(bool(torch.isfinite(t).all()) for t in numbers)
        return
    assert ": expected" in message
    assert "\n" not in message


def tensors(result: Any) -> list[torch.Tensor]:
    if isinstance(result, torch.Tensor):
        return [result]
    return [t for part in result for t in tensors(part)] if isinstance(result, tuple | list) else []
