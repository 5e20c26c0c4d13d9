"""Options, the table at the end, and the results file of a bench run.

``pytest bench/ --benchmark-only`` measures; with ``--write-results`` it also puts its rows into
``bench/results/<device>.json``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from machine import Machine, device_name
from measure import told_time
from peers import Compiler
from rows import ROOT, Results

RESULTS = pytest.StashKey[Results]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("flexlam_fast benches")
    group.addoption("--write-results", action="store_true", help="put the rows into this device's results file")
    group.addoption("--results-dir", default=str(ROOT / "bench" / "results"), help="where results files are")
    group.addoption(
        "--rounds", type=int, default=0, help="rounds per bench (the paper takes 100); 0: what fits half a minute"
    )
    group.addoption(
        "--compile-seconds",
        type=float,
        default=30.0,
        help="leave a torch.compile peer out, and all after it, once one took longer to compile; 0: no such peers",
    )


def pytest_configure(config: pytest.Config) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # on a GPU, whose time may be short, after every row; elsewhere a run that fails leaves the old file as it was
    early = config.getoption("--write-results") and device.type == "cuda"
    config.stash[RESULTS] = Results(Machine(device), Path(config.getoption("--results-dir")) if early else None)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=told_time))


@pytest.fixture(scope="session")
def rounds(pytestconfig: pytest.Config) -> int:
    return int(pytestconfig.getoption("--rounds"))


@pytest.fixture(scope="session")
def compiler(pytestconfig: pytest.Config) -> Compiler:
    return Compiler(float(pytestconfig.getoption("--compile-seconds")))


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
    if session.config.getoption("--write-results") and found.rows and not exitstatus:
        found.write(Path(session.config.getoption("--results-dir")))
