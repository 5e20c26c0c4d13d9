"""Profiles of decisions: gaps and tables on hand-made events, the script on a CPU, the shell script with fake tools."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "bench"))

import profile_decide  # noqa: E402
from timeline import (  # noqa: E402
    Busy,
    Event,
    Gap,
    Work,
    find_gaps,
    markdown,
    of_graphs,
    read_ranges,
    report_gaps,
)

from flexlam_fast.ranges import NOTHING, span  # noqa: E402

STAGES = ["encode", "append", "codes", "translate"]


def works(*spans: tuple[int, int]) -> list[Work]:
    return [Work(f"{start}-{end}", start, end) for start, end in spans]


@pytest.mark.parametrize(
    ("spans", "expected"),
    [
        ([], Busy(0, 0, [])),
        ([(5, 9)], Busy(4, 4, [])),
        ([(0, 2), (2, 5)], Busy(5, 5, [])),
        ([(4, 6), (0, 1), (2, 3)], Busy(6, 4, [Gap(1, "0-1", "2-3"), Gap(1, "2-3", "4-6")])),
        ([(0, 4), (2, 6), (9, 10)], Busy(10, 7, [Gap(3, "2-6", "9-10")])),
        # the gap begins where the longest ends, not the one that began last
        ([(0, 8), (1, 2), (3, 4), (10, 11)], Busy(11, 9, [Gap(2, "0-8", "10-11")])),
        ([(0, 1), (2, 3), (8, 9)], Busy(9, 3, [Gap(5, "2-3", "8-9"), Gap(1, "0-1", "2-3")])),
    ],
    ids=["none", "one", "touching", "unsorted", "overlapping", "contained", "largest first"],
)
def test_gaps(spans: list[tuple[int, int]], expected: Busy) -> None:
    assert find_gaps(works(*spans)) == expected


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(1, 8)), min_size=1, max_size=12), st.randoms())
def test_gaps_are_the_units_of_time_in_which_nothing_runs(pieces: list[tuple[int, int]], random: Any) -> None:
    spans = [(start, start + length) for start, length in pieces]
    found = find_gaps(works(*spans))
    covered = {unit for start, end in spans for unit in range(start, end)}
    assert found.busy == len(covered)
    assert found.total == max(covered) - min(covered) + 1
    assert sum(gap.us for gap in found.gaps) == found.total - found.busy
    assert [gap.us for gap in found.gaps] == sorted((gap.us for gap in found.gaps), reverse=True)
    random.shuffle(spans)
    again = find_gaps(works(*spans))
    assert (again.total, again.busy, [gap.us for gap in again.gaps]) == (
        found.total,
        found.busy,
        [gap.us for gap in found.gaps],
    )


def event(cat: str, name: str, ts: float, dur: float, **more: Any) -> Event:
    return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "tid": 1, "args": {}, **more}


#: One replay: two fills before the graph, then a copy in, two kernels that overlap, one 6 us later, and a copy out.
REPLAY = [
    {"ph": "M", "name": "process_name", "args": {"name": "python"}},
    event("cuda_runtime", "cudaGraphLaunch", 90, 5, args={"correlation": 7}),
    event("cuda_runtime", "cudaLaunchKernel", 50, 5, args={"correlation": 6}),
    event("kernel", "FillFunctor", 60, 1, args={"correlation": 6}),
    event("gpu_user_annotation", "decision", 50, 90),
    event("kernel", "join_kernel", 120, 4, args={"correlation": 7}),
    event("gpu_memcpy", "Memcpy HtoD (Pinned -> Device)", 100, 2, args={"correlation": 7}),
    event("kernel", "attend_kernel", 103, 10, args={"correlation": 7}),
    event("kernel", "few_rows_kernel", 110, 4, args={"correlation": 7}),
    event("gpu_memcpy", "Memcpy DtoH (Device -> Pinned)", 124, 1, args={"correlation": 7}),
]


def test_a_replay_is_what_its_launch_put_on_the_device() -> None:
    names = [found["name"].split()[0] for found in of_graphs(REPLAY)]
    assert sorted(names) == ["Memcpy", "Memcpy", "attend_kernel", "few_rows_kernel", "join_kernel"]


def test_a_gap_over_the_limit_is_named_and_fails() -> None:
    text, fine = report_gaps(REPLAY, graphs=True, most_gap_us=5)
    assert text.splitlines() == [
        "3 kernels, 2 copies and fills in 25.0 us, 72.0% of it busy, 2 gaps",
        "      6.00 us after few_rows_kernel, before join_kernel",
        "      1.00 us after Memcpy HtoD (Pinned -> Device), before attend_kernel",
        "1 gap of more than 5 us",
    ]
    assert not fine


def test_a_gap_within_the_limit_will_do_and_without_graphs_there_is_no_verdict() -> None:
    text, fine = report_gaps(REPLAY, graphs=True, most_gap_us=6)
    assert fine
    assert text.endswith("\nno gap of more than 6 us")
    text, fine = report_gaps(REPLAY, graphs=False, most_gap_us=5)
    assert fine
    assert text.startswith("4 kernels, 2 copies and fills in 65.0 us")
    assert "of more than" not in text


def test_a_trace_without_a_replay_fails_in_one_sentence() -> None:
    launched_singly = [found for found in REPLAY if "GraphLaunch" not in found["name"]]
    for events, graphs in ((launched_singly, True), ([], True), ([], False)):
        text, fine = report_gaps(events, graphs, 5)
        assert re.match("gaps: expected work of .* in the trace, got none: .*CUPTI", text)
        assert not fine


#: Two decisions of 100 us; in the first, stages of 30 and 60, the second of which has two layers, and 10 in none.
HOST = [
    event("user_annotation", "ProfilerStep#1", 0, 200),
    event("user_annotation", "decision", 0, 100),
    event("user_annotation", "encode", 0, 30),
    event("cpu_op", "aten::linear", 5, 20),
    event("cpu_op", "aten::addmm", 6, 15),
    event("cpu_op", "aten::gelu", 25, 5),
    event("user_annotation", "codes", 35, 60),
    event("user_annotation", "layer 0", 40, 20),
    event("cpu_op", "aten::mm", 40, 20),
    event("user_annotation", "layer 11", 60, 30),
    event("cpu_op", "aten::mm", 62, 8),
    event("user_annotation", "decision", 100, 100),
    event("cpu_op", "elsewhere", 10, 500, tid=2),
    event("kernel", "attend_kernel", 10, 500),
]


def test_ranges_are_summed_by_path_and_operators_by_what_they_take_themselves() -> None:
    rows = read_ranges(HOST[::-1])
    inside = [("encode",), ("codes",), ("codes", "layer")]
    assert list(rows) == [("decision",), *(("decision", *path) for path in inside)]
    encode, codes, layer = rows["decision", "encode"], rows["decision", "codes"], rows["decision", "codes", "layer"]
    assert (encode.times, encode.us, encode.calls, encode.within) == (1, 30, 2, 25)
    assert encode.operators == {"aten::linear": 5, "aten::addmm": 15, "aten::gelu": 5}
    assert (codes.times, codes.us, codes.calls, codes.within) == (1, 60, 2, 28)
    assert (layer.times, layer.us, layer.calls, layer.within) == (2, 50, 2, 28)
    whole = rows["decision",]
    assert (whole.times, whole.us, whole.calls, whole.within) == (2, 200, 4, 53)
    assert whole.operators.total() == whole.within


def test_the_table_is_per_decision_and_adds_up() -> None:
    lines = markdown(read_ranges(HOST), 2).splitlines()
    assert lines[2:] == [
        "| decision | 0.10 | 100.0% | 1 | 2 | 0.07 | aten::mm 0.01, aten::addmm 0.01, aten::linear 0.00 |",
        "| encode | 0.01 | 15.0% | 0.5 | 1 | 0.00 | aten::addmm 0.01, aten::linear 0.00, aten::gelu 0.00 |",
        "| codes | 0.03 | 30.0% | 0.5 | 1 | 0.02 | aten::mm 0.01 |",
        "| codes / layer | 0.03 | 25.0% | 1 | 1 | 0.01 | aten::mm 0.01 |",
        "| in no stage | 0.06 | 55.0% | | | | |",
    ]


def cells(table: str) -> dict[str, list[str]]:
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line[:1] == "|"]
    return {row[0]: row[1:] for row in rows[2:]}


def test_the_script_says_on_a_cpu_where_the_milliseconds_go(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = tmp_path / "trace.json"
    options = "--preset tiny --budget 3 --decisions 2 --device cpu --dtype float32 --level 2 --gaps --trace"
    assert profile_decide.main([*options.split(), str(trace)]) == 0
    out = capsys.readouterr().out
    table = cells(out)
    assert [name for name in table if "/" not in name] == ["decision", *STAGES, "in no stage"]
    assert all(table[stage][2] == "1" for stage in STAGES)
    assert table["codes / code"][2] == "2"
    assert sum(float(table[name][0]) for name in [*STAGES, "in no stage"]) == pytest.approx(
        float(table["decision"][0]), abs=0.03
    )
    assert sum(int(table[stage][3]) for stage in STAGES) <= int(table["decision"][3])
    assert re.search(r"threads, [\d.]+ ms a decision alone", out)
    assert json.loads(trace.read_text())["traceEvents"]
    assert span("encode") is NOTHING


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ("--budget 17", "budget: expected an integer in 1..16, got 17"),
        ("--batch 0", "batch_size: expected an integer in 1..1000000, got 0"),
        ("--decisions 0", "decisions: expected at least 1, got 0"),
        ("--level 3", "level: expected 0 (off), 1 (stages) or 2 (stages and layers), got 3"),
        ("--preset small", "preset: expected one of ['dmlab', 'tiny'], got 'small'"),
        ("--device gpu", "device: expected cpu or cuda, got 'gpu'"),
        ("--device cuda:99", "device: expected a CUDA device that torch sees for 'cuda:99', got none"),
    ],
)
def test_what_cannot_be_run_is_said_in_one_sentence(
    options: str, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert profile_decide.main(["--preset", "tiny", "--device", "cpu", *options.split()]) == 2
    assert capsys.readouterr().err == f"profile_decide: {sentence}\n"


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Stand in for a policy on a GPU, CUDA's profiler switch and NVTX; ``log`` is what happened in which order."""
    log: list[str] = []
    policy = SimpleNamespace(device=torch.device("cuda"), graphs=True, describe=lambda: "a policy")
    fake = SimpleNamespace(
        policy=policy, log=log, act=lambda: log.append("decision" if span("x") is NOTHING else "named")
    )
    monkeypatch.setattr(profile_decide, "build", lambda options: (policy, fake.act))
    monkeypatch.setattr(profile_decide, "record", lambda *_: REPLAY)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: log.append("wait"))
    monkeypatch.setattr(
        torch.cuda, "profiler", SimpleNamespace(**{w: lambda w=w: log.append(w) for w in ("start", "stop")})
    )
    monkeypatch.setitem(sys.modules, "nvtx", SimpleNamespace(annotate=lambda name: SimpleNamespace(name=name)))
    return fake


