"""Four ViZDoom scenarios behind one small environment: 64x64 frames, one action vocabulary, frame skip 4.

The vocabulary is ``types.VIZDOOM_ACTIONS`` for every scenario, so that one translator serves them all; a button that a
scenario lacks does nothing there.
"""

from __future__ import annotations

import os
import weakref
from contextlib import ExitStack
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from flexlam_fast.data.extras import need
from flexlam_fast.data.game import (
    WAD,
    check_start,
    game_folder,
    in_folder,
    install_path,
    load_vizdoom,
    write_launcher,
)
from flexlam_fast.errors import FlexLAMError, InputError, SimulatorError
from flexlam_fast.types import VIZDOOM_ACTIONS
from flexlam_fast.values import check_choice, check_number

#: Scenario name -> gymnasium id.
SCENARIOS = {
    "my_way_home": "VizdoomMyWayHome-v1",
    "health_gathering": "VizdoomHealthGathering-v1",
    "defend_the_center": "VizdoomDefendCenter-v1",
    "take_cover": "VizdoomTakeCover-v1",
}

#: Side of the frames in pixels, where nobody asks for another.
FRAME_SIZE = 64
FRAME_SKIP = 4
#: Of the game's own picture, 160 pixels wide.
SCREEN_HEIGHT = 120
#: take_cover has no time limit of its own; it gets that of the other three, 2,100 tics.
MAX_STEPS = 525

Frame = NDArray[np.uint8]


class Step(NamedTuple):
    """What an action led to: the next ``frame`` uint8 ``[size,size,3]``, the ``reward``, whether the episode ended."""

    frame: Frame
    reward: float
    done: bool


class Thing(NamedTuple):
    """An object of the game: class name, position in map units, velocity per tic, heading in degrees (90 = +y), id."""

    name: str
    x: float
    y: float
    vx: float
    vy: float
    angle: float
    id: int


class Wall(NamedTuple):
    """A line of the map in map units; ``blocking`` where nobody can walk through."""

    x1: float
    y1: float
    x2: float
    y2: float
    blocking: bool


class WorldState(NamedTuple):
    """What an expert may look at beyond the pixels: the player, every other object, and the lines of the map."""

    player: Thing
    things: tuple[Thing, ...]
    walls: tuple[Wall, ...]


