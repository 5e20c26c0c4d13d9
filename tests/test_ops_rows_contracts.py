"""The ops over rows as PyTorch sees them, what they refuse, and what the compiler makes of the kernels."""

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
import torch.nn.functional as F
from rows_cases import EPS, OPS, Way, every_backend, every_op, force, gradients, leaves, numbers

from flexlam_fast import ops
from flexlam_fast.errors import BackendError, InputError
from flexlam_fast.ops import row_norm
from flexlam_fast.ops.contracts import compiled as code_of
from flexlam_fast.sequence.model import RMSNorm

HERE = Path(__file__).parent
REGISTERED = torch.ops.flexlam_fast


@pytest.fixture
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Way:
    return force(monkeypatch, request.param)


@every_backend
def test_opcheck(way: Way) -> None:
    x, shift, scale = leaves(OPS["adaln"].make(2, 3, 8), way.device)
    y, half, b = leaves((x * 2,), way.device)[0], torch.bfloat16, way.backend
    with torch.no_grad():
        stats = REGISTERED.row_norm.default(x, scale, shift, EPS, True, True, half, b)[1]
    for op, args in (
        (REGISTERED.row_norm, (x, scale, shift, EPS, True, True, half, b)),
        (REGISTERED.row_norm, (x[:0], scale[0], None, EPS, False, False, torch.float32, b)),
        (REGISTERED.row_norm_backward, (y.to(half), x, scale, stats, half, True, True, b)),
        (REGISTERED.row_norm_backward, (y, x, scale, stats, None, True, True, b)),
        (REGISTERED.gate_add_rows, (x, y.to(half), scale, b)),
        (REGISTERED.gate_add_rows_backward, (x, y.to(half), scale, b)),
        (REGISTERED.gelu_map, (x.transpose(0, 1), b)),
        (REGISTERED.gelu_map_backward, (y, x, b)),
        (REGISTERED.swiglu_map, (x, y, b)),
        (REGISTERED.swiglu_map_backward, (x, y, x, b)),
    ):
        if str(op).endswith("_backward"):
            args = tuple(t.detach() if isinstance(t, torch.Tensor) else t for t in args)
        told = torch.library.opcheck(op.default, args)
        assert set(told.values()) == {"SUCCESS"}, (op, told)


@every_op
@every_backend
def test_one_graph_under_torch_compile(way: Way, name: str) -> None:
    """Forward and backward, and under autocast, which these ops leave alone."""
    torch._dynamo.reset()
    args = leaves(OPS[name].make(2, 3, 20), way.device)

    def run(*tensors: torch.Tensor) -> torch.Tensor:
        return OPS[name].run(*tensors, backend=way.backend)

    expected = run(*args)
    with torch.autocast(way.device, torch.bfloat16):
        for call in (torch.compile(run, fullgraph=True, backend="aot_eager"), run):
            out = call(*args)
            assert out.dtype == torch.float32
            assert torch.equal(out, expected)
            grads = gradients(out, args, torch.ones_like(out))
            for ours, plain in zip(grads, gradients(expected, args, torch.ones_like(out)), strict=True):
                assert torch.equal(ours, plain)
            expected = run(*args)


@every_op
def test_auto_leaves_transforms_to_the_reference(name: str) -> None:
    args = tuple(t[:1].squeeze(0) if t.dim() == 3 else t for t in OPS[name].make(2, 3, 4))
    if name in ("gelu", "swiglu", "layer_norm", "rms_norm", "no_bias"):
        axes = tuple(0 if t.dim() == 2 else None for t in args)
        mapped = torch.func.vmap(lambda *t: OPS[name].run(*t), in_dims=axes)(*args)
        torch.testing.assert_close(mapped, OPS[name].plain(*args))
    args = OPS[name].make(2, 3, 4)
    value, slope = torch.func.jvp(lambda x: OPS[name].run(x, *args[1:]), args[:1], (torch.ones_like(args[0]),))
    exact, right = torch.func.jvp(lambda x: OPS[name].plain(x, *args[1:]), args[:1], (torch.ones_like(args[0]),))
    torch.testing.assert_close(value, exact)
    torch.testing.assert_close(slope, right, rtol=1e-4, atol=1e-5)


