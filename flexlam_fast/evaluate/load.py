"""Loads models from what a command line says: names and strings, checked."""

from __future__ import annotations

from pathlib import Path

import torch

from flexlam_fast.backend import DTYPES, find_device
from flexlam_fast.lam import LatentActionModel
from flexlam_fast.policy import Policy
from flexlam_fast.run_folder import LAM, find_stage
from flexlam_fast.values import check_choice, check_path


def load_policy(checkpoint: str, device: str = "auto", dtype: str = "float32", backend: str = "auto") -> Policy:
    """Load a checkpoint, by directory or shipped name, onto a device.

    Args:
        checkpoint: the folder of a policy or of a run that has one, or the name of a shipped checkpoint.
        device: such as ``cpu``, ``cuda``, ``cuda:1``; ``auto`` takes a GPU where there is one.
        dtype: a key of ``DTYPES``.
        backend: ``auto`` or one by name.

    Raises:
        InputError: a device that is not here, or another dtype.
        CheckpointError: nothing of that name, or a checkpoint that is damaged, foreign or too new.
        BackendError: a backend asked for by name that cannot run here.
    """
    chosen = DTYPES[check_choice("dtype", dtype, DTYPES)]
    check_path("checkpoint", checkpoint)
    return Policy.from_pretrained(checkpoint, device=find_device(device), dtype=chosen, backend=backend)


def load_lam(checkpoint: str | Path, device: str = "auto") -> LatentActionModel:
    """Load a latent action model from whatever holds one, in fp32, and print which checkpoint that is.

    Args:
        checkpoint: what ``LatentActionModel.from_pretrained`` takes: a run, a stage, a checkpoint, or a shipped name.
        device: as for :func:`load_policy`.

    Raises:
        InputError: a device that is not here.
        CheckpointError: nothing of that name, or a checkpoint that is damaged, foreign or too new.
    """
    check_path("checkpoint", checkpoint)
    where, found = find_device(device), find_stage(checkpoint, LAM)
    lam = LatentActionModel.of(found, device=where, dtype=torch.float32, backend="auto")
    print(found, flush=True)
    return lam
