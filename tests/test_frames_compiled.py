"""What Triton made of the kernels between frames and tokens for sm_90: no spills, words of 16 bytes where it can."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
pytest.importorskip("triton")


@pytest.fixture(scope="module")
def compiled() -> dict[str, dict[str, Any]]:
    """Every variant, compiled in a process that does not interpret them."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(HERE.parent), environment.get("PYTHONPATH", "")])
    command = [sys.executable, str(HERE / "compile_sm90.py"), "^(patches|flow_|noise|words)"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def test_no_variant_spills(compiled: dict[str, dict[str, Any]]) -> None:
    assert len(compiled) == 3 * (3 + 4 + 1) + 2
    assert {name: facts for name, facts in compiled.items() if facts["spilled"]} == {}


def test_all_but_the_bytes_of_frames_moves_in_words_of_sixteen(compiled: dict[str, dict[str, Any]]) -> None:
    """1,024 elements and 128 threads: 8 a thread, 2 words of fp32 or 1 of half precision for each tensor."""
    for name, facts in compiled.items():
        what, *rest = name.split("/")
        words = 2 if "fp32" in rest or what == "noise" else 1
        loads = stores = words
        if what == "patches":
            loads, stores = {"frame": (0, words), "tubelets": (0, 2 * words), "flow": (2, 2 * words)}[rest[1]]
        if what == "flow_loss":
            loads, stores = 2 + words, words if name.endswith("error1") else 0
        if what == "noise":
            loads = 0
        if what != "words":  # 8 bytes a sample
            assert facts["wide_loads"] >= loads, name
            assert facts["wide_stores"] == stores, name
