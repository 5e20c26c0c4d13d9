"""Checkpoints: complete and unchanged, or refused in one sentence; a kill or a full disk never costs the old one."""

from __future__ import annotations

import errno
import hashlib
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from flexlam_fast.checkpoint import Checkpoint, load_checkpoint, match_tensors, recover_checkpoint, save_checkpoint
from flexlam_fast.errors import CheckpointError, InputError, StorageError

FILES = ("config.json", "manifest.json", "model.safetensors", "optimizer.safetensors", "trainer.json")


def tensors_of(seed: int, size: int = 64) -> dict[str, Tensor]:
    made = torch.Generator().manual_seed(seed)
    return {"weight": torch.randn(size, 4, generator=made), "bias": torch.randn(size, generator=made)}


def save(folder: Path, seed: int, size: int = 64) -> None:
    save_checkpoint(
        folder,
        tensors_of(seed, size),
        json.dumps({"seed": seed}),
        {"optimizer": {"moment": tensors_of(seed + 1000, size)["weight"]}},
        {"trainer.json": json.dumps({"step": seed})},
    )


def seed_of(found: Checkpoint, size: int = 64) -> int:
    """Return the seed of a checkpoint, having checked that every part of it comes from that seed."""
    seed = int(json.loads(found.config_json)["seed"])
    assert json.loads(found.extra_text["trainer.json"]) == {"step": seed}
    for name, want in tensors_of(seed, size).items():
        assert torch.equal(found.tensors[name], want)
    assert torch.equal(found.extra_tensors["optimizer"]["moment"], tensors_of(seed + 1000, size)["weight"])
    return seed


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    save(tmp_path / "last", 1)
    return tmp_path / "last"


def names_beside(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.parent.iterdir())


# Round trip


