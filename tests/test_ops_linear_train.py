"""A linear layer of training: against fp64 and torch's own, where it is taken, and what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from flexlam_fast import ops
from flexlam_fast.backend import NATIVE, REFERENCE
from flexlam_fast.errors import BackendError, InputError
from flexlam_fast.layers import Linear, set_backend
from flexlam_fast.ops import linear_train
from flexlam_fast.testing import GRADIENT_FACTOR, assert_within_budget

CPU, BF16 = torch.device("cpu"), torch.bfloat16
needs_tiles = pytest.mark.skipif(not linear_train.takes(CPU, 32, 32), reason="no AMX, or no extension")


class Drawn(NamedTuple):
    x: Tensor
    weight: Tensor
    bias: Tensor | None
    grad: Tensor


def draw(rows: int, inner: int, outer: int, bias: bool = True) -> Drawn:
    weight = (torch.randn(outer, inner) * inner**-0.5).requires_grad_()
    offset = torch.randn(outer).requires_grad_() if bias else None
    return Drawn(torch.randn(rows, inner).to(BF16).requires_grad_(), weight, offset, torch.randn(rows, outer).to(BF16))


def run(d: Drawn, backend: str = NATIVE) -> tuple[Tensor, ...]:
    """The result, and the gradients of input, weight and bias."""
    out = ops.linear_bf16(d.x, d.weight, d.bias, backend=backend)
    return out, *torch.autograd.grad(out, [t for t in d[:3] if t is not None], d.grad)


@pytest.fixture
def threads() -> Iterator[None]:
    """Puts the number of threads back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@needs_tiles
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("rows", "inner", "outer"),
    [(1, 32, 32), (33, 64, 32), (255, 32, 96), (257, 128, 128), (600, 96, 160), (1100, 160, 96), (2304, 128, 384)],
)
def test_result_and_gradients_are_within_the_budget(rows: int, inner: int, outer: int, bias: bool) -> None:
    d = draw(rows, inner, outer, bias)
    out, dx, *sums = run(d)
    assert (out.dtype, dx.dtype, {t.dtype for t in sums}) == (BF16, BF16, {torch.float32})
    parts = d.x, d.weight, *([d.bias] if bias else [])
    assert_within_budget(out, lambda x, w, *b: F.linear(x, w, *b), *parts, working_dtype=BF16)
    assert_within_budget(dx, lambda g, w: g @ w, d.grad, d.weight, working_dtype=BF16, factor=GRADIENT_FACTOR)
    # of numbers that are bf16 already, these are sums in fp32 and have its error, not that of bf16
    x, grad = d.x.detach().float(), d.grad.float()
    assert_within_budget(sums[0], lambda g, x: g.T @ x, grad, x, working_dtype=torch.float32, factor=GRADIENT_FACTOR)
    if bias:
        assert_sums_within_budget(sums[1], grad)


def assert_sums_within_budget(bias: Tensor, grad: Tensor) -> None:
    assert_within_budget(bias, lambda g: g.sum(0), grad, working_dtype=torch.float32, factor=GRADIENT_FACTOR)


@needs_tiles
@pytest.mark.parametrize("mean", [0.0, 0.5])
def test_long_sums_of_one_sign_are_within_the_budget(mean: float) -> None:
    """As many rows as a batch of the paper's LAM has tokens."""
    x, grad = (mean + torch.randn(81_920, width) for width in (64, 32))
    weight, bias = linear_train.linear_gradients(grad.to(BF16), x.to(BF16), True)
    x, grad = (t.to(BF16).float() for t in (x, grad))
    assert_within_budget(weight, lambda g, x: g.T @ x, grad, x, working_dtype=torch.float32, factor=GRADIENT_FACTOR)
    assert_sums_within_budget(bias, grad)


@needs_tiles
def test_the_result_is_that_of_autocast_and_gradients_round_to_its() -> None:
    d = draw(700, 128, 96)
    with torch.autocast("cpu", BF16):
        theirs = F.linear(d.x, d.weight, d.bias)
    mine = run(d)
    assert torch.equal(mine[0], theirs)
    for one, other in zip(mine[1:], torch.autograd.grad(theirs, d[:3], d.grad), strict=True):
        torch.testing.assert_close(one.to(BF16).float(), other.to(BF16).float(), rtol=2**-6, atol=1e-2)
    for one, other in zip(mine, run(d, REFERENCE), strict=True):
        torch.testing.assert_close(one.float(), other.float(), rtol=2**-6, atol=1e-2)


