"""Loads a policy from what a command line says: names and strings, checked."""

from __future__ import annotations

import torch

from flexlam_fast.errors import InputError
from flexlam_fast.policy import Policy

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_policy(checkpoint: str, device: str = "auto", dtype: str = "float32", backend: str = "auto") -> Policy:
    """Load a checkpoint, by directory or shipped name, onto a device.

    Args:
        checkpoint: a directory, or the name of a shipped checkpoint.
        device: such as ``cpu``, ``cuda``, ``cuda:1``; ``auto`` takes a GPU where there is one.
        dtype: a key of ``DTYPES``.
        backend: ``auto`` or one by name.

    Raises:
        InputError: a device that is not here, or another dtype.
        CheckpointError: nothing of that name, or a checkpoint that is damaged, foreign or too new.
        BackendError: a backend asked for by name that cannot run here.
    """
    if dtype not in DTYPES:
        raise InputError(f"dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
    return Policy.from_pretrained(checkpoint, device=find_device(device), dtype=DTYPES[dtype], backend=backend)


def find_device(name: str) -> torch.device:
    """Return the device that ``name`` means, if it is here; ``auto`` is a GPU where there is one.

    Raises:
        InputError: for a name torch does not know, or a device this machine lacks.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        # torch says "not compiled with CUDA" by an assertion, and everything else by long runtime errors.
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"device: expected one that this machine has, got {name!r} ({reason})") from error
    return device
