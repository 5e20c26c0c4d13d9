"""Checks of what callers of the data set's functions pass: one sentence each, before any work is done."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from flexlam_fast.errors import InputError
from flexlam_fast.values import check_number, shown

MAX_SIDE = 1 << 14
MAX_ACTIONS = np.iinfo(np.int16).max


def check_frame_shape(value: Any) -> tuple[int, int, int]:
    """Return ``value`` as a tuple when it is ``(height, width, 3)``.

    Raises:
        InputError: naming the limits.
    """
    try:
        height, width, channels = value
        sides = [int(check_number("frame_shape", side, 1, MAX_SIDE, integer=True)) for side in (height, width)]
        check_number("frame_shape", channels, 3, 3, integer=True)
    except (TypeError, ValueError):
        raise InputError(
            f"frame_shape: expected (height, width, 3), sides of 1..{MAX_SIDE}, got {shown(value)}"
        ) from None
    return sides[0], sides[1], 3


def check_action_names(value: Any) -> tuple[str, ...]:
    """Return ``value`` as a tuple when it is a sequence of different texts.

    Raises:
        InputError: if it is not.
    """
    names = tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else (None,)
    good = all(isinstance(name, str) and name and _encodes(name) for name in names)
    if not good or len(set(names)) < len(names) or len(names) > MAX_ACTIONS:
        raise InputError(f"action_names: expected texts, each once, at most {MAX_ACTIONS}, got {shown(value)}")
    return names


def _encodes(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def as_array(name: str, values: ArrayLike) -> NDArray[Any]:
    """Return ``values`` as an array.

    Raises:
        InputError: if its rows differ in length, or the like.
    """
    try:
        return np.asarray(values)
    except (TypeError, ValueError):
        raise InputError(f"{name}: expected an array, got {shown(values)}") from None


def column(name: str, values: ArrayLike, count: int, kind: type) -> NDArray[Any]:
    """Return ``values`` as an array when it is ``[count]`` finite numbers of ``kind``, or whole ones for a float kind.

    Raises:
        InputError: if a shape, dtype or value does not fit.
    """
    array = as_array(name, values)
    kinds = (np.integer, np.floating) if kind is np.floating else (kind,)
    if array.shape != (count,) or not (count == 0 or any(np.issubdtype(array.dtype, k) for k in kinds)):
        wanted = "number" if kind is np.floating else kind.__name__
        raise InputError(f"{name}: expected [{count}] {wanted}, got {list(array.shape)} {array.dtype}")
    if not np.isfinite(array).all() or (
        len(array) and np.abs(array.astype(np.float64)).max() > np.finfo(np.float32).max
    ):
        raise InputError(f"{name}: expected finite values, got NaN, infinite ones or such as float32 cannot hold")
    return array


def check_text(name: str, value: object, *, empty: bool = False) -> None:
    """Check that ``value`` is a text that UTF-8 can hold, and not an empty one unless that is allowed.

    Raises:
        InputError: ``task: expected a text, got ''``.
    """
    if not isinstance(value, str) or not (value or empty):
        raise InputError(f"{name}: expected a text, got {shown(value)}")
    if not _encodes(value):
        raise InputError(f"{name}: expected a text that UTF-8 can hold, got {shown(value)}")
