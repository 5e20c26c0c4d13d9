"""The training loop that every stage shares: optimiser, schedule, logs, validation, checkpoints, resume.

A run directory holds ``last`` (checkpoint to resume from), ``best`` (lowest validation loss), and ``metrics.jsonl``.
"""

from __future__ import annotations

import json
import math
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from tqdm import tqdm

from flexlam_fast.backend import AUTO
from flexlam_fast.checkpoint import load_checkpoint, match_tensors, recover_checkpoint, save_checkpoint
from flexlam_fast.config import FlexLAMConfig
from flexlam_fast.errors import CheckpointError, FlexLAMError
from flexlam_fast.layers import set_backend, training_backend
from flexlam_fast.run_folder import BEST, LAST, TRAINER
from flexlam_fast.train.loader import Loader
from flexlam_fast.train.metrics import MetricsLog
from flexlam_fast.train.options import PRECISIONS
from flexlam_fast.train.peers import LostPeer, Peers, is_loss_of_peer, whole
from flexlam_fast.train.recipes import Recipe
from flexlam_fast.train.step import GraphedStep, Step
from flexlam_fast.values import check_choice, make_folder


class Interrupted(FlexLAMError, RuntimeError):
    """The run was told to end (SIGTERM) and saved its state first."""

    exit_status = 128 + signal.SIGTERM


class Stage(Protocol):
    """What one stage of training provides; everything random in it is a function of (seed, step, sample)."""

    name: str
    cfg: FlexLAMConfig
    device: torch.device
    peers: Peers

    @property
    def model(self) -> nn.Module:
        """What is trained and saved."""

    def read(self, step: int) -> Any:
        """This process's share of a step's batch: a named tuple of host tensors and what else it takes."""

    def loss(self, batch: Any) -> Tensor:
        """The loss of a batch on the device; reads nothing back from it."""

    def tallies(self) -> Sequence[Tensor]:
        """What :meth:`loss` counts on the device."""

    def report(self) -> Mapping[str, Any]:
        """What to log beside the loss, since the last report."""

    def validate(self) -> Mapping[str, float]:
        """Validation metrics; ``"val/loss"`` decides which checkpoint is best."""

    def identity(self) -> Mapping[str, Any]:
        """What a resumed run must have in common with the one it resumes (data, frozen parts, seed)."""


class Forward(nn.Module):
    """A stage as a module whose forward is its loss, which is how torch's engines for many processes take it."""

    def __init__(self, stage: Stage) -> None:
        super().__init__()
        self.model, self.stage = stage.model, stage

    def forward(self, batch: Any) -> Tensor:
        """The loss of a batch."""
        return self.stage.loss(batch)


class Progress(NamedTuple):
    """Steps done, and the best validation loss so far."""

    step: int
    best: float


def wants_bf16(device: torch.device, precision: str) -> bool:
    """Whether to train under bf16 autocast: ``"auto"`` is yes where the device multiplies bf16 in hardware.

    Raises:
        InputError: ``precision`` is none of auto, bf16, fp32.
    """
    if check_choice("precision", precision, PRECISIONS) != "auto":
        return precision == "bf16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


@contextmanager
def repeatable(device: torch.device) -> Iterator[None]:
    """On a GPU, have torch take kernels whose sums have one order; on a CPU they have it anyway.

    Attention's backward otherwise adds by atomics, and no two runs end with the same weights. Ops without such a kernel
    warn, products too unless CUBLAS_WORKSPACE_CONFIG is set; on one stream theirs is fixed. Not yet run on a GPU.
    """
    if device.type != "cuda":
        yield
        return
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fills: Any = torch.utils.deterministic
    filled = fills.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    fills.fill_uninitialized_memory = False  # would be a kernel for every empty tensor
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        fills.fill_uninitialized_memory = filled


