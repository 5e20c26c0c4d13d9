"""Several processes train as one: the same losses, another number of them after a break, a clear end if one dies."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from peers_cases import finish, losses, options, start
from small import small_config, small_data

from flexlam_fast.checkpoint import load_checkpoint
from flexlam_fast.errors import InputError
from flexlam_fast.train.peers import Peers, is_loss_of_peer

STEPS = 60
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}
STAGES = ("lam", "sequence", "translator", "joint")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    small_config().to_json(folder / "small.json")
    return small_data(folder / "episodes")


@pytest.fixture(scope="module")
def alone(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of every stage by one process."""
    run = tmp_path_factory.mktemp("alone")
    for stage in STAGES:
        finish(1, options(data, run, STEPS), stage)
        if stage == "joint":
            (run / "joint").rename(run / "joint-after")  # the other stages take the LAM of stage 1
    (run / "joint-after").rename(run / "done-joint")
    return run


def folder_of(alone: Path, stage: str) -> Path:
    return alone / ("done-joint" if stage == "joint" else stage)


def beside(alone: Path, run: Path, stage: str) -> Path:
    """A run directory with the same LAM and codes."""
    run.mkdir()
    if stage != "lam":
        for name in ("lam", "codes"):
            (run / name).symlink_to(alone / name)
    if stage == "joint":
        (run / "translator").symlink_to(alone / "translator")
    return run


def apart(a: list[float], b: list[float]) -> float:
    """The largest difference of two curves of losses."""
    assert len(a) == len(b) == STEPS
    return max(abs(x - y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("stage", STAGES)
def test_two_and_four_processes_have_the_losses_of_one(data: Path, alone: Path, tmp_path: Path, stage: str) -> None:
    """They add gradients in another order; that may move a curve as far as a last bit in the first weights does."""
    ours = losses(folder_of(alone, stage))
    nudged = [
        finish(1, options(data, beside(alone, tmp_path / f"nudged{i}", stage), STEPS), stage, nudge)
        for i, nudge in enumerate((1 + 2.0**-22, 1 - 2.0**-22))
    ]
    budget = max(apart(ours, other) for other in nudged)
    assert 0 < budget < 1e-3
    for size, shard in ((2, False), (4, False), (2, True)):
        run = beside(alone, tmp_path / f"of{size}{shard}", stage)
        shared = finish(size, dataclasses.replace(options(data, run, STEPS), shard=shard), stage)
        assert apart(ours, shared) <= 2 * budget, (size, shard)


@pytest.mark.parametrize("shard", [False, True])
def test_a_run_goes_on_with_another_number_of_processes(data: Path, alone: Path, tmp_path: Path, shard: bool) -> None:
    whole = tmp_path / "whole"
    processes = start(2, dataclasses.replace(options(data, whole, STEPS), shard=shard), "lam")
    while not (whole / "lam" / "last").exists():
        time.sleep(0.01)
    for process in processes:
        os.kill(process.pid or 0, signal.SIGTERM)
    for process in processes:
        process.join(timeout=60)
    assert all(process.exitcode != 0 for process in processes)
    done = len(losses(whole / "lam"))
    assert 5 <= done < STEPS
    resumed = finish(1, options(data, whole, STEPS), "lam")
    assert apart(losses(alone / "lam"), resumed) < 1e-4


def torchrun(data: Path, run: Path) -> list[str]:
    start = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "-m",
        "flexlam_fast",
        "train",
        "lam",
    ]
    files = ["--data", str(data), "--config", str(data.parent / "small.json"), "--output", str(run)]
    numbers = ["--steps", "150", "--batch", "16", "--save-every", "10"]
    return [*start, *files, *numbers, "--device", "cpu", "--precision", "fp32"]


def workers_of(agent: int) -> list[int]:
    """Processes of ``agent``, by rank."""
    children = Path(f"/proc/{agent}/task/{agent}/children").read_text().split()
    return sorted(int(child) for child in children)


@pytest.fixture(scope="module")
def unbroken(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two processes that nobody disturbed."""
    run = tmp_path_factory.mktemp("unbroken")
    subprocess.run(torchrun(data, run), check=True, capture_output=True, env=ONE_THREAD)
    return run


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds workers through /proc")
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_process_ends_the_run_and_the_same_command_resumes_exactly(
    data: Path, unbroken: Path, tmp_path: Path, rank: int
) -> None:
    command = torchrun(data, tmp_path / "broken")
    agent = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=ONE_THREAD)
    while not (tmp_path / "broken" / "lam" / "last").exists():
        assert agent.poll() is None
        time.sleep(0.01)
    os.kill(workers_of(agent.pid)[rank], signal.SIGKILL)
    began = time.monotonic()
    output, _ = agent.communicate(timeout=60)
    assert time.monotonic() - began < 60
    assert agent.returncode != 0
    assert "lost another process in step" in output
    assert f"the same command resumes from {tmp_path / 'broken' / 'lam'}" in output
    subprocess.run(command, check=True, capture_output=True, env=ONE_THREAD)
    a, b = (load_checkpoint(run / "lam" / "last").tensors for run in (unbroken, tmp_path / "broken"))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_shares_are_equal_and_cover_the_batch() -> None:
    assert [list(Peers(rank, 3).share(6)) for rank in range(3)] == [[0, 1], [2, 3], [4, 5]]
    assert Peers().share(5) == range(5)
    with pytest.raises(InputError, match="batch: expected a multiple of the 4 processes, got 6"):
        Peers(0, 4).share(6)


def test_what_counts_as_a_lost_process() -> None:
    assert is_loss_of_peer(
        RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer")
    )
    assert not is_loss_of_peer(RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)"))
    assert not is_loss_of_peer(ValueError("gloo"))
