"""The cases of the bottleneck's benches: which op, level set, size and dtype, and what each cannot help but do."""

from __future__ import annotations

from typing import NamedTuple

import torch
from peers import fast_backends
from rows import Work
from torch import Tensor

from flexlam_fast.backend import AUTO

LEVEL_SETS = ((8, 5, 5, 5), (7, 5, 5, 5, 5))
WIDTH = 192  # of the dmlab encoder
DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16"}
BATCH = (256, 64, torch.float32)
# 256 blocks are a training batch; 65,536 blocks (4M tokens) fill the memory of a GPU's caches many times over
SIZES = {
    "cpu": [BATCH],
    "cuda": [BATCH, (256, 64, torch.bfloat16), (65536, 64, torch.float32), (65536, 64, torch.bfloat16)],
}
# per channel, tanh as one: shift, tanh, scale, offset, round, value, digit, and two for the code
FORWARD, BACKWARD, LOOK_UP = 9, 4, 4


class Case(NamedTuple):
    """One row: ``blocks`` of ``slots`` codes; ``backend`` is ours, ``prefix`` draws how many slots each block keeps."""

    op: str
    levels: tuple[int, ...]
    blocks: int
    slots: int
    dtype: torch.dtype
    prefix: bool = False
    backend: str = AUTO

    @property
    def id(self) -> str:
        """``fsq/OP/LEVELS/BLOCKSxSLOTS/DTYPE``, then what is special."""
        parts = ["fsq", self.op, "-".join(map(str, self.levels)), f"{self.blocks}x{self.slots}", DTYPES[self.dtype]]
        return "/".join([*parts, *["prefix"] * self.prefix, *[self.backend] * (self.backend != AUTO)])

    @property
    def gradient(self) -> bool:
        """Whether the row times forward and backward."""
        return self.op == "fwdbwd"

    @property
    def tokens(self) -> int:
        """How many codes there are."""
        return self.blocks * self.slots


def quantize_cases(device: torch.device) -> list[Case]:
    """``fsq`` forward, and forward with backward; each backend on its own where several can run."""
    sizes, backends = SIZES[device.type], fast_backends(device)
    cases = []
    for op in ("fwd", "fwdbwd"):
        cases += [Case(op, levels, *size) for levels in LEVEL_SETS for size in sizes]
        cases += [Case(op, LEVEL_SETS[0], *size, prefix=True) for size in sizes]
        if len(backends) > 1:
            cases += [Case(op, LEVEL_SETS[0], *size, backend=name) for size in sizes for name in backends]
    return cases


def project_cases(device: torch.device) -> list[Case]:
    """``fsq_project`` from the encoder's width; the second level set at one size."""
    sizes = SIZES[device.type]
    return [*(Case("project", LEVEL_SETS[0], *size) for size in sizes), Case("project", LEVEL_SETS[1], *BATCH)]


def look_up_cases(device: torch.device) -> list[Case]:
    """``codes_to_latents``, whose latents are fp32 on every device."""
    sizes = [size for size in SIZES[device.type] if size[2] == torch.float32]
    return [Case("codes_to_latents", levels, *size) for levels in LEVEL_SETS for size in sizes]


def quantize_work(case: Case, keep: Tensor | None) -> Work:
    """Read z, write latents and codes; backward reads the upstream and the retained z, and writes z's gradient."""
    size, d = case.dtype.itemsize, len(case.levels)
    moved = case.tokens * (2 * d * size + 4) + (0 if keep is None else keep.nbytes + d * 4)
    operations = FORWARD * case.tokens * d
    if case.gradient:
        retained = case.tokens if keep is None else int(keep.sum())
        moved += (2 * case.tokens + retained) * d * size
        operations += BACKWARD * retained * d
    return Work(moved, operations, torch.float32)


def project_work(case: Case) -> Work:
    """Read x and the weights, write latents and codes."""
    d, size = len(case.levels), case.dtype.itemsize
    moved = case.tokens * (WIDTH * size + d * size + 4) + d * (WIDTH + 1) * size
    return Work(moved, case.tokens * d * (2 * WIDTH + FORWARD), case.dtype)


def look_up_work(case: Case) -> Work:
    """Read codes, write latents."""
    d = len(case.levels)
    return Work(case.tokens * (4 + d * 4), LOOK_UP * case.tokens * d, torch.float32)
