"""QK-norm and RoPE of training: every backend and instruction set against fp64, forward and gradients."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from fsq_cases import every_run, is_interpreted
from native_cases import Forced, every_variant, needs_extension
from torch import Tensor

from flexlam_fast.errors import BackendError, InputError
from flexlam_fast.ops import contracts, native_sequence
from flexlam_fast.ops.linear import rms_norm
from flexlam_fast.ops.rotary import qk_norm_rope, reference
from flexlam_fast.sequence.model import RMSNorm, Rotation, rotate, rotation
from flexlam_fast.testing import GRADIENT_FACTOR, assert_within_budget

HERE = Path(__file__).parent
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EPS = 1e-6
#: batch, tokens, heads, key heads, channels: the model's, shared key heads, and what fills no vector
SIZES = [(2, 9, 4, 4, 64), (1, 33, 9, 2, 16), (3, 5, 3, 1, 10), (5, 7, 1, 1, 6), (1, 2, 20, 3, 258)]


class Case(NamedTuple):
    """Arguments up to ``eps``, and upstream gradients."""

    q: Tensor
    k: Tensor
    q_weight: Tensor
    k_weight: Tensor
    cos: Tensor
    sin: Tensor
    up_q: Tensor
    up_k: Tensor


def case(sizes: tuple[int, ...], dtype: torch.dtype, own: bool = False, device: str = "cpu") -> Case:
    """Values that are exact in ``dtype``; ``own``: positions of every batch entry's own."""
    batch, tokens, heads, kv_heads, dim = sizes
    generator = torch.Generator().manual_seed(sum(sizes))

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype).to(device)

    positions = torch.randint(0, 10**6, (batch, tokens) if own else (tokens,), generator=generator)
    r = rotation(positions, dim, 1e4)
    cos, sin = (t[:, 0] if own else t[0, 0] for t in r)
    # exact in the dtype as well, because the measure of an error rounds all of its arguments
    cos, sin = (t.to(dtype).float().to(device) for t in (cos, sin))
    q, k = normal(batch, tokens, heads, dim), normal(batch, tokens, kv_heads, dim)
    return Case(q, k, 1 + 0.2 * normal(dim), 1 + 0.2 * normal(dim), cos, sin, 2 * torch.ones_like(q) * q.flip(0, 1), -k)


