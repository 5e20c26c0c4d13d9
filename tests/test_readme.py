"""The README tells the truth: its tables are those of the files, its code runs, its commands exist."""

from __future__ import annotations

import functools
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from small import small_config

import flexlam_fast as ff

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


def test_the_commands_for_your_own_video_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As they stand there, but on small frames and for a few steps."""
    for module in ("av", "pyarrow", "PIL", "torchmetrics", "tyro"):
        pytest.importorskip(module)
    from flexlam_fast import cli

    section = README.split("## Your own video")[1].split("\n## ")[0]
    (block,) = re.findall(r"^```\n(.*?)```", section, re.S | re.M)
    commands = [shlex.split(line) for line in block.splitlines() if line.startswith("flexlam-fast ")]
    assert [words[1] for words in commands] == ["pack", "train", "reconstruct"]
    monkeypatch.chdir(tmp_path)
    small_config().to_json(tmp_path / "small.json")
    folder = commands[0][commands[0].index("--videos") + 1]
    for name in ("a.mp4", "b.mkv"):
        film_square(tmp_path / folder / name)
    quick = {
        "pack": "--size 16",
        "train": "--config small.json --steps 3 --batch 4 --device cpu",
        "reconstruct": "--device cpu",
    }
    for words in commands:
        cli.main([*words[1:], *quick[words[1]].split()])
    (picture,) = re.findall(r"^`(\S+strip\.png)`", section, re.M)
    assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")
    table = json.loads((tmp_path / picture).with_name("reconstruct.json").read_text())
    assert list(table["rows"]) == ["copy o_t", "k=0", "k=1", "k=2", "k=4"]
    (named,) = re.findall(r'LatentActionModel.from_pretrained\("(\S+)"\)', section)
    assert ff.LatentActionModel.from_pretrained(named).cfg == small_config()


def film_square(path: Path) -> None:
    """A video of a square that walks."""
    path.parent.mkdir(exist_ok=True)
    av = pytest.importorskip("av")
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        for t in range(12):
            picture = np.full((32, 48, 3), 40, np.uint8)
            picture[8:20, 2 * t : 2 * t + 12] = 220
            for packet in stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)


def test_the_commands_exist(capsys: pytest.CaptureFixture[str]) -> None:
    from flexlam_fast.cli import COMMANDS, TRAIN, main

    @functools.cache
    def help_of(*words: str) -> str:
        main([*words, "--help"])
        return capsys.readouterr().out

    text = "".join(page.read_text() for page in PAGES)
    for name in re.findall(r"flexlam-fast ([a-z]+)", text):
        assert name in COMMANDS
    for name in re.findall(r"flexlam-fast train ([a-z]+)", text):
        assert name in TRAIN
    for line in re.findall(r"(?:^|`)(flexlam-fast [a-z][^`\n]* --[^`\n]*)", text, re.M):
        words = line.split()
        depth = 3 if words[1] == "train" else 2
        shown, options = help_of(*words[1:depth]), words[depth:]
        if not options[0].startswith("--"):
            assert "positional arguments" in shown, f"{line}: every argument has a name"
            options = options[1:]
        for word in options:
            assert not word.startswith("--") or f"{word} " in shown or f"{word}," in shown, f"{line}: no {word}"
    make = (ROOT / "Makefile").read_text()
    for name in re.findall(r"^make ([a-z-]+)", text, re.M):
        assert f"\n{name}:" in make
