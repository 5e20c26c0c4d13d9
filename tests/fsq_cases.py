"""Where the compiled bottleneck runs on this machine, and data that tries it; shared by the tests of its backends."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flexlam_fast.backend import probe

LEVEL_SETS = [(8, 5, 5, 5), (7, 5, 5, 5, 5), (8, 6, 5), (7, 7, 7), (16, 15, 9), (3, 4), (4,), (9, 3, 6, 5, 4)]
MORE_LEVEL_SETS = [*LEVEL_SETS, (8, 8, 8, 5, 5, 5), (3, 3, 3, 3, 3, 3, 3, 3)]
DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
RUNS = [(s.name, d) for d in DEVICES for s in probe(d) if s.available and s.name != "reference"]
#: probe() knows Triton's interpreter only once triton is loaded, which no test may depend on.
if ("triton", "cpu") not in RUNS and not torch.cuda.is_available():
    pytest.importorskip("triton")
    RUNS += [("triton", "cpu")]
RUN_IDS = [f"{name}-{device}" for name, device in RUNS]
every_run = pytest.mark.parametrize(("backend", "device"), RUNS, ids=RUN_IDS)


def is_interpreted(backend: str, device: str) -> bool:
    """Whether a size must be small."""
    return backend == "triton" and device == "cpu"


def sample(levels: tuple[int, ...], blocks: int, slots: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """``z``, ``keep`` (int64) and ``null`` on the CPU, fp32."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(blocks, slots, len(levels), generator=generator) * 1.5
    keep = torch.randint(0, slots + 1, (blocks,), generator=generator)
    return z, keep, torch.randn(len(levels), generator=generator)
