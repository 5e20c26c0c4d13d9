"""FSQ forward beside ``vector_quantize_pytorch.FSQ``, on a training batch of 256 blocks of 64 slots."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import Results
from measure import in_turns

from flexlam_fast import ops

peer_package = pytest.importorskip("vector_quantize_pytorch")

LEVELS = (8, 5, 5, 5)


@pytest.mark.parametrize("shape", [pytest.param((256, 64), id="fsq/8-5-5-5/256x64")])
def test_fsq_forward(
    benchmark: Any, request: pytest.FixtureRequest, results: Results, rounds: int, shape: tuple[int, int]
) -> None:
    z = torch.randn(*shape, len(LEVELS), generator=torch.Generator().manual_seed(0)).to(results.device)
    theirs = peer_package.FSQ(levels=list(LEVELS)).to(results.device)
    latents, codes = ops.fsq(z, LEVELS)
    values, expected = theirs(z)
    assert torch.equal(codes, expected.to(torch.int32))
    assert torch.allclose(latents, values, rtol=0, atol=1e-6)
    with torch.no_grad():
        peers = {"vector_quantize_pytorch FSQ": lambda: theirs(z)}
        timing = in_turns(benchmark, lambda: ops.fsq(z, LEVELS), peers, results.device, rounds)
    moved = z.nbytes + latents.nbytes + codes.nbytes
    note = f"fp32, {torch.get_num_threads()} threads, no gradient; the floor reads z and writes latents and codes once"
    results.add(benchmark, request.node.callspec.id, timing, moved, note)
