"""Deadlines: what a warm-up measures, which budget a deadline gets, and that nobody's session notices."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from small import small_config
from torch import Tensor

from flexlam_fast import deadline
from flexlam_fast.deadline import Latency, LatencyTable, measure
from flexlam_fast.errors import BudgetError, InputError
from flexlam_fast.policy import Policy

TABLE = LatencyTable(1, (Latency(1, 2.0, 2.0, 3.0), Latency(2, 4.0, 4.0, 5.0), Latency(4, 8.0, 8.0, 9.0)))


def frame(batch: int = 1, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (batch, 16, 16, 3), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize(("ms", "budget"), [(3.0, 1), (4.99, 1), (5, 2), (8.9, 2), (9.0, 4), (1e9, 4)])
def test_a_deadline_gets_the_largest_budget_whose_p99_fits(ms: float, budget: int) -> None:
    assert TABLE.largest_within(ms) == budget
    policy = Policy(small_config())
    policy.latencies[1] = TABLE
    assert policy.act(frame(), deadline_ms=ms).budget == budget


@pytest.mark.parametrize("ms", [0, -1.0, float("nan"), "8", True])
def test_what_is_no_deadline_is_refused(ms: object) -> None:
    with pytest.raises(InputError, match=r"^deadline_ms: expected a number above 0, got "):
        TABLE.largest_within(ms)  # type: ignore[arg-type]


def test_refusals_are_one_sentence_and_name_what_would_do() -> None:
    policy = Policy(small_config())
    with pytest.raises(InputError, match=r"^deadline_ms: expected a warm-up first, policy.warmup\(batch_size=1\), got"):
        policy.act(frame(), deadline_ms=5)
    policy.latencies[1] = TABLE
    with pytest.raises(InputError, match=r"^deadline_ms: expected at least 3, the p99 .* at k=1 here, got 2$"):
        policy.act(frame(), deadline_ms=2)
    with pytest.raises(InputError, match=r"^budget: expected an integer in 1\.\.4 or deadline_ms, got both$"):
        policy.act(frame(), 1, deadline_ms=5)
    with pytest.raises(InputError, match=r"or deadline_ms, got neither$"):
        policy.act(frame())
    policy.reset(2)
    with pytest.raises(InputError, match=r"batch_size=2"):
        policy.act(frame(2), deadline_ms=5)
    for budgets, rounds in (([0], 1), ([5], 1), ([1], 0)):
        with pytest.raises(BudgetError):
            policy.warmup(budgets, rounds=rounds)


def test_the_table_is_of_what_the_clock_said(monkeypatch: pytest.MonkeyPatch) -> None:
    now, order = [0.0], []
    monkeypatch.setattr(deadline.time, "perf_counter", lambda: now[0])
    delays = itertools.cycle([1.0, 3.0])

    def decide(k: int) -> None:
        order.append(k)
        now[0] += 1e-3 * k * next(delays) if len(order) > 4 else 1.0

    table = measure(decide, 3, [4, 1], warm=2, rounds=100)
    assert order[:6] == [4, 1, 4, 1, 4, 1], "budgets take turns"
    assert [row.budget for row in table.rows] == [1, 4]
    assert table.rows[1] == pytest.approx((4, 4.0, 4.0, 4.0)), "every call of k=4 took 4 ms, the warm-up does not count"
    assert table.rows[0] == pytest.approx((1, 3.0, 3.0, 3.0))
    assert "batch 3" in str(table)
    assert len(str(table).splitlines()) == 3


def test_a_warm_up_disturbs_no_session() -> None:
    plain, warmed = Policy(small_config()), Policy(small_config())
    for policy in (plain, warmed):
        policy.reset(2, seed=5)
    for step in range(4):
        if step in (0, 2):
            table = warmed.warmup(batch_size=1 + step, warm=1, rounds=2)
            assert table.batch == 1 + step
            assert [row.budget for row in table.rows] == [1, 2, 4]
            assert all(0 < row.p50_ms <= row.p99_ms for row in table.rows)
        a, b = (policy.act(frame(2, step), 3) for policy in (plain, warmed))
        assert torch.equal(a.codes, b.codes)
        assert torch.equal(a.frames, b.frames)
    assert set(warmed.latencies) == {1, 3}


def test_a_warm_up_acts_with_full_windows_and_then_restores(monkeypatch: pytest.MonkeyPatch) -> None:
    policy, seen = Policy(small_config()), []
    act = policy.act

    def watching(frames: Tensor, k: int, **drawing: Any) -> object:
        decision = act(frames, k, **drawing)
        seen.append(int(decision.frames[0]))
        return decision

    monkeypatch.setattr(policy, "act", watching)
    policy.warmup([2], warm=0, rounds=3)
    assert seen == list(range(policy.cfg.sequence.window + 4))
    assert int(policy.cache.t[0]) == -1
