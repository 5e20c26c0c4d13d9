"""Shortest ways and the turn-or-walk rule, on maps small enough to check by hand."""

from __future__ import annotations

import itertools

import pytest

from flexlam_fast.data.navigation import FORWARD, TURN_LEFT, TURN_RIGHT, Chart, heading_error, steer
from flexlam_fast.data.vizdoom import Thing, Wall


def player(x: float, y: float, angle: float) -> Thing:
    return Thing("DoomPlayer", x, y, 0.0, 0.0, angle, 0)


def box(x1: float, y1: float, x2: float, y2: float) -> list[Wall]:
    return [
        Wall(x1, y1, x2, y1, True), Wall(x2, y1, x2, y2, True), Wall(x2, y2, x1, y2, True), Wall(x1, y2, x1, y1, True)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("angle", "target", "error"),
    [(0, (10, 0), 0), (0, (0, 10), 90), (0, (0, -10), -90), (350, (10, 0), 10), (10, (10, 0), -10), (0, (-10, 0), 180)],
)
def test_heading_error(angle: float, target: tuple[float, float], error: float) -> None:
    assert heading_error(player(0, 0, angle), *target) == pytest.approx(error)


def test_steer_settles() -> None:
    """From any heading the turns end; after the first forward step at most one more, small one follows."""
    for start in range(-179, 181):
        error, previous, speed, actions = float(start), FORWARD, 7.0, []
        for _ in range(40):
            action = steer(error, previous)
            if action == TURN_LEFT:
                error -= speed
            elif action == TURN_RIGHT:
                error += speed
            speed = 14.0 if action != FORWARD else 7.0
            previous = action
            actions.append(action)
        first = actions.index(FORWARD)
        assert first <= 15, start
        assert actions[first + 1 :].count(FORWARD) >= len(actions) - first - 2, start
        assert abs(error) <= 6.0, start
        turns = actions[:first]
        assert sum(a != b for a, b in itertools.pairwise(turns)) <= 1, start  # overshot once, never to and fro


def test_a_door_is_the_only_way() -> None:
    """Two rooms side by side, a doorway of 64 units in the wall between them at y 100..164."""
    walls = box(0, 0, 400, 400)
    walls += [Wall(200, 0, 200, 100, True), Wall(200, 164, 200, 400, True), Wall(200, 100, 200, 164, False)]
    chart = Chart(walls, (350.0, 350.0))
    assert chart.target(350, 100) == (350.0, 350.0)  # the same room: straight to the goal
    x, y = chart.target(50, 350)  # the other one: to the middle of the door, or to a point in front of it
    assert y == 132
    assert x in (168, 200, 232)
    x, y = chart.target(168, 132)
    assert (x > 168, y) == (True, 132.0)  # standing on a point of the way, the next one is the target


def test_a_goal_nobody_can_reach() -> None:
    """A closed wall between: the chart still says where to walk, towards the goal."""
    chart = Chart([*box(0, 0, 400, 400), Wall(200, 0, 200, 400, True)], (350.0, 350.0))
    assert chart.target(50, 50) == (350.0, 350.0)
