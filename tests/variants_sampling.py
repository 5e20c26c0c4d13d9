"""Every variant of the choice of codes with the shapes of the dmlab preset, for ``compile_sm90.py``."""

from __future__ import annotations

from collections.abc import Iterator

from flexlam_fast.kernels import launch_sampling, sampling
from variants import TYPES, Variant


def choice(kind: str, codes: int, width: int, draw: bool, top: bool, place: bool = False) -> Variant:
    pointers = {"logits_ptr": "fp32", "embedding_ptr": kind, "place_ptr": kind, "seed_ptr": "i64", "streams_ptr": "i64"}
    pointers |= {"codes_ptr": "i32", "out_ptr": kind}
    block = min(sampling.BLOCK, 1 << (codes - 1).bit_length())
    constants = dict(CODES=codes, BLOCK=block, DRAW=draw, TOP=top, STREAMS=draw, WIDTH=width, CHUNK=width or 16)
    constants |= dict(PLACE=place, INTERPRET=False)
    scalars = {"inverse": "fp32", "top_k": "i32"}
    return Variant(sampling.next_token_kernel, pointers, scalars, constants, launch_sampling.warps_of(block))


def variants() -> Iterator[tuple[str, Variant]]:
    for codes in (1000, 4375):  # dmlab's codebook, and that of real video, which is more than a block
        for draw, top in ((False, False), (True, False), (True, True)):
            for kind in TYPES:
                yield f"token/{kind}/c{codes}/draw{draw:d}/top{top:d}", choice(kind, codes, 256, draw, top, place=draw)
            yield f"code/c{codes}/draw{draw:d}/top{top:d}", choice("fp32", codes, 0, draw, top)
