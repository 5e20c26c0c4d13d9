"""Two trainings from one seed have the same losses, bit for bit, for a thousand steps; another seed has others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from small import small_config, small_data

from flexlam_fast.config import FlexLAMConfig
from flexlam_fast.data.store import EpisodeStore
from flexlam_fast.train.lam import LamStage
from flexlam_fast.train.loop import Trainer
from flexlam_fast.train.recipes import Recipe

STEPS = 1000


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> EpisodeStore:
    return EpisodeStore.open(small_data(tmp_path_factory.mktemp("data") / "episodes"))


def losses(
    store: EpisodeStore, folder: Path, cfg: FlexLAMConfig, seed: int, steps: int, precision: str = "fp32"
) -> list[float]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    recipe = Recipe(steps, 4, 1e-3, log_every=1, validate_every=10 * STEPS, save_every=10 * STEPS)
    Trainer(LamStage(cfg, store, 4, seed, device), recipe, folder, device=device, precision=precision).run()
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def test_steps_in_bf16_repeat_to_the_bit(store: EpisodeStore, tmp_path: Path) -> None:
    first, second = (losses(store, tmp_path / str(i) / "lam", small_config(), 0, 200, "bf16") for i in range(2))
    assert len(first) == 200
    assert first == second


def test_a_thousand_steps_repeat_to_the_bit(store: EpisodeStore, tmp_path: Path) -> None:
    cfg = small_config()
    first, second = (losses(store, tmp_path / str(i) / "lam", cfg, 0, STEPS) for i in range(2))
    other = losses(store, tmp_path / "other" / "lam", cfg, 1, 10)
    assert len(first) == STEPS
    assert first == second
    assert first[:10] != other
