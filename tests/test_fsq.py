"""FSQ's codes, latents and gradients against ``vector_quantize_pytorch`` and against the formula."""

from __future__ import annotations

import math

import pytest
import torch
from fsq_rule import bits, constants, near_the_edges
from torch import Tensor

from flexlam_fast import ops
from flexlam_fast.testing import GRADIENT_FACTOR, assert_within_budget

vector_quantize = pytest.importorskip("vector_quantize_pytorch")
FSQ = vector_quantize.FSQ

LEVEL_SETS = [(8, 5, 5, 5), (7, 5, 5, 5, 5), (8, 6, 5), (7, 7, 7), (16, 15, 9), (3, 4), (4,), (9, 3, 6, 5, 4)]


@pytest.mark.parametrize("levels", LEVEL_SETS, ids=str)
def test_ten_million_codes_equal_those_of_vector_quantize_pytorch(levels: tuple[int, ...]) -> None:
    theirs = FSQ(levels=list(levels))
    generator = torch.Generator().manual_seed(sum(levels))
    counted, seen = 0, torch.zeros(math.prod(levels), dtype=torch.bool)
    for chunk in range(5):
        # 5 chunks x 8 level sets x 250,000 = 10^7 codes
        z = torch.randn(4000, 63, len(levels), generator=generator) * (0.5, 1.0, 1.5, 3.0, 8.0)[chunk]
        latents, codes = ops.fsq(z, levels)
        expected_values, expected_codes = theirs(z)
        assert codes.dtype == torch.int32
        assert torch.equal(codes, expected_codes.to(torch.int32))
        # the straight-through sum of the other side may be off the lattice by one rounding
        assert float((latents - expected_values).abs().max()) <= torch.finfo(torch.float32).eps
        assert torch.equal(bits(ops.codes_to_latents(codes, levels)), bits(latents))
        seen[codes.flatten().long()] = True
        counted += codes.numel()
    assert counted * len(LEVEL_SETS) >= 10**7
    assert bool(seen.all()), "the sample should reach every code"


@pytest.mark.parametrize("levels", LEVEL_SETS, ids=str)
def test_codes_agree_within_ulps_of_every_rounding_edge(levels: tuple[int, ...]) -> None:
    z = near_the_edges(levels)
    latents, codes = ops.fsq(z, levels)
    expected_values, expected_codes = FSQ(levels=list(levels))(z)
    assert torch.equal(codes, expected_codes.to(torch.int32))
    assert float((latents - expected_values).abs().max()) <= torch.finfo(torch.float32).eps
    assert [len(latents[..., i].unique()) for i in range(len(levels))] == list(levels)


@pytest.mark.parametrize("levels", LEVEL_SETS, ids=str)
def test_gradient_equals_that_of_vector_quantize_pytorch(levels: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(3)
    z = torch.randn(64, 64, len(levels), generator=generator) * 1.5
    weight = torch.randn(z.shape, generator=generator)

    def straight_through(z: Tensor, weight: Tensor) -> Tensor:
        half, _, shift, half_width = constants(levels, z.dtype)
        return weight * (1 - (z + shift).tanh().square()) * half / half_width

    ours, theirs = z.clone().requires_grad_(), z.clone().requires_grad_()
    (ops.fsq(ours, levels, backend="reference")[0] * weight).sum().backward()
    (FSQ(levels=list(levels))(theirs)[0] * weight).sum().backward()
    assert ours.grad is not None
    assert theirs.grad is not None
    # the same chain of roundings but for the last two, which come in another order
    assert torch.allclose(ours.grad, theirs.grad, rtol=4 * torch.finfo(torch.float32).eps, atol=0)
    shape = dict(working_dtype=torch.float32, factor=GRADIENT_FACTOR)
    assert_within_budget(ours.grad, straight_through, z, weight, name="dz", **shape)  # type: ignore[arg-type]


@pytest.mark.parametrize("levels", [*LEVEL_SETS, (2,), (2, 3), (2, 2, 5)], ids=str)
def test_every_code_survives_the_round_trip(levels: tuple[int, ...]) -> None:
    codes = torch.arange(math.prod(levels), dtype=torch.int32)
    values = ops.codes_to_latents(codes, levels)
    half, offset, shift, half_width = constants(levels, torch.float64)
    z = ((values.double() * half_width + offset) / half).clamp(-1, 1).atanh().clamp(-20, 20) - shift
    latents, again = ops.fsq(z.float().unsqueeze(0), levels)
    assert torch.equal(again[0], codes)
    assert torch.equal(bits(latents[0]), bits(values))
    assert float(values.min()) == -1.0
    assert len(values.unique(dim=0)) == len(codes)


def test_codes_follow_the_formula_digit_by_digit() -> None:
    # levels (3, 4): half (1.001, 1.5015), offsets (0, 0.5); q = (1, -2) and (-1, 1) by hand
    z = torch.tensor([[5.0, -5.0], [-5.0, 5.0], [0.0, 0.0]])
    latents, codes = ops.fsq(z, (3, 4))
    assert codes.tolist() == [2 + 3 * 0, 0 + 3 * 3, 1 + 3 * 2]
    assert latents.tolist() == [[1.0, -1.0], [-1.0, 0.5], [0.0, 0.0]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_quantized_in_fp32(dtype: torch.dtype) -> None:
    z = (torch.randn(50, 16, 4, generator=torch.Generator().manual_seed(0)) * 2).to(dtype)
    latents, codes = ops.fsq(z, (8, 5, 5, 5))
    exact, expected = ops.fsq(z.float(), (8, 5, 5, 5))
    assert latents.dtype == dtype
    assert torch.equal(codes, expected)
    assert torch.equal(latents, exact.to(dtype))
