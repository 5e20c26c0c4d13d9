"""Training in C++ under sanitizers: nothing beyond what it was given, nothing undefined, no data race."""

from __future__ import annotations

import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from native_cases import variants
from test_native_sanitizers import COMPILER, ROOT, TILES, WIDE

#: The sources that need flags of their own, as in CMakeLists.txt, and the others.
FLAGS = {
    "attention_train_avx2": ["-mavx2", "-mfma", "-mf16c"],
    "attention_train_avx512": WIDE,
    "attention_train_amx": TILES,
    "attention_train_amx_backward": TILES,
    "linear_train_amx": TILES,
    "prefill_amx": TILES,
}
PLAIN = ["attention_train", "attention_train_portable", "parallel", "tile_support", "variants", "cpu_features"]

pytestmark = [
    pytest.mark.skipif(COMPILER is None, reason="g++ was not found"),
    pytest.mark.skipif("avx2" not in variants(), reason="these flags are for x86"),
]


@pytest.mark.parametrize("sanitizer", ["thread", "address,undefined"])
def test_training_has_no_finding(sanitizer: str, tmp_path: Path) -> None:
    common = [str(COMPILER), "-std=c++17", "-O1", "-g", f"-fsanitize={sanitizer}", "-DFLEXLAM_OWN_THREADS"]
    common += ["-DFLEXLAM_X86_VARIANTS", "-Wno-psabi", f"-I{ROOT / 'csrc'}"]
    # as in CMakeLists.txt, what any processor runs comes first: of equal inline functions the linker keeps the first
    sources = [(ROOT / "tests" / "native" / "train_main.cpp", [])]
    sources += [(ROOT / "csrc" / f"{name}.cpp", FLAGS.get(name, [])) for name in [*PLAIN, *FLAGS]]

    def run(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, **options)  # type: ignore[call-overload, no-any-return]

    with ThreadPoolExecutor(2) as pool:
        done = list(pool.map(lambda source: run([*common, *source[1], "-c", str(source[0])]), sources))
    assert not any(d.returncode for d in done), "".join(d.stderr for d in done)[-2000:]
    linked = run([*common, *(f"{path.stem}.o" for path, _ in sources), "-o", "train", "-pthread", "-ldl"])
    if linked.returncode and "cannot find" in linked.stderr:
        pytest.skip(f"the library of the {sanitizer} sanitizer is not installed")
    assert linked.returncode == 0, linked.stderr[-2000:]
    environment = os.environ | {"TSAN_OPTIONS": "halt_on_error=0", "UBSAN_OPTIONS": "halt_on_error=1"}
    found = run([str(tmp_path / "train")], timeout=200, env=environment)
    if "unexpected memory mapping" in found.stderr:
        pytest.skip("the thread sanitizer does not run under this kernel's address randomisation")
    assert found.returncode == 0, (found.stdout + found.stderr)[-3000:]
    assert (found.stdout, found.stderr) == ("done\n", "")
