"""Every variant of dense attention's kernel, for ``compile_sm90.py``."""

from __future__ import annotations

from collections.abc import Iterator

from flexlam_fast.kernels import attention as kernels
from variants import TYPES, Variant

STRIDES = [f"{name}_{part}" for name in "qkv" for part in ("batch", "token", "head")]


def attended(kind: str, queries: int, batch: int, heads: int, groups: int, dim: int, causal: bool) -> Variant:
    tile = kernels.tile_of(queries, batch * heads, dim, TYPES[kind])
    pointers = {"q_ptr": kind, "k_ptr": kind, "v_ptr": kind, "out_ptr": kind}
    scalars = {"queries": "i32", "keys": "i32"} | dict.fromkeys(STRIDES, "i32") | {"scale": "fp32"}
    constants = dict(HEADS=heads, GROUPS=groups, DIM=dim, ROWS=tile.rows, COLUMNS=tile.columns, CAUSAL=causal)
    constants |= dict(INTERPRET=False)
    return Variant(kernels.attention_kernel, pointers, scalars, constants, tile.warps, tuple(STRIDES), tile.stages)


def variants() -> Iterator[tuple[str, Variant]]:
    for kind, size in TYPES.items():
        # the sequence model's prefill of 128 tokens, with and without a mask, and one query
        for causal in (False, True):
            yield f"attention/prefill/{kind}/causal{causal:d}", attended(kind, 128, 1, 4, 4, 64, causal)
        yield f"attention/one/{kind}", attended(kind, 1, 1, 4, 4, 64, True)
        yield f"attention/d128/{kind}", attended(kind, 128, 1, 4, 2, 128, True)
        if size == 2:  # tall tiles: the encoder's 128 tokens of a large batch
            yield f"attention/batch/{kind}", attended(kind, 128, 256, 3, 3, 64, False)
            yield f"attention/batch/d128/{kind}", attended(kind, 128, 256, 4, 4, 128, True)
    for dim in (16, 32):
        yield f"attention/d{dim}/bf16", attended("bf16", 128, 1, 4, 4, dim, True)
