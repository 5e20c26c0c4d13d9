"""The package builds, installs and imports elsewhere; without a compiler it is pure, with broken source it fails."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LEFT_BEHIND = ("build", "dist", "out", "__pycache__", "*.so", "*.egg-info", ".*", "_vizdoom*")
COMPILES = (
    bool(shutil.which("cmake") and shutil.which("c++")) and Path(sysconfig.get_path("include"), "Python.h").exists()
)

CHECK = """
import pathlib, sys
import flexlam_fast as ff, flexlam_fast.kernels
here = pathlib.Path(ff.__file__).parent
assert here == pathlib.Path(sys.argv[1]) / "flexlam_fast", here
assert pathlib.Path(flexlam_fast.kernels.__file__).parent == here / "kernels"
assert (here / "py.typed").is_file()
ff.FlexLAMConfig.preset("tiny"), ff.ops, ff.Policy, ff.LatentActionModel
assets = sorted(str(path.relative_to(here)) for path in here.glob("assets/**/*") if path.is_file())
print(*assets)
try:
    from flexlam_fast import _C
except ImportError:
    print("pure")
else:
    assert pathlib.Path(_C.__file__).parent == here
    print(len(_C.cpu_features()), "instruction sets")
    import torch
    z, keep, null = torch.randn(5, 7, 4), torch.tensor([0, 3, 7, 1, 2]), torch.zeros(4)
    native, reference = (ff.ops.fsq(z, (8, 5, 5, 5), keep, null, backend=b) for b in ("native", "reference"))
    assert all(map(torch.equal, native, reference))
"""


def find_nvcc() -> tuple[Path | None, str]:
    """What ``setup.py`` finds, without running the rest of it."""
    functions, found = (
        (ROOT / "setup.py").read_text().split("\nmissing = missing_tool()")[0],
        {"__file__": str(ROOT / "setup.py")},
    )
    exec(compile(functions, "setup.py", "exec"), found)
    return found["find_nvcc"]()  # type: ignore[operator]


def run(*command: str, cwd: Path, path: str | None = None) -> subprocess.CompletedProcess[str]:
    # the CUDA part takes minutes; tests/test_compiled.py looks at that of the extension in use
    environment = {**os.environ, "FLEXLAM_BUILD_CUDA": "0", **({} if path is None else {"PATH": path, "CXX": ""})}
    environment.pop("PYTHONPATH", None)
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=240)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the source tree without anything that was built in it."""
    copy = tmp_path_factory.mktemp("source") / "flexlam-fast"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(*LEFT_BEHIND))
    return copy


@pytest.fixture(scope="module")
def dist(source: Path) -> Path:
    """The folder with the sdist, and the wheel that was built from that sdist."""
    done = run(sys.executable, "-m", "build", "--no-isolation", "--outdir", str(source / "dist"), ".", cwd=source)
    assert done.returncode == 0, done.stdout + done.stderr
    return source / "dist"


@pytest.mark.timeout(300)
def test_the_sdist_carries_what_a_build_needs(dist: Path, source: Path) -> None:
    (archive,) = dist.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        held = {name.split("/", 1)[1] for name in file.getnames() if "/" in name}
    wanted = {"CMakeLists.txt", "LICENSE", "README.md", "constraints.txt", "pyproject.toml", "setup.py"}
    for folder in ("csrc", "kernels", "flexlam_fast"):
        wanted |= {str(path.relative_to(source)) for path in (source / folder).rglob("*") if path.is_file()}
    built = {name for name in held if name.endswith((".so", ".pyc"))}
    assert wanted <= held, sorted(wanted - held)
    assert not built


