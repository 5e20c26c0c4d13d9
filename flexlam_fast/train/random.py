"""Random numbers of training: a batch is a pure function of (seed, stage, step, sample).

So a killed run resumes bit-exactly. Nothing here has a state that would have to be saved: every sample of every step
has a generator of its own.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def generator(seed: int, *where: int | str) -> torch.Generator:
    """A generator for one place in a run, for example ``generator(seed, "lam", step, sample)``."""
    text = "/".join(str(part) for part in (seed, *where))
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def pick(count: int, g: torch.Generator) -> int:
    """One integer in ``0..count - 1``."""
    return int(torch.randint(count, (1,), generator=g))


def uniform(g: torch.Generator) -> Tensor:
    """One number in ``[0, 1)``, shape ``[]``."""
    return torch.rand((), generator=g)
