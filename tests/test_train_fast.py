"""Training by the fused ops beside plain PyTorch: the same losses for 300 steps, packed windows included."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from curves import Curve, compare, judge
from small import small_data
from train_cases import BATCH, KINDS, made

from flexlam_fast.backend import NATIVE, REFERENCE, probe
from flexlam_fast.data.store import EpisodeStore
from flexlam_fast.errors import BackendError
from flexlam_fast.layers import set_backend
from flexlam_fast.train.loader import to_device
from flexlam_fast.train.loop import Trainer
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


@pytest.mark.parametrize("kind", KINDS)
def test_losses_are_those_of_plain_pytorch_at_every_step(kind: str, store: EpisodeStore) -> None:
    verdict = compare(lambda: made(kind, store, DEVICE), FAST, STEPS, DEVICE)
    assert verdict.holds(), str(verdict)
    assert verdict.fast.losses[-1] != verdict.fast.losses[0]


@pytest.mark.parametrize("kind", ["lam", "sequence-all"])
def test_losses_in_bf16_are_those_of_plain_pytorch(kind: str, store: EpisodeStore) -> None:
    """Wrong wiring shows here; for small errors rounding is too coarse, and the tests of the ops find those."""
    verdict = compare(lambda: made(kind, store, DEVICE), FAST, 100, DEVICE, "bf16")
    assert verdict.holds(), str(verdict)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="the steps above are Triton's")
@pytest.mark.parametrize("kind", KINDS)
def test_losses_in_the_interpreter_are_those_of_plain_pytorch(kind: str, store: EpisodeStore) -> None:
    """Some steps; ``python tests/curves.py`` takes all."""
    pytest.importorskip("triton")
    verdict = compare(lambda: made(kind, store, DEVICE), "triton", 8, DEVICE)
    assert verdict.holds(), str(verdict)


def line(step: float = 0.0, flip: int = 20, tie: float = 0.0, jump: float = 0.0) -> Curve:
    """A curve of 20 steps that is off by ``step`` more at each one, and by ``jump`` from where a code flips."""
    losses, flips = 1.0 + step * np.arange(20), np.zeros(20, dtype=np.int64)
    losses[flip:] += jump
    flips[flip:] = 1
    moved = 1e-6 * np.arange(1, 21)
    moved[flip + 1 :] = 2.0  # what flips make of latents
    return Curve(losses, 1.0, flips, moved, tie)


def test_a_curve_is_judged_by_what_last_bits_and_flips_move() -> None:
    plain, others = line(), [line(step=1e-5, flip=15, jump=0.01)]
    assert judge(plain, line(step=1.9e-5), others[:1]).share[0] > 1  # for the changed run counts until it flips
    assert judge(plain, line(step=1.9e-5), [line(step=1e-5)]).holds()
    assert judge(plain, line(step=2.1e-5), [line(step=1e-5)]).share[0] > 1
    assert judge(plain, line(flip=9, tie=1e-5, jump=0.019), others).holds()  # flips sooner, at a near tie
    assert judge(plain, line(flip=18, tie=1e-5, jump=0.019), others).holds()  # or later
    assert judge(plain, line(flip=9, tie=1e-4, jump=0.019), others).tie > 1  # what flips was no tie
    assert judge(plain, line(flip=18, tie=1e-4, jump=0.019), others).tie > 1
    assert judge(plain, line(flip=9, tie=1e-5, jump=0.03), others).share[1] > 1
    assert judge(plain, line(flip=18, tie=1e-5)._replace(losses=line(flip=2, jump=0.019).losses), others).share[0] > 1
    assert judge(plain, line(flip=9, tie=1e-5, jump=0.019), [line(step=1e-5)]).share[1] > 1  # no other run flips
    assert not judge(plain, line(step=float("nan")), others).holds()
    assert not judge(plain, line()._replace(end=1.1), others).holds()


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
