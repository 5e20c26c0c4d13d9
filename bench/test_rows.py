"""Norms, gated sums and activations of a training step, forward and backward, beside PyTorch as the modules write them.

Dtypes are those of a step under autocast: the residual stream fp32, linear layers and what goes between them bf16. On a
CPU the sizes are those of the ``tiny`` preset, on a GPU those of ``dmlab``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from measure import in_turns
from peers import Compiler
from rows import Results, Work
from torch import Tensor

from flexlam_fast import backend as backends
from flexlam_fast import ops
from flexlam_fast.config import FlexLAMConfig

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
EAGER, COMPILED = "eager PyTorch", "torch.compile"
BATCH, PRESET = (256, "dmlab") if DEVICE.type == "cuda" else (32, "tiny")
EPS = 1e-6
WIDE, HALF = torch.float32, torch.bfloat16


class Case(NamedTuple):
    """Ours, PyTorch's, the arguments' shapes and dtypes, and what an element costs at least.

    ``moved`` is bytes of forward and backward together, each argument read and each result written once in both;
    ``operations`` counts an exponential as one.
    """

    ours: Callable[..., Tensor]
    peer: Callable[..., Tensor]
    shapes: tuple[tuple[tuple[int, ...], torch.dtype], ...]
    moved: int
    operations: int


def plain_rms(x: Tensor, weight: Tensor) -> Tensor:
    return (weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS))).to(HALF)


def cases() -> dict[str, Case]:
    """Each op with what it replaces in the modules, and the cast to bf16 that a linear layer would do."""
    cfg = FlexLAMConfig.preset(PRESET)
    dec, seq = cfg.decoder, cfg.sequence
    tokens = (cfg.frame // dec.patch) ** 2 + cfg.bottleneck.slots
    x, row = ((BATCH, tokens, dec.width), WIDE), ((BATCH, dec.width), HALF)
    y, up = (x[0], HALF), ((BATCH, tokens, dec.ffn), HALF)
    long, inner = ((BATCH, 256, seq.hidden), WIDE), ((BATCH, 256, seq.intermediate), HALF)
    weight = (dec.width,)
    return {
        "adaln": Case(
            lambda x, shift, scale: ops.adaln(x, shift, scale, eps=EPS, dtype=HALF),
            lambda x, shift, scale: (
                F.layer_norm(x, weight, eps=EPS) * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)
            ).to(HALF),
            (x, row, row),
            16,
            22,
        ),
        "gate_add": Case(ops.gate_add, lambda x, y, gate: x + gate.unsqueeze(1) * y, (x, y, row), 18, 5),
        "layer_norm": Case(
            lambda x, w, b: ops.layer_norm(x, w, b, eps=EPS, dtype=HALF),
            lambda x, w, b: F.layer_norm(x, weight, w, b, eps=EPS).to(HALF),
            (x, (weight, WIDE), (weight, WIDE)),
            16,
            21,
        ),
        "rms_norm": Case(
            lambda x, w: ops.rms_norm(x, w, EPS, dtype=HALF), plain_rms, (long, ((seq.hidden,), WIDE)), 16, 16
        ),
        "gelu": Case(ops.gelu, lambda x: F.gelu(x, approximate="tanh"), (up,), 10, 24),
        "swiglu": Case(ops.swiglu, lambda gate, up: F.silu(gate) * up, (inner, inner), 16, 16),
    }


CASES = cases()


@pytest.mark.parametrize("name", [pytest.param(name, id=f"{name}/train/b{BATCH}") for name in CASES])
def test_rows(
    benchmark: Any, request: pytest.FixtureRequest, results: Results, compiler: Compiler, rounds: int, name: str
) -> None:
    case, generator = CASES[name], torch.Generator(DEVICE).manual_seed(0)
    args = [torch.randn(shape, generator=generator, device=DEVICE).to(dtype) for shape, dtype in case.shapes]
    args = [t.requires_grad_() for t in args]
    grad = torch.randn(args[0].shape, generator=generator, device=DEVICE).to(case.peer(*args).dtype)

    def make(run: Callable[..., Tensor]) -> Callable[[], tuple[Tensor, ...]]:
        return lambda: torch.autograd.grad(run(*args), args, grad)

    # sums over tokens are bf16's last bits apart, the peer's own are rounded more than once
    torch.testing.assert_close(case.ours(*args), case.peer(*args), rtol=2e-2, atol=2e-2)
    for ours, theirs in zip(make(case.ours)(), make(case.peer)(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2 * float(theirs.abs().max()))
    peers = {EAGER: make(case.peer)}
    missing = compiler.add(peers, COMPILED, lambda: make(torch.compile(case.peer, dynamic=False)))
    timing = in_turns(benchmark, make(case.ours), peers, results.machine.clock, rounds)
    elements = args[0].numel()
    work = Work(case.moved * elements, case.operations * elements, WIDE)
    how = f"forward and backward of {list(args[0].shape)} as under autocast, {torch.get_num_threads()} threads"
    notes = [how, f"backend {backends.choose(backends.AUTO, DEVICE).name}", missing]
    results.add(benchmark, request.node.callspec.id, timing, work, ", ".join(filter(None, notes)))
