"""Scripted experts, one per scenario, that read the game's objects and the lines of its map.

They see more than the pixels, but what they react to is what a frame shows: objects inside the field of view, doorways
that are in sight. Where nothing is in view they turn one way, always the same, so that a film of them can be imitated.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

import numpy as np

from flexlam_fast.data.navigation import TURN_LEFT, TURN_RIGHT, Chart, heading_error, steer
from flexlam_fast.data.vizdoom import DoomEnv, Thing, Wall, WorldState
from flexlam_fast.types import VIZDOOM_ACTIONS
from flexlam_fast.values import check_choice, check_number

NOOP, ATTACK, MOVE_LEFT, MOVE_RIGHT = (VIZDOOM_ACTIONS.index(n) for n in ("NOOP", "ATTACK", "MOVE_LEFT", "MOVE_RIGHT"))

#: Half the field of view is 45 degrees; an object is in view when its middle is.
HALF_VIEW = 44.0


class Player(Protocol):
    """Anything that picks an action: call ``reset`` at an episode's start and the object itself before every step."""

    def reset(self, seed: int) -> None:
        """Forget the episode before."""

    def __call__(self, env: DoomEnv) -> int:
        """Return the index into ``VIZDOOM_ACTIONS`` to take now."""


class _Expert:
    """An expert decides from the state and the action taken before it, nothing else."""

    def reset(self, seed: int) -> None:
        """Do nothing: experts remember nothing of an episode and draw no random numbers."""

    def __call__(self, env: DoomEnv) -> int:
        """Look at ``env.state`` and pick an action."""
        return self.choose(env.state, env.last_action)

    def choose(self, state: WorldState, previous: int) -> int:
        raise NotImplementedError


class HomeExpert(_Expert):
    """my_way_home: the shortest way to the armour, through the middle of every doorway."""

    def __init__(self) -> None:
        self._walls: tuple[Wall, ...] = ()
        self._chart: Chart | None = None

    def choose(self, state: WorldState, previous: int) -> int:
        """Turn to the next point of the way, or walk."""
        if self._chart is None or state.walls is not self._walls:
            goal = next(t for t in state.things if t.name == "GreenArmor")
            self._walls, self._chart = state.walls, Chart(state.walls, (goal.x, goal.y))
        target = self._chart.target(state.player.x, state.player.y)
        return steer(heading_error(state.player, *target), previous)


class HealthExpert(_Expert):
    """health_gathering: the medkit in view that takes the least time to reach; none in view: turn right."""

    def choose(self, state: WorldState, previous: int) -> int:
        """Turn to a medkit, walk to it, or look around."""
        best, cost = None, math.inf
        for thing in state.things:
            error = heading_error(state.player, thing.x, thing.y)
            if thing.name != "Medikit" or abs(error) > HALF_VIEW:
                continue
            # Decisions needed: 33 map units walked, 12 degrees turned in each. The one ahead stays the cheapest.
            needed = math.hypot(thing.x - state.player.x, thing.y - state.player.y) / 33 + abs(error) / 12
            if previous in (TURN_LEFT, TURN_RIGHT) and (error > 0) != (previous == TURN_LEFT):
                needed += 2.0  # a turn that was begun is finished unless the other side is clearly better
            if needed < cost:
                best, cost = error, needed
        return TURN_RIGHT if best is None else steer(best, previous)


class CenterExpert(_Expert):
    """defend_the_center: turn to the nearest monster in view and fire; none in view: turn right."""

    def choose(self, state: WorldState, previous: int) -> int:
        """Aim, fire, or look around."""
        monsters = [t for t in state.things if t.name in ("Demon", "MarineChainsawVzd")]
        seen = [(math.hypot(t.x - state.player.x, t.y - state.player.y), t) for t in monsters]
        seen = [(d, t) for d, t in seen if abs(heading_error(state.player, t.x, t.y)) < HALF_VIEW]
        if not seen:
            return TURN_RIGHT
        distance, nearest = min(seen, key=lambda pair: pair[0])
        error = heading_error(state.player, nearest.x, nearest.y)
        if abs(error) <= max(3.5, math.degrees(math.atan2(20, distance))):
            return ATTACK
        turn = TURN_LEFT if error > 0 else TURN_RIGHT
        # Going on to turn moves 14 degrees, a fresh turn 7: let go of the button before the last bit.
        return NOOP if previous in (TURN_LEFT, TURN_RIGHT) and abs(error) < 8 else turn


class CoverExpert(_Expert):
    """take_cover: step out of the way of the fireballs, and back to the middle of the room when none comes."""

    MIDDLE, EDGE = 384.0, 300.0
    WIDTH = 56.0

    def choose(self, state: WorldState, previous: int) -> int:
        """Strafe to where the fewest fireballs will pass."""
        me = state.player
        balls = [t for t in state.things if t.name == "DoomImpBall" and t.vx < 0 and t.x > me.x - 16]
        risks = {a: self._risk(me, balls, push) for a, push in ((NOOP, 0.0), (MOVE_LEFT, 1.0), (MOVE_RIGHT, -1.0))}
        least = min(risks.values())
        for action in (previous, NOOP, MOVE_LEFT, MOVE_RIGHT):
            if risks[action] <= least + 1e-6:
                return action
        return NOOP

    def _risk(self, me: Thing, balls: list[Thing], push: float) -> float:
        """Danger of holding one direction: how near each ball passes, sooner ones weighing more."""
        total = 0.0
        for ball in balls:
            tics = (ball.x - me.x) / -ball.vx
            y = min(max(me.y + (me.vy * 4 + push * 6.5 * max(tics - 3, 1)), 16.0), 752.0)
            miss = abs(ball.y + ball.vy * tics - y)
            total += max(0.0, 1.0 - miss / self.WIDTH) / (1.0 + tics / 20)
        drift = me.y + push * 60 - self.MIDDLE
        return round(total, 2) + 0.02 * max(0.0, abs(drift) - self.EDGE / 2) / self.EDGE


_EXPERTS: dict[str, Callable[[], _Expert]] = {
    "my_way_home": HomeExpert,
    "health_gathering": HealthExpert,
    "defend_the_center": CenterExpert,
    "take_cover": CoverExpert,
}


def make_expert(scenario: str) -> Player:
    """Return the scripted expert of a scenario; it needs an environment with ``oracle=True``.

    Raises:
        InputError: for an unknown scenario.
    """
    return _EXPERTS[check_choice("scenario", scenario, _EXPERTS)]()


class RandomPlayer:
    """Draws uniformly from the scenario's own action space (doing nothing is one of its actions)."""

    def __init__(self, seed: int) -> None:
        self._seed = int(check_number("seed", seed, 0, 2**63 - 1, integer=True))
        self._rng = np.random.default_rng((self._seed, 0))

    def reset(self, seed: int) -> None:
        """Start the stream of numbers that belongs to this player and this episode."""
        self._rng = np.random.default_rng((self._seed, seed))

    def __call__(self, env: DoomEnv) -> int:
        """Draw an action."""
        return int(self._rng.choice(env.actions))


def random_policy(seed: int) -> Player:
    """Return the random player that every table has beside the expert."""
    return RandomPlayer(seed)
