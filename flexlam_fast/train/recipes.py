"""Training settings: what every stage can be told, and what each preset takes by default."""

from __future__ import annotations

import math
from dataclasses import dataclass

from flexlam_fast.errors import ConfigError


@dataclass(frozen=True)
class Recipe:
    """How one stage is trained: AdamW, linear warm-up, cosine decay to a tenth, clipping (all stages share these)."""

    steps: int
    batch: int
    lr: float
    warmup: int = 100
    weight_decay: float = 0.01
    clip: float = 1.0
    validate_every: int = 500
    save_every: int = 500
    log_every: int = 20

    def __post_init__(self) -> None:
        whole = (self.steps, self.batch, self.validate_every, self.save_every, self.log_every)
        if min(whole) < 1 or self.lr <= 0 or self.warmup < 0 or self.clip <= 0 or self.weight_decay < 0:
            raise ConfigError(f"recipe: expected positive steps, batch, rate and intervals, got {self}")

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
