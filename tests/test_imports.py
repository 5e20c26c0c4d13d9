"""The house's one-way street: which file may import which, and what a bare import loads."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
STAGES = ("encoder", "bottleneck", "decoder", "flow", "translator", "sequence")
#: From left to right; a file imports its own row and those before it, a stage only those before it.
ROWS = (
    (
        "config",
        "presets",
        "types",
        "values",
        "fields",
        "checks",
        "errors",
        "ambient",
        "backend",
        "capture",
        "manifest",
        "ranges",
    ),
    ("ops",),
    ("layers",),
    STAGES,
    (
        "lam",
        "deadline",
        "loop",
        "graphs",
        "pretrained",
        "policy",
        "checkpoint",
        "run_folder",
        "provenance",
        "originals",
        "swapped",
        "greedy",
        "qwen_obstacles",
        "accelerate_fsq",
        "accelerate_qwen",
        "accelerate",
    ),
    ("data", "train", "evaluate", "report", "testing", "doctor"),
    ("terminal", "cli", "__main__"),
)
RANK = {unit: rank for rank, row in enumerate(ROWS) for unit in row}


def imported(path: Path) -> Iterator[str]:
    """Yield the full name of everything that a file imports, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


PACKAGE = sorted(path for path in (ROOT / "flexlam_fast").rglob("*.py") if path != ROOT / "flexlam_fast/__init__.py")


@pytest.mark.parametrize("path", PACKAGE, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_imports_only_leftward(path: Path) -> None:
    unit = path.relative_to(ROOT / "flexlam_fast").parts[0].removesuffix(".py")
    for name in imported(path):
        parts = name.split(".")
        if parts[0] != "flexlam_fast" or parts[1:] in ([], ["__version__"]):
            continue
        native = parts[1] in ("_C", "kernels")
        assert not native or path.match("ops/contracts.py") or (unit, parts[1]) == ("doctor", "_C"), name
        if not native and parts[1] != unit:
            assert RANK[parts[1]] <= RANK[unit] - (unit in STAGES), f"{unit} imports {name}"


def test_every_part_of_the_package_has_a_place_in_the_order() -> None:
    units = {path.relative_to(ROOT / "flexlam_fast").parts[0].removesuffix(".py") for path in PACKAGE}
    assert units <= set(RANK)
    assert {"ops", "layers", "checkpoint", *STAGES} <= units


def test_nothing_imports_the_kernels_under_the_name_of_another_package() -> None:
    folders = ("flexlam_fast", "kernels", "tests", "bench")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    assert len(files) > 10
    for path in [*files, ROOT / "setup.py"]:
        assert not [name for name in imported(path) if name.split(".")[0] == "kernels"], path


BARE = """
import sys
import numpy, safetensors.torch, torch, tqdm
before = set(sys.modules)
import flexlam_fast as ff
ff.FlexLAMConfig, ff.ops, ff.Decision, ff.errors
for name in ff.__all__:
    assert name in dir(ff), name
loaded = {name.split(".")[0] for name in set(sys.modules) - before}
heavy = {"av", "gymnasium", "matplotlib", "nvtx", "pyarrow", "tensorboard", "torchmetrics", "transformers", "triton"}
heavy.add("tyro")
assert not loaded & (heavy | {"vizdoom", "pandas", "PIL"}), loaded
assert "flexlam_fast._C" not in sys.modules and "flexlam_fast.kernels" not in sys.modules
assert not torch.cuda.is_initialized()
try:
    ff.nothing
except AttributeError as error:
    assert "nothing" in str(error)
else:
    raise AssertionError("an unknown name was found")
for name in ff.__all__:
    getattr(ff, name)
loaded = {name.split(".")[0] for name in set(sys.modules) - before}
assert not loaded & (heavy | {"vizdoom", "pandas", "PIL"}), loaded
print("fine", ff.__version__)
"""


def test_a_bare_import_loads_no_extra_no_extension_and_no_gpu() -> None:
    done = subprocess.run([sys.executable, "-c", BARE], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("fine ")
