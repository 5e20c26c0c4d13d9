"""Copies of an accelerated FSQ: accelerated in memory, of the original class in a file."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from accelerate_cases import L, assert_same, through_ops
from torch import nn

from flexlam_fast.accelerate import accelerate

vector_quantize = pytest.importorskip("vector_quantize_pytorch")
FSQ = vector_quantize.FSQ


def test_a_deep_copy_stays_accelerated_and_is_independent(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(FSQ(L, dim=6))
    model.append(model[0])
    model[0].notes = [model[0]]
    record = accelerate(model, "reference")
    twin = copy.deepcopy(model)
    assert twin[0].notes[0] is twin[0]
    assert twin[0] is twin[1]
    assert twin[0] is not model[0]
    assert type(twin[0]) is type(model[0])
    assert twin[0].project_in.weight.data_ptr() != model[0].project_in.weight.data_ptr()
    z = torch.randn(2, 7, 6)
    expected = model[0](z)
    record.undo()
    calls = through_ops(monkeypatch)
    assert_same(twin[0](z), expected)
    assert calls == ["reference"]


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_it_is_pickled_as_the_original_class(protocol: int) -> None:
    model = nn.Sequential(FSQ(L, dim=6))
    accelerate(model)
    data = pickle.dumps(model, protocol)
    assert b"flexlam" not in data
    loaded = pickle.loads(data)
    assert type(loaded[0]) is FSQ
    z = torch.randn(2, 7, 6)
    assert_same(model(z), loaded(z))


def test_torch_saves_the_whole_module() -> None:
    fsq = FSQ(L, dim=6)
    accelerate(fsq)
    file = io.BytesIO()
    torch.save(fsq, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert type(loaded) is FSQ
    assert torch.equal(loaded.project_in.weight, fsq.project_in.weight)
