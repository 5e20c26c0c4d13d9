"""Launchers of the norms and gated sums: tensors to kernels. Arguments are checked.

One launch forward; backward one, and one that adds partial sums. Nothing here waits for the device or reads from it.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from flexlam_fast.kernels import modulate as kernels
from flexlam_fast.kernels.fsq import INTERPRETED
from flexlam_fast.kernels.launch import _on
from torch import Tensor

from flexlam_fast.ops.rows import Extent, extent_of, group_stride, grouped, unbroken


def row_norm(
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
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    stats = torch.empty(2 if center else 1, size.groups * size.rows, dtype=torch.float32, device=x.device)
    if not out.numel():
        return out, stats
    x, scale = grouped(x, size), unbroken(scale)
    # any tensor where there is none, for a kernel that will not look
    offset = scale if shift is None else unbroken(shift)
    tile = kernels.tile_of(size.rows, size.width)
    tiles = triton.cdiv(size.rows, tile.rows)
    with _on(x.device):
        kernels.norm_kernel[(size.groups * tiles,)](
            x, scale, offset, out, stats, x.stride(0), x.stride(1), group_stride(scale), group_stride(offset),
            size.groups, size.rows, tiles, eps, CENTER=center, ONE=one, SHIFT=shift is not None, **_cut(size, tile),
        )  # fmt: skip
    return out, stats


def row_norm_backward(
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    stats: Tensor,
    shift_dtype: torch.dtype | None,
    center: bool,
    one: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``x``, ``scale`` and shift."""
    size, both = extent_of(x, scale), shift_dtype is not None
    make = torch.empty if x.numel() else torch.zeros
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dscale = make(scale.shape, dtype=scale.dtype, device=x.device)
    dshift = make(scale.shape if both else (0,), dtype=shift_dtype or x.dtype, device=x.device)
    if not x.numel():
        return dx, dscale, dshift
    grad, x, scale = grouped(grad, size), grouped(x, size), unbroken(scale)
    tile = kernels.tile_of(size.rows, size.width)
    tiles, pieces = triton.cdiv(size.rows, tile.rows), kernels.pieces_of(size.groups, size.rows, tile.rows)
    sums = _room(size, pieces, 2 if both else 1, tile, x.device)
    with _on(x.device):
        kernels.norm_backward_kernel[(size.groups * pieces,)](
            grad, x, scale, stats, dx, sums, grad.stride(0), grad.stride(1), x.stride(0), x.stride(1),
            group_stride(scale), size.groups, size.rows, tiles, pieces, CENTER=center, ONE=one, SHIFT=both,
            **_cut(size, tile),
        )  # fmt: skip
        _join(sums, dscale, dshift if both else None, pieces, size, tile)
    return dx, dscale, dshift


def gate_add(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """``x + gate * y``."""
    size = extent_of(x, gate)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if not out.numel():
        return out
    x, y, gate = grouped(x, size), grouped(y, size), unbroken(gate)
    tile = kernels.tile_of(size.rows, size.width)
    tiles = triton.cdiv(size.rows, tile.rows)
    strides = x.stride(0), x.stride(1), y.stride(0), y.stride(1), group_stride(gate)
    with _on(x.device):
        kernels.gate_kernel[(size.groups * tiles,)](x, y, gate, out, *strides, size.rows, tiles, **_cut(size, tile))
    return out


def gate_add_backward(grad: Tensor, y: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of ``y`` and ``gate``."""
    size = extent_of(y, gate)
    dy = torch.empty(y.shape, dtype=y.dtype, device=y.device)
    make = torch.empty if y.numel() else torch.zeros
    dgate = make(gate.shape, dtype=gate.dtype, device=y.device)
    if not y.numel():
        return dy, dgate
    grad, y, gate = grouped(grad, size), grouped(y, size), unbroken(gate)
    tile = kernels.tile_of(size.rows, size.width)
    tiles, pieces = triton.cdiv(size.rows, tile.rows), kernels.pieces_of(size.groups, size.rows, tile.rows)
    sums = _room(size, pieces, 1, tile, y.device)
    strides = grad.stride(0), grad.stride(1), y.stride(0), y.stride(1), group_stride(gate)
    with _on(y.device):
        kernels.gate_backward_kernel[(size.groups * pieces,)](
            grad, y, gate, dy, sums, *strides, size.rows, tiles, pieces, **_cut(size, tile)
        )
        _join(sums, dgate, None, pieces, size, tile)
    return dy, dgate


def _cut(size: Extent, tile: kernels.Tile) -> dict[str, Any]:
    """The constants that say how rows are cut up."""
    constants = dict(WIDTH=size.width, SPAN=tile.span, ROWS=tile.rows, INTERPRET=INTERPRETED)
    return constants | dict(num_warps=tile.warps, enable_fp_fusion=True)


def _room(size: Extent, pieces: int, sums: int, tile: kernels.Tile, device: torch.device) -> Tensor:
    """Where programs leave their partial sums."""
    return torch.empty(size.groups * pieces, sums, tile.span, dtype=torch.float32, device=device)


def _join(sums: Tensor, first: Tensor, second: Tensor | None, pieces: int, size: Extent, tile: kernels.Tile) -> None:
    """Add the partial sums of each group into its row of the results."""
    parts, block = kernels.joined_of(pieces)
    grid = size.groups, triton.cdiv(size.width, block)
    kernels.join_kernel[grid](
        sums, first, first if second is None else second, pieces, WIDTH=size.width, SPAN=tile.span,
        BOTH=second is not None, PARTS=parts, BLOCK=block, INTERPRET=INTERPRETED, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
