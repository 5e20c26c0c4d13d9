"""The games: the same seed gives the same film, and the experts play far better than chance."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

pytest.importorskip("vizdoom")

from flexlam_fast.data.experts import make_expert, random_policy
from flexlam_fast.data.play import play
from flexlam_fast.data.vizdoom import SCENARIOS, DoomEnv
from flexlam_fast.errors import InputError
from flexlam_fast.types import VIZDOOM_ACTIONS

OWN_ACTIONS = {
    "my_way_home": {"NOOP", "TURN_LEFT", "TURN_RIGHT", "MOVE_FORWARD", "MOVE_LEFT", "MOVE_RIGHT"},
    "health_gathering": {"NOOP", "TURN_LEFT", "TURN_RIGHT", "MOVE_FORWARD"},
    "defend_the_center": {"NOOP", "TURN_LEFT", "TURN_RIGHT", "ATTACK"},
    "take_cover": {"NOOP", "MOVE_LEFT", "MOVE_RIGHT"},
}


def film(env: DoomEnv, seed: int, actions: np.ndarray) -> tuple[np.ndarray, list[float]]:
    frames, rewards = [env.reset(seed)], []
    for action in actions:
        step = env.step(int(action))
        frames.append(step.frame)
        rewards.append(step.reward)
        if step.done:
            break
    return np.stack(frames), rewards


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_same_seed_same_film(scenario: str) -> None:
    """Whatever was played before, and whether or not an expert may look on."""
    with DoomEnv(scenario) as env, DoomEnv(scenario, oracle=True) as watched:
        assert {VIZDOOM_ACTIONS[a] for a in env.actions} == OWN_ACTIONS[scenario]
        actions = np.random.default_rng(0).choice(env.actions, 60)
        frames, rewards = film(env, 5, actions)
        assert frames.shape == (len(rewards) + 1, 64, 64, 3)
        assert frames.dtype == np.uint8
        film(watched, 6, actions)
        again, same = film(watched, 5, actions)
        np.testing.assert_array_equal(again, frames)
        assert same == rewards
        other, _ = film(env, 7, actions)
        assert other.shape != frames.shape or (other != frames).any()


def test_a_button_that_is_lacking_does_nothing() -> None:
    with DoomEnv("take_cover") as env:
        lacking = VIZDOOM_ACTIONS.index("MOVE_FORWARD")
        assert lacking not in env.actions
        frames, _ = film(env, 1, np.full(6, lacking))
        idle, _ = film(env, 1, np.zeros(6))
        moved, _ = film(env, 1, np.full(6, VIZDOOM_ACTIONS.index("MOVE_LEFT")))
    np.testing.assert_array_equal(frames, idle)
    assert (moved != idle).any()


@pytest.mark.parametrize(("scenario", "button"), [("my_way_home", "TURN_LEFT"), ("health_gathering", "TURN_RIGHT")])
def test_turns_go_where_their_names_say(scenario: str, button: str) -> None:
    with DoomEnv(scenario, oracle=True) as env:
        env.reset(2)
        before = env.state.player.angle
        env.step(VIZDOOM_ACTIONS.index(button))
        turned = (env.state.player.angle - before + 180) % 360 - 180
        assert env.last_action == VIZDOOM_ACTIONS.index(button)
    assert turned == pytest.approx(7.0 if button == "TURN_LEFT" else -7.0, abs=0.5)


def test_the_end_of_an_episode() -> None:
    with DoomEnv("take_cover") as env:
        frame, last, done = env.reset(3), None, False
        while not done:
            last = frame
            frame, reward, done = env.step(0)
            assert reward in (0.0, 1.0, 2.0, 3.0, 4.0)
        np.testing.assert_array_equal(frame, last)  # there is no frame beyond the end
        with pytest.raises(InputError, match="expected a running episode"):
            env.step(0)
        assert env.reset(3).shape == (64, 64, 3)


def test_one_sentence_for_misuse() -> None:
    with pytest.raises(InputError, match=r"scenario: expected one of .* got 'deathmatch'"):
        DoomEnv("deathmatch")
    with pytest.raises(InputError, match="scenario: expected one of"):
        make_expert("deathmatch")
    with DoomEnv("take_cover") as env:
        with pytest.raises(InputError, match="call reset first"):
            env.step(0)
        for wrong in (-1, 2**63, 1.5, "7"):
            with pytest.raises(InputError, match=r"seed: expected an integer in 0\.\.9223372036854775807, got "):
                env.reset(wrong)  # type: ignore[arg-type]
        env.reset(0)
        with pytest.raises(InputError, match=r"action: expected an integer in 0\.\.6, got 7"):
            env.step(7)
        for wrong in ("1", 1.0, float("nan"), True, None):
            with pytest.raises(InputError, match=r"action: expected an integer in 0\.\.6, got "):
                env.step(wrong)  # type: ignore[arg-type]
        with pytest.raises(InputError, match="oracle=True"):
            _ = env.state


@pytest.mark.parametrize(
    ("scenario", "expected", "chance"),
    [
        ("my_way_home", 0.9, 0.5),
        ("health_gathering", 1500, 800),
        ("defend_the_center", 10, 4),
        ("take_cover", 1000, 700),
    ],
)
def test_experts_beat_chance(scenario: str, expected: float, chance: float) -> None:
    """Mean of three episodes; the bars leave a wide gap between the two."""
    with DoomEnv(scenario, oracle=True) as env:
        expert = np.mean([play(env, make_expert(scenario), seed).ret for seed in range(3)])
        random = np.mean([play(env, random_policy(0), seed).ret for seed in range(3)])
    assert expert > expected
    assert random < chance


def test_experts_do_not_dither() -> None:
    """Turning left right after turning right is what a film of an expert must rarely show."""
    left, right = VIZDOOM_ACTIONS.index("TURN_LEFT"), VIZDOOM_ACTIONS.index("TURN_RIGHT")
    for scenario in ("my_way_home", "health_gathering", "defend_the_center"):
        with DoomEnv(scenario, oracle=True) as env:
            actions = np.concatenate([play(env, make_expert(scenario), seed).actions for seed in range(2)])
        flips = sum({a, b} == {left, right} for a, b in itertools.pairwise(actions))
        assert flips < 0.05 * len(actions), scenario


def test_frames_are_of_the_size_that_is_asked_for_and_show_the_same() -> None:
    with DoomEnv("take_cover") as env, DoomEnv("take_cover", size=32) as small:
        whole, half = (e.reset(3) for e in (env, small))
        assert (whole.shape, half.shape) == ((64, 64, 3), (32, 32, 3))
        mean = whole.reshape(32, 2, 32, 2, 3).astype(float).mean((1, 3))
        assert float(np.abs(mean - half).mean()) < 3, "a box filter twice is nearly the box filter of twice the size"
    for size in (7, 121, 32.0, "64"):
        with pytest.raises(InputError, match=r"^size: expected an integer in 8\.\.120, got "):
            DoomEnv("take_cover", size=size)  # type: ignore[arg-type]
