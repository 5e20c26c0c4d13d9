"""The backend that ``ff.accelerate`` takes: the named one or none, with auto whatever runs best."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate_cases import L, Mine, Model, through_ops
from torch import Tensor, nn

from flexlam_fast import ops
from flexlam_fast.accelerate import accelerate
from flexlam_fast.backend import choose
from flexlam_fast.bottleneck import Bottleneck
from flexlam_fast.config import BottleneckConfig
from flexlam_fast.errors import BackendError

vector_quantize = pytest.importorskip("vector_quantize_pytorch")
FSQ = vector_quantize.FSQ


@pytest.mark.parametrize("name", ["nonsense", "Reference", ""])
@pytest.mark.parametrize("make", [lambda: FSQ(L), lambda: Mine(L), lambda: nn.Linear(2, 2), Model])
def test_a_backend_that_cannot_run_is_refused_by_name(name: str, make: Callable[[], nn.Module]) -> None:
    model = make()
    with pytest.raises(BackendError, match=r"^backend: expected one of .*, got '"):
        accelerate(model, name)
    assert not [m for m in model.modules() if "Accelerated" in type(m).__name__]


def test_a_module_that_moves_takes_what_is_best_there_only_if_auto_chose(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen, named = FSQ(L), FSQ(L)
    accelerate(chosen, "auto")
    accelerate(named, "reference")
    calls = through_ops(monkeypatch)
    for fsq in (chosen, named):
        fsq(torch.randn(2, 7, 4))
        fsq.to("meta")(torch.randn(2, 7, 4, device="meta"))
    assert calls == ["auto", "auto", "reference", "reference"]


@pytest.mark.parametrize("make", [lambda: FSQ(L), lambda: Bottleneck(BottleneckConfig(levels=tuple(L), slots=7))])
def test_kernels_that_do_not_take_the_levels_are_passed_over_by_auto_and_refused_by_name(
    make: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = ops.fsq

    def narrow(*args: Any, backend: str | None = None) -> tuple[Tensor, Tensor]:
        if backend == "other":
            raise BackendError("backend: expected at most 3 channels for 'other', got 4")
        return real(*args, backend=backend)

    other = choose("reference", "cpu")._replace(name="other")
    monkeypatch.setattr(ops, "fsq", narrow)
    monkeypatch.setattr(sys.modules["flexlam_fast.accelerate"], "choose", lambda name, device: other)
    with pytest.raises(BackendError, match="at most 3 channels"):
        accelerate(make(), "other")
    model = make()
    record = accelerate(model)
    assert [part.backend for part in record.swapped] == ["reference"]
    assert record.swapped[0].reason == "backend: expected at most 3 channels for 'other', got 4"
    assert len(model(torch.randn(2, 7, 4))) == 2
