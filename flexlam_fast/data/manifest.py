"""The directory format of packed episodes, version 1: names, records, and the manifest that vouches for the rest.

A data set is a directory::

    manifest.json          what is here, with the size and sha256 of every other file, and a checksum of itself
    frames-00000.npy       uint8 [n,H,W,3], memory-mapped; shards of about 256 MB; an episode may run over a shard's end
    steps-00000.parquet    one row per frame of that shard: episode int32, action int16, reward float32
    episodes.parquet       one row per episode: index, task, split, first, frames, seed, return, source

The action of frame ``i`` is the one taken there, which leads to frame ``i + 1``; -1 where there is none, as always
at an episode's last frame. Its reward stands beside it; the reward of a last frame is what the end itself brought.
A video with missing frames is several episodes with the same source; file names are those of
:func:`flexlam_fast.data.names.to_text`.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

from flexlam_fast.data.names import shown
from flexlam_fast.errors import DataError

FORMAT = "flexlam-episodes"
VERSION = 1
MANIFEST = "manifest.json"
EPISODES = "episodes.parquet"
SPLITS = ("train", "test")


class FileRecord(NamedTuple):
    """A file of the data set: its name, its size in bytes and the sha256 of its content."""

    name: str
    bytes: int
    sha256: str


class Shard(NamedTuple):
    """Some consecutive frames: how many, their pixels, and their actions and rewards."""

    length: int
    frames: FileRecord
    steps: FileRecord


class Manifest(NamedTuple):
    """What a data set says about itself; ``episodes`` is the file that lists them, ``num_*`` the totals."""

    frame_shape: tuple[int, int, int]
    action_names: tuple[str, ...]
    tasks: tuple[str, ...]
    shards: tuple[Shard, ...]
    episodes: FileRecord
    num_episodes: int
    num_frames: int


class Episode(NamedTuple):
    """One episode: global frames ``first .. first + frames - 1``; ``ret`` is the sum of its rewards.

    ``seed`` is -1 and ``source`` the file it came from where it was not played but filmed.
    """

    index: int  # type: ignore[assignment]  # shadows tuple.index, which nobody needs here
    task: str
    split: str
    first: int
    frames: int
    seed: int
    ret: float
    source: str = ""


def fingerprint(manifest: Manifest) -> str:
    """The sha256 of everything the manifest says, and through its file sums of the whole data set."""
    return hashlib.sha256(json.dumps(_content(manifest), sort_keys=True).encode()).hexdigest()


def dump(manifest: Manifest) -> bytes:
    """The content of ``manifest.json``."""
    return (json.dumps(_content(manifest) | {"checksum": fingerprint(manifest)}, indent=2) + "\n").encode()


def load(directory: Path) -> Manifest:
    """Read and check ``manifest.json`` of a data set.

    Raises:
        DataError: if it is missing, damaged, foreign, or of a version this package does not read.
    """
    path = directory / MANIFEST
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise DataError(f"{shown(path)}: expected the manifest of a data set, got {error.strerror or error}") from error
    except ValueError as error:
        raise DataError(f"{shown(path)}: expected JSON, got a damaged file ({error})") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise DataError(f"{shown(path)}: expected the manifest of a {FORMAT} data set, got another file")
    if content.get("version") != VERSION:
        raise DataError(f"{shown(path)}: expected version {VERSION}, got {content.get('version')!r}")
    try:
        manifest = _manifest(content)
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{shown(path)}: expected a complete manifest, got a damaged one ({error!r})") from error
    if content.get("checksum") != fingerprint(manifest):
        raise DataError(f"{shown(path)}: expected the checksum of its own content, got another; the file is damaged")
    return manifest


def _content(manifest: Manifest) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "version": VERSION,
        "frame_shape": list(manifest.frame_shape),
        "action_names": list(manifest.action_names),
        "tasks": list(manifest.tasks),
        "shards": [
            {"length": s.length, "frames": s.frames._asdict(), "steps": s.steps._asdict()} for s in manifest.shards
        ],
        "episodes": manifest.episodes._asdict(),
        "totals": {"episodes": manifest.num_episodes, "frames": manifest.num_frames},
    }


def _manifest(content: dict[str, Any]) -> Manifest:
    height, width, channels = (int(n) for n in content["frame_shape"])
    return Manifest(
        frame_shape=(height, width, channels),
        action_names=tuple(content["action_names"]),
        tasks=tuple(content["tasks"]),
        shards=tuple(
            Shard(int(s["length"]), FileRecord(**s["frames"]), FileRecord(**s["steps"])) for s in content["shards"]
        ),
        episodes=FileRecord(**content["episodes"]),
        num_episodes=int(content["totals"]["episodes"]),
        num_frames=int(content["totals"]["frames"]),
    )
