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


@pytest.mark.parametrize("stage", ["lam", "sequence", "translator", "joint", "all", "policy"])
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
        (["reconstruct", "nope", "--data", "x"], "nope: expected a directory or one of"),
        (["reconstruct", "--data", "x", "nope", "--seed", "1"], "nope: expected a directory or one of"),
        (["reconstruct", "nope/", "--checkpoint", "./nope", "--data", "x"], "nope: expected a directory or one of"),
        (
            ["reconstruct", "a", "--checkpoint", "b", "--data", "x"],
            "checkpoint: expected one, got 'a' and --checkpoint 'b'",
        ),
        (["rollout", "nope"], "nope: expected a directory or one of"),
        (["rollout", "a", "--checkpoint", "b"], "checkpoint: expected one, got 'a' and --checkpoint 'b'"),
        (["reconstruct", "--seed", "-1", "--data", "x"], "x/manifest.json: expected the manifest"),
        (["train", "policy", "--output", "run"], "run: expected a latent action model, .* flexlam-fast train lam "),
        (["train", "policy", "--output", "run", "--export-dtype", "int8"], "export_dtype: expected one of float32"),
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


def test_every_train_command_takes_the_lam_of_whatever_holds_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """From data without labels to a strip, and from one run to the next."""
    pytest.importorskip("pyarrow")
    from small import small_config, small_data

    monkeypatch.chdir(tmp_path)
    small_config().to_json(tmp_path / "small.json")
    small_data(tmp_path / "data", 6)
    steps = ["--steps", "2", "--batch", "4", "--validate-every", "1", "--save-every", "1", "--device", "cpu"]
    train = ["--data", "data", "--config", "small.json", *steps]
    assert end_of(["train", "sequence", *train, "--output", "run"]) == 2
    needed = "run: expected a latent action model, got a run without a checkpoint of stage lam"
    assert f"{needed}; flexlam-fast train lam --data DATA --output run makes it" in capsys.readouterr().err
    assert end_of(["train", "translator", *train, "--labels", "8", "--output", "run"]) == 2
    assert needed in capsys.readouterr().err
    assert end_of(["train", "lam", *train, "--output", "run"]) == 0
    for given, taken in (
        ("run", "run/lam/best (of best and last)"),
        ("run/lam", "run/lam/best (of best and last)"),
        ("run/lam/last", "run/lam/last"),
    ):
        capsys.readouterr()
        assert end_of(["reconstruct", given, "--data", "data", "--transitions", "4", "--budgets", "4"]) == 0
        assert capsys.readouterr().out.splitlines()[0] == f"a latent action model from {taken}"
    assert end_of(["train", "sequence", *train, "--lam", "run/lam", "--output", "next"]) == 0
    assert capsys.readouterr().out.splitlines()[0] == "a latent action model from run/lam/best (of best and last)"
    assert end_of(["train", "joint", *train, "--labels", "8", "--output", "run"]) == 0
    assert end_of(["train", "sequence", *train, "--output", "run"]) == 0
    assert "a latent action model from run/joint/best (of best and last)" in capsys.readouterr().out
    assert end_of(["rollout", "run"]) == 2
    assert "run: expected a policy, got a run of stages apart; flexlam-fast train policy" in capsys.readouterr().err
    assert end_of(["train", "policy", "--output", "run"]) == 0
    assert end_of(["train", "sequence", *train, "--lam", "run/policy", "--output", "third"]) == 0
    assert end_of(["train", "sequence", *train, "--lam", "run/sequence", "--output", "other"]) == 2
    assert "run/sequence/best: expected a latent action model, got a sequence model" in capsys.readouterr().err
    assert end_of(["train", "sequence", *train, "--lam", "vizdoom-tiny", "--output", "other"]) == 2
    assert "data: expected frames [64, 64, 3], got [16, 16, 3]" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()