def test_gaps_in_a_replay_make_the_exit_status(on_gpu: SimpleNamespace) -> None:
    assert profile_decide.main(["--gaps"]) == 1
    assert profile_decide.main(["--gaps", "--most-gap-us", "6"]) == 0
    on_gpu.policy.graphs = False
    assert profile_decide.main(["--gaps"]) == 0


def test_a_profiler_sees_the_decisions_and_their_ranges_alone(on_gpu: SimpleNamespace) -> None:
    assert profile_decide.main(["--decisions", "2"]) == 0
    assert on_gpu.log == ["wait", "start", "named", "named", "wait", "stop"]
    assert span("encode") is NOTHING


def test_a_decision_that_fails_stops_the_profiler_too(on_gpu: SimpleNamespace) -> None:
    def fail() -> None:
        raise RuntimeError("out of memory")

    on_gpu.act = fail
    with pytest.raises(RuntimeError, match="out of memory"):
        profile_decide.main([])
    assert on_gpu.log == ["wait", "start", "stop"]
    assert span("encode") is NOTHING


FAKE = """#!/bin/sh
echo "$(basename "$0")" "$@" >> "{log}"
case "$*" in *{failing}*) exit 3;; esac
"""


def profile_sh(
    folder: Path, *parts: str, tools: tuple[str, ...] = ("nsys", "ncu", "python"), failing: str = "nothing at all"
) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """Run the script with tools that only write down how they were called."""
    programs, log = folder / "bin", folder / "log"
    programs.mkdir(exist_ok=True)
    for tool in tools:
        (programs / tool).write_text(FAKE.format(log=log, failing=f"'{failing}'"))
        (programs / tool).chmod(0o755)
    environment = {**os.environ, "PATH": f"{programs}:/usr/bin:/bin", "OUT": str(folder / "out"), "PYTHON": "python"}
    command = ["bash", str(ROOT / "bench/profile.sh"), *parts]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
    called = log.read_text().splitlines() if log.exists() else []
    return done, [line for line in called if not line.startswith("python -c")]


