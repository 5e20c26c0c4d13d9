"""What a policy refuses: one sentence, and the sessions stay as they were."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from policy_cases import SIZE, K, build, play, small, video

from flexlam_fast.errors import BackendError, BudgetError, InputError
from flexlam_fast.policy import Policy


def test_a_refused_call_leaves_the_sessions_as_they_were() -> None:
    policy, frames = build(), video(8, 2)
    expected = play(policy, frames, [3] * 8)
    policy.reset(2)
    for frame, decision in zip(frames, expected, strict=True):
        for wrong, budget in ((frame, 0), (frame, K + 1), (frame[:1], 3), (frame.float() * torch.nan, 3)):
            with pytest.raises(InputError):
                policy.act(wrong, budget)
        again = policy.act(frame, 3)
        assert torch.equal(again.codes, decision.codes)
        assert torch.equal(again.actions.discrete, decision.actions.discrete)


FRAME = video(1, 2)[0]


@pytest.mark.parametrize(
    ("frames", "budget", "kind", "sentence"),
    [
        (FRAME, 0, BudgetError, r"^budget: expected an integer in 1\.\.6, got 0$"),
        (FRAME, K + 1, BudgetError, r"^budget: expected an integer in 1\.\.6, got 7$"),
        (FRAME, -1, BudgetError, r"^budget: expected an integer in 1\.\.6, got -1$"),
        (FRAME, 2.0, BudgetError, r"^budget: expected an integer in 1\.\.6, got 2\.0$"),
        (FRAME, True, BudgetError, r"^budget: expected an integer in 1\.\.6, got True$"),
        (FRAME, None, BudgetError, r"^budget: expected an integer in 1\.\.6 or deadline_ms, got neither$"),
        (torch.full((2, SIZE, SIZE, 3), torch.nan), 3, InputError, r"^frames: expected finite values, got 1536 NaN"),
        (np.full((2, SIZE, SIZE, 3), np.nan), 3, InputError, r"^frames: expected finite values, got 1536 NaN"),
        (FRAME.float(), 3, InputError, r"^frames: expected \[2,16,16,3\] uint8, got \[2,16,16,3\] float32 cpu$"),
        (FRAME.numpy().astype(np.int64), 3, InputError, r"^frames: expected .* got \[2,16,16,3\] int64 cpu$"),
        (FRAME[:1], 3, InputError, r"^frames: expected \[2,16,16,3\] uint8, got \[1,16,16,3\] uint8 cpu$"),
        (FRAME[0], 3, InputError, r"^frames: expected \[2,16,16,3\] uint8, got \[16,16,3\] uint8 cpu$"),
        (FRAME[:, :, :8], 3, InputError, r"^frames: expected \[2,16,16,3\] uint8, got \[2,16,8,3\] uint8 cpu$"),
        (FRAME.movedim(-1, 1), 3, InputError, r"^frames: expected \[2,16,16,3\] uint8, got \[2,3,16,16\] uint8 cpu$"),
        (FRAME[..., :1], 3, InputError, r"^frames: expected \[2,16,16,3\] uint8, got \[2,16,16,1\] uint8 cpu$"),
        (np.array([["a"]]), 3, InputError, r"^frames: expected \[2,16,16,3\] uint8, got "),
        ([1, 2], 3, InputError, r"^frames: expected \[2,16,16,3\] uint8, got list \[1, 2\]$"),
        (None, 3, InputError, r"^frames: expected \[2,16,16,3\] uint8, got NoneType None$"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_in_one_sentence(frames: Any, budget: Any, kind: type[Exception], sentence: str) -> None:
    policy = build()
    policy.reset(2)
    with pytest.raises(kind, match=sentence) as caught:
        policy.act(frames, budget)
    assert "\n" not in str(caught.value)
    assert policy.cache.t.tolist() == [-1, -1]


def test_wrong_construction_and_resets_are_refused_in_one_sentence() -> None:
    with pytest.raises(InputError, match=r"^dtype: expected float32, bfloat16, float16, got torch\.float64$"):
        Policy(small(), dtype=torch.float64)
    with pytest.raises(BackendError, match="^backend: expected one of"):
        Policy(small(), backend="cudnn")
    policy = build()
    with pytest.raises(BudgetError, match=r"^batch_size: expected an integer in 1\.\."):
        policy.reset(0)
    with pytest.raises(InputError, match=r"^sessions: expected open ones, each once, of \[0\], got \[1\]$"):
        policy.reset(sessions=[1])
