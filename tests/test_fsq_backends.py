"""The compiled bottleneck, native and Triton (interpreted where there is no GPU), against the reference and outside."""

from __future__ import annotations

import math
import os

import pytest
import torch
from fsq_cases import LEVEL_SETS, MORE_LEVEL_SETS, every_run, is_interpreted, sample
from fsq_rule import bits, constants, near_the_edges, straight_through, suffix_sum
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flexlam_fast import ops
from flexlam_fast.ops import reference
from flexlam_fast.ops.native import _on_cpu
from flexlam_fast.ops.thresholds import MAX_LEVELS, thresholds
from flexlam_fast.testing import GRADIENT_FACTOR, assert_within_budget

vector_quantize = pytest.importorskip("vector_quantize_pytorch")
FSQ = vector_quantize.FSQ

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("levels", MORE_LEVEL_SETS, ids=str)
@every_run
def test_ten_million_values_have_the_oracles_codes(backend: str, device: str, levels: tuple[int, ...]) -> None:
    theirs = FSQ(levels=list(levels)).to(device)
    total = 20_000 if is_interpreted(backend, device) else 10**7
    generator = torch.Generator().manual_seed(sum(levels))
    rows = math.ceil(total / 5 / len(levels))
    for scale in (0.5, 1.0, 1.5, 3.0, 8.0):
        z = (torch.randn(1, rows, len(levels), generator=generator) * scale).to(device)
        latents, codes = ops.fsq(z, levels, backend=backend)
        ours, ours_codes = reference.fsq(z, levels, None, None)
        assert torch.equal(codes, ours_codes)
        assert torch.equal(latents, ours), "values are the reference's"
        values, expected = theirs(z)
        other = codes != expected.to(torch.int32)
        # a GPU's atanh may give the oracle a shift that is one bit off ours: then a few z in 10^7 are the other side
        assert int(other.sum()) <= (0 if device == "cpu" else 20)
        assert float((latents - values)[~other].abs().max()) <= torch.finfo(torch.float32).eps


@pytest.mark.parametrize("levels", LEVEL_SETS, ids=str)
@every_run
def test_codes_agree_within_ulps_of_every_rounding_edge(backend: str, device: str, levels: tuple[int, ...]) -> None:
    z = near_the_edges(levels).to(device)
    codes = ops.fsq(z, levels, backend=backend)[1]
    assert torch.equal(codes, reference.fsq(z, levels, None, None)[1])
    assert device != "cpu" or torch.equal(codes, FSQ(levels=list(levels))(z)[1].int())


@pytest.mark.parametrize("levels", [*LEVEL_SETS, (2,), (100, 3), (MAX_LEVELS,)], ids=str)
def test_thresholds_are_the_first_numbers_of_each_digit(levels: tuple[int, ...]) -> None:
    table = thresholds(levels, torch.device("cpu"))
    for c, n in enumerate(levels):
        edge = table[: n - 1, c]
        assert torch.isnan(table[n - 1 :, c]).all()
        assert (edge.diff() > 0).all()
        for at, digit in ((edge, 1), (torch.nextafter(edge, torch.tensor(-torch.inf)), 0)):
            z = torch.zeros(n - 1, len(levels))
            z[:, c] = at
            found = ops.fsq(z, levels, backend="reference")[1] // math.prod(levels[:c]) % n
            assert torch.equal(found, torch.arange(n - 1, dtype=torch.int32) + digit)


