"""Every variant of the bottleneck's kernels, for ``compile_sm90.py``."""

from __future__ import annotations

from collections.abc import Iterator

import triton
from flexlam_fast.kernels import fsq, project
from variants import TYPES, Variant

ENDS = ("first", "end")


def width(elements: int) -> int:
    return int(triton.next_power_of_2(elements))


def rows(span: int, single: bool) -> int:
    """Rows of a full tile, or of the at most seven single tokens that are left over."""
    return 8 if single else fsq.ELEMENTS // span


def forward(kind: str, dim: int, prefix: bool, sample: bool, slots: int = 64, single: bool = False) -> Variant:
    group = 1 if single else 16 // TYPES[kind]
    span = width(group * dim)
    pointers = {"z_ptr": kind, "latents_ptr": kind, "codes_ptr": "i32", "keep_ptr": "i32", "null_ptr": "fp32"}
    pointers |= {"seed_ptr": "i64", "edges_ptr": "i64", "table_ptr": "fp32", "weight_ptr": "i32"}
    constants = dict(
        SLOTS=slots,
        DIM=dim,
        GROUP=group,
        WIDTH=span,
        ROWS=rows(span, single),
        STEPS=7,
        PREFIX=prefix,
    )
    constants |= dict(SAMPLE=sample, BITS=7, INTERPRET=False)
    return Variant(fsq.fsq_forward_kernel, pointers, {"first": "i32", "end": "i32"}, constants, 4, ENDS)


def backward(kind: str, dim: int, prefix: bool, with_null: bool, single: bool = False) -> Variant:
    group = 1 if single else 16 // TYPES[kind]
    span = width(group * dim)
    pointers = {"grad_ptr": kind, "z_ptr": kind, "grad_z_ptr": kind, "sums_ptr": "fp32", "keep_ptr": "i32"}
    constants = dict(SLOTS=64, DIM=dim, GROUP=group, WIDTH=span, ROWS=rows(span, single), PREFIX=prefix)
    constants |= dict(WITH_NULL=with_null, INTERPRET=False)
    scalars = {"first": "i32", "end": "i32", "tiles": "i32"}
    return Variant(fsq.fsq_backward_kernel, pointers | {"table_ptr": "fp32"}, scalars, constants, 4, ENDS)


def lookup(dim: int, prefix: bool, single: bool = False) -> Variant:
    group = 1 if single else 4
    span = width(group * dim)
    pointers = {"codes_ptr": "i32", "latents_ptr": "fp32", "keep_ptr": "i32", "null_ptr": "fp32", "basis_ptr": "i32"}
    constants = dict(SLOTS=64, DIM=dim, GROUP=group, WIDTH=span, ROWS=rows(span, single), PREFIX=prefix)
    pointers |= {"levels_ptr": "i32", "table_ptr": "fp32"}
    return Variant(fsq.lookup_kernel, pointers, {"first": "i32", "end": "i32"}, constants, 4, ENDS)


def projected(kind: str, dim: int, prefix: bool, back: bool) -> Variant:
    ends = {"keep_ptr": "i32", "table_ptr": "fp32", "basis_ptr": "i32"}
    constants = dict(SLOTS=64, DIM=dim, INNER=192, PREFIX=prefix, INTERPRET=False)
    if back:
        tile = project.tile_of(1 << 20, 192)
        pointers = {"grad_ptr": kind, "x_ptr": kind, "weight_ptr": "fp32", "bias_ptr": "fp32", "grad_x_ptr": kind}
        pointers |= {"sums_ptr": "fp32"} | ends
        constants |= dict(SPAN=tile.span, ROWS=tile.rows)
        scalars = {"tokens": "i32", "tiles": "i32"}
        return Variant(project.project_backward_kernel, pointers, scalars, constants, tile.warps)
    pointers = {"x_ptr": kind, "weight_ptr": "fp32", "bias_ptr": "fp32", "latents_ptr": kind, "codes_ptr": "i32"}
    pointers |= {"null_ptr": "fp32"} | ends
    group = 1 if dim in (4, 8) and kind == "fp32" else 16 // TYPES[kind]
    constants |= dict(CHUNK=project.CHUNK, ROWS=project.FORWARD_ROWS, STEPS=7, PADDED=width(dim), GROUP=group)
    warps = project.forward_warps(TYPES[kind])
    return Variant(project.project_forward_kernel, pointers, {"tokens": "i32"}, constants, warps)


def variants() -> Iterator[tuple[str, Variant]]:
    for kind in TYPES:
        for dim in (4, 5):
            for prefix, sample in ((False, False), (True, False), (True, True)):
                yield f"forward/{kind}/d{dim}/prefix{prefix:d}/sample{sample:d}", forward(kind, dim, prefix, sample)
            for prefix, null in ((False, False), (True, False), (True, True)):
                yield f"backward/{kind}/d{dim}/prefix{prefix:d}/null{null:d}", backward(kind, dim, prefix, null)
            yield f"project/{kind}/d{dim}", projected(kind, dim, True, False)
            yield f"project_backward/{kind}/d{dim}", projected(kind, dim, True, True)
    for dim in (1, 3, 4):  # what few tokens are left over
        for kind in ("fp32", "bf16"):
            yield f"single/forward/{kind}/d{dim}", forward(kind, dim, True, True, single=True)
            yield f"single/backward/{kind}/d{dim}", backward(kind, dim, True, True, single=True)
        yield f"single/lookup/d{dim}", lookup(dim, True, single=True)
    for back in (False, True):
        yield f"single/project/fp32/d4/back{back:d}", projected("fp32", 4, False, back)
    yield "forward/fp32/d8/prefix1/sample0", forward("fp32", 8, True, False)
    yield "forward/fp32/d4/odd_slots", forward("fp32", 4, True, False, slots=5)
    for dim in (4, 5):
        yield f"lookup/d{dim}", lookup(dim, True)