def by_modules(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """What the model's modules do with one of the two, in the dtype of their arguments."""
    r = Rotation(*((t if t.dim() == 3 else t.unsqueeze(0)).unsqueeze(1) for t in (cos, sin)))
    return rotate(rms_norm(x, weight, EPS).transpose(1, 2), r).transpose(1, 2).to(x.dtype)


def gradient_by_modules(which: int, x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, up: Tensor) -> Tensor:
    leaves = [t.detach().clone().requires_grad_() for t in (x, weight)]
    return torch.autograd.grad(by_modules(*leaves, cos, sin), leaves, up.to(x.dtype))[which]


def check(c: Case, outs: tuple[Tensor, ...], grads: tuple[Tensor, ...], dtype: torch.dtype) -> None:
    """Values and gradients against those of the modules, each within its budget."""
    halves = (c.q, c.q_weight, c.up_q), (c.k, c.k_weight, c.up_k)
    for out, (x, weight, _), name in zip(outs, halves, "qk", strict=True):
        assert_within_budget(out, by_modules, x, weight, c.cos, c.sin, working_dtype=dtype, name=name)
    for i, grad in enumerate(grads):
        x, weight, up = halves[i % 2]
        args = i // 2, x, weight, c.cos, c.sin, up
        assert_within_budget(
            grad, gradient_by_modules, *args, working_dtype=dtype, factor=GRADIENT_FACTOR, name=f"d{i}"
        )


def run(c: Case, backend: str, **more: Any) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    leaves = [t.detach().requires_grad_() for t in c[:4]]
    outs = qk_norm_rope(*leaves, c.cos, c.sin, EPS, backend=backend, **more)
    return outs, torch.autograd.grad(outs, leaves, [up.to(out.dtype) for up, out in zip(c[6:], outs, strict=True)])


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@every_run
def test_within_the_error_budget(
    backend: str, device: str, dtype: torch.dtype, sizes: tuple[int, ...], own: bool
) -> None:
    c = case(sizes, dtype, own, device)
    outs, grads = run(c, backend)
    assert {t.dtype for t in (*outs, *grads)} == {dtype}
    assert all(t.is_contiguous() for t in outs)
    check(c, outs, grads, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@needs_extension
@every_variant
def test_every_instruction_set_is_within_the_budget(variant: str, dtype: torch.dtype) -> None:
    forced: Any = Forced(variant)
    for sizes in SIZES:
        c = case(sizes, dtype)
        outs = native_sequence.norm_rope(forced, *c[:6], EPS, dtype)
        dq, dk, of_q, of_k = native_sequence.norm_rope_backward(forced, *c[6:], *c[:6], EPS)
        check(c, outs, (dq, dk, of_q.to(dtype), of_k.to(dtype)), dtype)


def test_the_reference_is_the_modules_arithmetic_in_fp32_and_exact_in_fp64() -> None:
    c = case(SIZES[0], torch.float32)
    norm = RMSNorm(64, EPS)
    norm.weight.data = c.q_weight
    expected = rotate(norm(c.q).transpose(1, 2), Rotation(c.cos[None, None], c.sin[None, None])).transpose(1, 2)
    q, _ = qk_norm_rope(*c[:6], EPS, backend="reference")
    assert torch.allclose(q, expected, rtol=1e-6, atol=1e-6)
    small = case((2, 3, 2, 1, 6), torch.float64)
    inputs = [t.double().requires_grad_() for t in small[:4]]
    angles = [t.double() for t in (small.cos, small.sin)]
    assert torch.autograd.gradcheck(lambda *args: qk_norm_rope(*args, *angles, EPS), inputs)


@every_run
def test_mixed_dtypes_strides_and_half_the_angles(backend: str, device: str) -> None:
    """As under autocast: projections in bf16, weights in fp32, and queries and keys as views of one product."""
    c = case((2, 6, 4, 2, 16), torch.bfloat16, device=device)
    joint = torch.cat([c.q, c.k], dim=2).repeat_interleave(2, dim=0)[::2]  # batches and heads stand apart
    joint.requires_grad_()
    weights = [w.float().requires_grad_() for w in (c.q_weight, c.k_weight)]
    angles = [t[..., :8].contiguous() for t in (c.cos, c.sin)]
    views = joint[:, :, :4], joint[:, :, 4:]
    for dtype in (None, torch.float16, torch.float32):
        outs = qk_norm_rope(*views, *weights, *angles, EPS, dtype=dtype, backend=backend)
        assert {t.dtype for t in outs} == {dtype or torch.bfloat16}
        plain = qk_norm_rope(
            *(v.contiguous() for v in views), *weights, c.cos, c.sin, EPS, dtype=dtype, backend=backend
        )
        assert all(torch.equal(a, b) for a, b in zip(outs, plain, strict=True))
        ups = [torch.randn(t.transpose(1, 2).shape, device=device).to(t.dtype).transpose(1, 2) for t in outs]
        ours = torch.autograd.grad(outs, [joint, *weights], ups)
        theirs = torch.autograd.grad(plain, [joint, *weights], [u.contiguous() for u in ups])
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
        assert [t.dtype for t in ours] == [torch.bfloat16, torch.float32, torch.float32]
    every_other = torch.stack([c.q, c.q], dim=-1).flatten(-2)[..., ::2]
    one = c.cos.T.contiguous().T  # its columns stand apart
    again = qk_norm_rope(every_other, c.k, *weights, one, c.sin, EPS, backend=backend)[0]
    assert torch.equal(again, qk_norm_rope(c.q, c.k, *weights, c.cos, c.sin, EPS, backend=backend)[0])


@every_run
def test_halves_with_angles_of_their_own(backend: str, device: str) -> None:
    """RoPE never asks for it, but what is given is what is used."""
    c = case((1, 5, 2, 2, 16), torch.float32, device=device)
    c = c._replace(cos=c.cos + torch.arange(16.0, device=device), sin=c.sin - torch.arange(16.0, device=device))
    check(c, *run(c, backend), torch.float32)


@every_run
def test_a_head_of_two_channels(backend: str, device: str) -> None:
    """The gradients of two weights are too few numbers for a largest error to say something."""
    c = case((3, 7, 2, 1, 2), torch.float32, device=device)
    outs, grads = run(c, backend)
    check(c, outs, grads[:2], torch.float32)
    for ours, plain in zip(grads[2:], run(c, "reference")[1][2:], strict=True):
        assert torch.allclose(ours, plain, rtol=2e-6)


@every_run
def test_empty_batches(backend: str, device: str) -> None:
    for sizes in ((0, 5, 2, 1, 8), (2, 0, 2, 1, 8), (2, 3, 2, 0, 8)):
        c = case(sizes, torch.float32, device=device)
        outs, grads = run(c, backend)
        assert [t.shape for t in outs] == [c.q.shape, c.k.shape]
        assert grads[3].tolist() == [0.0] * 8
        assert sizes[2] == 0 or (grads[2].tolist() == [0.0] * 8) == (c.q.numel() == 0)


@every_run
def test_the_weights_gradients_repeat_to_the_bit(backend: str, device: str) -> None:
    tokens = 20 if is_interpreted(backend, device) else 2000
    c = case((2, tokens, 4, 4, 32), torch.float32, device=device)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append([t.detach() for part in run(c, backend) for t in part])
    torch.set_num_threads(1)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_more_tiles_than_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    launch = pytest.importorskip("flexlam_fast.kernels.launch_rotary")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    c = case((3, 70, 4, 2, 16), torch.float32, device=device)
    tile = launch.kernels.tile_of(4, 2, 8)
    assert 3 * 2 * tile.rows < 3 * 70, "each of two programs has several tiles"
    monkeypatch.setattr(launch.kernels, "PROGRAMS", 2)
    check(c, *run(c, "triton"), torch.float32)


@needs_extension
def test_more_pieces_than_two() -> None:
    c = case((3, 70, 4, 2, 16), torch.float32)
    check(c, *run(c, "native"), torch.float32)


@every_run
def test_opcheck_and_one_graph_under_torch_compile(backend: str, device: str) -> None:
    c = case((1, 4, 2, 1, 8), torch.float32, device=device)
    leaves = [t.clone().requires_grad_() for t in c[:4]]
    told = torch.library.opcheck(
        torch.ops.flexlam_fast.norm_rope.default, (*leaves, c.cos, c.sin, EPS, torch.float32, backend)
    )
    told |= torch.library.opcheck(torch.ops.flexlam_fast.norm_rope_backward.default, (*c[6:], *c[:6], EPS, backend))
    assert set(told.values()) == {"SUCCESS"}, told
    torch._dynamo.reset()
    compiled = torch.compile(qk_norm_rope, fullgraph=True, backend="aot_eager")
    outs = compiled(*leaves, c.cos, c.sin, EPS, backend=backend)
    grads = torch.autograd.grad(outs, leaves, list(c[6:]))
    for ours, plain in zip((*outs, *grads), (t for part in run(c, backend) for t in part), strict=True):
        assert torch.equal(ours, plain)


def test_auto_takes_the_compiled_kernel_and_leaves_fp64_to_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    c = case((1, 4, 2, 1, 8), torch.float64)
    q, k = qk_norm_rope(*c[:6], EPS)
    assert torch.equal(q, reference(c.q, c.q_weight, c.cos, c.sin, EPS, torch.float64))
    assert k.dtype == torch.float64
    with pytest.raises(BackendError, match="expected float32, float16 or bfloat16 for 'native', got float64"):
        qk_norm_rope(*c[:6], EPS, backend="native")
    c = case((1, 4, 2, 1, 8), torch.float32)
    called: list[str] = []
    monkeypatch.setattr(native_sequence, "norm_rope", lambda *args: called.append("native") or (c.q, c.k))
    if contracts.compiled("native"):
        qk_norm_rope(*c[:6], EPS)
        assert called == ["native"]


def wrong() -> Iterator[tuple[dict[str, Any], str]]:
    zeros = torch.zeros
    yield dict(q=zeros(2, 3, 8)), r"q: expected \[B,N,H,D\] float32 or .*, got \[2,3,8\] float32 cpu"
    yield dict(q=zeros(1, 4, 2, 7)), r"q: expected an even number of channels, got \[1, 4, 2, 7\]"
    yield dict(k=zeros(1, 5, 1, 8)), r"k: expected \[1,4,G,8\] .*, got \[1,5,1,8\] float32 cpu"
    yield dict(q_weight=zeros(9)), r"q_weight: expected \[8\] .*, got \[9\] float32 cpu"
    yield dict(k_weight=zeros(8).int()), r"k_weight: expected \[8\] float32 or .*, got \[8\] int32 cpu"
    yield dict(cos=zeros(5, 8)), r"cos: expected \[4,8\] float32 or float64 cpu, got \[5,8\] float32 cpu"
    yield dict(cos=zeros(1, 4, 8).half()), r"cos: expected \[1,4,8\] float32 or float64 cpu, got \[1,4,8\] float16 cpu"
    yield dict(sin=zeros(4, 4)), r"sin: expected \[4,8\] float32 cpu, got \[4,4\] float32 cpu"
    yield dict(dtype=torch.int32), r"dtype: expected float32 or float16 or bfloat16 or float64, got dtype torch.int32"


@pytest.mark.parametrize(("changed", "sentence"), list(wrong()), ids=lambda x: "" if isinstance(x, dict) else x[:20])
def test_bad_input_gets_one_sentence(changed: dict[str, Any], sentence: str) -> None:
    given = case((1, 4, 2, 1, 8), torch.float32)._asdict()
    arguments: dict[str, Any] = {name: value for name, value in given.items() if not name.startswith("up_")}
    for backend in ("auto", "reference", "native"):
        with pytest.raises(InputError, match=f"^{sentence}$"):
            qk_norm_rope(**arguments | changed, eps=EPS, backend=backend)


@pytest.fixture(scope="module")
def compiled() -> dict[str, dict[str, Any]]:
    """Every variant of the kernels that train the sequence model, for sm_90, in a process that does not interpret."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(HERE.parent), environment.get("PYTHONPATH", "")])
    command = [sys.executable, str(HERE / "compile_sm90.py"), "^(rotary|loss)"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def test_compiled_code_keeps_to_registers_and_moves_words_of_sixteen_bytes(compiled: dict[str, dict[str, Any]]) -> None:
    assert len(compiled) == 25
    assert {name: facts for name, facts in compiled.items() if facts["spilled"]} == {}
    for name, facts in compiled.items():
        if name.startswith("rotary"):  # what is narrow is the weights, 64 numbers each, and their partial sums
            assert facts["wide_stores"] >= 2, name
            assert facts["wide_loads"] >= facts["loads"] - 10, name
        elif name.endswith("c1000"):  # and here the target, its logit, and four numbers that all columns share
            assert facts["wide_loads"] >= facts["loads"] - 5, name
            assert "backward" not in name or facts["wide_stores"] == facts["stores"], name
