"""Checkpoints: what is saved comes back to the bit, and what none can hold or replace is refused."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_cases import FILES, names_beside, save, seed_of
from torch import Tensor

from flexlam_fast.checkpoint import load_checkpoint, match_tensors, save_checkpoint
from flexlam_fast.errors import CheckpointError, InputError, StorageError


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    save(tmp_path / "last", 1)
    return tmp_path / "last"


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
