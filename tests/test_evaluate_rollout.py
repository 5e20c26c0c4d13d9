"""Rollouts: the table of scores and latencies, and requests that are refused before anything starts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
import torch
from evaluate_cases import ToyPolicy, expected, play_toys

from flexlam_fast.errors import BudgetError, FlexLAMError, InputError, StorageError
from flexlam_fast.evaluate import rollout as rollout_module
from flexlam_fast.evaluate.baselines import Baselines
from flexlam_fast.evaluate.load import find_device
from flexlam_fast.evaluate.rollout import rollout
from flexlam_fast.evaluate.sessions import Job, Outcome
from flexlam_fast.evaluate.summary import Score


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    play_toys(monkeypatch)


@pytest.fixture(scope="module")
def tables() -> dict[int, rollout_module.RolloutTable]:
    """The same three short episodes, one game at a time and three at once."""
    pytest.importorskip("vizdoom")
    names = ("take_cover",)
    return {n: rollout(ToyPolicy(), names, (1, 4), episodes=3, sessions=n, progress=False) for n in (1, 3)}


def test_batched_sessions_play_as_single_ones(tables: dict[int, rollout_module.RolloutTable]) -> None:
    one, three = tables[1].scenarios[0], tables[3].scenarios[0]
    assert [c.score.values for c in one.cells] == [c.score.values for c in three.cells]
    assert (one.random, one.expert) == (three.random, three.expert)
    assert [c.budget for c in one.cells] == [1, 4]


def test_rollout_knows_random_from_expert(tables: dict[int, rollout_module.RolloutTable]) -> None:
    scenario = tables[1].scenarios[0]
    assert scenario.expert.mean > scenario.random.mean
    assert len(scenario.expert.values) == len(scenario.random.values) == 3
    played = sum(len(v) for v in (scenario.random.values, scenario.cells[0].score.values))
    assert played == 6


def test_latency_is_of_the_rollout_for_one_session_and_of_the_protocol_for_more(
    tables: dict[int, rollout_module.RolloutTable],
) -> None:
    assert all(c.latency.decisions == 100 for c in tables[3].scenarios[0].cells)
    steps = [c.latency.decisions for c in tables[1].scenarios[0].cells]
    # take_cover pays one per tic survived, four tics a step, so the steps follow from the returns.
    returns = [sum(c.score.values) for c in tables[1].scenarios[0].cells]
    assert all(abs(n + 20 - r / 4) <= 6 for n, r in zip(steps, returns, strict=True))


def test_first_decisions_are_warm_up_when_enough_remain() -> None:
    job = Job("take_cover", 1)
    slow = [100.0] * 20
    assert rollout_module._in_play([Outcome(job, 0.0, (*slow, *[1.0] * 30))]).mean == 1.0
    assert rollout_module._in_play([Outcome(job, 0.0, (100.0, 1.0))]).decisions == 2


def test_table_as_text_and_json(tables: dict[int, rollout_module.RolloutTable], tmp_path: Path) -> None:
    table = tables[3]
    rollout_module.write_table(table, tmp_path)
    stored = json.loads((tmp_path / "rollout.json").read_text())
    row = stored["scenarios"]["take_cover"]["budgets"]["4"]
    assert row["returns"] == list(table.scenarios[0].cells[1].score.values)
    random, expert = (stored["scenarios"]["take_cover"][end]["mean"] for end in ("random", "expert"))
    assert row["normalised"] == pytest.approx((row["mean"] - random) / (expert - random))
    assert row["percent_of_expert"] == pytest.approx(100 * row["mean"] / expert)
    lines = (tmp_path / "rollout.md").read_text().splitlines()
    assert [line.split("|")[2].strip() for line in lines[2:4]] == ["1", "4"]
    assert all(line.count("|") == 11 for line in lines[:4])
    assert "take_cover" in table.text()


@pytest.mark.usefixtures("toy")
def test_every_scenario_gets_its_own_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    ends = Baselines(Score(0.0, 0.0, ()), Score(1.0, 0.0, ()), np.zeros((3, 64, 64, 3), np.uint8))
    monkeypatch.setattr(rollout_module, "play_baselines", lambda *_: ends)
    names = ("my_way_home", "take_cover")
    monkeypatch.setattr(rollout_module, "evaluation_seed", lambda seed, i: 10 * seed + i)
    table = rollout(ToyPolicy(), names, (1, 3), episodes=4, seed=2, sessions=3, progress=False)
    assert tuple(s.name for s in table.scenarios) == names
    for scenario in table.scenarios:
        for cell in scenario.cells:
            assert cell.score.values == tuple(expected(Job(scenario.name, 20 + i), cell.budget) for i in range(4))


@pytest.mark.parametrize(
    ("change", "kind", "sentence"),
    [
        ({"scenarios": ("doom",)}, InputError, "scenarios: expected some of .*, got "),
        ({"scenarios": ()}, InputError, "scenarios: expected some of"),
        ({"scenarios": "take_cover"}, InputError, "scenarios: expected some of"),
        ({"scenarios": ("take_cover", "take_cover")}, InputError, "each once"),
        ({"budgets": (0,)}, BudgetError, r"budgets: expected an integer in 1..4, got 0"),
        ({"budgets": (1, 5)}, BudgetError, r"budgets: expected an integer in 1..4, got 5"),
        ({"budgets": ()}, InputError, "budgets: expected at least one"),
        ({"budgets": (2, 2)}, InputError, "each once"),
        ({"episodes": 1}, InputError, r"episodes: expected an integer in 2\.\.100000, got 1"),
        ({"sessions": 0}, InputError, r"sessions: expected an integer in 1\.\.1024, got 0"),
        ({"seed": 1000}, InputError, r"seed: expected an integer in 0\.\.999, got 1000"),
        ({"seed": 1.0}, InputError, r"seed: expected an integer in 0\.\.999, got 1.0"),
        ({"episodes": True}, InputError, r"episodes: expected an integer in 2\.\.100000, got True"),
        ({"budgets": 3}, InputError, "budgets: expected at least one, each once, got 3"),
        ({"output": ""}, InputError, "output: expected a path, got ''"),
    ],
)
def test_bad_requests_start_nothing(
    monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], kind: type[FlexLAMError], sentence: str
) -> None:
    def never(*_: object) -> NoReturn:
        raise AssertionError("something started")

    monkeypatch.setattr(rollout_module, "play_baselines", never)
    request: dict[str, Any] = {"scenarios": ("take_cover",), "budgets": (1,), "episodes": 2} | change
    with pytest.raises(kind, match=sentence):
        rollout(ToyPolicy(), request.pop("scenarios"), request.pop("budgets"), progress=False, **request)


def test_results_that_cannot_be_written_are_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("here already")
    with pytest.raises(StorageError, match="file: expected a folder to write to, got: "):
        rollout(ToyPolicy(), ("take_cover",), (1,), episodes=2, output=tmp_path / "file", progress=False)


def test_unknown_devices_are_one_sentence() -> None:
    assert find_device("cpu") == torch.device("cpu")
    assert find_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    for name in ("warp", "cuda:4711"):
        with pytest.raises(InputError, match=f"device: expected one that this machine has, got '{name}'"):
            find_device(name)
