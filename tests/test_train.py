"""What each stage trains on, that it learns, and what it says about bad input."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from small import small_config, small_data

from flexlam_fast.checkpoint import load_checkpoint
from flexlam_fast.data.store import EpisodeStore, EpisodeWriter
from flexlam_fast.errors import (
    BackendError,
    CheckpointError,
    ConfigError,
    DataError,
    FlexLAMError,
    InputError,
    StorageError,
)
from flexlam_fast.policy import Policy
from flexlam_fast.train import commands
from flexlam_fast.train.codes import encode_dataset
from flexlam_fast.train.commands import RunOptions
from flexlam_fast.train.export import load_lam
from flexlam_fast.train.health import CodebookHealth
from flexlam_fast.train.lam import LamStage
from flexlam_fast.train.loop import Trainer
from flexlam_fast.train.metrics import MetricsLog
from flexlam_fast.train.peers import Peers
from flexlam_fast.train.random import picks
from flexlam_fast.train.recipes import Recipe
from flexlam_fast.train.sequence import IGNORE, SequenceStage, windows
from flexlam_fast.train.translator import TranslatorStage, action_targets, choose_labels

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> EpisodeStore:
    return EpisodeStore.open(small_data(tmp_path_factory.mktemp("data") / "episodes", 32))


@pytest.fixture(scope="module")
def run(data: EpisodeStore, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole small run, through the commands."""
    folder = tmp_path_factory.mktemp("run")
    options = small_options(data, folder)
    commands.lam(dataclasses.replace(options, steps=400, lr=3e-3))
    commands.translator(dataclasses.replace(options, steps=300, batch=32, lr=3e-3), labels=200.0)
    commands.sequence(dataclasses.replace(options, steps=60, lr=3e-3))
    commands.export(folder, torch.float32)
    return folder


def small_options(store: EpisodeStore, folder: Path) -> RunOptions:
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / "small.json"
    small_config().to_json(config)
    return RunOptions(
        store.path, folder, config=config, batch=16, save_every=20, validate_every=20, device="cpu", precision="fp32"
    )