@needs_tiles
@pytest.mark.parametrize(("rows", "inner", "outer"), [(40, 32, 64), (1000, 64, 224), (1000, 224, 64)])
def test_any_number_of_threads_gives_the_same_bits(threads: None, rows: int, inner: int, outer: int) -> None:
    d = draw(rows, inner, outer)
    results = []
    for count in (1, 2, 3, 5, 16):
        torch.set_num_threads(count)
        results.append(run(d)[2:])
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@needs_tiles
def test_strides_and_leading_dimensions_do_not_matter() -> None:
    d = draw(60, 64, 96)
    expected = run(d)
    wide = torch.zeros(60, 130, dtype=BF16)
    wide[:, 3:67] = d.x.detach()
    x = wide[:, 3:67].view(5, 12, 64).requires_grad_()
    for grad in (d.grad.view(5, 12, 96), d.grad.t().contiguous().t().view(5, 12, 96), torch.ones(()).to(BF16)):
        out = ops.linear_bf16(x, d.weight, d.bias, backend=NATIVE)
        dx, *sums = torch.autograd.grad(out, (x, d.weight, d.bias), grad.expand(5, 12, 96))
        if grad.dim():
            results = out.flatten(0, 1), dx.flatten(0, 1), *sums
            assert all(torch.equal(a, b) for a, b in zip(expected, results, strict=True))
        else:
            assert torch.equal(sums[1], torch.full((96,), 60.0))


@needs_tiles
def test_only_what_is_wanted_is_formed(monkeypatch: pytest.MonkeyPatch) -> None:
    d = draw(40, 32, 32)
    frozen = d.weight.detach(), d.bias.detach()  # type: ignore[union-attr]
    out = ops.linear_bf16(d.x, *frozen, backend=NATIVE)
    monkeypatch.setattr(linear_train, "_run_gradients", None)  # not called
    (dx,) = torch.autograd.grad(out, d.x, d.grad)
    assert torch.equal(dx, d.grad @ frozen[0].to(BF16))
    monkeypatch.undo()
    out = ops.linear_bf16(d.x.detach(), d.weight, d.bias, backend=NATIVE)
    weight, bias = torch.autograd.grad(out, (d.weight, d.bias), d.grad)
    assert torch.equal(weight, run(d)[2])
    assert torch.equal(bias, run(d)[3])


@needs_tiles
def test_no_rows_and_rows_of_nan() -> None:
    d = draw(0, 32, 64)
    assert not any(bool(t.any()) for t in run(d)[2:])
    d = draw(50, 32, 64)
    d.grad[7, 3] = torch.nan
    weight, bias = run(d)[2:]
    assert bool(weight[3].isnan().all())
    assert int(weight.isnan().sum()) == 32
    assert bias.isnan().nonzero().tolist() == [[3]]


@needs_tiles
def test_opcheck_and_the_compiler() -> None:
    d, library = draw(40, 32, 64), torch.ops.flexlam_fast
    half = d.weight.detach().to(BF16)
    torch.library.opcheck(library.linear_rows.default, (d.x, d.weight, d.bias, half))
    torch.library.opcheck(library.linear_rows.default, (d.x, d.weight, None, half))
    for bias in (True, False):
        torch.library.opcheck(library.linear_gradients.default, (d.grad, d.x.detach(), bias))
    compiled = torch.compile(lambda x: ops.linear_bf16(x, d.weight, d.bias), backend="eager", fullgraph=True)
    out = compiled(d.x)
    results = out, *torch.autograd.grad(out, d[:3], d.grad)
    assert all(torch.equal(a, b) for a, b in zip(results, run(d), strict=True))


@needs_tiles
def test_it_is_differentiable_once() -> None:
    d = draw(40, 32, 64)
    out = ops.linear_bf16(d.x, d.weight, d.bias, backend=NATIVE)
    grads = torch.autograd.grad(out.float().square().sum(), d[:3], create_graph=True)
    for grad in grads:
        with pytest.raises(RuntimeError, match="differentiate twice"):
            grad.float().sum().backward(retain_graph=True)


