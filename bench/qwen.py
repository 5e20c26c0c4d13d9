"""``transformers`` Qwen3 of a preset's sizes as a peer: its own cache, and a static one under ``torch.compile``."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor

from flexlam_fast.config import FlexLAMConfig

CONTEXT, APPEND = 2496, 128
EAGER, STATIC = "transformers Qwen3", "transformers Qwen3, static cache, torch.compile"


def qwen_of(cfg: FlexLAMConfig, device: torch.device, dtype: torch.dtype) -> Any:
    """A Qwen3 of the preset's sizes whose greedy codes are clear choices that vary."""
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
    model = transformers.Qwen3ForCausalLM(config).eval().requires_grad_(False)
    for p in model.parameters():
        # wider than the usual start, for the sake of those clear choices
        torch.nn.init.normal_(p, mean=1.0 if p.dim() == 1 else 0.0, std=0.1 if p.dim() == 1 else p.shape[-1] ** -0.5)
    return cast(model, device, dtype)


def cast(model: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """Move and cast as ``from_pretrained(dtype=)`` would: ``.to()`` alone rounds the frequencies of RoPE as well."""
    frequencies = model.model.rotary_emb.inv_freq.clone()
    model = model.to(device, dtype)
    model.model.rotary_emb.inv_freq = frequencies.to(device)
    return model


class QwenPeer:
    """Greedy codes after an append, the way ``transformers`` does it with a cache of its own.

    Args:
        model: from :func:`qwen_of`.
        batch: sessions.
    """

    def __init__(self, model: Any, batch: int = 1) -> None:
        self.model, self.past = model, CONTEXT - APPEND
        hidden, weight = model.config.hidden_size, model.lm_head.weight
        x = torch.randn(batch, CONTEXT, hidden, generator=torch.Generator().manual_seed(0))
        self.x = x.to(weight.device, weight.dtype)
        self.cache = self.new_cache()
        with torch.inference_mode():
            self.fill()

    def new_cache(self) -> Any:
        """An empty cache."""
        return transformers.DynamicCache(config=self.model.config)

    def fill(self) -> None:
        """Put the past into the cache, 256 tokens at a time, so that many sessions fit."""
        for start in range(0, self.past, 256):
            x = self.x[:, start : min(start + 256, self.past)]
            self.model(inputs_embeds=x, past_key_values=self.cache, use_cache=True, logits_to_keep=1)

    def rewind(self) -> None:
        """Drop what the last call added."""
        added = self.cache.get_seq_length() - self.past
        if added:
            self.cache.crop(-added)

    def step(self, **tokens: Tensor) -> Tensor:
        """Greedy codes ``[B, 1]`` after some tokens."""
        out = self.model(**tokens, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        chosen: Tensor = out.logits[:, -1:].argmax(-1)
        return chosen

    @torch.inference_mode()
    def decide(self, k: int) -> Tensor:
        """Append, and generate ``k`` codes ``[B, k]``."""
        self.rewind()
        chosen = [self.step(inputs_embeds=self.x[:, self.past :])]
        for _ in range(k - 1):
            chosen.append(self.step(input_ids=chosen[-1]))
        return torch.cat(chosen, dim=1).cpu()


class StaticPeer(QwenPeer):
    """The same with a static cache, one code a call of a step compiled with CUDA graphs (``reduce-overhead``)."""

    def __init__(self, model: Any, batch: int = 1) -> None:
        self.compiled = torch.compile(self.one, mode="reduce-overhead", dynamic=False)
        super().__init__(model, batch)
        self.positions = torch.arange(CONTEXT, CONTEXT + 64, device=self.x.device).view(-1, 1, 1)

    def new_cache(self) -> Any:
        return transformers.StaticCache(config=self.model.config, max_cache_len=CONTEXT + 64)

    def rewind(self) -> None:
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(self.past)

    def one(self, code: Tensor, position: Tensor) -> Tensor:
        """The next code after ``code [B, 1]`` at ``position [1, 1]``."""
        return self.step(input_ids=code, position_ids=position)

    @torch.inference_mode()
    def decide(self, k: int) -> Tensor:
        self.rewind()
        chosen = [self.step(inputs_embeds=self.x[:, self.past :])]
        for j in range(k - 1):
            torch.compiler.cudagraph_mark_step_begin()
            # a copy, because the next replay writes into the same memory
            chosen.append(self.compiled(chosen[-1], self.positions[j]).clone())
        return torch.cat(chosen, dim=1).cpu()
