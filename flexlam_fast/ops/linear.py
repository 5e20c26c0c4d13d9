"""The sequence model's linear layers for generating: norm before, SwiGLU or residual after, in one launch each.

They carry no gradient, whatever the backend: training goes through the modules of ``flexlam_fast.sequence.model``,
whose arithmetic this is (paper B.4, design section 2).
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flexlam_fast import backend as backends
from flexlam_fast.ambient import outside_autocast
from flexlam_fast.backend import AUTO, NATIVE, REFERENCE, TRITON, named
from flexlam_fast.checks import check_tensor
from flexlam_fast.errors import BackendError, InputError
from flexlam_fast.ops import native_decode
from flexlam_fast.ops.arguments import FLOATS, check_eps
from flexlam_fast.ops.contracts import compiled, define
from flexlam_fast.ops.gradients import OPS, is_plain

MOST_COLUMNS = 8192  # a program of Triton's kernels for few rows holds whole rows
MAX_ROWS = 16  # beyond, torch's products are faster on a CPU than C++ that is made for a token or a few
_KERNEL_FLOATS = FLOATS[:3]


@outside_autocast
def norm_linear(
    x: Tensor, norm: Tensor, weight: Tensor, eps: float, *, fp32_out: bool = False, backend: str | None = AUTO
) -> Tensor:
    """Return ``RMSNorm(x) @ weight.T``: projections of attention, and the head.

    The norm is the module's: fp32 inside, rounded to the dtype before and after its weight. Sums are fp32, and a row's
    result depends on no other row; the number of rows may choose between kernels that add in different orders.

    Args:
        x: ``[..., W]`` floating.
        norm: ``[W]``, the norm's weight, in ``x``'s dtype.
        weight: ``[N, W]`` in ``x``'s dtype.
        eps: added to the mean square.
        fp32_out: return fp32, of logits say, which the kernel then does not round to ``x``'s dtype on the way.
        backend: ``"reference"``, ``"triton"`` or, on a CPU, ``"native"``; None or ``"auto"`` takes Triton on CUDA, for
            widths up to 8,192, and C++ on a CPU, for up to 16 rows.

    Returns:
        ``[..., N]`` in ``x``'s dtype, or fp32 (fp64 for an fp64 ``x``) with ``fp32_out``; no gradient.

    Raises:
        InputError: wrong shape, dtype or device.
        BackendError: a backend asked for by name that cannot run here or does not take such arguments.
    """
    _check_layer(x, weight, "weight")
    _check_like("norm", norm, (x.shape[-1],), x)
    return _run(x, norm, weight, None, check_eps(eps), False, fp32_out, _for_rows(backend, x))


@outside_autocast
def norm_swiglu(x: Tensor, norm: Tensor, gate_up: Tensor, eps: float, *, backend: str | None = AUTO) -> Tensor:
    """Return ``silu(y @ gate.T) * (y @ up.T)`` of ``y = RMSNorm(x)``: the first half of a feed-forward layer.

    Args:
        x: ``[..., W]`` floating.
        norm: ``[W]``, the norm's weight, in ``x``'s dtype.
        gate_up: ``[2 I, W]`` in ``x``'s dtype: the gate's rows, then those of ``up``.
        eps: added to the mean square.
        backend: as in :func:`norm_linear`.

    Returns:
        ``[..., I]`` in ``x``'s dtype; no gradient.

    Raises:
        InputError: wrong shape, dtype or device.
        BackendError: a backend asked for by name that cannot run here or does not take such arguments.
    """
    _check_layer(x, gate_up, "gate_up", "2I")
    if gate_up.shape[0] % 2:
        raise InputError(f"gate_up: expected an even number of rows, got {gate_up.shape[0]}")
    _check_like("norm", norm, (x.shape[-1],), x)
    return _run(x, norm, gate_up, None, check_eps(eps), True, False, _for_rows(backend, x))


@outside_autocast
def linear_add(x: Tensor, weight: Tensor, residual: Tensor, *, backend: str | None = AUTO) -> Tensor:
    """Return ``x @ weight.T + residual``: the end of an attention or feed-forward layer.

    Args:
        x: ``[..., W]`` floating.
        weight: ``[N, W]`` in ``x``'s dtype.
        residual: ``[..., N]`` in ``x``'s dtype; it is not written to.
        backend: as in :func:`norm_linear`.

    Returns:
        ``[..., N]`` in ``x``'s dtype; no gradient.

    Raises:
        InputError: wrong shape, dtype or device.
        BackendError: a backend asked for by name that cannot run here or does not take such arguments.
    """
    _check_layer(x, weight, "weight")
    _check_like("residual", residual, (*x.shape[:-1], weight.shape[0]), x)
    return _run(x, None, weight, residual, 0.0, False, False, _for_rows(backend, x))


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm of ``x [..., W]`` in plain PyTorch, as the sequence model's module has it."""
    y = x.to(torch.promote_types(x.dtype, torch.float32))
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
    return weight * y.to(x.dtype)


@torch.no_grad()
def reference(
    x: Tensor,
    norm: Tensor | None,
    weight: Tensor,
    residual: Tensor | None,
    eps: float,
    gated: bool,
    fp32_out: bool,
) -> Tensor:
    """All three ops in plain PyTorch; arguments are those of the op ``fused_linear``."""
    y = x if norm is None else rms_norm(x, norm, eps)
    if gated:
        gate, up = weight.chunk(2)
        return F.silu(F.linear(y, gate)) * F.linear(y, up)
    out = F.linear(y, weight)
    out = out if residual is None else residual + out
    return out.to(torch.promote_types(out.dtype, torch.float32)) if fp32_out else out


