"""QK-norm, RoPE and the write into pages in one launch: what stands between a projection and attention.

Angles are formed and reduced in fp64, so that position 10^12 is as exact as position 0 (design section 3), and only
then do sine and cosine go on in fp32, by their series: the library's own carry a slow path for large arguments, whose
table lives in local memory.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from flexlam_fast.kernels.fsq import settle
from flexlam_fast.kernels.pieces import round_to
from torch import Tensor

from flexlam_fast.ops.frequencies import rope_frequencies

HALF_BYTES = 512  # of half a program's heads: one 16-byte word for each of 32 threads


@lru_cache(maxsize=64)
def frequencies(theta: float, dim: int, device: torch.device) -> Tensor:
    """Return ``theta**(-2i/dim)`` fp64 ``[dim/2]``, the very numbers that the model's own rotation has."""
    made = rope_frequencies(theta, dim, device)
    settle(device)
    return made


def heads_of_a_program(heads: int, dim: int, size: int) -> int:
    """Return how many heads of ``dim`` elements of ``size`` bytes a program of one warp takes."""
    return max(1, min(HALF_BYTES // (dim // 2 * size), triton.next_power_of_2(heads)))


@triton.jit
def cos_sin(angle):
    """Cosine and sine, fp32, of fp64 angles up to 10^12 and beyond.

    Whole quarter turns are taken off in fp64 with pi/2 in three parts: the first two have 13 bits each, so that their
    products with the 40 bits of a number of turns are exact. What is left, at most pi/4, goes on in
    fp32: rounding it costs at most 3e-8, as much as rounding a cosine.
    """
    turns = tl.floor(angle * 0.6366197723675814 + 0.5)
    rest = angle - turns * 1.570556640625
    rest = rest - turns * 0.0002396702766418457
    rest = rest - turns * 1.5893254773528196e-08
    x = rest.to(tl.float32)
    y = x * x
    # terms up to x^9 and x^10: the next ones are below 2e-9 and 2e-10
    sine = x + x * y * (-1.0 / 6 + y * (1.0 / 120 + y * (-1.0 / 5040 + y * (1.0 / 362880))))
    cosine = 1.0 + y * (-0.5 + y * (1.0 / 24 + y * (-1.0 / 720 + y * (1.0 / 40320 + y * (-1.0 / 3628800)))))
    quarter = turns.to(tl.int64) & 3
    odd = (quarter & 1) == 1
    cos = tl.where(odd, sine, cosine)
    sin = tl.where(odd, cosine, sine)
    return tl.where((quarter == 1) | (quarter == 2), -cos, cos), tl.where(quarter >= 2, -sin, sin)


@triton.jit
def rope_write_kernel(qkv_ptr, q_norm_ptr, k_norm_ptr, positions_ptr, rows_ptr, frequency_ptr, q_ptr, k_pages_ptr,
                      v_pages_ptr, tokens, pool, positions_b, positions_n, rows_b, rows_n, eps, HEADS: tl.constexpr,
                      KV_HEADS: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr,
                      INTERPRET: tl.constexpr):  # fmt: skip
    """BLOCK heads of one token of ``qkv [B, tokens, HEADS + 2 KV_HEADS, 2 HALF]``: queries out, keys and values stored.

    ``pool`` is the number of rows of the pages; a row outside them stores nothing.
    """
    # where am I
    line = tl.program_id(0).to(tl.int64)
    session, token = line // tokens, line % tokens
    head = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    i = tl.arange(0, HALF)
    D: tl.constexpr = 2 * HALF
    ALL: tl.constexpr = HEADS + 2 * KV_HEADS
    mask = (head < ALL)[:, None] & (i >= 0)[None, :]
    is_q = (head < HEADS)[:, None]
    is_v = (head >= HEADS + KV_HEADS)[:, None]
    DTYPE: tl.constexpr = q_ptr.dtype.element_ty

    # load
    at = (line * ALL + head)[:, None] * D + i[None, :]
    first = tl.load(qkv_ptr + at, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(qkv_ptr + at + HALF, mask=mask, other=0.0).to(tl.float32)
    position = tl.load(positions_ptr + session * positions_b + token * positions_n)
    row = tl.load(rows_ptr + session * rows_b + token * rows_n)
    frequency = tl.load(frequency_ptr + i)
    norm1 = tl.where(is_q, tl.load(q_norm_ptr + i)[None, :].to(tl.float32),
                     tl.load(k_norm_ptr + i)[None, :].to(tl.float32))  # fmt: skip
    norm2 = tl.where(is_q, tl.load(q_norm_ptr + HALF + i)[None, :].to(tl.float32),
                     tl.load(k_norm_ptr + HALF + i)[None, :].to(tl.float32))  # fmt: skip

    # compute in fp32, rounded where the model's norm rounds
    cos, sin = cos_sin(position.to(tl.float64) * frequency)
    cos, sin = cos[None, :], sin[None, :]
    squares = tl.sum(first * first + second * second, axis=1) * (1.0 / D)
    scale = tl.rsqrt(squares + eps)[:, None]
    a = round_to(first * scale, DTYPE, INTERPRET).to(tl.float32) * norm1
    b = round_to(second * scale, DTYPE, INTERPRET).to(tl.float32) * norm2
    a, b = round_to(a, DTYPE, INTERPRET).to(tl.float32), round_to(b, DTYPE, INTERPRET).to(tl.float32)
    out1 = round_to(tl.where(is_v, first, a * cos - b * sin), DTYPE, INTERPRET)
    out2 = round_to(tl.where(is_v, second, b * cos + a * sin), DTYPE, INTERPRET)

    # store
    q_at = (line * HEADS + head)[:, None] * D + i[None, :]
    tl.store(q_ptr + q_at, out1, mask=mask & is_q)
    tl.store(q_ptr + q_at + HALF, out2, mask=mask & is_q)
    there = (row >= 0) & (row < pool)
    to_k = mask & (~is_q) & (~is_v) & there
    k_at = (row * KV_HEADS + head - HEADS)[:, None] * D + i[None, :]
    tl.store(k_pages_ptr + k_at, out1, mask=to_k)
    tl.store(k_pages_ptr + k_at + HALF, out2, mask=to_k)
    v_at = k_at - KV_HEADS * D
    tl.store(v_pages_ptr + v_at, out1, mask=mask & is_v & there)
    tl.store(v_pages_ptr + v_at + HALF, out2, mask=mask & is_v & there)
