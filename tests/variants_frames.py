"""Every variant between frames and tokens with the shapes of the dmlab preset, for ``compile_sm90.py``."""

from __future__ import annotations

from collections.abc import Iterator

from flexlam_fast.kernels import draws, frames, launch_draws
from variants import TYPES, Variant

FRAME = dict(HEIGHT=64, WIDTH=64, CHANNELS=3, BLOCK=frames.BLOCK, INTERPRET=False)
INPUTS = {"now_ptr": "u8", "following_ptr": "u8", "noise_ptr": "fp32", "tau_ptr": "fp32"}


def patches(kind: str, what: int, patch: int) -> Variant:
    pointers = INPUTS | {"out_ptr": kind}
    if what != 2:  # stands in for what is not there
        pointers |= {"noise_ptr": "u8", "tau_ptr": "u8"}
    return Variant(frames.patches_kernel, pointers, {"gain": "fp32"}, dict(KIND=what, PATCH=patch) | FRAME, 4)


def loss(kind: str, change: bool, with_error: bool) -> Variant:
    pointers = {"out_ptr": kind} | INPUTS | {"error_ptr": kind, "sums_ptr": "fp64"}
    constants = dict(CHANGE=change, WITH_ERROR=with_error, PATCH=4) | FRAME
    return Variant(frames.flow_loss_kernel, pointers, {"floor": "fp32"}, constants, 4)


def scale(kind: str) -> Variant:
    pointers = {"grad_ptr": "fp32", "error_ptr": kind, "out_ptr": kind}
    constants = dict(BLOCK=frames.BLOCK, INTERPRET=False)
    return Variant(frames.scale_kernel, pointers, {"count": "i32"}, constants, 4, ("count",))


def variants() -> Iterator[tuple[str, Variant]]:
    for kind in TYPES:
        for name, what, patch in (("frame", 0, 8), ("tubelets", 1, 8), ("flow", 2, 4)):
            yield f"patches/{kind}/{name}", patches(kind, what, patch)
        for change in (False, True):
            for with_error in (False, True):
                yield f"flow_loss/{kind}/change{change:d}/error{with_error:d}", loss(kind, change, with_error)
        yield f"flow_scale/{kind}", scale(kind)
    pointers = {"seed_ptr": "i64", "streams_ptr": "i64", "out_ptr": "fp32"}
    scalars = {"count": "i32", "pieces": "i32"}
    yield "noise", Variant(draws.normal_kernel, pointers, scalars, dict(BLOCKS=draws.BLOCKS), 4, ("count",))
    pointers = {"seed_ptr": "i64", "streams_ptr": "i64", "out_ptr": "i64"}
    yield "words", Variant(draws.words_kernel, pointers, {"rows": "i32"}, dict(BLOCK=launch_draws.ROWS), 4)