class DoomEnv:
    """One ViZDoom scenario; a context manager.

    Args:
        scenario: a name of ``SCENARIOS``.
        oracle: whether ``state`` is there for scripted experts; the frames are the same either way.
        size: side of the frames in pixels, 8 to 120, the height of the game's own picture.

    Raises:
        InputError: for an unknown scenario, or another size.
        SimulatorError: if ViZDoom is missing or does not start.
    """

    def __init__(self, scenario: str, oracle: bool = False, size: int = FRAME_SIZE) -> None:
        self.scenario = check_choice("scenario", scenario, SCENARIOS)
        self.oracle, self.size = oracle, check_frame_size(size)
        self._env = _make(scenario, oracle)
        self._folder = ExitStack()
        #: Also for an environment that nobody closes: at the latest when the interpreter ends.
        self._finish = weakref.finalize(self, _finish, self._env, self._folder)
        self._local = self._local_actions()
        self._frame: Frame | None = None
        self._walls: tuple[Wall, ...] = ()
        self._done = True
        #: The action of the latest ``step``; NOOP at an episode's start.
        self.last_action = VIZDOOM_ACTIONS.index("NOOP")
        self._steps = 0

    @property
    def actions(self) -> tuple[int, ...]:
        """Indices into ``VIZDOOM_ACTIONS`` of the actions this scenario has, in the order of its own action space."""
        return tuple(self._joint)

    @property
    def state(self) -> WorldState:
        """The world as the game knows it at the current frame.

        Raises:
            InputError: without ``oracle=True``, or when no episode is running.
        """
        if not self.oracle:
            raise InputError("state: expected an environment with oracle=True, got oracle=False")
        raw = self._env.unwrapped.state
        if self._done or raw is None:
            raise InputError("state: expected a running episode, got none; call reset first")
        if not self._walls:  # the lines of these maps never move, and reading them takes longer than a step
            self._walls = _walls(raw)
        return _world(raw, self._walls)

    def reset(self, seed: int) -> Frame:
        """Start the episode that ``seed`` names and return its first frame, uint8 ``[size,size,3]``.

        The first call starts the game, and so does one after ``close`` or after the game broke off.

        Raises:
            InputError: for a seed that is no integer of 0 or more.
            SimulatorError: the game does not start.
            StorageError: there is no room for the game's temporary files.
        """
        seed = int(check_number("seed", seed, 0, 2**63 - 1, integer=True))
        try:
            observation, _ = self._env.reset(seed=seed) if self._env.unwrapped.game.is_running() else self._start(seed)
        except FlexLAMError:
            raise
        except Exception as error:  # vizdoom raises many types, all of them meaning that the game does not run
            raise SimulatorError(f"vizdoom: {self.scenario} does not start: {_first_line(error)}") from error
        self._frame = _shrink(observation["screen"], self.size)
        self._done = False
        self._steps = 0
        self.last_action = VIZDOOM_ACTIONS.index("NOOP")
        return self._frame

    def step(self, action: int) -> Step:
        """Hold one button for ``FRAME_SKIP`` game tics.

        Args:
            action: index into ``VIZDOOM_ACTIONS``; one that the scenario lacks does nothing.

        Returns:
            The next frame, or the last valid one when the episode is over; the reward as the game gives it.

        Raises:
            InputError: for an action outside the vocabulary, or after the episode's end.
        """
        if self._done or self._frame is None:
            raise InputError("step: expected a running episode, got none; call reset first")
        action = int(check_number("action", action, 0, len(VIZDOOM_ACTIONS) - 1, integer=True))
        try:
            observation, reward, terminated, truncated, _ = self._env.step(self._local.get(action, self._noop))
        except Exception as error:  # see reset
            raise SimulatorError(f"vizdoom: {self.scenario} stopped: {_first_line(error)}") from error
        self._steps += 1
        self.last_action = action
        self._done = bool(terminated or truncated or self._steps >= MAX_STEPS)
        if self._env.unwrapped.state is not None:
            self._frame = _shrink(observation["screen"], self.size)
        return Step(self._frame, float(reward), self._done)

    def _start(self, seed: int) -> Any:
        """Start the game's process, which works in a private folder and ends with this one."""
        self._folder.close()
        check_start()
        folder = self._folder.enter_context(game_folder())
        game = self._env.unwrapped.game
        game.set_vizdoom_path(str(write_launcher(folder, os.getpid())))
        game.set_doom_game_path(install_path(WAD))
        return in_folder(folder, lambda: self._env.reset(seed=seed))

    def close(self) -> None:
        """End the game's process; calling it twice is fine."""
        _finish(self._env, self._folder)
        self._done = True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _local_actions(self) -> dict[int, int]:
        base = self._env.unwrapped
        buttons = [button.name for button in base.game.get_available_buttons()]
        self._joint: list[int] = []
        for pressed in base.button_map:
            held = [name for name, down in zip(buttons, pressed, strict=True) if down]
            self._joint.append(VIZDOOM_ACTIONS.index(held[0] if held else "NOOP"))
        self._noop = self._joint.index(VIZDOOM_ACTIONS.index("NOOP"))
        return {joint: local for local, joint in enumerate(self._joint)}


def _finish(env: Any, folder: ExitStack) -> None:
    try:
        env.close()
    finally:
        folder.close()


def _make(scenario: str, oracle: bool) -> Any:
    gymnasium = load_vizdoom()
    options: dict[str, Any] = {"screen_resolution": "RES_160X120", "screen_format": "RGB24"}
    if oracle:
        options |= {"objects_info_enabled": True, "sectors_info_enabled": True}
    try:
        return gymnasium.make(SCENARIOS[scenario], frame_skip=FRAME_SKIP, disable_env_checker=True, **options)
    except Exception as error:  # see DoomEnv.reset
        raise SimulatorError(f"vizdoom: {scenario} does not start: {_first_line(error)}") from error


def check_frame_size(size: object) -> int:
    """Check that frames can have this side.

    Raises:
        InputError: ``size: expected an integer in 8..120, got 200``.
    """
    return int(check_number("size", size, 8, SCREEN_HEIGHT, integer=True))


def _shrink(screen: NDArray[np.uint8], size: int) -> Frame:
    pillow = need("PIL.Image")
    image = pillow.fromarray(np.ascontiguousarray(screen))
    return np.asarray(image.resize((size, size), pillow.Resampling.BOX), dtype=np.uint8)


def _walls(raw: Any) -> tuple[Wall, ...]:
    return tuple(
        Wall(line.x1, line.y1, line.x2, line.y2, line.is_blocking) for sector in raw.sectors for line in sector.lines
    )


def _world(raw: Any, walls: tuple[Wall, ...]) -> WorldState:
    player: Thing | None = None
    things = []
    for item in raw.objects:
        if item.name == "DoomPlayer":
            player = _thing(item)
        else:
            things.append(_thing(item))
    if player is None:
        raise SimulatorError("vizdoom: the game reports no player among its objects")
    return WorldState(player, tuple(things), walls)


def _thing(item: Any) -> Thing:
    place, speed = (item.position_x, item.position_y), (item.velocity_x, item.velocity_y)
    return Thing(item.name, *place, *speed, item.angle, item.id)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
