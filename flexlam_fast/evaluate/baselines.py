"""Random and expert play, the two ends of the scale that every return is read on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from flexlam_fast.data.experts import make_expert, random_policy
from flexlam_fast.data.play import play
from flexlam_fast.data.vizdoom import MAX_STEPS, DoomEnv
from flexlam_fast.evaluate.summary import Score, score


class Baselines(NamedTuple):
    """Returns of the random player and of the expert on one scenario, and a ``film`` uint8 ``[n,size,size,3]``.

    The film holds the frames of the expert's first episode.
    """

    random: Score
    expert: Score
    film: NDArray[np.uint8]


def film_expert(scenario: str, seed: int, size: int) -> NDArray[np.uint8]:
    """Frames uint8 ``[n,size,size,3]`` of one episode of the scripted expert."""
    with DoomEnv(scenario, oracle=True, size=size) as env:
        return play(env, make_expert(scenario), seed).frames


def play_baselines(scenario: str, seeds: Sequence[int], bar: tqdm[None], seed: int, size: int) -> Baselines:
    """Play every episode twice, once at random and once with the scripted expert.

    Args:
        scenario: a name of ``SCENARIOS``.
        seeds: the episodes, at least two.
        bar: advances by ``2 * MAX_STEPS`` for every seed.
        seed: of the random player's choices.
        size: side of the film's frames in pixels.

    Raises:
        SimulatorError: if ViZDoom is missing or stops.
    """
    expert, gambler = make_expert(scenario), random_policy(seed)
    lows, highs, film = [], [], None
    # The frames are the same with and without the oracle, so one game serves both.
    with DoomEnv(scenario, oracle=True, size=size) as env:
        for episode in seeds:
            lows.append(play(env, gambler, episode).ret)
            bar.update(MAX_STEPS)
            best = play(env, expert, episode)
            highs.append(best.ret)
            bar.update(MAX_STEPS)
            film = best.frames if film is None else film
    assert film is not None
    return Baselines(score(lows), score(highs), film)
