"""Training by several processes of one machine, started from a server that has everything imported."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import socket
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

from flexlam_fast.train import commands
from flexlam_fast.train.commands import RunOptions
from flexlam_fast.train.loop import Trainer
from flexlam_fast.train.recipes import Recipe

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["flexlam_fast.train.commands", "small", "torch.distributed"])


def options(data: Path, run: Path, steps: int) -> RunOptions:
    """A run of the small model that logs every loss."""
    every = dict(save_every=5, validate_every=20)
    return RunOptions(
        data, run, config=data.parent / "small.json", steps=steps, batch=16, device="cpu", precision="fp32", **every
    )


def train(rank: int, size: int, port: int, given: RunOptions, stage: str, nudge: float) -> None:
    """One process's part; ``nudge`` scales the weights that training begins with."""
    torch.set_num_threads(1)
    if size > 1:
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        os.environ["TORCHELASTIC_RUN_ID"] = "test"  # what torchrun leaves
    recipe, begin = commands._recipe, Trainer.run

    def every_step(found: RunOptions, name: str) -> Recipe:
        return dataclasses.replace(recipe(found, name), log_every=1)

    def begin_nudged(trainer: Trainer) -> object:
        if nudge != 1.0 and trainer.progress.step == 0:
            with torch.no_grad():
                for parameter in trainer.parameters.values():
                    parameter.mul_(nudge)
        return begin(trainer)

    commands._recipe, Trainer.run = every_step, begin_nudged  # type: ignore[assignment,method-assign]
    getattr(commands, stage)(given, **({"labels": 30.0} if stage in ("translator", "joint") else {}))


def start(size: int, given: RunOptions, stage: str, nudge: float = 1.0) -> list[BaseProcess]:
    """Start a training by ``size`` processes."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    args = (size, port, given, stage, nudge)
    processes = [context.Process(target=train, args=(rank, *args)) for rank in range(size)]
    for process in processes:
        process.start()
    return list(processes)


def finish(size: int, given: RunOptions, stage: str, nudge: float = 1.0) -> list[float]:
    """Train by ``size`` processes to the end; the loss of every step."""
    processes = start(size, given, stage, nudge)
    for process in processes:
        process.join(timeout=120)
    assert [process.exitcode for process in processes] == [0] * size
    return losses(given.output / stage)


def losses(folder: Path) -> list[float]:
    """The logged loss of every step."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]
