"""Whether the functions of another library are its own, or somebody has put others in their place.

Libraries replace methods of each other's classes and functions of each other's modules. What is written against the
original code must notice. A function counts as the library's own if its code was compiled from the file of the module
that it belongs to, under its own qualified name; decorators of the same library may stand around it. No record of an
earlier moment is needed, so that what was replaced before this package was imported is found as well.
"""

from __future__ import annotations

import dis
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import _lru_cache_wrapper, partial
from operator import attrgetter, itemgetter
from pathlib import Path
from types import BuiltinFunctionType, CodeType, FunctionType, ModuleType
from typing import Any, NamedTuple

import torch
from torch import nn

#: Decorators that change no result: they switch what autograd records.
_GRAD_MODES = (torch.no_grad, torch.enable_grad, torch.set_grad_enabled, torch.inference_mode)
#: Where a class has one name for a method and its code another.
_ALIASES = {"__call__": "_wrapped_call_impl"}
#: A package whose decorators wrap functions without ``__wrapped__``, and make modules of functions.
_KERNELS = "kernels"
_ANNOTATIONS = ("typing", "typing_extensions")  # what they define can be called, and is not, but compared
_CODE = attrgetter("__code__")


class Place(NamedTuple):
    """Where a function is looked up: a class, a module or a mapping, and its name there."""

    holder: Any
    name: str

    def read(self) -> Any:
        """What is there now, or None."""
        if isinstance(self.holder, Mapping):
            return self.holder.get(self.name)
        return getattr(self.holder, self.name, None)

    def __str__(self) -> str:
        if isinstance(self.holder, Mapping):
            return f"{type(self.holder).__name__}[{self.name!r}]"
        owner = self.owner() if isinstance(self.holder, type) else object
        holder = self.holder if owner is object else owner
        return f"{holder.__name__}.{self.name}"

    def owner(self) -> type:
        """The class that has it, which is the holder or a base of it; ``object`` if none has."""
        return next((kind for kind in self.holder.__mro__ if self.name in vars(kind)), object)


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
        if self.is_same() and list(map(_CODE, self._layers)) == self._codes:
            return None
        return self._look()

    def _look(self) -> str | None:
        """Look at every place itself; remember what is there if all is the library's own."""
        self._groups, places = [], list(self._find())
        layers: dict[int, FunctionType] = {}
        for place in list(places):
            value = place.read()
            if not is_own(place, value, self._packages):
                return f"{place} was {'deleted' if value is None else f'replaced by {_describe(value)}'}"
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


def unwrap(value: Any) -> Iterator[FunctionType]:
    """``value`` and what stands behind it: a decorated function one layer after the other, the innermost last."""
    seen: set[int] = set()
    while value is not None and id(value) not in seen:
        seen.add(id(value))
        if isinstance(value, nn.Module) and _package_of(type(value)) == _KERNELS:
            value = vars(value).get("forward", type(value).forward)
        value = getattr(value, "__func__", value)
        if isinstance(value, _lru_cache_wrapper):
            value = value.__wrapped__
        if not isinstance(value, FunctionType):
            return
        yield value
        value = getattr(value, "__wrapped__", None) or _kernels_fallback(value)


def is_own(place: Place, value: Any, packages: frozenset[str]) -> bool:
    """Whether ``value``, read at ``place``, is what the library put there."""
    if value is None:
        return isinstance(place.holder, Mapping)  # where the library may have nothing under this name
    if isinstance(value, type):
        return _is_trusted(_package_of(value), packages) and value.__name__ == place.name
    if isinstance(value, BuiltinFunctionType):
        return value.__name__ == place.name
    if type(value).__module__ in _ANNOTATIONS:
        return getattr(value, "_name", place.name) == place.name
    if not isinstance(place.holder, type):
        # modules have it under its own name, mappings under any
        named = isinstance(place.holder, ModuleType)
        return any(
            layer.__code__.co_qualname == (place.name if named else layer.__qualname__)
            and layer.__code__.co_filename == layer.__globals__.get("__file__")
            and _is_trusted(str(layer.__globals__.get("__name__")).partition(".")[0], packages)
            for layer in _visible(value, packages)
        )
    owner = place.owner()
    if owner is object:
        return True  # a slot that no class of the library fills, as it is with most of ``__getattribute__``
    home = sys.modules.get(owner.__module__)
    names = {f"{owner.__qualname__}.{name}" for name in (place.name, _ALIASES.get(place.name, place.name))}
    return _package_of(owner) in packages and any(
        layer.__code__.co_qualname in names and layer.__code__.co_filename == getattr(home, "__file__", None)
        for layer in _visible(value, packages)
    )


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


def _visible(value: Any, packages: frozenset[str]) -> Iterator[FunctionType]:
    """The layers of ``value`` up to the first that is no decorator of these packages, which is the last."""
    for layer in unwrap(value):
        yield layer
        if not _is_neutral(layer, packages):
            return


def _is_neutral(layer: FunctionType, packages: frozenset[str]) -> bool:
    """Whether a decorator's function is one of the library itself, or changes no result."""
    file = layer.__code__.co_filename
    if layer.__code__.co_qualname == "context_decorator.<locals>.decorate_context":  # torch's, or a copy of it
        factory = dict(zip(layer.__code__.co_freevars, layer.__closure__ or (), strict=True)).get("ctx_factory")
        return factory is not None and isinstance(getattr(factory.cell_contents, "__self__", None), _GRAD_MODES)
    if layer.__code__.co_qualname == "contextmanager.<locals>.helper":
        return layer.__globals__.get("__name__") == "contextlib"
    package = str(layer.__globals__.get("__name__")).partition(".")[0]
    if package not in (packages - {"torch"}) | {_KERNELS}:
        return False
    root = getattr(sys.modules.get(package), "__file__", None)
    return root is not None and Path(root).parent in Path(file).parents


def _kernels_fallback(layer: FunctionType) -> FunctionType | None:
    """What a function of the package ``kernels`` wraps, which it does not say in ``__wrapped__``."""
    if str(layer.__globals__.get("__name__")).partition(".")[0] != _KERNELS:
        return None
    inside = (cell.cell_contents for cell in layer.__closure__ or ())
    return next((value for value in inside if isinstance(value, FunctionType)), None)


def _is_trusted(package: str, packages: frozenset[str]) -> bool:
    return package in packages or package in sys.stdlib_module_names


def _package_of(kind: type) -> str:
    return kind.__module__.partition(".")[0]


def _describe(value: Any) -> str:
    value = getattr(value, "__func__", value)
    name = getattr(value, "__qualname__", None) or f"an object of {type(value).__qualname__}"
    module = getattr(value, "__module__", None) or type(value).__module__
    return f"{name.replace('<locals>.', '')} of {module}"
