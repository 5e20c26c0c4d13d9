"""Training settings: what every stage can be told, and what each preset takes by default."""

from __future__ import annotations

import math
from dataclasses import dataclass

from flexlam_fast.fields import check_fields, integer, real

#: Sample ``step * batch + i`` of a run has a number of its own in 64 bits; larger rates overflow in AdamW.
MAX_STEPS, MAX_BATCH, MAX_RATE = 1_000_000_000, 100_000, 1000


@dataclass(frozen=True)
class Recipe:
    """How one stage is trained: AdamW, linear warm-up, cosine decay to a tenth, clipping (all stages share these).

    Raises:
        ConfigError: a number out of its range.
    """

    steps: int = integer(low=1, high=MAX_STEPS)
    batch: int = integer(low=1, high=MAX_BATCH)
    lr: float = real(low=0, high=MAX_RATE, open_low=True)
    warmup: int = integer(100, 0, MAX_STEPS)
    weight_decay: float = real(0.01, 0, 1000)
    clip: float = real(1.0, 0, 1e30, open_low=True)
    validate_every: int = integer(500, 1, MAX_STEPS)
    save_every: int = integer(500, 1, MAX_STEPS)
    log_every: int = integer(20, 1, MAX_STEPS)

    def __post_init__(self) -> None:
        check_fields(self)

    def rate(self, step: int) -> float:
        """Learning rate of ``step`` (0-based): warm-up, then a cosine down to a tenth of the peak."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.lr * (0.1 + 0.45 * (1 + math.cos(math.pi * min(1.0, done))))


# "dmlab": the paper's step counts and batch sizes where it gives them (Table 8), ours elsewhere; sized for a GPU.
# "tiny": an hour on two CPU cores for all stages together, collection included.
RECIPES: dict[str, dict[str, Recipe]] = {
    "dmlab": {
        "lam": Recipe(300_000, 256, 2e-4, warmup=2000, validate_every=5000, save_every=2000, log_every=100),
        "sequence": Recipe(300_000, 128, 3e-4, warmup=2000, validate_every=5000, save_every=2000, log_every=100),
        "translator": Recipe(20_000, 256, 1e-3, warmup=500, validate_every=500, save_every=2000, log_every=100),
        "joint": Recipe(20_000, 256, 1e-4, warmup=500, validate_every=500, save_every=2000, log_every=100),
    },
    "tiny": {
        "lam": Recipe(5000, 32, 1e-3),
        "sequence": Recipe(3600, 16, 1e-3, warmup=150),
        "translator": Recipe(2000, 256, 1e-3, validate_every=100),
        "joint": Recipe(2000, 32, 5e-4),
    },
}

#: Labelled transitions for the translator: the paper's share; a thousand of the tiny preset's hundred thousand.
LABELS: dict[str, float] = {"dmlab": 0.00025, "tiny": 1024.0}

#: What ``train all`` collects when there is no data: ViZDoom scenarios and their training transitions.
COLLECTION = {"my_way_home": 60_000, "health_gathering": 40_000, "defend_the_center": 15_000, "take_cover": 15_000}
