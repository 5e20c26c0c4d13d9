"""A block of codes of the ``dmlab`` sequence model: one persistent launch beside the fused kernels in one graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from blocks import captured, case_of
from measure import in_turns
from rows import Results
from test_decide import least_work

from flexlam_fast.backend import NATIVE, TRITON, probe
from flexlam_fast.config import FlexLAMConfig
from flexlam_fast.ops.block_cuda import refusal

BUDGET, DTYPE = 64, torch.bfloat16
KERNELS = "triton kernels, one CUDA graph"


def needed() -> str:
    """What is missing for this bench; empty if nothing is."""
    if not torch.cuda.is_available():
        return "a block in one launch is CUDA's; there is no CUDA device"
    missing = [s.reason for s in probe("cuda") if s.name in (NATIVE, TRITON) and not s.available]
    return "; ".join(missing)


pytestmark = pytest.mark.skipif(bool(needed()), reason=needed() or "nothing is missing")


@pytest.mark.parametrize("batch", [pytest.param(b, id=f"codes/dmlab/b{b}/k{BUDGET}") for b in (1, 2, 4, 8)])
def test_codes(benchmark: Any, request: pytest.FixtureRequest, results: Results, rounds: int, batch: int) -> None:
    cfg, device = FlexLAMConfig.preset("dmlab"), results.device
    case = case_of(cfg, device, DTYPE, batch)
    why = refusal(cfg, DTYPE, DTYPE, case.cache.session_pages, device)
    if why:
        pytest.skip(f"the engine does not take it: {why}")
    ours, theirs = captured(case.by_engine(BUDGET)), captured(case.by_kernels(BUDGET))
    same = int((ours() == theirs()).sum())
    timing = in_turns(benchmark, ours, {KERNELS: theirs}, results.machine.wall, rounds)
    note = (
        f"bfloat16, {batch} sessions with full windows, {BUDGET} codes from the first logits: {BUDGET - 1} passes; "
        f"both replay a graph; {same} of {batch * BUDGET} codes are the same, which parts at a near tie; the floor is "
        "weights, keys and values read once per pass"
    )
    work = least_work(case.model, batch, BUDGET - 1)
    results.add(benchmark, request.node.callspec.id, timing, work, note, memory_bound=False)
