"""Watching the functions of another library, in whose place somebody may put others at any time.

Libraries replace methods of each other's classes and functions of each other's modules. What is written against the
original code must notice, before it answers in its place.
"""

from __future__ import annotations

import dis
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from operator import attrgetter, itemgetter
from types import BuiltinFunctionType, CodeType, FunctionType, ModuleType
from typing import Any

from torch import nn

from flexlam_fast.provenance import Place, is_own, unwrap

_CODE = attrgetter("__code__")


class Watch:
    """Watches places: one look costs about 50 ns a place while nothing changes.

    Args:
        find: lists the places; it is asked again whenever one of them has changed.
        packages: top-level names of the packages that functions may come from.

    Attributes:
        pairs: holder, name and value of every place when all was the library's own; ``torch.compile`` can read it, and
            guards what it has read.
    """

    def __init__(self, find: Callable[[], Iterable[Place]], packages: Iterable[str]) -> None:
        self._find, self._packages = find, frozenset(packages)
        self.pairs: tuple[tuple[Any, str, Any], ...] = ()
        self._groups: list[tuple[Callable[[Any], Any], Any, Any]] = []  # getter, holder, what it got
        self._found: tuple[Place, Any, str] | None = None  # what was not its own, and the sentence
        self._layers: list[FunctionType] = []
        self._codes: list[CodeType] = []

    def is_same(self) -> bool:
        """Whether every place holds what it held; code that was exchanged inside a function is not looked at."""
        try:
            for getter, holder, values in self._groups:
                if getter(holder) != values:
                    return False
        except (AttributeError, KeyError):  # it was deleted
            return False
        return bool(self._groups)

    def replaced(self) -> str | None:
        """Which function is somebody else's now, in one sentence, or None."""
        if self._found is not None and self._found[0].read() is self._found[1]:
            return self._found[2]
        if self.is_same() and list(map(_CODE, self._layers)) == self._codes:
            return None
        return self._look()

    def _look(self) -> str | None:
        """Look at every place itself; remember what is there if all is the library's own."""
        # modules first: a class that stands in the place of another is what is foreign, not its methods
        places = sorted(self._find(), key=lambda place: not isinstance(place.holder, ModuleType))
        self._groups, self._found = [], None
        layers: dict[int, FunctionType] = {}
        for place in list(places):
            value = place.read()
            if not is_own(place, value, self._packages):
                why = f"{place} was {'deleted' if value is None else f'replaced by {_describe(value)}'}"
                self._found = place, value, why
                return why
            layers |= {id(layer): layer for layer in unwrap(value)}
            if isinstance(value, nn.Module):  # of the package kernels, which may exchange what it calls
                places.append(Place(value, "forward"))
        self._layers = list(layers.values())
        self._codes = list(map(_CODE, self._layers))
        self.pairs = tuple((place.holder, place.name, place.read()) for place in places)
        names: dict[int, tuple[Any, list[str]]] = {}
        for holder, name, _ in self.pairs:
            names.setdefault(id(holder), (holder, []))[1].append(name)
        self._groups = [_group(holder, found) for holder, found in names.values()]
        return None


def reachable(roots: Iterable[Place], modules: Iterable[str]) -> list[Place]:
    """``roots`` and the functions and classes that their code names, followed as long as it is of ``modules``.

    Args:
        roots: where to start.
        modules: names of modules, as ``__name__`` has them.
    """
    followed = frozenset(modules)
    found: dict[tuple[int, str], Place] = {}
    open_ones = list(roots)
    while open_ones:
        place = open_ones.pop()
        if (id(place.holder), place.name) in found:
            continue
        found[id(place.holder), place.name] = place
        for layer in unwrap(place.read()):
            if layer.__globals__.get("__name__") in followed:
                open_ones += _named(layer)
    return list(found.values())


def _named(layer: FunctionType) -> Iterator[Place]:
    """The places in its module that the code of ``layer`` calls, in functions inside it too."""
    scope, open_ones = layer.__globals__, [layer.__code__]
    module = sys.modules.get(scope["__name__"])
    while open_ones:
        code = open_ones.pop()
        open_ones += [part for part in code.co_consts if isinstance(part, CodeType)]
        for name in code.co_names if module is not None else ():
            value = scope.get(name)
            if not callable(value) or isinstance(value, ModuleType):
                continue
            # attributes are among the names too: what is no function needs a closer look, which takes a millisecond
            if isinstance(value, FunctionType | BuiltinFunctionType | type) or _reads(code, name):
                yield Place(module, name)


def _reads(code: CodeType, name: str) -> bool:
    return any(step.argval == name for step in dis.get_instructions(code) if step.opname == "LOAD_GLOBAL")


def _group(holder: Any, names: list[str]) -> tuple[Callable[[Any], Any], Any, Any]:
    """What reads all ``names`` at once, from where, and what it reads now."""
    getter: Any = attrgetter(*names)
    if isinstance(holder, ModuleType):
        holder, getter = vars(holder), itemgetter(*names)
    elif isinstance(holder, Mapping):
        getter = partial(_values, names)
    return getter, holder, getter(holder)


def _values(names: list[str], table: Mapping[str, Any]) -> list[Any]:
    return [table.get(name) for name in names]


def _describe(value: Any) -> str:
    value = getattr(value, "__func__", value)
    name = getattr(value, "__qualname__", None) or f"an object of {type(value).__qualname__}"
    module = getattr(value, "__module__", None) or type(value).__module__
    return f"{name.replace('<locals>.', '')} of {module}"
