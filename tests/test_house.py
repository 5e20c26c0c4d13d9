"""House rules that a reader should not have to check: sizes, docstrings, no pickle, no paths of one machine."""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import flexlam_fast

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted([*(ROOT / "flexlam_fast").rglob("*.py"), *(ROOT / "kernels").rglob("*.py"), ROOT / "setup.py"])
MAX_FILE_LINES, MAX_FUNCTION_LINES = 400, 50  # as CONTRIBUTING.md says
Function = ast.FunctionDef | ast.AsyncFunctionDef


def source_id(path: Path) -> str:
    return str(path.relative_to(ROOT))


def functions(path: Path) -> Iterator[Function]:
    yield from (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, Function))


def body_lines(node: Function) -> int:
    """Count the lines of a function without its docstring: explaining is free."""
    first = node.body[1] if ast.get_docstring(node) and len(node.body) > 1 else node.body[0]
    return (node.end_lineno or 0) - first.lineno + 1


@pytest.mark.parametrize("path", SOURCES, ids=source_id)
def test_files_and_functions_are_small(path: Path) -> None:
    lines = len(path.read_text().splitlines())
    assert lines <= MAX_FILE_LINES, f"{lines} lines"
    long = {node.name: body_lines(node) for node in functions(path) if body_lines(node) > MAX_FUNCTION_LINES}
    assert not long


@pytest.mark.parametrize("path", SOURCES, ids=source_id)
def test_files_and_public_names_have_docstrings(path: Path) -> None:
    tree = ast.parse(path.read_text())
    assert not path.read_text().strip() or ast.get_docstring(tree), "no docstring of the file"
    public = [node for node in tree.body if isinstance(node, (Function, ast.ClassDef)) and node.name[0] != "_"]
    assert [node.name for node in public if not ast.get_docstring(node)] == []


@pytest.mark.parametrize("path", SOURCES, ids=source_id)
def test_no_pickle_and_no_environment_variable_selects_code(path: Path) -> None:
    text = path.read_text()
    assert not re.search(r"^\s*(import|from) (pickle|dill|cloudpickle|joblib)\b", text, re.M)
    assert not re.search(r"(?<!safetensors\.)\btorch\.(load|save)\(", text)
    if path.name != "setup.py":
        assert not re.search(r"\bos\.(environ|getenv)\b", text)


def calls_that_follow_the_locale(path: Path) -> list[str]:
    """Calls that read or write text in whatever encoding the user's locale has, with their lines."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        given = {keyword.arg for keyword in node.keywords}
        modes = [a.value for a in node.args if isinstance(a, ast.Constant) and re.fullmatch("[rwxabt+]+", str(a.value))]
        text = name in ("read_text", "write_text") or (name == "open" and isinstance(node.func, ast.Name))
        text |= name in ("open", "fdopen") and bool(modes)
        if (text and not any("b" in str(mode) for mode in modes)) or {"text", "universal_newlines"} & given:
            found += [f"line {node.lineno}: {name}"] if "encoding" not in given else []
    return found


@pytest.mark.parametrize("path", [*SOURCES, *sorted((ROOT / "bench").rglob("*.py"))], ids=source_id)
def test_no_file_is_read_or_written_in_the_locales_encoding(path: Path) -> None:
    assert calls_that_follow_the_locale(path) == []


def test_no_file_names_a_place_on_one_machine() -> None:
    suffixes = {".py", ".pyi", ".toml", ".md", ".txt", ".cpp", ".h", ".sh", ".in", ".json", ""}
    folders = (".ci", "bench", "csrc", "docs", "flexlam_fast", "kernels", "tests")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.suffix in suffixes]
    files += [path for path in ROOT.iterdir() if path.suffix in suffixes]
    seen = 0
    for path in files:
        if path.is_file() and "__pycache__" not in path.parts and path.name != "_vizdoom":
            seen += 1
            found = re.search(r"(?<![\w.])/(work|root|home|tmp)/\w+", path.read_text(errors="replace"))
            assert not found, f"{path.relative_to(ROOT)}: {found and found[0]}"
    assert seen > 20


def test_every_package_is_listed_for_installation() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    listed = set(project["tool"]["setuptools"]["packages"])
    found = {".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "flexlam_fast").rglob("__init__.py")}
    assert listed == found | {"flexlam_fast.kernels"}


def test_the_core_needs_four_packages_and_torch_is_pinned_for_the_tests() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = {re.split(r"[<>=; \[]", need)[0] for need in project["dependencies"]}
    assert names == {"numpy", "safetensors", "torch", "tqdm"}
    every = [need for extra in project["optional-dependencies"].values() for need in extra]
    assert not [need for need in every if need.startswith("torchvision")]
    assert "torch==2.13.0" in (ROOT / "constraints.txt").read_text().split()
    assert re.fullmatch(r"\d+\.\d+\.\d+", flexlam_fast.__version__)
