"""Writing results, with one sentence where the disk refuses."""

from __future__ import annotations

from pathlib import Path

from flexlam_fast.errors import StorageError
from flexlam_fast.values import make_folder as make_folder


def write(path: Path, content: str | bytes) -> None:
    """Write a file, replacing what was there.

    Raises:
        StorageError: naming the file that could not be written.
    """
    try:
        path.write_bytes(content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content)
    except OSError as error:
        raise StorageError(f"{path}: expected to write it, got: {error.strerror or error}") from error
