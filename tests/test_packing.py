"""Training windows as packed rows: their masks are causal, nothing is padded, and the loss is that of dense windows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from sequence_cases import shaped
from torch import Tensor

from flexlam_fast.config import FlexLAMConfig
from flexlam_fast.errors import InputError
from flexlam_fast.ops.loss import cross_entropy
from flexlam_fast.ops.rotary import qk_norm_rope
from flexlam_fast.ops.varlen import varlen_attention
from flexlam_fast.sequence.layout import CODES, OBSERVATION, history_layout
from flexlam_fast.sequence.model import SequenceModel, rotation
from flexlam_fast.sequence.packing import Packed, Packer, is_causal
from flexlam_fast.testing import GRADIENT_FACTOR, assert_within_budget
from flexlam_fast.train.sequence import IGNORE, embed


def packer(cfg: FlexLAMConfig) -> Packer:
    return Packer([history_layout(cfg, cfg.sequence.window, p, "last") for p in range(cfg.sequence.stride)])


def test_dmlabs_windows_are_causal_at_every_phase_and_length() -> None:
    cfg = FlexLAMConfig.preset("dmlab")
    assert (cfg.sequence.window, cfg.sequence.stride, cfg.sequence.decisions) == (34, 8, "last")
    for phase in range(8):
        whole = history_layout(cfg, 34, phase)
        assert is_causal(whole), phase
        for frames in (1, 2, 9, 33):  # as windows of their own
            assert is_causal(history_layout(cfg, frames, phase)), (phase, frames)
    assert not is_causal(history_layout(cfg, 35, 0))  # the first page has been dropped


def test_what_is_not_causal_is_recognised_and_refused() -> None:
    tiny = FlexLAMConfig.preset("tiny")
    every = [history_layout(tiny, tiny.sequence.window, p) for p in range(tiny.sequence.stride)]
    assert tiny.sequence.decisions == "all"
    assert not any(is_causal(layout) for layout in every)
    with pytest.raises(InputError, match="^layouts: expected causal masks, got another at phase 0$"):
        Packer(every)
    good = history_layout(tiny, tiny.sequence.window, 1, "last")
    mask = good.mask.clone()
    mask[5, 2] = False
    assert is_causal(good)
    assert not is_causal(good._replace(mask=mask))
    assert not is_causal(good._replace(positions=good.positions + 1))


def test_dmlabs_windows_carry_what_the_dense_rows_carry() -> None:
    """Every phase and length: the tokens, in order, are those of the dense row that some counted code depends on."""
    cfg = FlexLAMConfig.preset("dmlab")
    pack = packer(cfg)
    for phase, layout in enumerate(pack.layouts):
        where = [(s.kind, s.frame, i) for s in layout.segments for i in range(s.length)]
        for frames in range(1, 35):
            p = pack([phase], [frames])
            counts = layout.frame < frames
            n = int(layout.source[counts].max()) + 1
            assert (p.lengths, p.longest, p.starts.tolist()) == ((n,), n, [0, n])
            assert torch.equal(p.positions, torch.arange(n))
            assert torch.equal(p.source, layout.source[counts])
            assert torch.equal(p.slot, layout.slot[counts])
            assert places(p, cfg) == [(0, *w) for w in where[:n]]
            named = [(int(p.blocks[t // 64, 1]), t % 64) for t in p.target.tolist()]
            assert named == list(zip(layout.frame[counts].tolist(), layout.slot[counts].tolist(), strict=True))
    whole = pack([3], [34])
    assert len(whole.observed) <= 6, "of 34 frames"


def places(p: Packed, cfg: FlexLAMConfig) -> list[tuple[int, int, int, int]]:
    """Of every token its window, kind, frame, and which element of its block it is."""
    patches, slots = cfg.tokens_per_frame, cfg.bottleneck.slots
    border, out = len(p.observed) * patches, []
    for t in p.tokens.tolist():
        kind, size = (OBSERVATION, patches) if t < border else (CODES, slots)
        at = t if t < border else t - border
        window, frame = (p.observed if t < border else p.blocks)[at // size].tolist()
        out.append((window, kind, frame, at % size))
    return out


@settings(max_examples=40)
@given(
    st.integers(2, 7), st.integers(1, 4), st.integers(1, 4), st.integers(1, 2),
    st.lists(st.tuples(st.integers(0, 3), st.integers(1, 7)), min_size=1, max_size=6),
)  # fmt: skip
def test_any_batch_is_its_windows_side_by_side(
    window: int, stride: int, slots: int, side: int, chosen: list[tuple[int, int]]
) -> None:
    cfg = shaped(slots, side, window, stride)
    pack = packer(cfg)
    phases, frames = [p % stride for p, _ in chosen], [min(n, window) for _, n in chosen]
    p = pack(phases, frames)
    assert list(p.lengths) == sorted(p.lengths, reverse=True)
    assert p.starts.diff().tolist() == list(p.lengths)
    assert (p.starts.dtype, p.longest, sum(p.lengths)) == (torch.int32, max(p.lengths), len(p.tokens))
    assert len(set(p.tokens.tolist())) == len(p.tokens), "a gather whose gradient adds nothing up"
    found, asked = places(p, cfg), {}
    for source, target, slot in zip(p.source.tolist(), p.target.tolist(), p.slot.tolist(), strict=True):
        b, frame = p.blocks[target // slots].tolist()
        assert target % slots == slot
        assert found[source][0] == b
        asked.setdefault(b, set()).add((frame, slot, found[source][1:]))
    for b, (phase, n) in enumerate(zip(phases, frames, strict=True)):
        alone = pack([phase], [n])
        own = [place[1:] for place in found if place[0] == b]
        assert own == [place[1:] for place in places(alone, cfg)]
        one = places(alone, cfg)
        expected = {
            (int(alone.blocks[t // slots, 1]), t % slots, one[s][1:])
            for s, t in zip(alone.source.tolist(), alone.target.tolist(), strict=True)
        }
        assert asked.get(b, set()) == expected


CFG = shaped(6, 2, 9, 4, heads=4, kv_heads=2, head_dim=8, places=True)
PHASES, FRAMES = [2, 0, 3, 1, 2, 3], [9, 4, 9, 1, 9, 7]


def batch(dtype: torch.dtype = torch.float32) -> tuple[SequenceModel, Tensor, Tensor]:
    torch.manual_seed(0)
    model = SequenceModel(CFG).to(dtype)
    for p in model.parameters():  # from their start hardly anything attends to anything
        p.data += 0.2 * torch.randn_like(p)
    pixels = torch.rand(len(PHASES), 9, CFG.channels, CFG.frame, CFG.frame).to(dtype) * 2 - 1
    return model, pixels, torch.randint(0, CFG.bottleneck.codebook_size, (len(PHASES), 9, 6))


def dense_loss(weights: dict[str, Tensor], pixels: Tensor, codes: Tensor) -> Tensor:
    """As the stage of training has it: whole windows, one phase after another, a mask, and targets that are ignored."""
    model = SequenceModel(CFG).to(pixels.dtype)
    logits, targets = [], []
    for b, (phase, frames) in enumerate(zip(PHASES, FRAMES, strict=True)):
        layout = history_layout(CFG, 9, phase, "last")

        def forward(layout: Any, *args: Tensor) -> Tensor:
            hidden = model(embed(model, layout, *args), layout.positions, layout.mask)
            return model.logits(hidden[:, layout.source])

        called = _Called(model, forward)
        logits.append(torch.func.functional_call(called, weights, (layout, pixels[b : b + 1], codes[b : b + 1]))[0])
        inside = layout.frame < frames
        targets.append(codes[b, layout.frame, layout.slot].masked_fill(~inside, IGNORE))
    return F.cross_entropy(torch.cat(logits), torch.cat(targets), ignore_index=IGNORE).to(pixels.dtype)


class _Called(torch.nn.Module):
    """A model whose forward is another function of its parameters."""

    def __init__(self, model: SequenceModel, run: Any) -> None:
        super().__init__()
        self.model, self.run = model, run

    def forward(self, *args: Any) -> Any:
        return self.run(*args)


def packed_loss(model: SequenceModel, pixels: Tensor, codes: Tensor, p: Packed) -> Tensor:
    """The ops put together: nothing but tokens that are there, and the model's own weights."""
    seq = CFG.sequence
    observed = model.embed_frames(pixels[p.observed[:, 0], p.observed[:, 1]]).flatten(0, 1)
    blocks = codes[p.blocks[:, 0], p.blocks[:, 1]]
    x = torch.cat([observed, model.embed_codes(blocks, torch.arange(6)).flatten(0, 1)])[p.tokens]
    r = rotation(p.positions, seq.head_dim, seq.rope_theta)
    cos, sin = (t[0, 0] for t in r)
    for block in model.blocks:
        y = block.norm1(x)
        q, k, v = (f(y).unflatten(-1, (-1, seq.head_dim)) for f in (block.q, block.k, block.v))
        weights = block.q_norm.weight, block.k_norm.weight
        q, k = qk_norm_rope(q[None], k[None], *weights, cos, sin, seq.rms_eps, dtype=v.dtype)
        attended = varlen_attention(q[0], k[0], v, p.starts, p.longest, lengths=p.lengths)
        x = x + block.out(attended.flatten(1))
        y = block.norm2(x)
        x = x + block.down(F.silu(block.gate(y)) * block.up(y))
    return cross_entropy(model.logits(model.norm(x)[p.source]), blocks.flatten()[p.target])


