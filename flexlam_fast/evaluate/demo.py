"""The demo: one trained checkpoint plays at several budgets, and a report says how well and how fast."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flexlam_fast.data.extras import need
from flexlam_fast.data.vizdoom import MAX_STEPS, SCREEN_HEIGHT
from flexlam_fast.errors import ConfigError
from flexlam_fast.evaluate.actor import MEASURED, WARMUP, Actor, decide
from flexlam_fast.evaluate.baselines import film_expert
from flexlam_fast.evaluate.decoding import Pairs, decode_at
from flexlam_fast.evaluate.fidelity import change
from flexlam_fast.evaluate.files import make_folder
from flexlam_fast.evaluate.load import load_policy
from flexlam_fast.evaluate.rollout import check_ladder, check_play, rollout
from flexlam_fast.evaluate.sessions import evaluation_seed
from flexlam_fast.evaluate.strip import pick, strip_png, strip_rows
from flexlam_fast.lam import LatentActionModel
from flexlam_fast.report import FILES, write_report
from flexlam_fast.values import check_number, check_path

#: Seconds that one step of a game takes, and that what is not play takes (starting games, decoding, drawing).
GAME_SECONDS, FIXED_SECONDS = 0.001, 15.0
#: Episodes are this much of the longest possible on average, random and expert play included.
TYPICAL_LENGTH = 0.75
FEWEST, MOST = 4, 10
MAX_MINUTES = 10_000


def demo(
    checkpoint: str = "vizdoom-tiny",
    *,
    output: Path = Path("out/demo"),
    scenarios: tuple[str, ...] = ("my_way_home", "health_gathering"),
    budgets: tuple[int, ...] = (1, 2, 4, 8, 16),
    episodes: int | None = None,
    minutes: float = 3.0,
    sessions: int = 6,
    seed: int = 0,
    device: str = "auto",
    progress: bool = True,
) -> None:
    """Play a trained checkpoint at several budgets from one set of weights, and write a report.

    Args:
        checkpoint: a directory, or the name of a shipped checkpoint.
        output: folder for report.json, report.html and strip.png.
        scenarios: what to play.
        budgets: codes per decision.
        episodes: per scenario, budget and agent; left out, as many (4 to 10) as fit into the time.
        minutes: the time to fit into, when episodes are left out.
        sessions: games that act as one batch, 1 to 1024; latency is always measured at batch 1.
        seed: 0 to 999; another seed, other episodes.
        device: where the model runs: cpu, cuda, cuda:1; auto takes a GPU where there is one.
        progress: whether to show bars.

    Raises:
        FlexLAMError: one sentence for whatever is missing, damaged or out of range.
    """
    check_play(scenarios, MOST if episodes is None else episodes, seed, sessions)
    check_number("minutes", minutes, 0, MAX_MINUTES, open_low=True)
    check_path("output", output)
    for module in ("matplotlib", "PIL", "torchmetrics", "vizdoom"):
        need(module)  # better now than after the games
    policy = load_policy(checkpoint, device)
    check_ladder(policy, budgets)
    _check_size(policy)
    make_folder(output, *FILES)
    print(policy.describe(), flush=True)
    count = _plan(policy, scenarios, budgets, sessions, episodes, minutes * 60)
    begun = time.perf_counter()
    strip = film_strip(policy.lam, scenarios, (0, *budgets), seed)
    table = rollout(policy, scenarios, budgets, episodes=count, seed=seed, sessions=sessions, progress=progress)
    # First the table: what cannot be written has been seen then.
    print(f"\n{table.text()}\n\n{(time.perf_counter() - begun) / 60:.1f} minutes", flush=True)
    files = write_report(table, output, strip, f"FlexLAM demo: {Path(checkpoint).name}")
    print("written:", *(f"  {path}" for path in files if path is not None), sep="\n")


def film_strip(lam: LatentActionModel, scenarios: Sequence[str], budgets: Sequence[int], seed: int) -> bytes:
    """Film the expert in each scenario and return the strip of two transitions of each as a PNG."""
    labels, now, following = [], [], []
    for scenario in scenarios:
        film = film_expert(scenario, evaluation_seed(seed, 0), lam.cfg.frame)
        moves = change(*Pairs.of(film[:-1], film[1:])).numpy()
        for i in pick(moves, 2):
            labels.append(scenario)
            now.append(film[i])
            following.append(film[i + 1])
    pairs = Pairs.of(np.stack(now), np.stack(following))
    return strip_png(strip_rows(labels, pairs, decode_at(lam, pairs, budgets, seed)), budgets)


def estimate_seconds(policy: Actor, scenarios: int, budgets: Sequence[int], sessions: int) -> tuple[float, float]:
    """Estimate how long a rollout takes here: seconds in any case, and seconds for each episode of every row.

    Times a few decisions at the smallest and at the largest budget; those between lie on a line.
    """
    size = policy.cfg.frame
    frames = np.random.default_rng(0).integers(0, 256, (sessions, size, size, policy.cfg.channels), dtype=np.uint8)

    def typical(k: int, batch: int) -> float:
        policy.reset(batch)
        return float(np.median([decide(policy, frames[:batch], k).ms for _ in range(10)][3:])) / 1e3

    def total(batch: int) -> float:
        low, high = min(budgets), max(budgets)
        first, last = typical(low, batch), typical(high, batch)
        return sum(first + (last - first) * (k - low) / max(high - low, 1) for k in budgets)

    length = MAX_STEPS * TYPICAL_LENGTH * scenarios
    games = length * GAME_SECONDS * (len(budgets) + 2)  # random and expert play too
    latency = total(1) * (WARMUP + MEASURED) * scenarios
    return FIXED_SECONDS + latency, games + length * total(sessions) / sessions


def _plan(
    policy: Actor,
    scenarios: Sequence[str],
    budgets: Sequence[int],
    sessions: int,
    episodes: int | None,
    seconds: float,
) -> int:
    """Say what will be played and about how long it takes, and return the number of episodes."""
    fixed, each = estimate_seconds(policy, len(scenarios), budgets, sessions)
    count = min(MOST, max(FEWEST, int((seconds - fixed) / each))) if episodes is None else episodes
    print(
        f"{count} episodes of {', '.join(scenarios)} at k = {', '.join(map(str, budgets))}, at random and with the "
        f"expert: about {(fixed + count * each) / 60:.1f} minutes",
        flush=True,
    )
    return count


def _check_size(policy: Any) -> None:
    cfg = policy.cfg
    if not 8 <= cfg.frame <= SCREEN_HEIGHT or cfg.channels != 3:
        raise ConfigError(
            f"demo: expected a model of square frames of 8 to {SCREEN_HEIGHT} pixels and 3 channels, got "
            f"{cfg.frame}x{cfg.frame}x{cfg.channels}"
        )