def pick(backend: str | None, device: torch.device, dtype: torch.dtype, most: int, *, native: bool = False) -> str:
    """Return the backend of one of the decision's ops: the one of that name, or an error; ``auto`` chooses.

    Args:
        backend: a name, ``"auto"`` or None.
        device: where the arguments are.
        dtype: the floating arguments' dtype.
        most: the size that a program must hold, of which Triton's kernels take :data:`MOST_COLUMNS`.
        native: whether there is C++ for this op on a CPU.

    Raises:
        BackendError: a backend asked for by name that is not here, or whose kernels do not take such arguments.
    """
    return _pick(named(backend), device, dtype, most, native)


# torch.compiler.assume_constant_result makes this mark too, but imports the compiler, which takes a second
pick._dynamo_marked_constant = True  # type: ignore[attr-defined]


@lru_cache(maxsize=256)
def _pick(backend: str, device: torch.device, dtype: torch.dtype, most: int, native: bool) -> str:
    native = native and device.type == "cpu"
    takes = {TRITON: dtype in _KERNEL_FLOATS and most <= MOST_COLUMNS, NATIVE: native and dtype in _KERNEL_FLOATS}
    if backend == AUTO:
        there = {status.name for status in backends.probe(device) if status.available}
        wanted = TRITON if device.type == "cuda" else NATIVE
        return wanted if wanted in there and takes[wanted] else REFERENCE
    if backend == NATIVE and not native:
        where = "" if device.type == "cpu" else f" on {device.type}"
        raise BackendError(f"backend: expected 'reference' or 'triton' for this op{where}, got 'native'")
    name = backends.choose(backend, device).name
    if takes.get(name, True):
        return name
    wanted, got = "float32, float16 or bfloat16", str(dtype).removeprefix("torch.")
    if name == TRITON:
        wanted, got = f"{wanted} and a width of at most {MOST_COLUMNS}", f"{most} in {got}"
    raise BackendError(f"backend: expected {wanted} for {name!r}, got {got}")


def _for_rows(backend: str | None, x: Tensor) -> str:
    """The backend of a linear layer of ``x``."""
    if named(backend) == AUTO and x.is_cpu and x.numel() > MAX_ROWS * x.shape[-1]:
        return REFERENCE
    return pick(backend, x.device, x.dtype, x.shape[-1], native=True)


def _check_layer(x: Tensor, weight: Tensor, name: str, rows: str = "N") -> None:
    """Check ``x [..., W]`` and weights ``[rows, W]`` that are called ``name``."""
    if not isinstance(x, Tensor) or x.dim() < 1 or x.dtype not in FLOATS:
        check_tensor("x", x, ["...", "W"], FLOATS)
    if not x.shape[-1]:
        raise InputError(f"x: expected at least one column, got {list(x.shape)}")
    if not _is(weight, x) or weight.dim() != 2 or weight.shape[1] != x.shape[-1]:
        check_tensor(name, weight, [rows, x.shape[-1]], x.dtype, x.device)


def _check_like(name: str, tensor: Tensor, shape: tuple[int, ...], x: Tensor) -> None:
    if not _is(tensor, x) or tensor.shape != shape:
        check_tensor(name, tensor, list(shape), x.dtype, x.device)


def _is(tensor: Any, x: Tensor) -> bool:
    return isinstance(tensor, Tensor) and tensor.dtype == x.dtype and tensor.device == x.device


def _run(
    x: Tensor,
    norm: Tensor | None,
    weight: Tensor,
    residual: Tensor | None,
    eps: float,
    gated: bool,
    fp32_out: bool,
    name: str,
) -> Tensor:
    if name == REFERENCE:
        return reference(x, norm, weight, residual, eps, gated, fp32_out)
    if is_plain(x, norm, weight, residual):
        return fused_linear(x, norm, weight, residual, eps, gated, fp32_out, name)
    return OPS.fused_linear.default(x, norm, weight, residual, eps, gated, fp32_out, name)


def fused_linear(
    x: Tensor,
    norm: Tensor | None,
    weight: Tensor,
    residual: Tensor | None,
    eps: float,
    gated: bool,
    fp32_out: bool,
    backend: str,
) -> Tensor:
    """Launch the kernel of the three ops; their arguments are checked."""
    args = x, norm, weight, residual, eps, gated, fp32_out
    if backend == NATIVE:
        return native_decode.fused_linear(compiled(NATIVE), *args)
    return compiled(TRITON, "launch_linear").fused_linear(*args)


def _fake(
    x: Tensor, norm: Any, weight: Tensor, residual: Any, eps: float, gated: bool, fp32_out: bool, backend: str
) -> Tensor:
    outs = weight.shape[0] // (2 if gated else 1)
    return x.new_empty((*x.shape[:-1], outs), dtype=torch.float32 if fp32_out else x.dtype)


define(
    "(Tensor x, Tensor? norm, Tensor weight, Tensor? residual, float eps, bool gated, bool fp32_out, str backend)"
    " -> Tensor",
    fused_linear,
    _fake,
)
