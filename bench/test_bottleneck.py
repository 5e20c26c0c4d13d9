"""FSQ beside ``vector_quantize_pytorch.FSQ``: forward, backward, with projection, from codes, and its host cost.

Every row checks ours against the peer (the codes exactly, the rest by torch's tolerances of the dtype) before it times.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from cases import (
    DTYPES,
    LEVEL_SETS,
    WIDTH,
    Case,
    look_up_cases,
    look_up_work,
    project_cases,
    project_work,
    quantize_cases,
    quantize_work,
)
from measure import WallClock, in_turns
from peers import COMPILED, REFERENCE, VQ, Compiler
from rows import Results, Work
from torch import Tensor
from torch.nn import functional as F

from flexlam_fast import backend as backends
from flexlam_fast import ops

vector_quantize = pytest.importorskip("vector_quantize_pytorch")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PLAIN = "three plain torch ops"

Pair = tuple[Tensor, Tensor]


class Inputs(NamedTuple):
    """Tensors of one case; ``keep`` and ``null`` are None where every slot is kept, ``upstream`` without backward."""

    z: Tensor
    keep: Tensor | None
    null: Tensor | None
    upstream: Tensor | None

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        """What gradients are taken with respect to."""
        return (self.z,) if self.null is None else (self.z, self.null)


class Bench(NamedTuple):
    """What a test needs to time and to note."""

    benchmark: Any
    results: Results
    compiler: Compiler
    rounds: int

    def run(self, case: Case, ours: Any, peer: Any, reference: Any, make: Callable[[Any], Any], work: Work) -> None:
        """Time ``make`` of each function in turns and keep the row."""
        name = backends.choose(case.backend, DEVICE).name
        peers, notes = {VQ: make(peer)}, [f"{DTYPES[case.dtype]}, {torch.get_num_threads()} threads, backend {name}"]
        with torch.set_grad_enabled(case.gradient):
            if case.backend == backends.AUTO:
                notes.append(self.compiler.add(peers, COMPILED, lambda: make(torch.compile(peer, dynamic=False))))
            if name != backends.REFERENCE:
                peers[REFERENCE] = make(reference)
            timing = in_turns(self.benchmark, make(ours), peers, self.results.machine.clock, self.rounds)
        notes.append("forward and backward" if case.gradient else "no gradient")
        self.results.add(self.benchmark, case.id, timing, work, ", ".join(filter(None, notes)))


@pytest.fixture
def bench(benchmark: Any, results: Results, compiler: Compiler, rounds: int) -> Bench:
    return Bench(benchmark, results, compiler, rounds)


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Return normal numbers on the device, the same in every run."""
    return torch.randn(*shape, generator=torch.Generator(DEVICE).manual_seed(seed), device=DEVICE, dtype=dtype)


def draw_inputs(case: Case) -> Inputs:
    """Return z, and if the case asks for them a kept prefix of 0..K slots, a null latent and an upstream gradient."""
    d, generator = len(case.levels), torch.Generator(DEVICE).manual_seed(1)
    shape = (case.blocks, case.slots, d)
    z = draw(*shape, dtype=case.dtype).requires_grad_(case.gradient)
    keep = torch.randint(0, case.slots + 1, (case.blocks,), generator=generator, device=DEVICE) if case.prefix else None
    null = draw(d, seed=2).requires_grad_(case.gradient) if case.prefix else None
    return Inputs(z, keep, null, draw(*shape, dtype=case.dtype, seed=3) if case.gradient else None)


def vq_with_prefix(theirs: Any) -> Callable[[Tensor, Tensor | None, Tensor | None], Pair]:
    """Return the peer's FSQ, followed by ``torch.where`` for the suffix where there is a ``keep``."""

    def forward(z: Tensor, keep: Tensor | None, null: Tensor | None) -> Pair:
        values, codes = theirs(z)
        if keep is None or null is None:
            return values, codes
        kept = torch.arange(z.shape[-2], device=z.device) < keep.unsqueeze(-1)
        return torch.where(kept.unsqueeze(-1), values, null.to(values.dtype)), codes

    return forward


def gradients(forward: Callable[..., Pair], inputs: Inputs) -> tuple[Tensor, ...]:
    """Forward, then the gradients of z and of the null latent for the same upstream gradient."""
    latents, _ = forward(inputs.z, inputs.keep, inputs.null)
    return torch.autograd.grad(latents, inputs.leaves, inputs.upstream)


def check_quantize(case: Case, inputs: Inputs, ours: Callable[..., Pair], peer: Callable[..., Pair]) -> None:
    """Codes are the peer's; values, and gradients where there are any, are within torch's tolerance of the dtype.

    One code in a million, so none of a training batch, may be the next one where z is within rounding of a threshold:
    the peer takes its shift from the device's atanh, whose last bit need not be ours.
    """
    (latents, codes), (values, expected) = (f(inputs.z, inputs.keep, inputs.null) for f in (ours, peer))
    same = codes == expected
    assert int((~same).sum()) <= case.tokens // 10**6
    check_rounding(case, inputs.z[~same].double(), codes[~same], 1e-5)
    torch.testing.assert_close(latents[same], values[same])
    if not case.gradient:
        return
    mine, theirs = gradients(ours, inputs), gradients(peer, inputs)
    torch.testing.assert_close(mine[0], theirs[0])
    if inputs.null is not None:
        # sums of up to n normal numbers, about sqrt(n), which the peer accumulates in the dtype of its latents
        slack = 1e-5 if case.dtype == torch.float32 else 2e-2
        torch.testing.assert_close(mine[1], theirs[1], rtol=slack, atol=slack * math.sqrt(case.tokens))


