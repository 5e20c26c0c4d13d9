"""Whole training steps and the decoder's sampler: ours beside the same in eager PyTorch and under ``torch.compile``.

A step is forward, backward, clipping and AdamW on a batch that is on the device; the loader has rows of its own. The
process keeps freed memory from here on, as the commands that train have it, for ours and the peers alike.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from measure import Timing, in_turns
from peers import REFERENCE, Compiler
from rows import Results, Work
from torch.utils.flop_counter import FlopCounterMode

from flexlam_fast.backend import AUTO
from flexlam_fast.backend import REFERENCE as PLAIN
from flexlam_fast.config import FlexLAMConfig
from flexlam_fast.data.store import EpisodeStore, EpisodeWriter
from flexlam_fast.lam import LatentActionModel
from flexlam_fast.layers import set_backend
from flexlam_fast.train.lam import LamStage
from flexlam_fast.train.loader import to_device
from flexlam_fast.train.loop import Trainer, wants_bf16
from flexlam_fast.train.memory import keep_memory
from flexlam_fast.train.recipes import RECIPES
from flexlam_fast.train.sequence import SequenceStage

COMPILED = "flexlam_fast reference, torch.compile"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PRESETS = ("tiny", "dmlab") if DEVICE == "cuda" else ("tiny",)  # the sizes of dmlab are for a GPU
SAMPLES = 8
#: Of its DMLab models, on one H100 (paper A.6, B.2), by stage; other sizes than ``dmlab``'s have no such figure.
PAPER_STEPS, PAPER_HOURS = 300_000, {("lam", True): 24, ("sequence", True): 46}


class Stepper(NamedTuple):
    """A trainer, a batch on its device, and what the batch counts."""

    trainer: Trainer
    batch: Any

    def __call__(self) -> torch.Tensor:
        return self.trainer.step(self.batch, 1e-4)

    def compiled(self) -> Callable[[], torch.Tensor]:
        """The same under ``torch.compile``."""
        self.trainer.step.forward = torch.compile(self.trainer.step.forward, dynamic=False)
        return self


@pytest.fixture(scope="module", autouse=True)
def kept_memory() -> None:
    keep_memory()


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Callable[[FlexLAMConfig], EpisodeStore]:
    """Episodes of noise, 600 frames for each size of frame."""
    made: dict[int, EpisodeStore] = {}

    def store(cfg: FlexLAMConfig) -> EpisodeStore:
        if cfg.frame not in made:
            path = tmp_path_factory.mktemp("noise") / "episodes"
            rng = np.random.default_rng(0)
            with EpisodeWriter(path, (cfg.frame, cfg.frame, cfg.channels)) as writer:
                for i in range(6):
                    frames = rng.integers(0, 256, (100, cfg.frame, cfg.frame, cfg.channels), dtype=np.uint8)
                    writer.add(frames, None, None, "noise", "test" if i == 5 else "train")
            made[cfg.frame] = EpisodeStore.open(path)
        return made[cfg.frame]

    return store


def stepper(kind: str, preset: str, store: EpisodeStore, device: torch.device, folder: Path, backend: str) -> Stepper:
    """A trainer of ``kind`` lam or sequence, with its first batch."""
    cfg, recipe = FlexLAMConfig.preset(preset), RECIPES[preset][kind]
    if kind == "lam":
        stage: Any = LamStage(cfg, store, recipe.batch, 0, device)
    else:
        shape = store.num_frames, cfg.bottleneck.slots
        codes = np.random.default_rng(0).integers(0, cfg.bottleneck.codebook_size, shape, dtype=np.int32)
        stage = SequenceStage(cfg, store, codes, recipe.batch, 0, device)
    trainer = Trainer(stage, recipe, folder / backend, device=device, backend=backend)
    trainer.stage.model.train()
    return Stepper(trainer, to_device(stage.read(0), device))


def least_work(step: Stepper) -> Work:
    """Products of forward and backward, as torch counts them; weights, gradients and moments read and written once."""
    with FlopCounterMode(display=False) as counter, torch.autocast(step.trainer.device.type, enabled=False):
        step.trainer.stage.loss(step.batch).backward()
    weights = sum(p.numel() for p in step.trainer.parameters.values())
    # read in both directions, written; the gradient written and read; two moments read and written
    moved = 4 * weights * (2 + 1 + 2 + 4)
    dtype = torch.bfloat16 if step.trainer.bf16 else torch.float32
    return Work(moved, counter.get_total_flops(), dtype)


def told(step: Stepper, timing: Timing, units: int, unit: str, work: Work, results: Results) -> str:
    """Throughput, share of the machine's arithmetic, memory."""
    seconds = 1e-3 * timing.median("ours")
    share = work.operations / seconds / results.machine.arithmetic(work.dtype)
    memory = f", {torch.cuda.max_memory_allocated() / 1e9:.3g} GB of GPU memory at most" if DEVICE == "cuda" else ""
    kind = str(work.dtype).removeprefix("torch.")
    hours = PAPER_STEPS * seconds / 3600
    paper = PAPER_HOURS.get((step.trainer.stage.name, step.trainer.stage.cfg == FlexLAMConfig.preset("dmlab")))
    projected = f"; {hours:.3g} hours for the paper's {PAPER_STEPS:,} steps, which took it {paper}" if paper else ""
    return (
        f"{step.trainer.describe()}; {units / seconds:.4g} {unit}/s, {share:.0%} of a matmul's rate in {kind} (MFU)"
        f"{memory}; {torch.get_num_threads()} threads{projected}"
    )