@every_backend
def test_only_what_has_a_gradient_is_kept(way: Way) -> None:
    """Backward holds x, the scale and two numbers a row; nothing without a gradient is recorded."""
    x, shift, scale = leaves(OPS["adaln"].make(2, 3, 20), way.device)
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = ops.adaln(x, shift, scale, backend=way.backend)
    assert [tuple(t.shape) for t in kept] == [(2, 3, 20), (2, 20), (2, 6)]
    assert kept[0].data_ptr() == x.data_ptr()
    assert out.requires_grad
    with torch.no_grad():
        assert not ops.adaln(x, shift, scale, backend=way.backend).requires_grad
    frozen = ops.gate_add(x.detach(), x, scale.detach(), backend=way.backend)
    assert torch.equal(torch.autograd.grad(frozen.sum(), x)[0], scale.unsqueeze(1).expand_as(x))


def test_gradcheck_of_the_reference() -> None:
    for name, op in OPS.items():
        args = [t.double().requires_grad_() for t in op.make(2, 3, 4)]
        assert torch.autograd.gradcheck(lambda *t, op=op: op.run(*t, backend="reference"), args), name


def test_the_reference_is_the_modules_arithmetic() -> None:
    """What decoder, encoder and sequence model compute without these ops, in fp64 to the last bits."""
    x, shift, scale = (t.double() for t in OPS["adaln"].make(2, 3, 8))
    plain = F.layer_norm(x, (8,), eps=EPS) * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)
    torch.testing.assert_close(ops.adaln(x, shift, scale, eps=EPS), plain, rtol=1e-14, atol=1e-14)
    norm = RMSNorm(8, EPS).double()
    assert torch.equal(ops.rms_norm(x, norm.weight, EPS), norm(x))
    gate = scale.unsqueeze(1)
    assert torch.equal(ops.gate_add(x, 2 * x, scale), x + gate * (2 * x))
    layer = torch.nn.LayerNorm(8).double()
    assert torch.equal(ops.layer_norm(x, layer.weight, layer.bias), layer(x))
    assert torch.equal(ops.swiglu(x, plain), F.silu(x) * plain)
    assert row_norm.reference(x, shift[0], None, EPS, False, False, torch.float32).dtype == torch.float32


X, SHIFT, SCALE = OPS["adaln"].make(2, 3, 8)
WRONG = [
    (lambda: ops.adaln(X[0], SHIFT, SCALE), r"^x: expected \[B,N,W\] float32 or .*, got \[3,8\] float32 cpu$"),
    (lambda: ops.adaln(X.int(), SHIFT, SCALE), r"^x: expected \[B,N,W\] float32 or .*, got \[2,3,8\] int32 cpu$"),
    (lambda: ops.adaln(X, SHIFT, SCALE[:1]), r"^scale: expected \[2,8\] float32 or .*, got \[1,8\] float32 cpu$"),
    (lambda: ops.adaln(X, SHIFT[0], SCALE), r"^shift: expected \[2,8\] .*, got \[8\] float32 cpu$"),
    (lambda: ops.adaln(X, None, SCALE), r"^shift: expected \[2,8\] .*, got NoneType None$"),
    (lambda: ops.adaln(X, SHIFT, SCALE, dtype=torch.int8), r"^dtype: expected float32 or .*, got dtype torch.int8$"),
    (lambda: ops.adaln(X[..., :0], SHIFT, SCALE), r"^x: expected at least one column, got \[2, 3, 0\]$"),
    (lambda: ops.layer_norm(X, SCALE, None), r"^weight: expected \[8\] float32 or .*, got \[2,8\] float32 cpu$"),
    (lambda: ops.layer_norm(X, SCALE[0], SHIFT), r"^bias: expected \[8\] .*, got \[2,8\] float32 cpu$"),
    (lambda: ops.rms_norm(X, SCALE[0, :7], EPS), r"^weight: expected \[8\] .*, got \[7\] float32 cpu$"),
    (lambda: ops.rms_norm([1.0], SCALE[0], EPS), r"^x: expected \[\.\.\.,W\] .*, got list \[1.0\]$"),
    (lambda: ops.gate_add(X, X[:1], SCALE), r"^y: expected \[2,3,8\] .*, got \[1,3,8\] float32 cpu$"),
    (lambda: ops.gate_add(X, X, SCALE.to("meta")), r"^gate: expected \[2,8\] .* cpu, got \[2,8\] float32 meta$"),
    (lambda: ops.gelu(X.long()), r"^x: expected \[\.\.\.\] float32 or .*, got \[2,3,8\] int64 cpu$"),
    (lambda: ops.swiglu(X, X.half()), r"^up: expected \[2,3,8\] float32 cpu, got \[2,3,8\] float16 cpu$"),
    (lambda: ops.swiglu(X, X[:, :1]), r"^up: expected \[2,3,8\] float32 cpu, got \[2,1,8\] float32 cpu$"),
]


