"""Launchers of the C++ norms, modulations and activations: tensors to addresses, nothing else. Arguments are checked.

``contracts.compiled`` hands in the extension, so this file can be imported where there is none.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from flexlam_fast.ops.native import TYPES
from flexlam_fast.ops.rows import Extent, extent_of, group_stride, grouped, unbroken

Place = tuple[int, int, int, int]
_NOWHERE: Place = (0, 0, 0, 0)
#: Elements that a thread takes at a time: some 5 us, which any number of threads shares out evenly.
_CHUNK = 8192


def row_norm(
    extension: ModuleType,
    x: Tensor,
    scale: Tensor,
    shift: Tensor | None,
    eps: float,
    center: bool,
    one: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Normed rows in ``dtype``, and their statistics."""
    size = extent_of(x, scale)
    out = torch.empty(x.shape, dtype=dtype, device="cpu")
    stats = torch.empty(2 if center else 1, size.groups * size.rows, dtype=torch.float32, device="cpu")
    if out.numel():
        x, scale = grouped(x, size), unbroken(scale)
        shift = None if shift is None else unbroken(shift)
        ends = _place(x), _group(scale), _NOWHERE if shift is None else _group(shift), _packed(out, size)
        extension.row_norm(*ends, stats.data_ptr(), size, eps, center, one, torch.get_num_threads())
    return out, stats


def row_norm_backward(
    extension: ModuleType,
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    stats: Tensor,
    shift_dtype: torch.dtype | None,
    center: bool,
    one: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``x``, ``scale`` and shift."""
    size = extent_of(x, scale)
    dx = torch.empty(x.shape, dtype=x.dtype, device="cpu")
    make = torch.empty if x.numel() else torch.zeros
    dscale = make(scale.shape, dtype=scale.dtype, device="cpu")
    dshift = torch.empty(0, dtype=x.dtype, device="cpu")
    if shift_dtype is not None:
        dshift = make(scale.shape, dtype=shift_dtype, device="cpu")
    if x.numel():
        grad, x, scale = grouped(grad, size), grouped(x, size), unbroken(scale)
        sums = _group(dscale), _NOWHERE if shift_dtype is None else _group(dshift)
        ends = _place(grad), _place(x), _group(scale), stats.data_ptr(), _packed(dx, size), *sums
        extension.row_norm_backward(*ends, size, center, one, torch.get_num_threads())
    return dx, dscale, dshift


def gate_add(extension: ModuleType, x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """``x + gate * y``."""
    size = extent_of(x, gate)
    out = torch.empty(x.shape, dtype=x.dtype, device="cpu")
    if out.numel():
        x, y, gate = grouped(x, size), grouped(y, size), unbroken(gate)
        ends = _place(x), _place(y), _group(gate), _packed(out, size)
        extension.gate_add(*ends, size, torch.get_num_threads())
    return out


def gate_add_backward(extension: ModuleType, grad: Tensor, y: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of ``y`` and ``gate``."""
    size = extent_of(y, gate)
    dy = torch.empty(y.shape, dtype=y.dtype, device="cpu")
    make = torch.empty if y.numel() else torch.zeros
    dgate = make(gate.shape, dtype=gate.dtype, device="cpu")
    if y.numel():
        grad, y, gate = grouped(grad, size), grouped(y, size), unbroken(gate)
        ends = _place(grad), _place(y), _group(gate), _packed(dy, size), _group(dgate)
        extension.gate_add_backward(*ends, size, torch.get_num_threads())
    return dy, dgate


def gelu(extension: ModuleType, grad: Tensor | None, x: Tensor) -> Tensor:
    """GELU of ``x``, or with ``grad`` its gradient."""
    x = x.contiguous()
    grad = None if grad is None else grad.contiguous()
    out = torch.empty(x.shape, dtype=x.dtype, device="cpu")
    if out.numel():
        addresses = 0 if grad is None else grad.data_ptr(), x.data_ptr(), out.data_ptr()
        extension.gelu(*addresses, *_chunks(x.numel()), TYPES[x.dtype], torch.get_num_threads())
    return out


def swiglu(extension: ModuleType, gate: Tensor, up: Tensor) -> Tensor:
    """``silu(gate) * up``."""
    out = torch.empty(gate.shape, dtype=gate.dtype, device="cpu")
    _swiglu(extension, None, gate, up, out, None)
    return out


def swiglu_backward(extension: ModuleType, grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of ``gate`` and ``up``."""
    dgate, dup = (torch.empty(gate.shape, dtype=gate.dtype, device="cpu") for _ in range(2))
    _swiglu(extension, grad.contiguous(), gate, up, dgate, dup)
    return dgate, dup


def _swiglu(
    extension: ModuleType, grad: Tensor | None, gate: Tensor, up: Tensor, out: Tensor, other: Tensor | None
) -> None:
    if not out.numel():
        return
    if gate.is_contiguous() and up.is_contiguous():
        sizes = _chunks(out.numel())
        strides = sizes[1], sizes[1]
    else:
        width = gate.shape[-1]
        gate, up = (unbroken(t.reshape(-1, width)) for t in (gate, up))
        sizes, strides = (gate.shape[0], width, width), (gate.stride(0), up.stride(0))
    tensors = grad, gate, up, out, other
    addresses = (0 if t is None else t.data_ptr() for t in tensors)
    extension.swiglu(*addresses, *sizes, *strides, TYPES[gate.dtype], torch.get_num_threads())


def _place(x: Tensor) -> Place:
    """Where ``[groups, rows, width]`` stands: address, type, elements between groups and between rows."""
    return x.data_ptr(), TYPES[x.dtype], x.stride(0), x.stride(1)


def _packed(x: Tensor, size: Extent) -> Place:
    """Where a result stands, which has no gaps."""
    return x.data_ptr(), TYPES[x.dtype], size.rows * size.width, size.width


def _group(parameter: Tensor) -> Place:
    """Where one row a group stands."""
    return parameter.data_ptr(), TYPES[parameter.dtype], group_stride(parameter), 0


def _chunks(elements: int) -> tuple[int, int, int]:
    """Pieces, elements of each, elements of the last."""
    pieces = -(-elements // _CHUNK)
    return pieces, _CHUNK, elements - (pieces - 1) * _CHUNK
