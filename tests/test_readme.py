"""The README tells the truth: its tables are those of the files, its code runs, its commands exist."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def test_the_tables_are_those_of_the_files() -> None:
    done = subprocess.run([sys.executable, "bench/report.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("number", range(4))
def test_the_examples_run(number: int) -> None:
    pytest.importorskip("vizdoom")
    code = re.findall(r"```python\n(.*?)```", README, re.S)
    assert len(code) == 4
    known = {"__name__": "example"}
    if number == 3:  # goes on where the one before it ends
        exec(compile(code[2], "README example 2", "exec"), known)
    exec(compile(code[number], f"README example {number}", "exec"), known)


def test_the_example_of_deciding_runs() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "deciding.md").read_text(), re.S)
    exec(compile(code, "example of docs/deciding.md", "exec"), {"__name__": "example"})


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


def test_the_commands_exist() -> None:
    from flexlam_fast.cli import COMMANDS, TRAIN

    text = "".join(page.read_text() for page in PAGES)
    for name in re.findall(r"flexlam-fast ([a-z]+)", text):
        assert name in COMMANDS
    for name in re.findall(r"flexlam-fast train ([a-z]+)", text):
        assert name in TRAIN
    for line in re.findall(r"(?:^|`)(flexlam-fast [a-z][^`\n]* --[^`\n]*)", text, re.M):
        words = line.split()
        depth = 3 if words[1] == "train" else 2
        help_of = [sys.executable, "-m", "flexlam_fast", *words[1:depth], "--help"]
        shown = subprocess.run(help_of, capture_output=True, text=True, check=True).stdout
        assert words[depth].startswith("--"), f"{line}: every argument has a name"
        for word in words[depth:]:
            assert not word.startswith("--") or f"{word} " in shown or f"{word}," in shown, f"{line}: no {word}"
    make = (ROOT / "Makefile").read_text()
    for name in re.findall(r"^make ([a-z-]+)", text, re.M):
        assert f"\n{name}:" in make
