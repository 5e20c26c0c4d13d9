"""What other libraries do to a quantizer after it was accelerated: the result is the original's, with the reason."""

from __future__ import annotations

import copy
import functools
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate_cases import L, assert_same, pair, through_ops
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from flexlam_fast.accelerate import accelerate

vector_quantize = pytest.importorskip("vector_quantize_pytorch")
FSQ = vector_quantize.FSQ

INPUT = "no plain tensor in float32, bfloat16 or float16"
Z = torch.randn(3, 50, 6, generator=torch.Generator().manual_seed(0))


class Wider(nn.Module):
    """A projection whose output is of another dtype."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x).double()


class Sub(Tensor):
    """A tensor of somebody's own."""


class Typed(Wider):
    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x).as_subclass(Sub)


def in_double(fsq: FSQ) -> None:
    fsq.project_in = Wider(fsq.project_in)
    fsq.project_out.double()


def dispatched(fsq: FSQ) -> None:
    """What a library does that moves inputs to the device of each module."""
    fsq._old_forward = fsq.forward
    new = functools.partial(lambda module, *args: module._old_forward(*args), fsq)
    fsq.forward = functools.update_wrapper(new, fsq._old_forward)


def subclassed(fsq: FSQ) -> None:
    """What sharding does: it gives the object a class of the same name and another front."""

    def quantize(self: Any, z: Tensor) -> Tensor:
        return 0.5 * super(fsq.__class__, self).quantize(z)

    fsq.__class__ = type("ShardedFSQ", (type(fsq),), {"quantize": quantize})


#: What is done, and the reason that the original answers, or None where the package still does.
CHANGES: dict[str, tuple[Callable[[FSQ], object], str | None]] = {
    "weight_norm": (lambda m: parametrizations.weight_norm(m.project_in), None),
    "spectral_norm": (lambda m: parametrizations.spectral_norm(m.project_out), None),
    "prune": (lambda m: prune.l1_unstructured(m.project_in, "weight", 0.5), None),
    "compiled projection": (lambda m: m.project_in.compile(backend="eager"), None),
    "another dtype inside": (in_double, None),
    "another tensor inside": (lambda m: setattr(m, "project_in", Typed(m.project_in)), None),
    "parametrized": (
        lambda m: parametrize.register_parametrization(m, "_levels", nn.Identity()),
        "its class is ParametrizedAcceleratedFSQ now, which may compute something else",
    ),
    "subclassed": (subclassed, "its class is ShardedFSQ now, which may compute something else"),
    "dispatched": (dispatched, "its forward was replaced on the object"),
    "levels": (
        lambda m: setattr(m, "_levels", torch.tensor([8, 5, 5, 7], dtype=torch.int32)),
        "its _levels was changed",
    ),
    "levels in place": (lambda m: m._levels.add_(1), "its _levels was changed"),
    "basis in place": (lambda m: m._basis.add_(1), "its _basis was changed"),
}


@pytest.mark.parametrize("case", CHANGES)
def test_the_result_is_the_originals_after(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    change, reason = CHANGES[case]
    theirs = FSQ(L, dim=6).eval()
    ours = copy.deepcopy(theirs)
    record = accelerate(ours)
    before = ours(Z)
    for fsq in (ours, theirs):
        torch.manual_seed(0)
        change(fsq)
    calls = through_ops(monkeypatch)
    got, expected = ours(Z), theirs(Z)
    assert [type(t) for t in got] == [type(t) for t in expected]
    assert_same(got, expected)
    assert len(calls) == (reason is None and "inside" not in case)
    assert record.paused() == ({} if reason is None else {"": reason})
    unlike = not all(torch.equal(a, b) for a, b in zip(before, expected, strict=True))
    same = ("weight_norm", "compiled projection", "parametrized", "dispatched", "another tensor inside")
    assert unlike or case in same, "or the change was none"


def test_levels_that_are_moved_or_copied_are_no_obstacle(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = pair("reference", levels=L)
    calls = through_ops(monkeypatch)
    z = Z[..., :4]
    ours._levels = ours._levels.clone()
    ours._basis.add_(0)
    for fsq in (ours, copy.deepcopy(ours), ours._replicate_for_data_parallel()):
        assert_same(fsq(z), theirs(z))
    assert len(calls) == 3


def test_levels_made_in_inference_mode_are_read_anew() -> None:
    with torch.inference_mode():
        theirs = FSQ(L)
        ours = copy.deepcopy(theirs)
        record = accelerate(ours)
        z = Z[..., :4]
        assert_same(ours(z), theirs(z))
        for fsq in (ours, theirs):
            fsq._levels.add_(1)
        assert_same(ours(z), theirs(z))
    assert record.paused() == {"": "its _levels was changed"}
    assert_same(ours(z), theirs(z))


@pytest.mark.parametrize("made", [False, True])
@pytest.mark.parametrize("accelerated", [False, True])
@pytest.mark.parametrize("used", [False, True])
def test_inference_mode_around_any_step_changes_nothing(made: bool, accelerated: bool, used: bool) -> None:
    with torch.inference_mode(made):
        theirs = FSQ(L, dim=6).requires_grad_(False)
        ours = copy.deepcopy(theirs)
    with torch.inference_mode(accelerated):
        assert len(accelerate(ours).swapped) == 1
    with torch.inference_mode(used):
        got, expected = ours(Z), theirs(Z)
    assert_same(got, expected)
    assert [t.is_inference() for t in got] == [t.is_inference() for t in expected]


def test_a_method_that_somebody_holds_outlives_an_undo() -> None:
    fsq = FSQ(L, dim=6)
    theirs = copy.deepcopy(fsq)
    record = accelerate(fsq)
    forward = fsq.forward
    dispatched(fsq)
    record.undo()
    assert_same(fsq(Z), theirs(Z))
    assert_same(forward(Z), theirs(Z))


def test_calls_of_threads_are_answered_while_another_swaps_and_undoes() -> None:
    fsq = FSQ(L, dim=6).eval()
    expected, wrong = fsq(Z), []

    def call() -> None:
        for _ in range(50):
            got = fsq(Z)
            wrong.extend(1 for a, b in zip(got, expected, strict=True) if not torch.equal(a, b))

    threads = [threading.Thread(target=call) for _ in range(3)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        accelerate(fsq).undo()
    assert wrong == []


def test_the_record_says_what_goes_to_the_original_now_and_what_has() -> None:
    model = nn.ModuleDict({"one": FSQ(L), "two": FSQ(L)})
    record = accelerate(model, "reference")
    lines = str(record).splitlines()
    assert record.paused() == {}
    model["one"].noise_dropout = 0.5
    model["two"](Z[..., :4].double())
    assert record.paused() == {"one": "noise_dropout is 0.5, which adds random offsets in training"}
    assert str(record).splitlines() == [
        *lines[:3],
        "  paused   one  FSQ: noise_dropout is 0.5, which adds random offsets in training",
        f"  earlier  two  FSQ: a call went to the original: its input is {INPUT}",
        *lines[3:],
    ]
    record.undo()
    assert str(record).splitlines() == lines, "what was swapped, and nothing of now"
    again = accelerate(model["two"])
    model["two"].__class__ = FSQ
    assert again.paused() == {"": "its class is FSQ now"}