@pytest.mark.parametrize("case", quantize_cases(DEVICE), ids=lambda case: case.id)
def test_fsq(bench: Bench, case: Case) -> None:
    inputs = draw_inputs(case)
    peer = vq_with_prefix(vector_quantize.FSQ(levels=list(case.levels)).to(DEVICE))

    def ours(z: Tensor, keep: Tensor | None, null: Tensor | None, backend: str = case.backend) -> Pair:
        return ops.fsq(z, case.levels, keep, null, backend=backend)

    def reference(z: Tensor, keep: Tensor | None, null: Tensor | None) -> Pair:
        return ours(z, keep, null, backends.REFERENCE)

    def make(forward: Callable[..., Pair]) -> Callable[[], object]:
        if case.gradient:
            return lambda: gradients(forward, inputs)
        return lambda: forward(inputs.z, inputs.keep, inputs.null)

    check_quantize(case, inputs, ours, peer)
    bench.run(case, ours, peer, reference, make, quantize_work(case, inputs.keep))


@pytest.mark.parametrize("case", project_cases(DEVICE), ids=lambda case: case.id)
def test_fsq_project(bench: Bench, case: Case) -> None:
    x = draw(case.blocks, case.slots, WIDTH, dtype=case.dtype)
    weight = (draw(len(case.levels), WIDTH, seed=1) / math.sqrt(WIDTH)).to(case.dtype)
    bias = draw(len(case.levels), dtype=case.dtype, seed=2) / 10
    theirs = vector_quantize.FSQ(levels=list(case.levels)).to(DEVICE)

    def ours(x: Tensor, backend: str = case.backend) -> Pair:
        return ops.fsq_project(x, weight, bias, case.levels, backend=backend)

    def peer(x: Tensor) -> Pair:
        return theirs(F.linear(x, weight, bias))

    with torch.no_grad():
        z = F.linear(x.double(), weight.double(), bias.double())
        for latents, codes in (ours(x), peer(x)):
            check_projected(case, z, latents, codes)
    make = lambda forward: lambda: forward(x)  # noqa: E731
    bench.run(case, ours, peer, lambda x: ours(x, backends.REFERENCE), make, project_work(case))


def check_projected(case: Case, z: Tensor, latents: Tensor, codes: Tensor) -> None:
    """Each code is that of the exact projection ``z``, give or take what the sum in the dtype loses.

    The peer's projection is rounded to its dtype: in bf16 2^-9 of a z around 2, times up to 4 levels.
    """
    check_rounding(case, z, codes, 1e-4 if case.dtype == torch.float32 else 5e-2)
    torch.testing.assert_close(latents, ops.codes_to_latents(codes, case.levels).to(latents.dtype))


def check_rounding(case: Case, z: Tensor, codes: Tensor, slack: float) -> None:
    """Every digit of ``codes`` is a rounding of what fp64 makes of ``z``, with ``slack`` levels to spare."""
    levels = torch.tensor(case.levels, device=z.device)
    half, offset = (levels - 1).double() * 1.001 / 2, torch.where(levels % 2 == 0, 0.5, 0.0)
    exact = (z + (offset / half).atanh()).tanh() * half - offset
    basis = torch.tensor([math.prod(case.levels[:i]) for i in range(len(case.levels))], device=z.device)
    digits = codes.long().unsqueeze(-1) // basis % levels - levels // 2
    assert bool(((digits - exact).abs() <= 0.5 + slack).all())


@pytest.mark.parametrize("case", look_up_cases(DEVICE), ids=lambda case: case.id)
def test_codes_to_latents(bench: Bench, case: Case) -> None:
    theirs = vector_quantize.FSQ(levels=list(case.levels)).to(DEVICE)
    generator = torch.Generator(DEVICE).manual_seed(0)
    shape = (case.blocks, case.slots)
    codes = torch.randint(0, math.prod(case.levels), shape, generator=generator, device=DEVICE, dtype=torch.int32)

    def ours(codes: Tensor, backend: str = case.backend) -> Tensor:
        return ops.codes_to_latents(codes, case.levels, backend=backend)

    torch.testing.assert_close(ours(codes), theirs.indices_to_codes(codes))
    make = lambda look_up: lambda: look_up(codes)  # noqa: E731
    reference = lambda codes: ours(codes, backends.REFERENCE)  # noqa: E731
    bench.run(case, ours, theirs.indices_to_codes, reference, make, look_up_work(case))


HOST, HOST_AUTOGRAD = (Case(op, LEVEL_SETS[0], 1, 1, torch.float32) for op in ("host", "host_autograd"))


@pytest.mark.parametrize("case", [HOST, HOST_AUTOGRAD], ids=lambda case: case.id)
def test_host_cost(bench: Bench, case: Case) -> None:
    recorded = case.op == HOST_AUTOGRAD.op
    z = draw(1, 1, len(case.levels)).requires_grad_(recorded)
    values, expected = vector_quantize.FSQ(levels=list(case.levels)).to(DEVICE)(z)
    latents, codes = ops.fsq(z, case.levels)
    assert torch.equal(codes, expected.to(torch.int32))
    torch.testing.assert_close(latents, values)
    peers = {PLAIN: lambda: (z.add(1), z.mul(2), z.tanh())}
    ours = lambda: ops.fsq(z, case.levels)  # noqa: E731
    with torch.set_grad_enabled(recorded):
        timing = in_turns(bench.benchmark, ours, peers, WallClock(DEVICE, wait=False), bench.rounds)
    name = backends.choose(case.backend, DEVICE).name
    how = "forward, recorded for a backward" if recorded else "no gradient"
    note = f"what the host spends on one call with one token, fp32, backend {name}, {how}"
    bench.results.add(bench.benchmark, case.id, timing, quantize_work(case, None), note, memory_bound=False)
