"""Patches straight from stored frames: what the encoder, the sequence model and the decoder embed (paper Table 6, A.5).

Pixels are ``uint8 / 127.5 - 1`` and patches ``[channel, row, column]``, row by row, as ``layers.normalise`` and
``layers.patchify`` make them, to the bit in fp32. Every input is read once and every output written once; there are no
gradients, because frames and noise are data.
"""

from __future__ import annotations

import numbers
from typing import Any

import torch
from torch import Tensor

from flexlam_fast.ambient import outside_autocast
from flexlam_fast.backend import AUTO, NATIVE, REFERENCE, TRITON
from flexlam_fast.checks import check_number, check_tensor, describe
from flexlam_fast.errors import InputError
from flexlam_fast.ops import native_frames
from flexlam_fast.ops.arguments import FLOATS, MAX_FP32
from flexlam_fast.ops.contracts import compiled
from flexlam_fast.ops.differentiable import define_plain
from flexlam_fast.ops.linear import pick

FRAME, TUBELETS, FLOW = 0, 1, 2  # as in csrc/frames.h
MOST_PATCH = 256  # pixels; the C++ works on so much of a row at a time


@outside_autocast
def frame_patches(
    frames: Tensor, patch: int, *, dtype: torch.dtype = torch.float32, backend: str | None = AUTO
) -> Tensor:
    """Return the patches of frames, as the sequence model embeds them.

    Args:
        frames: uint8 ``[B, H, W, C]``.
        patch: side of a patch in pixels, at most 256, which divides ``H`` and ``W``.
        dtype: floating dtype of the result, rounded once.
        backend: ``"reference"``, ``"triton"`` or, on a CPU, ``"native"``; None or ``"auto"`` takes Triton on CUDA and
            C++ on a CPU.

    Returns:
        ``[B, (H/p)(W/p), C p p]`` in ``dtype``, no gradient.

    Raises:
        InputError: wrong shape, dtype or device, or a patch that does not divide the frame.
        BackendError: a backend asked for by name that cannot run here or does not take such arguments.
    """
    check_frames("frames", frames, patch)
    return _run(frames, None, None, None, FRAME, patch, 1.0, dtype, backend)


@outside_autocast
def tubelets(
    now: Tensor,
    following: Tensor,
    patch: int,
    gain: float,
    *,
    dtype: torch.dtype = torch.float32,
    backend: str | None = AUTO,
) -> Tensor:
    """Return tubelet patches: the same square of ``o_t``, and ``gain`` times its change to ``o_{t+1}``.

    Args:
        now: ``o_t``, uint8 ``[B, H, W, C]``.
        following: ``o_{t+1}``, like ``now``.
        patch: as in :func:`frame_patches`.
        gain: what the change is multiplied by; the encoder's is ``encoder.CHANGE_GAIN``.
        dtype: as in :func:`frame_patches`.
        backend: as in :func:`frame_patches`.

    Returns:
        ``[B, (H/p)(W/p), 2 C p p]`` in ``dtype``, no gradient: the frame's channels, then those of the change.

    Raises:
        InputError: wrong shape, dtype or device, or a patch that does not divide the frame.
        BackendError: a backend asked for by name that cannot run here or does not take such arguments.
    """
    check_frames("now", now, patch)
    check_tensor("following", following, list(now.shape), torch.uint8, now.device)
    gain = float(check_number("gain", gain, -MAX_FP32, MAX_FP32))
    return _run(now, following, None, None, TUBELETS, patch, gain, dtype, backend)


@outside_autocast
def flow_patches(
    now: Tensor,
    following: Tensor,
    noise: Tensor,
    tau: Tensor,
    patch: int,
    *,
    dtype: torch.dtype = torch.float32,
    backend: str | None = AUTO,
) -> Tensor:
    """Return patches of the channels of ``x_tau = (1 - tau) noise + tau o_{t+1}`` and of ``o_t``, for the decoder.

    Args:
        now: ``o_t``, uint8 ``[B, H, W, C]``.
        following: ``o_{t+1}``, like ``now``.
        noise: fp32 ``[B, C H W]``, pixels in the order ``[C, H, W]``.
        tau: flow times, fp32 ``[B]``.
        patch: as in :func:`frame_patches`.
        dtype: as in :func:`frame_patches`.
        backend: as in :func:`frame_patches`.

    Returns:
        ``[B, (H/p)(W/p), 2 C p p]`` in ``dtype``, no gradient.

    Raises:
        InputError: wrong shape, dtype or device, or a patch that does not divide the frame.
        BackendError: a backend asked for by name that cannot run here or does not take such arguments.
    """
    check_frames("now", now, patch)
    check_path(now.shape, following, noise, tau, now.device)
    return _run(now, following, noise, tau, FLOW, patch, 1.0, dtype, backend)


