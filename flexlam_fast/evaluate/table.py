"""The table of a rollout: what it holds, and how it reads as JSON, as Markdown and on a terminal."""

from __future__ import annotations

import textwrap
from typing import Any, NamedTuple

from flexlam_fast.evaluate.machine import Machine
from flexlam_fast.evaluate.summary import Latency, Score, normalised, percent_of_expert

HEADER = ("scenario", "k", "return ± 95% CI", "random", "expert", "% of expert", "normalised", "ms", "p50", "p99")


class Cell(NamedTuple):
    """One scenario at one budget."""

    budget: int
    score: Score
    latency: Latency


class ScenarioScores(NamedTuple):
    """One scenario: random and expert play, and the policy at each budget."""

    name: str
    random: Score
    expert: Score
    cells: tuple[Cell, ...]


class RolloutTable(NamedTuple):
    """Everything a rollout found out, and what it was found with.

    ``episodes`` per agent and budget, from ``seed``; ``sessions`` games acted as one batch; ``policy`` describes
    itself; ``backend`` is the name of the code that ran.
    """

    scenarios: tuple[ScenarioScores, ...]
    episodes: int
    seed: int
    sessions: int
    policy: str
    backend: str
    machine: Machine

    def json(self, details: bool = False) -> dict[str, Any]:
        """Return what ``report.json`` holds; ``details`` adds every return and the shares of the expert."""
        return {
            "scenarios": {s.name: _scenario_json(s, details) for s in self.scenarios},
            "backend": self.backend,
            "device": self.machine.device,
            "versions": dict(self.machine.versions),
            "threads": self.machine.threads,
            "episodes": self.episodes,
            "seed": self.seed,
            "sessions": self.sessions,
            "policy": self.policy,
        }

    def rows(self) -> list[tuple[str, ...]]:
        """Return one row of text per scenario and budget, in the order of ``HEADER``."""
        return [_row(s, cell) for s in self.scenarios for cell in s.cells]

    def markdown(self) -> str:
        """Return the table in Markdown, with what it was measured with below it."""
        lines = [HEADER, tuple("---:" if i else "---" for i in range(len(HEADER))), *self.rows()]
        return "\n".join("| " + " | ".join(line) + " |" for line in lines) + f"\n\n{self.caption()}\n"

    def text(self) -> str:
        """Return the table for a terminal."""
        lines = [HEADER, *self.rows()]
        widths = [max(len(line[i]) for line in lines) for i in range(len(HEADER))]
        lines.insert(1, tuple("-" * width for width in widths))
        padded = [
            [line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))]
            for line in lines
        ]
        return "\n".join("  ".join(line) for line in padded) + "\n\n" + textwrap.fill(self.caption(), 100)

    def caption(self) -> str:
        """Return the sentences that say how the numbers were made."""
        how = "every decision of the rollout but the first 20" if self.sessions == 1 else "20 warm-up, 100 measured"
        return (
            f"{self.episodes} episodes per row and agent, the same ones for all; intervals by Student's t. "
            f"Normalised: 0 is random, 1 the expert, who sees more than the pixels. "
            f"Milliseconds per decision at batch 1, host frame in to host action out ({how}). "
            f"Backend {self.backend}, {self.machine.device}, {self.machine.threads} threads."
        )


def _row(scenario: ScenarioScores, cell: Cell) -> tuple[str, ...]:
    value, low, high = cell.score.mean, scenario.random.mean, scenario.expert.mean
    percent, share = percent_of_expert(value, high), normalised(value, low, high)
    return (
        scenario.name,
        str(cell.budget),
        plus_minus(cell.score),
        plus_minus(scenario.random),
        plus_minus(scenario.expert),
        "-" if percent is None else f"{percent:.0f}%",
        "-" if share is None else f"{share:.2f}",
        *(f"{ms:.1f}" for ms in cell.latency[:3]),
    )


def plus_minus(value: Score) -> str:
    """Write a mean and its interval with as many digits as they deserve: ``0.81 ± 0.12``, ``392 ± 41``."""
    digits = 2 if abs(value.mean) < 10 else 1 if abs(value.mean) < 100 else 0
    return f"{value.mean:.{digits}f} ± {value.ci95:.{digits}f}"


def _scenario_json(scenario: ScenarioScores, details: bool) -> dict[str, Any]:
    return {
        "random": _score_json(scenario.random, details),
        "expert": _score_json(scenario.expert, details),
        "budgets": {str(cell.budget): _cell_json(scenario, cell, details) for cell in scenario.cells},
    }


def _score_json(value: Score, details: bool) -> dict[str, Any]:
    plain: dict[str, Any] = {"mean": value.mean, "ci95": value.ci95}
    return plain | {"returns": list(value.values)} if details else plain


def _cell_json(scenario: ScenarioScores, cell: Cell, details: bool) -> dict[str, Any]:
    times = {"ms_mean": cell.latency.mean, "ms_p50": cell.latency.p50, "ms_p99": cell.latency.p99}
    plain = _score_json(cell.score, details) | times
    if details:
        value, low, high = cell.score.mean, scenario.random.mean, scenario.expert.mean
        plain["percent_of_expert"] = percent_of_expert(value, high)
        plain["normalised"] = normalised(value, low, high)
        plain["decisions_timed"] = cell.latency.decisions
    return plain
