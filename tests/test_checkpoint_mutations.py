"""Mutations of a checkpoint's files: each is one error that names the file."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from checkpoint_cases import FILES, save, seed_of

from flexlam_fast.checkpoint import load_checkpoint
from flexlam_fast.errors import CheckpointError


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    save(tmp_path / "last", 1)
    return tmp_path / "last"


def overwrite(path: Path, data: bytes) -> None:
    """Write in place: thousands of truncated and rewritten files make some file systems sync each time."""
    with open(path, "r+b") as file:
        file.write(data)


def bit_flips(folder: Path) -> Iterator[tuple[str, Callable[[], object]]]:
    """Every bit of the two files that are read as text, 120 bits of each of the others."""
    draw = random.Random(5)
    for name in FILES:
        data = (folder / name).read_bytes()
        bits = range(8 * len(data))
        for bit in bits if name in ("manifest.json", "config.json") else draw.sample(bits, min(100, len(bits))):
            changed = bytearray(data)
            changed[bit // 8] ^= 1 << bit % 8
            yield name, lambda name=name, changed=changed: overwrite(folder / name, changed)


def damages(folder: Path) -> Iterator[tuple[str, Callable[[], object]]]:
    """Truncations, extensions, zeroed ranges, swaps and deletions of every file."""
    draw = random.Random(6)
    for name in FILES:
        data, path = (folder / name).read_bytes(), folder / name
        for length in {0, 1, len(data) // 2, len(data) - 1, *draw.choices(range(len(data)), k=8)}:
            yield name, lambda path=path, data=data, length=length: path.write_bytes(data[:length])
        for tail in (b"\0", b"\n", b" ", b"}", data[-8:], data, bytes(4096)):
            yield name, lambda path=path, data=data, tail=tail: path.write_bytes(data + tail)
        for _ in range(8):
            start = draw.randrange(len(data))
            zeroed = data[:start] + bytes(min(16, len(data) - start)) + data[start + 16 :]
            if zeroed != data:
                yield name, lambda path=path, zeroed=zeroed: path.write_bytes(zeroed)
        for other in FILES:
            if other != name:
                yield name, lambda path=path, other=other: path.write_bytes((folder / other).read_bytes())
        yield name, path.unlink
        yield name, lambda path=path: (path.unlink(), path.mkdir())


def restore(path: Path, data: bytes) -> None:
    if path.is_dir():
        path.rmdir()
    if path.exists() and path.stat().st_size == len(data):
        overwrite(path, data)
    else:
        path.write_bytes(data)


@pytest.mark.parametrize(("mutations", "least"), [(bit_flips, 5000), (damages, 150)])
def test_every_mutation_is_one_checkpoint_error_that_names_the_file(
    checkpoint: Path, mutations: Callable[[Path], Iterator[tuple[str, Callable[[], object]]]], least: int
) -> None:
    count, good = 0, {file: (checkpoint / file).read_bytes() for file in FILES}
    for name, mutate in list(mutations(checkpoint)):
        mutate()
        with pytest.raises(CheckpointError) as caught:
            load_checkpoint(checkpoint)
        assert name in str(caught.value)
        assert "\n" not in str(caught.value)
        count += 1
        restore(checkpoint / name, good[name])
    assert count >= least
    assert seed_of(load_checkpoint(checkpoint)) == 1
