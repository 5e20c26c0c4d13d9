"""The bench harness: who is timed when and by which clock, and what a row says."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "bench"))

import measure  # noqa: E402
import rows  # noqa: E402
from machine import Machine  # noqa: E402
from measure import OURS, Timing, Turn  # noqa: E402
from peers import COMPILED, Compiler  # noqa: E402
from rows import Results, Work  # noqa: E402

KEYS = ["id", "ours_ms", "peers", "floor_ms", "note"]


class FakeClock:
    """Remembers who was called how often in which turn; every call takes what ``ms`` says."""

    name, turn_ms = "fake clock", 0.2

    def __init__(self, ms: dict[str, float]) -> None:
        self.ms, self.turns = ms, []

    def __call__(self, side: Any, calls: int = 1) -> Turn:
        who = side()
        self.turns.append((who, calls))
        return Turn(self.ms[who])


class FakeBenchmark:
    """What the harness uses of pytest-benchmark's fixture: it keeps how long each round took by the benches' timer."""

    def __init__(self) -> None:
        self.enabled, self.extra_info, self.taken = True, {}, []

    def pedantic(self, target: Any, rounds: int) -> None:
        for _ in range(rounds):
            start = measure.told_time()
            target()
            self.taken.append(measure.told_time() - start)


class FakeMachine(Machine):
    """Reads at 10 GB/s, copies at 8 and multiplies at 100 Gop/s."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))

    def read(self) -> float:
        return 10e9

    def copy(self) -> float:
        return 8e9

    def arithmetic(self, dtype: torch.dtype) -> float:
        return 100e9


def sides(*names: str) -> dict[str, Any]:
    return {name: lambda name=name: name for name in names}


def run_in_turns(ms: dict[str, float], rounds: int) -> tuple[FakeClock, FakeBenchmark, Timing]:
    clock, benchmark, peers = FakeClock(ms), FakeBenchmark(), sides(*ms)
    timing = measure.in_turns(benchmark, peers.pop(OURS), peers, clock, rounds)
    return clock, benchmark, timing


@pytest.mark.parametrize("count", [2, 3, 4])
def test_the_order_changes_so_that_nobody_always_runs_after_the_same_one(count: int) -> None:
    names = [OURS, "a", "b", "c"][:count]
    clock = FakeClock(dict.fromkeys(names, 1.0))
    taken = measure.take_turns(sides(*names), clock, 2 * count)
    assert {name: len(turns) for name, turns in taken.items()} == dict.fromkeys(names, 2 * count)
    ran = [who for who, _ in clock.turns]
    for number in range(2 * count):
        assert sorted(ran[number * count : (number + 1) * count]) == sorted(names)
    for name in names:
        before = {ran[i - 1] for i in range(1, len(ran)) if ran[i] == name}
        assert len(before) > 1, f"{name} always ran after {before}"
    assert {ran[i] for i in range(0, len(ran), count)} == set(names), "everybody goes first at times"


def test_short_calls_are_batched_and_long_ones_are_not() -> None:
    clock, _, timing = run_in_turns({OURS: 0.05, "quick": 0.0001, "slow": 3.0}, 6)
    assert timing.calls == {OURS: 4, "quick": 1000, "slow": 1}
    measured = clock.turns[-6 * 3 :]
    assert set(measured) == {(OURS, 4), ("quick", 1000), ("slow", 1)}
    assert {calls for _, calls in clock.turns[: -6 * 3]} == {1}, "warm-ups are single calls"
    assert len(clock.turns) == (20 + 6) * 3


def test_a_batched_turn_is_told_per_call(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    now = iter([1.0, 1.010])
    monkeypatch.setattr(measure, "time", SimpleNamespace(perf_counter=lambda: next(now)))
    turn = measure.WallClock(torch.device("cpu"))(lambda: calls.append(1), 5)
    assert len(calls) == 5
    assert turn.ms == pytest.approx(2.0)
    assert math.isnan(turn.warm)
    assert math.isnan(turn.host)


def test_pytest_benchmark_is_told_what_ours_took() -> None:
    _, benchmark, timing = run_in_turns({OURS: 0.5, "peer": 2.0}, 4)
    assert benchmark.taken == pytest.approx([0.5e-3] * 4)
    assert timing.taken("peer") == [2.0] * 4


def test_the_device_clock_flushes_before_one_call_and_warms_before_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            done.append("event")

        def synchronize(self) -> None:
            done.append("wait")

        def elapsed_time(self, end: Event) -> float:
            return float(len(done))

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(L2_cache_size=4096))
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: done.append("sleep"), raising=False)
    clock = measure.DeviceClock(torch.device("cpu"))
    assert clock.scratch.nbytes == 2 * 4096
    flush = clock.flush
    monkeypatch.setattr(clock, "flush", lambda: (flush(), done.append("flush")))
    turn = clock(lambda: done.append("call"))
    assert done == ["flush", "event", "call", "event", "wait", "call", "sleep", "event", "call", "event", "wait"]
    assert (turn.ms, turn.warm) == (5.0, 11.0)
    assert 0 < turn.host < 1000
    assert measure.calls_per_turn(1e-6, clock.turn_ms) == 1, "events time single calls"


