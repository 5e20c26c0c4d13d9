"""The one form every complaint about an argument has: ``name: expected ..., got ...``."""

from __future__ import annotations

import contextlib
import math
import numbers
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flexlam_fast.errors import BudgetError, FlexLAMError, InputError


def describe(value: object) -> str:
    """Say what ``value`` is in the words of a check: ``[4,8] float32 cpu`` for a tensor, else its type and value."""
    if isinstance(value, Tensor):
        shape = ",".join(str(n) for n in value.shape)
        return f"[{shape}] {str(value.dtype).removeprefix('torch.')} {value.device.type}"
    return f"{type(value).__name__} {shown(value)}"


def shown(value: object) -> str:
    """Write a value as one short line of printable characters, whatever it is."""
    try:
        text = " ".join(repr(value).split())
    except ValueError:  # Python prints no integer of more than 4,300 digits
        text = f"{type(value).__name__} of more digits than are printed"
    return text if len(text) <= 60 else text[:57] + "..."


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


def check_number(
    name: str, value: object, low: float, high: float, *, integer: bool = False, open_low: bool = False
) -> float | int:
    """Return ``value`` as Python's int or float when it is a finite number (Python's or NumPy's) in ``low..high``.

    Args:
        name: how the caller calls the argument.
        value: what came; a bool is no number.
        low: the least value; ``-math.inf`` for none.
        high: the greatest value; ``math.inf`` for none.
        integer: whether only integers will do.
        open_low: whether ``low`` itself is refused.

    Raises:
        InputError: ``lr: expected a finite number above 0, got nan``.
    """
    kind = numbers.Integral if integer else numbers.Real
    if not isinstance(value, bool) and isinstance(value, kind):
        # Compared before it is converted: float() of a large integer overflows. NaN compares with nothing.
        inside = (low < value if open_low else low <= value) and value <= high and abs(value) < math.inf  # type: ignore[operator]
        if inside:
            return int(value) if integer else float(value)  # type: ignore[call-overload]
    raise InputError(f"{name}: expected {_span(low, high, integer, open_low)}, got {shown(value)}")


def _span(low: float, high: float, integer: bool, open_low: bool) -> str:
    least, most = (str(n) if isinstance(n, int) else f"{n:g}" for n in (low, high))
    kind = "an integer" if integer else "a number" if math.inf > high else "a finite number"
    if low == -math.inf:
        return kind if high == math.inf else f"{kind} of at most {most}"
    if open_low:
        return f"{kind} above {least}" + ("" if high == math.inf else f", at most {most}")
    return f"{kind} of at least {least}" if high == math.inf else f"{kind} in {least}..{most}"


def check_list(name: str, values: object, expected: str) -> list[Any]:
    """Return ``values`` as a list when it is a sequence, an array or a tensor of at least one dimension; no text.

    Raises:
        InputError: ``sessions: expected integers, got str 'all'``, with ``expected`` as the first half.
    """
    if isinstance(values, Iterable) and not isinstance(values, str | bytes | Mapping):
        with contextlib.suppress(TypeError):  # arrays and tensors of no dimension
            return list(values)
    raise InputError(f"{name}: expected {expected}, got {describe(values)}")


def check_choice(name: str, value: object, choices: Collection[str], error: type[FlexLAMError] = InputError) -> str:
    """Return ``value`` when it is one of the names in ``choices``.

    Raises:
        InputError: ``dtype: expected one of float32, bfloat16, got 'int8'``; or ``error``, if that is given.
    """
    if isinstance(value, str) and value in choices:
        return value
    raise error(f"{name}: expected one of {', '.join(choices)}, got {shown(value)}")


def check_names(name: str, values: object, choices: Collection[str]) -> tuple[str, ...]:
    """Return ``values`` as a tuple when it is a sequence of names in ``choices``, at least one, none twice.

    Raises:
        InputError: ``scenarios: expected some of take_cover, my_way_home, each once, got ()``.
    """
    given = tuple(values) if isinstance(values, Iterable) and not isinstance(values, str | bytes) else ()
    if given and all(isinstance(n, str) and n in choices for n in given) and len(set(given)) == len(given):
        return given
    raise InputError(f"{name}: expected some of {', '.join(choices)}, each once, got {shown(values)}")


def check_path(name: str, value: object) -> Path:
    """Return ``value`` as a path when an operating system can have one of that name.

    Raises:
        InputError: ``output: expected a path, got ''``; for another type, an empty string, or one with a NUL byte.
    """
    text = os.fspath(value) if isinstance(value, str | os.PathLike) else None
    if not isinstance(text, str) or not text or "\0" in text:
        raise InputError(f"{name}: expected a path, got {shown(value)}")
    return Path(text)


def check_finite(name: str, value: Tensor) -> None:
    """Check that a floating tensor holds no NaN and no infinity.

    Raises:
        InputError: naming how many values are not finite.
    """
    if value.is_floating_point():
        bad = int((~torch.isfinite(value)).sum())
        if bad:
            raise InputError(f"{name}: expected finite values, got {bad} NaN or infinite of {value.numel()}")
