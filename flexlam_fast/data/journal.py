"""What a stopped ``pack`` leaves beside its target, so that the same command goes on from there."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from flexlam_fast.data.folders import hidden, hold, release, sync, unwritten
from flexlam_fast.data.names import shown
from flexlam_fast.errors import StorageError

FORMAT = "flexlam-pack"
VERSION = 1
JOURNAL = "journal.jsonl"
NEW_JOURNAL = "journal.new"
DATA = "data"


class Source(NamedTuple):
    """A video file: its name below the folder, as text, and what would differ if it were another one."""

    name: str
    bytes: int
    mtime_ns: int


class Entry(NamedTuple):
    """A video that is done: the frames of its episodes, what was not whole about it, or why it was left out."""

    source: Source
    episodes: tuple[int, ...] = ()
    fault: str = ""
    skipped: str = ""


class Journal:
    """A folder with the frames packed so far and a line for each video that is done, in the order of the frames.

    Attributes:
        data: the folder for the frames.
        entries: the videos that are done.
    """

    def __init__(self, folder: Path, target: Path, options: dict[str, Any]) -> None:
        self.data = folder / DATA
        self.entries: list[Entry] = []
        self._path, self._target = folder / JOURNAL, target
        self._head = {"format": FORMAT, "version": VERSION, "options": options}

    def read(self, sources: Sequence[Source]) -> None:
        """Take over what an earlier run with these options did, up to the first video that is new or has changed."""
        try:
            lines = self._path.read_bytes().split(b"\n")[:-1]  # a line without its end was cut off
            if not lines or json.loads(lines[0]) != self._head:
                return
            for line, source in zip(lines[1:], sources, strict=False):
                fields = json.loads(line)
                entry = Entry(Source(**fields["source"]), tuple(fields["episodes"]), fields["fault"], fields["skipped"])
                if entry.source != source:
                    return
                self.entries.append(entry)
        except (OSError, ValueError, KeyError, TypeError):
            return  # none, or damaged from here on

    def rewrite(self) -> None:
        """Write the journal anew, so that it says what ``entries`` does and no more.

        Raises:
            StorageError: if the disk is full or forbidden.
        """
        lines = [json.dumps(self._head), *(_line(entry) for entry in self.entries)]
        made = self._path.with_name(NEW_JOURNAL)
        self._write(made, "wb", lines)
        try:
            os.replace(made, self._path)
            sync(self._path.parent)
        except OSError as error:
            raise unwritten(self._target, error) from error

    def add(self, entry: Entry) -> None:
        """Note a video whose frames have reached the disk.

        Raises:
            StorageError: if the disk is full or forbidden.
        """
        self._write(self._path, "ab", [_line(entry)])
        self.entries.append(entry)

    @property
    def frames(self) -> int:
        """Frames of the videos that are done."""
        return sum(sum(entry.episodes) for entry in self.entries)

    def _write(self, path: Path, mode: str, lines: list[str]) -> None:
        try:
            with path.open(mode) as file:
                file.write("".join(f"{line}\n" for line in lines).encode())
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise unwritten(self._target, error) from error


def _line(entry: Entry) -> str:
    return json.dumps(entry._asdict() | {"source": entry.source._asdict()})


@contextmanager
def opened(target: Path, options: dict[str, Any]) -> Iterator[Journal]:
    """Open and lock the folder beside ``target``, and make it if there is none.

    When the block ends, it is removed; when the block raises, it stays if any video is done.

    Args:
        target: the data set that is to be made.
        options: all that the frames depend on beside the videos.

    Raises:
        StorageError: if another process is packing to the same target, or the folder cannot be made.
    """
    folder = hidden(target, ".pack")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        for _ in range(2):  # the run before this one may be about to remove it
            folder.mkdir(exist_ok=True)
            if (handle := hold(folder, needed=False)) is not None:
                break
        else:
            raise StorageError(f"{shown(target)}: expected one pack to it at a time, got another that is still at work")
        if foreign := sorted({path.name for path in folder.iterdir()} - {JOURNAL, NEW_JOURNAL, DATA}):
            release(handle)
            raise StorageError(f"{shown(folder)}: expected a folder of pack alone, got one with {shown(foreign[0])}")
        (folder / DATA).mkdir(exist_ok=True)
    except OSError as error:
        raise error if isinstance(error, StorageError) else unwritten(target, error) from error
    journal = Journal(folder, target, options)
    try:
        yield journal
    except BaseException:
        if not any(entry.episodes for entry in journal.entries):
            shutil.rmtree(folder, ignore_errors=True)
        raise
    else:
        shutil.rmtree(folder, ignore_errors=True)
    finally:
        release(handle)
