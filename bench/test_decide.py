"""One decision of the ``dmlab`` policy beside ``transformers`` Qwen3 of the same sizes and weights.

Ours is everything (paper B.6): host uint8 frame in, host action out, batch 1, a full window. The peer is its sequence
model alone: a 128-token append to 2,368 cached tokens, then k - 1 passes of one token.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from measure import in_turns
from rows import Results, Work
from torch import Tensor

from flexlam_fast.config import FlexLAMConfig
from flexlam_fast.layers import normalise
from flexlam_fast.policy import Policy
from flexlam_fast.sequence.layout import OBSERVATION, history_layout
from flexlam_fast.sequence.model import SequenceModel

transformers = pytest.importorskip("transformers")

CONTEXT, APPEND = 2496, 128
PEER = "transformers Qwen3"
BUDGETS = [pytest.param(k, id=f"decide/dmlab/b1/k{k}") for k in (4, 16, 64)]


class QwenPeer:
    """Greedy codes after an append, the way ``transformers`` does it with its own cache."""

    def __init__(self, cfg: FlexLAMConfig, device: torch.device) -> None:
        seq = cfg.sequence
        config = transformers.Qwen3Config(
            vocab_size=cfg.bottleneck.codebook_size,
            hidden_size=seq.hidden,
            intermediate_size=seq.intermediate,
            num_hidden_layers=seq.layers,
            num_attention_heads=seq.heads,
            num_key_value_heads=seq.kv_heads,
            head_dim=seq.head_dim,
            rms_norm_eps=seq.rms_eps,
            rope_parameters={"rope_type": "default", "rope_theta": seq.rope_theta},
            max_position_embeddings=4096,
            attn_implementation="sdpa",
        )
        torch.manual_seed(0)
        self.model = transformers.Qwen3ForCausalLM(config).eval().requires_grad_(False).to(device)
        for p in self.model.parameters():
            # wider than the usual start, so that the greedy codes are clear choices that vary
            torch.nn.init.normal_(
                p, mean=1.0 if p.dim() == 1 else 0.0, std=0.1 if p.dim() == 1 else p.shape[-1] ** -0.5
            )
        self.x = torch.randn(1, CONTEXT, seq.hidden, generator=torch.Generator().manual_seed(0)).to(device)
        self.cache = transformers.DynamicCache(config=config)
        self.past = CONTEXT - APPEND
        with torch.inference_mode():
            self.model(
                inputs_embeds=self.x[:, : self.past], past_key_values=self.cache, use_cache=True, logits_to_keep=1
            )

    @torch.inference_mode()
    def decide(self, k: int) -> Tensor:
        """Drop what the last call added to the cache, append, and generate ``k`` codes ``[1, k]``."""
        added = self.cache.get_seq_length() - self.past
        if added:
            self.cache.crop(-added)
        step: dict[str, Any] = {"inputs_embeds": self.x[:, self.past :]}
        chosen = []
        for _ in range(k):
            out = self.model(**step, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
            chosen.append(out.logits[:, -1:].argmax(-1))
            step = {"input_ids": chosen[-1]}
        return torch.cat(chosen, dim=1).cpu()


class Bench(NamedTuple):
    """A policy with a full window, whose sequence model has the peer's weights, and a frame to act on."""

    policy: Policy
    peer: QwenPeer
    frame: Tensor


@pytest.fixture(scope="module")
def bench(results: Results) -> Bench:
    cfg = FlexLAMConfig.preset("dmlab")
    peer = QwenPeer(cfg, results.device)
    policy = Policy(cfg, device=results.device)
    policy.sequence.load_state_dict(SequenceModel.from_qwen3(peer.model).state_dict())
    frames = torch.randint(0, 256, (42, 1, 64, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    check_same_model(policy, peer)
    check_decision(policy, frames)
    return Bench(policy, peer, frames[-1])


@torch.no_grad()
def check_same_model(policy: Policy, peer: QwenPeer) -> None:
    """Both sequence models give the same codes after the peer's context, ours without any cache."""
    expected = peer.decide(4).to(policy.device)
    tail = policy.sequence.embed_codes(expected[:, :-1], torch.arange(3, device=policy.device))
    x = torch.cat([peer.x, tail], dim=1)
    logits = policy.sequence.logits(policy.sequence(x, torch.arange(x.shape[1], device=policy.device))[:, -4:])
    assert torch.equal(logits.argmax(-1), expected)


@torch.no_grad()
def check_decision(policy: Policy, frames: Tensor) -> None:
    """64 codes with a full window equal those of the dense mask over the whole history."""
    policy.reset()
    for frame in frames[:-1]:
        policy.act(frame, 1)
    codes = policy.act(frames[-1], 64).codes.to(policy.device)
    pixels, device = normalise(frames[:, 0].to(policy.device)), policy.device
    blocks = policy.lam.encode(pixels[:-1], pixels[1:])
    layout = history_layout(policy.cfg, len(frames), 0, "last")
    parts = []
    for s in layout.segments:
        block = codes[:, : s.length] if s.scratch else blocks[s.frame : s.frame + 1] if s.frame < len(blocks) else codes
        slots = torch.arange(s.length, device=device)
        seen = policy.sequence.embed_frames(pixels[s.frame : s.frame + 1]) if s.kind == OBSERVATION else None
        parts.append(policy.sequence.embed_codes(block, slots) if seen is None else seen)
    hidden = policy.sequence(torch.cat(parts, dim=1), layout.positions.to(device), layout.mask.to(device))
    logits = policy.sequence.logits(hidden[0, layout.source[-64:].to(device)])
    assert int(layout.mask[layout.source[-64]].sum()) == CONTEXT
    best = logits.topk(2).values
    clear = best[:, 0] - best[:, 1] > 1e-3 * best[:, 0].abs()
    assert int(clear.sum()) >= 56
    assert torch.equal(logits.argmax(-1)[clear], codes[0].long()[clear])


def least_work(model: SequenceModel, k: int) -> Work:
    """What the sequence model cannot help but do for ``k`` codes.

    Each pass reads the weights of blocks and head, and the keys and values of the context; every token that enters
    meets the blocks' weights and the context, every code the head.
    """
    seq, weight = model.cfg.sequence, model.head.weight
    blocks = sum(p.numel() for p in (*model.blocks.parameters(), *model.norm.parameters()))
    read = blocks + weight.numel() + 2 * CONTEXT * seq.layers * seq.kv_heads * seq.head_dim
    entering = APPEND + k - 1
    operations = entering * (2 * blocks + 4 * CONTEXT * seq.layers * seq.heads * seq.head_dim) + 2 * k * weight.numel()
    return Work(k * read * weight.element_size(), operations, weight.dtype)


@pytest.mark.parametrize("k", BUDGETS)
def test_decide(
    benchmark: Any, request: pytest.FixtureRequest, results: Results, rounds: int, bench: Bench, k: int
) -> None:
    ours, peer = lambda: bench.policy.act(bench.frame, k), lambda: bench.peer.decide(k)
    timing = in_turns(benchmark, ours, {PEER: peer}, results.machine.wall, rounds)
    note = (
        f"fp32, {torch.get_num_threads()} threads, backend {bench.policy.backend.name}; ours is a whole decision, "
        "uint8 frame in, action out; the peer is its sequence model alone, "
        f"{APPEND} tokens appended to make {CONTEXT}; the floor is that of the sequence model alone: weights, keys and "
        "values read once per code, or every product done once"
    )
    work = least_work(bench.policy.sequence, k)
    results.add(benchmark, request.node.callspec.id, timing, work, note, memory_bound=False)
