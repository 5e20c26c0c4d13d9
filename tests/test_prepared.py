"""Graphs of a warm-up are there when a deadline asks for them, and a pool that starts anew keeps them.

A capture needs a GPU; here it keeps the decision and a replay makes it, and everything else is what runs on a GPU.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from small import small_config
from torch import Tensor

from flexlam_fast import graphs
from flexlam_fast.errors import InputError
from flexlam_fast.graphs import Captured, GraphedLoop
from flexlam_fast.loop import Outcome
from flexlam_fast.policy import Policy
from flexlam_fast.types import Decision

CFG = small_config()
FRAMES = torch.randint(0, 256, (24, 4, 16, 16, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def flat(outcome: Outcome) -> list[Tensor]:
    return [*outcome.actions, outcome.codes, outcome.frames]


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The batch sizes of all captures so far."""
    seen: list[int] = []

    def capture(self: GraphedLoop, decide: Callable[[Tensor, Tensor], Outcome], shape: tuple[int, ...]) -> Captured:
        seen.append(shape[0])
        staged, numbers = torch.zeros(shape, dtype=torch.uint8), torch.arange(shape[0])
        kept = [t.clone() for t in self.loop.state()]
        left = decide(staged, numbers)
        for state, before in zip(self.loop.state(), kept, strict=True):
            state.copy_(before)

        def replay() -> None:
            for host, result in zip(flat(left), flat(decide(staged, numbers)), strict=True):
                host.copy_(result)

        return Captured(SimpleNamespace(replay=replay), staged, numbers, left)  # type: ignore[arg-type]

    class Event:
        def record(self, stream: object) -> None: ...
        def synchronize(self) -> None: ...

    monkeypatch.setattr(GraphedLoop, "_capture", capture)
    for name, fake in dict(Event=Event, graph_pool_handle=object, current_stream=lambda _: None).items():
        monkeypatch.setattr(torch.cuda, name, fake)
    return seen


def graphed() -> Policy:
    policy = Policy(CFG)
    policy.graphs = True
    policy._make_pool(1, 0)
    policy.reset()
    return policy


def same(a: Decision, b: Decision) -> bool:
    return torch.equal(a.codes, b.codes) and torch.equal(a.actions.discrete, b.actions.discrete)


def test_a_decision_with_a_deadline_captures_nothing_and_is_the_decision(captures: list[int]) -> None:
    policy, plain = graphed(), Policy(CFG)
    for frame in FRAMES[:6]:
        assert same(policy.act(frame[:1], 2), plain.act(frame[:1], 2))
    policy.warmup([1, 4], warm=1, rounds=2)
    before = list(captures)
    for frame in FRAMES[6:16]:
        found = policy.act(frame[:1], deadline_ms=1e9)
        assert found.budget == 4
        assert same(found, plain.act(frame[:1], 4))
    assert captures == before


def test_a_pool_of_the_same_size_starts_anew_with_its_graphs(captures: list[int]) -> None:
    policy = graphed()
    for frame in FRAMES[:9]:
        policy.act(frame[:1], 4, temperature=1.0)
    loop, before = policy.loop, list(captures)
    policy.reset(seed=7)
    fresh = Policy(CFG)
    fresh.reset(seed=7)
    assert policy.loop is loop
    states = zip(
        [*loop.state(), loop.seed, loop.cache.k, loop.cache.v],
        [*fresh.loop.state(), fresh.loop.seed, fresh.loop.cache.k, fresh.loop.cache.v],
        strict=True,
    )
    assert all(torch.equal(ours, new) for ours, new in states)
    for frame in FRAMES[:9]:
        assert same(policy.act(frame[:1], 4, temperature=1.0), fresh.act(frame[:1], 4, temperature=1.0))
    assert captures == before


def test_sessions_that_were_closed_or_opened_start_as_in_a_new_pool(captures: list[int]) -> None:
    policy = graphed()
    policy.reset(2, capacity=4)
    policy.open(2)
    for frame in FRAMES[:5]:
        policy.act(frame, 2)
    policy.close([0, 2])
    policy.reset(3, capacity=4)
    assert policy.cache.opened == [0, 1, 2]
    policy.cache.verify()
    assert policy.open() == [3]


def test_another_capacity_captures_again_what_was_measured(captures: list[int]) -> None:
    policy = graphed()
    policy.warmup([2, 4], batch_size=2, warm=0, rounds=1)
    assert captures == [2, 2]  # in the pool of the measurement; the open one holds a single session
    policy.reset(3)
    assert captures == [2, 2, 2, 2]
    assert policy.act(FRAMES[0, :2], deadline_ms=1e9, sessions=[0, 2]).budget == 4
    assert len(captures) == 4


@pytest.mark.parametrize("way", [copy.copy, copy.deepcopy, lambda policy: pickle.loads(pickle.dumps(policy))])
def test_a_copy_keeps_deadlines_as_its_original_does(captures: list[int], way: Callable[[Policy], Policy]) -> None:
    policy = graphed()
    policy.warmup([1, 4], warm=0, rounds=1)
    twin = way(policy)
    before = len(captures)
    assert twin.act(FRAMES[0, :1], deadline_ms=1e9).budget == 4
    assert len(captures) == before


def test_what_was_warmed_never_gives_way_and_each_drawing_has_its_own_table(
    captures: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphs, "MAX_GRAPHS", 2)
    policy = graphed()
    policy.warmup([1, 2, 3, 4], warm=0, rounds=1)
    policy.warmup([2], warm=0, rounds=1, temperature=1.0)
    for temperature in (0.3, 0.4, 0.5, 0.6):
        policy.act(FRAMES[0, :1], 1, temperature=temperature)
    before = len(captures)
    assert policy.act(FRAMES[1, :1], deadline_ms=1e9).budget == 4
    assert policy.act(FRAMES[2, :1], deadline_ms=1e9, temperature=1.0).budget == 2
    assert len(captures) == before
    policy.reset(capacity=2)
    assert policy.act(FRAMES[1, :1], deadline_ms=1e9).budget == 4


def test_a_deadline_is_refused_where_it_would_have_to_capture(captures: list[int]) -> None:
    policy = graphed()
    policy.warmup([1, 4], warm=0, rounds=1)
    with pytest.raises(InputError, match=r"captured .*\(batch_size=1, temperature=0.5, top_k=3\), got none"):
        policy.act(FRAMES[0, :1], deadline_ms=1e9, temperature=0.5, top_k=3)
    policy.warmup([1, 4], warm=0, rounds=1, temperature=0.5, top_k=3)
    assert policy.act(FRAMES[0, :1], deadline_ms=1e9, temperature=0.5, top_k=3).budget == 4
