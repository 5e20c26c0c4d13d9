"""The flow's loss on patches: the model's loss and gradient within the budget, one order of sums, one pass."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from frame_cases import DTYPES, SHAPES, Case, case, plain_loss
from linear_cases import every_kernel
from native_cases import Forced, every_variant
from torch import Tensor

from flexlam_fast import ops
from flexlam_fast.errors import BackendError, InputError
from flexlam_fast.layers import normalise, patchify
from flexlam_fast.ops import native_frames
from flexlam_fast.testing import GRADIENT_FACTOR, assert_within_budget

every_prediction = pytest.mark.parametrize("predict", ["velocity", "frame"])
UP = 1.7  # what arrives from above


@pytest.fixture
def threads() -> Iterator[None]:
    """Puts the number of threads back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def loss_of(c: Case, out: Tensor, predict: str, backend: str | None) -> Tensor:
    """Ours."""
    return ops.flow_loss(out, c.now, c.following, c.noise, c.tau, predict=predict, backend=backend)


def both(c: Case, out: Tensor, predict: str, backend: str | None) -> tuple[Tensor, Tensor]:
    """Loss and gradient."""
    out = out.detach().requires_grad_()
    loss = loss_of(c, out, predict, backend)
    return loss.detach(), torch.autograd.grad(loss, out, torch.full_like(loss, UP))[0]


