"""Training's attention beside what the modules do without it, forward and backward, at sizes of the ``tiny`` preset.

Ours is ``ops.self_attention_packed``, whose gradient is one tensor; the peers take views of the same projection, and
what autograd then does to put their gradients together is part of their time.
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
from flexlam_fast.layers import attend
from flexlam_fast.sequence.layout import history_layout

TINY = FlexLAMConfig.preset("tiny")
PRODUCTS = 2 + 5  # forward: scores and values; backward: scores again, and one product for each of four gradients
TENSORS = 4 + 8  # q, k, v and the result; those and its gradient again, and three gradients
SDPA = "F.scaled_dot_product_attention"


class Case(NamedTuple):
    """A row: batch and heads, and for the sequence model the mask of its training windows."""

    id: str
    batch: int
    tokens: int
    heads: int
    dim: int
    mask: Tensor | None = None

    @property
    def work(self) -> Work:
        """Every tensor moved once, and the products of what is seen."""
        seen = self.tokens**2 if self.mask is None else int(self.mask.sum())
        numbers = self.batch * self.tokens * self.heads * self.dim
        operations = 2 * PRODUCTS * self.batch * self.heads * seen * self.dim
        return Work(TENSORS * numbers * torch.bfloat16.itemsize, operations, torch.bfloat16)


def cases() -> list[Case]:
    """The encoder's and decoder's 80 tokens, and a training window of the sequence model."""
    mask = history_layout(TINY, TINY.sequence.window).mask
    seq = TINY.sequence
    return [
        Case("attention/train/tiny_lam", 32, 80, TINY.encoder.heads, TINY.encoder.width // TINY.encoder.heads),
        Case("attention/train/tiny_sequence", 16, mask.shape[0], seq.heads, seq.head_dim, mask),
    ]


def products(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """``layers.attend`` as it stands, or with a mask, which it has not, the same two products."""
    if mask is None:
        return attend(q, k, v)
    scores = (q @ k.transpose(-1, -2)).float() * q.shape[-1] ** -0.5
    return scores.masked_fill(~mask, -torch.inf).softmax(-1).to(v.dtype) @ v


def fused(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def of_heads(call: Callable[..., Tensor]) -> Callable[[Tensor, Tensor | None], Tensor]:
    """``call``, which takes heads before tokens, of a packed projection."""

    def run(qkv: Tensor, mask: Tensor | None) -> Tensor:
        return call(*(t.transpose(1, 2) for t in qkv.unbind(2)), mask).transpose(1, 2)

    return run


def ours(qkv: Tensor, mask: Tensor | None) -> Tensor:
    return ops.self_attention_packed(qkv, mask=mask)


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU ours is torch's own")
@pytest.mark.parametrize("case", cases(), ids=lambda case: case.id)
def test_attention(benchmark: Any, results: Results, compiler: Compiler, rounds: int, case: Case) -> None:
    generator, device = torch.Generator().manual_seed(0), results.device
    shape = case.batch, case.tokens, case.heads, case.dim
    qkv = torch.randn(*shape[:2], 3, *shape[2:], generator=generator).to(device, torch.bfloat16).requires_grad_()
    upstream = torch.randn(*shape, generator=generator).to(device, torch.bfloat16)
    mask = None if case.mask is None else case.mask.to(device)

    def step(call: Callable[[Tensor, Tensor | None], Tensor]) -> Callable[[], tuple[Tensor, ...]]:
        def run() -> tuple[Tensor, ...]:
            out = call(qkv, mask)
            return out, *torch.autograd.grad(out, qkv, upstream)

        return run

    two = "layers.attend, two products" if mask is None else "two products with a mask"
    peers: dict[str, Callable[[], object]] = {two: step(of_heads(products)), SDPA: step(of_heads(fused))}
    for mine, theirs in zip(step(ours)(), step(of_heads(fused))(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=2e-2, atol=2e-2)
    compiled = f"{two}, torch.compile"
    note = compiler.add(peers, compiled, lambda: step(of_heads(torch.compile(products, dynamic=False))))
    timing = in_turns(benchmark, step(ours), peers, results.machine.clock, rounds)
    threads, name = torch.get_num_threads(), backends.choose(backends.AUTO, device).name
    notes = [f"bf16, {threads} threads, backend {name}, forward and backward", note]
    if mask is not None:
        notes.append(f"{float(mask.float().mean()):.0%} of the keys are seen, which is all that the floor counts")
    results.add(benchmark, case.id, timing, case.work, ", ".join(filter(None, notes)), memory_bound=False)
