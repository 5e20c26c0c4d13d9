"""Layers, rows and residuals that try the linear ops; shared by their tests."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from fsq_cases import RUNS
from torch import Tensor

from flexlam_fast.ops.linear import linear_add, norm_linear, norm_swiglu

OPS = ["norm_linear", "norm_swiglu", "linear_add"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
EPS = 1e-6
#: C++ has these ops for a CPU only.
KERNELS = [run for run in RUNS if run != ("native", "cuda")]
every_kernel = pytest.mark.parametrize(("backend", "device"), KERNELS, ids=[f"{b}-{d}" for b, d in KERNELS])
every_device = pytest.mark.parametrize("device", [d for name, d in RUNS if name == "triton"])


def plain_norm_linear(x: Tensor, norm: Tensor, weight: Tensor) -> Tensor:
    return F.linear(F.rms_norm(x, x.shape[-1:], eps=EPS) * norm, weight)


def plain_norm_swiglu(x: Tensor, norm: Tensor, weight: Tensor) -> Tensor:
    y = F.rms_norm(x, x.shape[-1:], eps=EPS) * norm
    gate, up = weight.chunk(2)
    return F.silu(F.linear(y, gate)) * F.linear(y, up)


def plain_linear_add(x: Tensor, weight: Tensor, residual: Tensor) -> Tensor:
    return residual + F.linear(x, weight)


def layer(rows: tuple[int, ...], inner: int, outs: int, seed: int = 0) -> tuple[Tensor, ...]:
    """``x``, the norm's weight, weights ``[2 outs, inner]``, and a residual for all of them."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*rows, inner, generator=generator) * 2
    norm = 1 + 0.2 * torch.randn(inner, generator=generator)
    weight = torch.randn(2 * outs, inner, generator=generator) * inner**-0.5
    return x, norm, weight, torch.randn(*rows, 2 * outs, generator=generator)


def run(op: str, args: tuple[Tensor, ...], backend: str, fp32_out: bool = False) -> Tensor:
    """One op, of the four tensors that :func:`layer` makes."""
    x, norm, weight, residual = args
    if op == "norm_linear":
        return norm_linear(x, norm, weight, EPS, fp32_out=fp32_out, backend=backend)
    if op == "norm_swiglu":
        return norm_swiglu(x, norm, weight, EPS, backend=backend)
    return linear_add(x, weight, residual, backend=backend)
