"""How things are timed: side by side, in turns, in one run, on a device whose name says what it is."""

from __future__ import annotations

import platform
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

WARM_UPS, ROUNDS, SECONDS = 20, 100, 25


class Timing(NamedTuple):
    """Milliseconds of every round; ``ours[i]`` ran just after ``peers[name][i]``."""

    ours: list[float]
    peers: dict[str, list[float]]


def in_turns(
    benchmark: Any,
    ours: Callable[[], object],
    peers: dict[str, Callable[[], object]],
    device: torch.device,
    rounds: int,
) -> Timing:
    """Time ``ours`` with pytest-benchmark, and each peer just before every round of it.

    So whatever else the machine does in the meantime falls on all of them alike. There are 20 warm-ups before
    ``rounds`` rounds, as in the paper (B.6); ``rounds=0`` takes as many of both, up to 100, as fit into half a minute.
    """
    taken: dict[str, list[float]] = {name: [] for name in peers}

    def run_peers() -> None:
        for name, peer in peers.items():
            start = time.perf_counter()
            peer()
            synchronize(device)
            taken[name].append(1e3 * (time.perf_counter() - start))

    def run_ours() -> None:
        ours()
        synchronize(device)

    start = time.perf_counter()
    for warm in range(1, WARM_UPS + 1):
        run_peers()
        run_ours()
        spent = time.perf_counter() - start
        if not rounds and warm > 1 and spent > SECONDS / 5:
            break
    fitting = int(SECONDS * warm / spent)
    taken = {name: [] for name in peers}
    benchmark.pedantic(run_ours, setup=run_peers, rounds=rounds or min(max(fitting, 5), ROUNDS), iterations=1)
    mine = [1e3 * s for s in benchmark.stats.stats.data] if benchmark.stats else []
    return Timing(mine, taken)


def synchronize(device: torch.device) -> None:
    """Wait for the device; a CPU never lags behind."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def spread(ms: list[float]) -> str:
    """Mean, p50 and p99 of some milliseconds, for people."""
    p50, p99 = np.percentile(ms, [50, 99])
    return f"mean {np.mean(ms):.4g}, p50 {p50:.4g}, p99 {p99:.4g} ms of {len(ms)}"


def read_bandwidth(device: torch.device) -> float:
    """Bytes per second that a plain sum reads from a tensor of 512 MiB: the best of ten."""
    x = torch.ones(2**27, device=device)
    best = float("inf")
    for _ in range(10):
        synchronize(device)
        start = time.perf_counter()
        x.sum()
        synchronize(device)
        best = min(best, time.perf_counter() - start)
    return x.nbytes / best


def device_name(device: torch.device) -> str:
    """A name such as ``cpu-2x-intel-xeon`` or ``nvidia-h100-80gb-hbm3``: the model, nothing about the host."""
    if device.type == "cuda":
        return slug(torch.cuda.get_device_name(device))
    model = platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        model = next((x.split(":", 1)[1] for x in info.read_text().splitlines() if x.startswith("model name")), model)
    model = re.sub(r"\(R\)|\(TM\)|\bCPU\b|\bProcessor\b|@.*", " ", model)
    return f"cpu-{torch.get_num_threads()}x-{slug(model)}"


def slug(text: str) -> str:
    """Lower case, with a dash for everything that is neither a letter nor a digit."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
