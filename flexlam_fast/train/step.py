"""One training step: forward, backward, clipping and AdamW; on a GPU all of it as one CUDA graph.

A graph holds everything from the batch in its place on the device to the changed weights, so that a step costs the host
one launch. It is captured for each shape of batch when the first one comes. Nothing in a step is read back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from flexlam_fast.capture import GraphedFunction
from flexlam_fast.train.peers import part
from flexlam_fast.train.recipes import Recipe


class Step:
    """Operations launched one by one.

    Args:
        forward: a batch, a tuple of tensors on the device, to the loss, a scalar.
        parameters: what is trained, by name.
        recipe: decay and clipping; the rate comes with each call.
        device: of the parameters.
        bf16: whether forward runs under bf16 autocast.

    Attributes:
        optimizer: AdamW, fused; with its rate and step counts on the device where that is a GPU.
        first_bad: int64 scalar on the device: the first call whose loss was not finite, counted from 0; -1 for none.
    """

    def __init__(
        self,
        forward: Callable[[Any], Tensor],
        parameters: Mapping[str, nn.Parameter],
        recipe: Recipe,
        device: torch.device,
        bf16: bool,
    ) -> None:
        self.forward, self.device, self.bf16, self.clip = forward, device, bf16, recipe.clip
        self.parameters = list(parameters.values())
        on_gpu = device.type == "cuda"
        rate = torch.tensor(recipe.lr, device=device) if on_gpu else recipe.lr
        groups = _groups(self.parameters, recipe.weight_decay)
        self.optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), fused=True, capturable=on_gpu)
        self.calls = torch.zeros((), dtype=torch.int64, device=device)
        self.first_bad = torch.full((), -1, dtype=torch.int64, device=device)

    def __call__(self, batch: Any, rate: float) -> Tensor:
        """Train on ``batch`` at learning rate ``rate``; the loss, fp32 on the device."""
        self.set_rate(rate)
        return self.run(batch)

    def set_rate(self, rate: float) -> None:
        """Set the learning rate of the next step."""
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate

    def run(self, batch: Any) -> Tensor:
        """Train on ``batch`` at the rate that was set."""
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.bf16):
            loss = self.forward(batch)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, self.clip)
        self.optimizer.step()
        loss = loss.detach()
        bad = ~torch.isfinite(loss) & (self.first_bad < 0)
        self.first_bad.copy_(torch.where(bad, self.calls, self.first_bad))
        self.calls += 1
        return loss

    def restore(self, parameter: nn.Parameter, moment: str, value: Tensor) -> None:
        """Put back one of AdamW's tensors that a checkpoint kept."""
        self.optimizer.state[parameter][moment] = part(value, parameter)

    def state(self) -> list[Tensor]:
        """Every tensor that a step changes."""
        moments = [t for p in self.parameters for t in self.optimizer.state[p].values() if isinstance(t, Tensor)]
        return [*(p.data for p in self.parameters), *moments, self.calls, self.first_bad]


class GraphedStep(Step):
    """The same step as a CUDA graph for each shape of batch. Not yet run on a GPU.

    Args:
        tallies: what else ``forward`` changes on the device, such as counters.
    """

    def __init__(self, *args: Any, tallies: Callable[[], Iterable[Tensor]] = tuple, **others: Any) -> None:
        super().__init__(*args, **others)
        for parameter in self.parameters:  # what AdamW would make in its first step, so that warm runs can be undone
            state = self.optimizer.state[parameter]
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            state["exp_avg"], state["exp_avg_sq"] = (torch.zeros_like(parameter.data) for _ in range(2))
        self.kind: type | None = None
        self.graphs = GraphedFunction(self._run, self.device, lambda: [*self.state(), *tallies()])

    def run(self, batch: Any) -> Tensor:
        """Replay the graph of the batch's shape, after capturing it if it is new; without one if no other has it."""
        if not getattr(batch, "repeats", True):
            return super().run(batch)
        self.kind = type(batch)
        return self.graphs(*batch)

    def _run(self, *batch: Any) -> Tensor:
        assert self.kind is not None
        return super().run(self.kind(*batch))


def _groups(parameters: list[nn.Parameter], decay: float) -> list[dict[str, Any]]:
    """Weight decay on matrices only, as is usual for transformers."""
    matrices = [p for p in parameters if p.dim() >= 2]
    others = [p for p in parameters if p.dim() < 2]
    return [{"params": matrices, "weight_decay": decay}, {"params": others, "weight_decay": 0.0}]
