"""The rectified flow's loss from what the decoder's head returns, in patches as it returns them (paper A.5).

The gradient is that of the head's output alone: the pass that adds up squared errors also writes the errors, in the
output's dtype, and backward multiplies them by one number. So frames, noise and output are read once, and the output
need not be kept.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from flexlam_fast.ambient import outside_autocast
from flexlam_fast.backend import AUTO, NATIVE, REFERENCE, TRITON
from flexlam_fast.checks import check_choice, check_number, check_tensor, describe
from flexlam_fast.errors import InputError
from flexlam_fast.ops import native_frames
from flexlam_fast.ops.arguments import FLOATS
from flexlam_fast.ops.contracts import compiled
from flexlam_fast.ops.differentiable import define_differentiable, define_plain
from flexlam_fast.ops.gradients import wants_gradient
from flexlam_fast.ops.linear import pick
from flexlam_fast.ops.patches import check_frames, check_path, patches_of, pixels_of

PREDICTIONS = ("velocity", "frame")


@outside_autocast
def flow_loss(
    out: Tensor,
    now: Tensor,
    following: Tensor,
    noise: Tensor,
    tau: Tensor,
    *,
    predict: str,
    floor: float = 0.05,
    backend: str | None = AUTO,
) -> Tensor:
    """Return the mean squared error between the flow's velocity and its target ``o_{t+1} - noise``.

    Args:
        out: what the decoder's head says, ``[B, N, C p p]`` floating; the only argument that gets a gradient.
        now: ``o_t``, uint8 ``[B, H, W, C]``.
        following: ``o_{t+1}``, like ``now``.
        noise: fp32 ``[B, C H W]``, pixels in the order ``[C, H, W]``.
        tau: flow times, fp32 ``[B]``.
        predict: what ``out`` is: ``"velocity"``, or ``"frame"``, the change from ``o_t`` to the clean frame; the
            velocity is then ``(o_t + out - x_tau) / max(1 - tau, floor)``.
        floor: least time left; of ``"frame"`` only.
        backend: ``"reference"``, ``"triton"`` or, on a CPU, ``"native"``; None or ``"auto"`` takes Triton on CUDA and
            C++ on a CPU.

    Returns:
        fp32 ``[]`` (fp64 for an fp64 ``out``); NaN for an empty batch, as a mean is.

    Raises:
        InputError: wrong shape, dtype, device or prediction.
        BackendError: a backend asked for by name that cannot run here or does not take such arguments.
    """
    patch = _check(out, now, following, noise, tau, predict, floor)
    name = pick(backend, out.device, out.dtype, 1, native=True)
    given = now if predict == "frame" else None
    if name == REFERENCE:
        return reference(out, given, following, noise, tau, patch, float(floor))
    return _loss(out, given, following, noise, tau, patch, float(floor), wants_gradient(out), name)[0]


def reference(
    out: Tensor, now: Tensor | None, following: Tensor, noise: Tensor, tau: Tensor, patch: int, floor: float
) -> Tensor:
    """:func:`flow_loss` in plain PyTorch; ``now`` is None where ``out`` is the velocity."""
    wide = torch.promote_types(out.dtype, torch.float32)
    velocity, after = out.to(wide), pixels_of(following).to(wide)
    start, time = noise.to(wide).view(after.shape), tau.to(wide).view(-1, 1, 1, 1)
    if now is not None:
        x = patches_of((1 - time) * start + time * after, patch)
        rest = (1 - time).clamp_min(floor).view(-1, 1, 1)
        velocity = (patches_of(pixels_of(now).to(wide), patch) + velocity - x) / rest
    return (velocity - patches_of(after - start, patch)).square().mean()


def _check(out: Tensor, now: Tensor, following: Tensor, noise: Tensor, tau: Tensor, predict: str, floor: float) -> int:
    """Check everything; return the side of a patch."""
    check_tensor("out", out, ["B", "N", "F"], FLOATS)
    check_frames("now", now, 1)
    check_tensor("now", now, [*now.shape], torch.uint8, out.device)
    check_path(now.shape, following, noise, tau, out.device)
    check_choice("predict", predict, PREDICTIONS)
    check_number("floor", floor, 0, 1, open_low=True)
    batch, height, width, channels = now.shape
    patch = math.isqrt(out.shape[2] // channels)
    if patch < 1 or channels * patch * patch != out.shape[2]:
        raise InputError(f"out: expected whole square patches of {channels} channels, got {describe(out)}")
    check_frames("now", now, patch)
    check_tensor("out", out, [batch, (height // patch) * (width // patch), out.shape[2]], FLOATS)
    return patch


def flow_error(
    out: Tensor,
    now: Tensor | None,
    following: Tensor,
    noise: Tensor,
    tau: Tensor,
    patch: int,
    floor: float,
    with_error: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Launch the forward kernel; arguments are checked. Returns the loss and the errors (none of them otherwise)."""
    args = out, now, following, noise, tau, patch, floor, with_error
    if backend == NATIVE:
        return native_frames.flow_loss(compiled(NATIVE), *args)
    return compiled(TRITON, "launch_frames").flow_loss(*args)


def flow_error_backward(grad: Tensor, error: Tensor, backend: str) -> Tensor:
    """Launch the backward kernel: the gradient of ``out``."""
    if backend == NATIVE:
        return native_frames.scale_error(compiled(NATIVE), grad, error)
    return compiled(TRITON, "launch_frames").scale_error(grad, error)


def _fake(
    out: Tensor,
    now: Any,
    following: Any,
    noise: Any,
    tau: Any,
    patch: int,
    floor: float,
    with_error: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return out.new_empty((), dtype=torch.float32), out.new_empty(out.shape if with_error else (0,))


def _fake_backward(grad: Tensor, error: Tensor, backend: str) -> Tensor:
    return error.new_empty(error.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.backend = inputs[-1]


def _backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    (error,) = ctx.saved_tensors
    return _scale(grad, error, ctx.backend), None, None, None, None, None, None, None, None


_scale = define_plain("(Tensor grad, Tensor error, str backend) -> Tensor", flow_error_backward, _fake_backward)
_loss = define_differentiable(
    "(Tensor out, Tensor? now, Tensor following, Tensor noise, Tensor tau, int patch, float floor, bool with_error, "
    "str backend) -> (Tensor, Tensor)",
    flow_error,
    _fake,
    _setup,
    _backward,
)
