"""A killed run ends with the weights of the unbroken one, bit for bit; SIGTERM saves first."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import multiprocessing
import os
import random
import shutil
import signal
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
from small import small_config, small_data

from flexlam_fast.checkpoint import load_checkpoint
from flexlam_fast.errors import CheckpointError
from flexlam_fast.train import commands
from flexlam_fast.train.commands import RunOptions
from flexlam_fast.train.lam import LamBatch, LamStage
from flexlam_fast.train.loop import Interrupted

KILLS = 10
STEPS = {"lam": 60, "sequence": 40, "translator": 120}

# children are forked from a server that has imported everything and computed nothing: a start takes milliseconds
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["flexlam_fast.train.commands", "small"])


def options(data: Path, run: Path, stage: str) -> RunOptions:
    return RunOptions(
        data,
        run,
        config=data.parent / "small.json",
        steps=STEPS[stage],
        batch=8,
        save_every=2,
        validate_every=7,
        device="cpu",
        precision="fp32",
    )


def train(data: Path, run: Path, stage: str, ready: Connection) -> None:
    torch.set_num_threads(1)
    ready.send(True)
    extra = {"labels": 30.0} if stage == "translator" else {}
    getattr(commands, stage)(options(data, run, stage), **extra)


def start(data: Path, run: Path, stage: str) -> multiprocessing.process.BaseProcess:
    """Start a training and return when it has its libraries: what follows is loading, training and saving."""
    listen, ready = context.Pipe(duplex=False)
    process = context.Process(target=train, args=(data, run, stage, ready))
    process.start()
    ready.close()
    assert listen.recv()
    return process


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    small_config().to_json(folder / "small.json")
    return small_data(folder / "episodes")


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("unbroken")


@pytest.fixture(scope="module")
def unbroken_times(data: Path, unbroken: Path) -> dict[str, tuple[float, float]]:
    """Train every stage without a break; per stage the seconds of a run with nothing to do, and those of the work."""
    times = {}
    for stage in STEPS:
        seconds = []
        for _ in range(2):  # the second finds everything done
            process = start(data, unbroken, stage)
            began = time.monotonic()
            process.join()
            assert process.exitcode == 0
            seconds.append(time.monotonic() - began)
        times[stage] = (seconds[1], seconds[0] - seconds[1])
    return times


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Compute with one thread, as the children do: the order of sums, and so the bits, depend on it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def steps_done(checkpoint: Path) -> int:
    """Steps in a checkpoint; -1 where there is none."""
    try:
        return int(json.loads(load_checkpoint(checkpoint).extra_text["trainer.json"])["step"])
    except CheckpointError:
        return -1


def wait_for_saves(process: multiprocessing.process.BaseProcess, checkpoint: Path, saves: int) -> None:
    """Return when ``checkpoint`` has been replaced so many times, or the process has ended."""
    before, seen = None, -1
    while seen < saves and process.exitcode is None:
        with contextlib.suppress(FileNotFoundError):  # between two renames
            now = checkpoint.stat().st_ino
            seen, before = (seen if now == before else seen + 1), now
        time.sleep(0.0005)


@pytest.mark.parametrize("stage", STEPS)
def test_sigkill_at_random_moments_changes_no_bit(
    data: Path, unbroken: Path, tmp_path: Path, stage: str, unbroken_times: dict[str, tuple[float, float]]
) -> None:
    if stage != "lam":
        (tmp_path / "lam").symlink_to(unbroken / "lam")
        (tmp_path / "codes").symlink_to(unbroken / "codes")
    idle, work = unbroken_times[stage]
    chance = random.Random(stage)
    kills, resumed, last = 0, set[int](), tmp_path / stage / "last"
    while kills < KILLS:
        process = start(data, tmp_path, stage)
        # a moment while it loads or begins, or one in or after the save that follows 1 to 4 others
        saves = kills % 5
        if saves:
            wait_for_saves(process, last, saves)
            process.join(timeout=chance.uniform(0, 4 * work / STEPS[stage]))
        else:
            process.join(timeout=chance.uniform(0, idle))
        if process.exitcode is not None:  # it got to its end: begin anew
            assert process.exitcode == 0
            shutil.rmtree(tmp_path / stage)
            continue
        process.kill()
        process.join()
        kills += 1
        resumed.add(steps_done(last))
    assert len(resumed) >= KILLS // 3, "the kills did not fall into different parts of the run"
    process = start(data, tmp_path, stage)
    process.join()
    assert process.exitcode == 0
    for name in ("last", "best"):
        a, b = (load_checkpoint(run / stage / name).tensors for run in (unbroken, tmp_path))
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a)


def test_sigterm_saves_and_the_same_command_resumes(
    data: Path, unbroken: Path, unbroken_times: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rare = dataclasses.replace(options(data, tmp_path, "lam"), save_every=10_000)
    before, loss = signal.getsignal(signal.SIGTERM), LamStage.loss

    steps = iter(range(100))

    def loss_then_sigterm(stage: LamStage, batch: LamBatch) -> torch.Tensor:
        if next(steps) == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return loss(stage, batch)

    monkeypatch.setattr(LamStage, "loss", loss_then_sigterm)
    with pytest.raises(Interrupted, match="lam: told to end at step 5; the same command resumes"), one_thread():
        commands.lam(rare)
    assert signal.getsignal(signal.SIGTERM) is before
    assert steps_done(tmp_path / "lam" / "last") == 5
    monkeypatch.undo()
    with one_thread():
        commands.lam(rare)
    a, b = (load_checkpoint(run / "lam" / "last").tensors for run in (unbroken, tmp_path))
    assert all(torch.equal(a[key], b[key]) for key in a)
