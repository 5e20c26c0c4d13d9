"""Options, the table at the end, and the results file of a bench run.

``pytest bench/ --benchmark-only`` measures; with ``--write-results`` it also replaces ``bench/results/<device>.json``.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import platform
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from measure import Timing, device_name, read_bandwidth, spread

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "numpy", "transformers", "vector-quantize-pytorch")


class Row(NamedTuple):
    """One line of the results: medians in milliseconds, ours and each peer's, and the floor the memory sets."""

    id: str
    ours_ms: float
    peers: dict[str, float]
    floor_ms: float
    note: str


class Results:
    """What a run measured, on which device, at which memory bandwidth."""

    def __init__(self) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.rows: list[Row] = []
        self._bandwidth = 0.0

    @property
    def bandwidth(self) -> float:
        """Bytes per second, measured once in this run."""
        self._bandwidth = self._bandwidth or read_bandwidth(self.device)
        return self._bandwidth

    def add(self, benchmark: Any, row_id: str, timing: Timing, moved: int, note: str) -> None:
        """Keep a row; ``moved`` is how many bytes the work cannot help but move."""
        if not timing.ours:
            return
        floor = 1e3 * moved / self.bandwidth
        peers = {name: float(np.median(ms)) for name, ms in timing.peers.items()}
        told = [f"ours: {spread(timing.ours)}", *(f"{name}: {spread(ms)}" for name, ms in timing.peers.items())]
        told += [f"floor: {moved / 1e6:.1f} MB over {self.bandwidth / 1e9:.1f} GB/s read in this run", note]
        row = Row(row_id, float(np.median(timing.ours)), peers, floor, "; ".join(told))
        self.rows.append(row)
        benchmark.extra_info.update(row._asdict())


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("flexlam_fast benches")
    group.addoption("--write-results", action="store_true", help="replace the results file of this device")
    group.addoption("--results-dir", default=str(ROOT / "bench" / "results"), help="where results files are")
    group.addoption(
        "--rounds", type=int, default=0, help="rounds per bench (the paper takes 100); 0: what fits half a minute"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.stash[RESULTS] = Results()


RESULTS = pytest.StashKey[Results]()


@pytest.fixture(scope="session")
def rounds(pytestconfig: pytest.Config) -> int:
    return int(pytestconfig.getoption("--rounds"))


@pytest.fixture(scope="session")
def results(pytestconfig: pytest.Config) -> Results:
    return pytestconfig.stash[RESULTS]


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    found = config.stash[RESULTS]
    if not found.rows:
        return
    terminalreporter.section(f"side by side on {device_name(found.device)}, medians")
    for row in found.rows:
        beside = ", ".join(f"{name} {ms:.4g} ms ({ms / row.ours_ms:.2f}x ours)" for name, ms in row.peers.items())
        terminalreporter.write_line(f"{row.id}: ours {row.ours_ms:.4g} ms, {beside}, floor {row.floor_ms:.4g} ms")
        terminalreporter.write_line(f"    {row.note}")


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    found = session.config.stash[RESULTS]
    if not session.config.getoption("--write-results") or not found.rows or exitstatus:
        return
    name = device_name(found.device)
    report = {
        "device": name,
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version(), **{p: _version(p) for p in PACKAGES}},
        "rows": [row._asdict() for row in found.rows],
    }
    folder = Path(session.config.getoption("--results-dir"))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _commit() -> str:
    """The commit that was measured, with ``-dirty`` if tracked files had changed."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else "unknown"