@pytest.mark.gpu
def test_the_device_clock_times_a_copy_slower_flushed_than_warm() -> None:
    machine = Machine(torch.device("cuda"))
    x, y = (torch.ones(2**20, device="cuda") for _ in range(2))  # 8 MB together: they fit in any L2 of interest
    turns = [machine.clock(lambda: y.copy_(x)) for _ in range(50)]
    flushed, warm = (sorted(values)[25] for values in ([t.ms for t in turns], [t.warm for t in turns]))
    assert 0 < warm < flushed < 1
    assert 1e11 < machine.copy() < 1e13
    assert 1e11 < machine.read() < 1e13


@pytest.mark.parametrize(
    ("moved", "operations", "expected", "which"),
    [(20_000_000, 1_000_000, 2.0, "memory, 10 GB/s"), (1000, 500_000_000, 5.0, "arithmetic, 100 Gop/s")],
)
def test_the_floor_is_the_larger_of_memory_and_arithmetic(
    moved: int, operations: int, expected: float, which: str
) -> None:
    work = Work(moved, operations, torch.float32)
    assert rows.floor_ms(work, 10e9, 100e9) == pytest.approx(expected)
    told = rows.tell_floor(work, 10e9, 100e9)
    assert f"floor: {which}" in told
    assert told.startswith(f"{moved / 1e6:.4g} MB, {operations / 1e6:.4g} Mop")


def test_a_row_has_the_keys_of_the_contract_and_says_how_it_was_taken() -> None:
    results, benchmark = Results(FakeMachine()), FakeBenchmark()
    turns = {OURS: [Turn(1.0, 0.5, 0.1), Turn(3.0, 0.5, 0.1), Turn(2.0, 0.5, 0.1)], "peer": [Turn(4.0, 3.0, 0.2)]}
    timing = Timing(turns, {OURS: 1, "peer": 2}, "fake clock")
    results.add(benchmark, "fsq/fwd/x", timing, Work(8_000_000, 10, torch.float32), "fp32")
    row = results.report()["rows"][0]
    assert list(row) == KEYS == list(benchmark.extra_info)
    assert (row["id"], row["ours_ms"], row["peers"]) == ("fsq/fwd/x", 2.0, {"peer": 4.0})
    assert row["floor_ms"] == pytest.approx(0.8)
    told = row["note"].split("; ")
    assert "fake clock, calls per turn: ours 1, peer 2" in told
    assert "warm L2: ours 0.5 ms, peer 3 ms" in told
    assert "host, per call: ours 0.1 ms, peer 0.2 ms" in told
    assert "ours 4 GB/s, 50% of the 8 GB/s of a copy in this run" in told
    assert told[-1] == "fp32"


@pytest.mark.parametrize(
    ("limit", "seconds", "fails", "said"),
    [
        (30.0, 5.0, False, ""),
        (30.0, 41.0, False, "no torch.compile peer: 41 s to compile, of 30"),
        (30.0, 1.0, True, "no torch.compile peer: it failed here with RuntimeError"),
        (0.0, 1.0, False, "no torch.compile peer: not asked for"),
    ],
)
def test_a_peer_that_compiles_too_slowly_is_left_out_and_so_are_later_ones(
    monkeypatch: pytest.MonkeyPatch, limit: float, seconds: float, fails: bool, said: str
) -> None:
    compiled = []

    def compile_slowly(fn: Any, dynamic: bool) -> Any:
        compiled.append(fn)
        now[0] += seconds
        if fails:
            raise RuntimeError("no compiler")
        return fn

    now = [0.0]
    monkeypatch.setattr(torch, "compile", compile_slowly)
    monkeypatch.setattr("peers.time", SimpleNamespace(perf_counter=lambda: now[0]))
    compiler = Compiler(limit)

    def peer() -> Any:
        fn = torch.compile(len, dynamic=False)
        return lambda: fn("x")

    for _ in range(2):
        peers: dict[str, Any] = {}
        assert compiler.add(peers, COMPILED, peer) == said
        assert list(peers) == ([] if said else [COMPILED])
    assert len(compiled) == {"": 2, "no torch.compile peer: not asked for": 0}.get(said, 1)


def test_a_quick_run_checks_times_and_writes_rows(tmp_path: Path) -> None:
    pytest.importorskip("vector_quantize_pytorch")
    command = [sys.executable, "-m", "pytest", "bench/test_bottleneck.py", "--benchmark-only", "--rounds", "2"]
    command += ["-k", "fsq and fwd and 256x64 and 8-5-5-5 and fp32", "--compile-seconds", "0", "-p", "no:cacheprovider"]
    command += ["--write-results", "--results-dir", str(tmp_path)]
    # pytest-benchmark times nothing in a worker of pytest-xdist, and a child takes itself for one
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = tmp_path.glob("*.json")
    found = {row["id"]: row for row in json.loads(path.read_text())["rows"]}
    for name in ("fsq/fwd/8-5-5-5/256x64/fp32", "fsq/fwdbwd/8-5-5-5/256x64/fp32", "fsq/fwd/8-5-5-5/256x64/fp32/prefix"):
        row = found[name]
        assert list(row) == KEYS
        assert row["ours_ms"] > 0
        assert row["floor_ms"] > 0
        assert row["peers"]["vector_quantize_pytorch FSQ"] > 0
        assert "of a copy in this run" in row["note"]
        assert "MB," in row["note"]
        assert "no torch.compile peer: not asked for" in row["note"]


def test_every_bench_can_be_collected() -> None:
    """They use names of the package that no test calls."""
    command = [sys.executable, "-m", "pytest", "bench", "--collect-only", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:]
    assert "train/lam/tiny" in done.stdout
