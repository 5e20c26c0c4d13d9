"""Every variant of the translator's kernel, for ``compile_sm90.py``: dmlab's sizes, and those of two more."""

from __future__ import annotations

import math
from collections.abc import Iterator

from flexlam_fast.kernels import translate as kernels
from variants import TYPES, Variant

WEIGHTS = "stem stem_bias norm norm_bias down down_bias up up_bias final final_bias head head_bias"


def translated(
    kind: str, levels: tuple[int, ...], slots: int, wide: int, hidden: int, depth: int, actions: int, codes: str = "i32"
) -> Variant:
    tile = kernels.tile_of(wide, actions, TYPES[kind])
    pointers = {"codes_ptr": codes, "null_ptr": "fp32", "previous_ptr": "fp32", "table_ptr": "fp32"}
    pointers |= {"basis_ptr": "i32", "levels_ptr": "i32"} | {f"{name}_ptr": kind for name in WEIGHTS.split()}
    dim = len(levels)
    constants = dict(SLOTS=slots, DIM=dim, PADDED=1 << (dim - 1).bit_length(), CODES=math.prod(levels))
    constants |= dict(ACTIONS=actions, HEADS=tile.heads, WIDE=wide, WIDTH=tile.width, HIDDEN=hidden, DEPTH=depth)
    constants |= dict(CHUNK=tile.chunk, ROWS=kernels.ROWS, EPS=1e-5, INTERPRET=False)
    scalars = {"batch": "i32", "k": "i32", "stride": "i32"}
    pointers |= {"out_ptr": "fp32"}
    return Variant(kernels.translate_kernel, pointers, scalars, constants, tile.warps, (), kernels.STAGES)


def variants() -> Iterator[tuple[str, Variant]]:
    for kind in TYPES:
        yield f"translate/{kind}/dmlab", translated(kind, (8, 5, 5, 5), 64, 512, 96, 5, 15)
        yield f"translate/{kind}/tiny", translated(kind, (8, 5, 5, 5), 16, 256, 96, 5, 8)
        yield f"translate/{kind}/real", translated(kind, (7, 5, 5, 5, 5), 80, 512, 96, 5, 7, "i64")
