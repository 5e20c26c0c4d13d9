"""Loads a policy from what a command line says: names and strings, checked."""

from __future__ import annotations

from flexlam_fast.backend import find_device
from flexlam_fast.policy import DTYPES, Policy
from flexlam_fast.values import check_choice, check_path


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
    chosen = DTYPES[check_choice("dtype", dtype, DTYPES)]
    check_path("checkpoint", checkpoint)
    return Policy.from_pretrained(checkpoint, device=find_device(device), dtype=chosen, backend=backend)