def raw(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def test_round_trip_keeps_every_bit_of_every_dtype(tmp_path: Path) -> None:
    weight = torch.randn(6, 4)
    tensors = {
        "tied": weight,
        "tied.again": weight,
        "transposed": weight.t(),
        "view": weight[2:4],
        "scalar": torch.tensor(7),
        "empty": torch.zeros(0, 3),
        "half": weight.half(),
        "brain": weight.bfloat16(),
        "mask": weight > 0,
        "bytes": torch.arange(256, dtype=torch.uint8),
        "nan": torch.tensor([float("nan"), float("-inf"), -0.0]),
    }
    save_checkpoint(tmp_path / "a" / "b", tensors, '{"text": "kept to the byte"}\n\n', {"rng": {"s": torch.ones(2)}})
    found = load_checkpoint(tmp_path / "a" / "b")
    match_tensors("model.safetensors", tensors, found.tensors)
    for name, want in tensors.items():
        assert raw(found.tensors[name]) == raw(want)
    assert found.config_json == '{"text": "kept to the byte"}\n\n'
    assert list(found.extra_tensors) == ["rng"]
    assert found.extra_text == {}


def test_same_content_gives_the_same_bytes(tmp_path: Path) -> None:
    save(tmp_path / "a", 3)
    save(tmp_path / "b", 3)
    for name in FILES:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_link_to_a_checkpoint_stands_for_it(checkpoint: Path) -> None:
    link = checkpoint.parent / "link"
    link.symlink_to(checkpoint)
    save(link, 2)
    assert link.is_symlink()
    assert seed_of(load_checkpoint(link)) == seed_of(load_checkpoint(checkpoint)) == 2


# Mutations


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


def forge(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the manifest and give it a valid sum of its own again, as whoever wrote it on purpose would."""
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    manifest.pop("manifest_sha256", None)
    plain = json.dumps(manifest, indent=2, sort_keys=True)
    manifest["manifest_sha256"] = hashlib.sha256(plain.encode()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2, sort_keys=True) + "\n")


def enter(folder: Path, name: str, data: bytes) -> None:
    """Write a file and its true entry into a manifest that is valid again."""
    (folder / name).write_bytes(data)
    entry = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    forge(folder, lambda manifest: manifest["files"].update({name: entry}))


def test_forging_nothing_changes_nothing(checkpoint: Path) -> None:
    before = (checkpoint / "manifest.json").read_bytes()
    forge(checkpoint, lambda manifest: None)
    assert (checkpoint / "manifest.json").read_bytes() == before


@pytest.mark.parametrize("version", [2, 3, 99, 0, -1, "1", True, 1.0, None, [1]])
def test_another_version_is_refused_with_both_numbers(checkpoint: Path, version: object) -> None:
    forge(checkpoint, lambda manifest: manifest.update(version=version))
    with pytest.raises(CheckpointError, match=r"manifest\.json") as caught:
        load_checkpoint(checkpoint)
    if type(version) is int:
        assert f"expected version 1, which this package reads, got {version}" in str(caught.value)


FORGERIES: dict[str, Callable[[dict[str, Any]], object]] = {
    "another format": lambda m: m.update(format="safetensors"),
    "no format": lambda m: m.pop("format"),
    "an unknown key": lambda m: m.update(note="hello"),
    "no files": lambda m: m.pop("files"),
    "a list of files": lambda m: m.update(files=["config.json"]),
    "no config": lambda m: m["files"].pop("config.json"),
    "no model": lambda m: m["files"].pop("model.safetensors"),
    "an unknown key of a file": lambda m: m["files"]["config.json"].update(mode=420),
    "a negative size": lambda m: m["files"]["config.json"].update(bytes=-1),
    "a true size": lambda m: m["files"]["config.json"].update(bytes=True),
    "a sum in capitals": lambda m: m["files"]["config.json"].update(sha256="A" * 64),
    "a file elsewhere": lambda m: m["files"].update({"../config.json": m["files"]["config.json"]}),
    "an absolute file": lambda m: m["files"].update({"/etc/hostname": m["files"]["config.json"]}),
    "the manifest itself": lambda m: m["files"].update({"manifest.json": m["files"]["config.json"]}),
}


@pytest.mark.parametrize("change", FORGERIES.values(), ids=FORGERIES)
def test_a_forged_manifest_is_refused(checkpoint: Path, change: Callable[[dict[str, Any]], object]) -> None:
    forge(checkpoint, change)
    with pytest.raises(CheckpointError, match=r"manifest\.json"):
        load_checkpoint(checkpoint)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "null", "{}", '"flexlam-fast"', "[" * 100_000, '{"format": ' + "9" * 5000 + "}", "\ufeff{}", "{" * 10],
)
def test_a_manifest_of_other_json_is_refused(checkpoint: Path, text: str) -> None:
    (checkpoint / "manifest.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"manifest\.json"):
        load_checkpoint(checkpoint)


def test_a_doubled_key_is_refused(checkpoint: Path) -> None:
    text = (checkpoint / "manifest.json").read_text()
    (checkpoint / "manifest.json").write_text(text.replace('"version": 1', '"version": 1,\n  "version": 1'))
    with pytest.raises(CheckpointError, match=r"manifest\.json"):
        load_checkpoint(checkpoint)


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("model.safetensors", b"not safetensors"),
        ("model.safetensors", b"\xff" * 64),
        ("model.safetensors", b""),
        ("optimizer.safetensors", b"\x80\x04N."),
        ("config.json", b"\xff\xfe"),
        ("trainer.json", b"\x80"),
    ],
)
def test_content_of_another_kind_is_refused(checkpoint: Path, name: str, data: bytes) -> None:
    enter(checkpoint, name, data)
    with pytest.raises(CheckpointError, match=name):
        load_checkpoint(checkpoint)


def test_foreign_places_are_refused(checkpoint: Path) -> None:
    parent = checkpoint.parent
    (parent / "empty").mkdir()
    (parent / "file").write_text("x")
    (parent / "hugging").mkdir()
    (parent / "hugging" / "config.json").write_text('{"model_type": "qwen3"}')
    safetensors.torch.save_file({"w": torch.ones(2)}, parent / "hugging" / "model.safetensors")
    for name in ("empty", "file", "hugging", "missing", "file/below"):
        with pytest.raises(CheckpointError, match=name):
            load_checkpoint(parent / name)
    (checkpoint / "pytorch_model.bin").write_bytes(b"\x80\x04N.")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin"):
        load_checkpoint(checkpoint)


def test_match_tensors_names_file_tensor_and_difference() -> None:
    want = {"a": torch.zeros(2, 3), "b": torch.zeros(4)}
    match_tensors("m", want, dict(want))
    found: list[tuple[Mapping[str, Tensor], str]] = [
        ({"a": want["a"]}, r"m: expected tensor 'b' \[4\] float32, got no such tensor"),
        ({**want, "c": want["a"]}, r"m: expected 2 known tensors, got the unknown 'c'"),
        ({**want, "b": torch.zeros(5)}, r"m: b: expected \[4\] float32, got \[5\] float32"),
        ({**want, "b": want["b"].half()}, r"m: b: expected \[4\] float32, got \[4\] float16"),
    ]
    for tensors, sentence in found:
        with pytest.raises(CheckpointError, match=sentence):
            match_tensors("m", want, tensors)


# What a save refuses


@pytest.mark.parametrize(
    ("tensors", "extra_tensors", "extra_text"),
    [
        ({"__metadata__": torch.ones(1)}, {}, {}),
        ({"w": torch.eye(2).to_sparse()}, {}, {}),
        ({"w": torch.ones(1, device="meta")}, {}, {}),
        ({"w": 3}, {}, {}),
        ({}, {"model": {}}, {}),
        ({}, {"../up": {}}, {}),
        ({}, {".hidden": {}}, {}),
        ({}, {}, {"config.json": ""}),
        ({}, {}, {"manifest.json": ""}),
        ({}, {}, {"a/b.txt": ""}),
        ({}, {}, {"x.safetensors": ""}),
    ],
)
def test_what_a_checkpoint_cannot_hold_is_refused_before_anything_is_written(
    checkpoint: Path, tensors: Any, extra_tensors: Any, extra_text: Any
) -> None:
    with pytest.raises(InputError):
        save_checkpoint(checkpoint, tensors, "{}", extra_tensors, extra_text)
    assert seed_of(load_checkpoint(checkpoint)) == 1
    assert names_beside(checkpoint) == ["last"]


def test_only_checkpoints_are_replaced(checkpoint: Path) -> None:
    thesis = checkpoint.parent / "home" / "thesis.txt"
    thesis.parent.mkdir()
    thesis.write_text("years of work")
    with pytest.raises(StorageError, match="expected a checkpoint to replace"):
        save(thesis.parent, 2)
    shutil.copy(thesis, checkpoint)
    with pytest.raises(StorageError, match=r"thesis\.txt"):
        save(checkpoint, 2)
    with pytest.raises(StorageError, match="got a file"):
        save(thesis, 2)
    assert thesis.read_text() == (checkpoint / "thesis.txt").read_text() == "years of work"
    (checkpoint / "thesis.txt").unlink()
    with pytest.raises(StorageError, match="got one that holds files"):
        save_checkpoint(checkpoint, {}, "{}", overwrite=False)
    assert seed_of(load_checkpoint(checkpoint)) == 1


# Full disks


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EROFS, errno.EIO])
@pytest.mark.parametrize("call", ["fsync", "rename", "second rename"])
def test_a_failing_disk_is_one_sentence_and_the_old_checkpoint_stays(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, code: int, call: str
) -> None:
    name, real = call.split()[-1], getattr(os, call.split()[-1])
    left = [call.startswith("second")]

    def fail(*args: Any) -> Any:
        if left.pop() if left else False:
            return real(*args)
        monkeypatch.undo()
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, name, fail)
    with pytest.raises(StorageError, match=f"last: expected to write the checkpoint, got: {os.strerror(code)}"):
        save(checkpoint, 2)
    assert seed_of(load_checkpoint(checkpoint)) == 1
    assert names_beside(checkpoint) == ["last"]


def save_with_little_room(folder: Path) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (64 << 10, 64 << 10))
    try:
        save(folder, 2, size=1 << 16)
    except StorageError as error:
        os._exit(0 if "File too large" in str(error) else 3)
    os._exit(4)


def test_a_file_size_limit_is_one_sentence_and_the_old_checkpoint_stays(checkpoint: Path) -> None:
    assert run_child(save_with_little_room, checkpoint) == 0
    assert seed_of(load_checkpoint(checkpoint)) == 1
    assert names_beside(checkpoint) == ["last"]


# Kills


def start_child(target: Callable[..., None], *args: Any) -> multiprocessing.process.BaseProcess:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pytest", "flexlam_fast.checkpoint"])
    child = context.Process(target=target, args=args)
    child.start()
    return child


def run_child(target: Callable[..., None], *args: Any) -> int:
    child = start_child(target, *args)
    child.join(60)
    assert child.exitcode is not None
    return child.exitcode


def save_until_step(folder: Path, step: int) -> None:
    """Save, and die just before the ``step``-th change of the disk."""
    left = [step]
    for name in ("mkdir", "fsync", "rename", "unlink", "rmdir"):
        real = getattr(os, name)

        def counted(*args: Any, real: Callable[..., Any] = real, **options: Any) -> Any:
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left[0] -= 1
            return real(*args, **options)

        setattr(os, name, counted)
    save(folder, 2)
    os._exit(0)


def test_a_kill_before_any_step_of_a_save_leaves_the_old_or_the_new_checkpoint(tmp_path: Path) -> None:
    outcomes, gaps = [], 0
    for step in range(100):
        folder = tmp_path / f"{step}" / "last"
        save(folder, 1)
        code = run_child(save_until_step, folder, step)
        gaps += not folder.exists()
        outcomes.append(seed_of(load_checkpoint(folder)))
        previous = folder.parent / ".last.previous"
        assert not previous.exists() or seed_of(load_checkpoint(previous)) == 1  # it may be all that is left
        save(folder, 3)
        assert seed_of(load_checkpoint(folder)) == 3
        assert names_beside(folder) == ["last"]
        if code == 0:
            break
        assert code == -signal.SIGKILL
    assert outcomes == sorted(outcomes)  # old until the one moment of change, new from then on
    assert outcomes.count(1) >= 8
    assert outcomes.count(2) >= 8
    assert gaps == 1  # the kill between the two renames did happen


def save_for_ever(folder: Path, first: int, size: int, saved_one: Any) -> None:
    for seed in range(first, first + 1000):
        save(folder, seed, size)
        saved_one.set()


def test_a_kill_at_a_random_moment_leaves_a_complete_checkpoint(tmp_path: Path) -> None:
    draw, folder, size = random.Random(7), tmp_path / "last", 4096
    for turn in range(1, 21):
        saved_one = multiprocessing.get_context("forkserver").Event()
        child = start_child(save_for_ever, folder, 1000 * turn, size, saved_one)
        assert saved_one.wait(60)
        time.sleep(draw.uniform(0.0, 0.1))
        child.kill()
        child.join(60)
        assert child.exitcode == -signal.SIGKILL
        # A checkpoint of this turn: what was once saved stays saved.
        assert seed_of(load_checkpoint(folder), size) // 1000 == turn
    recover_checkpoint(folder)
    assert names_beside(folder) == ["last"]
