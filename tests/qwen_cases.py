"""Random Qwen3 models with clear greedy tokens, and prompts; shared by the tests of accelerating them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Qwen3Config, Qwen3ForCausalLM

from flexlam_fast.sequence import plain

QWEN: dict[str, Any] = dict(
    vocab_size=1000, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, head_dim=16,
    num_key_value_heads=2, max_position_embeddings=4096,
)  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "groups of 1": dict(num_key_value_heads=4),
    "groups of 2": dict(rms_norm_eps=1e-5),
    "groups of 4, tied": dict(num_key_value_heads=1, head_dim=24, tie_word_embeddings=True),
    "theta 1e6": dict(rope_parameters={"rope_type": "default", "rope_theta": 1e6}, hidden_size=40),
    "large vocabulary": dict(vocab_size=20_000, num_hidden_layers=1),
}
GREEDY: dict[str, Any] = dict(max_new_tokens=12, do_sample=False)


def qwen(**changes: Any) -> Any:
    """A random Qwen3 whose greedy tokens are clear choices that vary."""
    torch.manual_seed(0)
    hf = Qwen3ForCausalLM(Qwen3Config(**{**QWEN, **changes})).eval()
    for name, p in hf.named_parameters():
        wide = p.dim() > 1
        gain = 1.0 if "embed" in name else 2.0
        nn.init.normal_(p, mean=0.0 if wide else 1.0, std=gain * p.shape[-1] ** -0.5 if wide else 0.2)
    return hf


def prompt_of(batch: int, tokens: int) -> Tensor:
    return torch.randint(0, 1000, (batch, tokens), generator=torch.Generator().manual_seed(tokens))


def note_ways(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The ways that generate from now on, in order."""
    seen: list[str] = []
    real = plain.generate

    def noting(runner: Any, *args: Any) -> Tensor:
        seen.append(type(runner).__name__)
        return real(runner, *args)

    monkeypatch.setattr(plain, "generate", noting)
    return seen
