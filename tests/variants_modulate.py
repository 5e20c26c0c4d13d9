"""Every variant of the training's norms, gated sums and activations at the ``dmlab`` sizes, for ``compile_sm90.py``."""

from __future__ import annotations

from collections.abc import Iterator

from flexlam_fast.kernels import activation, modulate
from variants import TYPES, Variant

BATCH, TOKENS, WIDTH = 256, 320, 192  # the decoder's; 256 sequences of 2,496 tokens for the sequence model's norms
#: name: groups, rows, width, center, one, shift
NORMS = {
    "adaln": (BATCH, TOKENS, WIDTH, True, True, True),
    "layer": (1, BATCH * 128, WIDTH, True, False, True),
    "rms": (1, BATCH * 2496, 256, False, False, False),
    "head": (1, BATCH * 2496 * 4, 64, False, False, False),
    "wide": (1, 4096, 8192, True, True, True),
}


def cut(rows: int, width: int, **constants: object) -> tuple[dict[str, object], int]:
    tile = modulate.tile_of(rows, width)
    return dict(WIDTH=width, SPAN=tile.span, ROWS=tile.rows, INTERPRET=False, **constants), tile.warps


def even(strides: dict[str, int]) -> tuple[str, ...]:
    return tuple(name for name, value in strides.items() if value % 16 == 0)


def norm(name: str, kind: str, out: str, back: bool) -> Variant:
    groups, rows, width, center, one, shift = NORMS[name]
    constants, warps = cut(rows, width, CENTER=center, ONE=one, SHIFT=shift)
    strides = dict(x_group=rows * width, x_row=width, scale_group=6 * width if groups > 1 else 0)
    scalars = dict.fromkeys(("groups", "count", "tiles", *strides), "i32")
    pointers = {"x_ptr": kind, "scale_ptr": out, "stats_ptr": "fp32"}
    if back:
        strides |= dict(grad_group=rows * width, grad_row=width)
        pointers |= {"grad_ptr": out, "dx_ptr": kind, "sums_ptr": "fp32"}
        scalars |= dict.fromkeys(("grad_group", "grad_row", "pieces"), "i32")
        return Variant(modulate.norm_backward_kernel, pointers, scalars, constants, warps, even(strides))
    strides["shift_group"] = strides["scale_group"]
    pointers |= {"shift_ptr": out, "out_ptr": out}
    scalars |= {"shift_group": "i32", "eps": "fp32"}
    return Variant(modulate.norm_kernel, pointers, scalars, constants, warps, even(strides))


def gate(kind: str, other: str, back: bool) -> Variant:
    constants, warps = cut(TOKENS, WIDTH)
    strides = {f"{name}_{part}": WIDTH for name in ("grad" if back else "x", "y") for part in ("group", "row")}
    strides["gate_group"] = 6 * WIDTH
    pointers = {"y_ptr": other, "gate_ptr": other}
    scalars = dict.fromkeys((*strides, "count", "tiles"), "i32")
    if back:
        pointers |= {"grad_ptr": kind, "dy_ptr": other, "sums_ptr": "fp32"}
        return Variant(
            modulate.gate_backward_kernel, pointers, scalars | {"pieces": "i32"}, constants, warps, even(strides)
        )
    pointers |= {"x_ptr": kind, "out_ptr": kind}
    return Variant(modulate.gate_kernel, pointers, scalars, constants, warps, even(strides))


def join(kind: str, both: bool, pieces: int) -> Variant:
    parts, block = modulate.joined_of(pieces)
    pointers = {"sums_ptr": "fp32", "first_ptr": kind, "second_ptr": kind}
    constants = dict(WIDTH=WIDTH, SPAN=256, BOTH=both, PARTS=parts, BLOCK=block, INTERPRET=False)
    return Variant(modulate.join_kernel, pointers, {"pieces": "i32"}, constants, 4)


def activate(name: str, kind: str, back: bool) -> Variant:
    constants = dict(BACK=back, BLOCK=activation.BLOCK, INTERPRET=False)
    if name == "gelu":
        pointers = dict.fromkeys(("grad_ptr", "x_ptr", "out_ptr"), kind)
        return Variant(activation.gelu_kernel, pointers, {"elements": "i32"}, constants, 4, ("elements",))
    pointers = dict.fromkeys(("grad_ptr", "gate_ptr", "up_ptr", "out_ptr", "other_ptr"), kind)
    strides = ("gate_row", "up_row", "width")
    scalars = dict.fromkeys((*strides, "blocks"), "i32")
    if name == "halves":  # of one [rows, 2 I]
        constants["BLOCK"] = 1024
    return Variant(activation.swiglu_kernel, pointers, scalars, constants, 4, strides)


def variants() -> Iterator[tuple[str, Variant]]:
    for back in (False, True):
        way = "backward" if back else "forward"
        for kind in TYPES:
            for name in NORMS:
                yield f"rows/{name}/{way}/{kind}", norm(name, kind, kind, back)
            yield f"rows/gate/{way}/{kind}", gate(kind, kind, back)
            for name in ("gelu", "swiglu", "halves"):
                yield f"rows/{name}/{way}/{kind}", activate(name, kind, back)
            for pieces in (4, 1056):  # of an example, of all rows
                yield f"rows/join{pieces}/{'both' if back else 'one'}/{kind}", join(kind, back, pieces)
        for name in ("adaln", "layer", "rms"):  # as under autocast: the residual stream fp32, the linear layers bf16
            yield f"rows/{name}/{way}/fp32-bf16", norm(name, "fp32", "bf16", back)
        yield f"rows/gate/{way}/fp32-bf16", gate("fp32", "bf16", back)
