"""Pages, tables and new tokens that try the paged ops; shared by their tests."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from fsq_cases import RUNS
from torch import Tensor

from flexlam_fast.ops.paged import write_pages

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
#: Compiled code on that device; C++ has the paged ops for a CPU only.
KERNELS = [name for name, device in RUNS if device == DEVICE and (name, device) != ("native", "cuda")]
BACKENDS = ["reference", *KERNELS]
every_kernel = pytest.mark.parametrize("backend", KERNELS)


class Pages(NamedTuple):
    """Arguments of attention: queries, pages, tables, counts; and a projection with its residual."""

    q: Tensor
    k: Tensor
    v: Tensor
    table: Tensor
    context: Tensor
    start: Tensor
    weight: Tensor
    residual: Tensor


def pages(
    dtype: torch.dtype, context: list[int], start: list[int], tokens: int = 1, heads: int = 4, kv_heads: int = 4,
    dim: int = 16, page: int = 4, entries: int = 8, width: int = 24, seed: int = 0,
) -> Pages:  # fmt: skip
    """Sessions whose tokens stand in random pages of one pool; NaN in every token that none of them may read."""
    generator, batch = torch.Generator().manual_seed(seed), len(context)
    total = batch * entries + 3
    make = lambda *shape: torch.randn(*shape, generator=generator).to(DEVICE, dtype)  # noqa: E731
    k, v = make(total, page, kv_heads, dim), make(total, page, kv_heads, dim)
    table = torch.randperm(total, generator=generator)[: batch * entries].view(batch, entries).int()
    unused = torch.ones(total * page, dtype=torch.bool)
    for row, c, s in zip(table, context, start, strict=True):
        seen = c * page + max(s + tokens, 0)
        assert seen <= entries * page
        unused[(row.long().unsqueeze(1) * page + torch.arange(page)).flatten()[:seen]] = False
        row[-(-seen // page) :] = -1
    for pool in (k, v):
        pool.view(total * page, -1)[unused.to(DEVICE)] = torch.nan
    counts = (torch.tensor(x, dtype=torch.int32, device=DEVICE) for x in (context, start))
    weight = make(width, heads * dim) / (heads * dim) ** 0.5
    return Pages(make(batch, tokens, heads, dim), k, v, table.to(DEVICE), *counts, weight, make(batch, tokens, width))


def dense(q: Tensor, k: Tensor, v: Tensor, row: Tensor, context: int, start: int) -> Tensor:
    """One session by torch's own attention ``[N, H, D]``, a query at a time, over the tokens it sees, in order."""
    out = []
    for n in range(q.shape[0]):
        seen = context * k.shape[1] + max(start + n + 1, 0)
        at = [(int(row[j // k.shape[1]]), j % k.shape[1]) for j in range(seen)]
        keys, values = (torch.stack([pool[p, o] for p, o in at], dim=1).unsqueeze(0) for pool in (k, v))
        out.append(F.scaled_dot_product_attention(q[n].view(1, -1, 1, q.shape[2]), keys, values, enable_gqa=True))
    return torch.stack([x[0, :, 0] for x in out])


class Tokens(NamedTuple):
    """Arguments of the write."""

    qkv: Tensor
    q_norm: Tensor
    k_norm: Tensor
    positions: Tensor
    rows: Tensor
    k: Tensor
    v: Tensor


def tokens(dtype: torch.dtype, batch: int = 2, count: int = 3, heads: int = 4, kv_heads: int = 2, dim: int = 16,
           most: int = 10**12) -> Tokens:  # fmt: skip
    """New tokens at random positions, some of which are not stored."""
    generator = torch.Generator().manual_seed(dim)
    make = lambda *shape: torch.randn(*shape, generator=generator).to(DEVICE, dtype)  # noqa: E731
    positions = torch.randint(0, most, (batch, count), generator=generator)
    rows = torch.randperm(8 * 5, generator=generator)[: batch * count].view(batch, count)
    rows[0, -1] = -1
    pool = (make(8, 5, kv_heads, dim), make(8, 5, kv_heads, dim))
    norms = (make(dim), make(dim))
    return Tokens(
        make(batch, count, (heads + 2 * kv_heads) * dim), *norms, positions.to(DEVICE), rows.to(DEVICE), *pool
    )


def written(backend: str, theta: float = 1e4) -> Any:
    """The write as a function without side effects: queries, keys and values in one tensor."""

    def run(*args: Tensor) -> Tensor:
        k, v = args[5].clone(), args[6].clone()
        q = write_pages(*args[:5], k, v, theta=theta, eps=1e-6, backend=backend)
        return torch.cat([q.flatten(), k.flatten(), v.flatten()])

    return run
