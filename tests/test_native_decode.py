"""The decision's C++ kernels: every instruction set, any number of threads, and what they may not touch."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator

import pytest
import torch
from linear_cases import EPS, layer, plain_linear_add, plain_norm_swiglu
from native_cases import Forced, every_variant, needs_extension
from paged_cases import pages, tokens
from torch import Tensor

from flexlam_fast.ops import native_decode
from flexlam_fast.ops import paged_reference as reference
from flexlam_fast.testing import assert_within_budget

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
pytestmark = [needs_extension, pytest.mark.skipif(torch.cuda.is_available(), reason="the cases are on the GPU")]


@pytest.fixture
def threads() -> Iterator[None]:
    """Puts the number of threads back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@every_variant
def test_every_instruction_set_is_within_the_budget(variant: str, dtype: torch.dtype) -> None:
    """Widths of whole vectors and others; enough numbers that the largest of their errors says something."""
    forced = Forced(variant)
    for rows, inner, outs in ((16, 64, 48), (13, 37, 21), (40, 3, 1)):
        x, norm, weight, residual = (t.to(dtype) for t in layer((rows,), inner, outs))
        out = native_decode.fused_linear(forced, x, norm, weight, None, EPS, True, False)  # type: ignore[arg-type]
        assert_within_budget(out, plain_norm_swiglu, x, norm, weight, working_dtype=dtype)
        out = native_decode.fused_linear(forced, x, None, weight, residual, 0.0, False, False)  # type: ignore[arg-type]
        assert_within_budget(out, plain_linear_add, x, weight, residual, working_dtype=dtype)
    for dim, page in ((64, 64), (20, 7), (10, 16)):
        case = pages(dtype, [3, 0, 6, 2, 5], [1, 0, 2, 0, -1], tokens=4, kv_heads=2, dim=dim, page=page)
        out = native_decode.page_attend(forced, *case[:6])  # type: ignore[arg-type]
        assert_within_budget(out, reference.paged_attention, *case[:6], working_dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@every_variant
def test_every_instruction_set_writes_the_same_pages(variant: str, dtype: torch.dtype) -> None:
    for dim in (16, 20, 64):
        case = tokens(dtype, dim=dim)

        def written(*args: Tensor, native: bool = False) -> Tensor:
            k, v = args[5].clone(), args[6].clone()
            call = reference.write_pages
            if native:
                q = native_decode.page_write(Forced(variant), *args[:5], k, v, 1e4, EPS)  # type: ignore[arg-type]
            else:
                q = call(*args[:5], k, v, 1e4, EPS)
            return torch.cat([q.flatten(), k.flatten(), v.flatten()])

        assert_within_budget(written(*case, native=True), written, *case, working_dtype=dtype)


@pytest.mark.usefixtures("threads")
@every_variant
def test_the_number_of_threads_changes_no_bit(variant: str) -> None:
    """Sizes beyond those that one thread does alone."""
    forced = Forced(variant)
    x, norm, weight, _ = layer((2,), 256, 600)
    case = pages(torch.float32, [38], [5], heads=8, kv_heads=4, dim=64, page=64, entries=40)
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(
            (
                native_decode.fused_linear(forced, x, norm, weight, None, EPS, True, False),  # type: ignore[arg-type]
                native_decode.page_attend(forced, *case[:6]),  # type: ignore[arg-type]
            )
        )
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@every_variant
def test_scores_of_any_size_are_weighed_as_softmax_does(variant: str) -> None:
    """One key far ahead, keys far apart, infinities and NaN."""
    case = pages(torch.float32, [2], [0], heads=1, kv_heads=1, dim=16, page=16, entries=4)
    case.q.fill_(1.0)
    k = case.k.nan_to_num()
    first = int(case.table[0, 0])
    for value in (100.0, -100.0, 1e4, -1e30, float("inf"), -float("inf"), float("nan")):
        changed = k.clone()
        changed[first, 3] = value
        args = (case.q, changed, case.v, *case[3:6])
        ours = native_decode.page_attend(Forced(variant), *args)  # type: ignore[arg-type]
        theirs = reference.paged_attention(*args)
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-6, equal_nan=True), value


@every_variant
def test_every_dtype_is_rounded_to_nearest_even(variant: str) -> None:
    """A product by the unit matrix is the number itself, in fp32, and comes back rounded as torch rounds."""
    generator = torch.Generator().manual_seed(0)
    for dtype in DTYPES:
        x = (torch.randn(4, 64, generator=generator) * 10 ** torch.randint(-6, 4, (4, 64), generator=generator)).to(
            dtype
        )
        weight = (torch.eye(64) * 1.5).to(dtype)
        out = native_decode.fused_linear(Forced(variant), x, None, weight, None, 0.0, False, False)  # type: ignore[arg-type]
        assert torch.equal(out, (x.float() * 1.5).to(dtype))


@pytest.mark.skipif(shutil.which("objdump") is None, reason="objdump was not found")
def test_what_instruction_sets_share_runs_on_any_processor() -> None:
    """Of equal inline functions the linker keeps one: that of a file for all processors, or others would trap."""
    from flexlam_fast import _C

    command = ["objdump", "-d", "-C", "--no-show-raw-insn", _C.__file__]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    functions = [block.split("\n", 1) for block in listing.split("\n\n") if ">:\n" in block]
    shared = {name: body for name, body in functions if "<std::" in name and "flexlam" not in name}
    assert any("vector<float" in name for name in shared)
    assert [name for name, body in shared.items() if re.search(r"\tv[a-z0-9]+ ", body)] == []  # v...: AVX and later
