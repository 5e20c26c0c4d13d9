"""A small policy with clear choices, videos of noise, and a game played through; shared by the tests of policies."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from flexlam_fast.config import BottleneckConfig, DecoderConfig, EncoderConfig, FlexLAMConfig, SequenceConfig
from flexlam_fast.policy import Policy
from flexlam_fast.types import Decision

K, SIZE = 6, 16


def small(prefix: str = "uniform") -> FlexLAMConfig:
    return dataclasses.replace(
        FlexLAMConfig.preset("tiny"),
        frame=SIZE,
        bottleneck=BottleneckConfig(slots=K, prefix=prefix),
        encoder=EncoderConfig(depth=1, width=32, heads=2, mlp_ratio=2, patch=4),
        decoder=DecoderConfig(depth=1, heads=2, head_dim=16, ffn=32, patch=8, steps=2),
        sequence=SequenceConfig(
            hidden=32,
            intermediate=48,
            layers=2,
            heads=4,
            kv_heads=2,
            head_dim=8,
            patch=8,
            window=6,
            stride=4,
            places=True,
        ),
    )


def build(**how: Any) -> Policy:
    """A policy whose random weights tell codes and actions clearly apart."""
    policy = Policy(small(), **how)
    generator = torch.Generator().manual_seed(0)
    for name, p in policy.sequence.named_parameters():
        p.copy_(torch.randn(p.shape, generator=generator) * 0.3 + (1.0 if "norm" in name else 0.0))
    return policy


def video(steps: int, batch: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (steps, batch, SIZE, SIZE, 3), dtype=torch.uint8, generator=generator)


def play(
    policy: Policy, frames: Tensor, budgets: list[int], resets: dict[int, list[int]] | None = None
) -> list[Decision]:
    policy.reset(frames.shape[1])
    decisions = []
    for t, (frame, k) in enumerate(zip(frames, budgets, strict=True)):
        if resets and t in resets:
            policy.reset(sessions=resets[t])
        decisions.append(policy.act(frame, k))
    return decisions
