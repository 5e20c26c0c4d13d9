"""Launcher of the choice of codes, one launch a call. Arguments are checked; nothing waits for the device."""

from __future__ import annotations

import torch
import triton
from flexlam_fast.kernels import sampling as kernels
from flexlam_fast.kernels.fsq import INTERPRETED
from flexlam_fast.kernels.launch import _on
from torch import Tensor

#: Sums and products are rounded one by one, as in the reference: what is drawn is then the same to the bit.
OPTIONS = {"enable_fp_fusion": False}


def draw_codes(
    logits: Tensor,
    embedding: Tensor | None,
    place: Tensor | None,
    inverse: float,
    top_k: int,
    seed: Tensor | None,
    streams: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Codes int32 ``[B]`` and, of ``embedding``, what is fed back ``[B, W]`` (``[B, 0]`` without); greedy at 0."""
    logits = logits.contiguous()
    rows, codes = logits.shape
    width = 0 if embedding is None else embedding.shape[1]
    out = (logits if embedding is None else embedding).new_empty(rows, width)
    chosen = torch.empty(rows, dtype=torch.int32, device=logits.device)
    if not rows:
        return chosen, out
    block = min(kernels.BLOCK, triton.next_power_of_2(max(codes, 128)))
    # any tensor where there is none, for a kernel that will not look
    optional = (logits if t is None else t.contiguous() for t in (embedding, place, seed, streams))
    with _on(logits.device):
        kernels.next_token_kernel[(rows,)](
            logits, *optional, chosen, out, inverse, top_k, CODES=codes, BLOCK=block, DRAW=inverse > 0,
            TOP=0 < top_k < codes, STREAMS=streams is not None, WIDTH=width,
            CHUNK=min(kernels.CHUNK, triton.next_power_of_2(max(width, 16))), PLACE=place is not None,
            INTERPRET=INTERPRETED, num_warps=warps_of(block), **OPTIONS,
        )  # fmt: skip
    return chosen, out


def warps_of(block: int) -> int:
    """Return the warps of a program: 8 codes a thread, or 16 in the largest block."""
    return 4 if block <= 1024 else 8