class Trainer:
    """Trains one stage to the end of its recipe, resuming where ``directory/last`` stands.

    Of processes that train together, the first one writes; all of them return, or raise, at the same step.
    """

    def __init__(
        self,
        stage: Stage,
        recipe: Recipe,
        directory: Path,
        *,
        device: torch.device,
        precision: str = "auto",
        tensorboard: bool = False,
        shard: bool = False,
        backend: str = AUTO,
    ) -> None:
        self.stage, self.recipe, self.directory, self.device = stage, recipe, directory, device
        self.peers, self.writes = stage.peers, stage.peers.rank == 0
        self.bf16 = wants_bf16(device, precision)
        self.backend = training_backend(backend, device)
        set_backend(stage.model, self.backend, device)
        self.progress, self.stopped = Progress(0, float("inf")), False
        make_folder(directory)
        moments = self._resume()
        self.shard, self.forward = shard, self.peers.together(Forward(stage), device, shard)
        self.parameters = {n: p for n, p in stage.model.named_parameters() if p.requires_grad}
        args = self.forward, self.parameters, recipe, device, self.bf16
        graphed = device.type == "cuda" and self.peers.size == 1
        self.step = GraphedStep(*args, tallies=stage.tallies) if graphed else Step(*args)
        for key, value in moments.items():
            name, _, moment = key.rpartition("|")
            self.step.restore(self.parameters[name], moment, value)
        self.log = MetricsLog(directory, self.progress.step, tensorboard) if self.writes else None

    def describe(self) -> str:
        """One line: where and how the steps run."""
        precision = "bf16 autocast" if self.bf16 else "fp32"
        if isinstance(self.step, GraphedStep):
            graphs = "each step one CUDA graph"
        else:
            graphs = "no CUDA graphs: " + ("a CPU" if self.device.type == "cpu" else "more than one process")
        held = "weights in parts (FSDP2)" if self.shard else "weights in each (DDP)"
        shared = f", batch shared by {self.peers.size} processes, {held}" if self.peers.size > 1 else ""
        frames = getattr(self.stage, "frames", None)
        where = "" if frames is None or self.device.type == "cpu" else f"; {frames.reason}"
        return f"{self.stage.name}: {self.device}, {precision}, backend {self.backend}, {graphs}{shared}{where}"

    def run(self) -> Progress:
        """Train to the end; returns at once when there is nothing left to do.

        Raises:
            Interrupted: after SIGTERM, with the state saved.
            LostPeer: another process of the run is gone; what was saved last stands.
            FlexLAMError: if the loss is no longer a finite number; nothing is saved then.
        """
        previous = signal.signal(signal.SIGTERM, self._stop)
        try:
            with repeatable(self.device):
                self._run()
        except RuntimeError as error:
            if self.peers.size == 1 or not is_loss_of_peer(error):
                raise
            at = self.progress.step
            raise LostPeer(
                f"{self.stage.name}: lost another process in step {at}; the same command resumes from {self.directory}"
            ) from error
        finally:
            signal.signal(signal.SIGTERM, previous)
            if self.log is not None:
                self.log.close()
        return self.progress

    def _run(self) -> None:
        recipe, first = self.recipe, self.progress.step
        started, running = time.monotonic(), float("nan")
        self.stage.model.train()
        bar = tqdm(
            total=recipe.steps,
            initial=first,
            desc=self.stage.name,
            unit="step",
            dynamic_ncols=True,
            disable=not self.writes,
        )
        with bar, Loader(self.stage.read, range(first, recipe.steps), self.device) as batches:
            for step, batch in zip(range(first, recipe.steps), batches, strict=True):
                loss = self.step(batch, recipe.rate(step))
                done = step + 1
                last = done == recipe.steps
                logs, validates, saves = (
                    last or done % every == 0 for every in (recipe.log_every, recipe.validate_every, recipe.save_every)
                )
                looks = logs or validates or saves or self.device.type == "cpu"
                if looks:
                    value, stopped = self._look(loss, first)
                    running = value if math.isnan(running) else 0.95 * running + 0.05 * value
                if logs:
                    rate = (done - first) / (time.monotonic() - started)
                    head = {"loss": value, "lr": recipe.rate(step), "steps_per_s": round(rate, 3)}
                    self._write(done, {**head, **self.stage.report()})
                    bar.set_postfix(loss=f"{running:.4f}", refresh=False)
                best = self.progress.best
                if validates:
                    best = self._validate(done, best)
                self.progress = Progress(done, best)
                if saves or (looks and stopped):
                    self.save(LAST)
                bar.update()
                if looks and stopped and not last:
                    raise Interrupted(f"{self.stage.name}: told to end at step {done}; the same command resumes")

    def _look(self, loss: Tensor, first: int) -> tuple[float, bool]:
        """The loss over all processes, and whether one of them was told to end, after checking that all is finite."""
        seen = torch.stack([loss.float(), loss.new_tensor(float(self.stopped))])
        value, stopped = self.peers.mean(seen).tolist()
        if not math.isfinite(value):
            bad = int(self.step.first_bad)
            where = f"at step {first + bad}" if bad >= 0 else "in another process"
            raise FlexLAMError(f"{self.stage.name}: expected a finite loss, got {value} {where}")
        return value, stopped > 0

    def _write(self, done: int, metrics: Mapping[str, Any]) -> None:
        if self.log is not None:
            self.log.write(done, metrics)

    def _validate(self, done: int, best: float) -> float:
        self.stage.model.eval()
        if self.shard:
            self.forward.unshard()  # type: ignore[operator]  # the model is asked without its wrapper
        with torch.no_grad(), torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.bf16):
            metrics = self.stage.validate()
        if self.shard:
            self.forward.reshard()  # type: ignore[operator]
        self.stage.model.train()
        self._write(done, metrics)
        if metrics["val/loss"] < best:
            best = metrics["val/loss"]
            self.progress = Progress(done, best)
            self.save(BEST)
        return best

    def save(self, name: str) -> None:
        """Write weights, optimiser and progress to ``directory/name``, in one step that a kill cannot split."""
        weights = {n: whole(t) for n, t in self.stage.model.state_dict().items()}
        named = {id(p): n for n, p in self.parameters.items()}
        states = self.step.optimizer.state.items() if name == LAST else ()
        moments = {f"{named[id(p)]}|{k}": whole(v) for p, state in states for k, v in state.items()}
        notes = json.dumps({**self._identity(), **self.progress._asdict()}, sort_keys=True)
        self.peers.first(
            lambda: save_checkpoint(
                self.directory / name,
                weights,
                self.stage.cfg.to_json(),
                extra_tensors={"optimizer": moments} if name == LAST else {},
                extra_text={TRAINER: notes},
            )
        )

    def _identity(self) -> dict[str, Any]:
        return {"stage": self.stage.name, **self.stage.identity()}

    def _resume(self) -> dict[str, Tensor]:
        """Take the weights and the progress of ``last`` where there is one; return what the optimiser kept."""
        last = self.directory / LAST
        self.peers.first(lambda: recover_checkpoint(last))
        if not last.exists():
            return {}
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
        self.progress = Progress(notes["step"], notes["best"])
        return dict(found.extra_tensors["optimizer"])

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self.stopped = True


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 80 else text[:77] + "..."
