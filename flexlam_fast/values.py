"""Numbers, names and paths, checked where they enter; ``checks.py`` has these too, and what needs torch."""

from __future__ import annotations

import math
import numbers
import os
import tempfile
from collections.abc import Collection, Iterable
from pathlib import Path

from flexlam_fast.errors import FlexLAMError, InputError, StorageError

#: What must be free on a disk before results are worked for that will be written there.
PROBE_BYTES = 1 << 16


def shown(value: object) -> str:
    """Write a value as one short line of printable characters, whatever it is."""
    try:
        text = " ".join(repr(value).split())
    except ValueError:  # Python prints no integer of more than 4,300 digits
        text = f"{type(value).__name__} of more digits than are printed"
    return text if len(text) <= 60 else text[:57] + "..."


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


def check_integers(name: str, values: object, low: int, high: int) -> tuple[int, ...]:
    """Return ``values`` as a tuple of Python's ints when it is a sequence of integers in ``low..high``, at least one.

    Raises:
        InputError: ``steps: expected integers in 1..100, got ()``, or that of :func:`check_number` for one of them.
    """
    if not isinstance(values, Iterable) or isinstance(values, str | bytes) or not (given := tuple(values)):
        raise InputError(f"{name}: expected integers in {low}..{high}, got {shown(values)}")
    return tuple(int(check_number(name, value, low, high, integer=True)) for value in given)


def _span(low: float, high: float, integer: bool, open_low: bool) -> str:
    least, most = (str(n) if isinstance(n, int) else f"{n:g}" for n in (low, high))
    kind = "an integer" if integer else "a number" if math.inf > high else "a finite number"
    if low == -math.inf:
        return kind if high == math.inf else f"{kind} of at most {most}"
    if open_low:
        return f"{kind} above {least}" + ("" if high == math.inf else f", at most {most}")
    return f"{kind} of at least {least}" if high == math.inf else f"{kind} in {least}..{most}"


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


def make_folder(path: Path, *names: str) -> None:
    """Make a folder and its parents, and make sure that files can be written there; one that is there already is fine.

    Args:
        path: the folder.
        names: of files that will be written there, each of which may be there already.

    Raises:
        StorageError: if that is not possible.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path) as file:
            file.write(bytes(PROBE_BYTES))
        for name in names:
            if (path / name).exists():
                with open(path / name, "ab"):
                    pass
    except (OSError, ValueError) as error:  # ValueError: a NUL byte in the name
        reason = getattr(error, "strerror", None) or error
        raise StorageError(f"{path}: expected a folder to write to, got: {reason}") from error
