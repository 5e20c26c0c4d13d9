"""A decision as one graph: nothing in it reads the device back, and on a GPU a replay gives what running gives."""

from __future__ import annotations

import copy
import importlib
import pickle
from collections.abc import Callable

import pytest
import torch
from small import small_config

from flexlam_fast import graphs
from flexlam_fast.backend import TRITON
from flexlam_fast.graphs import GraphedLoop
from flexlam_fast.lam import LatentActionModel
from flexlam_fast.loop import DecisionLoop, How, Stages
from flexlam_fast.ops import gradients, linear, paged, sampling
from flexlam_fast.policy import Policy
from flexlam_fast.sequence.eager import Eager
from flexlam_fast.sequence.fused import Fused
from flexlam_fast.sequence.model import SequenceModel
from flexlam_fast.translator import PackedTranslator, Translator

CFG = small_config()
META = torch.device("meta")


def fused_by_shapes_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the fused ops run on the meta device: every check, no kernel, and results of the shapes that they promise."""
    for module in (linear, paged, sampling):
        monkeypatch.setattr(module, "pick", lambda *_, **__: TRITON)
        monkeypatch.setattr(module, "is_plain", lambda *_: False)
    monkeypatch.setattr(importlib.import_module("flexlam_fast.ops.translate"), "_pick", lambda *_: TRITON)
    monkeypatch.setattr(gradients, "is_plain", lambda *_: False)


@torch.no_grad()
@pytest.mark.parametrize("k", [1, 4])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("way", [Eager, Fused])
def test_a_decision_reads_nothing_back_from_the_device(
    monkeypatch: pytest.MonkeyPatch, way: type, temperature: float, k: int
) -> None:
    """On the meta device there is nothing to read: whatever asks for a value raises, as a capture would."""
    with META:
        lam, sequence, translator = LatentActionModel(CFG, "reference"), SequenceModel(CFG), Translator(CFG)
    for part in (lam, sequence, translator):
        part.requires_grad_(False)
    stages = Stages(lam, Eager(sequence), translator)
    if way is Fused:
        fused_by_shapes_alone(monkeypatch)
        packed = PackedTranslator(translator, CFG.bottleneck.levels, CFG.bottleneck.slots, TRITON)
        stages = Stages(lam, Fused(sequence), translator, packed)
    loop = DecisionLoop(CFG, 5, META, torch.float32, torch.float32, 0)
    frames = torch.zeros(3, 16, 16, 3, dtype=torch.uint8, device=META)
    sessions = torch.zeros(3, dtype=torch.int64, device=META)
    out = loop.decide(stages, How(k, temperature, 3), frames, sessions)
    assert out.codes.shape == (3, k)
    assert out.actions.discrete.shape == (3, 1)
    with pytest.raises(RuntimeError):
        out.codes.sum().item()  # what the test relies on


def test_what_a_decision_changes_is_in_the_state() -> None:
    """A capture runs a decision for practice and puts the state back: after that nothing may differ but pages."""
    policy = Policy(CFG)
    policy.reset(3, capacity=4)
    generator = torch.Generator().manual_seed(0)
    frames = torch.randint(0, 256, (12, 3, 16, 16, 3), dtype=torch.uint8, generator=generator)
    for frame in frames[:8]:
        policy.act(frame, 2)
    expected = []
    for practice in (False, True):
        loop = policy.loop
        kept = [t.clone() for t in loop.state()]
        pages = [loop.cache.k.clone(), loop.cache.v.clone()]
        decisions = []
        for frame in frames[8:]:
            if practice:
                before = [t.clone() for t in loop.state()]
                for k in (4, 1):
                    noise = torch.randint(0, 256, frame.shape, dtype=torch.uint8, generator=generator)
                    loop.decide(policy.stages, How(k, 1.0), noise, torch.arange(3))
                    for state, old in zip(loop.state(), before, strict=True):
                        state.copy_(old)
            decisions.append(policy.act(frame, 3, temperature=1.0))
        expected.append(decisions)
        for state, old in zip([*loop.state(), loop.cache.k, loop.cache.v], [*kept, *pages], strict=True):
            state.copy_(old)
    for plain, practised in zip(*expected, strict=True):
        assert torch.equal(plain.codes, practised.codes)
        assert torch.equal(plain.actions.discrete, practised.actions.discrete)
        assert torch.equal(plain.frames, practised.frames)


def test_graphs_are_for_fused_kernels_on_a_gpu_only() -> None:
    policy = Policy(CFG, graphs=True)
    assert policy.graphed is None
    assert "graph" not in policy.describe()


@pytest.mark.parametrize("way", [copy.copy, copy.deepcopy, lambda loop: pickle.loads(pickle.dumps(loop))])
def test_a_copy_has_no_graphs_yet(monkeypatch: pytest.MonkeyPatch, way: Callable[[GraphedLoop], GraphedLoop]) -> None:
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
    monkeypatch.setattr(torch.cuda, "Event", object)
    graphed = GraphedLoop(DecisionLoop(CFG, 1, torch.device("cpu"), torch.float32, torch.float32, 0))
    graphed.captured["a graph",] = object()  # type: ignore[assignment]
    twin = way(graphed)
    assert not twin.captured
    assert twin.pool is not graphed.pool
    assert (twin.loop is graphed.loop) == (way is copy.copy)


@pytest.mark.gpu
@pytest.mark.parametrize("way", [copy.copy, copy.deepcopy, lambda policy: pickle.loads(pickle.dumps(policy))])
@pytest.mark.parametrize("backend", ["auto", "native"])
def test_a_copy_captures_its_own_graphs(way: Callable[[Policy], Policy], backend: str) -> None:
    policy, plain = (Policy(CFG, device="cuda", graphs=graphed, backend=backend) for graphed in (True, False))
    frames = torch.randint(0, 256, (12, 1, 16, 16, 3), dtype=torch.uint8)
    for frame in frames[:6]:
        policy.act(frame, 4)
        plain.act(frame, 4)
    twin = way(policy)
    found = [[p.act(frame, 4) for frame in frames[6:]] for p in (plain, twin, policy)]
    for expected, *others in zip(*found, strict=True):
        assert all(torch.equal(expected.codes, other.codes) for other in others)


@pytest.mark.gpu
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_replays_equal_runs_while_windows_slide_and_sessions_come_and_go(temperature: float) -> None:
    policies = [Policy(CFG, device="cuda", dtype=torch.bfloat16, graphs=graphs) for graphs in (True, False)]
    assert policies[0].graphed is not None
    generator = torch.Generator().manual_seed(0)
    for policy in policies:
        policy.reset(3, capacity=4)
    for t in range(60):
        frames = torch.randint(0, 256, (4, 16, 16, 3), dtype=torch.uint8, generator=generator)
        found = []
        for policy in policies:
            if t == 20:
                policy.open()
            if t == 35:
                policy.close([1])
            if t % 7 == 6:
                policy.reset(sessions=[0])
            acting = policy.cache.opened if t % 3 else policy.cache.opened[::-1][:2]
            found.append(policy.act(frames[: len(acting)], 1 + t % 4, temperature=temperature, sessions=acting))
            policy.cache.verify()
        assert torch.equal(found[0].codes, found[1].codes)
        assert torch.equal(found[0].actions.discrete, found[1].actions.discrete)
        assert torch.equal(found[0].frames, found[1].frames)


@pytest.mark.gpu
def test_graphs_are_bounded_and_those_that_gave_way_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "MAX_GRAPHS", 2)
    policy, plain = (Policy(CFG, device="cuda", graphs=graphed) for graphed in (True, False))
    for t in range(12):
        frame = torch.full((1, 16, 16, 3), 20 * t, dtype=torch.uint8)
        a, b = (p.act(frame, 1 + t % 4) for p in (policy, plain))
        assert torch.equal(a.codes, b.codes)
    assert policy.graphed is not None
    assert len(policy.graphed.captured) == 2


@pytest.mark.gpu
def test_a_replay_sees_weights_that_were_loaded_after_its_capture() -> None:
    policy, other = Policy(CFG, device="cuda"), Policy(CFG, device="cuda", seed=5)
    frame = torch.full((1, 16, 16, 3), 90, dtype=torch.uint8)
    policy.act(frame, 4)
    policy.load_state("f", other.state())
    policy.reset(sessions=[0])
    a, b = (p.act(frame, 4) for p in (policy, other))
    assert torch.equal(a.codes, b.codes)
    assert torch.equal(a.actions.discrete, b.actions.discrete)
