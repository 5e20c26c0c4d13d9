"""The command line: what it prints, and how it ends."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from flexlam_fast import __version__, cli
from flexlam_fast.errors import DataError

pytest.importorskip("tyro")


def end_of(arguments: list[str]) -> int:
    """Run a command in this process and return its exit code."""
    try:
        cli.main(arguments)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    return 0


def program(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=120, check=False)


def test_as_a_program() -> None:
    done = program("-m", "flexlam_fast", "rollout", "--checkpoint", "no-such-model")
    assert done.returncode == 2
    assert done.stderr.startswith("flexlam-fast: no-such-model: expected a directory or one of")
    assert len(done.stderr.splitlines()) == 1


def test_overview_loads_nothing_heavy() -> None:
    code = (
        "import sys, flexlam_fast.cli as c; c.main(['--help']); c.main(['--version']);"
        "print(sorted({'torch', 'numpy', 'tyro', 'vizdoom', 'matplotlib'} & set(sys.modules)))"
    )
    done = program("-c", code)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[-1] == "[]"
    assert lines[-2] == f"flexlam-fast {__version__}"
    for name in cli.COMMANDS:
        assert any(line.startswith(f"  {name} ") for line in lines)


@pytest.mark.parametrize("name", list(cli.COMMANDS))
def test_every_command_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert end_of([name, "--help"]) == 0
    said = capsys.readouterr().out
    assert f"usage: flexlam-fast {name}" in said
    assert len(said.splitlines()) > 5


@pytest.mark.parametrize("stage", ["lam", "sequence", "translator", "joint", "all"])
def test_every_stage_has_help(stage: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert end_of(["train", stage, "--help"]) == 0
    assert f"usage: flexlam-fast train {stage}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["colect"], "command: expected one of demo, .* got 'colect'; did you mean collect?"),
        (["xyzzy"], "command: expected one of demo, .* got 'xyzzy'"),
        (["rollout", "--dtype", "int8"], "dtype: expected one of float32, bfloat16, float16, got 'int8'"),
        (["rollout", "--device", "warp"], "device: expected one that this machine has, got 'warp'"),
        (["reconstruct", "--checkpoint", "nope", "--data", "x"], "nope: expected a directory or one of"),
        (["collect", "--output", "x", "--scenarios", "doom"], "scenarios: expected some of"),
        (["pack", "--videos", "x", "--output", "y", "--size", "0"], "size: expected an integer in 1..4096, got 0"),
    ],
)
def test_mistakes_are_one_sentence(
    arguments: list[str],
    sentence: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert end_of(arguments) == 2
    said = capsys.readouterr().err
    assert said.startswith("flexlam-fast: ")
    assert len(said.splitlines()) == 1
    assert re.search(sentence.replace("?", r"\?"), said)
    assert not list(tmp_path.iterdir())


def test_arguments_arrive(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("vizdoom")
    from flexlam_fast.evaluate import demo as module

    calls: list[tuple[str, ...]] = []

    def stop(*given: str) -> None:
        calls.append(given)
        raise DataError("far enough")

    monkeypatch.setattr(module, "load_policy", stop)
    assert end_of(["demo", "--checkpoint", "abc", "--device", "cpu", "--budgets", "1", "4"]) == 2
    assert calls == [("abc", "cpu")]


def test_parse_errors_end_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert end_of(["collect"]) == 2
    assert "--output" in capsys.readouterr().err
    assert end_of(["rollout", "--budgets", "many"]) == 2


def test_interrupt_ends_with_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_dispatch", interrupted)
    assert end_of(["doctor"]) == 130
    assert capsys.readouterr().err.strip() == "flexlam-fast: stopped"


def test_sigterm_closes_what_is_open(monkeypatch: pytest.MonkeyPatch) -> None:
    closed = []

    def terminated(*_: object) -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        finally:
            closed.append(True)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(cli, "_dispatch", terminated)
    assert end_of(["doctor"]) == 143
    assert closed == [True]
    assert signal.getsignal(signal.SIGTERM) is before


def test_other_errors_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("a fault of ours")

    monkeypatch.setattr(cli, "_dispatch", broken)
    with pytest.raises(ZeroDivisionError):
        cli.main(["doctor"])


def test_without_tyro_one_sentence(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "tyro", None)
    assert end_of(["doctor"]) == 2
    assert capsys.readouterr().err == (
        'flexlam-fast: tyro: expected it installed, got none; pip install "flexlam_fast[demo]"\n'
    )


def test_reconstruct_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("pyarrow")
    from flexlam_fast.config import FlexLAMConfig
    from flexlam_fast.data.store import EpisodeWriter
    from flexlam_fast.policy import Policy

    Policy(FlexLAMConfig.preset("tiny")).save_pretrained(tmp_path / "model")
    with EpisodeWriter(tmp_path / "data", (64, 64, 3), ()) as writer:
        film = np.random.default_rng(0).integers(0, 256, (6, 64, 64, 3), dtype=np.uint8)
        writer.add(film, None, None, "noise", "test")
    folder = str(tmp_path / "out")
    given = ["--checkpoint", str(tmp_path / "model"), "--data", str(tmp_path / "data"), "--output", folder]
    assert end_of(["reconstruct", *given, "--budgets", "0", "16"]) == 0
    said = capsys.readouterr().out
    assert all(label in said for label in ("copy o_t", "k=0", "k=16", "5 held-out transitions"))
    assert "k=4" not in said
    assert sorted(p.name for p in Path(folder).iterdir()) == ["reconstruct.json", "reconstruct.md", "strip.png"]
