"""Weights of a policy: from the seed alone, the same after a save, refused if they do not fit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from policy_cases import K, build, play, small, video

from flexlam_fast.errors import CheckpointError
from flexlam_fast.policy import Policy


def test_weights_come_from_the_seed_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    a, b, c = Policy(small(), seed=1), Policy(small(), seed=1), Policy(small(), seed=2)
    assert torch.equal(torch.get_rng_state(), before), "the caller's random numbers are not drawn from"
    assert all(torch.equal(x, y) for x, y in zip(a.state().values(), b.state().values(), strict=True))
    assert not all(torch.equal(x, y) for x, y in zip(a.state().values(), c.state().values(), strict=True))


def test_a_saved_policy_decides_the_same(tmp_path: Path) -> None:
    policy, frames = build(), video(9, 2)
    expected = play(policy, frames, [1 + t % K for t in range(9)])
    policy.save_pretrained(tmp_path / "policy", notes={"log.txt": "trained by nobody"})
    again = Policy.from_pretrained(tmp_path / "policy")
    assert again.cfg == policy.cfg
    assert all(torch.equal(x, y) for x, y in zip(policy.state().values(), again.state().values(), strict=True))
    for x, y in zip(expected, play(again, frames, [1 + t % K for t in range(9)]), strict=True):
        assert torch.equal(x.codes, y.codes)
        assert torch.equal(x.actions.discrete, y.actions.discrete)
    assert (tmp_path / "policy" / "log.txt").read_text() == "trained by nobody"


def test_a_policy_of_another_size_or_with_nan_is_refused(tmp_path: Path) -> None:
    policy = build()
    tensors = policy.state()
    with pytest.raises(CheckpointError, match=r"^f: .*translator.head.bias"):
        policy.load_state("f", {k: v for k, v in tensors.items() if k != "translator.head.bias"})
    with pytest.raises(CheckpointError, match=r"^f: lam.bottleneck.null: expected"):
        policy.load_state("f", {**tensors, "lam.bottleneck.null": torch.zeros(5)})
    with pytest.raises(CheckpointError, match=r"^f: lam.bottleneck.null: expected finite floating numbers"):
        policy.load_state("f", {**tensors, "lam.bottleneck.null": torch.full((4,), torch.nan)})
    with pytest.raises(CheckpointError, match=r"^no-such-policy: expected a directory or one of "):
        Policy.from_pretrained("no-such-policy")
