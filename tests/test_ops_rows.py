"""Norms, gated sums and activations of training against plain PyTorch: every backend, instruction set and dtype."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from rows_cases import (
    DTYPES,
    EPS,
    OPS,
    Way,
    bits,
    every_native,
    every_op,
    every_way,
    force,
    gradient_of,
    gradients,
    leaves,
    numbers,
)
from torch import Tensor

from flexlam_fast import ops
from flexlam_fast.sequence.model import RMSNorm
from flexlam_fast.testing import FORWARD_FACTOR, GRADIENT_FACTOR, assert_within_budget

#: Odd ones; more rows than one piece has, and enough sums that the largest of their errors says something.
SIZES = [(3, 7, 101), (2, 150, 160)]


@pytest.fixture
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Way:
    return force(monkeypatch, request.param)


@pytest.fixture
def threads() -> Iterator[None]:
    """Puts the number of threads back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@every_op
@every_way
def test_values_and_gradients_are_within_the_budget(way: Way, name: str, dtype: torch.dtype) -> None:
    for size in SIZES:
        args = leaves(OPS[name].make(*size), way.device, dtype)
        grad = numbers(*size, seed=9).to(way.device, dtype)
        out = OPS[name].run(*args, backend=way.backend)
        assert out.dtype == dtype
        assert_within_budget(out, OPS[name].plain, *args, working_dtype=dtype)
        for i, ours in enumerate(gradients(out, args, grad)):
            assert ours.dtype == dtype
            rule, budget = gradient_of(name, i), dict(working_dtype=dtype, factor=GRADIENT_FACTOR)
            assert_within_budget(ours, rule, *args, grad, name=f"gradient {i}", **budget)  # type: ignore[arg-type]


@pytest.mark.parametrize("out_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@every_way
def test_any_mix_of_dtypes_is_as_good_as_the_reference(way: Way, dtype: torch.dtype, out_dtype: torch.dtype) -> None:
    """The residual stream in one dtype, parameters in another, the result in a third."""
    for name, other in (("adaln", out_dtype), ("layer_norm", torch.float32), ("rms_norm", torch.float32)):
        x, *parameters = OPS[name].make(2, 5, 120)
        args = [*leaves((x,), way.device, dtype), *leaves(tuple(parameters), way.device, other)]
        grad = numbers(2, 5, 120, seed=9).to(way.device, out_dtype)
        results = []
        for backend in (way.backend, "reference"):
            out = OPS[name].run(*args, backend=backend, dtype=out_dtype)
            results.append([out, *gradients(out, args, grad)])
        assert [t.dtype for t in results[0]] == [out_dtype, dtype, *[other] * len(parameters)]
        _as_good(results, name, args, grad)
    x, y, gate = OPS["gate_add"].make(2, 5, 120)
    args = [*leaves((x,), way.device, dtype), *leaves((y, gate), way.device, out_dtype)]
    results = []
    for backend in (way.backend, "reference"):
        out = ops.gate_add(*args, backend=backend)
        results.append([out, *gradients(out, args, x)])
    assert [t.dtype for t in results[0]] == [dtype, dtype, out_dtype, out_dtype]
    _as_good(results, "gate_add", args, x.to(way.device, dtype))


def _as_good(results: list[list[Tensor]], name: str, args: list[Tensor], grad: Tensor) -> None:
    """Ours is within the budget that the reference sets, or an ulp of what the results are rounded to."""
    doubles = [t.detach().double().requires_grad_() for t in args]
    out = OPS[name].plain(*doubles)
    exact = [out, *torch.autograd.grad(out, doubles, grad.double())]
    for ours, theirs, right in zip(*results, exact, strict=True):
        errors = [float((t.double() - right).detach().abs().max()) for t in (ours, theirs)]
        step = torch.finfo(ours.dtype).eps * float(right.abs().max())
        assert errors[0] <= max((FORWARD_FACTOR if right is out else GRADIENT_FACTOR) * errors[1], step), (name, errors)


@every_way
def test_rms_norm_rounds_where_the_module_does(way: Way) -> None:
    """In bf16 the norm is rounded before its weight; a value may differ where a sum's last bit decides."""
    module = RMSNorm(64, EPS).to(way.device)
    with torch.no_grad():
        module.weight.copy_(1 + numbers(64, seed=1, spread=0.3))
    for dtype in DTYPES:
        x = (3 * numbers(40, 64)).to(way.device, dtype)
        theirs = module(x)
        ours = ops.rms_norm(x, module.weight, EPS, backend=way.backend)
        assert ours.dtype == theirs.dtype == torch.float32
        module.to(dtype)
        half = ops.rms_norm(x, module.weight, EPS, backend=way.backend)
        assert half.dtype == dtype
        if dtype != torch.float32:
            assert float((ours != theirs).float().mean()) < 0.01
            assert float((half != module(x)).float().mean()) < 0.01
        module.float()


@every_way
def test_eps_is_added_to_the_variance(way: Way) -> None:
    x, shift, scale = leaves(OPS["adaln"].make(2, 3, 40), way.device)
    with torch.no_grad():
        x[0, 0] = 0
    for run in (
        lambda backend: ops.adaln(x, shift, scale, eps=0.5, backend=backend),
        lambda backend: ops.layer_norm(x, scale[0], shift[0], eps=0.5, backend=backend),
        lambda backend: ops.rms_norm(x, scale[0], 0.5, backend=backend),
    ):
        ours, theirs = run(way.backend), run("reference")
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
        grads = [torch.autograd.grad(out.square().sum(), x)[0] for out in (ours, theirs)]
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)