@st.composite
def calls(draw: st.DrawFn) -> tuple[Tensor, tuple[int, ...], Tensor | None, Tensor | None, Tensor]:
    """Any number of leading dimensions, odd, empty or strided inputs, every dtype, with and without a prefix."""
    levels = draw(st.sampled_from([(8, 5, 5, 5), (4,), (3, 4), (7, 5, 5, 5, 5), (20, 3, 3), (3,) * 8]))
    lead = draw(st.lists(st.integers(0, 4), max_size=2))
    slots, dim = draw(st.integers(0, 9)), len(levels)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    layout: str = draw(st.sampled_from(["plain", "every other", "expanded", "shifted"]))
    shape = [*lead, slots, dim]
    if layout == "every other":
        z = torch.randn([*shape[:-1], 2 * dim], generator=generator)[..., ::2]
    elif layout == "expanded":
        z = torch.randn([*lead, 1, dim], generator=generator).expand(shape)
    elif layout == "shifted":  # starts on no 16-byte border
        z = torch.randn(math.prod(shape) + 1, generator=generator)[1:].view(shape)
    else:
        z = torch.randn(shape, generator=generator)
    z = (2 * z).to(draw(st.sampled_from(DTYPES)))
    weight = torch.randn(shape, generator=generator)
    if not draw(st.booleans()):
        return z, levels, None, None, weight
    keep = torch.randint(0, slots + 1, lead, generator=generator).to(draw(st.sampled_from([torch.int32, torch.int64])))
    null = torch.randn(dim, generator=generator).to(draw(st.sampled_from([*DTYPES, torch.float64])))
    return z, levels, keep, null, weight


