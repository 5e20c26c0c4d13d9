"""Whether a function is the library's own: told by where its code was compiled, decorators of the library aside."""

from __future__ import annotations

import functools
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from state_cases import replaced

from flexlam_fast.originals import Watch, reachable
from flexlam_fast.provenance import Place

SOURCE = """
import functools
from collections.abc import Callable
from string import Template as Text
from textwrap import dedent as trim

import torch


class Called:
    def __call__(self, x):
        return x


called = Called()


def decorated(function):
    @functools.wraps(function)
    def wrapper(*args):
        return function(*args)

    return wrapper


def helper(x):
    return 2 * x


def other(x):
    return 3 * x


@functools.lru_cache
def cached(x):
    return isinstance(x, Callable)


class Base:
    def inherited(self, x):
        return helper(x)


renamed = other


class Part(Base):
    @decorated
    @torch.no_grad()
    def forward(self, x):
        return helper(x) if cached(1) else torch.sin(called(x))

    @staticmethod
    def plainly(x):
        return renamed(x) or trim(x) or Text(x)
"""


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[types.ModuleType]:
    """A package of somebody's, imported from its file."""
    (tmp_path / "alibrary.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield __import__("alibrary")
    del sys.modules["alibrary"]


def watch(library: Any) -> Watch:
    roots = [Place(library.Part, name) for name in ("forward", "inherited", "plainly")]
    return Watch(lambda: reachable(roots, ["alibrary"]), ("alibrary", "torch"))


def test_what_the_library_made_is_its_own_with_its_decorators(library: Any) -> None:
    seen = watch(library)
    assert seen.replaced() is None
    assert seen.is_same()
    names = {name for _, name, _ in seen.pairs}
    assert names == {
        "forward", "inherited", "plainly", "helper", "renamed", "cached", "called", "Callable", "trim", "Text",
    }  # fmt: skip


def foreign(x: Any, *_: Any) -> Any:
    return x


def wrapped(old: Callable[..., Any]) -> Callable[..., Any]:
    """A replacement that says of itself that it is the original."""

    @functools.wraps(old)
    def new(*args: Any) -> Any:
        return 2 * old(*args)

    return new


#: The class or module, what is replaced there, by what, and how the sentence starts.
REPLACED: dict[str, tuple[str, str, Callable[[Any], Any], str]] = {
    "a method": ("Part", "forward", lambda m: foreign, "Part.forward was replaced by foreign of test_originals"),
    "an inherited one": ("Base", "inherited", lambda m: foreign, "Base.inherited was replaced by foreign"),
    "one that hides it": ("Part", "inherited", lambda m: foreign, "Part.inherited was replaced by foreign"),
    "a static method": ("Part", "plainly", lambda m: staticmethod(foreign), "Part.plainly was replaced by foreign"),
    "a wrapper": ("Part", "inherited", lambda m: wrapped(m.Part.inherited), "Part.inherited was replaced by"),
    "another of the library": ("", "helper", lambda m: m.other, "alibrary.helper was replaced by other of alibrary"),
    "one that has another name there": ("", "trim", lambda m: foreign, "alibrary.trim was replaced by foreign of"),
    "an object": ("", "called", lambda m: functools.partial(foreign), "alibrary.called was replaced by an object of"),
    "a class": ("", "Text", lambda m: types.SimpleNamespace, "alibrary.Text was replaced by SimpleNamespace of types"),
    "a partial": ("", "helper", lambda m: functools.partial(m.helper), "alibrary.helper was replaced by an object"),
    "a cache": ("", "cached", lambda m: functools.lru_cache(foreign), "alibrary.cached was replaced by foreign"),
    "autocast": ("Part", "inherited", lambda m: torch.autocast("cpu")(m.Part.inherited), "Part.inherited was replaced"),
    "the same code elsewhere": (
        "", "helper", lambda m: types.FunctionType(m.other.__code__, vars(m), "helper"), "alibrary.helper was replaced",
    ),
}  # fmt: skip


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("case", REPLACED)
def test_what_was_replaced_is_named_and_forgotten_when_it_is_put_back(case: str, when: str, library: Any) -> None:
    holder, name, make, sentence = REPLACED[case]
    seen = watch(library)
    if when == "after":
        assert seen.replaced() is None
    with replaced(getattr(library, holder) if holder else library, name, make(library)):
        found = seen.replaced()
        assert found is not None
        assert found.startswith(sentence)
        assert "\n" not in found
        assert not seen.is_same()
    assert seen.replaced() is None
    assert seen.is_same()


def test_code_that_is_exchanged_inside_a_function_is_seen(library: Any) -> None:
    seen = watch(library)
    assert seen.replaced() is None
    library.helper.__code__ = (lambda x: 5 * x).__code__
    assert (seen.replaced() or "").startswith("alibrary.helper was replaced by helper")


def test_what_is_deleted_is_seen(library: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = watch(library)
    assert seen.replaced() is None
    monkeypatch.delattr(library, "helper")
    assert seen.replaced() is None, "what is not there is nobody's"
    assert "helper" not in {name for _, name, _ in seen.pairs}
    monkeypatch.delattr(library.Part, "forward")
    assert seen.replaced() == "Part.forward was deleted"


def test_decorators_that_only_switch_what_autograd_records_change_nothing(library: Any) -> None:
    seen = watch(library)
    for mode in (torch.no_grad(), torch.inference_mode(), torch.enable_grad(), torch.compiler.disable):
        with replaced(library.Base, "inherited", mode(library.Base.inherited)):
            assert seen.replaced() is None


def test_entries_of_a_table_may_come_and_go() -> None:
    table: dict[str, Any] = {"softmax": torch.nn.functional.softmax}
    seen = Watch(lambda: [Place(table, "softmax"), Place(table, "more")], ("torch",))
    assert seen.replaced() is None
    with replaced(table, "more", foreign):
        assert seen.replaced() == "dict['more'] was replaced by foreign of test_originals"
    table["softmax"] = torch.nn.functional.silu
    assert seen.replaced() is None, "a function of the library under another name is still the library's"


def test_functions_that_the_package_kernels_has_made_modules_of_count_as_their_own(
    library: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "kernels.py").write_text(
        "from torch import nn\n\ndef layer(func):\n    class Func(nn.Module):\n        def forward(self, *args):\n"
        "            return func(*args)\n\n    return Func()\n\ndef method(old):\n    def forward(self, x):\n"
        "        return old(self, x)\n\n    return forward\n"
    )
    monkeypatch.delitem(sys.modules, "kernels", raising=False)
    kernels = __import__("kernels")
    seen = watch(library)
    try:
        with (
            replaced(library, "helper", kernels.layer(library.helper)),
            replaced(library.Base, "inherited", kernels.method(library.Base.inherited)),
        ):
            assert seen.replaced() is None
            library.helper.forward = types.MethodType(type(library.helper).forward, library.helper)
            assert seen.replaced() is None, "the method that it has anyway"
            library.helper.forward = foreign
            assert (seen.replaced() or "").startswith("alibrary.helper was replaced by an object of")
        with replaced(library, "helper", kernels.layer(foreign)):
            assert (seen.replaced() or "").startswith("alibrary.helper was replaced by an object of")
    finally:
        del sys.modules["kernels"]
