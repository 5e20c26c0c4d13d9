"""Compiles every variant of the bottleneck's kernels for sm_90, without a GPU, and prints what came out as JSON.

A process of its own, because Triton decides at import whether it interprets: ``python tests/compile_sm90.py``.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import triton
from flexlam_fast.kernels import fsq, project
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TYPES = {"fp32": 4, "fp16": 2, "bf16": 2}


def width(elements: int) -> int:
    return int(triton.next_power_of_2(elements))


def rows(span: int, single: bool) -> int:
    """Rows of a full tile, or of the at most seven single tokens that are left over."""
    return 8 if single else fsq.ELEMENTS // span


def forward(kind: str, dim: int, prefix: bool, sample: bool, slots: int = 64, single: bool = False) -> tuple[Any, ...]:
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
    return fsq.fsq_forward_kernel, pointers, {"first": "i32", "end": "i32"}, constants, 4


def backward(kind: str, dim: int, prefix: bool, with_null: bool, single: bool = False) -> tuple[Any, ...]:
    group = 1 if single else 16 // TYPES[kind]
    span = width(group * dim)
    pointers = {"grad_ptr": kind, "z_ptr": kind, "grad_z_ptr": kind, "sums_ptr": "fp32", "keep_ptr": "i32"}
    constants = dict(SLOTS=64, DIM=dim, GROUP=group, WIDTH=span, ROWS=rows(span, single), PREFIX=prefix)
    constants |= dict(WITH_NULL=with_null, INTERPRET=False)
    scalars = {"first": "i32", "end": "i32", "tiles": "i32"}
    return fsq.fsq_backward_kernel, pointers | {"table_ptr": "fp32"}, scalars, constants, 4


def lookup(dim: int, prefix: bool, single: bool = False) -> tuple[Any, ...]:
    group = 1 if single else 4
    span = width(group * dim)
    pointers = {"codes_ptr": "i32", "latents_ptr": "fp32", "keep_ptr": "i32", "null_ptr": "fp32", "basis_ptr": "i32"}
    constants = dict(SLOTS=64, DIM=dim, GROUP=group, WIDTH=span, ROWS=rows(span, single), PREFIX=prefix)
    return (
        fsq.lookup_kernel,
        pointers | {"levels_ptr": "i32", "table_ptr": "fp32"},
        {"first": "i32", "end": "i32"},
        constants,
        4,
    )


def projected(kind: str, dim: int, prefix: bool, back: bool) -> tuple[Any, ...]:
    ends = {"keep_ptr": "i32", "table_ptr": "fp32", "basis_ptr": "i32"}
    constants = dict(SLOTS=64, DIM=dim, INNER=192, PREFIX=prefix, INTERPRET=False)
    if back:
        tile = project.tile_of(1 << 20, 192)
        pointers = {"grad_ptr": kind, "x_ptr": kind, "weight_ptr": "fp32", "bias_ptr": "fp32", "grad_x_ptr": kind}
        pointers |= {"sums_ptr": "fp32"} | ends
        constants |= dict(SPAN=tile.span, ROWS=tile.rows)
        return project.project_backward_kernel, pointers, {"tokens": "i32", "tiles": "i32"}, constants, tile.warps
    pointers = {"x_ptr": kind, "weight_ptr": "fp32", "bias_ptr": "fp32", "latents_ptr": kind, "codes_ptr": "i32"}
    pointers |= {"null_ptr": "fp32"} | ends
    group = 1 if dim in (4, 8) and kind == "fp32" else 16 // TYPES[kind]
    constants |= dict(CHUNK=project.CHUNK, ROWS=project.FORWARD_ROWS, STEPS=7, PADDED=width(dim), GROUP=group)
    return project.project_forward_kernel, pointers, {"tokens": "i32"}, constants, project.forward_warps(TYPES[kind])


def variants() -> Iterator[tuple[str, tuple[Any, ...]]]:
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


def compiled(kernel: Any, pointers: dict, scalars: dict, constants: dict, warps: int) -> tuple[Any, str, str]:
    names = kernel.arg_names
    types = {name: f"*{pointers[name]}" for name in pointers} | scalars | dict.fromkeys(constants, "constexpr")
    signature = {name: types[name] for name in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n in pointers or n in ("first", "end")}
    source = ASTSource(kernel, signature, constants, attrs=aligned)
    out = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(out.asm["cubin"])
        file.flush()
        usage, sass = (run("cuobjdump", flag, file.name) for flag in ("-res-usage", "-sass"))
    return out, usage, sass


def run(tool: str, *args: str) -> str:
    return subprocess.run([TOOLS / tool, *args], capture_output=True, text=True, check=True).stdout


def facts(wanted: str) -> dict[str, dict[str, Any]]:
    found = {}
    for name, variant in variants():
        if not re.search(wanted, name):
            continue
        out, usage, sass = compiled(*variant)
        number = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", usage)}
        found[name] = {
            "registers": number["REG"],
            "spilled": len(re.findall(r"\b(STL|LDL)\b", sass)),
            "shared": out.metadata.shared,
            "wide_loads": len(re.findall(r"LDG\.E\.[^ ]*128|LDG\.E\.128", sass)),
            "wide_stores": len(re.findall(r"STG\.E\.[^ ]*128|STG\.E\.128", sass)),
            "loads": len(re.findall(r"\bLDG\b", sass)),
            "stores": len(re.findall(r"\bSTG\b", sass)),
            "tanh": "tanh" in out.asm["ptx"] or "MUFU.TANH" in sass,
        }
    return found


if __name__ == "__main__":
    print(json.dumps(facts(sys.argv[1] if len(sys.argv) > 1 else ""), indent=1))