def test_the_loss_and_its_gradients_are_those_of_dense_windows() -> None:
    model, pixels, codes = batch()
    p = packer(CFG)(PHASES, FRAMES)
    dense_tokens = sum(len(history_layout(CFG, 9, phase, "last").positions) for phase in PHASES)
    assert len(p.tokens) < 0.8 * dense_tokens
    loss = packed_loss(model, pixels, codes, p)
    weights = {f"model.{name}": w for name, w in model.named_parameters()}
    report = assert_within_budget(loss, dense_loss, weights, pixels, codes, working_dtype=torch.float32, name="loss")
    assert report.max_budget < 1e-5
    grads = torch.autograd.grad(loss, list(model.parameters()))

    def gradient(name: str, weights: dict[str, Tensor], *args: Tensor) -> Tensor:
        leaves = {n: w.detach().clone().requires_grad_() for n, w in weights.items()}
        return torch.autograd.grad(dense_loss(leaves, *args), leaves[name])[0]

    for (name, _), grad in zip(model.named_parameters(), grads, strict=True):
        if name in ("codes.weight", "observe.weight", "slot_place", "blocks.0.q.weight", "blocks.1.v.weight"):
            args = f"model.{name}", weights, pixels, codes
            assert_within_budget(grad, gradient, *args, working_dtype=torch.float32, factor=GRADIENT_FACTOR, name=name)


def test_moving_keeps_everything() -> None:
    p = packer(CFG)(PHASES, FRAMES)
    moved = p.to("cpu")
    assert (moved.lengths, moved.longest) == (p.lengths, p.longest)
    assert all(torch.equal(a, b) for a, b in zip(moved[:8], p[:8], strict=True))
    assert p.to("meta").starts.device.type == "meta"


def test_bad_batches_get_one_sentence() -> None:
    pack = packer(CFG)
    for phases, frames, sentence in (
        ([0, 1], [9], r"frames: expected one number for each of 2 windows, got 1"),
        ([], [], r"frames: expected one number for each of 0 windows, got 0"),
        ([4], [9], r"phases: expected 0\.\.3, got \[4\]"),
        ([0, 1], [9, 0], r"frames: expected 1\.\.9, got \[9, 0\]"),
        ([0], [10], r"frames: expected 1\.\.9, got \[10\]"),
    ):
        with pytest.raises(InputError, match=f"^{sentence}$"):
            pack(phases, frames)
