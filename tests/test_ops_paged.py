"""Keys and values in pages, and attention over them: the reference against the model and transformers, then kernels."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from paged_cases import BACKENDS, DEVICE, DTYPES, Pages, Tokens, dense, every_kernel, pages, tokens, written

from flexlam_fast.ops import paged_reference as reference
from flexlam_fast.ops.paged import attend_add, paged_attention, write_pages
from flexlam_fast.sequence.model import RMSNorm, rotate, rotation
from flexlam_fast.testing import assert_within_budget


def check(case: Pages, backend: str) -> None:
    """Both ops of the kernels against the reference, and no trace of what they may not read."""
    dtype = case.q.dtype
    out = paged_attention(*case[:6], backend=backend)
    assert_within_budget(out, reference.paged_attention, *case[:6], working_dtype=dtype, name="attended")
    out = attend_add(*case, backend=backend)
    assert_within_budget(out, reference.attend_add, *case, working_dtype=dtype, name="projected")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_attention_is_torchs_over_the_tokens_in_order(backend: str, kv_heads: int) -> None:
    case = pages(torch.float32, [3, 0, 5], [2, 0, -2], tokens=5, kv_heads=kv_heads)
    out = paged_attention(*case[:6], backend=backend)
    for b, (c, s) in enumerate([(3, 2), (0, 0), (5, -2)]):
        expected = dense(case.q[b], case.k, case.v, case.table[b], c, s)
        assert torch.allclose(out[b], expected, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "kv_heads"), [(1, 1), (1, 2), (1, 4), (5, 1)])  # 5 x 4 are two fp32 tiles of 16
@every_kernel
def test_kernels_are_within_the_budget(backend: str, dtype: torch.dtype, kv_heads: int, tokens: int) -> None:
    check(pages(dtype, [5, 0, 1], [1, 0, -2], tokens, kv_heads=kv_heads, page=16, entries=6), backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("tokens", "page", "entries", "dim", "heads"),
    [
        (1, 20, 5, 64, 2),
        (1, 64, 6, 64, 2),
        (70, 16, 6, 16, 1),
        (130, 16, 10, 16, 1),
        (1, 4, 1, 16, 3),
        (2, 8, 2, 32, 3),
    ],
)
@every_kernel
def test_other_pages_tables_and_tiles(
    backend: str, dtype: torch.dtype, tokens: int, page: int, entries: int, dim: int, heads: int
) -> None:
    """Tiles that reach beyond a page or a split, whole tiles of queries, one split, heads that are no power of two."""
    free = entries * page - tokens
    c, s = [free // page, free // page // 2], [free % page, -min(tokens, 3)]
    few = 2 if tokens < 64 else 1
    sizes = dict(tokens=tokens, heads=heads, kv_heads=heads, dim=dim, page=page, entries=entries)
    check(pages(dtype, c[:few], s[:few], **sizes), backend)


@every_kernel
@settings(max_examples=15)
@given(data=st.data())
def test_any_sessions_are_the_references(backend: str, data: st.DataObject) -> None:
    draw = data.draw
    page, entries, tokens = draw(st.sampled_from([1, 7, 16, 32])), draw(st.integers(1, 5)), draw(st.integers(1, 9))
    batch, kv_heads, group = draw(st.integers(0, 2)), draw(st.integers(1, 2)), draw(st.sampled_from([1, 2, 3]))
    tokens = min(tokens, page * entries)
    context, start = [], []
    for _ in range(batch):
        context.append(draw(st.integers(0, (page * entries - tokens) // page)))
        start.append(draw(st.integers(-tokens - 1, page * (entries - context[-1]) - tokens)))
    sizes = dict(tokens=tokens, heads=kv_heads * group, kv_heads=kv_heads, page=page, entries=entries)
    check(pages(torch.float32, context, start, width=draw(st.integers(1, 40)), **sizes), backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_sees_nothing_gives_zeros_and_padding_sees_the_context(backend: str) -> None:
    case = pages(torch.float32, [0, 2], [-3, -3], tokens=4, page=32, entries=3)  # three splits, of which some are empty
    out = paged_attention(*case[:6], backend=backend)
    assert torch.equal(out[0, :2], torch.zeros_like(out[0, :2]))
    assert float(out[0, 3].abs().max()) > 0
    alone = paged_attention(
        case.q[1:, :1], *case[1:3], case.table[1:], case.context[1:], case.start[1:], backend=backend
    )
    assert torch.allclose(out[1, :1], alone[0], atol=1e-6)
    added = attend_add(*case, backend=backend)
    assert torch.equal(added[0, :2], case.residual[0, :2])


@pytest.mark.parametrize(("dtype", "tokens"), [(torch.float32, 1), (torch.bfloat16, 6)], ids=str)
@every_kernel
def test_where_pages_are_and_who_else_is_there_changes_no_bit(backend: str, dtype: torch.dtype, tokens: int) -> None:
    case = pages(dtype, [3, 1, 4], [0, 1, -1], tokens, kv_heads=2, page=32, entries=5)
    ours, added = paged_attention(*case[:6], backend=backend), attend_add(*case, backend=backend)
    order = torch.randperm(case.k.shape[0], device=DEVICE)
    place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=DEVICE)).int()
    moved = torch.where(case.table < 0, 10**6, place[case.table.clamp_min(0).long()])
    shuffled = case._replace(k=case.k[order], v=case.v[order], table=moved)
    assert torch.equal(paged_attention(*shuffled[:6], backend=backend), ours)
    assert torch.equal(attend_add(*shuffled, backend=backend), added)
    for b in (0, 2):
        one = Pages(*(x[b : b + 1] if x.shape[0] == 3 else x for x in case))
        assert torch.equal(paged_attention(*one[:6], backend=backend)[0], ours[b]), "alone as in company"
        others = torch.tensor([(b + 1) % 3, b, b], device=DEVICE)
        company = Pages(*(x[others] if x.shape[0] == 3 else x for x in case))
        assert torch.equal(attend_add(*company, backend=backend)[1], added[b]), "whatever the neighbours are"


@every_kernel
def test_strided_counts_queries_and_tables_are_read_where_they_are(backend: str) -> None:
    case = pages(torch.float32, [2, 2], [1, 1], tokens=2)
    expected = attend_add(*case, backend=backend)
    wide = torch.full((2, 3), 99, dtype=torch.int32, device=DEVICE)
    wide[:, 1] = case.context
    table = torch.full((2, 20), -7, dtype=torch.int32, device=DEVICE)
    for part in (table[:, ::2][:, :8], table[:, 3:11]):
        part.copy_(case.table)
        start = torch.tensor([1], dtype=torch.int32, device=DEVICE).expand(2)
        q = case.q.transpose(1, 2).contiguous().transpose(1, 2)
        out = attend_add(
            q,
            case.k,
            case.v,
            part,
            wide[:, 1],
            start,
            case.weight.t().contiguous().t(),
            case.residual,
            backend=backend,
        )
        assert torch.equal(out, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [(2, 3, 4, 2, 16), (1, 5, 3, 1, 64), (3, 1, 2, 2, 128), (0, 3, 2, 1, 16)], ids=str)
@every_kernel
def test_the_write_is_within_the_budget(backend: str, dtype: torch.dtype, sizes: tuple[int, ...]) -> None:
    batch, count, heads, kv_heads, dim = sizes
    if not batch:
        case = Tokens(*(x[:0] if x.shape[0] == 2 else x for x in tokens(dtype, 2, count, heads, kv_heads, dim)))
    else:
        case = tokens(dtype, batch, count, heads, kv_heads, dim)
    assert_within_budget(written(backend)(*case), written("reference"), *case, working_dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_reference_writes_what_the_models_modules_make(dtype: torch.dtype) -> None:
    case = tokens(dtype)
    q, k, v = (x.transpose(1, 2) for x in case.qkv.view(2, 3, 8, 16).split([4, 2, 2], dim=2))
    norms = []
    for weight in (case.q_norm, case.k_norm):
        norms.append(RMSNorm(16, 1e-6).to(DEVICE, dtype).requires_grad_(False))
        norms[-1].weight.copy_(weight)
    r = rotation(case.positions, 16, 1e4)
    q, k = rotate(norms[0](q), r), rotate(norms[1](k), r)
    got = write_pages(*case, theta=1e4, eps=1e-6, backend="reference")
    assert torch.equal(got, q.transpose(1, 2))
    stored = case.rows >= 0
    for pool, new in ((case.k, k), (case.v, v)):
        assert torch.equal(pool.view(40, 2, 16)[case.rows[stored]], new.transpose(1, 2)[stored])


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_rotation_is_transformers(backend: str) -> None:
    from transformers import Qwen3Config
    from transformers.models.qwen3 import modeling_qwen3 as theirs

    case = tokens(torch.float32, most=500)
    rope = {"rope_type": "default", "rope_theta": 1e4}
    cfg = Qwen3Config(hidden_size=64, num_attention_heads=4, head_dim=16, rope_theta=1e4, rope_parameters=rope)
    cos, sin = theirs.Qwen3RotaryEmbedding(cfg)(case.qkv.cpu(), case.positions.cpu())
    q, k, _ = (x.transpose(1, 2).cpu() for x in case.qkv.view(2, 3, 8, 16).split([4, 2, 2], dim=2))
    normed = []
    for x, weight in ((q, case.q_norm), (k, case.k_norm)):
        norm = theirs.Qwen3RMSNorm(16, 1e-6).requires_grad_(False)
        norm.weight.copy_(weight)
        normed.append(norm(x))
    q, k = theirs.apply_rotary_pos_emb(*normed, cos, sin)
    got = write_pages(*case, theta=1e4, eps=1e-6, backend=backend)
    # their angles are fp32: at position 500 an angle is off by up to 3e-5
    assert torch.allclose(got.cpu(), q.transpose(1, 2), atol=2e-4)
    stored = (case.rows >= 0).cpu()
    assert torch.allclose(case.k.view(40, 2, 16)[case.rows[case.rows >= 0]].cpu(), k.transpose(1, 2)[stored], atol=2e-4)
