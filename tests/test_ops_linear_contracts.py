"""The linear ops as PyTorch sees them, what they refuse, and what the compiler makes of the kernels."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from linear_cases import EPS, every_kernel, layer, plain_linear_add
from torch import Tensor

from flexlam_fast.errors import BackendError, InputError
from flexlam_fast.ops.contracts import compiled as code_of
from flexlam_fast.ops.linear import linear_add, norm_linear, norm_swiglu

HERE = Path(__file__).parent


@every_kernel
def test_opcheck(backend: str, device: str) -> None:
    x, norm, weight, residual = (t.to(device) for t in layer((3,), 20, 4))
    for args in (
        (x, norm, weight, None, EPS, False, False),
        (x.bfloat16(), norm.bfloat16(), weight.bfloat16(), None, EPS, False, True),
        (x, norm, weight, None, EPS, True, False),
        (x.expand(2, 3, 20), None, weight, residual.expand(2, 3, 8), 0.0, False, False),
        (x[:0], None, weight, residual[:0], 0.0, False, False),
    ):
        told = torch.library.opcheck(torch.ops.flexlam_fast.fused_linear.default, (*args, backend))
        assert set(told.values()) == {"SUCCESS"}, told


@every_kernel
def test_one_graph_under_torch_compile(backend: str, device: str) -> None:
    torch._dynamo.reset()
    x, norm, weight, residual = (t.to(device) for t in layer((3,), 20, 4))

    def run(x: Tensor) -> Tensor:
        y = norm_linear(x, norm, weight, EPS, backend=backend)
        return linear_add(x, weight, y + residual, backend=backend)

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
            lambda: norm_linear(*(t.to("meta") for t in (X, NORM, WEIGHT)), EPS, backend="native"),
            "expected 'reference' or 'triton' for this op on meta, got 'native'",
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
    assert torch.allclose(linear_add(X, WEIGHT, RESIDUAL, backend=None), plain_linear_add(X, WEIGHT, RESIDUAL))


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
