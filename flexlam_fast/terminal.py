"""What a command prints arrives, whatever the terminal's encoding, and lost output does not end as a success."""

from __future__ import annotations

import codecs
import contextlib
import io
import os
import signal
import sys
import unicodedata
from collections.abc import Iterator
from typing import Any, NamedTuple, TextIO, cast

from flexlam_fast.errors import StorageError

#: What characters that have no ASCII in them are written as, where the terminal lacks them.
_PLAIN = {
    **dict.fromkeys("─━═╌", "-"),
    **dict.fromkeys("│┃║", "|"),
    **dict.fromkeys("╭╮╰╯┌┐└┘├┤┬┴┼", "+"),
    **dict.fromkeys("▏▎▍▌▋▊▉█", "#"),
    **dict.fromkeys("\u2018\u2019", "'"),
    **dict.fromkeys("\u201c\u201d", '"'),
    **dict.fromkeys("\u2013\u2014\u2212", "-"),
    "±": "+/-",
    "\u00d7": "x",
    "µ": "u",
    "μ": "u",
    "≥": ">=",
    "≤": "<=",
    "→": "->",
    "•": "*",
}
_HANDLER = "flexlam-plain"


def plain(text: str) -> str:
    """Write text in ASCII: ``±`` as ``+/-``, no accents, bytes of undecodable names as ``\\xff``, the rest as ``?``."""
    return "".join(c if c.isascii() else _PLAIN.get(c) or _nearest(c) for c in text)


def _nearest(character: str) -> str:
    if "\udc80" <= character <= "\udcff":
        return f"\\x{ord(character) - 0xDC00:02x}"
    return "".join(c for c in unicodedata.normalize("NFKD", character) if c.isascii()) or "?"


def _encode(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return plain(error.object[error.start : error.end]), error.end


codecs.register_error(_HANDLER, _encode)


class _Guarded:
    """A standard stream that remembers the first error of a write: an error by itself does not say whose it is."""

    def __init__(self, stream: TextIO, name: str) -> None:
        self._stream, self._name = stream, name
        self.error: OSError | None = None

    def write(self, text: str) -> int:
        """Write to the stream."""
        with self._watched():
            return self._stream.write(text)

    def flush(self) -> None:
        """Flush the stream."""
        with self._watched():
            self._stream.flush()

    @contextlib.contextmanager
    def _watched(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.error = self.error or error
            raise

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def drop(self) -> StorageError | int | None:
        """Send what the stream still holds to the null device if it failed, and say how; None if it did not."""
        if self.error is None:
            return None
        with contextlib.suppress(OSError, ValueError):
            _mute(self._stream.fileno())
            self._stream.flush()
        if isinstance(self.error, BrokenPipeError):
            return 128 + signal.SIGPIPE
        return StorageError(f"{self._name}: expected to write it, got: {self.error.strerror or self.error}")


class Output(NamedTuple):
    """The standard streams of a command."""

    stdout: _Guarded
    stderr: _Guarded

    def lost(self) -> StorageError | int | None:
        """What became of output that was not written.

        Returns:
            The exit status 141 where the reader is gone, as for ``| head``; the sentence to print where there was no
            room; None where everything was written.
        """
        failures = [stream.drop() for stream in self]
        return next((failure for failure in failures if failure is not None), None)


@contextlib.contextmanager
def guarded_output() -> Iterator[Output]:
    """In the block, stdout and stderr write as :func:`plain` has it what they cannot encode, and note lost output."""
    streams = sys.stdout, sys.stderr
    errors = [getattr(stream, "errors", None) for stream in streams]
    for stream in streams:
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=_HANDLER)
    output = Output(_Guarded(streams[0], "standard output"), _Guarded(streams[1], "standard error"))
    sys.stdout, sys.stderr = (cast(TextIO, stream) for stream in output)
    try:
        yield output
    finally:
        sys.stdout, sys.stderr = streams
        for stream, before in zip(streams, errors, strict=True):
            if isinstance(stream, io.TextIOWrapper):
                with contextlib.suppress(OSError, ValueError):  # broken or closed: nobody writes to it again
                    stream.reconfigure(errors=before)


def check_streams() -> None:
    """Make sure that the three standard streams are open, so that no file of a command takes the number of one.

    Standard input and error are opened on the null device where they are closed.

    Raises:
        StorageError: standard output is closed: what the command says would be lost.
    """
    for number, name, mode in ((0, "stdin", "r"), (2, "stderr", "w")):
        if getattr(sys, name) is None:
            _mute(number)
            setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))  # noqa: SIM115
    if sys.stdout is None:
        raise StorageError("standard output: expected it open, got it closed")


def say(sentence: str) -> None:
    """Print a line on standard error, if there is one that takes it."""
    with contextlib.suppress(OSError, ValueError):
        print(sentence, file=sys.stderr, flush=True)


def _mute(number: int) -> None:
    null = os.open(os.devnull, os.O_RDWR)
    if null != number:
        os.dup2(null, number)
        os.close(null)