def test_the_shell_script_calls_the_tools(tmp_path: Path) -> None:
    done, called = profile_sh(tmp_path)
    assert done.returncode == 0, done.stderr
    assert [line.split()[:2] for line in called] == [
        ["nsys", "profile"],
        ["nsys", "stats"],
        ["nsys", "profile"],
        ["nsys", "stats"],
        ["ncu", "--profile-from-start"],
        ["python", "bench/profile_decide.py"],
    ]
    for line, graphs in ((called[0], "--no-graphs --level 2"), (called[2], "--graphs")):
        assert "--trace=cuda,nvtx" in line
        assert "--capture-range=cudaProfilerApi --capture-range-end=stop" in line
        assert "--cuda-graph-trace=node" in line
        assert line.endswith(f"--device cuda --batch 1 --budget 16 --decisions 10 {graphs}")
    assert "--profile-from-start off --graph-profiling node" in called[4]
    assert "--set full --launch-count 150" in called[4]
    kernels = re.search(r"--kernel-name regex:\^\(([\w|]+)\)\$ ", called[4])
    assert kernels
    jitted = "\n".join(path.read_text() for path in (ROOT / "kernels").glob("*.py"))
    assert kernels[1].split("|") == sorted(set(re.findall(r"^def (\w+_kernel)\(", jitted, re.M)))
    for line in called:
        if "profile_decide.py" in line:  # that the script knows these options, and takes the values
            profile_decide.parser().parse_args(line.split("profile_decide.py")[1].split())


