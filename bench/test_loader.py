"""Batches of transitions from a store on disk: made ahead by the loader, or in the training thread between its steps.

A call is several steps of a consumer that sleeps as long as a step on a fast GPU might take, so the host is free in the
meantime, as it is when a device works; a step on the CPU itself would leave less of it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from measure import OURS, in_turns
from rows import Results, Work
from torch import Tensor

pytest.importorskip("pyarrow")

from flexlam_fast.data.resident import FrameCache
from flexlam_fast.data.store import EpisodeStore, EpisodeWriter
from flexlam_fast.train.loader import Loader
from flexlam_fast.train.random import picks

BATCH, STEPS, STEP_S = 256, 12, 0.015
SHAPE, EPISODES, LENGTH = (64, 64, 3), 40, 250
TAKE, DRAWN, RESIDENT = (
    "store.take in the training thread",
    "the same, with a torch.Generator a sample for its index and noise",
    "FrameCache",
)


class Batch(NamedTuple):
    """Frames uint8 ``[2, B, H, W, C]`` and where they are from."""

    frames: Tensor
    index: Tensor


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> EpisodeStore:
    """10,000 random frames, 123 MB."""
    path: Path = tmp_path_factory.mktemp("store") / "set"
    rng = np.random.default_rng(0)
    with EpisodeWriter(path, SHAPE, ("stay",)) as writer:
        for index in range(EPISODES):
            frames = rng.integers(0, 256, (LENGTH, *SHAPE), dtype=np.uint8)
            writer.add(frames, np.zeros(LENGTH - 1, dtype=np.int64), np.zeros(LENGTH - 1), "task", "train", seed=index)
    return EpisodeStore.open(path)


def test_loader(benchmark: Any, results: Results, rounds: int, store: EpisodeStore) -> None:
    pool, device = store.transitions("train"), results.device
    cache = FrameCache(store, device)

    def index_of(step: int) -> np.ndarray:
        return pool[picks(len(pool), 0, "lam", step, np.arange(BATCH))]

    def make(step: int) -> Batch:
        index = index_of(step)
        return Batch(torch.from_numpy(store.take(np.stack([index, index + 1]))), torch.from_numpy(index))

    def ahead() -> Iterator[Batch]:
        with Loader(make, range(STEPS), device) as loader:
            yield from loader

    def between() -> Iterator[Batch]:
        for step in range(STEPS):
            yield Batch(*(part.to(device) for part in make(step)))

    def drawn() -> Iterator[Tensor]:
        """What a batch would cost whose random numbers came from torch, a function of (step, sample) all the same."""
        for step in range(STEPS):
            sources = [torch.Generator().manual_seed(step * BATCH + sample) for sample in range(BATCH)]
            index = np.asarray([pool[int(torch.randint(len(pool), (1,), generator=g))] for g in sources])
            for g in sources:
                torch.rand((), generator=g), torch.randn((), generator=g), torch.randn((3, 64, 64), generator=g)
            yield torch.from_numpy(store.take(np.stack([index, index + 1]))).to(device)

    def resident() -> Iterator[Batch]:
        for step in range(STEPS):
            index = index_of(step)
            yield Batch(cache.take(np.stack([index, index + 1])), torch.from_numpy(index))

    assert all(torch.equal(a.frames, b.frames) for a, b in zip(ahead(), between(), strict=True))
    assert all(torch.equal(a.frames, b.frames) for a, b in zip(resident(), between(), strict=True))

    def consumed(batches: Any) -> Any:
        def run() -> None:
            for _ in batches():
                time.sleep(STEP_S)

        return run

    peers = {TAKE: consumed(between), DRAWN: consumed(drawn), RESIDENT: consumed(resident)}
    timing = in_turns(benchmark, consumed(ahead), peers, results.machine.wall, rounds)
    frames = STEPS * 2 * BATCH
    rates = ", ".join(f"{name} {1e3 * frames / timing.median(name):.4g}" for name in (OURS, *peers))
    work = Work(2 * frames * int(np.prod(SHAPE)), 0, torch.float32)
    note = (
        f"frames per second: {rates}; {STEPS} steps of a consumer that sleeps {1e3 * STEP_S:g} ms, "
        f"{1e3 * STEPS * STEP_S:g} in all, and a loader that begins anew; {cache.reason}; "
        "the floor is frames read and written once"
    )
    results.add(benchmark, f"loader/dmlab/b{BATCH}", timing, work, note, memory_bound=False)
