"""From logits to the next code and its embedding: one program a row, one launch, nothing returns to the host.

What is drawn is the same as on every other backend to the bit: uniforms are Philox's, and their logarithms are made of
sums and products that are rounded one by one, so the launcher turns fused multiply-adds off.
"""

from __future__ import annotations

import triton
import triton.language as tl
from flexlam_fast.kernels.pieces import round_to

BLOCK = 4096  # codes in registers at a time: 16 for each of 256 threads
CHUNK = 1024  # columns of an embedding at a time


@triton.jit
def _ordered(x):
    """Return int32 in the order of fp32 ``x``: zeros alike, NaN above all, as torch.argmax has them."""
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)
    return tl.where(x == x, bits ^ ((bits >> 31) & 0x7FFFFFFF), 0x7FFFFFFF)


@triton.jit
def _best(x, code, allowed):
    """Return the largest allowed ``x`` and its lowest code as one int64, so that one reduction finds both."""
    key = (_ordered(x).to(tl.int64) << 32) + (0x7FFFFFFF - code)
    return tl.max(tl.where(allowed, key, -(1 << 63)), axis=0)


@triton.jit
def _code_of(key):
    return 0x7FFFFFFF - (key & 0xFFFFFFFF).to(tl.int32)


@triton.jit
def _logit(logits_ptr, code, CODES: tl.constexpr):
    return tl.load(logits_ptr + code, mask=code < CODES, other=float("-inf"))


@triton.jit
def _kth(first, logits_ptr, top_k, CODES: tl.constexpr, BLOCK: tl.constexpr):
    """Return the ``top_k``-th largest in the order of :func:`_ordered`: bit by bit, by counting. ``first``: a block."""
    code = tl.arange(0, BLOCK)
    floor = tl.cast(-(1 << 31), tl.int64)
    step = tl.cast(1 << 32, tl.int64)
    for _ in range(32):
        step = step >> 1
        trial = (floor + step).to(tl.int32)
        count = tl.sum(((_ordered(first) >= trial) & (code < CODES)).to(tl.int32), axis=0)
        for start in range(BLOCK, CODES, BLOCK):
            image = _ordered(_logit(logits_ptr, start + code, CODES))
            count += tl.sum(((image >= trial) & (start + code < CODES)).to(tl.int32), axis=0)
        floor = tl.where(count >= top_k, floor + step, floor)
    return floor.to(tl.int32)


@triton.jit
def _log(x, near, EXACT: tl.constexpr):
    """Return the logarithm of normal positive ``x``, as ``ops.sampling`` does to the bit.

    With EXACT, ``x`` is at most 1 and ``near`` is ``x - 1``, better than a subtraction would have it.
    """
    bits = x.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) >> 23  # 0 from the root of a half to the root of 2
    f = (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0
    if EXACT:
        f = tl.where(exponent == 0, near, f)
    square = f * f
    y = f * -0.07634586095809937 + 0.12761598825454712
    y = y * f + -0.13160155713558197
    y = y * f + 0.14201752841472626
    y = y * f + -0.1662335991859436
    y = y * f + 0.20001226663589478
    y = y * f + -0.2500081956386566
    y = y * f + 0.3333333134651184
    y = f + (y * f * square - 0.5 * square)
    return y + exponent.to(tl.float32) * 0.6931471824645996


@triton.jit
def _gumbel(code, key, step, stream):
    """Draw the noise of each ``code``: counter (code, 2^31 + step, stream low, stream high)."""
    first = code.to(tl.uint32)
    zero = first * 0
    second = ((step & 0x7FFFFFFF) + 0x80000000).to(tl.uint32)
    low, high = (stream & 0xFFFFFFFF).to(tl.uint32), ((stream >> 32) & 0xFFFFFFFF).to(tl.uint32)
    word, _, _, _ = tl.philox(key, first, zero + second, zero + low, zero + high)
    rest = 0xFFFFFFFF - word
    below = (word.to(tl.float32) + 0.5) * 2.3283064365386963e-10
    above = (rest.to(tl.float32) + 0.5) * 2.3283064365386963e-10
    waited = 0.0 - _log(above, 0.0 - below, True)
    return 0.0 - _log(waited, waited, False)


@triton.jit
def _perturbed(logit, top, inverse, code, key, step, stream):
    scaled = tl.where(logit == top, 0.0, (logit - top) * inverse)
    return scaled + _gumbel(code, key, step, stream)


@triton.jit
def next_token_kernel(logits_ptr, embedding_ptr, place_ptr, seed_ptr, streams_ptr, codes_ptr, out_ptr, inverse, top_k,
                      CODES: tl.constexpr, BLOCK: tl.constexpr, DRAW: tl.constexpr, TOP: tl.constexpr,
                      STREAMS: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr, PLACE: tl.constexpr,
                      INTERPRET: tl.constexpr):  # fmt: skip
    """Row ``program_id(0)`` of logits ``[B, CODES]`` to its code and, if WIDTH is not 0, to ``out [B, WIDTH]``."""
    # where am I
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * CODES
    code = tl.arange(0, BLOCK)

    # load
    first = _logit(logits_ptr, code, CODES)
    if DRAW:
        key, step, stream = tl.load(seed_ptr), tl.load(seed_ptr + 1), row
        if STREAMS:
            stream = tl.load(streams_ptr + row)

    # compute in fp32
    best = _best(first, code, code < CODES)
    for start in range(BLOCK, CODES, BLOCK):
        more = start + code
        best = tl.maximum(best, _best(_logit(logits_ptr, more, CODES), more, more < CODES))
    chosen = _code_of(best)
    if DRAW:
        top = tl.load(logits_ptr + chosen)
        floor = tl.cast(-(1 << 31), tl.int32)
        if TOP:
            floor = _kth(first, logits_ptr, top_k, CODES, BLOCK)
        noisy = _perturbed(first, top, inverse, code, key, step, stream)
        drawn = _best(noisy, code, (code < CODES) & (_ordered(first) >= floor))
        for start in range(BLOCK, CODES, BLOCK):
            more = start + code
            logit = _logit(logits_ptr, more, CODES)
            noisy = _perturbed(logit, top, inverse, more, key, step, stream)
            drawn = tl.maximum(drawn, _best(noisy, more, (more < CODES) & (_ordered(logit) >= floor)))
        chosen = tl.where(top == top, _code_of(drawn), chosen)

    # store
    tl.store(codes_ptr + row, chosen)
    for start in range(0, WIDTH, CHUNK):
        column = start + tl.arange(0, CHUNK)
        inside = column < WIDTH
        x = tl.load(embedding_ptr + chosen.to(tl.int64) * WIDTH + column, mask=inside).to(tl.float32)
        if PLACE:
            x += tl.load(place_ptr + column, mask=inside).to(tl.float32)
        tl.store(out_ptr + row * WIDTH + column, round_to(x, out_ptr.dtype.element_ty, INTERPRET), mask=inside)
