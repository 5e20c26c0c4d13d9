"""Every number of the command line is checked before any work: one sentence, status 2, and nothing is written."""

from __future__ import annotations

import contextlib
import io
import math
import os
from pathlib import Path
from typing import NamedTuple, NoReturn

import hypothesis
import pytest
from evaluate_cases import ToyPolicy
from hypothesis import strategies as st

pytest.importorskip("tyro")
pytest.importorskip("vizdoom")
pytest.importorskip("pyarrow")
pytest.importorskip("matplotlib")
pytest.importorskip("torchmetrics")

from flexlam_fast import cli
from flexlam_fast.data import collect as collect_module
from flexlam_fast.evaluate import demo as demo_module
from flexlam_fast.evaluate import load as load_module
from flexlam_fast.evaluate import probe as probe_module
from flexlam_fast.evaluate import rollout as rollout_module
from flexlam_fast.train import commands as train_module

INF = math.inf
#: What stands for a number that nobody means.
HUGE = st.sampled_from([2**31, 2**63, 2**64, 10**30, 10**400])


class Option(NamedTuple):
    """An option of a command, and the range of what it takes."""

    command: str
    name: str
    low: float
    high: float
    integer: bool = True
    open_low: bool = False


STAGES = ("lam", "sequence", "translator", "joint")
OPTIONS = [
    *(Option("collect", *rest) for rest in (("seed", 0, 999), ("workers", 1, 1024), ("steps", 1, 20_000_000))),
    Option("collect", "size", 8, 120),
    *(
        Option("probe", *rest)
        for rest in (("labels", 10, 2**31 - 1), ("transitions", 4, 2**31 - 1), ("seeds", 2, 1000))
    ),
    Option("probe", "seed", 0, 2**32 - 1001),
    Option("collect", "noise", 0, 1, False),
    Option("collect", "test-fraction", 0, 0.5, False),
    *(Option(play, "seed", 0, 999) for play in ("rollout", "demo")),
    *(Option(play, "sessions", 1, 1024) for play in ("rollout", "demo")),
    *(Option(play, "episodes", 2, 100_000) for play in ("rollout", "demo")),
    *(Option(play, "budgets", 1, 4) for play in ("rollout", "demo")),
    Option("demo", "minutes", 0, 10_000, False, True),
    *(Option(f"train {stage}", "lr", 0, 1000, False, True) for stage in STAGES),
    *(Option(f"train {stage}", "labels", 0, 1e12, False, True) for stage in ("translator", "joint", "all")),
    *(Option("train sequence", name, 1, 10**9) for name in ("steps", "save-every", "validate-every")),
    Option("train lam", "batch", 1, 100_000),
    Option("train all", "seed", 0, 2**63 - 1),
    Option("train joint", "weight", 0, 1e6, False),
]


def outside(option: Option) -> st.SearchStrategy[float]:
    """Numbers that the option must refuse."""
    low, high = option.low, option.high
    if option.integer:
        return st.integers(max_value=int(low) - 1) | st.integers(min_value=int(high) + 1) | HUGE.filter(high.__lt__)
    reals = st.sampled_from([math.nan, INF, -INF, -1e-300, 1e308])
    reals |= st.floats(max_value=low, exclude_max=not option.open_low) | st.floats(min_value=high, exclude_min=True)
    return reals


def never(*_: object, **__: object) -> NoReturn:
    raise AssertionError("something started")


@pytest.fixture
def guarded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory, and nothing that can start in it."""
    monkeypatch.chdir(tmp_path)
    for module in (demo_module, load_module):
        monkeypatch.setattr(module, "load_policy", lambda *_: ToyPolicy())
    starts = [(collect_module, "EpisodeWriter"), (rollout_module, "play_baselines"), (demo_module, "make_folder")]
    for owner, name in [
        *starts,
        (train_module, "EpisodeStore"),
        (train_module, "_collect_missing"),
        (probe_module, "load_lam"),
    ]:
        monkeypatch.setattr(owner, name, never)
    return tmp_path


def refused(arguments: list[str]) -> str:
    """Run a command in this process, which must end with status 2 and one sentence."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said), pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2, said.getvalue()
    assert said.getvalue().startswith("flexlam-fast: "), said.getvalue()
    assert len(said.getvalue().splitlines()) == 1, said.getvalue()
    return said.getvalue()


