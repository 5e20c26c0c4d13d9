"""The paged ops as PyTorch sees them, what they refuse, exact positions, and what the compiler makes of the kernels."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fsq_cases import RUNS
from paged_cases import BACKENDS, DEVICE, DTYPES, Pages, Tokens, every_kernel, pages, tokens
from torch import Tensor

from flexlam_fast.errors import BackendError, InputError
from flexlam_fast.ops import paged
from flexlam_fast.ops.paged import attend_add, paged_attention, write_pages
from flexlam_fast.testing import assert_within_budget

HERE = Path(__file__).parent
HOW = dict(theta=1e4, eps=1e-6)


@every_kernel
def test_opcheck_and_the_pages_are_said_to_be_written(backend: str) -> None:
    new, case = tokens(torch.float32), pages(torch.float32, [1, 0], [0, 0])
    ops = torch.ops.flexlam_fast
    case = case._replace(k=case.k.nan_to_num(), v=case.v.nan_to_num())  # NaN is not equal to itself
    for op, args in ((ops.page_write, (*new, 1e4, 1e-6)), (ops.page_attend, case[:6]), (ops.page_attend_add, case)):
        told = torch.library.opcheck(op.default, (*args, backend))
        assert set(told.values()) == {"SUCCESS"}, (op, told)
    written = [a.name for a in ops.page_write.default._schema.arguments if a.alias_info and a.alias_info.is_write]
    assert written == ["k_pages", "v_pages"]


@every_kernel
def test_one_graph_under_torch_compile_with_the_same_results(backend: str) -> None:
    def run(new: Tokens, case: Pages) -> Tensor:
        q = write_pages(*new, **HOW, backend=backend)
        seen = paged_attention(q[:, :1], new.k, new.v, *case[3:6], backend=backend)
        return attend_add(seen, new.k, new.v, *case[3:], backend=backend)

    torch._dynamo.reset()
    case = pages(torch.float32, [1, 0], [0, 0], kv_heads=2, entries=2)
    case = case._replace(table=torch.tensor([[1, 4], [3, -1]], dtype=torch.int32, device=DEVICE))
    results = []
    for call in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
        new = tokens(torch.float32)
        results.append((call(new, case), new.k, new.v))
    for plain, compiled in zip(*results, strict=True):
        assert torch.equal(plain, compiled)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_has_a_gradient(backend: str) -> None:
    new, case = tokens(torch.float32), pages(torch.float32, [1, 0], [0, 0])
    q = write_pages(new.qkv.requires_grad_(), *new[1:], **HOW, backend=backend)
    out = attend_add(*case._replace(weight=case.weight.requires_grad_()), backend=backend)
    assert not any(x.requires_grad for x in (q, new.k, new.v, out))


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_outside_the_pool_store_nothing_and_every_other_row_stays(backend: str) -> None:
    new = tokens(torch.float32)
    rows = new.rows.clone()
    rows.flatten()[:3] = torch.tensor([-1, -(2**40), 8 * 5], device=DEVICE)
    k, v = new.k.clone(), new.v.clone()
    write_pages(*new._replace(rows=rows, k=k, v=v), **HOW, backend=backend)
    changed = (k != new.k).flatten(1).view(40, -1).any(1).nonzero().flatten().tolist()
    assert changed == sorted(r for r in rows.flatten().tolist() if 0 <= r < 40)
    assert changed == (v != new.v).view(40, -1).any(1).nonzero().flatten().tolist()


@pytest.mark.parametrize("page", [4, 32])  # tiles of several pages and of one
def test_a_page_outside_the_pool_reads_the_nearest_one(page: int) -> None:
    case = pages(torch.float32, [2, 2], [0, 0], page=page, entries=3)
    case = case._replace(k=case.k.nan_to_num(), v=case.v.nan_to_num())
    good, wrong = case.table.clone(), case.table.clone()
    good[:, 1], wrong[0, 1], wrong[1, 1] = torch.tensor([0, len(case.k) - 1], device=DEVICE), -5, 2**31 - 1
    for backend in BACKENDS:
        near, far = (attend_add(*case._replace(table=table), backend=backend) for table in (good, wrong))
        assert torch.equal(near, far)


@pytest.mark.parametrize("backend", BACKENDS)
def test_views_of_positions_and_rows_are_read_where_they_are(backend: str) -> None:
    new = tokens(torch.float32, batch=3, count=1)
    new = new._replace(positions=new.positions[:1].expand(3, 1))
    wide = torch.full((3, 7), -1, device=DEVICE)
    wide[:, 4:5] = new.rows
    results = []
    for positions, rows in ((new.positions.contiguous(), new.rows), (new.positions, wide[:, 4:5])):
        k, v = new.k.clone(), new.v.clone()
        results.append((write_pages(*new[:3], positions, rows, k, v, **HOW, backend=backend), k, v))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("far", [10**8, 10**12 - 50])
@pytest.mark.parametrize("backend", BACKENDS)
def test_attention_far_on_is_attention_at_the_start(backend: str, far: int) -> None:
    """Only differences of positions count; the angle's own rounding in fp64 is 1e-8 at 10^8 and 1e-4 at 10^12."""
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(1, 9, 6 * 32, generator=generator).to(DEVICE)
    norm = torch.rand(32, generator=generator).to(DEVICE) + 0.5
    table = torch.tensor([[2, 0, 1]], dtype=torch.int32, device=DEVICE)
    none = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    number = torch.arange(9, device=DEVICE)

    def attended(qkv: Tensor, norm: Tensor, first: int, how: str) -> Tensor:
        k = torch.zeros(3, 4, 2, 32, dtype=qkv.dtype, device=DEVICE)
        v, rows = torch.zeros_like(k), (table[0].long()[number // 4] * 4 + number % 4)[None]
        q = write_pages(qkv, norm, norm, (number + first)[None], rows, k, v, **HOW, backend=how)
        return paged_attention(q, k, v, table, none, none, backend=how)

    out = attended(qkv, norm, far, backend)
    if far == 10**8:
        plain = lambda qkv, norm: attended(qkv, norm, 0, "reference")  # noqa: E731
        assert_within_budget(out, plain, qkv, norm, working_dtype=torch.float32)
    else:
        assert torch.allclose(out, attended(qkv, norm, 0, "reference"), atol=1e-3)


@every_kernel
def test_kernels_turn_by_the_references_angles_at_any_position(backend: str) -> None:
    """Queries that are unit vectors come out as cosines and sines themselves."""
    at = torch.tensor([0, 1, 2, 7, 1000, 2**24 + 1, 10**8 + 3, 10**10 + 1, 999_999_999_989, 10**12], device=DEVICE)[
        None
    ]
    qkv = torch.zeros(1, 10, 3, 64, device=DEVICE)
    qkv[..., :32] = 1.0
    one, rows = torch.ones(64, device=DEVICE), torch.full((1, 10), -1, device=DEVICE)
    pool = torch.zeros(1, 1, 1, 64, device=DEVICE)
    out = write_pages(qkv.flatten(2), one, one, at, rows, pool, pool.clone(), theta=1e4, eps=1e-12, backend=backend)[
        :, :, 0
    ]
    angle = at.double().unsqueeze(2) * 1e4 ** -(torch.arange(0, 64, 2, dtype=torch.float64, device=DEVICE) / 64)
    exact = torch.cat([angle.cos(), angle.sin()], dim=2) * 2**0.5
    assert float((out - exact).abs().max()) < 3e-7, "two units in the last place of sqrt(2)"


def write(change: Callable[[Tokens], dict[str, Any]]) -> Callable[[], Tensor]:
    def call() -> Tensor:
        new = tokens(torch.float32)
        return write_pages(*new._replace(**change(new)), **HOW)

    return call


def attend(change: Callable[[Pages], dict[str, Any]]) -> Callable[[], Tensor]:
    def call() -> Tensor:
        case = pages(torch.float32, [1, 0], [0, 0])
        return attend_add(*case._replace(**change(case)))

    return call


WRONG = [
    (
        write(lambda c: dict(qkv=c.qkv[0])),
        r"^qkv: expected \[B,N,\(H\+4\)\*16\] float32 \w+, got \[3,128\] float32 \w+$",
    ),
    (write(lambda c: dict(qkv=c.qkv[..., :-1])), r"^qkv: expected \(H\+4\)\*16 columns, H of 2s, got 127$"),
    (write(lambda c: dict(qkv=c.qkv[..., :80])), r"^qkv: expected \(H\+4\)\*16 columns, H of 2s, got 80$"),
    (write(lambda c: dict(qkv=c.qkv.half())), r"^qkv: expected .* float32 \w+, got \[2,3,128\] float16"),
    (write(lambda c: dict(k_norm=c.k_norm[1:])), r"^k_norm: expected \[16\] float32 \w+, got \[15\]"),
    (write(lambda c: dict(positions=c.positions.int())), r"^positions: expected \[2,3\] int64 \w+, got \[2,3\] int32"),
    (write(lambda c: dict(rows=c.rows[:, :1])), r"^rows: expected \[2,3\] int64 \w+, got \[2,1\]"),
    (write(lambda c: dict(v=c.v[1:])), r"^v_pages: expected \[8,5,2,16\] float32 \w+, got \[7,5,2,16\]"),
    (
        write(lambda c: dict(k=c.k.transpose(0, 1))),
        r"^k_pages: expected contiguous pages, got \[5, 8, 2, 16\] of strides",
    ),
    (write(lambda c: dict(k=c.k[:0], v=c.v[:0])), r"^k_pages: expected at least one pages, got"),
    (write(lambda c: dict(k=c.k[0])), r"^k_pages: expected \[pages,P,G,D\] .*, got \[5,2,16\]"),
    (attend(lambda c: dict(q=c.q[..., :3])), r"^q: expected \[B,N,H,16\] float32 \w+, got \[2,1,4,3\]"),
    (attend(lambda c: dict(q=c.q[:, :, :3])), r"^q: expected a multiple of 4 heads, got 3$"),
    (attend(lambda c: dict(table=c.table.long())), r"^table: expected \[2,8\] int32 \w+, got \[2,8\] int64"),
    (attend(lambda c: dict(table=c.table[0])), r"^table: expected \[2,T\] int32 \w+, got \[8\]"),
    (attend(lambda c: dict(table=c.table[:, :0])), r"^table: expected 1\.\.536870911 entries, got 0$"),
    (attend(lambda c: dict(context=c.context[:1])), r"^context: expected \[2\] int32 \w+, got \[1\]"),
    (attend(lambda c: dict(start=None)), r"^start: expected \[2\] int32 \w+, got NoneType None$"),
    (attend(lambda c: dict(weight=c.weight[:, 1:])), r"^weight: expected \[W,64\] float32 \w+, got \[24,63\]"),
    (
        attend(lambda c: dict(residual=c.residual[:, :, 1:])),
        r"^residual: expected \[2,1,24\] float32 \w+, got \[2,1,23\]",
    ),
]


@pytest.mark.parametrize(("call", "sentence"), WRONG, ids=[s for _, s in WRONG])
def test_one_sentence_says_what_is_wrong(call: Callable[[], Tensor], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_backends_by_name_work_or_refuse_and_auto_takes_what_fits() -> None:
    case = pages(torch.float32, [1, 0], [0, 0], dim=24)
    with pytest.raises(BackendError, match=r"^backend: expected a head dimension .* 16\.\.256 for 'triton', got 24$"):
        paged_attention(*case[:6], backend="triton")
    expected = paged_attention(*case[:6], backend="reference")
    for name in (None, "auto", *(["native"] if "native" in BACKENDS else [])):
        assert torch.allclose(paged_attention(*case[:6], backend=name), expected, atol=1e-6)
    double = Pages(*(x.double() if x.is_floating_point() else x for x in case))
    assert torch.allclose(paged_attention(*double[:6]), expected.double(), atol=1e-6)
    if ("native", "cpu") in RUNS:
        with pytest.raises(BackendError, match=r"^backend: expected float32, .* bfloat16 for 'native', got float64$"):
            paged_attention(*(x.cpu() for x in double[:6]), backend="native")
    cpu, found = torch.device("cpu"), "native" if ("native", "cpu") in RUNS else "reference"
    assert {paged.pick(name, cpu, dtype, 64) for name in (None, "auto") for dtype in DTYPES} == {found}
    with pytest.raises(
        BackendError, match=r"^backend: expected 'reference' or 'triton' for this op on meta, got 'native'$"
    ):
        paged.pick("native", torch.device("meta"), torch.float32, 64)


def test_splits_fill_the_chip_and_do_not_depend_on_the_batch() -> None:
    from flexlam_fast.kernels import paged as kernels

    one = kernels.plan_of(1, 1, 4, 40, 64, 64, 2)
    assert (one.splits, one.pages, one.rows) == (20, 2, 16), "80 programs for a session, two pages each"
    many = kernels.plan_of(128, 1, 4, 40, 64, 64, 2)
    assert (many.splits, many.blocks, many.rows) == (8, 2, 64), "64 programs for a session"
    for table in range(1, 300):
        plan = kernels.plan_of(3, 2, 4, table, 7, 16, 2)
        assert plan.pages * plan.splits >= table > plan.pages * (plan.splits - 1), "every entry in one split"
    assert "batch" not in kernels.plan_of.__wrapped__.__annotations__
    tile = kernels.projection_of(1, 256, 4, 64, 20)
    assert (tile.rows, tile.columns) == (1, 8), "32 programs for a single row"


@pytest.fixture(scope="module")
def compiled() -> dict[str, dict[str, Any]]:
    """Every variant of the paged kernels, compiled for sm_90 in a process that does not interpret them."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(HERE.parent), environment.get("PYTHONPATH", "")])
    command = [sys.executable, str(HERE / "compile_sm90.py"), "^paged/"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def test_no_variant_spills(compiled: dict[str, dict[str, Any]]) -> None:
    assert len(compiled) >= 42
    assert {name: facts for name, facts in compiled.items() if facts["spilled"]} == {}


def test_half_precision_multiplies_on_tensor_cores_and_moves_wide_words(compiled: dict[str, dict[str, Any]]) -> None:
    for name, facts in compiled.items():
        _, kind, dtype, *rest = name.split("/")
        tiles = kind == "attend" or (kind == "project" and rest[0] == "n128")
        if tiles and dtype != "fp32":
            assert facts["tensor_cores"] > 0, name
        if kind == "write":  # both halves of a program's heads
            assert facts["wide_loads"] >= 2, name
            assert facts["wide_stores"] >= 6, name
        if kind == "attend":  # queries; keys and values go by asynchronous copies, which are counted apart
            assert facts["wide_loads"] + facts["wide_stores"] >= 2, name
            assert facts["shared"] >= 16 * 1024, f"{name}: no keys and values are on their way while others are used"
