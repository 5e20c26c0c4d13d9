"""Toy games, a toy policy whose returns are known, and frames of noise; shared by the tests of evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from flexlam_fast.config import BottleneckConfig, FlexLAMConfig
from flexlam_fast.data.vizdoom import Step
from flexlam_fast.evaluate import sessions as sessions_module
from flexlam_fast.evaluate.sessions import Job
from flexlam_fast.types import Actions, Decision


class ToyEnv:
    """An episode lasts ``seed % 7 + 3`` steps, each of which pays the action and the length of the scenario's name.

    A frame shows its seed and its step.
    """

    started = 0

    def __init__(self, scenario: str, size: int = 64) -> None:
        ToyEnv.started += 1
        self.scenario, self.size = scenario, size

    def _look(self) -> np.ndarray[Any, Any]:
        frame = np.zeros((self.size, self.size, 3), np.uint8)
        frame[0, 0] = (self.seed % 256, self.t, len(self.scenario))
        return frame

    def reset(self, seed: int) -> np.ndarray[Any, Any]:
        self.seed, self.t = seed, 0
        return self._look()

    def step(self, action: int) -> Step:
        self.t += 1
        return Step(self._look(), float(action + len(self.scenario)), self.t >= self.seed % 7 + 3)

    def close(self) -> None:
        self.seed = -1


class ToyPolicy:
    """Answers ``(seed + step + k) % 7`` from the frame, and knows when it was not told of a new episode."""

    device = torch.device("cpu")

    def __init__(self, slots: int = 4) -> None:
        self.cfg = FlexLAMConfig(bottleneck=BottleneckConfig(slots=slots))
        self.t: list[int] = []
        self.batches: list[int] = []

    def describe(self) -> str:
        return "toy"

    def reset(self, batch_size: int = 1, seed: int = 0, *, sessions: Sequence[int] | None = None) -> None:
        for i in sessions if sessions is not None else ():
            self.t[i] = -1
        if sessions is None:
            self.t = [-1] * batch_size

    def act(self, frames: np.ndarray[Any, Any], budget: int) -> Decision:
        assert frames.shape == (len(self.t), 64, 64, 3)
        self.batches.append(len(frames))
        self.t = [t + 1 for t in self.t]
        self.seen = frames[:, 0, 0, 1].tolist()
        actions = (frames[:, 0, 0, 0].astype(np.int64) + frames[:, 0, 0, 1] + budget) % 7
        discrete = torch.from_numpy(actions)[:, None]
        codes = torch.zeros(len(frames), budget, dtype=torch.int32)
        return Decision(Actions(discrete, torch.zeros(len(frames), 0)), codes, budget, torch.tensor(self.t))


def play_toys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the sessions start toy games, and count them from 0."""
    ToyEnv.started = 0
    monkeypatch.setattr(sessions_module, "DoomEnv", ToyEnv)


def expected(job: Job, k: int) -> float:
    return float(sum((job.seed + t + k) % 7 + len(job.scenario) for t in range(job.seed % 7 + 3)))


def frames_of(seed: int, count: int = 6) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (count, 64, 64, 3), dtype=np.uint8))
