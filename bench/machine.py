"""What this machine is called and what it can do: the rates that floors are made of, measured in the same run."""

from __future__ import annotations

import platform
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from measure import Clock, DeviceClock, WallClock

TRIES = 10
MEGABYTES_512 = 2**29


class Machine:
    """A device, the clock for kernels and the clock for whole calls on it, and its rates, each measured once."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.wall: Clock = WallClock(device)
        self._rates: dict[object, float] = {}
        self._clock: Clock | None = None

    @property
    def clock(self) -> Clock:
        """Device events on a GPU, else the wall clock; made on first use, because it takes memory."""
        self._clock = self._clock or (DeviceClock(self.device) if self.device.type == "cuda" else self.wall)
        return self._clock

    def read(self, span: int = MEGABYTES_512) -> float:
        """Bytes per second that a plain sum, or a dot product if that is faster, reads from 512 MiB.

        On a CPU, whose caches may hold what one pass after the other goes through, it is from as many bytes as those:
        ``span`` (56 MB came at 55 GB/s where 512 came at 25).
        """
        size = MEGABYTES_512 if self.device.type == "cuda" else min(span, MEGABYTES_512)
        return self._rate(("read", size), partial(self._measure_read, size))

    def copy(self) -> float:
        """Bytes per second, read and written together, of ``y.copy_(x)`` from 256 MiB to 256 MiB."""
        return self._rate("copy", self._measure_copy)

    def arithmetic(self, dtype: torch.dtype) -> float:
        """Operations per second of a large matrix product in ``dtype``: no op here does more."""
        return self._rate(dtype, partial(self._measure_matmul, dtype))

    def _rate(self, key: object, measure: Callable[[], float]) -> float:
        if key not in self._rates:
            self._rates[key] = measure()
        return self._rates[key]

    def _best(self, side: Callable[[], object]) -> float:
        """Seconds of the best of ten calls."""
        return 1e-3 * min(self.clock(side).ms for _ in range(TRIES))

    def _measure_read(self, size: int) -> float:
        x = torch.ones(size // 4, device=self.device)
        # in turns, because others on the machine come and go
        return x.nbytes / min(self._best(side) for _ in range(3) for side in (x.sum, lambda: torch.dot(x, x)))

    def _measure_copy(self) -> float:
        x, y = (torch.ones(MEGABYTES_512 // 8, device=self.device) for _ in range(2))
        return 2 * x.nbytes / self._best(lambda: y.copy_(x))

    def _measure_matmul(self, dtype: torch.dtype) -> float:
        # of numbers drawn at random: of ones a GPU makes 13% more, because it draws less power
        size = 8192 if self.device.type == "cuda" else 1024
        x, y, out = (torch.randn(size, size, device=self.device).to(dtype) for _ in range(3))
        return 2 * size**3 / self._best(lambda: torch.mm(x, y, out=out))


def device_name(device: torch.device) -> str:
    """A name such as ``cpu-2x-intel-xeon`` or ``nvidia-h100-80gb-hbm3``: the model, nothing about the host."""
    if device.type == "cuda":
        return slug(torch.cuda.get_device_name(device))
    model = platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        model = next(
            (x.split(":", 1)[1] for x in info.read_text(encoding="utf-8").splitlines() if x.startswith("model name")),
            model,
        )
    model = re.sub(r"\(R\)|\(TM\)|\bCPU\b|\bProcessor\b|@.*", " ", model)
    return f"cpu-{torch.get_num_threads()}x-{slug(model)}"


def slug(text: str) -> str:
    """Lower case, with a dash for everything that is neither a letter nor a digit."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
