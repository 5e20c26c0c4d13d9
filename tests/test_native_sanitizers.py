"""The CPU engine built with sanitizers: no data race, nothing beyond what it was given, nothing undefined."""

from __future__ import annotations

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from native_cases import variants

ROOT = Path(__file__).resolve().parents[1]
COMPILER = shutil.which("g++")
WIDE = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mprefer-vector-width=512", "-Wno-maybe-uninitialized", "-mfma"]
TILES = [*WIDE, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"]
#: The sources of the engine that need flags of their own, as in CMakeLists.txt.
FLAGS = {
    "decode_avx2": ["-mavx2", "-mfma", "-mf16c"],
    "decode_avx512": WIDE,
    "decode_avx512_bf16": [*WIDE, "-mavx512bf16"],
    "append_amx": TILES,
    "prefill_amx": TILES,
    "encoder_amx": TILES,
}
PLAIN = ["decode_portable", "decode", "engine", "parallel", "prefill", "tile_support", "variants", "cpu_features"]

pytestmark = [
    pytest.mark.skipif(COMPILER is None, reason="g++ was not found"),
    pytest.mark.skipif("avx2" not in variants(), reason="these flags are for x86"),
]


def build(folder: Path, sanitizer: str) -> Path:
    """Compile the engine and its driver with a sanitizer; return the program."""
    common = [str(COMPILER), "-std=c++17", "-O1", "-g", f"-fsanitize={sanitizer}", "-DFLEXLAM_OWN_THREADS"]
    common += ["-DFLEXLAM_X86_VARIANTS", "-Wno-psabi", f"-I{ROOT / 'csrc'}"]
    # as in CMakeLists.txt, what any processor runs comes first: of equal inline functions the linker keeps the first
    sources = [(ROOT / "tests" / "native" / "engine_main.cpp", [])]
    sources += [(ROOT / "csrc" / f"{name}.cpp", FLAGS.get(name, [])) for name in [*PLAIN, *FLAGS]]

    def compile_one(source: tuple[Path, list[str]]) -> str:
        path, flags = source
        done = subprocess.run(
            [*common, *flags, "-c", str(path)], cwd=folder, capture_output=True, text=True, check=False
        )
        return done.stderr if done.returncode else ""

    with ThreadPoolExecutor(2) as pool:
        errors = [error for error in pool.map(compile_one, sources) if error]
    assert not errors, errors[0][-2000:]
    objects = [f"{path.stem}.o" for path, _ in sources]
    linked = subprocess.run(
        [*common, *objects, "-o", "engine", "-pthread", "-ldl"], cwd=folder, capture_output=True, text=True, check=False
    )
    if linked.returncode and "cannot find" in linked.stderr:
        pytest.skip(f"the library of the {sanitizer} sanitizer is not installed")
    assert linked.returncode == 0, linked.stderr[-2000:]
    return folder / "engine"


@pytest.mark.parametrize("sanitizer", ["thread", "address,undefined"])
def test_the_engine_has_no_finding(sanitizer: str, tmp_path: Path) -> None:
    program = build(tmp_path, sanitizer)
    environment = os.environ | {"TSAN_OPTIONS": "halt_on_error=0", "UBSAN_OPTIONS": "halt_on_error=1"}
    done = subprocess.run([program], capture_output=True, text=True, timeout=200, env=environment, check=False)
    if "unexpected memory mapping" in done.stderr:
        pytest.skip("the thread sanitizer does not run under this kernel's address randomisation")
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    assert done.stderr == ""
    assert done.stdout.endswith("done\n")
