"""The shell script of profiles, with fake tools that only write down how they were called."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "bench"))

import profile_decide  # noqa: E402

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
        ["ncu", "--clock-control"],
        ["python", "bench/profile_decide.py"],
    ]
    for line, graphs in ((called[0], "--no-graphs --level 2"), (called[2], "--graphs")):
        assert "--trace=cuda,nvtx" in line
        assert "--capture-range=cudaProfilerApi --capture-range-end=stop" in line
        assert "--cuda-graph-trace=node" in line
        assert line.endswith(f"--device cuda --batch 1 --budget 16 --decisions 10 {graphs}")
    assert "--clock-control none --profile-from-start off --graph-profiling node" in called[4]
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