def metrics(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_the_lam_learns_and_reports_its_codebook(run: Path) -> None:
    lines = metrics(run / "lam")
    losses = [m["val/loss"] for m in lines if "val/loss" in m]
    assert losses[-1] < 0.7 * losses[0]
    health = [m for m in lines if "codes/used" in m][-1]
    assert 0 < health["codes/used"] <= 1
    assert len(health["codes/entropy_bits"]) == 4  # type: ignore[arg-type]
    assert max(health["codes/entropy_bits"]) > 0.5  # type: ignore[arg-type,type-var]


def test_a_validation_of_the_lam_says_whether_the_decoder_listens(run: Path, data: EpisodeStore) -> None:
    first, *_, last = [m for m in metrics(run / "lam") if "val/loss" in m]
    assert last["val/loss_full"] < last["val/loss_k0"] < last["val/loss_swapped"]
    assert last["val/loss_full"] < first["val/loss_full"]
    # of a model that always keeps every slot, all codes are what the validation is over; of one with no odds, none
    for prefix, name in (("full", "val/loss_full"), ((1.0, 0.0, 0.0, 0.0, 0.0), "val/loss_k0")):
        with torch.no_grad():
            found = LamStage(small_config(prefix=prefix), data, 8, 0, torch.device("cpu")).validate()
        assert found["val/loss"] == pytest.approx(found[name], rel=1e-6)


def test_the_translator_reads_the_action_off_the_codes(run: Path, data: EpisodeStore) -> None:
    best = max(m["val/accuracy_k4"] for m in metrics(run / "translator") if "val/loss" in m)
    chance, tried = 1 / 3, len(data.transitions("test"))  # actions are drawn evenly, and do not follow one another
    assert best > chance + 3 * (chance * (1 - chance) / tried) ** 0.5


def test_the_sequence_model_learns(run: Path) -> None:
    losses = [m["val/loss"] for m in metrics(run / "sequence") if "val/loss" in m]
    assert losses[-1] < losses[0]


def test_the_exported_policy_is_the_trained_stages(run: Path, data: EpisodeStore) -> None:
    policy = Policy.from_pretrained(run / "policy")
    for part, place in (("lam", "lam/best"), ("sequence", "sequence/best"), ("translator", "translator/best")):
        trained = load_checkpoint(run / place).tensors
        assert all(torch.equal(policy.state()[f"{part}.{k}"], v) for k, v in trained.items())
    policy.reset(1)
    assert policy.act(data.take(np.array([0])), 2).codes.shape == (1, 2)


def test_codes_are_encoded_once_and_as_the_policy_does(run: Path, data: EpisodeStore) -> None:
    lam = load_lam(run)
    before = sorted((run / "codes").iterdir())
    codes = encode_dataset(lam, data, run / "codes", CPU)
    assert sorted((run / "codes").iterdir()) == before
    assert len(before) == 1
    i = data.transitions("test")[5]
    one = lam.encode(*torch.from_numpy(data.take(np.array([[i], [i + 1]]))))
    assert np.array_equal(codes[i], one[0].numpy())
    inside = np.isin(np.arange(data.num_frames), np.concatenate([data.transitions(s) for s in ("train", "test")]))
    assert (codes[~inside] == -1).all()
    assert (codes[inside] >= 0).all()


def test_windows_start_at_every_phase_and_stay_in_their_episode(data: EpisodeStore) -> None:
    for split in ("train", "test"):
        found = windows(data, split, 3)
        starts = np.concatenate([w.start for w in found])
        assert sorted(starts) == sorted(data.transitions(split))
        for phase, window in enumerate(found):
            for start, last in zip(window.start, window.last, strict=True):
                episode = next(e for e in data.episodes if e.first <= start < e.first + e.frames)
                assert (start - episode.first) % 3 == phase
                assert last == episode.first + episode.frames - 2


def test_targets_are_the_codes_of_the_frames_and_ignored_past_the_end(data: EpisodeStore) -> None:
    cfg = small_config()
    codes = np.arange(data.num_frames * 4, dtype=np.int32).reshape(-1, 4) % 20
    stage = SequenceStage(cfg, data, codes, 8, 0, CPU)
    first = windows(data, "train", 2)[1]
    step = next(s for s in range(100) if stage.read(s).phase == 1)
    rows, layout = stage.predict(stage.read(step)).target.view(8, -1), stage.layouts[1]
    chosen = picks(len(first.start), 0, "sequence", step, range(8))
    for row, c in zip(rows, chosen, strict=True):
        for value, frame, s in zip(row.tolist(), layout.frame.tolist(), layout.slot.tolist(), strict=True):
            where = first.start[c] + frame
            assert value == (codes[where, s] if where <= first.last[c] else IGNORE)
    assert (rows == IGNORE).any()


def test_a_batch_is_a_function_of_seed_step_and_sample(data: EpisodeStore) -> None:
    a, b = LamStage(small_config(), data, 4, 0, CPU), LamStage(small_config(), data, 4, 0, CPU)
    b.loss(b.read(0))  # what was drawn before does not matter
    assert torch.equal(a.loss(a.read(7)), b.loss(b.read(7)))
    assert not torch.equal(a.loss(a.read(7)), a.loss(a.read(8)))
    part = LamStage(small_config(), data, 4, 0, CPU, Peers(1, 2)).read(7)
    assert torch.equal(part.frames, a.read(7).frames[:, 2:])
    assert torch.equal(part.streams, a.read(7).streams[2:])


def test_labels_are_even_over_tasks_or_from_one(data: EpisodeStore) -> None:
    chosen = choose_labels(data, "train", 21.0, 0)
    per_task = [np.isin(chosen, data.transitions("train", [t])).sum() for t in data.tasks]
    assert sorted(per_task) == [10, 11]
    assert np.array_equal(chosen, choose_labels(data, "train", 21.0, 0))
    assert not np.array_equal(chosen, choose_labels(data, "train", 21.0, 1))
    narrow = choose_labels(data, "train", 0.1, 0, "left")
    assert np.isin(narrow, data.transitions("train", ["left"])).all()
    assert len(narrow) == round(0.1 * len(data.transitions("train")))


def test_previous_actions_do_not_cross_episodes(data: EpisodeStore) -> None:
    starts = np.array([e.first for e in data.episodes])
    now, before = action_targets(data, starts)
    assert (before.discrete == -1).all()
    now, before = action_targets(data, starts + 1)
    assert np.array_equal(before.discrete[:, 0].numpy(), data.actions[starts])
    assert np.array_equal(now.discrete[:, 0].numpy(), data.actions[starts + 1])


def test_health_counts_codes() -> None:
    health = CodebookHealth(2, 8)
    health.update(torch.tensor([[0, 1], [1, 1], [2, 1], [3, 1]]))
    report = health.report()
    assert report["codes/used"] == 0.5
    assert report["codes/entropy_bits"] == [2.0, 0.0]


def test_rate_warms_up_and_decays_to_a_tenth() -> None:
    recipe = Recipe(100, 1, 1.0, warmup=10)
    assert recipe.rate(0) == 0.1
    assert recipe.rate(9) == 1.0
    assert recipe.rate(55) == pytest.approx(0.55)
    assert recipe.rate(100) == pytest.approx(0.1)


def test_joint_alignment_moves_the_encoder_and_the_policy_takes_it(run: Path, data: EpisodeStore) -> None:
    options = dataclasses.replace(small_options(data, run), steps=20, validate_every=10)
    before = load_checkpoint(run / "lam" / "last").tensors
    commands.joint(options, labels=40.0)
    after = load_checkpoint(run / "joint" / "best").tensors
    assert not torch.equal(before["encoder.project.weight"], after["lam.encoder.project.weight"])
    with pytest.raises(CheckpointError, match="sequence.*lam"):
        commands.sequence(dataclasses.replace(options, steps=80))  # trained on the codes of the old LAM
    shutil.rmtree(run / "joint")


@pytest.mark.parametrize(
    ("change", "error", "sentence"),
    [
        ({"preset": "huge"}, ConfigError, r"preset: expected one of \['dmlab', 'tiny'\], got 'huge'"),
        ({"device": "cuda:9"}, InputError, "device: expected one that this machine has, got 'cuda:9'"),
        ({"steps": 0}, ConfigError, r"steps: expected an integer in 1\.\.1000000000, got 0"),
        ({"lr": math.nan}, ConfigError, "lr: expected a number above 0, at most 1000, got nan"),
        ({"batch": True}, ConfigError, r"batch: expected an integer in 1\.\.100000, got True"),
        (
            {"seed": 2**63},
            ConfigError,
            r"seed: expected an integer in 0\.\.\d{19}, got 9223372036854775808",
        ),
        ({"precision": "fp16"}, InputError, "precision: expected one of auto, bf16, fp32, got 'fp16'"),
        ({"backend": "cuda"}, BackendError, "backend: expected one of"),
        ({"output": Path("a\0b")}, InputError, "output: expected a path, got PosixPath"),
        ({"prefix": "half"}, ConfigError, "prefix: expected one of"),
        ({"config": None}, DataError, r"expected frames \[64, 64, 3\], got \[16, 16, 3\]"),
        ({"seed": 1}, CheckpointError, "expected a run with seed 1, got 0"),
    ],
)
def test_mistakes_get_one_sentence(
    run: Path, data: EpisodeStore, change: dict[str, object], error: type[FlexLAMError], sentence: str
) -> None:
    with pytest.raises(error, match=sentence) as caught:
        commands.lam(dataclasses.replace(small_options(data, run), **change))
    assert "\n" not in str(caught.value)


def test_label_mistakes_get_one_sentence(data: EpisodeStore, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"labels: expected 1\.\.\d+ labelled transitions, got 100000"):
        choose_labels(data, "train", 1e5, 0)
    with EpisodeWriter(tmp_path / "free", (16, 16, 3)) as writer:
        for split in ("train", "test"):
            writer.add(np.zeros((6, 16, 16, 3), np.uint8), None, None, "video", split)
    free = EpisodeStore.open(tmp_path / "free")
    with pytest.raises(DataError, match="expected labelled train transitions, got none"):
        choose_labels(free, "train", 10.0, 0)
    lam = LamStage(small_config(), free, 4, 0, CPU)
    assert torch.isfinite(lam.loss(lam.read(0)))  # action-free video is all that stage 1 needs
    with pytest.raises(DataError, match="expected actions, got action-free episodes"):
        TranslatorStage(small_config(), free, lam.model, np.zeros((12, 4), np.int32), np.zeros(1, np.int64), 4, 0, CPU)


def test_a_loss_that_is_not_finite_ends_the_run_before_it_is_saved(data: EpisodeStore, tmp_path: Path) -> None:
    stage = LamStage(small_config(), data, 4, 0, CPU)
    trainer = Trainer(stage, Recipe(5, 4, 1e-3, save_every=1), tmp_path, device=CPU, precision="fp32")
    with torch.no_grad():
        stage.model.decoder.head.bias.fill_(float("nan"))
    with pytest.raises(FlexLAMError, match="lam: expected a finite loss, got nan at step 0"):
        trainer.run()
    assert not (tmp_path / "last").exists()


def test_a_resumed_log_drops_the_steps_that_are_done_again_and_lines_cut_short(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, 0)
    for step in (1, 2, 3, 4):
        log.write(step, {"loss": float(step)})
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')
    log = MetricsLog(tmp_path, 2)
    log.write(3, {"loss": 30.0})
    log.close()
    assert [(m["step"], m["loss"]) for m in metrics(tmp_path)] == [(1, 1.0), (2, 2.0), (3, 30.0)]


def test_a_full_disk_is_one_sentence(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, 0)
    log.file.close()
    log.file = open("/dev/full", "w")  # noqa: SIM115
    with pytest.raises(StorageError, match=r"metrics.jsonl: expected to write the metrics, got: No space left"):
        log.write(1, {"loss": 1.0})
    with pytest.raises(StorageError, match=r"metrics.jsonl: expected to write the metrics, got: No space left"):
        log.close()  # what could not be written is still there