@every_op
@every_way
def test_strides_change_no_bit(way: Way, name: str) -> None:
    """Slices of tokens, chunks of parameters, every other column, and gradients that are one number expanded."""
    size = (3, 6, 20)
    args = leaves(OPS[name].make(*size), way.device)
    packed = OPS[name].run(*args, backend=way.backend)
    expected = [packed, *gradients(packed, args, torch.ones(()).expand(size))]

    def tokens(t: Tensor) -> Tensor:
        wide = F.pad(t.detach(), (0, 0, 0, 5) if t.dim() == 3 else (4, 8), value=torch.nan)
        return wide[:, :6] if t.dim() == 3 else wide[..., 4:-8]

    def columns(t: Tensor) -> Tensor:
        return t.detach().repeat_interleave(2, -1)[..., ::2]

    def turned(t: Tensor) -> Tensor:
        return t.detach().movedim(-1, 0).contiguous().movedim(0, -1)

    def alone(t: Tensor) -> Tensor:
        wide = F.pad(t.detach(), (4, 8), value=torch.nan)
        return wide[..., 4:-8] if t is args[-1] else t.detach().clone()

    for layout in (tokens, columns, turned, alone):
        strided = [layout(t).requires_grad_() for t in args]
        out = OPS[name].run(*strided, backend=way.backend)
        found = [out, *gradients(out, strided, torch.ones(()).expand(size))]
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)), layout.__name__


@every_op
@every_way
def test_batches_may_be_empty(way: Way, name: str) -> None:
    for size in ((0, 4, 8), (2, 0, 8)):
        args = leaves(OPS[name].make(*size), way.device)
        out = OPS[name].run(*args, backend=way.backend)
        assert out.shape == size
        for grad, arg in zip(gradients(out, args, out), args, strict=True):
            assert grad.shape == arg.shape
            assert not grad.any()


@every_way
def test_any_number_of_dimensions(way: Way) -> None:
    wide = numbers(2, 3, 4, 48).to(way.device)
    x, weight = wide[..., 8:40], numbers(32, seed=1).to(way.device)  # heads of a wider projection
    for name, run in (
        ("rms", lambda t, w: ops.rms_norm(t, w, EPS, backend=way.backend)),
        ("layer", lambda t, w: ops.layer_norm(t, w, w, backend=way.backend)),
        ("gelu", lambda t, w: ops.gelu(t, backend=way.backend)),
        ("swiglu", lambda t, w: ops.swiglu(t, t, backend=way.backend)),
    ):
        assert torch.equal(run(x, weight), run(x.reshape(24, 32), weight).view(x.shape)), name
        assert torch.equal(run(x[0, 0, 0], weight), run(x, weight)[0, 0, 0]), name
    assert torch.equal(ops.gelu(x[0, 0, 0, 0], backend=way.backend), ops.gelu(x, backend=way.backend)[0, 0, 0, 0])


