"""Where a function comes from: whether it is the one that a library has put where it is looked up.

A function counts as the library's own if its code was compiled from the file of the module that it belongs to, under
its own qualified name; decorators of the same library may stand around it. No record of an earlier moment is needed, so
that what was replaced before this package was imported is found as well.
"""

from __future__ import annotations

import ast
import linecache
import sys
from collections.abc import Iterator, Mapping
from functools import _lru_cache_wrapper, lru_cache
from pathlib import Path
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any, NamedTuple

import torch
from torch import nn

#: Decorators that change no result: they switch what autograd records.
_GRAD_MODES = (torch.no_grad, torch.enable_grad, torch.set_grad_enabled, torch.inference_mode)
#: What other decorators that change no result make of a function.
_WRAPPERS = {
    ("contextlib", "contextmanager.<locals>.helper"),
    ("torch._dynamo.eval_frame", "DisableContext.__call__.<locals>._fn"),
    ("torch._dynamo.external_utils", "get_nonrecursive_disable_wrapper.<locals>.nonrecursive_disable_wrapper"),
}
#: Where a class has one name for a method and its code another.
_ALIASES = {"__call__": "_wrapped_call_impl"}
#: A package whose decorators wrap functions without ``__wrapped__``, and make modules of functions.
_KERNELS = "kernels"
_ANNOTATIONS = ("typing", "typing_extensions")  # what they define can be called, and is not, but compared


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


def is_own(place: Place, value: Any, packages: frozenset[str]) -> bool:
    """Whether ``value``, read at ``place``, is what the library put there."""
    if value is None:
        return isinstance(place.holder, Mapping)  # where the library may have nothing under this name
    if isinstance(place.holder, type):
        return _is_own_method(place, value, packages)
    return _is_own_function(place, value, packages) or _is_imported(place, value)


def _is_own_method(place: Place, value: Any, packages: frozenset[str]) -> bool:
    owner = place.owner()
    if owner is object:
        return True  # a slot that no class of the library fills, as it is with most of ``__getattribute__``
    home = sys.modules.get(owner.__module__)
    names = {f"{owner.__qualname__}.{name}" for name in (place.name, _ALIASES.get(place.name, place.name))}
    return _package_of(owner) in packages and any(
        layer.__code__.co_qualname in names and layer.__code__.co_filename == getattr(home, "__file__", None)
        for layer in _visible(value, packages)
    )


def _is_own_function(place: Place, value: Any, packages: frozenset[str]) -> bool:
    """Whether a function or class comes from one of ``packages``, under the name that it has there."""
    named = isinstance(place.holder, ModuleType)  # entries of tables may have any name
    if isinstance(value, type):
        return value.__name__ == place.name and _is_trusted(_package_of(value), packages)
    if isinstance(value, BuiltinFunctionType):
        return value.__name__ == place.name
    if type(value).__module__ in _ANNOTATIONS:
        return getattr(value, "_name", place.name) == place.name
    return any(
        layer.__code__.co_qualname == (place.name if named else layer.__qualname__)
        and layer.__code__.co_filename == layer.__globals__.get("__file__")
        and _is_trusted(_package_in(layer), packages)
        for layer in _visible(value, packages)
    )


def _is_imported(place: Place, value: Any) -> bool:
    """Whether a module says in its source that it imports a name from where ``value`` comes, or makes it of its own.

    This is asked only where names do not tell.
    """
    if not isinstance(place.holder, ModuleType):
        return False
    file, home = getattr(place.holder, "__file__", None), place.holder.__name__.partition(".")[0]
    origins = _origins(file).get(place.name, set()) if file else set()
    packages = {home if origin == "." else origin for origin in origins}
    for layer in unwrap(value):
        own = layer.__code__.co_qualname == layer.__qualname__
        if own and layer.__code__.co_filename == layer.__globals__.get("__file__"):
            return ("" in origins and layer.__code__.co_filename == file) or _package_in(layer) in packages
        if _package_in(layer) not in packages:
            return False
    kind = value if isinstance(value, type) else type(value)
    return bool(origins) and _package_of(kind) in packages | {home}


def defines(module: str, name: str) -> bool:
    """Whether the source of a module has a function or method of that name, whoever's it is now."""
    file = getattr(sys.modules.get(module), "__file__", None)
    return file is not None and f"def {name}(" in _source(file)


@lru_cache(maxsize=64)
def _source(file: str) -> str:
    return "".join(linecache.getlines(file))


@lru_cache(maxsize=64)
def _origins(file: str) -> dict[str, set[str]]:
    """The packages that a file imports each name from, ``"."`` for its own, and ``""`` for a name that it assigns."""
    found: dict[str, set[str]] = {}
    for node in ast.walk(ast.parse(_source(file))):
        if isinstance(node, ast.ImportFrom):
            origin = "." if node.level else str(node.module).partition(".")[0]
            for name in node.names:
                found.setdefault(name.asname or name.name, set()).add(origin)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                if isinstance(target, ast.Name):
                    found.setdefault(target.id, set()).add("")
    return found


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


def _visible(value: Any, packages: frozenset[str]) -> Iterator[FunctionType]:
    """The layers of ``value`` up to the first that is no decorator of these packages, which is the last."""
    for layer in unwrap(value):
        yield layer
        if not _is_neutral(layer, packages):
            return


def _is_neutral(layer: FunctionType, packages: frozenset[str]) -> bool:
    """Whether a decorator's function is one of the library itself, or changes no result."""
    if (layer.__globals__.get("__name__"), layer.__code__.co_qualname) in _WRAPPERS:
        return True
    if layer.__code__.co_qualname == "context_decorator.<locals>.decorate_context":  # torch's, or a copy of it
        factory = dict(zip(layer.__code__.co_freevars, layer.__closure__ or (), strict=True)).get("ctx_factory")
        return factory is not None and isinstance(getattr(factory.cell_contents, "__self__", None), _GRAD_MODES)
    package = _package_in(layer)
    if package not in (packages - {"torch"}) | {_KERNELS}:
        return False
    root = getattr(sys.modules.get(package), "__file__", None)
    return root is not None and Path(root).parent in Path(layer.__code__.co_filename).parents


def _kernels_fallback(layer: FunctionType) -> FunctionType | None:
    """What a function of the package ``kernels`` wraps, which it does not say in ``__wrapped__``."""
    if _package_in(layer) != _KERNELS:
        return None
    inside = (cell.cell_contents for cell in layer.__closure__ or ())
    return next((value for value in inside if isinstance(value, FunctionType)), None)


def _is_trusted(package: str, packages: frozenset[str]) -> bool:
    return package in packages or package in sys.stdlib_module_names


def _package_in(layer: FunctionType) -> str:
    """The top-level package of the module that a function is defined in."""
    return str(layer.__globals__.get("__name__")).partition(".")[0]


def _package_of(kind: type) -> str:
    return kind.__module__.partition(".")[0]
