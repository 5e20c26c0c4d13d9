"""The sequence model's linear layers: Triton (interpreted where there is no GPU) against plain PyTorch."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fsq_cases import RUNS
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flexlam_fast.config import FlexLAMConfig
from flexlam_fast.errors import BackendError, InputError
from flexlam_fast.ops import linear
from flexlam_fast.ops.contracts import compiled as code_of
from flexlam_fast.ops.linear import linear_add, norm_linear, norm_swiglu
from flexlam_fast.sequence.model import SequenceBlock
from flexlam_fast.testing import assert_within_budget

HERE = Path(__file__).parent
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
EPS = 1e-6
every_device = pytest.mark.parametrize("device", [d for name, d in RUNS if name == "triton"])


def plain_norm_linear(x: Tensor, norm: Tensor, weight: Tensor) -> Tensor:
    return F.linear(F.rms_norm(x, x.shape[-1:], eps=EPS) * norm, weight)


def plain_norm_swiglu(x: Tensor, norm: Tensor, weight: Tensor) -> Tensor:
    y = F.rms_norm(x, x.shape[-1:], eps=EPS) * norm
    gate, up = weight.chunk(2)
    return F.silu(F.linear(y, gate)) * F.linear(y, up)


def plain_linear_add(x: Tensor, weight: Tensor, residual: Tensor) -> Tensor:
    return residual + F.linear(x, weight)


def layer(rows: tuple[int, ...], inner: int, outs: int, seed: int = 0) -> tuple[Tensor, ...]:
    """``x``, the norm's weight, weights ``[2 outs, inner]``, and a residual for all of them."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*rows, inner, generator=generator) * 2
    norm = 1 + 0.2 * torch.randn(inner, generator=generator)
    weight = torch.randn(2 * outs, inner, generator=generator) * inner**-0.5
    return x, norm, weight, torch.randn(*rows, 2 * outs, generator=generator)


def run(op: str, args: tuple[Tensor, ...], backend: str = "triton", fp32_out: bool = False) -> Tensor:
    """One op, of the four tensors that :func:`layer` makes."""
    x, norm, weight, residual = args
    if op == "norm_linear":
        return norm_linear(x, norm, weight, EPS, fp32_out=fp32_out, backend=backend)
    if op == "norm_swiglu":
        return norm_swiglu(x, norm, weight, EPS, backend=backend)
    return linear_add(x, weight, residual, backend=backend)


def agrees(op: str, args: tuple[Tensor, ...], dtype: torch.dtype, device: str) -> None:
    """One op is within the budget of plain PyTorch."""
    x, norm, weight, residual = args = tuple(t.to(device, dtype) for t in args)
    out = run(op, args)
    assert out.dtype == dtype
    assert out.is_contiguous()
    if op == "linear_add":
        assert_within_budget(out, plain_linear_add, x, weight, residual, working_dtype=dtype, name=op)
    else:
        plain = plain_norm_linear if op == "norm_linear" else plain_norm_swiglu
        assert_within_budget(out, plain, x, norm, weight, working_dtype=dtype, name=op)


OPS = ["norm_linear", "norm_swiglu", "linear_add"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS)
@every_device
def test_every_op_is_within_the_budget(device: str, op: str, dtype: torch.dtype) -> None:
    for rows in ((1,), (2, 3), (2, 7), (40,)):  # few; then tiles of 16 and of 32 rows
        agrees(op, layer(rows, 72, 9), dtype, device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("op", "inner", "outs"), [("norm_swiglu", 256, 32), ("linear_add", 1024, 8)])