@pytest.mark.timeout(300)
def test_the_wheel_installs_into_an_empty_environment_and_imports_elsewhere(dist: Path, tmp_path: Path) -> None:
    (wheel,) = dist.glob("*.whl")
    assert wheel.name.endswith("none-any.whl") != COMPILES
    home = tmp_path / "environment"
    assert run(sys.executable, "-m", "venv", "--without-pip", str(home), cwd=tmp_path).returncode == 0
    python = home / "bin" / "python"
    install = ("-m", "pip", "--python", str(python), "install", "--no-deps", "--no-index", str(wheel))
    done = run(sys.executable, *install, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (site,) = home.glob("lib/python*/site-packages")
    # Appended after the environment's own folder, and as a plain path: .pth files in it, such as the one of an
    # editable install, are not read. The dependencies come from there, the package does not.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    done = run(str(python), "-c", CHECK, str(site), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assets, extension = done.stdout.splitlines()
    assert assets.split() == sorted(
        str(path.relative_to(ROOT / "flexlam_fast"))
        for path in (ROOT / "flexlam_fast" / "assets").rglob("*")
        if path.is_file()
    )
    assert (extension != "pure") == COMPILES
    with zipfile.ZipFile(wheel) as file:
        binaries = [file.read(name) for name in file.namelist() if name.endswith(".so")]
    assert [b"sm_90a" in binary for binary in binaries] == [False] * COMPILES
    assert (home / "bin" / "flexlam-fast").is_file()


def test_without_a_compiler_the_wheel_is_pure_and_one_sentence_says_so(source: Path, tmp_path: Path) -> None:
    done = run(sys.executable, "setup.py", "-q", "bdist_wheel", "-d", str(tmp_path), cwd=source, path="")
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as file:
        assert not [name for name in file.namelist() if name.endswith(".so")]
        assert "flexlam_fast/kernels/__init__.py" in file.namelist()
    sentence = "flexlam_fast installs without its native extension: a C++ compiler was not found."
    assert done.stderr.count("without its native extension") == done.stderr.count(sentence) == 1


def test_nvcc_is_found_where_it_stands_and_one_sentence_says_why_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("FLEXLAM_BUILD_CUDA", "CUDACXX", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "bin").mkdir()
    fake = tmp_path / "bin" / "nvcc"

    def tells(version: str) -> None:
        fake.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, {version}'\n")
        fake.chmod(0o755)

    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    tells("release 13.0, V13.0.88")
    assert find_nvcc() == (fake, "")
    tells("release 11.8, V11.8.89")
    assert find_nvcc() == (None, f"sm_90a needs nvcc 12 or later, {fake} is release 11.8")
    monkeypatch.setenv("FLEXLAM_BUILD_CUDA", "0")
    assert find_nvcc() == (None, "FLEXLAM_BUILD_CUDA=0")


@pytest.mark.skipif(not COMPILES, reason="no C++ compiler, cmake or Python headers")
def test_without_nvcc_the_extension_is_built_for_the_cpu_and_one_sentence_says_so(source: Path, tmp_path: Path) -> None:
    copy = tmp_path / "source"
    shutil.copytree(source, copy, ignore=shutil.ignore_patterns("build", "dist", "*.egg-info"))
    environment = {**os.environ, "FLEXLAM_BUILD_CUDA": "0"}
    command = (sys.executable, "setup.py", "-q", "build_ext", "--inplace")
    done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("flexlam_fast._C is built for the CPU only: FLEXLAM_BUILD_CUDA=0.") == 1
    (binary,) = (copy / "flexlam_fast").glob("_C*.so")
    assert b"sm_90a" not in binary.read_bytes()


@pytest.mark.skipif(not COMPILES, reason="no C++ compiler, cmake or Python headers")
def test_source_that_does_not_compile_fails_the_build(source: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(source, broken, ignore=shutil.ignore_patterns("build", "dist", "*.egg-info"))
    with open(broken / "csrc" / "cpu_features.cpp", "a") as file:
        file.write("#error this line is meant to fail\n")
    done = run(sys.executable, "setup.py", "-q", "bdist_wheel", "-d", str(tmp_path / "wheels"), cwd=broken)
    assert done.returncode != 0
    assert "this line is meant to fail" in done.stdout + done.stderr
    assert not list(tmp_path.glob("wheels/*.whl"))
