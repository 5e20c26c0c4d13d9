"""Ways through a ViZDoom map: a visibility graph over its doorways, solved once per map, and the turn-or-walk rule."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from flexlam_fast.data.vizdoom import Thing, Wall
from flexlam_fast.types import VIZDOOM_ACTIONS

TURN_LEFT, TURN_RIGHT, FORWARD = (VIZDOOM_ACTIONS.index(n) for n in ("TURN_LEFT", "TURN_RIGHT", "MOVE_FORWARD"))

#: The player is 16 map units thick to each side; a way keeps a little more from every wall.
CLEARANCE = 20.0
#: A doorway is entered from the near point in front of its middle, so that nobody cuts the corner of its frame; the far
#: point is what is in sight of it round a bend.
APPROACHES = (-128.0, -32.0, 0.0, 32.0, 128.0)

Points = NDArray[np.float64]


def heading_error(player: Thing, x: float, y: float) -> float:
    """Degrees from the player's heading to the point, in (-180, 180]; positive is to the left."""
    bearing = math.degrees(math.atan2(y - player.y, x - player.x))
    return 180.0 - (180.0 - (bearing - player.angle)) % 360.0


def steer(error: float, previous: int) -> int:
    """Turn towards a heading error in degrees, or walk when it is small.

    Turning moves 7 degrees in its first decision and 12 to 14 in each later one, in either direction, so the dead band
    depends on whether ``previous`` was a turn; without that the two turns would alternate for ever.
    """
    turn = TURN_LEFT if error > 0 else TURN_RIGHT
    if previous in (TURN_LEFT, TURN_RIGHT) and abs(error) > 150:
        return previous  # nearly behind: keep the direction that was begun
    return turn if abs(error) > (7.5 if previous in (TURN_LEFT, TURN_RIGHT) else 6.0) else FORWARD


class Chart:
    """Shortest ways to one goal.

    Args:
        walls: the map's lines; those that do not block are doorways.
        goal: map units.
    """

    def __init__(self, walls: Sequence[Wall], goal: tuple[float, float]) -> None:
        solid = np.array([w[:4] for w in walls if w.blocking], dtype=np.float64).reshape(-1, 4)
        self._walls = np.unique(solid, axis=0)
        nodes = [goal]
        for wall in {w for w in walls if not w.blocking}:
            nodes += _doorway(wall)
        self.nodes: Points = np.array(sorted(set(nodes), key=lambda p: (p != goal, p)), dtype=np.float64)
        self._distance = self._solve()
        reached = np.isfinite(self._distance)
        self.nodes, self._distance = self.nodes[reached], self._distance[reached]

    def target(self, x: float, y: float) -> tuple[float, float]:
        """The next point to walk straight to from a position: the best in sight, through ever narrower gaps."""
        here = np.array([x, y])
        away = np.hypot(*(self.nodes - here).T)
        total = np.where(away > 0.01, away + self._distance, np.inf)  # a point underfoot gives no direction
        room = self._room(here, self.nodes)
        for clearance in (CLEARANCE, 14.0, 6.0, 0.5, 0.0):
            cost = np.where(room >= clearance, total, np.inf)
            if np.isfinite(cost).any():
                break
        best = self.nodes[int(np.argmin(cost if np.isfinite(cost).any() else total))]
        return float(best[0]), float(best[1])

    def _room(self, start: Points, ends: Points) -> NDArray[np.float64]:
        """How far the segments ``start -> ends[n]`` keep from every wall, -1 for one that crosses a wall."""
        if not len(self._walls):
            return np.full(len(ends), np.inf)
        a, b = self._walls[:, :2], self._walls[:, 2:]
        s, e = np.broadcast_to(start, ends.shape)[:, None], ends[:, None]
        crossing = (_side(s, e, a) != _side(s, e, b)) & (_side(a, b, s) != _side(a, b, e))
        gap = np.minimum(
            np.minimum(_gap(a, s, e), _gap(b, s, e)),
            np.minimum(_gap(s, a, b), _gap(e, a, b)),
        )
        return np.asarray(np.where(crossing, -1.0, gap).min(axis=1))

    def _solve(self) -> NDArray[np.float64]:
        """Distance of every node to the goal, node 0, by Dijkstra's algorithm."""
        distance = np.full(len(self.nodes), np.inf)
        distance[0] = 0.0
        queue = [(0.0, 0)]
        while queue:
            so_far, at = heapq.heappop(queue)
            if so_far > distance[at]:
                continue
            reach = so_far + np.hypot(*(self.nodes - self.nodes[at]).T)
            better = (self._room(self.nodes[at], self.nodes) >= CLEARANCE) & (reach < distance)
            for node in np.flatnonzero(better):
                distance[node] = reach[node]
                heapq.heappush(queue, (float(reach[node]), int(node)))
        return distance


def _doorway(wall: Wall) -> list[tuple[float, float]]:
    length = math.hypot(wall.x2 - wall.x1, wall.y2 - wall.y1)
    if length == 0:
        return []
    x, y = (wall.x1 + wall.x2) / 2, (wall.y1 + wall.y2) / 2
    nx, ny = (wall.y2 - wall.y1) / length, (wall.x1 - wall.x2) / length
    # Rounded, because a line that two sectors share comes twice and in either direction.
    return [(round(x + k * nx, 3) + 0.0, round(y + k * ny, 3) + 0.0) for k in APPROACHES]


def _side(a: Points, b: Points, p: Points) -> NDArray[np.bool_]:
    return ((b[..., 0] - a[..., 0]) * (p[..., 1] - a[..., 1]) - (b[..., 1] - a[..., 1]) * (p[..., 0] - a[..., 0])) > 0


def _gap(p: Points, a: Points, b: Points) -> NDArray[np.float64]:
    """Distance from points to segments, broadcast over leading dimensions."""
    along = b - a
    square = np.maximum((along * along).sum(-1), 1e-9)
    share = np.clip(((p - a) * along).sum(-1) / square, 0.0, 1.0)
    return np.asarray(np.linalg.norm(p - a - share[..., None] * along, axis=-1))
