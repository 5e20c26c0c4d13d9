"""Launchers of the C++ between frames and tokens: tensors to addresses, nothing else. Arguments have been checked.

``contracts.compiled`` hands in the extension, so this file can be imported where there is none.
"""

from __future__ import annotations

import math
from types import ModuleType

import torch
from torch import Tensor

from flexlam_fast.ops.native import TYPES


def draw_noise(extension: ModuleType, seed: Tensor, streams: Tensor, count: int) -> Tensor:
    """Standard normal numbers fp32 ``[B, count]``."""
    streams = streams.contiguous()
    out = torch.empty(streams.shape[0], count, dtype=torch.float32, device="cpu")
    if out.numel():
        key, step = seed.tolist()
        sizes = streams.shape[0], count
        extension.draw_normal(key, step, streams.data_ptr(), out.data_ptr(), *sizes, torch.get_num_threads())
    return out


def draw_words(extension: ModuleType, seed: Tensor, streams: Tensor) -> Tensor:
    """Uniform 32-bit words int64 ``[B]``."""
    streams = streams.contiguous()
    out = torch.empty_like(streams)
    extension.draw_words(*seed.tolist(), streams.data_ptr(), out.data_ptr(), streams.shape[0])
    return out


def make_patches(
    extension: ModuleType,
    now: Tensor,
    following: Tensor | None,
    noise: Tensor | None,
    tau: Tensor | None,
    kind: int,
    patch: int,
    gain: float,
    dtype: torch.dtype,
) -> Tensor:
    """Patches of frames, ``[B, N, F]``; ``kind`` is csrc/frames.h's."""
    batch, height, width, channels = now.shape
    fields = (1 if kind == 0 else 2) * channels * patch * patch
    out = torch.empty(batch, (height // patch) * (width // patch), fields, dtype=dtype, device="cpu")
    if out.numel():
        reads = [None if t is None else t.contiguous() for t in (now, following, noise, tau)]
        addresses = [0 if t is None else t.data_ptr() for t in (*reads, out)]
        extension.make_patches((*now.shape, patch), kind, *addresses, TYPES[dtype], gain, torch.get_num_threads())
    return out


def flow_loss(
    extension: ModuleType,
    out: Tensor,
    now: Tensor | None,
    following: Tensor,
    noise: Tensor,
    tau: Tensor,
    patch: int,
    floor: float,
    with_error: bool,
) -> tuple[Tensor, Tensor]:
    """The loss, fp32 ``[]``, and with ``with_error`` what its gradient is ``2 / elements`` of, like ``out``."""
    reads = [None if t is None else t.contiguous() for t in (out, now, following, noise, tau)]
    error = torch.empty(out.shape if with_error else 0, dtype=out.dtype, device="cpu")
    total = math.nan
    if out.numel():
        addresses = [0 if t is None else t.data_ptr() for t in reads]
        addresses.append(error.data_ptr() if with_error else 0)
        sizes = (*following.shape, patch)
        total = extension.flow_loss(sizes, *addresses, TYPES[out.dtype], floor, torch.get_num_threads()) / out.numel()
    return torch.tensor(total, dtype=torch.float32, device="cpu"), error


def scale_error(extension: ModuleType, grad: Tensor, error: Tensor) -> Tensor:
    """``2 / elements`` times ``grad [1]`` times ``error``, in its dtype."""
    error, out = error.contiguous(), torch.empty(error.shape, dtype=error.dtype, device="cpu")
    count = out.numel()
    if count:
        scale = 2.0 * float(grad) / count
        addresses = error.data_ptr(), out.data_ptr()
        extension.scale_error(*addresses, count, scale, TYPES[error.dtype], torch.get_num_threads())
    return out
