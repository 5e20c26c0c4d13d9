"""The manifest of a checkpoint: which files, how many bytes, which sha256, and a sha256 of the manifest itself.

The sums are there because a single flipped bit in a weights file loads without complaint 990 times out of 1,000.
A manifest has one form, to the byte, so that a change of its own bytes is seen as well.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from flexlam_fast.errors import CheckpointError

FORMAT = "flexlam-fast"
VERSION = 1
CONFIG, MODEL, MANIFEST = "config.json", "model.safetensors", "manifest.json"

_SAFE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_CHUNK = 1 << 20
_LIMIT = 1 << 20


class Entry(NamedTuple):
    """One file of a checkpoint: its size in bytes and its sha256 in hexadecimal."""

    size: int
    sha256: str


def is_plain_name(name: object) -> bool:
    """Say whether ``name`` is a file name without folders, hidden files or surprises."""
    return isinstance(name, str) and _SAFE_NAME.fullmatch(name) is not None


def entry_of(data: bytes) -> Entry:
    """Return the entry of a file that holds ``data``."""
    return Entry(len(data), hashlib.sha256(data).hexdigest())


def manifest_text(entries: Mapping[str, Entry]) -> str:
    """Return the one text that a manifest of these files has."""
    body: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "files": {name: {"bytes": entry.size, "sha256": entry.sha256} for name, entry in entries.items()},
    }
    plain = json.dumps(body, indent=2, sort_keys=True)
    body["manifest_sha256"] = hashlib.sha256(plain.encode()).hexdigest()
    return json.dumps(body, indent=2, sort_keys=True) + "\n"


def read_manifest(directory: Path) -> dict[str, Entry]:
    """Read and verify ``manifest.json``.

    Raises:
        CheckpointError: it is missing, damaged, of another format, or of another version.
        OSError: it cannot be read at all.
    """
    path = directory / MANIFEST
    if not path.is_file():
        raise CheckpointError(f"{path}: expected the manifest of a {FORMAT} checkpoint, got a folder without one")
    with open(path, "rb") as file:
        raw = file.read(_LIMIT)
    try:
        found = json.loads(raw.decode())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: expected a JSON manifest, got damaged text: {error}") from error
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        kind = found.get("format") if isinstance(found, dict) else type(found).__name__
        raise CheckpointError(f"{path}: expected format {FORMAT!r}, got {kind!r}")
    # The version comes before the rest: a later version may well have another form.
    if found.get("version") != VERSION:
        version = found.get("version")
        raise CheckpointError(f"{path}: expected version {VERSION}, which this package reads, got {version!r}")
    entries = _parse_entries(path, found.get("files"))
    if raw != manifest_text(entries).encode():
        raise CheckpointError(f"{path}: expected the manifest as it was written, got a changed or damaged one")
    return entries


def _parse_entries(path: Path, files: object) -> dict[str, Entry]:
    entries: dict[str, Entry] = {}
    for name, fields in files.items() if isinstance(files, dict) else ():
        size, digest = (fields.get("bytes"), fields.get("sha256")) if isinstance(fields, dict) else (None, None)
        named = is_plain_name(name) and name != MANIFEST
        summed = isinstance(digest, str) and _DIGEST.fullmatch(digest)
        if not named or not summed or isinstance(size, bool) or not isinstance(size, int) or size < 0:
            raise CheckpointError(f"{path}: expected bytes and sha256 of a plain file, got {fields!r} for {name!r}")
        entries[name] = Entry(size, str(digest))
    for name in (CONFIG, MODEL):
        if name not in entries:
            raise CheckpointError(f"{path}: expected an entry for {name}, got none")
    return entries


def check_strangers(directory: Path, entries: Mapping[str, Entry]) -> None:
    """Check that the directory holds nothing but the files of its manifest.

    Raises:
        CheckpointError: naming the first file that the manifest does not know.
    """
    for path in sorted(directory.iterdir()):
        if path.name != MANIFEST and path.name not in entries:
            raise CheckpointError(f"{path}: expected only the files of the manifest, got this one as well")


def read_verified(path: Path, entry: Entry) -> bytes:
    """Read a file once, summing it on the way, and return its bytes if they are those of the manifest.

    Raises:
        CheckpointError: it is missing, or its size or sum differs.
        OSError: it cannot be read at all.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: expected {entry.size} bytes, got no such file")
    digest, chunks = hashlib.sha256(), []
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size != entry.size:
            raise CheckpointError(f"{path}: expected {entry.size} bytes, got {size}")
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            chunks.append(chunk)
    if digest.hexdigest() != entry.sha256:
        raise CheckpointError(f"{path}: expected sha256 {entry.sha256[:12]}..., got {digest.hexdigest()[:12]}...")
    return b"".join(chunks)
