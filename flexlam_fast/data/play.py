"""Plays one episode of a scenario and keeps what was seen, done and earned."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from flexlam_fast.data.experts import Player
from flexlam_fast.data.vizdoom import SCENARIOS, DoomEnv
from flexlam_fast.values import check_number

#: A burst of noise is one action held for 1 to 4 decisions.
LONGEST_BURST = 4
MEAN_BURST = (1 + LONGEST_BURST) / 2


class Played(NamedTuple):
    """An episode of ``n`` actions.

    ``frames`` uint8 ``[n,size,size,3]``, what each action was taken on; the last action leads to no frame.
    ``actions`` int64 ``[n]``, ``rewards`` float64 ``[n]``; ``ret`` the sum of the rewards.
    """

    frames: NDArray[np.uint8]
    actions: NDArray[np.int64]
    rewards: NDArray[np.float64]
    ret: float


def play(env: DoomEnv, player: Player, seed: int, noise: float = 0.0) -> Played:
    """Play one episode to its end.

    Args:
        env: the scenario; experts need ``oracle=True``.
        player: who chooses.
        seed: names the episode, the player's random numbers and the noise.
        noise: share of the decisions that random bursts take over; each holds one action, drawn uniformly from the
            scenario's own, for 1 to 4 decisions. What is executed is what is recorded.

    Returns:
        The whole episode.

    Raises:
        InputError: for a noise outside 0..1.
        SimulatorError: the game does not start, or stops.
    """
    noise = check_number("noise", noise, 0, 1)
    rng = np.random.default_rng((seed, list(SCENARIOS).index(env.scenario)))
    # With p the odds that a burst starts when none runs, its share is mean*p / (1 + (mean - 1)*p).
    start = noise / (MEAN_BURST - noise * (MEAN_BURST - 1))
    frame, done = env.reset(seed), False
    player.reset(seed)
    frames, actions, rewards = [], [], []
    burst, held = 0, 0
    while not done:
        if burst == 0 and rng.random() < start:
            burst, held = int(rng.integers(1, LONGEST_BURST + 1)), int(rng.choice(env.actions))
        action = held if burst else player(env)
        burst = max(0, burst - 1)
        frames.append(frame)
        actions.append(action)
        frame, reward, done = env.step(action)
        rewards.append(reward)
    return Played(np.stack(frames), np.array(actions), np.array(rewards), float(sum(rewards)))
