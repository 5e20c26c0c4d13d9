"""Rows ``[..., W]`` as the ops around transformer blocks see them: what is checked, and how rows stand in memory.

Rows stand in groups of as many: the tokens of an example, where each example has a scale of its own, or all rows.
"""

from __future__ import annotations

from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

from flexlam_fast.backend import AUTO, REFERENCE, named
from flexlam_fast.checks import check_tensor, describe
from flexlam_fast.errors import InputError
from flexlam_fast.ops.arguments import FLOATS
from flexlam_fast.ops.gradients import is_transformed
from flexlam_fast.ops.linear import pick


class Extent(NamedTuple):
    """``groups`` of so many ``rows`` of ``width`` numbers."""

    groups: int
    rows: int
    width: int


def check_rows(name: str, x: Tensor, dims: int = 0) -> None:
    """Check a floating ``[..., W]`` of at least one column; ``dims`` 3 asks for ``[B, N, W]``."""
    if not isinstance(x, Tensor) or x.dim() < 1 or x.dtype not in FLOATS or (dims and x.dim() != dims):
        check_tensor(name, x, ["B", "N", "W"] if dims else ["...", "W"], FLOATS)
    if not x.shape[-1]:
        raise InputError(f"{name}: expected at least one column, got {list(x.shape)}")


def check_like(name: str, tensor: Tensor, shape: torch.Size | tuple[int, ...], device: torch.device) -> None:
    """Check a floating tensor of exactly that shape."""
    if not isinstance(tensor, Tensor) or tensor.shape != shape or tensor.dtype not in FLOATS or tensor.device != device:
        check_tensor(name, tensor, list(shape), FLOATS, device)


def check_parameter(name: str, tensor: Tensor, x: Tensor) -> None:
    """Check a floating ``[B, W]``, a row for every example of ``x [B, N, W]``, or ``[W]``, a row for all."""
    shared = isinstance(tensor, Tensor) and tensor.dim() == 1
    check_like(name, tensor, x.shape[-1:] if shared else (x.shape[0], x.shape[-1]), x.device)


def check_dtype(dtype: torch.dtype | None) -> None:
    """Check the dtype that a result is asked for in."""
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype in FLOATS):
        names = " or ".join(str(d).removeprefix("torch.") for d in FLOATS)
        raise InputError(f"dtype: expected {names}, got {describe(dtype)}")


def pick_for(backend: str | None, x: Tensor, *others: Tensor | torch.dtype | None, most: int = 1) -> str:
    """Return the backend for ``x`` and whatever else it comes with; ``most`` is the width a program must hold.

    Raises:
        BackendError: a backend asked for by name that cannot run here or does not take such arguments.
    """
    dtypes = [other.dtype if isinstance(other, Tensor) else other for other in others if other is not None]
    name = named(backend)
    if name == AUTO and is_transformed():
        return REFERENCE
    return pick(name, x.device, reduce(torch.promote_types, dtypes, x.dtype), most, native=True)


def extent_of(x: Tensor, parameter: Tensor) -> Extent:
    """Groups are examples where ``parameter`` has a row for each; else all rows of ``x`` are one group."""
    width = x.shape[-1]
    if parameter.dim() == 2:
        return Extent(x.shape[0], x.shape[1], width)
    return Extent(1, x.numel() // width, width)


def grouped(x: Tensor, size: Extent) -> Tensor:
    """``x`` as ``[groups, rows, width]`` whose rows are without gaps: a view where there can be one."""
    return unbroken(x.reshape(size))


def unbroken(x: Tensor) -> Tensor:
    """``x`` with the numbers of a row side by side."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def group_stride(parameter: Tensor) -> int:
    """Elements from one group's row of a parameter to the next; 0 where all share one."""
    return parameter.stride(0) if parameter.dim() == 2 else 0
