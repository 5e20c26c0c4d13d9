"""A model and a data set so small that a whole training takes a second; shared by the tests of training."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from flexlam_fast.config import (
    BottleneckConfig,
    DecoderConfig,
    EncoderConfig,
    FlexLAMConfig,
    SequenceConfig,
    TranslatorConfig,
)
from flexlam_fast.data.store import EpisodeWriter

NAMES = ("STAY", "LEFT", "RIGHT")


def small_config(**bottleneck: object) -> FlexLAMConfig:
    """Frames of 16 x 16, four slots."""
    return FlexLAMConfig(
        frame=16,
        bottleneck=dataclasses.replace(BottleneckConfig(levels=(5, 4), slots=4, spread=0.1), **bottleneck),
        encoder=EncoderConfig(depth=1, width=32, heads=2, mlp_ratio=2, patch=8),
        decoder=DecoderConfig(depth=1, heads=2, head_dim=16, ffn=32, patch=8, steps=2, predict="frame"),
        sequence=SequenceConfig(
            hidden=32,
            intermediate=32,
            layers=1,
            heads=2,
            kv_heads=1,
            head_dim=16,
            patch=8,
            window=5,
            stride=2,
            places=True,
            decisions="all",
        ),
        translator=TranslatorConfig(depth=1, hidden=8, wide=16, discrete=(3,), names=NAMES),
    )


def small_data(path: Path, episodes: int = 12, tasks: tuple[str, ...] = ("left", "right")) -> Path:
    """A bright square on noise that walks left, walks right or stays: the action is visible in the transition."""
    rng = np.random.default_rng(0)
    with EpisodeWriter(path, (16, 16, 3), NAMES) as writer:
        for i in range(episodes):
            length = int(rng.integers(6, 14))
            actions = rng.integers(0, 3, length - 1)
            column = 8 + np.concatenate([[0], np.cumsum(np.array([0, -2, 2])[actions])])
            frames = rng.integers(0, 40, (length, 16, 16, 3)).astype(np.uint8)
            for frame, x in zip(frames, column, strict=True):
                frame[4:10, np.arange(x, x + 4) % 16] = 230
            split = "test" if i % 4 == 3 else "train"
            writer.add(frames, actions, np.zeros(length - 1), tasks[i % len(tasks)], split, seed=i)
    return path
