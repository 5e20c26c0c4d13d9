"""What a caller gives is taken as it is meant, or refused in one sentence."""

from __future__ import annotations

import math
import re
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flexlam_fast import values
from flexlam_fast.checks import check_budget, check_choice, check_names, check_number, check_path
from flexlam_fast.errors import BudgetError, InputError, StorageError
from flexlam_fast.values import make_folder

ANYTHING = st.one_of(
    st.integers(),
    st.sampled_from([10**30, -(2**63), 2**63, 2**64, 10**400, 10**5000, -(10**5000)]),
    st.floats(),
    st.booleans(),
    st.text(),
    st.none(),
    st.complex_numbers(),
    st.lists(st.integers(), max_size=2),
    st.builds(torch.tensor, st.floats(-1, 1)),
    st.builds(np.float32, st.floats(width=32)),
    st.builds(np.bool_, st.booleans()),
)


@given(ANYTHING, st.booleans(), st.booleans())
def test_a_number_in_range_or_one_sentence(value: Any, integer: bool, open_low: bool) -> None:
    real = isinstance(value, int | np.integer if integer else int | float | np.integer | np.floating)
    if real and not isinstance(value, bool) and (value > 0 if open_low else value >= 0) and value <= 1000:
        taken = check_number("x", value, 0, 1000, integer=integer, open_low=open_low)
        assert type(taken) is (int if integer else float)
        assert taken == value
        return
    kind = "an integer" if integer else "a number"
    span = f"{kind} above 0, at most 1000" if open_low else rf"{kind} in 0\.\.1000"
    with pytest.raises(InputError, match=rf"^x: expected {span}, got [^\n]{{1,60}}$"):
        check_number("x", value, 0, 1000, integer=integer, open_low=open_low)


@pytest.mark.parametrize(
    ("value", "low", "high", "options", "sentence"),
    [
        (math.nan, 0, math.inf, {"open_low": True}, "x: expected a finite number above 0, got nan"),
        (math.inf, 0, math.inf, {}, "x: expected a finite number of at least 0, got inf"),
        (-math.inf, -math.inf, math.inf, {}, "x: expected a finite number, got -inf"),
        (3, -math.inf, 2.5, {}, "x: expected a number of at most 2.5, got 3"),
        (0, 1, math.inf, {"integer": True}, "x: expected an integer of at least 1, got 0"),
        (True, 0, 9, {"integer": True}, "x: expected an integer in 0..9, got True"),
        ("3", 0, 9, {"integer": True}, "x: expected an integer in 0..9, got '3'"),
        (2.0, 0, 9, {"integer": True}, "x: expected an integer in 0..9, got 2.0"),
    ],
)
def test_the_sentence(value: Any, low: float, high: float, options: dict[str, bool], sentence: str) -> None:
    with pytest.raises(InputError, match=f"^{re.escape(sentence)}$"):
        check_number("x", value, low, high, **options)


def test_numbers_of_other_libraries_become_pythons() -> None:
    assert check_number("x", np.int32(3), 0, 9, integer=True) == 3
    assert type(check_number("x", np.int32(3), 0, 9, integer=True)) is int
    assert type(check_number("x", np.float32(0.5), 0, 9)) is float
    assert check_number("x", Fraction(1, 2), 0, 9) == 0.5
    with pytest.raises(BudgetError, match=r"k: expected an integer in 1\.\.4, got int of more digits than are printed"):
        check_budget("k", 10**5000, 1, 4)


def test_names_and_choices() -> None:
    assert check_names("scenarios", ["b", "a"], ("a", "b", "c")) == ("b", "a")
    for wrong in ((), "a", ("a", "a"), ("d",), (["a"],), None, 3, (b"a",)):
        with pytest.raises(InputError, match=r"^scenarios: expected some of a, b, each once, got "):
            check_names("scenarios", wrong, ("a", "b"))
    assert check_choice("dtype", "a", ("a", "b")) == "a"
    for other in ("", "A", None, ["a"], "a" * 500, "\n"):
        with pytest.raises(InputError, match=r"^dtype: expected one of a, b, got [^\n]{1,60}$"):
            check_choice("dtype", other, ("a", "b"))


def test_a_folder_is_tried_before_work_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_folder(tmp_path / "a" / "b", "report.json")
    (tmp_path / "a" / "b" / "report.json").touch()
    make_folder(tmp_path / "a" / "b", "report.json")
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["report.json"]
    for wrong, name in ((tmp_path / "a" / "b" / "report.json", "x"), (tmp_path / "a", "b"), (tmp_path / "c\0d", "x")):
        with pytest.raises(StorageError, match="expected a folder to write to, got: "):
            make_folder(wrong, name)
    monkeypatch.setattr(values.tempfile, "TemporaryFile", lambda dir: open("/dev/full", "wb"))  # noqa: SIM115
    with pytest.raises(StorageError, match=r"a: expected a folder to write to, got: No space left on device$"):
        make_folder(tmp_path / "a")


def test_paths() -> None:
    assert check_path("output", "a/b") == check_path("output", Path("a/b")) == Path("a/b")
    for wrong in ("", "a\0b", b"a", 3, None, Path("a\0b")):
        with pytest.raises(InputError, match=r"^output: expected a path, got "):
            check_path("output", wrong)
