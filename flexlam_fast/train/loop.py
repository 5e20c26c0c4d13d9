"""The training loop that every stage shares: optimiser, schedule, logs, validation, checkpoints, resume.

A run directory holds ``last`` (checkpoint to resume from), ``best`` (lowest validation loss), and ``metrics.jsonl``.
"""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from tqdm import tqdm

from flexlam_fast.checkpoint import load_checkpoint, match_tensors, recover_checkpoint, save_checkpoint
from flexlam_fast.config import FlexLAMConfig
from flexlam_fast.errors import CheckpointError, FlexLAMError
from flexlam_fast.train.metrics import MetricsLog
from flexlam_fast.train.recipes import Recipe

TRAINER = "trainer.json"


class Interrupted(FlexLAMError, RuntimeError):
    """The run was told to end (SIGTERM) and saved its state first."""


class Stage(Protocol):
    """What one stage of training provides; everything random in it is a function of (seed, step)."""

    name: str
    cfg: FlexLAMConfig

    @property
    def model(self) -> nn.Module:
        """What is trained and saved."""

    def loss(self, step: int) -> Tensor:
        """The loss of a step's batch."""

    def report(self) -> Mapping[str, Any]:
        """What to log beside the loss, since the last report."""

    def validate(self) -> Mapping[str, float]:
        """Validation metrics; ``"val/loss"`` decides which checkpoint is best."""

    def identity(self) -> Mapping[str, Any]:
        """What a resumed run must have in common with the one it resumes (data, frozen parts, seed)."""


class Progress(NamedTuple):
    """Steps done, and the best validation loss so far."""

    step: int
    best: float


def wants_bf16(device: torch.device, precision: str) -> bool:
    """Whether to train under bf16 autocast: ``"auto"`` is yes where the device multiplies bf16 in hardware."""
    if precision != "auto":
        return precision == "bf16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


class Trainer:
    """Trains one stage to the end of its recipe, resuming where ``directory/last`` stands."""

    def __init__(
        self,
        stage: Stage,
        recipe: Recipe,
        directory: Path,
        *,
        device: torch.device,
        precision: str = "auto",
        tensorboard: bool = False,
    ) -> None:
        self.stage, self.recipe, self.directory, self.device = stage, recipe, directory, device
        self.bf16 = wants_bf16(device, precision)
        self.parameters = {n: p for n, p in stage.model.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(
            _groups(self.parameters, recipe.weight_decay), lr=recipe.lr, betas=(0.9, 0.95), fused=True
        )
        self.progress = Progress(0, float("inf"))
        self.stopped = False
        directory.mkdir(parents=True, exist_ok=True)
        self._resume()
        self.log = MetricsLog(directory, self.progress.step, tensorboard)

    def run(self) -> Progress:
        """Train to the end; returns at once when there is nothing left to do.

        Raises:
            Interrupted: after SIGTERM, with the state saved.
            FlexLAMError: if the loss is no longer a finite number; nothing is saved then.
        """
        previous = signal.signal(signal.SIGTERM, self._stop)
        try:
            self._run()
        finally:
            signal.signal(signal.SIGTERM, previous)
            self.log.close()
        return self.progress

    def _run(self) -> None:
        recipe, first = self.recipe, self.progress.step
        started, running = time.monotonic(), 0.0
        self.stage.model.train()
        with tqdm(total=recipe.steps, initial=first, desc=self.stage.name, unit="step", dynamic_ncols=True) as bar:
            for step in range(first, recipe.steps):
                loss = self._step(step)
                running = loss if step == first else 0.95 * running + 0.05 * loss
                done = step + 1
                last = done == recipe.steps
                if done % recipe.log_every == 0 or last:
                    rate = (done - first) / (time.monotonic() - started)
                    head = {"loss": loss, "lr": recipe.rate(step), "steps_per_s": round(rate, 3)}
                    self.log.write(done, {**head, **self.stage.report()})
                    bar.set_postfix(loss=f"{running:.4f}", refresh=False)
                best = self.progress.best
                if done % recipe.validate_every == 0 or last:
                    best = self._validate(done, best)
                self.progress = Progress(done, best)
                if done % recipe.save_every == 0 or last or self.stopped:
                    self.save("last")
                bar.update()
                if self.stopped and not last:
                    raise Interrupted(f"{self.stage.name}: told to end at step {done}; the same command resumes")

    def _step(self, step: int) -> float:
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.rate(step)
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.bf16):
            loss = self.stage.loss(step)
        value = float(loss.detach())
        if not torch.isfinite(loss.detach()):
            raise FlexLAMError(f"{self.stage.name}: expected a finite loss, got {value} at step {step}")
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters.values(), self.recipe.clip)
        self.optimizer.step()
        return value

    def _validate(self, done: int, best: float) -> float:
        self.stage.model.eval()
        with torch.no_grad(), torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.bf16):
            metrics = self.stage.validate()
        self.stage.model.train()
        self.log.write(done, metrics)
        if metrics["val/loss"] < best:
            best = metrics["val/loss"]
            self.progress = Progress(done, best)
            self.save("best")
        return best

    def save(self, name: str) -> None:
        """Write weights, optimiser and progress to ``directory/name``, in one step that a kill cannot split."""
        named = {id(p): n for n, p in self.parameters.items()}
        moments = {f"{named[id(p)]}|{k}": v for p, state in self.optimizer.state.items() for k, v in state.items()}
        save_checkpoint(
            self.directory / name,
            dict(self.stage.model.state_dict()),
            self.stage.cfg.to_json(),
            extra_tensors={"optimizer": moments} if name == "last" else {},
            extra_text={TRAINER: json.dumps({**self._identity(), **self.progress._asdict()}, sort_keys=True)},
        )

    def _identity(self) -> dict[str, Any]:
        return {"stage": self.stage.name, **self.stage.identity()}

    def _resume(self) -> None:
        last = self.directory / "last"
        recover_checkpoint(last)
        if not last.exists():
            return
        found = load_checkpoint(last)
        notes = json.loads(found.extra_text[TRAINER])
        ours = {**self._identity(), "config": self.stage.cfg}
        theirs = {**notes, "config": FlexLAMConfig.from_json(found.config_json)}
        for key, value in ours.items():
            if theirs.get(key) != value:
                raise CheckpointError(
                    f"{last}: expected a run with {key} {_short(value)}, got {_short(theirs.get(key))}"
                )
        state = dict(self.stage.model.state_dict())
        match_tensors(str(last / "model.safetensors"), state, found.tensors)
        self.stage.model.load_state_dict(found.tensors)
        for key, value in found.extra_tensors["optimizer"].items():
            name, _, moment = key.rpartition("|")
            parameter = self.parameters[name]
            place = parameter.device if moment != "step" else torch.device("cpu")
            self.optimizer.state[parameter][moment] = value.to(place)
        self.progress = Progress(notes["step"], notes["best"])

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self.stopped = True


def _groups(parameters: Mapping[str, nn.Parameter], decay: float) -> list[dict[str, Any]]:
    """Weight decay on matrices only, as is usual for transformers."""
    matrices = [p for p in parameters.values() if p.dim() >= 2]
    others = [p for p in parameters.values() if p.dim() < 2]
    return [{"params": matrices, "weight_decay": decay}, {"params": others, "weight_decay": 0.0}]


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 80 else text[:77] + "..."
