"""Configurations of a few tokens and random Qwen3 models; shared by the tests of the sequence model."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from flexlam_fast.config import BottleneckConfig, FlexLAMConfig, SequenceConfig

QWEN: dict[str, Any] = dict(
    vocab_size=1000, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, head_dim=16
)


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
