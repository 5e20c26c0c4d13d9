"""What commands print: on every terminal, and with a status that does not lie where it was lost."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from flexlam_fast import cli
from flexlam_fast.errors import FlexLAMError
from flexlam_fast.terminal import guarded_output, plain

ASCII = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": ""}
#: Stands for a command: prints what tables hold, and a bar.
TABLE = r"""
import sys
from flexlam_fast import cli
def table(*_):
    from tqdm import tqdm
    for _ in tqdm(range(3), desc="\u00e9\u00b1"):
        pass
    print("return \u00b1 95% CI, 8\u00d78, \udcff, na\u00efve \u2014 \u732b")
cli._dispatch = table
cli.main(["doctor"])
"""


def run(code: str, **options: Any) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([sys.executable, "-c", code], timeout=60, check=False, **{"capture_output": True, **options})


def test_a_table_and_a_bar_in_an_ascii_terminal() -> None:
    done = run(TABLE, env=ASCII)
    assert done.returncode == 0, done.stderr
    assert done.stdout == rb"return +/- 95% CI, 8x8, \xff, naive - ?" + b"\n"
    assert b"e+/-: 100%" in done.stderr
    assert done.stderr.isascii()


def test_a_terminal_that_has_the_characters_gets_them() -> None:
    done = run(TABLE, env={**os.environ, "PYTHONIOENCODING": "utf-8:strict"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.decode() == "return \u00b1 95% CI, 8\u00d78, \\xff, na\u00efve \u2014 \u732b\n"
    assert "é±: 100%" in done.stderr.decode()


def test_every_character_has_a_plain_form() -> None:
    text = "".join(map(chr, [*range(0x3000), 0xDC80, 0xDCFF, 0x1F600]))
    assert plain(text).isascii()
    assert plain("a\n±") == "a\n+/-"


def status(code: str, **options: Any) -> tuple[int, str]:
    done = run(code, **options)
    return done.returncode, (done.stderr or b"").decode()


HELP = "from flexlam_fast.cli import main; main(['--help'])"
LOST = "flexlam-fast: standard output: expected to write it, got: No space left on device\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device that is always full is Linux's")
@pytest.mark.parametrize("flags", [[], ["-u"]])
def test_a_full_disk_under_standard_output(flags: list[str]) -> None:
    with open("/dev/full", "w", encoding="utf-8") as full:
        command = [sys.executable, *flags, "-c", HELP]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, encoding="utf-8", check=False)
    assert (done.returncode, done.stderr) == (2, LOST)


@pytest.mark.parametrize("flags", [[], ["-u"]])
def test_a_reader_that_is_gone(flags: list[str]) -> None:
    """As for ``flexlam-fast ... | head``: the status of a program that SIGPIPE ends, and not a word."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, *flags, "-c", HELP]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, encoding="utf-8", check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


def test_closed_streams() -> None:
    """No file of a command may take the number of a standard stream, or what is printed lands in the file."""
    shell = 'exec "$0" -c "$1" '
    call = ["sh", "-c", shell + ">&-", sys.executable, HELP]
    done = subprocess.run(call, capture_output=True, encoding="utf-8", check=False)
    assert (done.returncode, done.stderr) == (2, "flexlam-fast: standard output: expected it open, got it closed\n")
    code = (
        "import os, sys; from flexlam_fast import cli\n"
        "cli._dispatch = lambda *_: print(os.open('.', 0) > 2, sys.stdin.read() == '', file=sys.stdout)\n"
        "cli.main(['doctor'])"
    )
    call = ["sh", "-c", shell + "<&- 2>&-", sys.executable, code]
    done = subprocess.run(call, stdout=subprocess.PIPE, encoding="utf-8", check=False)
    assert (done.returncode, done.stdout) == (0, "True True\n")


class Failing(io.StringIO):
    """A stream that takes nothing, until it does."""

    failing = True

    def write(self, text: str) -> int:
        if self.failing:
            raise OSError(28, "No space left on device")
        return super().write(text)


def end_of(monkeypatch: pytest.MonkeyPatch, command: Any) -> int:
    monkeypatch.setattr(cli, "_dispatch", command)
    try:
        cli.main(["doctor"])
    except SystemExit as stop:
        return int(str(stop.code))
    return 0


def test_an_error_that_a_command_swallowed_is_still_lost_output(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def careless(*_: object) -> None:
        try:
            print("text")
        except OSError:
            sys.stdout.failing = False  # type: ignore[attr-defined]

    monkeypatch.setattr(sys, "stdout", stream := Failing())
    monkeypatch.setattr(stream, "failing", True)
    assert end_of(monkeypatch, careless) == 2
    assert capsys.readouterr().err == LOST


def test_other_errors_of_the_system_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pipe of somebody else's that breaks is not taken for the terminal's."""

    def broken(*_: object) -> None:
        raise BrokenPipeError(32, "Broken pipe")

    streams = sys.stdout, sys.stderr
    with pytest.raises(BrokenPipeError):
        end_of(monkeypatch, broken)
    assert (sys.stdout, sys.stderr) == streams


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("Unable to allocate 3. TiB for an array"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
        RuntimeError("CUDA out of memory. Tried to allocate 3 TiB"),
    ],
)
def test_too_little_memory_is_one_sentence(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def large(*_: object) -> None:
        raise error

    assert end_of(monkeypatch, large) == 2
    said = capsys.readouterr().err
    assert said.startswith("flexlam-fast: memory: expected enough for this command, got: ")
    assert len(said.splitlines()) == 1


def test_an_error_decides_the_status_it_ends_with(monkeypatch: pytest.MonkeyPatch) -> None:
    from flexlam_fast.train.loop import Interrupted

    def stop(error: FlexLAMError) -> Any:
        def command(*_: object) -> None:
            raise error

        return command

    assert end_of(monkeypatch, stop(FlexLAMError("a: expected b, got c"))) == 2
    assert end_of(monkeypatch, stop(Interrupted("lam: told to end at step 3"))) == 143


def test_streams_are_put_back() -> None:
    before = sys.stdout, sys.stderr, sys.stdout.errors
    with guarded_output() as output:
        assert sys.stdout is output.stdout  # type: ignore[comparison-overlap]
        print("text")
    assert output.lost() is None
    assert (sys.stdout, sys.stderr, sys.stdout.errors) == before
