"""Training by the fused ops beside plain PyTorch: the same losses for 300 steps, packed windows included."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from small import small_data
from train_cases import BATCH, KINDS, made

from flexlam_fast.backend import NATIVE, REFERENCE, probe
from flexlam_fast.data.store import EpisodeStore
from flexlam_fast.errors import BackendError
from flexlam_fast.layers import set_backend
from flexlam_fast.train.loader import to_device
from flexlam_fast.train.loop import Stage, Trainer
from flexlam_fast.train.recipes import Recipe
from flexlam_fast.train.sequence import PackedBatch, SequenceBatch

STEPS = 300
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FAST = "triton" if DEVICE.type == "cuda" else NATIVE
HERE = {status.name for status in probe(DEVICE) if status.available}
pytestmark = pytest.mark.skipif(FAST not in HERE, reason=f"backend {FAST} is not here")


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> EpisodeStore:
    return EpisodeStore.open(small_data(tmp_path_factory.mktemp("data") / "episodes"))


def curve(stage: Stage, backend: str, folder: Path, nudge: float = 1.0) -> tuple[list[float], float]:
    """The loss of every step, and the last validation loss."""
    recipe = Recipe(STEPS, BATCH, 1e-3, log_every=1, validate_every=STEPS, save_every=10 * STEPS)
    trainer = Trainer(stage, recipe, folder, device=DEVICE, precision="fp32", backend=backend)
    with torch.no_grad():
        for parameter in trainer.parameters.values():
            parameter.mul_(nudge)
    trainer.run()
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [m["loss"] for m in lines if "loss" in m], lines[-1]["val/loss"]


@pytest.mark.parametrize("kind", KINDS)
def test_losses_are_those_of_plain_pytorch_at_every_step(kind: str, store: EpisodeStore, tmp_path: Path) -> None:
    """Rounding grows in training: at each step it may move a loss twice as far as a last bit in the weights has."""
    plain, plain_end = curve(made(kind, store, DEVICE), REFERENCE, tmp_path / "plain")
    fast, fast_end = curve(made(kind, store, DEVICE), FAST, tmp_path / "fast")
    nudges = (1 + 2.0**-22, 1 - 2.0**-22, 1 + 2.0**-21)
    others = [curve(made(kind, store, DEVICE), REFERENCE, tmp_path / str(n), n) for n in nudges]
    moved, most = np.abs(np.array([losses for losses, _ in others]) - plain), 2.0**-21 * max(plain)
    budget = 2 * np.maximum.accumulate(np.maximum(moved.max(0), most))
    assert len(fast) == STEPS
    assert plain[-1] != plain[0]
    assert (np.abs(np.array(fast) - plain) <= budget).all()
    assert abs(fast_end - plain_end) <= max(budget[-1], 2 * max(abs(end - plain_end) for _, end in others))


def test_causal_windows_are_packed_and_lose_as_much(store: EpisodeStore) -> None:
    stage = made("sequence-last", store, DEVICE)
    padded = stage.read(3)
    plain = stage.loss(to_device(padded, DEVICE)).item()
    set_backend(stage.model, FAST, DEVICE)
    packed = stage.read(3)
    assert isinstance(padded, SequenceBatch)
    assert isinstance(packed, PackedBatch)
    assert not bool(padded.inside.all())  # windows are cut, and so there is less to compute
    assert not packed.repeats
    assert len(packed.tokens) < padded.codes.shape[0] * len(stage.layouts[padded.phase].positions)  # type: ignore[attr-defined]
    assert stage.loss(to_device(packed, DEVICE)).item() == pytest.approx(plain, rel=1e-5)
    assert stage.report()["first_code_accuracy"] <= 1


def test_counts_are_the_same_packed_or_padded(store: EpisodeStore) -> None:
    reports = []
    for backend in (REFERENCE, FAST):
        stage = made("sequence-last", store, DEVICE)
        set_backend(stage.model, backend, DEVICE)
        found = stage.predict(to_device(stage.read(3), DEVICE))  # type: ignore[attr-defined]
        reports.append((int(found.targets()), int(found.firsts().targets()), int(found.firsts().right()[0])))
    assert reports[0] == reports[1]
    assert reports[0][1] >= BATCH  # a window predicts one first code at least


def test_a_backend_that_there_is_not_is_one_sentence(store: EpisodeStore, tmp_path: Path) -> None:
    with pytest.raises(BackendError, match=r"^backend: expected one of auto, .*, got 'fast'$"):
        Trainer(made("lam", store, DEVICE), Recipe(1, BATCH, 1e-3), tmp_path, device=DEVICE, backend="fast")
