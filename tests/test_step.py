"""A training step: what a capture undoes, what belongs to a graph, and when a bad loss is noticed."""

from __future__ import annotations

import contextlib
import gc
import importlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from small import small_data
from torch import Tensor, nn
from train_cases import KINDS, made

from flexlam_fast.backend import REFERENCE, TRITON
from flexlam_fast.data.store import EpisodeStore
from flexlam_fast.train.loader import to_device
from flexlam_fast.train.loop import repeatable
from flexlam_fast.train.recipes import Recipe
from flexlam_fast.train.step import GraphedStep, Step

CPU = torch.device("cpu")
RECIPE = Recipe(10, 4, 1e-2)


class Batch(NamedTuple):
    x: Tensor
    kind: int


class Toy:
    """A model, what it counts, and its loss."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(3, 5), nn.GELU(), nn.Linear(5, 1))
        self.seen = torch.zeros((), dtype=torch.int64)

    def loss(self, batch: Batch) -> Tensor:
        self.seen += len(batch.x)
        return (self.model(batch.x) - batch.kind).square().mean()

    def step(self, kind: type[Step], **others: Any) -> Step:
        return kind(self.loss, dict(self.model.named_parameters()), RECIPE, CPU, False, **others)


def batches(count: int) -> list[Batch]:
    g = torch.Generator().manual_seed(1)
    return [Batch(torch.randn(4 + i % 2, 3, generator=g), i % 3) for i in range(count)]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> EpisodeStore:
    return EpisodeStore.open(small_data(tmp_path_factory.mktemp("data") / "episodes"))


def fused_by_shapes_alone(monkeypatch: pytest.MonkeyPatch, model: nn.Module) -> None:
    """Have the fused ops run by their checks and fakes: every launch of Triton's, without a kernel."""
    for name in ("arguments", "rows", "activation", "draws", "patches", "flow_loss", "rotary", "loss", "fsq"):
        module = importlib.import_module(f"flexlam_fast.ops.{name}")
        for choice in ("pick", "pick_for", "_pick"):
            if hasattr(module, choice):
                monkeypatch.setattr(module, choice, lambda *_, **__: TRITON)
    for name in ("differentiable", "gradients"):
        monkeypatch.setattr(importlib.import_module(f"flexlam_fast.ops.{name}"), "is_plain", lambda *_: False)
    for module in model.modules():
        if hasattr(module, "backend"):
            module.backend = TRITON


class FakeGraph:
    """Captures by running; a graph's first replay is then what the capture has done already."""

    captures = replays = 0

    def replay(self) -> None:
        FakeGraph.replays += 1


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> type[FakeGraph]:
    """CUDA graphs as far as a machine without CUDA can have them."""

    class Stream:
        def __init__(self, *_: object) -> None: ...
        def wait_stream(self, _: object) -> None: ...

    @contextlib.contextmanager
    def graph(_: FakeGraph, pool: object, stream: Stream, capture_error_mode: str) -> Iterator[None]:
        assert capture_error_mode == "thread_local"
        assert not gc.isenabled()
        FakeGraph.captures += 1
        yield

    FakeGraph.captures = FakeGraph.replays = 0
    fakes = dict(Stream=Stream, CUDAGraph=FakeGraph, graph=graph, device=contextlib.nullcontext)
    fakes |= dict(graph_pool_handle=lambda: None, current_stream=lambda *_: Stream(), stream=contextlib.nullcontext)
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    return FakeGraph


def test_warm_runs_before_a_capture_leave_no_trace(graphs: type[FakeGraph]) -> None:
    """The first step of each shape of batch is what a step without graphs is, moments and counters included."""
    plain, toy = Toy(), Toy()
    step, graphed = plain.step(Step), toy.step(GraphedStep, tallies=lambda: [toy.seen])
    first = batches(6)
    for batch in first:
        a, b = step(batch, 1e-2), graphed(batch, 1e-2)
        assert torch.equal(a, b)
    assert len({(len(b.x), b.kind) for b in first}) == 6
    assert (graphs.captures, graphs.replays) == (6, 6)
    assert int(toy.seen) == int(plain.seen) == sum(len(b.x) for b in first)
    for ours, theirs in zip(graphed.state(), step.state(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_graph_is_kept_for_each_shape_and_fed_through_its_own_batch(graphs: type[FakeGraph]) -> None:
    toy = Toy()
    graphed = toy.step(GraphedStep, tallies=lambda: [toy.seen])
    assert isinstance(graphed, GraphedStep)
    one, other = Batch(torch.ones(4, 3), 1), Batch(torch.full((4, 3), 2.0), 1)
    graphed(one, 1e-2)
    graphed(other, 1e-2)
    assert (graphs.captures, graphs.replays) == (1, 2)
    (captured,) = graphed.graphs.captured.values()
    assert torch.equal(captured.args[0], other.x)
    assert torch.equal(one.x, torch.ones(4, 3))


def test_the_first_loss_that_is_not_finite_is_remembered() -> None:
    toy = Toy()
    step = toy.step(Step)
    bad = Batch(torch.full((4, 3), float("inf")), 0)
    for batch in [*batches(3), bad, bad]:
        step(batch, 1e-2)
    assert int(step.first_bad) == 3


def test_the_rate_is_that_of_the_call() -> None:
    toy, still = Toy(), Toy()
    toy.step(Step)(batches(1)[0], 1e-2)
    still.step(Step)(batches(1)[0], 0.0)
    fresh = Toy().model
    assert all(torch.equal(a, b) for a, b in zip(still.model.parameters(), fresh.parameters(), strict=True))
    assert not torch.equal(next(toy.model.parameters()), next(fresh.parameters()))


@pytest.mark.parametrize("backend", [REFERENCE, "fused"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_loss_and_its_gradient_read_nothing_back_from_the_device(
    kind: str, backend: str, store: EpisodeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the meta device there is nothing to read: whatever asks for a value raises, as a capture would."""
    meta = torch.device("meta")
    stage = made(kind, store, meta)
    if backend != REFERENCE:
        fused_by_shapes_alone(monkeypatch, stage.model)
    loss = stage.loss(to_device(stage.read(0), meta))
    loss.backward()
    assert all(p.grad is not None and p.grad.is_meta for p in stage.model.parameters() if p.requires_grad)
    with pytest.raises(RuntimeError):
        loss.item()  # what the test relies on


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_graphed_step_on_a_gpu_is_the_step() -> None:
    device = torch.device("cuda")
    made = []
    for kind in (Step, GraphedStep):
        toy = Toy()
        toy.model.to(device)
        toy.seen = toy.seen.to(device)
        others = {"tallies": lambda toy=toy: [toy.seen]} if kind is GraphedStep else {}
        step = kind(toy.loss, dict(toy.model.named_parameters()), RECIPE, device, False, **others)
        made.append([step(Batch(b.x.to(device), b.kind), 1e-2).item() for b in batches(30)])
    assert made[0] == pytest.approx(made[1], rel=1e-5)


def test_training_on_a_gpu_asks_torch_for_sums_of_one_order_and_then_puts_that_back() -> None:
    def asked() -> tuple[bool, bool, bool]:
        fills = torch.utils.deterministic.fill_uninitialized_memory
        modes = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
        return *modes, fills

    before = asked()
    with repeatable(torch.device("cuda")):
        assert asked() == (True, True, False)
    assert asked() == before == (False, False, True)
    with repeatable(CPU):
        assert asked() == before
