"""A decision costs the same however long the episode: the same operations of the same sizes, and the bench of it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from small import small_config
from torch.utils._python_dispatch import TorchDispatchMode

from flexlam_fast.policy import Policy

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))
import steady

CFG = small_config()
CPU = torch.device("cpu")


class Recorder(TorchDispatchMode):
    """Every operation's name and the shapes of its tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, list[tuple[int, ...]]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [tuple(x.shape) for x in args if isinstance(x, torch.Tensor)]
        self.seen.append((str(func), tensors))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_late_decisions_do_what_early_ones_do(backend: str) -> None:
    policy = Policy(CFG, backend=backend, device="cpu")
    policy.reset()
    frames = torch.randint(0, 256, (1, 16, 16, 3), dtype=torch.uint8)
    stride, window = CFG.sequence.stride, CFG.sequence.window
    seen = {}
    for t in range(window + 40 * stride + 1):
        if t in (window, window + stride, window + 40 * stride):  # of the same phase, with a full window
            with Recorder() as recorder:
                policy.act(frames, 3)
            seen[t] = recorder.seen
        else:
            policy.act(frames, 1)
    first, *others = seen.values()
    assert len(first) > 50
    assert all(other == first for other in others)


def test_the_bench_tells_a_cost_that_grows(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(steady, "EARLY", 3)
    monkeypatch.setattr(steady.FlexLAMConfig, "preset", lambda name: CFG)
    monkeypatch.setattr(
        sys, "argv", ["steady.py", "--decisions", "9", "--budget", "2", "--rounds", "5", "--device", "cpu"]
    )

    def grows(policy: Policy, frame: torch.Tensor, budget: int) -> float:
        return 10.0 + growth * int(policy.act(frame, budget).frames)

    monkeypatch.setattr(steady, "timed", grows)
    growth = 0.0
    steady.main()
    assert "k=2: 10.000 ms about decision 3, 10.000 ms about decision 9, 1.000 times" in capsys.readouterr().out
    growth = 0.5
    with pytest.raises(SystemExit, match="expected the late decision to cost at most 10% more"):
        steady.main()