def test_whoever_looks_on_sees_the_reference() -> None:
    """Functorch goes through it, and what autocast is set to outside changes nothing."""
    d = draw(40, 32, 64)
    x = d.x.detach()

    def total(x: Tensor, weight: Tensor, **options: str) -> Tensor:
        return (ops.linear_bf16(x, weight, d.bias.detach(), **options) * d.grad).float().sum()  # type: ignore[union-attr]

    mine = torch.func.grad(total, argnums=(0, 1))(x, d.weight.detach())
    theirs = torch.autograd.grad(total(d.x, d.weight, backend=REFERENCE), (d.x, d.weight))
    assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
    for kind in (torch.float16, BF16):
        with torch.autocast("cpu", kind):
            for backend in (REFERENCE, "auto"):
                assert ops.linear_bf16(d.x, d.weight, d.bias, backend=backend).dtype == BF16


@needs_tiles
def test_a_layer_takes_it_in_training_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under bf16 autocast, with gradients, where widths fit; state and results are those of ``nn.Linear``."""
    calls: list[torch.Size] = []
    real = linear_train.linear_bf16

    def counted(x: Tensor, *rest: object, **options: object) -> Tensor:
        calls.append(x.shape)
        return real(x, *rest, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(linear_train, "linear_bf16", counted)
    layer, odd, x = Linear(64, 32), Linear(64, 30), torch.randn(3, 7, 64)
    plain = torch.nn.Linear(64, 32)
    plain.load_state_dict(layer.state_dict())
    with torch.autocast("cpu", BF16):
        layer(x)
        for part in (layer, odd):
            set_backend(part, NATIVE, CPU)
        assert not calls
        assert torch.equal(layer(x), plain(x))
        assert calls == [x.shape]
        odd(x)
        with torch.no_grad():
            layer(x)
    layer(x)
    layer.weight.requires_grad_(False)
    mixed = set_backend(Linear(64, 32), NATIVE, CPU)
    mixed.bias = torch.nn.Parameter(mixed.bias.to(BF16))
    with torch.autocast("cpu", BF16):
        layer(x)
        mixed(x)
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"x": [1.0]}, r"^x: expected \[\.\.\.,I\] .*, got"),
        ({"x": torch.ones(3, 32, dtype=torch.int64)}, r"^x: expected \[\.\.\.,I\] float32.*, got \[3,32\] int64"),
        ({"x": torch.ones(3, 31)}, r"^weight: expected \[O,31\] float32 cpu, got \[64,32\]"),
        ({"weight": torch.ones(64, 32, dtype=BF16)}, r"^weight: expected \[O,32\] float32 cpu, got .*bfloat16"),
        ({"bias": torch.ones(63)}, r"^bias: expected \[64\] float32 cpu, got \[63\]"),
    ],
)
def test_bad_arguments_are_one_sentence(change: dict[str, Tensor], sentence: str) -> None:
    good = {"x": torch.ones(3, 32), "weight": torch.ones(64, 32), "bias": torch.ones(64)}
    with pytest.raises(InputError, match=sentence):
        ops.linear_bf16(**{**good, **change})


def test_backends_are_known_and_fit() -> None:
    x, odd = torch.ones(3, 32), torch.ones(30, 32)
    with pytest.raises(BackendError, match=r"^backend: expected 'auto' or 'reference' or 'native' .* got 'triton'$"):
        ops.linear_bf16(x, odd, None, backend="triton")
    with pytest.raises(BackendError, match=r"^backend: expected one of"):
        ops.linear_bf16(x, odd, None, backend="fast")
    assert torch.equal(ops.linear_bf16(x, odd, None), torch.full((3, 30), 32.0, dtype=BF16))


@needs_tiles
def test_widths_that_tiles_do_not_take_are_refused_by_name() -> None:
    sentence = r"^backend: expected AMX and widths of whole 32s for 'native', got a weight of 30 x 32$"
    with pytest.raises(BackendError, match=sentence):
        ops.linear_bf16(torch.ones(3, 32), torch.ones(30, 32), None, backend=NATIVE)