def pixels_of(frames: Tensor) -> Tensor:
    """uint8 ``[..., H, W, C]`` to fp32 ``[..., C, H, W]`` in ``[-1, 1]``: ``uint8 / 127.5 - 1``."""
    return frames.movedim(-1, -3).float() / 127.5 - 1.0


def patches_of(pixels: Tensor, patch: int) -> Tensor:
    """``[B, C, H, W]`` to ``[B, N, C p p]``, row by row."""
    b, c, h, w = pixels.shape
    x = pixels.reshape(b, c, h // patch, patch, w // patch, patch)
    return x.permute(0, 2, 4, 1, 3, 5).reshape(b, (h // patch) * (w // patch), c * patch * patch)


@torch.no_grad()
def reference(
    now: Tensor,
    following: Tensor | None,
    noise: Tensor | None,
    tau: Tensor | None,
    kind: int,
    patch: int,
    gain: float,
    dtype: torch.dtype,
) -> Tensor:
    """All three ops in plain PyTorch; arguments are those of the op ``make_patches``."""
    frame = pixels_of(now)
    if following is None:
        return patches_of(frame, patch).to(dtype)
    after = pixels_of(following)
    if noise is None or tau is None:
        change = gain * patches_of(after - frame, patch)
        return torch.cat([patches_of(frame, patch), change], dim=-1).to(dtype)
    t = tau.view(-1, 1, 1, 1)
    x = (1 - t) * noise.view(after.shape) + t * after
    return patches_of(torch.cat([x, frame], dim=1), patch).to(dtype)


def check_frames(name: str, frames: Tensor, patch: int) -> None:
    """Check uint8 frames ``[B, H, W, C]`` that whole patches cover."""
    check_tensor(name, frames, ["B", "H", "W", "C"], torch.uint8)
    if isinstance(patch, bool) or not isinstance(patch, numbers.Integral) or not 1 <= patch <= MOST_PATCH:
        raise InputError(f"patch: expected an integer in 1..{MOST_PATCH}, got {patch!r}")
    height, width, channels = frames.shape[1:]
    if height % patch or width % patch or not height * width * channels:
        raise InputError(f"{name}: expected frames of whole patches of {patch} pixels, got {list(frames.shape)}")


def check_path(shape: torch.Size, following: Tensor, noise: Tensor, tau: Tensor, device: torch.device) -> None:
    """Check what the flow's path is made of, for frames of ``shape``."""
    check_tensor("following", following, list(shape), torch.uint8, device)
    check_tensor("noise", noise, [shape[0], shape[1] * shape[2] * shape[3]], torch.float32, device)
    check_tensor("tau", tau, [shape[0]], torch.float32, device)


def _run(
    now: Tensor,
    following: Tensor | None,
    noise: Tensor | None,
    tau: Tensor | None,
    kind: int,
    patch: int,
    gain: float,
    dtype: torch.dtype,
    backend: str | None,
) -> Tensor:
    """Pick and call."""
    if not isinstance(dtype, torch.dtype) or dtype not in FLOATS:
        raise InputError(f"dtype: expected a floating dtype, got {describe(dtype)}")
    name = pick(backend, now.device, dtype, 1, native=True)
    if name == REFERENCE:
        return reference(now, following, noise, tau, kind, patch, gain, dtype)
    return _make(now, following, noise, tau, kind, int(patch), gain, dtype, name)


def make_patches(
    now: Tensor,
    following: Tensor | None,
    noise: Tensor | None,
    tau: Tensor | None,
    kind: int,
    patch: int,
    gain: float,
    dtype: torch.dtype,
    backend: str,
) -> Tensor:
    """Launch the kernel of all three ops; their arguments are checked."""
    args = now, following, noise, tau, kind, patch, gain, dtype
    if backend == NATIVE:
        return native_frames.make_patches(compiled(NATIVE), *args)
    return compiled(TRITON, "launch_frames").make_patches(*args)


def _fake(
    now: Tensor, following: Any, noise: Any, tau: Any, kind: int, patch: int, gain: float, dtype: Any, backend: str
) -> Tensor:
    batch, height, width, channels = now.shape
    fields = (1 if kind == FRAME else 2) * channels * patch * patch
    return now.new_empty((batch, (height // patch) * (width // patch), fields), dtype=dtype)


_make = define_plain(
    "(Tensor now, Tensor? following, Tensor? noise, Tensor? tau, int kind, int patch, float gain, ScalarType dtype, "
    "str backend) -> Tensor",
    make_patches,
    _fake,
)
