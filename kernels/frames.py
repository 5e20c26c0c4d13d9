"""Between stored frames and tokens: patches, and the flow's loss on patches; every input is read once.

A program takes a piece of one sample's patch elements in their own order, so that results, noise and what the decoder
said move in words of 16 bytes; the bytes of frames are gathered, each three bytes from the next, out of lines that the
program reads in full. The launcher turns fused multiply-adds off, because plain PyTorch rounds one by one.
"""

from __future__ import annotations

import triton
import triton.language as tl
from flexlam_fast.kernels.pieces import round_to

BLOCK = 1024  # elements of a program: 8 for each of 128 threads
FRAME, TUBELETS, FLOW = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def _pixel(frames_ptr, at, mask):
    """Return ``uint8 / 127.5 - 1`` rounded as the division rounds it: by the reciprocal in two parts."""
    u = tl.load(frames_ptr + at, mask=mask, other=0).to(tl.float32)
    return (u * 0.007843017578125 + u * 1.1967678403834725e-07) - 1.0


@triton.jit
def _place(element, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, CHANNELS: tl.constexpr, PATCH: tl.constexpr):
    """Return where a sample's patch elements are: token, field, offset in its frame and offset in its noise."""
    token, field = element // (CHANNELS * PATCH * PATCH), element % (CHANNELS * PATCH * PATCH)
    channel, row, column = field // (PATCH * PATCH), field // PATCH % PATCH, field % PATCH
    y = token // (WIDTH // PATCH) * PATCH + row
    x = token % (WIDTH // PATCH) * PATCH + column
    noise = (channel * HEIGHT + y) * WIDTH + x
    # pixels of a patch's row stand one behind the other in noise: said here, because the divisions hide it
    if PATCH % 4 == 0:
        noise = tl.max_contiguous(tl.multiple_of(noise, 4), 4)
    return token, field, (y * WIDTH + x) * CHANNELS + channel, noise


@triton.jit
def _mixed(frame, noise, tau):
    return (1.0 - tau) * noise + tau * frame


@triton.jit
def patches_kernel(now_ptr, following_ptr, noise_ptr, tau_ptr, out_ptr, gain, KIND: tl.constexpr, HEIGHT: tl.constexpr,
                   WIDTH: tl.constexpr, CHANNELS: tl.constexpr, PATCH: tl.constexpr, BLOCK: tl.constexpr,
                   INTERPRET: tl.constexpr):  # fmt: skip
    """One piece of one sample: ``out [B, N, F]`` of one frame, or of two images one behind the other."""
    # where am I
    ELEMENTS: tl.constexpr = HEIGHT * WIDTH * CHANNELS
    FIELDS: tl.constexpr = CHANNELS * PATCH * PATCH
    PIECES: tl.constexpr = (ELEMENTS + BLOCK - 1) // BLOCK
    sample = (tl.program_id(0) // PIECES).to(tl.int64)
    element = tl.program_id(0) % PIECES * BLOCK + tl.arange(0, BLOCK)
    mask = element < ELEMENTS
    token, field, pixel, place = _place(element, HEIGHT, WIDTH, CHANNELS, PATCH)

    # load
    frame = _pixel(now_ptr + sample * ELEMENTS, pixel, mask)
    first, second = frame, frame
    if KIND != FRAME:
        after = _pixel(following_ptr + sample * ELEMENTS, pixel, mask)
    if KIND == FLOW:
        noise = tl.load(noise_ptr + sample * ELEMENTS + place, mask=mask, other=0.0)
        tau = tl.load(tau_ptr + sample)

    # compute in fp32
    if KIND == TUBELETS:
        second = gain * (after - frame)
    if KIND == FLOW:
        first = _mixed(after, noise, tau)

    # store
    if KIND == FRAME:
        at = element
        out_ptr += sample * ELEMENTS
    else:
        at = token * (2 * FIELDS) + field
        out_ptr += sample * (2 * ELEMENTS)
        tl.store(out_ptr + at + FIELDS, round_to(second, out_ptr.dtype.element_ty, INTERPRET), mask=mask)
    tl.store(out_ptr + at, round_to(first, out_ptr.dtype.element_ty, INTERPRET), mask=mask)


@triton.jit
def flow_loss_kernel(out_ptr, now_ptr, following_ptr, noise_ptr, tau_ptr, error_ptr, sums_ptr, floor,
                     CHANGE: tl.constexpr, WITH_ERROR: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
                     CHANNELS: tl.constexpr, PATCH: tl.constexpr, BLOCK: tl.constexpr,
                     INTERPRET: tl.constexpr):  # fmt: skip
    """One piece of one sample: the fp64 sum of its squared errors, and what ``out``'s gradient is a multiple of."""
    # where am I
    ELEMENTS: tl.constexpr = HEIGHT * WIDTH * CHANNELS
    PIECES: tl.constexpr = (ELEMENTS + BLOCK - 1) // BLOCK
    sample = (tl.program_id(0) // PIECES).to(tl.int64)
    element = tl.program_id(0) % PIECES * BLOCK + tl.arange(0, BLOCK)
    mask = element < ELEMENTS
    _, _, pixel, place = _place(element, HEIGHT, WIDTH, CHANNELS, PATCH)

    # load
    velocity = tl.load(out_ptr + sample * ELEMENTS + element, mask=mask, other=0.0).to(tl.float32)
    after = _pixel(following_ptr + sample * ELEMENTS, pixel, mask)
    noise = tl.load(noise_ptr + sample * ELEMENTS + place, mask=mask, other=0.0)

    # compute in fp32
    weight = 1.0
    if CHANGE:
        tau = tl.load(tau_ptr + sample)
        rest = tl.maximum(1.0 - tau, floor)
        weight = tl.div_rn(1.0, rest)
        frame = _pixel(now_ptr + sample * ELEMENTS, pixel, mask)
        velocity = tl.div_rn(frame + velocity - _mixed(after, noise, tau), rest)
    error = tl.where(mask, velocity - (after - noise), 0.0)

    # store
    tl.store(sums_ptr + tl.program_id(0), tl.sum((error * error).to(tl.float64), axis=0))
    if WITH_ERROR:
        down = round_to(error * weight, error_ptr.dtype.element_ty, INTERPRET)
        tl.store(error_ptr + sample * ELEMENTS + element, down, mask=mask)


@triton.jit
def scale_kernel(grad_ptr, error_ptr, out_ptr, count, BLOCK: tl.constexpr, INTERPRET: tl.constexpr):
    """``out = error * (2 * grad / count)``."""
    # where am I
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < count

    # load
    error = tl.load(error_ptr + at, mask=mask, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr).to(tl.float32)

    # compute in fp32
    down = error * tl.div_rn(2.0 * grad, count.to(tl.float32))

    # store
    tl.store(out_ptr + at, round_to(down, out_ptr.dtype.element_ty, INTERPRET), mask=mask)
