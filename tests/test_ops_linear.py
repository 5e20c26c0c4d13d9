"""The sequence model's linear layers: kernels (Triton's interpreted where there is no GPU) against plain PyTorch."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from linear_cases import (
    DTYPES,
    EPS,
    OPS,
    every_device,
    every_kernel,
    layer,
    plain_linear_add,
    plain_norm_linear,
    plain_norm_swiglu,
    run,
)
from torch import Tensor

from flexlam_fast.config import FlexLAMConfig
from flexlam_fast.ops import linear
from flexlam_fast.ops.contracts import compiled as code_of
from flexlam_fast.ops.linear import linear_add, norm_linear, norm_swiglu
from flexlam_fast.sequence.model import SequenceBlock
from flexlam_fast.testing import assert_within_budget


def agrees(op: str, args: tuple[Tensor, ...], dtype: torch.dtype, backend: str, device: str) -> None:
    """One op is within the budget of plain PyTorch."""
    x, norm, weight, residual = args = tuple(t.to(device, dtype) for t in args)
    out = run(op, args, backend)
    assert out.dtype == dtype
    assert out.is_contiguous()
    if op == "linear_add":
        assert_within_budget(out, plain_linear_add, x, weight, residual, working_dtype=dtype, name=op)
    else:
        plain = plain_norm_linear if op == "norm_linear" else plain_norm_swiglu
        assert_within_budget(out, plain, x, norm, weight, working_dtype=dtype, name=op)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS)
@every_kernel
def test_every_op_is_within_the_budget(backend: str, device: str, op: str, dtype: torch.dtype) -> None:
    for rows in ((1,), (2, 3), (2, 7), (40,)):  # few; then tiles of 16 and of 32 rows
        agrees(op, layer(rows, 72, 9), dtype, backend, device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("op", "inner", "outs"), [("norm_swiglu", 256, 32), ("linear_add", 1024, 8)])
@every_kernel
def test_the_widths_of_the_dmlab_preset(
    backend: str, device: str, op: str, inner: int, outs: int, dtype: torch.dtype
) -> None:
    for rows in (1, 20):
        agrees(op, layer((rows,), inner, outs), dtype, backend, device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", OPS)
@every_device
def test_the_largest_tiles(device: str, op: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """So few rows get small tiles; here every other tile is taken in turn."""
    kernels = code_of("triton", "linear")
    sizes = [(128, 128, 64, 8), (128, 64, 64, 8), (64, 64, 64, 4), (32, 64, 64, 4)]
    for tile in sizes if dtype.itemsize == 2 else [(64, 64, 32, 8)]:
        monkeypatch.setattr(kernels, "tile_of", lambda *_, tile=tile: kernels.Tile(*tile, 3))
        agrees(op, layer((150,), 80, 70), dtype, "triton", device)


@st.composite
def calls(draw: st.DrawFn) -> tuple[str, tuple[Tensor, ...], torch.dtype]:
    """Any leading shape, odd, empty or strided inputs, every dtype."""
    rows = tuple(draw(st.lists(st.integers(0, 5), max_size=2)))
    x, norm, weight, residual = layer(
        rows, draw(st.integers(1, 70)), draw(st.integers(1, 12)), draw(st.integers(0, 99))
    )
    layout = draw(st.sampled_from(["plain", "every other", "shifted", "transposed", "expanded"]))
    if layout == "every other":
        x, norm, weight = (torch.stack([t, t + 1], -1).flatten(-2)[..., ::2] for t in (x, norm, weight))
    elif layout == "shifted":  # starts on no 16-byte border
        x, weight = (
            torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape) if t.numel() else t for t in (x, weight)
        )
    elif layout == "transposed":
        weight = weight.t().contiguous().t()
    elif layout == "expanded":
        residual = residual.flatten()[:1].expand(residual.shape) if residual.numel() else residual
    return draw(st.sampled_from(OPS)), (x, norm, weight, residual), draw(st.sampled_from(DTYPES))


@every_kernel
@settings(max_examples=40)
@given(case=calls())
def test_any_call_is_the_references(
    backend: str, device: str, case: tuple[str, tuple[Tensor, ...], torch.dtype]
) -> None:
    """Here only the plumbing: of one or two values the budget, which is tested above, says little."""
    op, args, dtype = case
    args = tuple(t.to(device, dtype) for t in args)
    ours, theirs = run(op, args, backend), run(op, args, "reference")
    assert (ours.shape, ours.dtype) == (theirs.shape, dtype)
    if theirs.numel():
        most = 16 * torch.finfo(dtype).eps * (1 + float(theirs.abs().max()))
        assert float((ours.double() - theirs.double()).abs().max()) <= most


@pytest.mark.parametrize("sizes", [(1, 3, 8), (17, 33, 40)], ids=["few", "many"])
@pytest.mark.parametrize("op", OPS)
@every_kernel
def test_a_row_depends_on_no_other_row_and_not_on_their_number(
    backend: str, device: str, op: str, sizes: tuple[int, ...]
) -> None:
    results = []
    for rows in sizes:
        x, _, _, residual = (t.to(device).bfloat16() for t in layer((rows,), 48, 10))
        one, norm, weight, add = (t.to(device).bfloat16() for t in layer((1,), 48, 10, seed=7))
        x[rows // 2], residual[rows // 2] = one[0], add[0]
        results.append(run(op, (x, norm, weight, residual), backend, fp32_out=True)[rows // 2])
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_reference_is_the_models_own_block(dtype: torch.dtype) -> None:
    cfg = FlexLAMConfig.preset("tiny").sequence
    block = SequenceBlock(cfg).to(dtype)
    x = torch.randn(2, 3, cfg.hidden).to(dtype)
    with torch.no_grad():
        block.norm2.weight.add_(torch.randn(cfg.hidden) * 0.1)
        y = block.norm2(x)
        expected = x + block.down(F.silu(block.gate(y)) * block.up(y))
        gate_up = torch.cat([block.gate.weight, block.up.weight])
        wide = norm_swiglu(x, block.norm2.weight, gate_up, cfg.rms_eps, backend="reference")
        up = norm_linear(x, block.norm2.weight, block.up.weight, cfg.rms_eps, backend="reference")
    out = linear_add(wide, block.down.weight, x, backend="reference")
    assert torch.equal(up, block.up(y))
    assert torch.equal(out, expected)
    assert not out.requires_grad
    assert not wide.requires_grad


@pytest.mark.parametrize("rows", [2, 20])
@every_kernel
def test_logits_in_fp32_are_not_rounded_on_the_way(backend: str, device: str, rows: int) -> None:
    x, norm, weight, _ = (t.to(device).bfloat16() for t in layer((rows,), 64, 20))
    out = norm_linear(x, norm, weight, EPS, fp32_out=True, backend=backend)
    plain = norm_linear(x, norm, weight, EPS, fp32_out=True, backend="reference")
    normed = linear.rms_norm(x, norm, EPS)
    assert out.dtype == plain.dtype == torch.float32
    assert float((out.double() - normed.double() @ weight.double().T).abs().max()) < 1e-5
    assert torch.equal(plain, plain.bfloat16().float())
    assert not torch.equal(out, plain)
    assert norm_linear(x.double(), norm.double(), weight.double(), EPS, fp32_out=True).dtype == torch.float64


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # numpy's, of an exponential
@pytest.mark.parametrize("rows", [1, 20])
@every_kernel
def test_extremes_stay_what_they_are(backend: str, device: str, rows: int) -> None:
    """SwiGLU's exponential may overflow to infinity and must not make a NaN; a row of zeros is all zeros."""
    x = torch.zeros(rows, 16, device=device)
    x[0, 0] = 4.0  # normed to 4
    weight = torch.zeros(6, 16, device=device)
    weight[:3, 0], weight[3:, 0] = torch.tensor([-60.0, 60.0, -1.0]), 1.0
    out = norm_swiglu(x, torch.ones(16, device=device), weight, EPS, backend=backend)
    expected = [0.0, 960.0, -16 / (1 + math.exp(4.0))]
    assert torch.allclose(out[0].cpu(), torch.tensor(expected), rtol=1e-5, atol=0)
    assert not out[1:].any()
    x[0, 1] = math.nan
    out = norm_linear(x, torch.ones(16, device=device), weight, EPS, backend=backend)
    assert bool(out[0].isnan().all())
    assert not out[1:].any(), "a NaN in one row is no other row's"
