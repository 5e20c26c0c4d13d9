"""Every variant of the linear layers' kernels with the shapes of the dmlab preset, for ``compile_sm90.py``."""

from __future__ import annotations

from collections.abc import Iterator

from flexlam_fast.kernels import linear
from variants import TYPES, Variant

#: name: outputs, columns, norm, gated, add
LAYERS = {
    "qkv": (768, 256, True, False, False),
    "out": (256, 256, False, False, True),
    "swiglu": (1024, 256, True, True, False),
    "down": (256, 1024, False, False, True),
    "head": (1000, 256, True, False, False),
}


def layer(name: str, kind: str, rows: int) -> Variant:
    outs, inner, norm, gated, add = LAYERS[name]
    tile = linear.tile_of(rows, outs, inner, TYPES[kind], gated)
    pointers = dict.fromkeys(("x_ptr", "norm_ptr", "weight_ptr", "residual_ptr", "out_ptr"), kind)
    if name == "head":
        pointers["out_ptr"] = "fp32"
    constants = dict(INNER=inner, OUTS=tile.outs, NORM=norm, GATED=gated, ADD=add, INTERPRET=False)
    aligned = ("outs",) if outs % 16 == 0 else ()
    if tile.stages == 0:
        scalars = {"outs": "i32", "eps": "fp32"}
        constants |= dict(SPAN=tile.span)
        return Variant(linear.few_rows_kernel, pointers, scalars, constants, tile.warps, aligned)
    scalars = {"rows": "i32", "outs": "i32", "eps": "fp32"}
    constants |= dict(ROWS=tile.rows, STEP=tile.span)
    return Variant(linear.many_rows_kernel, pointers, scalars, constants, tile.warps, aligned, tile.stages)


def variants() -> Iterator[tuple[str, Variant]]:
    for kind in TYPES:
        for name, (outs, inner, _, gated, _) in LAYERS.items():
            seen = set()
            for rows in (1, 16, 128, 256, 32768):  # a decision, a few, an append, many of each
                tile = linear.tile_of(rows, outs, inner, TYPES[kind], gated)
                if tile not in seen:
                    seen.add(tile)
                    yield f"linear/{name}/{kind}/m{rows}", layer(name, kind, rows)
