"""The record of ``ff.accelerate`` says what was swapped, and its undo gives exactly that back."""

from __future__ import annotations

import copy
import sys
from typing import Any

import pytest
import torch
from accelerate_cases import L, Mine, Model
from torch import nn

from flexlam_fast.accelerate import Acceleration, accelerate
from flexlam_fast.backend import choose
from flexlam_fast.bottleneck import Bottleneck
from flexlam_fast.config import BottleneckConfig
from flexlam_fast.errors import BackendError

vector_quantize = pytest.importorskip("vector_quantize_pytorch")
FSQ = vector_quantize.FSQ


def test_a_nested_model_is_walked_and_the_record_says_what_happened() -> None:
    model = Model()
    theirs = copy.deepcopy(model)
    held = {key: (t.data_ptr(), t.clone()) for key, t in model.state_dict().items()}
    parts = [id(m) for m in model.modules()]
    record = accelerate(model, "reference")
    why = choose("reference", "cpu").reason
    assert record.swapped == (
        ("first", "FSQ", "reference", why),
        ("inner.deep.1", "FSQ", "reference", why),
        ("bottleneck", "Bottleneck", "reference", why),
    )
    assert [part.path for part in record.left] == ["inner.odd"]
    assert str(record).splitlines() == [
        "accelerate: 3 swapped, 1 left",
        "  swapped  first         FSQ: reference",
        "  swapped  inner.deep.1  FSQ: reference",
        "  swapped  bottleneck    Bottleneck: reference",
        "  left     inner.odd     FSQ: Mine is a subclass of FSQ and may compute something else",
        f"  reference: {why}",
    ]
    assert repr(record) == str(record)
    assert model.bottleneck.backend == "reference"
    assert [id(m) for m in model.modules()] == parts
    assert isinstance(model.first, FSQ)
    after = model.state_dict()
    assert list(after) == list(held)
    assert all(after[key].data_ptr() == where and torch.equal(after[key], t) for key, (where, t) in held.items())
    z = torch.randn(2, 7, 6)
    for mine, original in zip(model(z), theirs(z), strict=True):
        assert torch.equal(mine, original)
    theirs.load_state_dict(after)


def test_the_root_itself_is_swapped_and_named() -> None:
    fsq = FSQ(L)
    record = accelerate(fsq, "reference")
    assert record.swapped[0].path == ""
    assert "swapped  the FSQ itself  FSQ: reference" in str(record)
    assert "AcceleratedFSQ" in repr(fsq)


def test_undo_gives_back_exactly_what_was_there() -> None:
    model = Model()
    before = [(type(m), dict(vars(m))) for m in model.modules()]
    record = accelerate(model)
    assert [(type(m), vars(m)) for m in model.modules()] != before
    record.undo()
    assert [(type(m), vars(m)) for m in model.modules()] == before
    again = accelerate(model)
    record.undo()
    assert len(again.swapped) == 3
    assert type(model.first) is not FSQ, "a second undo does nothing, whatever has been swapped since"
    again.undo()
    assert [(type(m), vars(m)) for m in model.modules()] == before


def test_a_context_ends_with_undo_even_by_an_error() -> None:
    fsq = FSQ(L)

    def fail() -> None:
        with accelerate(fsq) as record:
            assert isinstance(record, Acceleration)
            assert type(fsq) is not FSQ
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        fail()
    assert type(fsq) is FSQ


def test_undo_leaves_what_somebody_else_has_changed_since() -> None:
    fsq, bottleneck = FSQ(L), Bottleneck(BottleneckConfig(levels=tuple(L), slots=7))
    record = accelerate(nn.ModuleList([fsq, bottleneck]))
    fsq.__class__ = Mine
    bottleneck.backend = "mine"
    record.undo()
    assert type(fsq) is Mine
    assert bottleneck.backend == "mine"


def test_a_second_call_swaps_nothing() -> None:
    model = Model()
    accelerate(model, "reference")
    classes = [type(m) for m in model.modules()]
    record = accelerate(model, "reference")
    assert record.swapped == ()
    already = "already accelerated, on reference"
    assert [part.reason for part in record.left if part.path != "inner.odd"] == [already] * 3
    assert [type(m) for m in model.modules()] == classes
    record.undo()
    assert [type(m) for m in model.modules()] == classes, "what it did not swap it does not give back"


def test_a_second_call_for_another_backend_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    fsq = FSQ(L)
    accelerate(fsq, "reference")
    other = choose("reference", "cpu")._replace(name="other")
    monkeypatch.setattr(sys.modules["flexlam_fast.accelerate"], "choose", lambda name, device: other)
    record = accelerate(fsq, "other")
    assert record.left[0].reason == "already accelerated, on reference; undo that first to change it"


def test_an_error_swaps_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(FSQ(L), FSQ(L))
    asked = []

    def second_fails(name: str, device: torch.device) -> Any:
        asked.append(name)
        if len(asked) == 2:
            raise BackendError("backend: expected one that runs here, got 'other'")
        return choose("reference", device)

    monkeypatch.setattr(sys.modules["flexlam_fast.accelerate"], "choose", second_fails)
    with pytest.raises(BackendError, match="^backend: expected one that runs here"):
        accelerate(model, "other")
    assert [type(m) for m in model] == [FSQ, FSQ]
