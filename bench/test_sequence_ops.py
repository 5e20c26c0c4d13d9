"""What trains the sequence model, forward and backward: rotation, loss, and attention of packed windows.

Sizes are those of ``dmlab``: windows of some 2,500 tokens, 4 heads of 64, 1,000 codes (4,375: ``real``). Peers are
the model's modules in PyTorch, eager and under ``torch.compile``; attention's is a batch of padded windows with the
layout's mask. Ours is compared with the peer before it is timed.
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
from flexlam_fast.sequence.layout import history_layout
from flexlam_fast.sequence.model import rotation
from flexlam_fast.sequence.packing import Packer

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
DTYPE = torch.bfloat16 if ON_GPU else torch.float32
EAGER, COMPILED, PADDED = "PyTorch", "PyTorch, torch.compile", "SDPA of padded windows with their mask"
HEADS, DIM, EPS = 4, 64, 1e-6
BATCH = 32 if ON_GPU else 1
Step = Callable[[], tuple[Tensor, ...]]


def normal(*shape: int, leaf: bool = True) -> Tensor:
    made = torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))).to(DEVICE, DTYPE)
    return made.requires_grad_() if leaf else made


def close(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...]) -> None:
    """Check that both sides do the same; their errors are the tests' business."""
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b.to(a.dtype), rtol=2e-2, atol=1e-3 * float(b.abs().max()))


def told(*notes: str) -> str:
    kind = str(DTYPE).removeprefix("torch.")
    return ", ".join(filter(None, [kind, f"{torch.get_num_threads()} threads", "forward and backward", *notes]))


@pytest.mark.parametrize("row", [pytest.param(f"rotary/train/b{BATCH}", id=f"rotary/train/b{BATCH}")])
def test_rotary(benchmark: Any, results: Results, compiler: Compiler, rounds: int, row: str) -> None:
    tokens = 2496
    q, k = normal(BATCH, tokens, HEADS, DIM), normal(BATCH, tokens, HEADS, DIM)
    weights = [torch.ones(DIM, device=DEVICE, requires_grad=True) for _ in range(2)]
    r = rotation(torch.arange(tokens, device=DEVICE), DIM, 1e4)
    up = normal(BATCH, tokens, HEADS, DIM, leaf=False)

    def step(backend: str) -> Step:
        def run() -> tuple[Tensor, ...]:
            outs = ops.qk_norm_rope(q, k, *weights, r.cos[0, 0], r.sin[0, 0], EPS, backend=backend)
            return torch.autograd.grad(outs, [q, k, *weights], [up, up])

        return run

    peers: dict[str, Callable[[], object]] = {EAGER: step("reference")}
    note = compiler.add(peers, COMPILED, lambda: torch.compile(step("reference")))
    close(step("auto")(), step("reference")())
    timing = in_turns(benchmark, step("auto"), peers, results.machine.clock, rounds)
    # both read, both written; then gradients and both read again, and their gradients written
    work = Work(10 * q.numel() * DTYPE.itemsize, 60 * q.numel(), torch.float32)
    results.add(benchmark, row, timing, work, told(note))


@pytest.mark.parametrize("codes", [pytest.param(c, id=f"loss/train/b{BATCH}/c{c}") for c in (1000, 4375)])
def test_loss(
    benchmark: Any, request: pytest.FixtureRequest, results: Results, compiler: Compiler, rounds: int, codes: int
) -> None:
    logits = normal(BATCH * 2112, codes)
    target = torch.randint(0, codes, logits.shape[:1], device=DEVICE)

    def step(loss: Callable[[], Tensor]) -> Step:
        return lambda: torch.autograd.grad(loss(), logits)

    ours, plain = step(lambda: ops.cross_entropy(logits, target)), step(lambda: F.cross_entropy(logits.float(), target))
    peers: dict[str, Callable[[], object]] = {EAGER: plain}
    note = compiler.add(peers, COMPILED, lambda: step(torch.compile(lambda: F.cross_entropy(logits.float(), target))))
    close(ours(), plain())
    timing = in_turns(benchmark, ours, peers, results.machine.clock, rounds)
    work = Work(3 * logits.numel() * DTYPE.itemsize, 20 * logits.numel(), torch.float32)
    results.add(benchmark, request.node.callspec.id, timing, work, told(note))


@pytest.mark.parametrize("row", [pytest.param(f"packed/attend/train/b{4 * BATCH}", id=f"packed/attend/b{4 * BATCH}")])
def test_packed_attention(benchmark: Any, results: Results, rounds: int, row: str) -> None:
    """Four windows, one of them cut to half at its episode's end, as one in eight is in episodes of 300 frames."""
    cfg = FlexLAMConfig.preset("dmlab")
    layouts = [history_layout(cfg, cfg.sequence.window, phase) for phase in range(cfg.sequence.stride)]
    p = Packer(layouts)([0] * 4 * BATCH, [34, 34, 34, 17] * BATCH).to(DEVICE)
    wide = len(layouts[0].positions)
    packed = [normal(len(p.tokens), HEADS, DIM) for _ in range(3)]
    whole = [normal(4 * BATCH, wide, HEADS, DIM) for _ in range(3)]
    for x, y in zip(whole, packed, strict=True):  # the same windows, padded with other numbers
        for b, part in enumerate(y.detach().split(list(p.lengths))):
            x.data[b, : len(part)] = part
    mask = layouts[0].mask.to(DEVICE)

    def ours() -> tuple[Tensor, ...]:
        out = ops.varlen_attention(*packed, p.starts, p.longest, lengths=p.lengths)
        return out.detach(), *torch.autograd.grad(out, packed, out.detach())

    def padded() -> tuple[Tensor, ...]:
        q, k, v = (t.transpose(1, 2) for t in whole)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)
        return out.detach(), *torch.autograd.grad(out, whole, out.detach())

    same = torch.cat([part[:n] for part, n in zip(padded()[0], p.lengths, strict=True)])
    close(ours()[:1], (same,))
    timing = in_turns(benchmark, ours, {PADDED: padded}, results.machine.clock, rounds)
    pairs = sum(n * (n + 1) // 2 for n in p.lengths)
    work = Work(12 * packed[0].numel() * DTYPE.itemsize, 14 * pairs * HEADS * DIM, DTYPE)
    chosen = ops.varlen.choose_varlen(DEVICE, DTYPE, DIM)  # type: ignore[attr-defined]
    results.add(benchmark, row, timing, work, told(f"{chosen.name}: {chosen.reason}"), memory_bound=False)
