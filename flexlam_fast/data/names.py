"""File names as text: any name that a file system takes can stand in a data set, in a message, and be read back."""

from __future__ import annotations

import os
from pathlib import Path
from urllib.parse import quote, unquote_to_bytes

SCHEME = "file:"


def to_text(name: str) -> str:
    """The text that stands for a file name in a data set: the name itself wherever that is possible.

    A name whose bytes are not UTF-8 is written as a relative ``file:`` URL, its bytes percent-encoded, and so is a name
    that begins with ``file:`` itself: :func:`from_text` is the exact inverse.

    Args:
        name: as ``os`` and ``pathlib`` give it, with surrogates for bytes that are not UTF-8.
    """
    content = os.fsencode(name)
    try:
        text = content.decode()
    except UnicodeDecodeError:
        return SCHEME + quote(content)
    return SCHEME + quote(content) if text.startswith(SCHEME) else text


def from_text(text: str) -> str:
    """The file name that :func:`to_text` made ``text`` from."""
    return os.fsdecode(unquote_to_bytes(text.removeprefix(SCHEME)) if text.startswith(SCHEME) else text.encode())


def shown(path: str | Path) -> str:
    """A file name for a message: on one line, whatever bytes and control characters it has."""
    text = os.fsencode(path).decode(errors="backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