@every_device
def test_the_widths_of_the_dmlab_preset(device: str, op: str, inner: int, outs: int, dtype: torch.dtype) -> None:
    for rows in (1, 20):
        agrees(op, layer((rows,), inner, outs), dtype, device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", OPS)
@every_device
def test_the_largest_tiles(device: str, op: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """So few rows get small tiles; here every other tile is taken in turn."""
    kernels = code_of("triton", "linear")
    sizes = [(128, 128, 64, 8), (128, 64, 64, 8), (64, 64, 64, 4), (32, 64, 64, 4)]
    for tile in sizes if dtype.itemsize == 2 else [(64, 64, 32, 8)]:
        monkeypatch.setattr(kernels, "tile_of", lambda *_, tile=tile: kernels.Tile(*tile, 3))
        agrees(op, layer((150,), 80, 70), dtype, device)


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


@every_device
@settings(max_examples=40)
@given(case=calls())
def test_any_call_is_the_references(device: str, case: tuple[str, tuple[Tensor, ...], torch.dtype]) -> None:
    """Here only the plumbing: of one or two values the budget, which is tested above, says little."""
    op, args, dtype = case
    args = tuple(t.to(device, dtype) for t in args)
    ours, theirs = run(op, args), run(op, args, "reference")
    assert (ours.shape, ours.dtype) == (theirs.shape, dtype)
    if theirs.numel():
        most = 16 * torch.finfo(dtype).eps * (1 + float(theirs.abs().max()))
        assert float((ours.double() - theirs.double()).abs().max()) <= most


@pytest.mark.parametrize("sizes", [(1, 3, 8), (17, 33, 40)], ids=["few", "many"])
@pytest.mark.parametrize("op", OPS)
@every_device
def test_a_row_depends_on_no_other_row_and_not_on_their_number(device: str, op: str, sizes: tuple[int, ...]) -> None:
    results = []
    for rows in sizes:
        x, _, _, residual = (t.to(device).bfloat16() for t in layer((rows,), 48, 10))
        one, norm, weight, add = (t.to(device).bfloat16() for t in layer((1,), 48, 10, seed=7))
        x[rows // 2], residual[rows // 2] = one[0], add[0]
        results.append(run(op, (x, norm, weight, residual), fp32_out=True)[rows // 2])
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
        wide = norm_swiglu(x, block.norm2.weight, gate_up, cfg.rms_eps)
        assert torch.equal(norm_linear(x, block.norm2.weight, block.up.weight, cfg.rms_eps), block.up(y))
    out = linear_add(wide, block.down.weight, x)
    assert torch.equal(out, expected)
    assert not out.requires_grad
    assert not wide.requires_grad


@pytest.mark.parametrize("rows", [2, 20])
@every_device
def test_logits_in_fp32_are_not_rounded_on_the_way(device: str, rows: int) -> None:
    x, norm, weight, _ = (t.to(device).bfloat16() for t in layer((rows,), 64, 20))
    out = norm_linear(x, norm, weight, EPS, fp32_out=True, backend="triton")
    plain = norm_linear(x, norm, weight, EPS, fp32_out=True, backend="reference")
    normed = linear.rms_norm(x, norm, EPS)
    assert out.dtype == plain.dtype == torch.float32
    assert float((out.double() - normed.double() @ weight.double().T).abs().max()) < 1e-5
    assert torch.equal(plain, plain.bfloat16().float())
    assert not torch.equal(out, plain)
    assert norm_linear(x.double(), norm.double(), weight.double(), EPS, fp32_out=True).dtype == torch.float64


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # numpy's, of an exponential
@pytest.mark.parametrize("rows", [1, 20])
@every_device
def test_extremes_stay_what_they_are(device: str, rows: int) -> None:
    """SwiGLU's exponential may overflow to infinity and must not make a NaN; a row of zeros is all zeros."""
    x = torch.zeros(rows, 16, device=device)
    x[0, 0] = 4.0  # normed to 4
    weight = torch.zeros(6, 16, device=device)
    weight[:3, 0], weight[3:, 0] = torch.tensor([-60.0, 60.0, -1.0]), 1.0
    out = norm_swiglu(x, torch.ones(16, device=device), weight, EPS, backend="triton")
    expected = [0.0, 960.0, -16 / (1 + math.exp(4.0))]
    assert torch.allclose(out[0].cpu(), torch.tensor(expected), rtol=1e-5, atol=0)
    assert not out[1:].any()
    x[0, 1] = math.nan
    out = norm_linear(x, torch.ones(16, device=device), weight, EPS, backend="triton")
    assert bool(out[0].isnan().all())
    assert not out[1:].any(), "a NaN in one row is no other row's"


@every_device
def test_opcheck(device: str) -> None:
    x, norm, weight, residual = (t.to(device) for t in layer((3,), 20, 4))
    for args in (
        (x, norm, weight, None, EPS, False, False),
        (x.bfloat16(), norm.bfloat16(), weight.bfloat16(), None, EPS, False, True),
        (x, norm, weight, None, EPS, True, False),
        (x.expand(2, 3, 20), None, weight, residual.expand(2, 3, 8), 0.0, False, False),
        (x[:0], None, weight, residual[:0], 0.0, False, False),
    ):
        told = torch.library.opcheck(torch.ops.flexlam_fast.fused_linear.default, args)
        assert set(told.values()) == {"SUCCESS"}, told


@every_device
def test_one_graph_under_torch_compile(device: str) -> None:
    torch._dynamo.reset()
    x, norm, weight, residual = (t.to(device) for t in layer((3,), 20, 4))

    def run(x: Tensor) -> Tensor:
        y = norm_linear(x, norm, weight, EPS, backend="triton")
        return linear_add(x, weight, y + residual, backend="triton")

    assert torch.equal(torch.compile(run, fullgraph=True, backend="aot_eager")(x), run(x))


X, NORM, WEIGHT, RESIDUAL = layer((3,), 8, 2)
WRONG = [
    (
        lambda: norm_linear(NORM.int(), NORM, WEIGHT, EPS),
        r"^x: expected \[\.\.\.,W\] float32 or .*, got \[8\] int32 cpu$",
    ),
    (lambda: norm_linear(X[:, :0], NORM, WEIGHT, EPS), r"^x: expected at least one column, got \[3, 0\]$"),
    (lambda: norm_linear(X, NORM[:3], WEIGHT, EPS), r"^norm: expected \[8\] float32 cpu, got \[3\] float32 cpu$"),
    (lambda: norm_linear(X, NORM.half(), WEIGHT, EPS), r"^norm: expected \[8\] float32 cpu, got \[8\] float16 cpu$"),
    (lambda: norm_linear(X, None, WEIGHT, EPS), r"^norm: expected \[8\] float32 cpu, got NoneType None$"),
    (lambda: norm_linear(X, NORM, WEIGHT.T, EPS), r"^weight: expected \[N,8\] float32 cpu, got \[8,4\] float32 cpu$"),
    (lambda: norm_swiglu(X, NORM, WEIGHT.half(), EPS), r"^gate_up: expected \[2I,8\] float32 cpu, got \[4,8\] float16"),
    (lambda: norm_swiglu(X, NORM, WEIGHT[:3], EPS), r"^gate_up: expected an even number of rows, got 3$"),
    (lambda: linear_add(X, WEIGHT, X), r"^residual: expected \[3,4\] float32 cpu, got \[3,8\] float32 cpu$"),
    (lambda: linear_add(X, WEIGHT, None), r"^residual: expected \[3,4\] float32 cpu, got NoneType None$"),
]


@pytest.mark.parametrize(("call", "sentence"), WRONG, ids=[s for _, s in WRONG])
def test_one_sentence_says_what_is_wrong(call: Callable[[], object], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_a_backend_asked_for_by_name_works_or_says_why_not() -> None:
    wide = torch.zeros(1, 8200)
    for call, sentence in (
        (
            lambda: norm_linear(X, NORM, WEIGHT, EPS, backend="native"),
            "expected 'reference' or 'triton' .*, got 'native'",
        ),
        (lambda: norm_linear(X, NORM, WEIGHT, EPS, backend="fast"), "expected one of auto, .*, got 'fast'"),
        (
            lambda: linear_add(*(t.double() for t in (X, WEIGHT, RESIDUAL)), backend="triton"),
            "expected float32, float16 or bfloat16 and a width of at most 8192 for 'triton', got 8 in float64",
        ),
        (
            lambda: linear_add(wide, wide, wide[:, :1], backend="triton"),
            "a width of at most 8192 .*, got 8200 in float32",
        ),
    ):
        with pytest.raises(BackendError, match=sentence) as caught:
            call()
        assert "\n" not in str(caught.value)
    assert linear_add(wide, wide, wide[:, :1]).tolist() == [[0.0]]
    assert torch.equal(linear_add(X, WEIGHT, RESIDUAL, backend=None), plain_linear_add(X, WEIGHT, RESIDUAL))


def test_tiles_fill_the_processors() -> None:
    tile_of = code_of("triton", "linear").tile_of
    for rows in (1, 8):
        for outs, inner, gated in ((768, 256, False), (256, 256, False), (1024, 256, True), (256, 1024, False)):
            tile = tile_of(rows, outs, inner, 2, gated)
            assert tile.stages == 0
            assert 120 <= -(-outs // tile.outs) <= 264, "one or two programs a processor"
            assert tile.outs * inner * 2 == tile.warps * 512, "one word of 16 bytes a lane"
    assert [tile_of(rows, 256, 256, 2, False).rows for rows in (9, 16, 17, 128, 2048, 65536)] == [
        16,
        16,
        32,
        32,
        64,
        128,
    ]


#: fp16 differs from bf16 in no rule, nor one large tile of fp32 from another
PATTERN = "^linear/(.*/bf16/m(1|128|32768)|.*/fp32/m1|swiglu/fp32/m32768)$"


@pytest.fixture(scope="module")
def compiled() -> dict[str, dict[str, Any]]:
    """Variants compiled for sm_90 in a process that does not interpret."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(HERE.parent), environment.get("PYTHONPATH", "")])
    command = [sys.executable, str(HERE / "compile_sm90.py"), PATTERN]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def test_no_variant_spills_and_words_are_wide(compiled: dict[str, dict[str, Any]]) -> None:
    assert len(compiled) == 5 * 3 + 5 + 1
    assert {name: facts for name, facts in compiled.items() if facts["spilled"]} == {}
    for name, facts in compiled.items():
        _, op, kind, rows = name.split("/")
        if rows == "m1":
            # x, weights, the other half of gated ones, the norm; the one narrow load is the residual's
            words = {"qkv": 3, "out": 2, "swiglu": 4, "down": 2, "head": 3}[op]
            assert facts["wide_loads"] >= words, name
            assert facts["registers"] <= 64, "so that all programs of a launch are resident"
            assert facts["loads"] - facts["wide_loads"] <= (op in ("out", "down")), name
        elif kind != "fp32":
            assert facts["tensor_cores"] > 0, name
