"""Reconstruction at every budget, and the fidelity of images that it reports."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from evaluate_cases import frames_of

from flexlam_fast.config import BottleneckConfig, DecoderConfig, EncoderConfig, FlexLAMConfig
from flexlam_fast.errors import BudgetError, DataError, InputError
from flexlam_fast.evaluate import reconstruct as reconstruct_module
from flexlam_fast.evaluate.decoding import Pairs, decode_at
from flexlam_fast.evaluate.fidelity import CEILING_DB, change, psnr, ssim
from flexlam_fast.evaluate.reconstruct import Reconstruction, reconstruct_lam
from flexlam_fast.lam import LatentActionModel

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
    for budgets in ((), (1, 1), 4, "12", object()):
        with pytest.raises(InputError, match="budgets: expected"):
            reconstruct_lam(lam, store, budgets, output=tmp_path / "out", progress=False)  # type: ignore[arg-type]
    wrong = {
        "transitions": (3, 0, -1, 2.5, float("nan"), float("inf"), True, None, "8", 2**40),
        "seed": (-1, 0.5, True, 2**64),
    }
    for name, values in wrong.items():
        for value in values:
            with pytest.raises(BudgetError, match=rf"^{name}: expected an integer in \d+\.\.\d+, got"):
                reconstruct_lam(lam, store, (0,), output=tmp_path / "out", progress=False, **{name: value})
    for bad in (-1, True, 0.5, float("nan"), 2**70, None):
        with pytest.raises(BudgetError, match=r"budgets: expected an integer in 0..4, got"):
            reconstruct_lam(lam, store, (0, bad), output=tmp_path / "out", progress=False)  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()
    from flexlam_fast.data.store import EpisodeStore, EpisodeWriter

    with EpisodeWriter(tmp_path / "other", (32, 32, 3), ()) as writer:
        writer.add(np.zeros((9, 32, 32, 3), np.uint8), None, None, "a", "test")
    with pytest.raises(
        DataError, match=r"expected frames \[64, 64, 3\], got \[32, 32, 3\]; flexlam-fast pack --size 64"
    ):
        reconstruct_lam(lam, EpisodeStore.open(tmp_path / "other"), (0,), progress=False)
    with EpisodeWriter(tmp_path / "train", (64, 64, 3), ()) as writer:
        writer.add(np.zeros((9, 64, 64, 3), np.uint8), None, None, "a", "train")
    with pytest.raises(DataError, match="expected at least 4 transitions in the test split, got 0; pack keeps"):
        reconstruct_lam(lam, EpisodeStore.open(tmp_path / "train"), (0,), progress=False)


def test_left_out_budgets_are_those_of_the_model(store: Any) -> None:
    result = reconstruct_lam(lively(), store, transitions=np.int64(5), progress=False)  # type: ignore[arg-type]
    assert [row.label for row in result.rows] == ["copy o_t", "k=0", "k=1", "k=2", "k=4"]
    assert result.transitions == 5


@pytest.mark.parametrize("size", [8, 16])
def test_small_frames_have_a_table_and_a_strip(size: int, tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    from flexlam_fast.data.store import EpisodeStore, EpisodeWriter

    encoder, decoder = (dataclasses.replace(part, patch=8) for part in (SMALL.encoder, SMALL.decoder))
    sequence = dataclasses.replace(SMALL.sequence, patch=size // 2)
    cfg = dataclasses.replace(SMALL, frame=size, encoder=encoder, decoder=decoder, sequence=sequence)
    long = "holidays in the mountains/" + "of_many_words_" * 9
    film = np.random.default_rng(0).integers(0, 256, (6, size, size, 3), dtype=np.uint8)
    with EpisodeWriter(tmp_path / "data", (size, size, 3), ()) as writer:
        for task in (long, "\u0431\u0435\u0433", "t", "x" * 400):
            writer.add(film, None, None, task, "test")
    data = EpisodeStore.open(tmp_path / "data")
    result = reconstruct_lam(LatentActionModel(cfg).eval(), data, (0, 4), output=tmp_path / "out", progress=False)
    assert all(np.isfinite(score.mean) for row in result.rows for part in (row.every, row.moving) for score in part)
    assert (tmp_path / "out" / "strip.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_not_installed_is_said_before_the_work(store: Any, monkeypatch: Any, tmp_path: Path) -> None:
    for name in ("PIL", "torchmetrics"):
        with monkeypatch.context() as hidden:
            hidden.setitem(sys.modules, name, None)
            hidden.setattr(reconstruct_module, "decode_at", None)
            with pytest.raises(DataError, match=name):
                reconstruct_lam(lively(), store, (0,), output=tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()
