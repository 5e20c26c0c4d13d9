"""Forged checkpoints and foreign folders: refused in one sentence, however well the sums agree."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from checkpoint_cases import save

from flexlam_fast.checkpoint import load_checkpoint
from flexlam_fast.errors import CheckpointError


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    save(tmp_path / "last", 1)
    return tmp_path / "last"


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