@pytest.mark.parametrize(("call", "sentence"), WRONG, ids=[s for _, s in WRONG])
def test_one_sentence_says_what_is_wrong(call: Callable[[], object], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_a_backend_asked_for_by_name_works_or_says_why_not() -> None:
    wide, row = numbers(1, 2, 8200), numbers(8200)
    for call, sentence in (
        (lambda: ops.gelu(X, backend="fast"), "expected one of auto, .*, got 'fast'"),
        (lambda: ops.gelu(X.to("meta"), backend="native"), "expected 'reference' or 'triton' for this op on meta"),
        (lambda: ops.adaln(wide, row, row, backend="triton"), "a width of at most 8192 .*, got 8200 in float32"),
        (lambda: ops.rms_norm(X, SCALE[0].double(), EPS, backend="triton"), "expected float32, .*, got 8 in float64"),
        (lambda: ops.gate_add(X, X.double(), SCALE, backend="triton"), "expected float32, .*, got 8 in float64"),
    ):
        with pytest.raises(BackendError, match=sentence) as caught:
            call()
        assert "\n" not in str(caught.value)
    assert ops.gelu(X.double()).dtype == torch.float64
    torch.testing.assert_close(
        ops.adaln(wide, row, row), OPS["adaln"].plain(wide, row, row), rtol=1e-5, atol=1e-5
    )  # C++ takes any width


def test_programs_fill_the_processors() -> None:
    kernels = code_of("triton", "modulate")
    for groups, rows, width in ((256, 320, 192), (1, 81920, 192), (8, 2496, 256)):
        tile = kernels.tile_of(rows, width)
        pieces = kernels.pieces_of(groups, rows, tile.rows)
        assert 132 * 4 <= groups * pieces <= 132 * 8
        assert tile.rows * tile.span == 2048
    assert kernels.tile_of(3, 8192) == (1, 8192, 16)
    assert kernels.pieces_of(100_000, 4, 4) == 1
    assert kernels.joined_of(1056) == (64, 32)
    assert kernels.joined_of(1) == (1, 128)


#: fp16 differs from bf16 in no rule
PATTERN = "^rows/(.*/fp32-bf16|(wide|gelu|swiglu|halves|join.*)/.*/bf16|(adaln|wide)/.*/fp32)$"
#: Words of 16 bytes that a thread reads and writes, of what has x's dtype and what has the other one.
WORDS = {
    "norm": {"forward": ((1, 0), (0, 1)), "backward": ((1, 1), (1, 0))},
    "gate": {"forward": ((1, 1), (1, 0)), "backward": ((1, 1), (0, 1))},
    "gelu": {"forward": ((1, 0), (1, 0)), "backward": ((2, 0), (1, 0))},
    "swiglu": {"forward": ((2, 0), (1, 0)), "backward": ((3, 0), (2, 0))},
}


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
    assert len(compiled) == 8 + 12 + 4
    assert {name: facts for name, facts in compiled.items() if facts["spilled"] or facts["tanh"]} == {}
    for name, facts in compiled.items():
        _, op, way, kinds = name.split("/")
        assert facts["registers"] <= 128, "so that four programs of 128 threads are resident"
        if op.startswith("join"):
            continue
        rule = WORDS.get({"halves": "swiglu"}.get(op, op), WORDS["norm"])
        # 2,048 elements and 128 threads: 16 elements a thread, 4 words of fp32 or 2 of half precision
        sizes = [(4 if kind == "fp32" else 2) // (2 if op == "halves" else 1) for kind in (kinds.split("-") * 2)[:2]]
        reads, writes = (sum(n * words for n, words in zip(count, sizes, strict=True)) for count in rule[way])
        assert facts["wide_loads"] >= reads, name
        assert facts["wide_stores"] >= writes, name
