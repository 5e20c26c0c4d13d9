"""Every variant of the kernels that train the sequence model, with dmlab's shapes, for ``compile_sm90.py``."""

from __future__ import annotations

from collections.abc import Iterator

from flexlam_fast.kernels import loss, rotary
from variants import TYPES, Variant

STRIDES = ["q_b", "q_n", "q_h", "k_b", "k_n", "k_h", "angle_b", "angle_n"]
BACKWARD_STRIDES = [f"grad_{name}" for name in STRIDES[:6]]


def rotated(kind: str, out: str, back: bool, heads: int = 4, kv_heads: int = 4, dim: int = 64) -> Variant:
    """Projections of ``kind``; ``out`` is the dtype that attention wants, and so the upstream gradient's."""
    tile = rotary.tile_of(heads, kv_heads, dim // 2)
    pointers = {"q_ptr": kind, "k_ptr": kind, "q_weight_ptr": "fp32", "k_weight_ptr": "fp32"}
    pointers |= {"cos_ptr": "fp32", "sin_ptr": "fp32", "q_out_ptr": kind if back else out}
    pointers |= {"k_out_ptr": kind if back else out}
    constants = dict(Q_HEADS=heads, K_HEADS=kv_heads, HALF=dim // 2, SECOND=dim // 2, ROWS=tile.rows)
    constants |= dict(Q_BLOCK=tile.q_heads, K_BLOCK=tile.k_heads, PADDED=tile.padded, INTERPRET=False)
    scalars = dict.fromkeys(["lines", "tokens", *STRIDES], "i32") | {"eps": "fp32"}
    if not back:
        return Variant(rotary.norm_rope_kernel, pointers, scalars, constants, tile.warps, tuple(STRIDES))
    pointers |= {"grad_q_ptr": out, "grad_k_ptr": out, "sums_ptr": "fp32"}
    scalars |= dict.fromkeys(["tiles", *BACKWARD_STRIDES], "i32")
    aligned = (*STRIDES, *BACKWARD_STRIDES)
    return Variant(rotary.norm_rope_backward_kernel, pointers, scalars, constants, tile.warps, aligned)


def of_loss(kind: str, codes: int, back: bool) -> Variant:
    constants = dict(CODES=codes, STRIDE=codes, BLOCK=loss.BLOCK)
    pointers = {"logits_ptr": kind, "target_ptr": "i64", "kept_ptr": "fp32"}
    if not back:
        pointers |= {"sums_ptr": "fp32"}
        scalars = {"rows": "i32", "ignored": "i32"}
        return Variant(loss.loss_forward_kernel, pointers, scalars, constants, loss.WARPS)
    pointers |= {"grad_ptr": "fp32", "count_ptr": "fp32", "out_ptr": kind}
    return Variant(
        loss.loss_backward_kernel, pointers, {"ignored": "i32"}, constants | {"INTERPRET": False}, loss.WARPS
    )


def variants() -> Iterator[tuple[str, Variant]]:
    for back in (False, True):
        name = "rotary_backward" if back else "rotary"
        for kind in TYPES:
            yield f"{name}/{kind}/h4", rotated(kind, kind, back)
        yield f"{name}/bf16/g2", rotated("bf16", "bf16", back, 8, 2)  # shared key heads
        yield f"{name}/bf16/h32", rotated("bf16", "bf16", back, 32, 8, 128)
        yield f"{name}/fp32/to_bf16", rotated("fp32", "bf16", back)
    for kind in TYPES:
        for codes in (1000, 4375):
            yield f"loss/{kind}/c{codes}", of_loss(kind, codes, False)
            yield f"loss_backward/{kind}/c{codes}", of_loss(kind, codes, True)
    scalars, pointers = {"programs": "i32"}, dict.fromkeys(("sums_ptr", "loss_ptr", "count_ptr"), "fp32")
    yield "loss_mean", Variant(loss.loss_mean_kernel, pointers, scalars, {"BLOCK": loss.PROGRAMS}, 4)