def test_the_shell_script_goes_on_after_a_part_that_fails(tmp_path: Path) -> None:
    done, called = profile_sh(tmp_path, failing="--gaps")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "bench/profile.sh: these failed: gaps"
    done, called = profile_sh(tmp_path, failing="--no-graphs")
    assert done.stderr.splitlines()[-1] == "bench/profile.sh: these failed: ranges"
    assert called[-1].startswith("python bench/profile_decide.py --device cuda")


@pytest.mark.parametrize(
    ("parts", "tools", "sentence"),
    [
        (["graph"], ("python",), "expected nsys, which comes with Nsight Systems, got none."),
        (["kernels"], ("python", "nsys"), "expected ncu, which comes with Nsight Compute, got none."),
        (["everything"], ("python",), "expected ranges, graph, kernels or gaps, got everything."),
        (["gaps"], ("python",), "expected a Python whose torch sees a CUDA device, got none."),
    ],
)
def test_the_shell_script_says_what_is_missing(
    parts: list[str], tools: tuple[str, ...], sentence: str, tmp_path: Path
) -> None:
    missing = {"nsys", "ncu"} - set(tools)
    if any(Path(folder, tool).exists() for tool in missing for folder in ("/usr/bin", "/bin", "/usr/local/cuda/bin")):
        pytest.skip("the tool is there")
    failing = "get_device_name" if parts == ["gaps"] else "nothing at all"
    done, called = profile_sh(tmp_path, *parts, tools=tools, failing=failing)
    assert (done.returncode, done.stderr) == (1, f"bench/profile.sh: {sentence}\n")
    assert not called


def test_the_shell_scripts_are_clean() -> None:
    shellcheck = shutil.which("shellcheck")
    if not shellcheck:
        pytest.skip("no shellcheck")
    subprocess.run([shellcheck, str(ROOT / "bench/profile.sh")], check=True)


def test_the_page_names_options_that_there_are_and_shows_the_table_that_is_printed() -> None:
    page = (ROOT / "docs/profiling.md").read_text()
    commands = re.findall(r"python bench/profile_decide\.py([^`#\n]*)", page)
    assert len(commands) >= 2
    for command in commands:
        profile_decide.parser().parse_args(command.split())
    assert markdown(read_ranges(HOST), 2).splitlines()[0] in page