def check(c: Case, out: Tensor, predict: str, loss: Tensor, gradient: Tensor) -> None:
    """Both are within the budget of the model's own loss."""
    assert (loss.dtype, gradient.dtype) == (torch.float32, out.dtype)

    def plain(x: Tensor) -> Tensor:
        return plain_loss(c, x, predict)

    def down(x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        value = plain(x)
        return torch.autograd.grad(value, x, torch.full_like(value, UP))[0]

    assert_within_budget(loss, plain, out.float(), working_dtype=torch.float32)
    assert_within_budget(gradient, down, out, working_dtype=out.dtype, factor=GRADIENT_FACTOR)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@every_prediction
@every_kernel
def test_loss_and_gradient_are_within_the_budget(
    backend: str, device: str, predict: str, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    c = case(shape, device)
    out = c.out.to(dtype)
    check(c, out, predict, *both(c, out, predict, backend))


@every_variant
def test_every_instruction_set_returns_the_same_bits(variant: str) -> None:
    for shape in SHAPES:
        c = case(shape)
        for dtype in DTYPES:
            for now in (None, c.now):
                args = (c.out.to(dtype), now, c.following, c.noise, c.tau, c.patch, 0.05, True)
                ours = native_frames.flow_loss(Forced(variant), *args)  # type: ignore[arg-type]
                theirs = native_frames.flow_loss(Forced("portable"), *args)  # type: ignore[arg-type]
                assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
                check_error(c, args[0], now, *ours)
                grad = torch.tensor(UP)
                down = native_frames.scale_error(Forced(variant), grad, ours[1])  # type: ignore[arg-type]
                expected = (ours[1].float() * (2 * float(grad) / c.out.numel())).to(dtype)
                assert torch.equal(down, expected)


def check_error(c: Case, out: Tensor, now: Tensor | None, loss: Tensor, error: Tensor) -> None:
    """The errors, rounded operation by operation, are those of plain PyTorch; the loss is their mean square."""
    after, rest = patchify(normalise(c.following), c.patch), (1 - c.tau).clamp_min(0.05).view(-1, 1, 1)
    noise = patchify(c.noise.view(-1, *normalise(c.following).shape[1:]), c.patch)
    velocity, weight = out.float(), torch.ones_like(rest)
    if now is not None:
        t, weight = c.tau.view(-1, 1, 1), 1 / rest
        velocity = (patchify(normalise(now), c.patch) + velocity - ((1 - t) * noise + t * after)) / rest
    plain = velocity - (after - noise)
    assert torch.equal(error, (plain * weight).to(out.dtype))
    torch.testing.assert_close(loss, plain.double().square().mean().float(), rtol=2e-7, atol=0)


@pytest.mark.usefixtures("threads")
@every_prediction
def test_the_number_of_threads_changes_no_bit(predict: str) -> None:
    c = case((7, 16, 16, 3, 4))
    found = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        found.append(both(c, c.out, predict, None))
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


@every_prediction
@every_kernel
def test_the_loss_needs_no_gradient_and_is_the_same_without_one(backend: str, device: str, predict: str) -> None:
    c = case(SHAPES[1], device)
    expected, _ = both(c, c.out, predict, backend)
    assert torch.equal(loss_of(c, c.out, predict, backend), expected)
    with torch.no_grad():
        assert not loss_of(c, c.out.clone().requires_grad_(), predict, backend).requires_grad


@every_kernel
def test_a_gradient_can_be_taken_twice(backend: str, device: str) -> None:
    c = case(SHAPES[3], device)
    out = c.out.clone().requires_grad_()
    loss = loss_of(c, out, "frame", backend)
    first = torch.autograd.grad(loss, out, retain_graph=True)[0]
    assert torch.equal(torch.autograd.grad(2 * loss, out)[0], 2 * first)


@every_kernel
def test_inputs_may_be_strided_and_batches_empty(backend: str, device: str) -> None:
    c = case((4, 8, 8, 3, 4), device)
    wide = [torch.stack([t, t.flip(0)], dim=-1) for t in c[:5]]
    strided = Case(*(t[::2, ..., 0] for t in wide), c.patch)
    packed = Case(*(t.contiguous() for t in strided[:5]), c.patch)
    for ours, theirs in zip(
        both(strided, strided.out, "frame", backend), both(packed, packed.out, "frame", backend), strict=True
    ):
        assert torch.equal(ours, theirs)
    none = Case(*(t[:0] for t in c[:5]), c.patch)
    loss, gradient = both(none, none.out, "velocity", backend)
    assert loss.isnan()
    assert gradient.shape == none.out.shape


@every_prediction
def test_gradcheck_of_the_reference(predict: str) -> None:
    c = case((2, 4, 6, 3, 2))
    out = c.out.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: loss_of(c, x, predict, "reference"), (out,))


def test_the_reference_is_the_models_loss() -> None:
    for shape in SHAPES:
        c = case(shape)
        for predict in ("velocity", "frame"):
            ours, expected = (loss_of(c, c.out, predict, "reference"), plain_loss(c, c.out, predict))
            torch.testing.assert_close(ours, expected, rtol=1e-6, atol=0)


@every_kernel
def test_opcheck(backend: str, device: str) -> None:
    c = case(SHAPES[4], device)
    out = c.out.clone().requires_grad_()
    for now in (None, c.now):
        args = (out, now, c.following, c.noise, c.tau, c.patch, 0.05, True, backend)
        told = torch.library.opcheck(torch.ops.flexlam_fast.flow_error.default, args)
        assert set(told.values()) == {"SUCCESS"}
    args = (torch.tensor(1.0, device=device), c.out, backend)
    told = torch.library.opcheck(torch.ops.flexlam_fast.flow_error_backward.default, args)
    assert set(told.values()) == {"SUCCESS"}


@every_kernel
def test_one_graph_under_torch_compile(backend: str, device: str) -> None:
    c = case(SHAPES[2], device)
    out = c.out.clone().requires_grad_()
    compiled = torch.compile(lambda x: loss_of(c, x * 2, "frame", backend), fullgraph=True, backend="aot_eager")
    ours = torch.autograd.grad(compiled(out), out)[0]
    assert torch.equal(ours, torch.autograd.grad(loss_of(c, out * 2, "frame", backend), out)[0])


C = case((2, 8, 12, 3, 4))
BAD = [
    (C._replace(out=C.out[..., 1:]), "velocity", r"^out: expected whole square patches of 3 channels, got \[2,6,47\]"),
    (C._replace(out=C.out[:, 1:]), "velocity", r"^out: expected \[2,6,48\] float32 or .*, got \[2,5,48\] float32 cpu$"),
    (C._replace(out=C.out.int()), "velocity", r"^out: expected \[B,N,F\] float32 or .*, got \[2,6,48\] int32 cpu$"),
    (
        C._replace(now=C.now[:1]),
        "velocity",
        r"^following: expected \[1,8,12,3\] uint8 cpu, got \[2,8,12,3\] uint8 cpu$",
    ),
    (C, "noise", r"^predict: expected one of velocity, frame, got 'noise'$"),
]


@pytest.mark.parametrize(("c", "predict", "sentence"), BAD, ids=[s for *_, s in BAD])
def test_one_sentence_says_what_is_wrong(c: Case, predict: str, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        loss_of(c, c.out, predict, None)


def test_a_floor_of_nothing_and_fp64_by_name_are_refused() -> None:
    with pytest.raises(InputError, match=r"^floor: expected a number above 0, at most 1, got 0$"):
        ops.flow_loss(C.out, C.now, C.following, C.noise, C.tau, predict="frame", floor=0)
    with pytest.raises(BackendError, match="float32, float16 or bfloat16"):
        loss_of(C, C.out.double(), "frame", "native")
