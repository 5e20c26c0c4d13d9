"""Profiles of decisions: the script on a CPU and on a stand-in for a GPU, and the page about it."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from profile_cases import HOST, REPLAY

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "bench"))

import profile_decide  # noqa: E402
from timeline import markdown, read_ranges  # noqa: E402

from flexlam_fast.ranges import NOTHING, span  # noqa: E402

STAGES = ["encode", "append", "codes", "translate"]


def cells(table: str) -> dict[str, list[str]]:
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line[:1] == "|"]
    return {row[0]: row[1:] for row in rows[2:]}


def test_the_script_says_on_a_cpu_where_the_milliseconds_go(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = tmp_path / "trace.json"
    options = "--preset tiny --budget 3 --decisions 2 --device cpu --dtype float32 --backend reference"
    options += " --level 2 --gaps --trace"
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
        ("--preset small", "preset: expected one of dmlab, tiny, got 'small'"),
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


def test_the_page_names_options_that_there_are_and_shows_the_table_that_is_printed() -> None:
    page = (ROOT / "docs/profiling.md").read_text()
    commands = re.findall(r"python bench/profile_decide\.py([^`#\n]*)", page)
    assert len(commands) >= 2
    for command in commands:
        profile_decide.parser().parse_args(command.split())
    assert markdown(read_ranges(HOST), 2).splitlines()[0] in page
