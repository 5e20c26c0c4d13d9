"""Small networks that are asked what an input says about the action: how many held-out actions they get right.

What they are trained for is measured by them, so they choose their own best moment on a part of their labels and never
look at what they are judged by.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

#: Of the labels, one in so many chooses the moment; looks at them in a training.
HELD_BACK, LOOKS = 5, 20
#: Frames change by about a quarter of their own spread, so the change is made as loud as the scene.
CHANGE_GAIN = 4.0


class Recipe(NamedTuple):
    """Steps of AdamW with a cosine to 0, examples a step, peak rate, weight decay."""

    steps: int = 1500
    batch: int = 256
    rate: float = 2e-3
    decay: float = 0.05


def small_mlp(inputs: int, classes: int) -> nn.Module:
    """Two hidden layers of 256, for codes and previous actions, standardised."""
    layers: list[nn.Module] = []
    for width in (inputs, 256):
        layers += [nn.Linear(width, 256), nn.GELU(), nn.Dropout(0.2)]
    return nn.Sequential(*layers, nn.Linear(256, classes))


class InverseDynamics(nn.Module):
    """A convolutional network on both frames of a transition, uint8 ``[B, 2, H, W, C]``, to scores of actions."""

    def __init__(self, size: int, channels: int, classes: int) -> None:
        super().__init__()
        widths = (2 * channels, 32, 64, 96)
        layers: list[nn.Module] = []
        for i, (before, after) in enumerate(pairwise(widths)):
            layers += [nn.Conv2d(before, after, 5 if i == 0 else 3, 2, 2 if i == 0 else 1), nn.GELU()]
            size = -(-size // 2)
        self.layers = nn.Sequential(*layers, nn.Flatten(), nn.Dropout(0.2))
        self.head = nn.Sequential(nn.Linear(widths[-1] * size * size, 256), nn.GELU(), nn.Linear(256, classes))

    def forward(self, frames: Tensor) -> Tensor:
        """Scores fp32 ``[B, classes]``."""
        pixels = frames.movedim(-1, 2).float() / 127.5 - 1
        out: Tensor = self.head(self.layers(torch.cat([pixels[:, 0], CHANGE_GAIN * (pixels[:, 1] - pixels[:, 0])], 1)))
        return out


def fit(
    net: nn.Module, read: Callable[[Tensor], Tensor], actions: Tensor, recipe: Recipe, seed: int, device: torch.device
) -> None:
    """Train ``net`` to tell ``actions`` int64 ``[n]`` from ``read(rows)``, and leave it at its best moment.

    Args:
        net: maps what ``read`` returns to scores ``[B, classes]``.
        read: row numbers int64 ``[B]`` to inputs ``[B, ...]``.
        actions: what is right for each row.
        recipe: of the training.
        seed: of the order of the rows and of dropout.
        device: where to train.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        order = torch.randperm(len(actions))
        chosen, rows = order[: max(1, len(order) // HELD_BACK)], order[len(order) // HELD_BACK :]
        net.to(device).train()
        optimizer = torch.optim.AdamW(net.parameters(), lr=recipe.rate, weight_decay=recipe.decay)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, recipe.steps)
        best, kept = float("inf"), {name: t.clone() for name, t in net.state_dict().items()}
        with torch.enable_grad():
            for step in range(1, recipe.steps + 1):
                batch = rows[torch.randint(len(rows), (min(recipe.batch, len(rows)),))]
                optimizer.zero_grad(set_to_none=True)
                F.cross_entropy(net(read(batch).to(device)), actions[batch].to(device)).backward()
                optimizer.step()
                schedule.step()
                if step % max(1, recipe.steps // LOOKS) == 0:
                    loss = float(F.cross_entropy(scores(net, read, chosen, device), actions[chosen]))
                    if loss < best:
                        best, kept = loss, {name: t.clone() for name, t in net.state_dict().items()}
        net.load_state_dict(kept)
        net.eval()


@torch.no_grad()
def scores(net: nn.Module, read: Callable[[Tensor], Tensor], rows: Tensor, device: torch.device) -> Tensor:
    """Scores fp32 ``[n, classes]`` on the host, without dropout; ``net`` is left as it was."""
    training = net.training
    net.eval()
    out = torch.cat([net(read(part).to(device)).float().cpu() for part in rows.split(512)])
    net.train(training)
    return out