@every_run
@settings(max_examples=60)
@given(case=calls())
def test_any_call_is_the_references(
    backend: str, device: str, case: tuple[Tensor, tuple[int, ...], Tensor | None, Tensor | None, Tensor]
) -> None:
    z, levels, keep, null, weight = (t.to(device) if isinstance(t, Tensor) else t for t in case)
    outputs, grads = [], []
    for name in ("reference", backend):
        inputs = [t.detach().clone().requires_grad_() for t in (z, null) if t is not None]
        latents, codes = ops.fsq(inputs[0], levels, keep, inputs[1] if keep is not None else None, backend=name)
        outputs.append((latents, codes, ops.codes_to_latents(codes, levels, keep, null, backend=name)))
        grads.append(torch.autograd.grad(latents, inputs, weight.to(z.dtype)))
    for ours, theirs in zip(outputs[1], outputs[0], strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)
    for ours, theirs in zip(grads[1], grads[0], strict=True):
        # here only the plumbing; the error budget is tested below
        assert ours.dtype == theirs.dtype
        ulp = torch.finfo(z.dtype).eps if ours.shape == z.shape else torch.finfo(theirs.dtype).eps
        assert torch.allclose(ours.double(), theirs.double(), rtol=4 * ulp, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("levels", [(8, 5, 5, 5), (7, 5, 5, 5, 5), (3, 4)], ids=str)
@every_run
def test_gradients_are_within_the_error_budget(
    backend: str, device: str, levels: tuple[int, ...], dtype: torch.dtype
) -> None:
    z, keep, null = (t.to(device) for t in sample(levels, 12 if is_interpreted(backend, device) else 300, 64))
    z, null = z.to(dtype).requires_grad_(), null.requires_grad_()
    weight = torch.randn(z.shape, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    grad_z, grad_null = torch.autograd.grad(ops.fsq(z, levels, keep, null, backend=backend)[0], [z, null], weight)
    budget = dict(working_dtype=dtype, factor=GRADIENT_FACTOR)
    assert_within_budget(grad_z, straight_through, z, weight, levels, keep, name="dz", **budget)  # type: ignore[arg-type]
    assert_within_budget(grad_null, suffix_sum, weight, keep, working_dtype=torch.float32, factor=3.0, name="dnull")


@every_run
def test_the_slope_keeps_its_digits_in_the_tails(backend: str, device: str) -> None:
    z = torch.linspace(-9, 9, 400, device=device).view(1, 100, 4).requires_grad_()
    (grad,) = torch.autograd.grad(ops.fsq(z, (8, 5, 5, 5), backend=backend)[0].sum(), z)
    half, _, shift, half_width = (c.to(device) for c in constants((8, 5, 5, 5), torch.float64))
    exact = half / half_width / torch.cosh(z.double() + shift).square()
    assert torch.allclose(grad.double(), exact, rtol=3e-6, atol=0), "plain PyTorch has no digit left at 9"


@every_run
def test_the_nulls_gradient_repeats_to_the_bit(backend: str, device: str) -> None:
    z, keep, null = (t.to(device) for t in sample((8, 5, 5, 5), 40 if is_interpreted(backend, device) else 4000, 64))
    null, weight = null.requires_grad_(), torch.randn_like(z)
    runs = []
    for threads in (1, 2) * 10:
        torch.set_num_threads(threads)
        latents, _ = ops.fsq(z, (8, 5, 5, 5), keep, null, backend=backend)
        runs.append(bits(torch.autograd.grad(latents, null, weight)[0]))
    torch.set_num_threads(1)
    assert all(torch.equal(runs[0], run) for run in runs[1:])


@every_run
def test_nan_comes_through_and_infinity_is_the_outermost_level(backend: str, device: str) -> None:
    z = torch.tensor([[[math.nan, 1.0], [math.inf, -math.inf]]], device=device)
    latents, codes = ops.fsq(z, (3, 5), backend=backend)
    assert torch.isnan(latents[0, 0, 0])
    assert latents[0, 1].tolist() == [1.0, -1.0]
    assert int(codes[0, 1]) == 2
    grad_in = z.requires_grad_()
    (grad,) = torch.autograd.grad(ops.fsq(grad_in, (3, 5), backend=backend)[0].sum(), grad_in)
    assert torch.isnan(grad[0, 0, 0])
    assert float(grad[0, 1].abs().max()) < 1e-37


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_instruction_set_returns_the_same_bits(dtype: torch.dtype) -> None:
    extension = pytest.importorskip("flexlam_fast._C", exc_type=ImportError)
    names = extension.build_info()["variants"]
    z, keep, null = sample((7, 5, 5, 5, 5), 33, 7)
    z, keep, grad = z.to(dtype), keep.int(), torch.randn(z.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    kind, tokens, results = DTYPES.index(dtype), 33 * 7, []
    for name in names:
        pattern = _on_cpu(extension, (7, 5, 5, 5, 5))
        latents, codes, grad_z = torch.empty_like(z), torch.empty(33, 7, dtype=torch.int32), torch.empty_like(z)
        sums = torch.zeros(1, 5, dtype=torch.float64)
        ends = (z.data_ptr(), latents.data_ptr(), codes.data_ptr(), tokens, kind, 7, keep.data_ptr(), null.data_ptr())
        pattern.forward(*ends, 1, name)
        ends = (grad.data_ptr(), z.data_ptr(), grad_z.data_ptr(), sums.data_ptr(), tokens, kind, 7, keep.data_ptr())
        pattern.backward(*ends, 1, name)
        results.append((latents.view(torch.uint8), codes, grad_z.view(torch.uint8), sums))
    assert len(names) >= 1
    for result in results[1:]:
        for ours, first in zip(result, results[0], strict=True):
            assert torch.equal(ours, first)
    with pytest.raises(ValueError, match="expected one that this processor has, got 'neon'"):
        pattern.forward(*((0,) * 9), "neon")


@pytest.mark.timeout(120)
@every_run
def test_more_elements_than_an_int32_counts(backend: str, device: str) -> None:
    if is_interpreted(backend, device):
        pytest.skip("the interpreter would take hours; offsets are int64 from the program's index on")
    if device == "cpu" and os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") < 14 * 2**30:
        pytest.skip("needs 10 GB of memory, which this machine does not have to spare")
    tokens = 2**28 + 100  # times 8 channels: more than 2^31 elements
    z = torch.zeros(1, tokens, 8, dtype=torch.bfloat16, device=device)
    z[0, -100:] = 3.0
    codes = ops.fsq(z, (3,) * 8, backend=backend)[1]
    assert codes[0, -102:].tolist() == [3280] * 2 + [6560] * 100
    assert codes[0, :2].tolist() == [3280] * 2
