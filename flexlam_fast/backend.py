"""Which code runs an operation, decided once, at construction, and never by an environment variable.

``reference`` is plain PyTorch on any device. A backend asked for by name works or raises; only ``auto`` chooses.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from flexlam_fast.errors import BackendError, InputError

AUTO, REFERENCE, TRITON, NATIVE = "auto", "reference", "triton", "native"
NAMES = (AUTO, REFERENCE, TRITON, NATIVE)


class BackendStatus(NamedTuple):
    """Whether one backend can run here, and in one sentence why or why not."""

    name: str
    available: bool
    reason: str


class BackendChoice(NamedTuple):
    """The backend that was taken and the sentence that says why."""

    name: str
    reason: str


def probe() -> tuple[BackendStatus, ...]:
    """Return the status of every backend of this version, fastest first. Imports neither triton nor the extension."""
    return (
        BackendStatus(NATIVE, False, "this version has no native operations: the extension reports on the CPU only"),
        BackendStatus(TRITON, False, "this version has no Triton kernels"),
        BackendStatus(REFERENCE, True, "plain PyTorch, runs on every device that torch runs on"),
    )


def choose(name: str, device: torch.device | str) -> BackendChoice:
    """Return the backend for ``name`` on ``device``.

    Args:
        name: ``auto`` for the fastest that works there, or the name of one, which is then taken or refused.
        device: where the tensors will live.

    Raises:
        BackendError: there is no such backend, or it was asked for by name and cannot run here.
    """
    statuses = probe()
    if name == AUTO:
        taken = next(status for status in statuses if status.available)
        others = "; ".join(f"{s.name}: {s.reason}" for s in statuses if not s.available)
        return BackendChoice(taken.name, f"the fastest of this version on {torch.device(device)} ({others})")
    for status in statuses:
        if status.name == name:
            if not status.available:
                raise BackendError(f"backend: expected one that runs here, got {name!r}: {status.reason}")
            return BackendChoice(name, f"asked for by name: {status.reason}")
    raise BackendError(f"backend: expected one of {', '.join(NAMES)}, got {name!r}")


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
