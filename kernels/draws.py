"""Random numbers from a counter: normal noise and uniform words, the same bits as ``ops.draws`` in plain PyTorch.

The launcher turns fused multiply-adds off, because the reference rounds sums and products one by one.
"""

from __future__ import annotations

import triton
import triton.language as tl
from flexlam_fast.kernels.sampling import _log

BLOCKS = 256  # of Philox a program, so 1,024 numbers: 8 for each of 128 threads


@triton.jit
def _words(block, seed_ptr, stream):
    """Four words of each ``block`` (int32) of a stream."""
    first = block.to(tl.uint32)
    zero = first * 0
    first = first + 0x80000000
    second = ((tl.load(seed_ptr + 1) & 0x7FFFFFFF) + 0x80000000).to(tl.uint32)
    low, high = (stream & 0xFFFFFFFF).to(tl.uint32), ((stream >> 32) & 0xFFFFFFFF).to(tl.uint32)
    return tl.philox(tl.load(seed_ptr), first, zero + second, zero + low, zero + high)


@triton.jit
def _pair(word, turn):
    """Two normal numbers from two words: their radius is of the first, their angle of the second."""
    rest = 0xFFFFFFFF - word
    below = (word.to(tl.float32) + 0.5) * 2.3283064365386963e-10
    above = (rest.to(tl.float32) + 0.5) * 2.3283064365386963e-10
    radius = tl.sqrt_rn(_log(above, 0.0 - below, True) * -2.0)
    quarter = (turn + 0x20000000) >> 30  # 0..3: the sum goes round, as the angle does
    x = (turn - (quarter << 30)).to(tl.int32, bitcast=True).to(tl.float32) * 1.4629180792671596e-09
    square = x * x
    sine = (square * -0.0001951729936990887 + 0.008332177996635437) * square + -0.16666655242443085
    sine = sine * square * x + x
    cosine = (square * 2.4438451873720624e-05 + -0.001388736767694354) * square + 0.04166664555668831
    cosine = cosine * square * square + (1.0 - 0.5 * square)
    quarter = quarter.to(tl.int32)
    across = (quarter & 1) == 1
    first = tl.where(across, sine, cosine) * (1 - ((quarter + 1) & 2)).to(tl.float32)
    second = tl.where(across, cosine, sine) * (1 - (quarter & 2)).to(tl.float32)
    return radius * first, radius * second


@triton.jit
def normal_kernel(seed_ptr, streams_ptr, out_ptr, count, pieces, BLOCKS: tl.constexpr):
    """Piece ``program_id % pieces`` of a sample's noise: ``BLOCKS`` blocks of four numbers."""
    # where am I
    row = tl.program_id(0) // pieces
    piece = tl.program_id(0) % pieces
    block = piece * BLOCKS + tl.arange(0, BLOCKS)

    # load
    stream = tl.load(streams_ptr + row)

    # compute in fp32
    w0, w1, w2, w3 = _words(block, seed_ptr, stream)
    n0, n1 = _pair(w0, w1)
    n2, n3 = _pair(w2, w3)
    numbers = tl.reshape(tl.join(tl.join(n0, n2), tl.join(n1, n3)), [4 * BLOCKS])

    # store
    column = piece.to(tl.int64) * (4 * BLOCKS) + tl.arange(0, 4 * BLOCKS)
    tl.store(out_ptr + row.to(tl.int64) * count + column, numbers, mask=column < count)


@triton.jit
def words_kernel(seed_ptr, streams_ptr, out_ptr, rows, BLOCK: tl.constexpr):
    """The first word of the last block of each stream."""
    # where am I
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)

    # load
    stream = tl.load(streams_ptr + row, mask=row < rows, other=0)

    # compute
    word, _, _, _ = _words(tl.full([BLOCK], 0x7FFFFFFF, tl.int32), seed_ptr, stream)

    # store
    tl.store(out_ptr + row, word.to(tl.int64) & 0xFFFFFFFF, mask=row < rows)