@pytest.mark.parametrize(
    ("kind", "preset"),
    [
        pytest.param(kind, preset, id=f"train/{kind}/{preset}/b{RECIPES[preset][kind].batch}")
        for preset in PRESETS
        for kind in ("lam", "sequence")
    ],
)
def test_step(
    benchmark: Any,
    request: pytest.FixtureRequest,
    results: Results,
    rounds: int,
    compiler: Compiler,
    stores: Callable[[FlexLAMConfig], EpisodeStore],
    tmp_path: Path,
    kind: str,
    preset: str,
) -> None:
    cfg = FlexLAMConfig.preset(preset)

    def make(folder: str, backend: str) -> Stepper:
        return stepper(kind, preset, stores(cfg), results.device, tmp_path / folder, backend)

    work = least_work(make("count", PLAIN))
    ours, peers = make("ours", AUTO), {REFERENCE: make("plain", PLAIN)}
    why = compiler.add(peers, COMPILED, lambda: make("compiled", PLAIN).compiled())  # type: ignore[arg-type]
    timing = in_turns(benchmark, ours, peers, results.machine.wall, rounds)  # type: ignore[arg-type]
    batch = ours.trainer.recipe.batch
    units, unit = (batch, "transitions") if kind == "lam" else (batch * ours.batch.frames.shape[1], "frames")
    note = "; ".join(filter(None, [told(ours, timing, units, unit, work, results), why]))
    results.add(benchmark, request.node.callspec.id, timing, work, note, memory_bound=False)


@pytest.mark.parametrize("preset", [pytest.param(preset, id=f"sample/dit/{preset}/b{SAMPLES}") for preset in PRESETS])
@torch.no_grad()
def test_sample(
    benchmark: Any, request: pytest.FixtureRequest, results: Results, rounds: int, compiler: Compiler, preset: str
) -> None:
    cfg, device = FlexLAMConfig.preset(preset), results.device
    bf16 = wants_bf16(device, "auto")
    dtype = torch.bfloat16 if bf16 else torch.float32

    def model(backend: str) -> LatentActionModel:
        torch.manual_seed(0)
        return set_backend(LatentActionModel(cfg, PLAIN).to(device, dtype).eval(), backend, device)

    g = torch.Generator().manual_seed(0)
    frames = torch.randint(0, 256, (SAMPLES, cfg.frame, cfg.frame, 3), generator=g, dtype=torch.uint8).to(device)
    latents = torch.randn(SAMPLES, cfg.bottleneck.slots, cfg.bottleneck.dim, generator=g).to(device)
    noise = torch.randn(SAMPLES, cfg.channels, cfg.frame, cfg.frame, generator=g).to(device)
    ours, plain, third = model(AUTO), model(PLAIN), model(PLAIN)
    now = ours.pixels("o_t", frames)
    steps = cfg.decoder.steps
    sides: dict[str, Callable[[], object]] = {REFERENCE: lambda: plain.sample(noise, now, latents, steps)}

    def compiled() -> Callable[[], object]:
        third.decoder = torch.compile(third.decoder, dynamic=False)  # type: ignore[assignment]
        return lambda: third.sample(noise, now, latents, steps)

    why = compiler.add(sides, COMPILED, compiled)
    with FlopCounterMode(display=False) as counter:
        plain.sample(noise, now, latents, steps)
    weights = sum(p.numel() for p in plain.decoder.parameters()) * dtype.itemsize
    work = Work(steps * weights, counter.get_total_flops(), dtype, weights)
    timing = in_turns(benchmark, lambda: ours.decode(frames, latents), sides, results.machine.wall, rounds)
    per = f"{SAMPLES} frames, {steps} Euler steps, {str(dtype).removeprefix('torch.')}, no autocast"
    results.add(benchmark, request.node.callspec.id, timing, work, "; ".join(filter(None, [per, why])))
