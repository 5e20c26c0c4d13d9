"""``make gpu``: what each stage would run is there, what fails keeps nothing else from running, results merge."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "bench"))

import gpu  # noqa: E402
import rows  # noqa: E402
from gpu import Command, Stage  # noqa: E402
from test_bench import FakeMachine  # noqa: E402

STAGES = {stage.name: stage for stage in gpu.stages()}


def test_every_stage_fits_a_call_and_names_files_that_are_there() -> None:
    assert list(STAGES)[:3] == ["headline", "parity", "train"]
    for stage in STAGES.values():
        assert stage.seconds <= gpu.LIMIT
        for command in stage.commands:
            files = [word for word in command.args if word.endswith(".py")]
            assert files
            assert all((ROOT / name).is_file() for name in files), files


def test_tests_that_name_cuda_run_there_and_no_others() -> None:
    found = set(gpu.gpu_tests())
    assert {"graphs", "engine_cuda", "ops_paged", "fsq_backends", "step"} <= found  # by itself, or by a helper
    assert not {"layers", "packing", "data_video", "engine", "profile_shell", "cli_numbers"} & found
    listed = {word for stage in ("headline", "tests") for c in STAGES[stage].commands for word in c.args}
    assert {f"tests/test_{name}.py" for name in found} <= listed


def test_a_sanitizer_looks_at_our_kernels_without_torchs_allocator() -> None:
    (command,) = STAGES["sanitizer-1"].commands
    assert command.tool[:3] == ("compute-sanitizer", "--tool", "memcheck")
    assert "kernel_substring=attend_kernel" in command.tool
    assert command.env == {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    (last,) = STAGES[f"sanitizer-{sum(name.startswith('sanitizer') for name in STAGES)}"].commands
    assert last.tool[-2:] == ("--kernel-name", "kernel_substring=block_kernel")


def test_what_fails_or_lacks_something_keeps_nothing_else_from_running(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "LIMIT", 11.0)
    began = time.monotonic()
    child = f"import time; time.sleep(11.5); open({str(tmp_path / 'late')!r}, 'w')"
    commands = (
        Command(("-c", "print('one'); raise SystemExit(3)")),
        Command(("-c", "print('two')"), needs=("no_such_package", "json")),
        Command(("-c", "print('three')"), tool=("no-such-tool", "-x")),
        Command(("-c", "import os; print('four', os.environ['SAID'], os.getcwd())"), env={"SAID": "so"}, cwd=tmp_path),
        Command(
            (
                "-c",
                f"import subprocess, sys; print('five', flush=True); subprocess.run([sys.executable, '-c', {child!r}])",
            )
        ),
        Command(("-c", "print('six')")),
    )
    wrong = gpu.run(Stage("toy", 1, "", commands), tmp_path)
    time.sleep(max(0.0, began + 13 - time.monotonic()))
    assert not (tmp_path / "late").exists(), "what a program started goes on after it was ended"
    assert [line.partition("command ")[2] for line in wrong[:3]] == [
        "1 of 6: ended with 3",
        "2 of 6: left out, no_such_package is not here",
        "3 of 6: left out, no-such-tool is not here",
    ]
    assert wrong[3].startswith("toy, command 5 of 6: ended after 1")
    assert wrong[4] == "toy, command 6 of 6: left out, the stage's 11.0 s were over"
    said = [line for line in capfd.readouterr().out.splitlines() if not line.startswith("==")]
    assert said == ["one", f"four so {tmp_path}", "five"]


def test_a_rehearsal_lists_what_would_run_and_says_what_the_image_lacks() -> None:
    command = [sys.executable, "bench/gpu.py", "--dry-run", "sanitizer-1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "$ compute-sanitizer --tool memcheck" in done.stdout
    assert "tests/test_ways.py::test_fused_is" in done.stdout
    assert "could not import 'vector_quantize_pytorch'" in done.stdout
    assert done.stdout.endswith("== all went well\n")


def test_a_rehearsal_fails_where_a_run_would(tmp_path: Path) -> None:
    bad = tmp_path / "broken.py"
    bad.write_text("import no_such_module\n")
    (wrong,) = gpu.rehearse(Stage("toy", 1, "", (Command((str(bad),)),)))
    assert "No module named 'no_such_module'" in wrong


def test_without_a_stage_they_are_listed_and_without_a_gpu_none_runs() -> None:
    command = [sys.executable, "bench/gpu.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "headline      8.0 min" in done.stdout
    assert "left out: " in done.stdout
    refused = subprocess.run([*command, "nonsense"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert "expected some of headline, parity" in refused.stderr


def test_rows_of_several_runs_merge_by_id_and_keep_their_own_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for commit, ids in (("a", "pq"), ("b", "qr"), ("b", "s")):
        monkeypatch.setenv("FLEXLAM_COMMIT", commit)
        results = rows.Results(FakeMachine())
        results.began = commit
        results.rows = [rows.Row(name, 1.0 if commit == "a" else 2.0, {}, 0.5, "") for name in ids]
        path = results.write(tmp_path)
        results.write(tmp_path)  # as a run does that writes after every row
    found = json.loads(path.read_text())
    assert found["commit"] == "b"
    assert {row["id"]: (row["ours_ms"], row.get("run", {}).get("commit")) for row in found["rows"]} == {
        "p": (1.0, "a"),
        "q": (2.0, None),
        "r": (2.0, None),
        "s": (2.0, None),
    }
    assert not list(tmp_path.glob("*.part"))
