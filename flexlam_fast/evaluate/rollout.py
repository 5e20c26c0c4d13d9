"""Plays scenarios with a policy at several budgets, beside random and expert: the command ``flexlam-fast rollout``."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path

from tqdm import tqdm

from flexlam_fast.checks import check_budget, check_names, check_number, check_path
from flexlam_fast.data.vizdoom import MAX_STEPS, SCENARIOS
from flexlam_fast.errors import InputError
from flexlam_fast.evaluate.actor import WARMUP, Actor, time_decisions
from flexlam_fast.evaluate.baselines import Baselines, play_baselines
from flexlam_fast.evaluate.files import make_folder, write
from flexlam_fast.evaluate.machine import look
from flexlam_fast.evaluate.sessions import Games, Job, Outcome, evaluation_seed, play_jobs
from flexlam_fast.evaluate.summary import Latency, latency, score
from flexlam_fast.evaluate.table import Cell, RolloutTable, ScenarioScores
from flexlam_fast.values import shown

#: What a rollout writes.
FILES = ("rollout.json", "rollout.md")
#: Episode ``i`` has a seed of its own below the next collection's; every session is a game of 10 MB or more.
MAX_EPISODES, MAX_SESSIONS = 100_000, 1024


def rollout(
    policy: Actor,
    scenarios: Sequence[str],
    budgets: Sequence[int] | None = None,
    *,
    episodes: int = 50,
    seed: int = 0,
    sessions: int = 1,
    output: Path | None = None,
    progress: bool = True,
) -> RolloutTable:
    """Play every scenario at every budget, and the same episodes at random and with the scripted expert.

    Args:
        policy: who decides.
        scenarios: names of ``SCENARIOS``.
        budgets: values of ``k``; None for 1, 2, 4, ... and ``K``.
        episodes: per scenario, agent and budget, at least 2; episode ``i`` is the same game for all of them.
        seed: 0 to 999; another seed, other episodes. None of them can be in a collection.
        sessions: games that act as one batch. With one, latency is that of the rollout itself; with more, it is
            measured afterwards at batch 1.
        output: folder for ``rollout.json`` and ``rollout.md``; None writes nothing.
        progress: whether to show bars.

    Returns:
        The table.

    Raises:
        InputError: for an argument out of range, before anything starts.
        BudgetError: for a budget outside ``1..K``.
        SimulatorError: if ViZDoom is missing or stops.
        StorageError: if ``output`` cannot be written.
    """
    check_play(scenarios, episodes, seed, sessions)
    chosen = check_ladder(policy, budgets)
    if output is not None:
        make_folder(check_path("output", output), *FILES)
    seeds = [evaluation_seed(seed, i) for i in range(episodes)]
    jobs = [Job(name, s) for name in scenarios for s in seeds]
    with tqdm(total=2 * len(jobs) * MAX_STEPS, unit="step", unit_scale=True, disable=not progress) as bar:
        bar.set_description("random and expert")
        ends = [play_baselines(name, seeds, bar, seed, policy.cfg.frame) for name in scenarios]
    played: dict[int, list[Outcome]] = {}
    with (
        Games(policy.cfg.frame) as games,
        tqdm(total=len(chosen) * len(jobs) * MAX_STEPS, unit="step", unit_scale=True, disable=not progress) as bar,
    ):
        for k in chosen:
            bar.set_description(f"policy at k={k}")
            played[k] = play_jobs(policy, games, jobs, k, sessions, seed, bar)
    timer = tqdm(total=len(chosen) * len(scenarios), unit="cell", desc="latency", disable=not progress or sessions == 1)
    with timer:
        rows = [_scores(policy, n, b, played, sessions == 1, timer) for n, b in zip(scenarios, ends, strict=True)]
    table = _table(policy, rows, episodes, seed, sessions)
    if output is not None:
        write_table(table, output)
    return table


def check_play(scenarios: Sequence[str], episodes: int, seed: int, sessions: int) -> None:
    """Check what is to be played, before there is a policy.

    Raises:
        InputError: naming the argument that is out of range.
    """
    check_names("scenarios", scenarios, SCENARIOS)
    check_number("episodes", episodes, 2, MAX_EPISODES, integer=True)
    check_number("sessions", sessions, 1, MAX_SESSIONS, integer=True)
    evaluation_seed(seed, 0)


def check_ladder(policy: Actor, budgets: Sequence[int] | None) -> tuple[int, ...]:
    """Return the budgets to play at; None for 1, 2, 4, ... and ``K``.

    Raises:
        InputError: none, or one of them twice.
        BudgetError: for a budget outside ``1..K``.
    """
    if budgets is None:
        return policy.cfg.bottleneck.ladder
    given = tuple(budgets) if isinstance(budgets, Iterable) and not isinstance(budgets, str) else ()
    if not given:
        raise InputError(f"budgets: expected at least one, each once, got {shown(budgets)}")
    chosen = tuple(check_budget("budgets", k, 1, policy.cfg.bottleneck.slots) for k in given)
    if len(set(chosen)) < len(chosen):
        raise InputError(f"budgets: expected at least one, each once, got {shown(chosen)}")
    return chosen


def _scores(
    policy: Actor, name: str, ends: Baselines, played: dict[int, list[Outcome]], in_play: bool, bar: tqdm[None]
) -> ScenarioScores:
    cells = []
    for k, outcomes in played.items():
        mine = [outcome for outcome in outcomes if outcome.job.scenario == name]
        times = _in_play(mine) if in_play else latency(time_decisions(policy, ends.film, k))
        bar.update(1)
        cells.append(Cell(k, score([outcome.ret for outcome in mine]), times))
    return ScenarioScores(name, ends.random, ends.expert, tuple(cells))


def _in_play(outcomes: Sequence[Outcome]) -> Latency:
    """Latency of a rollout's own decisions, without the first ones when enough remain."""
    times = list(chain.from_iterable(outcome.ms for outcome in outcomes))
    return latency(times[WARMUP:] if len(times) >= 2 * WARMUP else times)


def _table(policy: Actor, rows: list[ScenarioScores], episodes: int, seed: int, sessions: int) -> RolloutTable:
    backend = getattr(getattr(policy, "backend", None), "name", "unknown")
    machine = look(getattr(policy, "device", "cpu"))
    return RolloutTable(tuple(rows), episodes, seed, sessions, policy.describe(), backend, machine)


def write_table(table: RolloutTable, folder: Path) -> None:
    """Write ``rollout.json``, with every return, and ``rollout.md``.

    Raises:
        StorageError: naming the file that could not be written.
    """
    texts = json.dumps(table.json(details=True), indent=2) + "\n", table.markdown()
    for name, text in zip(FILES, texts, strict=True):
        write(folder / name, text)
