"""The one form every complaint about an argument has: ``name: expected ..., got ...``."""

from __future__ import annotations

import contextlib
import numbers
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from flexlam_fast.errors import BudgetError, InputError
from flexlam_fast.values import check_choice as check_choice
from flexlam_fast.values import check_integers as check_integers
from flexlam_fast.values import check_names as check_names
from flexlam_fast.values import check_number as check_number
from flexlam_fast.values import check_path as check_path
from flexlam_fast.values import shown


def describe(value: object) -> str:
    """Say what ``value`` is in the words of a check: ``[4,8] float32 cpu`` for a tensor, else its type and value."""
    if isinstance(value, Tensor):
        shape = ",".join(str(n) for n in value.shape)
        return f"[{shape}] {str(value.dtype).removeprefix('torch.')} {value.device.type}"
    return f"{type(value).__name__} {shown(value)}"


def check_tensor(
    name: str,
    value: object,
    shape: Sequence[int | str],
    dtypes: torch.dtype | Iterable[torch.dtype],
    device: torch.device | None = None,
) -> None:
    """Check shape, dtype and device of a tensor in one sentence.

    Args:
        name: how the caller calls the argument.
        value: what came.
        shape: expected sizes; a string such as ``"B"`` stands for any size, a leading ``"..."`` for any leading sizes.
        dtypes: the dtype, or those that will do.
        device: the device the tensor must be on; None for any.

    Raises:
        InputError: ``q: expected [B,H,64] bfloat16 cuda, got [4,8] float32 cpu``.
    """
    allowed = (dtypes,) if isinstance(dtypes, torch.dtype) else tuple(dtypes)
    good = isinstance(value, Tensor) and value.dtype in allowed and _fits(tuple(value.shape), list(shape))
    if good and device is not None:
        good = value.device == device  # type: ignore[attr-defined]
    if not good:
        sizes = ",".join(str(n) for n in shape)
        kinds = " or ".join(str(d).removeprefix("torch.") for d in allowed)
        where = f" {device.type}" if device is not None else ""
        raise InputError(f"{name}: expected [{sizes}] {kinds}{where}, got {describe(value)}")


def _fits(actual: tuple[int, ...], expected: list[int | str]) -> bool:
    if expected and expected[0] == "...":
        expected = expected[1:]
        if len(actual) < len(expected):
            return False
        actual = actual[len(actual) - len(expected) :]
    return len(actual) == len(expected) and all(
        isinstance(want, str) or want == have for want, have in zip(expected, actual, strict=True)
    )


def check_budget(name: str, value: object, low: int, high: int) -> int:
    """Return ``value`` as an int when it is one (Python's or NumPy's) within ``low..high``.

    Raises:
        BudgetError: ``budget: expected an integer in 1..16, got 17``.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or not low <= int(value) <= high:
        raise BudgetError(f"{name}: expected an integer in {low}..{high}, got {shown(value)}")
    return int(value)


def check_list(name: str, values: object, expected: str) -> list[Any]:
    """Return ``values`` as a list when it is a sequence, an array or a tensor of at least one dimension; no text.

    Raises:
        InputError: ``sessions: expected integers, got str 'all'``, with ``expected`` as the first half.
    """
    if isinstance(values, Iterable) and not isinstance(values, str | bytes | Mapping):
        with contextlib.suppress(TypeError):  # arrays and tensors of no dimension
            return list(values)
    raise InputError(f"{name}: expected {expected}, got {describe(values)}")


def check_finite(name: str, value: Tensor) -> None:
    """Check that a floating tensor holds no NaN and no infinity.

    Raises:
        InputError: naming how many values are not finite.
    """
    if value.is_floating_point():
        bad = int((~torch.isfinite(value)).sum())
        if bad:
            raise InputError(f"{name}: expected finite values, got {bad} NaN or infinite of {value.numel()}")