@every_way
def test_what_is_not_finite_stays_in_its_row(way: Way) -> None:
    for name in ("adaln", "rms_norm", "gate_add"):
        clean = leaves(OPS[name].make(2, 5, 24), way.device)
        spoilt = [t.detach().clone() for t in clean]
        spoilt[0][1, 2, 3], spoilt[0][0, 4, 5] = torch.nan, torch.inf
        spoilt = [t.requires_grad_() for t in spoilt]
        results = []
        for args in (clean, spoilt):
            out = OPS[name].run(*args, backend=way.backend)
            results.append((out, gradients(out, args, torch.ones_like(out))[0]))
        rows = torch.ones(2, 5, dtype=torch.bool, device=way.device)
        rows[1, 2] = rows[0, 4] = False
        for ours, other in zip(*results, strict=True):
            assert torch.equal(ours[rows], other[rows])
        assert torch.isnan(results[1][0][1, 2, 3])


@every_way
def test_activations_at_the_ends_of_the_line(way: Way) -> None:
    for dtype in DTYPES:
        most = torch.finfo(dtype).max
        ends = [
            0.0,
            -0.0,
            1e-7,
            5.0,
            -5.0,
            9.99,
            -9.99,
            10.01,
            -10.01,
            60.0,
            -60.0,
            90.0,
            -90.0,
            6e4,
            -6e4,
            most,
            -most,
        ]
        x = torch.tensor([*ends, torch.inf, torch.nan], device=way.device).to(dtype).requires_grad_()
        up = torch.ones_like(x)
        for ours, theirs in (
            (ops.gelu(x, backend=way.backend), F.gelu(x.double(), approximate="tanh")),
            (ops.swiglu(x, up, backend=way.backend), F.silu(x.double())),
        ):
            step = 2 * torch.finfo(dtype).eps
            torch.testing.assert_close(ours.double(), theirs, rtol=step, atol=step * 1e-3, equal_nan=True)
            (grad,) = torch.autograd.grad(ours.sum(), x)
            inside = x.detach().abs() < 100
            (exact,) = torch.autograd.grad(theirs.sum(), x)
            torch.testing.assert_close(grad[inside].double(), exact[inside].double(), rtol=2 * step, atol=step)
            assert torch.equal(grad[~inside & (x > 0)], torch.ones_like(grad[~inside & (x > 0)]))
            assert float(grad[x < -100].abs().max()) < 1e-30
            assert torch.isnan(grad[-1])


@pytest.mark.usefixtures("threads")
@every_op
@every_native
def test_neither_threads_nor_company_change_a_bit(way: Way, name: str) -> None:
    """Sizes beyond those that one thread does alone; then the first example by itself."""
    args = leaves(OPS[name].make(3, 300, 136), way.device)
    grad = numbers(3, 300, 136, seed=9)
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        out = OPS[name].run(*args, backend=way.backend)
        results.append([bits(t) for t in (out, *gradients(out, args, grad))])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    alone = [t[:1].detach().clone().requires_grad_() if t.shape[0] == 3 else t for t in args]
    out = OPS[name].run(*alone, backend=way.backend)
    for ours, all_of_them, arg in zip((out, *gradients(out, alone, grad[:1])), results[0], (out, *alone), strict=True):
        if arg.dim() > 1:
            first = all_of_them.flatten()[: bits(ours).numel()]
            assert torch.equal(bits(ours).flatten(), first)


@every_way
def test_sums_have_one_order(way: Way) -> None:
    """Again and again the same bits; and what large numbers leave when they cancel is that of fp32 sums."""
    x, shift, scale = leaves(OPS["adaln"].make(2, 400, 24), way.device, torch.bfloat16)
    grad = (100 * numbers(2, 400, 24, seed=9)).to(way.device, torch.bfloat16)
    runs = []
    for _ in range(3):
        out = ops.adaln(x, shift, scale, backend=way.backend)
        runs.append(gradients(out, [shift, scale], grad))
    assert all(torch.equal(bits(a), bits(b)) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))
    exact = grad.double().sum(1)
    assert float((runs[0][0].double() - exact).abs().max()) <= float(exact.abs().max()) * 2**-8
