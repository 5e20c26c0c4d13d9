"""Builds ``flexlam_fast._C`` with CMake; everything else about the package stands in ``pyproject.toml``.

Where a tool is missing, the package installs without the extension. Where the tools are there and the source does
not compile, the build fails: a package is never half installed.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def pybind11_include() -> Path | None:
    """Return the folder that holds ``pybind11/pybind11.h``: the package's own, else the copy that torch carries."""
    for package in ("pybind11", "torch"):
        spec = importlib.util.find_spec(package)
        for folder in spec.submodule_search_locations or () if spec else ():
            if (Path(folder) / "include" / "pybind11" / "pybind11.h").is_file():
                return Path(folder) / "include"
    return None


def missing_tool() -> str | None:
    """Name the first thing that is needed to compile the extension and is not here."""
    if not any(shutil.which(name) for name in (os.environ.get("CXX") or "c++", "c++", "g++", "clang++")):
        return "a C++ compiler"
    if not shutil.which("cmake"):
        return "cmake"
    if not shutil.which("ninja") and not shutil.which("make"):
        return "ninja"
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        return "Python's headers (Python.h)"
    return None if pybind11_include() else "pybind11"


def find_nvcc() -> tuple[Path | None, str]:
    """Return the CUDA compiler, or None and why the GPU part is left out (``FLEXLAM_BUILD_CUDA=0`` does)."""
    if os.environ.get("FLEXLAM_BUILD_CUDA") == "0":
        return None, "FLEXLAM_BUILD_CUDA=0"
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    places = [
        os.environ.get("CUDACXX"),
        *(f"{home}/bin/nvcc" for home in homes if home),
        "nvcc",
        "/usr/local/cuda/bin/nvcc",
    ]
    found = next((path for place in places if place and (path := shutil.which(place))), None)
    if found is None:
        return None, "nvcc was not found"
    told = subprocess.run(
        [found, "--version"], capture_output=True, encoding="utf-8", errors="replace", check=False
    ).stdout
    version = re.search(r"release (\d+)\.(\d+)", told)
    if version is None or int(version[1]) < 12:
        return None, f"sm_90a needs nvcc 12 or later, {found} is {version[0] if version else 'of no known version'}"
    return Path(found), ""


class CMakeBuild(build_ext):
    """Configure and build in ``build/cmake/<python>``, which is kept so that a second install compiles nothing."""

    def build_extension(self, ext: Extension) -> None:
        folder = ROOT / "build" / "cmake" / f"{sys.implementation.cache_tag}-{sysconfig.get_platform()}"
        self._drop_foreign_cache(folder)
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        nvcc, why = find_nvcc()
        if nvcc is None:
            print(f"flexlam_fast._C is built for the CPU only: {why}.", file=sys.stderr)
        configure = [
            "cmake",
            f"-S{ROOT}",
            f"-B{folder}",
            *(["-GNinja"] if shutil.which("ninja") else []),
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DFLEXLAM_PYBIND11_INCLUDE={self._stable_headers(folder)}",
            f"-DFLEXLAM_MODULE={target.name}",
            f"-DFLEXLAM_CUDA_COMPILER={nvcc or ''}",
        ]
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(folder), "--parallel"], check=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(folder / target.name, target)

    @staticmethod
    def _drop_foreign_cache(folder: Path) -> None:
        """CMake refuses a build folder that was made for a source folder elsewhere."""
        cache = folder / "CMakeCache.txt"
        if cache.is_file() and f"CMAKE_HOME_DIRECTORY:INTERNAL={ROOT}\n" not in cache.read_text(encoding="utf-8"):
            shutil.rmtree(folder)

    @staticmethod
    def _stable_headers(folder: Path) -> Path:
        """Copy pybind11's headers beside the build: pip hands them over in a new folder at every install."""
        include = pybind11_include()
        assert include is not None  # missing_tool() has looked
        copy = folder / "include"
        version = Path("pybind11", "detail", "common.h")
        if not (copy / version).is_file() or (copy / version).read_bytes() != (include / version).read_bytes():
            shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(include / "pybind11", copy / "pybind11")
        return copy


missing = missing_tool()
if missing and {"bdist_wheel", "build_ext", "editable_wheel"} & set(sys.argv):
    print(f"flexlam_fast installs without its native extension: {missing} was not found.", file=sys.stderr)

setup(
    ext_modules=[] if missing else [Extension("flexlam_fast._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
