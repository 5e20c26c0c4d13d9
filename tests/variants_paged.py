"""Every variant of the paged kernels at the sizes of the ``dmlab`` preset, for ``compile_sm90.py``."""

from __future__ import annotations

from collections.abc import Iterator

import triton
from flexlam_fast.kernels import paged, rope
from variants import TYPES, Variant

HEADS, DIM, PAGE, TABLE, WIDTH = 4, 64, 64, 40, 256


def write(kind: str, kv_heads: int = HEADS, dim: int = DIM) -> Variant:
    names = ("qkv_ptr", "q_norm_ptr", "k_norm_ptr", "q_ptr", "k_pages_ptr", "v_pages_ptr")
    pointers = dict.fromkeys(names, kind) | {"positions_ptr": "i64", "rows_ptr": "i64", "frequency_ptr": "fp64"}
    scalars = dict.fromkeys(("tokens", "pool", "positions_b", "positions_n", "rows_b", "rows_n"), "i32")
    block = rope.heads_of_a_program(HEADS + 2 * kv_heads, dim, TYPES[kind])
    constants = dict(HEADS=HEADS, KV_HEADS=kv_heads, HALF=dim // 2, BLOCK=block, INTERPRET=False)
    return Variant(rope.rope_write_kernel, pointers, scalars | {"eps": "fp32"}, constants, 1)


def plan(kind: str, queries: int, kv_heads: int = HEADS, page: int = PAGE, table: int = TABLE, dim: int = DIM):
    return paged.plan_of(queries, HEADS // kv_heads, kv_heads, table, page, dim, TYPES[kind])


def attend(kind: str, queries: int, kv_heads: int = HEADS, page: int = PAGE, table: int = TABLE, dim: int = DIM):
    p = plan(kind, queries, kv_heads, page, table, dim)
    pointers = {"q_ptr": kind, "k_pages_ptr": kind, "v_pages_ptr": kind, "table_ptr": "i32", "context_ptr": "i32"}
    pointers |= {"start_ptr": "i32", "out_ptr": "fp32" if p.splits > 1 else kind, "tops_ptr": "fp32"}
    scalars = dict.fromkeys(("queries", "entries", "last_page", "table_b", "context_b", "start_b"), "i32")
    constants = dict(HEADS=HEADS, KV_HEADS=kv_heads, DIM=dim, PAGE=page, ROWS=p.rows, TOKENS=p.tokens)
    constants |= dict(BLOCKS=p.blocks, SPLITS=p.splits, PAGES=p.pages, INTERPRET=False)
    pointers |= {"sums_ptr": "fp32"}
    return Variant(paged.attend_kernel, pointers, scalars | {"scale": "fp32"}, constants, p.warps, (), p.stages)


def join(kind: str, splits: int, dim: int = DIM) -> Variant:
    tile = paged.join_of(splits, dim)
    pointers = {"parts_ptr": "fp32", "tops_ptr": "fp32", "sums_ptr": "fp32", "out_ptr": kind}
    constants = dict(DIM=dim, SPLITS=splits, PADDED=triton.next_power_of_2(splits), LINES=tile.lines)
    constants |= dict(CHUNK=tile.chunk, INTERPRET=False)
    return Variant(paged.join_kernel, pointers, {"lines": "i32"}, constants, tile.warps)


def project(kind: str, rows: int, splits: int, dim: int = DIM) -> Variant:
    tile = paged.projection_of(rows, WIDTH, HEADS, dim, splits)
    pointers = {"parts_ptr": "fp32" if splits > 1 else kind, "tops_ptr": "fp32", "sums_ptr": "fp32"}
    pointers |= dict.fromkeys(("weight_ptr", "residual_ptr", "out_ptr"), kind)
    constants = dict(HEADS=HEADS, DIM=dim, SPLITS=splits, PADDED=triton.next_power_of_2(splits), ROWS=tile.rows)
    constants |= dict(COLUMNS=tile.columns, TOGETHER=tile.heads, CHUNK=tile.chunk, INTERPRET=False)
    scalars = {"rows": "i32", "width": "i32"}
    return Variant(paged.project_kernel, pointers, scalars, constants, tile.warps, ("width",), tile.stages)


def variants() -> Iterator[tuple[str, Variant]]:
    for kind in TYPES:
        yield f"paged/write/{kind}", write(kind)
        for queries in (1, 128):
            yield f"paged/attend/{kind}/n{queries}", attend(kind, queries)
            splits = plan(kind, queries).splits
            yield f"paged/join/{kind}/s{splits}", join(kind, splits)
            for batch in (1, 64, 256) if queries == 1 else (1, 16):  # one of each tile
                rows = batch * queries
                yield f"paged/project/{kind}/n{queries}/b{batch}", project(kind, rows, splits)
        yield f"paged/attend/{kind}/n1/one_page", attend(kind, 1, table=1)
        yield f"paged/project/{kind}/n1/one_page", project(kind, 1, 1)
        yield f"paged/project/{kind}/n128/one_page", project(kind, 128, 1)
    # other shapes than the preset's: pages of 16 tokens, grouped heads, wide heads
    yield "paged/attend/bf16/n8/grouped", attend("bf16", 8, kv_heads=1, page=16, table=160)
    for kind in ("fp32", "bf16"):
        yield f"paged/write/{kind}/wide", write(kind, kv_heads=2, dim=256)
        for queries in (1, 128):
            yield f"paged/attend/{kind}/n{queries}/wide", attend(kind, queries, dim=256)
            splits = plan(kind, queries, dim=256).splits
            yield f"paged/project/{kind}/n{queries}/wide", project(kind, queries, splits, dim=256)
