"""From stored frames to tokens, the flow's loss and its noise, at a training batch of ``dmlab``, beside PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from measure import in_turns
from peers import Compiler
from rows import Results, Work
from torch import Tensor

from flexlam_fast import ops
from flexlam_fast.encoder import CHANGE_GAIN
from flexlam_fast.flow import interpolate, velocity_of
from flexlam_fast.layers import normalise, patchify, unpatchify

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
EAGER, COMPILED, GENERATORS = "eager PyTorch", "torch.compile", "torch.randn, a generator a sample"
BATCH, SIZE, CHANNELS = 256, 64, 3
PIXELS = SIZE * SIZE * CHANNELS
ENCODER_PATCH, DECODER_PATCH = 8, 4
DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16"}
every_dtype = pytest.mark.parametrize("dtype", [pytest.param(d, id=name) for d, name in DTYPES.items()])


class Inputs(NamedTuple):
    """One batch on the device."""

    now: Tensor
    following: Tensor
    noise: Tensor
    tau: Tensor


class Bench(NamedTuple):
    """What a test needs to time and to note."""

    benchmark: Any
    results: Results
    compiler: Compiler
    rounds: int

    def run(self, name: str, ours: Callable[[], object], eager: Callable[[], object], moved: int, note: str) -> None:
        """Time ours, plain PyTorch and what torch.compile makes of it, in turns, and keep the row."""
        peers = {EAGER: eager}
        told = self.compiler.add(peers, COMPILED, lambda: torch.compile(eager, dynamic=False))
        timing = in_turns(self.benchmark, ours, peers, self.results.machine.clock, self.rounds)
        work = Work(moved, 8 * BATCH * PIXELS, torch.float32)
        threads = f"{torch.get_num_threads()} threads"
        self.results.add(self.benchmark, name, timing, work, ", ".join(filter(None, [threads, told, note])))


@pytest.fixture
def bench(benchmark: Any, results: Results, compiler: Compiler, rounds: int) -> Bench:
    return Bench(benchmark, results, compiler, rounds)


@pytest.fixture(scope="module")
def inputs() -> Inputs:
    generator = torch.Generator(DEVICE).manual_seed(0)
    shape, options = (2, BATCH, SIZE, SIZE, CHANNELS), dict(generator=generator, device=DEVICE)
    frames = torch.randint(0, 256, shape, dtype=torch.uint8, **options)
    return Inputs(*frames, torch.randn(BATCH, PIXELS, **options), torch.rand(BATCH, **options))


@every_dtype
def test_tubelets(bench: Bench, inputs: Inputs, dtype: torch.dtype) -> None:
    def eager() -> Tensor:
        now, following = normalise(inputs.now), normalise(inputs.following)
        change = CHANGE_GAIN * patchify(following - now, ENCODER_PATCH)
        return torch.cat([patchify(now, ENCODER_PATCH), change], dim=-1).to(dtype)

    def ours() -> Tensor:
        return ops.tubelets(*inputs[:2], ENCODER_PATCH, CHANGE_GAIN, dtype=dtype)

    assert torch.equal(ours(), eager())
    moved = BATCH * PIXELS * (2 + 2 * dtype.itemsize)
    bench.run(f"frames/tubelets/b{BATCH}/{DTYPES[dtype]}", ours, eager, moved, "the encoder's tubelets, patch 8")


@every_dtype
def test_flow_patches(bench: Bench, inputs: Inputs, dtype: torch.dtype) -> None:
    def eager() -> Tensor:
        now, following = normalise(inputs.now), normalise(inputs.following)
        sample = interpolate(following, inputs.noise.view(following.shape), inputs.tau)
        return patchify(torch.cat([sample.x, now], dim=1), DECODER_PATCH).to(dtype)

    def ours() -> Tensor:
        return ops.flow_patches(*inputs, DECODER_PATCH, dtype=dtype)

    assert torch.equal(ours(), eager())
    moved = BATCH * PIXELS * (2 + 4 + 2 * dtype.itemsize)
    bench.run(f"frames/flow/b{BATCH}/{DTYPES[dtype]}", ours, eager, moved, "the decoder's patches of x_tau and o_t")


@pytest.mark.parametrize("predict", ["velocity", "frame"])
@every_dtype
def test_flow_loss(bench: Bench, inputs: Inputs, predict: str, dtype: torch.dtype) -> None:
    side, fields = SIZE // DECODER_PATCH, CHANNELS * DECODER_PATCH**2
    generator = torch.Generator(DEVICE).manual_seed(1)
    out = torch.randn(BATCH, side**2, fields, generator=generator, device=DEVICE).to(dtype).requires_grad_()

    def loss() -> Tensor:
        now, following = normalise(inputs.now), normalise(inputs.following)
        sample = interpolate(following, inputs.noise.view(following.shape), inputs.tau)
        velocity = unpatchify(out.float(), DECODER_PATCH, CHANNELS, SIZE)
        if predict == "frame":
            velocity = velocity_of(now + velocity, sample.x, sample.tau)
        return (velocity - sample.target).square().mean()

    def eager() -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss(), out)

    def ours() -> tuple[Tensor, ...]:
        return torch.autograd.grad(ops.flow_loss(out, *inputs, predict=predict), out)

    torch.testing.assert_close(ours()[0], eager()[0], rtol=1e-2 if dtype == torch.bfloat16 else 1e-4, atol=1e-10)
    # forward reads everything and writes the errors, backward reads and writes those
    moved = BATCH * PIXELS * (4 + (2 if predict == "frame" else 1) + 4 * dtype.itemsize)
    name = f"frames/loss/{predict}/b{BATCH}/{DTYPES[dtype]}"
    bench.run(name, ours, eager, moved, "forward and backward to the head's output")


def test_noise(benchmark: Any, results: Results, rounds: int) -> None:
    """What a batch's noise costs; a generator a sample is what makes it a function of (seed, step, sample)."""
    seed, streams = torch.tensor([1, 2], device=DEVICE), torch.arange(BATCH, device=DEVICE)

    def theirs() -> Tensor:
        generators = [torch.Generator().manual_seed(i) for i in range(BATCH)]
        return torch.stack([torch.randn(PIXELS, generator=g) for g in generators]).to(DEVICE)

    peers = {
        GENERATORS: theirs,
        "torch.randn, one generator, another batch's numbers": lambda: torch.randn(BATCH, PIXELS, device=DEVICE),
    }
    ours = lambda: ops.draw_normal(seed, streams, PIXELS)  # noqa: E731
    timing = in_turns(benchmark, ours, peers, results.machine.clock, rounds)
    work = Work(BATCH * PIXELS * 4, 60 * BATCH * PIXELS, torch.float32)
    note = f"{torch.get_num_threads()} threads, {BATCH} x {PIXELS} standard normal numbers"
    results.add(benchmark, f"draws/noise/b{BATCH}", timing, work, note, memory_bound=False)
