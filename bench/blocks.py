"""Blocks of codes in one launch on a GPU, again and again: ``python bench/blocks.py --blocks 100000``.

Sessions with full windows generate the same block in a captured launch until the number is reached. Every block must
have the codes of the first one, and no barrier may be lost: neither a hang nor a race is left a place to hide.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from flexlam_fast.backend import TRITON, probe
from flexlam_fast.config import FlexLAMConfig
from flexlam_fast.sequence import decode
from flexlam_fast.sequence.cache import PagedCache
from flexlam_fast.sequence.decode import Appended
from flexlam_fast.sequence.eager import Eager
from flexlam_fast.sequence.fused import Fused
from flexlam_fast.sequence.model import SequenceModel
from flexlam_fast.sequence.native_cuda import CudaBlock

Call = Callable[[], Tensor]


class Case(NamedTuple):
    """Sessions whose windows are full, and their newest append."""

    model: SequenceModel
    cache: PagedCache
    appended: Appended

    def by_engine(self, k: int) -> Call:
        """Generates ``k`` codes of every session in one launch."""
        runner = CudaBlock(self.model, Eager(self.model))
        return lambda: decode.generate(runner, self.cache, self.appended, k)

    def by_kernels(self, k: int) -> Call:
        """Generates them by the fused kernels, five launches a layer."""
        runner = Fused(self.model)
        return lambda: decode.generate(runner, self.cache, self.appended, k)


@torch.no_grad()
def case_of(cfg: FlexLAMConfig, device: torch.device, dtype: torch.dtype, batch: int) -> Case:
    """Random weights, wide enough that codes are clear choices, and sessions that have seen more than a window."""
    torch.manual_seed(0)
    model = SequenceModel(cfg).eval().requires_grad_(False)
    for p in model.parameters():
        torch.nn.init.normal_(p, mean=1.0 if p.dim() == 1 else 0.0, std=0.1 if p.dim() == 1 else p.shape[-1] ** -0.5)
    model, cache = model.to(device, dtype), PagedCache(cfg, batch, device, dtype)
    cache.open(batch)
    runner = Eager(model)
    for _ in range(cfg.sequence.window + 2):
        codes = torch.randint(cfg.bottleneck.codebook_size, (batch, cfg.bottleneck.slots), device=device)
        pixels = torch.rand(batch, cfg.channels, cfg.frame, cfg.frame, device=device, dtype=dtype) * 2 - 1
        appended = decode.append(runner, cache, codes, pixels)
    return Case(model, cache, appended)


def captured(call: Call) -> Call:
    """Replays a call that has been captured in a CUDA graph; what it returns stays in one place."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call(), call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()

    def replay() -> Tensor:
        graph.replay()
        return out

    return replay


def soak(cfg: FlexLAMConfig, dtype: torch.dtype, batch: int, k: int, blocks: int) -> str:
    """Generate so many blocks; return what is to be told of them.

    Raises:
        BackendError: a barrier was lost.
        SystemExit: a block with other codes.
    """
    case = case_of(cfg, torch.device("cuda"), dtype, batch)
    runner = CudaBlock(case.model, Eager(case.model))
    replay = captured(lambda: decode.generate(runner, case.cache, case.appended, k))
    first = replay().clone()
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")
    start = time.perf_counter()
    for done in range(blocks):
        wrong += (replay() != first).any()
        if done % 1000 == 999:
            torch.cuda.synchronize()
            runner.check()
    torch.cuda.synchronize()
    runner.check()
    if int(wrong):
        raise SystemExit(f"blocks: expected the same codes every time, got others in {int(wrong)} of {blocks}")
    ms = 1e3 * (time.perf_counter() - start) / max(blocks, 1)
    same = ""
    if any(status.name == TRITON and status.available for status in probe("cuda")):
        other = decode.generate(Fused(case.model), case.cache, case.appended, k)
        same = f"; {int((other == first).sum())} of {other.numel()} codes are those of the fused kernels"
    return f"{blocks} blocks of {k} codes, {batch} sessions, {ms:.4g} ms each with the comparison, all alike{same}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="dmlab", help="of the model")
    parser.add_argument("--blocks", type=int, default=1000, help="how many")
    parser.add_argument("--batch", type=int, default=1, help="sessions")
    parser.add_argument("--budget", type=int, default=64, help="codes of a block")
    parser.add_argument(
        "--dtype", default="bfloat16", choices=["float32", "bfloat16", "float16"], help="of weights, pages"
    )
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("blocks: expected a CUDA device, got none")
    cfg, dtype = FlexLAMConfig.preset(options.preset), getattr(torch, options.dtype)
    print(soak(cfg, dtype, options.batch, options.budget, options.blocks))


if __name__ == "__main__":
    main()
