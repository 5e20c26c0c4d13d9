"""Linear layers of a training step under bf16 autocast, forward and backward, beside torch's own.

Sizes are those of the ``tiny`` LAM: the decoder's projections over all tokens of a batch. A GPU has none of ours.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from measure import in_turns
from peers import Compiler
from rows import Results, Work
from torch import Tensor

from flexlam_fast import ops
from flexlam_fast.config import FlexLAMConfig
from flexlam_fast.train.recipes import RECIPES

AUTOCAST = "F.linear under autocast"
HALF = torch.bfloat16


def cases() -> dict[str, tuple[int, int, int]]:
    """Rows, inner and outer width of the layers around attention and of the MLP."""
    cfg, batch = FlexLAMConfig.preset("tiny"), RECIPES["tiny"]["lam"].batch
    dec = cfg.decoder
    rows = batch * ((cfg.frame // dec.patch) ** 2 + cfg.bottleneck.slots)
    return {
        "qkv": (rows, dec.width, 3 * dec.width),
        "out": (rows, dec.width, dec.width),
        "down": (rows, dec.ffn, dec.width),
    }


def work_of(rows: int, inner: int, outer: int) -> Work:
    """Three products; each tensor moved once: input and weight in both directions, result, gradients."""
    moved = HALF.itemsize * rows * (3 * inner + 2 * outer) + 4 * 3 * (inner + 1) * outer
    return Work(moved, 3 * 2 * rows * inner * outer, HALF)


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU ours is torch's own")
@pytest.mark.parametrize("name", [pytest.param(name, id=f"linear/train/tiny_{name}") for name in cases()])
def test_linear(
    benchmark: Any, request: pytest.FixtureRequest, results: Results, compiler: Compiler, rounds: int, name: str
) -> None:
    rows, inner, outer = cases()[name]
    g = torch.Generator().manual_seed(0)
    x = torch.randn(rows, inner, generator=g).to(HALF).requires_grad_()
    weight = (torch.randn(outer, inner, generator=g) * inner**-0.5).requires_grad_()
    bias = torch.randn(outer, generator=g).requires_grad_()
    upstream = torch.randn(rows, outer, generator=g).to(HALF)
    leaves = x, weight, bias

    def step(call: Callable[..., Tensor]) -> Callable[[], tuple[Tensor, ...]]:
        def run() -> tuple[Tensor, ...]:
            with torch.autocast("cpu", HALF):
                out = call(*leaves)
            return out, *torch.autograd.grad(out, leaves, upstream)

        return run

    peers: dict[str, Callable[[], object]] = {AUTOCAST: step(F.linear)}
    for mine, theirs in zip(step(ops.linear_bf16)(), step(F.linear)(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=2**-6, atol=0.1)
    why = compiler.add(peers, f"{AUTOCAST}, torch.compile", lambda: step(torch.compile(F.linear, dynamic=False)))
    timing = in_turns(benchmark, step(ops.linear_bf16), peers, results.machine.clock, rounds)
    note = f"{rows} rows, {inner} to {outer}, {torch.get_num_threads()} threads, forward and backward"
    case_id, work = request.node.callspec.id, work_of(rows, inner, outer)
    results.add(benchmark, case_id, timing, work, ", ".join(filter(None, [note, why])), memory_bound=False)
