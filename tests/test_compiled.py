"""What the compilers made of the kernels: no spills, 16-byte loads and stores, no approximate tanh, code for sm_90a."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
triton = pytest.importorskip("triton")
TOOL = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


@pytest.fixture(scope="module")
def compiled() -> dict[str, dict[str, Any]]:
    """Every variant of the bottleneck's kernels, compiled for sm_90 in a process that does not interpret them."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(HERE.parent), environment.get("PYTHONPATH", "")])
    command = [sys.executable, str(HERE / "compile_sm90.py"), "^(forward|backward|lookup|project|single)"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def test_no_variant_spills_or_approximates(compiled: dict[str, dict[str, Any]]) -> None:
    assert len(compiled) >= 69
    assert {name: facts for name, facts in compiled.items() if facts["spilled"] or facts["tanh"]} == {}


def test_latents_move_in_words_of_sixteen_bytes(compiled: dict[str, dict[str, Any]]) -> None:
    """Every load and store of what is large; what is left narrow is a 1/d-th: codes, lengths, edges, partial sums."""
    for name, facts in compiled.items():
        kind, *rest = name.split("/")
        if kind == "single":  # at most 7 tokens of a batch
            continue
        if kind.startswith("project"):  # x, 8,192 elements a program, and its gradient or the latents
            words = 8 if rest[0] == "fp32" else 4
            assert facts["wide_loads"] >= words, name
            assert facts["wide_stores"] >= (1 if kind == "project" else words), name
            continue
        # 2,048 elements and 128 threads: 16 elements a thread, 4 words of fp32 or 2 of half precision
        words = 4 if "fp32" in name or kind == "lookup" else 2
        assert facts["wide_stores"] >= words, name
        if kind != "lookup":
            assert facts["wide_loads"] >= (2 if kind == "backward" else 1) * words, name


def cuda_extension() -> Path:
    extension = pytest.importorskip("flexlam_fast._C", exc_type=ImportError)
    if not extension.build_info()["cuda"]:
        pytest.skip("the extension was built without nvcc")
    return Path(extension.__file__)


def ask(*args: str) -> str:
    return subprocess.run([TOOL, *args], capture_output=True, text=True, check=True).stdout


def test_the_extension_holds_a_cubin_for_sm_90a_and_ptx_for_what_came_before_and_comes_later() -> None:
    """That it was imported shows that it needs no driver: this test runs where there is none."""
    path = str(cuda_extension())
    assert re.search(r"arch = sm_90a\b", ask("-res-usage", path))
    listed = ask("-lptx", path)
    assert "sm_80" in listed  # a 3090, a 4090, an Orin
    assert "sm_90" in listed  # a Blackwell


def operations(text: str) -> list[str]:
    """The instructions of a function's SASS, without operands."""
    return re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+ )?([A-Z0-9_.]+)", text, re.M)


def test_a_barrier_of_the_persistent_kernel_returns_nothing_and_fences_no_more_than_it_must() -> None:
    """Six places leave their results; an arrival is a reduction behind a fence that is not the sequential one."""
    path = str(cuda_extension())
    for text in re.split(r"\n\s*Function : ", ask("-sass", path))[1:]:
        name = text.split("\n", 1)[0]
        if "block_kernel" not in name:
            continue
        found = operations(text)
        assert found.count("REDG.E.ADD.64.STRONG.GPU") == 6, name
        assert not [op for op in found if op.startswith("ATOMG.E.ADD")], name
        assert "MEMBAR.SC.GPU" not in found, name
        if "Li1EEE" in name:  # one session: 16 bytes each, of which caches near a multiprocessor hold 128 KB
            assert len(found) <= 12_000, (name, len(found))


def test_the_cuda_kernels_do_not_spill_and_move_words_of_sixteen_bytes() -> None:
    path = str(cuda_extension())
    usage = re.findall(r"Function (\S+):\s*\n\s*REG:(\d+) STACK:(\d+).*?LOCAL:(\d+)", ask("-res-usage", path))
    kernels = [row for row in usage if re.search("forward_kernel|backward_kernel", row[0])]
    assert len(kernels) == 2 * 3 * 8, "forward and backward, three dtypes, one to eight channels"
    spilled = [name for name, _, _, local in kernels if int(local)]
    functions = re.split(r"\n\s*Function : ", ask("-sass", path))[1:]
    assert spilled == []
    for text in functions:
        name = text.split("\n", 1)[0]
        if "block_kernel" in name:
            continue
        assert not re.search(r"\b(STL|LDL)\b", text), name
        assert re.search(r"LDG\.E\.(EF\.)?128", text), name
        assert re.search(r"STG\.E\.(EF\.)?128", text), name
        assert "MUFU.TANH" not in text, name


def test_the_persistent_kernel_does_not_spill_and_fits_a_multiprocessor() -> None:
    """One block of 256 threads a multiprocessor: 65,536 registers, 227 KB of shared memory."""
    path = str(cuda_extension())
    found = re.findall(
        r"Function (\S*block_kernel\S*):\s*\n\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", ask("-res-usage", path)
    )
    assert len(found) == 3 * 3 * 2, "dtypes of weights and of pages, one session and up to eight"
    for name, registers, stack, shared, local in found:
        assert (int(stack), int(local)) == (0, 0), name
        assert -(-int(registers) // 8) * 8 * 256 <= 65_536, name
        assert int(shared) + 226 * 1024 <= 227 * 1024, name  # what csrc/engine_plan.h lets a launch ask for beside it
    functions = [
        f for f in re.split(r"\n\s*Function : ", ask("-sass", path))[1:] if "block_kernel" in f.split("\n", 1)[0]
    ]
    assert len(functions) == len(found)
    for text in functions:
        name = text.split("\n", 1)[0]
        assert not re.search(r"\b(STL|LDL)\b", text), name
        assert re.search(r"LDG\.E\.NA\.128\.CONSTANT", text), name  # weights
        assert re.search(r"LDGSTS\.E\.BYPASS\.128", text), name  # keys and values on the way across a barrier
        assert re.search(r"LDS\.128", text), name
        assert "CCTL.E.PF2" in text, name  # weights asked for ahead
        assert not re.search(r"\b(RED|ATOM\w*)\.E\.ADD\.F", text), name  # no sums in an order of their own
