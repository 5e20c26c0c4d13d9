"""Checkpoints whose every part follows from a seed; shared by the tests of checkpoints."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from flexlam_fast.checkpoint import Checkpoint, save_checkpoint

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


def names_beside(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.parent.iterdir())
