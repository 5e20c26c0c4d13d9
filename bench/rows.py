"""The rows of a run: medians side by side, the floor, and a note that says how they were taken."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import math
import os
import platform
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import torch
from machine import Machine, device_name
from measure import OURS, Timing, spread

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "numpy", "triton", "transformers", "vector-quantize-pytorch")
#: What the head of a file says of its last run, and a row of an earlier run of its own.
RUN = ("commit", "date", "versions")


class Work(NamedTuple):
    """What an op cannot help but do: bytes read and written once, and operations in ``dtype``.

    Where the same memory is gone through again and again, ``span`` is its size in bytes; 0 is memory that is not.
    """

    moved: int
    operations: int
    dtype: torch.dtype
    span: int = 0


class Row(NamedTuple):
    """One line of the results: medians in milliseconds, ours and each peer's, and the floor the machine sets."""

    id: str
    ours_ms: float
    peers: dict[str, float]
    floor_ms: float
    note: str


def floor_ms(work: Work, bandwidth: float, rate: float) -> float:
    """Milliseconds that the work takes at least, at ``bandwidth`` bytes and ``rate`` operations per second."""
    return 1e3 * max(work.moved / bandwidth, work.operations / rate)


class Results:
    """What a run measured, and on which machine; with ``early`` that folder's file is brought up to date after each."""

    def __init__(self, machine: Machine, early: Path | None = None) -> None:
        self.machine, self.early = machine, early
        self.began = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        self.rows: list[Row] = []

    @property
    def device(self) -> torch.device:
        """Where the benches run."""
        return self.machine.device

    def add(
        self, benchmark: Any, row_id: str, timing: Timing, work: Work, note: str, *, memory_bound: bool = True
    ) -> None:
        """Keep a row; with ``memory_bound`` its note also says which part of the bandwidth of a copy it reached."""
        read = self.machine.read(work.span) if work.span else self.machine.read()
        rate = self.machine.arithmetic(work.dtype)
        peers = {name: timing.median(name) for name in timing.turns if name != OURS}
        ours = timing.median(OURS)
        told = [*tell_times(timing), tell_floor(work, read, rate)]
        if memory_bound:
            told.append(tell_share(work.moved / (1e-3 * ours), self.machine.copy()))
        row = Row(row_id, ours, peers, floor_ms(work, read, rate), "; ".join([*told, note]))
        self.rows.append(row)
        benchmark.extra_info.update(row._asdict())
        if self.early is not None:
            self.write(self.early)

    def report(self) -> dict[str, Any]:
        """Return what the results file of this device holds."""
        return {
            "device": device_name(self.device),
            "commit": commit(),
            "date": self.began,
            "versions": versions(),
            "rows": [row._asdict() for row in self.rows],
        }

    def write(self, folder: Path) -> Path:
        """Put what was measured into this device's file in ``folder``: a row replaces the one of its id, others stay.

        The head is that of this run; a row of an earlier one keeps its own commit, date and versions.
        """
        found = self.report()
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{found['device']}.json"
        before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"rows": []}
        head = {key: before[key] for key in RUN if key in before}
        rows = {row["id"]: {**row, "run": row.get("run", head)} for row in before["rows"]}
        ours = {key: found[key] for key in RUN}
        rows |= {row["id"]: {**row, "run": ours} for row in found["rows"]}
        for row in rows.values():
            if row["run"] == ours:
                del row["run"]
        found["rows"] = list(rows.values())
        beside = path.with_suffix(".json.part")
        beside.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
        beside.replace(path)
        return path


def tell_times(timing: Timing) -> list[str]:
    """Spread of every side, the clock, and what that clock alone can tell."""
    told = [f"{name}: {spread(timing.taken(name))}" for name in timing.turns]
    told.append(timing.clock)
    if max(timing.calls.values()) > 1:
        told[-1] += ", calls per turn: " + ", ".join(f"{name} {calls}" for name, calls in timing.calls.items())
    for what, title in (("warm", "warm L2"), ("host", "host, per call")):
        if not math.isnan(timing.taken(OURS, what)[0]):
            told.append(f"{title}: " + ", ".join(f"{n} {timing.median(n, what):.4g} ms" for n in timing.turns))
    return told


def tell_floor(work: Work, bandwidth: float, rate: float) -> str:
    """Bytes, operations, and which of the two sets the floor at which rate."""
    memory = work.moved / bandwidth >= work.operations / rate
    by = f"memory, {bandwidth / 1e9:.4g} GB/s read" if memory else f"arithmetic, {rate / 1e9:.4g} Gop/s in a matmul"
    return f"{work.moved / 1e6:.4g} MB, {work.operations / 1e6:.4g} Mop; floor: {by} in this run"


def tell_share(reached: float, copy: float) -> str:
    """Bandwidth of ours beside that of a copy."""
    return f"ours {reached / 1e9:.4g} GB/s, {reached / copy:.0%} of the {copy / 1e9:.4g} GB/s of a copy in this run"


def versions() -> dict[str, str]:
    """Python and the packages that matter here, those that are installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """Return the commit that was measured, with ``-dirty`` if tracked files had changed."""
    if told := os.environ.get("FLEXLAM_COMMIT"):  # for a copy of the tree without its history
        return told
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8", check=False)
    return done.stdout.strip() if done.returncode == 0 else "unknown"