def arguments_of(command: str) -> list[str]:
    paths = {"collect": ["--output", "o"], "train": ["--data", "d", "--output", "o"], "probe": ["--data", "d"]}
    return [*command.split(), *paths.get(command.split()[0], [])]


@pytest.mark.parametrize("option", OPTIONS, ids=lambda option: f"{option.command} {option.name}")
def test_numbers_out_of_range(option: Option, guarded: Path) -> None:
    @hypothesis.settings(max_examples=5)
    @hypothesis.given(outside(option))
    def check(value: float) -> None:
        said = refused([*arguments_of(option.command), f"--{option.name}={value}"])
        assert said.split(": ")[1] == option.name.replace("-", "_")

    check()
    assert os.listdir(guarded) == []


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (["collect", "--output", ""], "arguments: expected none that is empty or holds a NUL byte, got ''"),
        (["collect", "--output="], "arguments: expected none that is empty"),
        (["collect", "--output", "a\0b"], "arguments: expected none that is empty or holds a NUL byte"),
        (["collect", "--output", "o", "--scenarios", "take_cover", "take_cover"], "scenarios: expected some of"),
        (["collect", "--output", "o", "--scenarios"], "scenarios: expected some of"),
        (["collect", "--output", "o", "--steps"], "steps: expected integers in 1..20000000, got ()"),
        (["collect", "--output", "o", "--steps", "5", "6", "7"], "steps: expected 1 or 4 numbers, got (5, 6, 7)"),
        (["demo", "--scenarios", "chess"], "scenarios: expected some of"),
        (["demo", "--budgets", "1", "1"], "budgets: expected at least one, each once, got (1, 1)"),
        (["rollout", "--scenarios", "take_cover", "take_cover"], "scenarios: expected some of"),
        (["rollout", "--budgets"], "budgets: expected at least one, each once, got ()"),
        (["train", "lam", "--data", "d", "--output", "o", "--precision", "fp16"], "precision: expected one of auto"),
        (["train", "lam", "--data", "d", "--output", "o", "--preset", "huge"], "preset: expected one of"),
        (["train", "lam", "--data", "d", "--output", "o", "--device", "meta"], "device: expected one that this"),
        (["train", "lam", "--data", "d", "--output", "o", "--backend", "cuda"], "backend: expected one of"),
        (["train", "all", "--data", "d", "--output", "o", "--export-dtype", "int8"], "export_dtype: expected one of"),
        (["train", "all", "--data", "d", "--output", "o", "--prefix", "half"], "prefix: expected one of"),
    ],
)
def test_names_and_paths(given: list[str], sentence: str, guarded: Path) -> None:
    assert refused(given).startswith(f"flexlam-fast: {sentence}")
    assert os.listdir(guarded) == []


@pytest.mark.parametrize("command", ["rollout", "demo", "collect"])
@pytest.mark.parametrize("case", ["a file", "below a file", "a folder in place of a file"])
def test_targets_that_cannot_be_written_start_nothing(
    command: str, case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if case == "a folder in place of a file":
        for name in ("rollout.json", "report.json"):
            (tmp_path / "o" / name).mkdir(parents=True)
    else:
        (tmp_path / "o").touch()
    for module in (demo_module, load_module):
        monkeypatch.setattr(module, "load_policy", lambda *_: ToyPolicy(16))
    monkeypatch.setattr(rollout_module, "play_baselines", never)
    monkeypatch.setattr(demo_module, "estimate_seconds", never)
    monkeypatch.setattr(collect_module, "_Players", never)
    said = refused([command, "--output", "o/deep" if case == "below a file" else "o"])
    assert "o: expected " in said or "deep: expected " in said
