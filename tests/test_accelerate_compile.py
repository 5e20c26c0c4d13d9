"""An accelerated FSQ under ``torch.compile``: one graph, the same results, the same gradients."""

from __future__ import annotations

import copy

import pytest
import torch
from accelerate_cases import CASES, L, assert_same
from torch import nn

from flexlam_fast.accelerate import accelerate

vector_quantize = pytest.importorskip("vector_quantize_pytorch")
FSQ = vector_quantize.FSQ


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("case", ["projections", "image, two codebooks", "channel first", "no indices"])
def test_it_compiles_without_a_break(case: str, backend: str) -> None:
    options, shape = CASES[case]
    ours = FSQ(**options)
    theirs = copy.deepcopy(ours)
    accelerate(ours, backend)
    torch.compiler.reset()
    compiled = torch.compile(nn.Sequential(nn.Identity(), ours), fullgraph=True, backend="eager")
    z = torch.randn(shape) * 2
    assert_same(compiled(z), theirs(z))


def test_gradients_pass_through_a_compiled_model_that_was_compiled_before() -> None:
    fsq = FSQ(L, dim=6)
    theirs = copy.deepcopy(fsq)
    torch.compiler.reset()
    compiled = torch.compile(fsq, backend="aot_eager")
    z = torch.randn(2, 7, 6)
    compiled(z)
    record = accelerate(compiled)
    assert [part.path for part in record.swapped] == ["_orig_mod"]
    mine, original = z.clone().requires_grad_(), z.clone().requires_grad_()
    got, expected = compiled(mine), theirs(original)
    assert_same(got, expected)
    got[0].square().sum().backward()
    expected[0].square().sum().backward()
    assert mine.grad is not None
    assert torch.allclose(mine.grad, original.grad, rtol=1e-5, atol=1e-6)
    record.undo()
    assert_same(compiled(z), expected)
