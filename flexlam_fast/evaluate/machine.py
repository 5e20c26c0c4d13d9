"""What a figure was measured with: the device's name, and the versions of what ran."""

from __future__ import annotations

import platform
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import torch

import flexlam_fast


class Machine(NamedTuple):
    """``device`` in words, torch's number of CPU ``threads``, and ``versions`` as pairs of name and version."""

    device: str
    threads: int
    versions: tuple[tuple[str, str], ...]


def look(device: torch.device | str) -> Machine:
    """Describe ``device`` and the installed libraries that a rollout goes through."""
    where = torch.device(device)
    name = torch.cuda.get_device_name(where) if where.type == "cuda" else _cpu_name()
    versions = [
        ("flexlam_fast", flexlam_fast.__version__),
        ("python", platform.python_version()),
        ("torch", str(torch.__version__)),
    ]
    for package in ("numpy", "vizdoom", "gymnasium"):
        try:
            versions.append((package, metadata.version(package)))
        except metadata.PackageNotFoundError:
            continue
    return Machine(f"{where.type} ({name})", torch.get_num_threads(), tuple(versions))


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
