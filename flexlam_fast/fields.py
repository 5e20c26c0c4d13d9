"""Fields of dataclasses that are declared with the range of their values, and checked where one is made."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple, get_type_hints

from flexlam_fast.errors import ConfigError, InputError
from flexlam_fast.values import check_number, shown

_RANGE = "range"


class _Range(NamedTuple):
    low: float
    high: float
    integer: bool
    open_low: bool
    optional: bool


def integer(default: Any = dataclasses.MISSING, low: int = 1, high: int = 1) -> Any:
    """A field that holds an integer in ``low..high``; with the default None it may also hold that."""
    return _field(default, _Range(low, high, True, False, default is None))


def real(default: Any = dataclasses.MISSING, low: float = 0.0, high: float = 1.0, open_low: bool = False) -> Any:
    """A field that holds a finite number in ``low..high``, or above ``low``; as :func:`integer` otherwise."""
    return _field(default, _Range(low, high, False, open_low, default is None))


def _field(default: Any, limits: _Range) -> Any:
    return dataclasses.field(default=default, metadata={_RANGE: limits})


@contextlib.contextmanager
def as_config_errors() -> Iterator[None]:
    """In the block, an input that is refused is a configuration that is refused."""
    try:
        yield
    except InputError as error:
        raise ConfigError(str(error)) from None


def check_fields(owner: Any, prefix: str | None = None) -> None:
    """Check every field of a dataclass that was declared with a range; numbers of NumPy's become Python's.

    Args:
        owner: the dataclass.
        prefix: what stands before the names of the fields in the sentence; left out, the class's name and a dot.

    Raises:
        ConfigError: ``EncoderConfig.depth: expected an integer in 1..1000, got 0``.
    """
    prefix = f"{type(owner).__name__}." if prefix is None else prefix
    for field in dataclasses.fields(owner):
        value, limits = getattr(owner, field.name), field.metadata.get(_RANGE)
        if limits is None or (value is None and limits.optional):
            continue
        with as_config_errors():
            number = check_number(
                prefix + field.name,
                value,
                limits.low,
                limits.high,
                integer=limits.integer,
                open_low=limits.open_low,
            )
        if type(value) not in (int, float):
            object.__setattr__(owner, field.name, number)


def each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make an object of JSON, for ``json.loads``.

    Raises:
        ConfigError: a field comes twice; of the two, another reader would take the other.
    """
    names = [name for name, _ in pairs]
    if len(set(names)) < len(names):
        raise ConfigError(f"config: expected every field once, got {shown(names)}")
    return dict(pairs)


def build(kind: type, data: Any, where: str) -> Any:
    """Make a dataclass, and those that are its fields, from an object of JSON; lists become tuples.

    Args:
        kind: the dataclass.
        data: what ``json.loads`` gave.
        where: how the sentence calls it.

    Raises:
        ConfigError: not an object, a field that does not exist, or a value that the dataclass refuses.
    """
    if not isinstance(data, dict):
        raise ConfigError(f"{where}: expected an object, got {shown(data)}")
    hints = get_type_hints(kind)
    if unknown := sorted(set(data) - set(hints)):
        raise ConfigError(f"{where}: expected fields {sorted(hints)}, got {shown(unknown)}")
    values: dict[str, Any] = {}
    for name, value in data.items():
        if dataclasses.is_dataclass(hints[name]):
            values[name] = build(hints[name], value, f"{where}.{name}")
        else:
            values[name] = tuple(value) if isinstance(value, list) else value
    try:
        return kind(**values)
    except TypeError as error:  # of a value without a range
        raise ConfigError(f"{where}: {error}") from error
