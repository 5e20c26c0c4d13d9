"""Rollouts, their statistics, and reconstruction."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
import torch
from tqdm import tqdm

from flexlam_fast.config import BottleneckConfig, DecoderConfig, EncoderConfig, FlexLAMConfig
from flexlam_fast.data.collect import EVALUATION_SEED, SEED_STRIDE
from flexlam_fast.data.vizdoom import MAX_STEPS, Step
from flexlam_fast.errors import BudgetError, DataError, FlexLAMError, InputError, StorageError
from flexlam_fast.evaluate import rollout as rollout_module
from flexlam_fast.evaluate import sessions as sessions_module
from flexlam_fast.evaluate.actor import time_decisions
from flexlam_fast.evaluate.baselines import Baselines
from flexlam_fast.evaluate.decoding import Pairs, decode_at
from flexlam_fast.evaluate.fidelity import CEILING_DB, change, psnr, ssim
from flexlam_fast.evaluate.load import find_device
from flexlam_fast.evaluate.reconstruct import Reconstruction, reconstruct_lam
from flexlam_fast.evaluate.rollout import rollout
from flexlam_fast.evaluate.sessions import Games, Job, Outcome, evaluation_seed, play_jobs
from flexlam_fast.evaluate.strip import GAP, HEAD, LABEL, MARGIN, StripRow, pick, strip_png
from flexlam_fast.evaluate.summary import (
    Score,
    disjoint_above,
    latency,
    normalised,
    percent_of_expert,
    score,
    student,
)
from flexlam_fast.lam import LatentActionModel
from flexlam_fast.types import Actions, Decision

SMALL = FlexLAMConfig(
    bottleneck=BottleneckConfig(slots=4),
    encoder=EncoderConfig(depth=1, width=32, heads=2, patch=16),
    decoder=DecoderConfig(depth=1, heads=2, head_dim=16, ffn=32, patch=16, steps=2),
)


def lively(seed: int = 0) -> LatentActionModel:
    """A small LAM whose decoder does not start as the identity, so that noise and latents show in what it draws."""
    torch.manual_seed(seed)
    lam = LatentActionModel(SMALL).eval()
    for parameter in lam.decoder.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return lam


# ---- statistics ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("freedom", "quantile"),
    [
        *((1, 12.706205), (2, 4.302653), (5, 2.570582), (10, 2.228139), (11, 2.200985)),
        *((15, 2.131450), (20, 2.085963), (30, 2.042272), (49, 2.009575), (99, 1.984217), (10**7, 1.959964)),
    ],
)
def test_student_is_the_printed_table(freedom: int, quantile: float) -> None:
    assert student(freedom) == pytest.approx(quantile, abs=1e-5)


def test_interval_of_a_known_sample() -> None:
    result = score([2, 4, 4, 4, 5, 5, 7, 9])
    # s = sqrt(32 / 7) = 2.13809, t(7) = 2.36462, half width = t * s / sqrt(8)
    assert result.mean == 5
    assert result.ci95 == pytest.approx(1.78749, abs=1e-4)


def test_interval_covers_the_mean_19_times_in_20() -> None:
    samples = np.random.default_rng(1).normal(3.0, 2.0, (4000, 12))
    hits = sum(abs(s.mean - 3.0) <= s.ci95 for s in (score(row.tolist()) for row in samples))
    assert 0.94 < hits / len(samples) < 0.96


def test_statistics_refuse_too_little() -> None:
    with pytest.raises(InputError, match="values: expected at least 2, got 1"):
        score([1.0])
    with pytest.raises(InputError, match="expected at least one decision"):
        latency([])
    with pytest.raises(InputError, match="freedom: expected at least 1, got 0"):
        student(0)


def test_latency_percentiles() -> None:
    result = latency([float(n) for n in range(1, 102)])
    assert (result.mean, result.p50, result.decisions) == (51.0, 51.0, 101)
    assert result.p99 == pytest.approx(100.0)


def test_shares_of_the_expert() -> None:
    assert normalised(1.0, -1.0, 3.0) == 0.5
    assert percent_of_expert(1.0, 4.0) == 25.0
    assert normalised(1.0, 2.0, 2.0) is None
    assert percent_of_expert(1.0, -4.0) is None
    assert disjoint_above(Score(2, 0.4, ()), Score(1, 0.5, ()))
    assert not disjoint_above(Score(2, 0.6, ()), Score(1, 0.5, ()))


def test_default_budgets() -> None:
    assert BottleneckConfig(slots=16).ladder == (1, 2, 4, 8, 16)
    assert BottleneckConfig(slots=20).ladder == (1, 2, 4, 8, 16, 20)
    assert BottleneckConfig(slots=1).ladder == (1,)


# ---- sessions --------------------------------------------------------------------------------------------------------


class ToyEnv:
    """An episode lasts ``seed % 7 + 3`` steps, each of which pays the action and the length of the scenario's name.

    A frame shows its seed and its step.
    """

    started = 0

    def __init__(self, scenario: str) -> None:
        ToyEnv.started += 1
        self.scenario = scenario

    def _look(self) -> np.ndarray[Any, Any]:
        frame = np.zeros((64, 64, 3), np.uint8)
        frame[0, 0] = (self.seed % 256, self.t, len(self.scenario))
        return frame

    def reset(self, seed: int) -> np.ndarray[Any, Any]:
        self.seed, self.t = seed, 0
        return self._look()

    def step(self, action: int) -> Step:
        self.t += 1
        return Step(self._look(), float(action + len(self.scenario)), self.t >= self.seed % 7 + 3)

    def close(self) -> None:
        self.seed = -1


class ToyPolicy:
    """Answers ``(seed + step + k) % 7`` from the frame, and knows when it was not told of a new episode."""

    device = torch.device("cpu")

    def __init__(self, slots: int = 4) -> None:
        self.cfg = FlexLAMConfig(bottleneck=BottleneckConfig(slots=slots))
        self.t: list[int] = []
        self.batches: list[int] = []

    def describe(self) -> str:
        return "toy"

    def reset(self, batch_size: int = 1, seed: int = 0, *, sessions: Sequence[int] | None = None) -> None:
        for i in sessions if sessions is not None else ():
            self.t[i] = -1
        if sessions is None:
            self.t = [-1] * batch_size

    def act(self, frames: np.ndarray[Any, Any], budget: int) -> Decision:
        assert frames.shape == (len(self.t), 64, 64, 3)
        self.batches.append(len(frames))
        self.t = [t + 1 for t in self.t]
        self.seen = frames[:, 0, 0, 1].tolist()
        actions = (frames[:, 0, 0, 0].astype(np.int64) + frames[:, 0, 0, 1] + budget) % 7
        discrete = torch.from_numpy(actions)[:, None]
        codes = torch.zeros(len(frames), budget, dtype=torch.int32)
        return Decision(Actions(discrete, torch.zeros(len(frames), 0)), codes, budget, torch.tensor(self.t))


class StrictPolicy(ToyPolicy):
    """Checks that every running session is at the frame that its game shows."""

    def act(self, frames: np.ndarray[Any, Any], budget: int) -> Decision:
        decision = super().act(frames, budget)
        shown = frames[:, 0, 0, 1].tolist()
        over = [s % 7 + 3 <= t for s, t in zip((frames[:, 0, 0, 0]).tolist(), shown, strict=True)]
        wrong = [i for i, (t, s) in enumerate(zip(self.t, shown, strict=True)) if t != s and not over[i]]
        assert not wrong, f"sessions {wrong} were not reset"
        return decision


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    ToyEnv.started = 0
    monkeypatch.setattr(sessions_module, "DoomEnv", ToyEnv)


JOBS = [Job(name, seed) for name in ("take_cover", "my_way_home") for seed in (0, 5, 1, 9, 30)]


def expected(job: Job, k: int) -> float:
    return float(sum((job.seed + t + k) % 7 + len(job.scenario) for t in range(job.seed % 7 + 3)))


@pytest.mark.parametrize("sessions", [1, 2, 3, 7, 40])
@pytest.mark.usefixtures("toy")
def test_every_job_is_played_once_in_full_whatever_the_batch(sessions: int) -> None:
    policy = StrictPolicy()
    with Games() as games, tqdm(disable=True) as bar:
        outcomes = play_jobs(policy, games, JOBS, 3, sessions, 0, bar)
    assert [o.job for o in outcomes] == JOBS
    assert [o.ret for o in outcomes] == [expected(job, 3) for job in JOBS]
    assert [len(o.ms) for o in outcomes] == [job.seed % 7 + 3 for job in JOBS]
    assert set(policy.batches) == {min(sessions, len(JOBS))}
    assert ToyEnv.started <= 2 * min(sessions, 5)  # games are kept, not started per episode


@pytest.mark.usefixtures("toy")
def test_bar_ends_full() -> None:
    with Games() as games, tqdm(total=len(JOBS) * MAX_STEPS, file=io.StringIO()) as bar:
        play_jobs(ToyPolicy(), games, JOBS, 1, 3, 0, bar)
        assert bar.n == bar.total


def test_evaluation_never_meets_a_collected_seed() -> None:
    collected = range(EVALUATION_SEED)  # seed * SEED_STRIDE + i, with seed below 1000
    assert all(evaluation_seed(s, i) not in collected for s in (0, 999) for i in (0, SEED_STRIDE - 1))
    assert evaluation_seed(999, SEED_STRIDE - 1) < 2**31
    assert len({evaluation_seed(s, i) for s in (0, 1) for i in range(50)}) == 100
    for wrong in (-1, 1000):
        with pytest.raises(InputError, match=f"seed: expected 0..999, got {wrong}"):
            evaluation_seed(wrong, 0)


def test_latency_protocol_counts_and_discards() -> None:
    policy = ToyPolicy()
    times = time_decisions(policy, np.zeros((7, 64, 64, 3), np.uint8), 2)
    assert len(times) == 100
    assert policy.batches == [1] * 120
    assert min(times) > 0


# ---- rollout ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tables() -> dict[int, rollout_module.RolloutTable]:
    """The same three short episodes, one game at a time and three at once."""
    pytest.importorskip("vizdoom")
    names = ("take_cover",)
    return {n: rollout(ToyPolicy(), names, (1, 4), episodes=3, sessions=n, progress=False) for n in (1, 3)}


def test_batched_sessions_play_as_single_ones(tables: dict[int, rollout_module.RolloutTable]) -> None:
    one, three = tables[1].scenarios[0], tables[3].scenarios[0]
    assert [c.score.values for c in one.cells] == [c.score.values for c in three.cells]
    assert (one.random, one.expert) == (three.random, three.expert)
    assert [c.budget for c in one.cells] == [1, 4]


def test_rollout_knows_random_from_expert(tables: dict[int, rollout_module.RolloutTable]) -> None:
    scenario = tables[1].scenarios[0]
    assert scenario.expert.mean > scenario.random.mean
    assert len(scenario.expert.values) == len(scenario.random.values) == 3
    played = sum(len(v) for v in (scenario.random.values, scenario.cells[0].score.values))
    assert played == 6


def test_latency_is_of_the_rollout_for_one_session_and_of_the_protocol_for_more(
    tables: dict[int, rollout_module.RolloutTable],
) -> None:
    assert all(c.latency.decisions == 100 for c in tables[3].scenarios[0].cells)
    steps = [c.latency.decisions for c in tables[1].scenarios[0].cells]
    # take_cover pays one per tic survived, four tics a step, so the steps follow from the returns.
    returns = [sum(c.score.values) for c in tables[1].scenarios[0].cells]
    assert all(abs(n + 20 - r / 4) <= 6 for n, r in zip(steps, returns, strict=True))


def test_first_decisions_are_warm_up_when_enough_remain() -> None:
    job = Job("take_cover", 1)
    slow = [100.0] * 20
    assert rollout_module._in_play([Outcome(job, 0.0, (*slow, *[1.0] * 30))]).mean == 1.0
    assert rollout_module._in_play([Outcome(job, 0.0, (100.0, 1.0))]).decisions == 2


def test_table_as_text_and_json(tables: dict[int, rollout_module.RolloutTable], tmp_path: Path) -> None:
    table = tables[3]
    rollout_module.write_table(table, tmp_path)
    stored = json.loads((tmp_path / "rollout.json").read_text())
    row = stored["scenarios"]["take_cover"]["budgets"]["4"]
    assert row["returns"] == list(table.scenarios[0].cells[1].score.values)
    random, expert = (stored["scenarios"]["take_cover"][end]["mean"] for end in ("random", "expert"))
    assert row["normalised"] == pytest.approx((row["mean"] - random) / (expert - random))
    assert row["percent_of_expert"] == pytest.approx(100 * row["mean"] / expert)
    lines = (tmp_path / "rollout.md").read_text().splitlines()
    assert [line.split("|")[2].strip() for line in lines[2:4]] == ["1", "4"]
    assert all(line.count("|") == 11 for line in lines[:4])
    assert "take_cover" in table.text()


@pytest.mark.usefixtures("toy")
def test_every_scenario_gets_its_own_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    ends = Baselines(Score(0.0, 0.0, ()), Score(1.0, 0.0, ()), np.zeros((3, 64, 64, 3), np.uint8))
    monkeypatch.setattr(rollout_module, "play_baselines", lambda *_: ends)
    names = ("my_way_home", "take_cover")
    monkeypatch.setattr(rollout_module, "evaluation_seed", lambda seed, i: 10 * seed + i)
    table = rollout(ToyPolicy(), names, (1, 3), episodes=4, seed=2, sessions=3, progress=False)
    assert tuple(s.name for s in table.scenarios) == names
    for scenario in table.scenarios:
        for cell in scenario.cells:
            assert cell.score.values == tuple(expected(Job(scenario.name, 20 + i), cell.budget) for i in range(4))


@pytest.mark.parametrize(
    ("change", "kind", "sentence"),
    [
        ({"scenarios": ("doom",)}, InputError, "scenarios: expected some of .*, got "),
        ({"scenarios": ()}, InputError, "scenarios: expected some of"),
        ({"scenarios": "take_cover"}, InputError, "scenarios: expected some of"),
        ({"scenarios": ("take_cover", "take_cover")}, InputError, "each once"),
        ({"budgets": (0,)}, BudgetError, r"budgets: expected an integer in 1..4, got 0"),
        ({"budgets": (1, 5)}, BudgetError, r"budgets: expected an integer in 1..4, got 5"),
        ({"budgets": ()}, InputError, "budgets: expected at least one"),
        ({"budgets": (2, 2)}, InputError, "each once"),
        ({"episodes": 1}, InputError, "episodes: expected 2 to 100000, got 1"),
        ({"sessions": 0}, InputError, "sessions: expected 1 to 100000, got 0"),
        ({"seed": 1000}, InputError, "seed: expected 0..999, got 1000"),
    ],
)
def test_bad_requests_start_nothing(
    monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], kind: type[FlexLAMError], sentence: str
) -> None:
    def never(*_: object) -> NoReturn:
        raise AssertionError("something started")

    monkeypatch.setattr(rollout_module, "play_baselines", never)
    request: dict[str, Any] = {"scenarios": ("take_cover",), "budgets": (1,), "episodes": 2} | change
    with pytest.raises(kind, match=sentence):
        rollout(ToyPolicy(), request.pop("scenarios"), request.pop("budgets"), progress=False, **request)


def test_results_that_cannot_be_written_are_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("here already")
    with pytest.raises(StorageError, match="file: expected a folder to write to, got: "):
        rollout(ToyPolicy(), ("take_cover",), (1,), episodes=2, output=tmp_path / "file", progress=False)


def test_unknown_devices_are_one_sentence() -> None:
    assert find_device("cpu") == torch.device("cpu")
    assert find_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    for name in ("warp", "cuda:4711"):
        with pytest.raises(InputError, match=f"device: expected one that this machine has, got '{name}'"):
            find_device(name)


# ---- fidelity and reconstruction -------------------------------------------------------------------------------------


def frames_of(seed: int, count: int = 6) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (count, 64, 64, 3), dtype=np.uint8))


def test_psnr_is_of_each_image() -> None:
    truth = torch.full((2, 64, 64, 3), 100, dtype=torch.uint8)
    guess = truth.clone()
    guess[0] += 10  # MSE 100
    guess[1] += 1  # MSE 1
    values = psnr(guess, truth)
    assert values.tolist() == pytest.approx([20 * np.log10(255 / 10), 20 * np.log10(255)], abs=1e-4)
    assert psnr(truth, truth).tolist() == [CEILING_DB] * 2
    assert change(guess, truth).tolist() == [10.0, 1.0]


def test_ssim_orders_images() -> None:
    truth = frames_of(0, 2)
    near = (truth.float() * 0.9 + frames_of(1, 2).float() * 0.1).to(torch.uint8)
    values = ssim(torch.stack([truth[0], near[1]]), truth)
    assert values[0].item() == pytest.approx(1.0, abs=1e-5)
    assert 0.3 < values[1].item() < 0.999


def test_the_noise_is_the_same_at_every_budget() -> None:
    lam, pairs = lively(), Pairs(frames_of(0), frames_of(1))
    together = decode_at(lam, pairs, (0, 2, 4), seed=3)
    assert torch.equal(decode_at(lam, pairs, (4,), seed=3)[0], together[2])
    assert not torch.equal(decode_at(lam, pairs, (4,), seed=4)[0], together[2])
    assert not torch.equal(together[0], together[2])
    torch.nn.init.zeros_(lam.decoder.latent.weight)  # nothing but the noise can tell the budgets apart now
    deaf = decode_at(lam, pairs, (0, 2, 4), seed=3)
    assert torch.equal(deaf[0], deaf[1])
    assert torch.equal(deaf[0], deaf[2])


@pytest.fixture
def store(tmp_path: Path) -> Any:
    pytest.importorskip("pyarrow")
    from flexlam_fast.data.store import EpisodeStore, EpisodeWriter

    rng = np.random.default_rng(0)
    with EpisodeWriter(tmp_path / "data", (64, 64, 3), ()) as writer:
        for task, split in (("a", "test"), ("b", "test"), ("a", "train")):
            still = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
            # Steps of growing size, so that half of the transitions change more than the others.
            film = np.stack([np.clip(still.astype(int) + i * i, 0, 255) for i in range(9)]).astype(np.uint8)
            writer.add(film, None, None, task, split)
    return EpisodeStore.open(tmp_path / "data")


@pytest.fixture
def result(store: Any, tmp_path: Path) -> Reconstruction:
    return reconstruct_lam(lively(), store, (0, 1, 4), transitions=100, output=tmp_path / "out", progress=False)


def test_reconstruction_rows(store: Any, result: Reconstruction, tmp_path: Path) -> None:
    assert [row.label for row in result.rows] == ["copy o_t", "k=0", "k=1", "k=4"]
    indices = store.transitions("test")
    assert result.transitions == len(indices) == 16
    pairs = Pairs.of(store.take(indices), store.take(indices + 1))
    copied = result.rows[0]
    assert copied.every.psnr.mean == pytest.approx(psnr(*pairs).mean().item(), abs=1e-4)
    assert copied.every.ssim.mean == pytest.approx(ssim(*pairs).mean().item(), abs=1e-5)
    assert copied.moving.psnr.mean < copied.every.psnr.mean - 1
    assert len(copied.moving.psnr.values) == 8
    decoded = psnr(decode_at(lively(), pairs, (4,), seed=0)[0], pairs.following)
    assert result.rows[3].every.psnr.mean == pytest.approx(decoded.mean().item(), abs=1e-3)
    stored = json.loads((tmp_path / "out" / "reconstruct.json").read_text())
    assert stored["rows"]["k=4"]["moving"]["ssim"]["mean"] == result.rows[3].moving.ssim.mean
    assert "LPIPS is not reported" in (tmp_path / "out" / "reconstruct.md").read_text()
    assert (tmp_path / "out" / "strip.png").read_bytes().startswith(b"\x89PNG")


def test_reconstruction_refuses(store: Any, tmp_path: Path) -> None:
    lam = lively()
    with pytest.raises(BudgetError, match=r"budgets: expected an integer in 0..4, got 5"):
        reconstruct_lam(lam, store, (0, 5), progress=False)
    with pytest.raises(InputError, match="transitions: expected at least 4"):
        reconstruct_lam(lam, store, (0,), transitions=1, progress=False)
    from flexlam_fast.data.store import EpisodeStore, EpisodeWriter

    with EpisodeWriter(tmp_path / "other", (32, 32, 3), ()) as writer:
        writer.add(np.zeros((9, 32, 32, 3), np.uint8), None, None, "a", "test")
    with pytest.raises(DataError, match=r"expected frames \[64, 64, 3\], got \[32, 32, 3\]"):
        reconstruct_lam(lam, EpisodeStore.open(tmp_path / "other"), (0,), progress=False)
    with EpisodeWriter(tmp_path / "train", (64, 64, 3), ()) as writer:
        writer.add(np.zeros((9, 64, 64, 3), np.uint8), None, None, "a", "train")
    with pytest.raises(DataError, match="expected at least 4 transitions in the test split, got 0"):
        reconstruct_lam(lam, EpisodeStore.open(tmp_path / "train"), (0,), progress=False)


# ---- strip -----------------------------------------------------------------------------------------------------------


def test_pick_prefers_movement_to_cuts_and_stillness() -> None:
    moves = np.linspace(0, 1, 100, dtype=np.float32)
    chosen = pick(moves, 3)
    assert chosen == [94, 82, 70]
    assert pick(np.ones(1, dtype=np.float32), 2) == [0]


def test_strip_shows_the_frames_enlarged() -> None:
    image_module = pytest.importorskip("PIL.Image")
    tiles = tuple(frames_of(7, 4).numpy())
    image = image_module.open(io.BytesIO(strip_png([StripRow("take_cover", tiles, ("a", "b", "c", "d"))], (1, 4))))
    pixels = np.asarray(image)
    top = MARGIN + HEAD
    for column, tile in enumerate(tiles):
        left = MARGIN + LABEL + column * (128 + GAP) + (GAP if column > 1 else 0)
        assert np.array_equal(pixels[top : top + 128 : 2, left : left + 128 : 2], tile)
        assert np.array_equal(pixels[top + 1 : top + 129 : 2, left + 1 : left + 129 : 2], tile)
