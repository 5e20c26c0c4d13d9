"""Cross-entropy of codes: logits are read once forward, and once more for their gradient; no softmax is written.

A warp takes a row at a time, 1,024 columns at once, and keeps the largest logit so far and the sum of exponentials
relative to it. Both stay for backward, two fp32 numbers a row: their one log-sum-exp would cost a share of the softmax
up to three of its bits, for it is rounded at the size of a logit.
"""

from __future__ import annotations

import triton
import triton.language as tl
from flexlam_fast.kernels.pieces import round_to

BLOCK = 1024  # columns at a time: 32 for each thread of a warp, four 16-byte words of bf16
PROGRAMS = 4096  # of the forward grid: 31 warps for each of an H100's 132 processors; fixed, so that sums are too
WARPS = 1


@triton.jit
def loss_forward_kernel(logits_ptr, target_ptr, kept_ptr, sums_ptr, rows, ignored, CODES: tl.constexpr,
                        STRIDE: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Rows ``pid, pid + programs, ...``: largest and sum of each, and two sums a program: of losses, and of ones."""
    # where am I
    column = tl.arange(0, BLOCK)
    total, count = 0.0, 0.0
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        line = logits_ptr + tl.cast(row, tl.int64) * STRIDE

        # load
        target = tl.load(target_ptr + row)
        inside = (target >= 0) & (target < CODES)
        picked = tl.load(line + target, mask=inside, other=float("nan")).to(tl.float32)

        # compute in fp32
        largest, sum = float("-inf"), 0.0
        for start in range(0, CODES, BLOCK):
            x = tl.load(line + start + column, mask=start + column < CODES, other=float("-inf")).to(tl.float32)
            top = tl.maximum(largest, tl.max(x, axis=0))
            base = tl.where(top == float("-inf"), 0.0, top)  # a block of nothing but -inf adds nothing
            sum = sum * tl.exp(largest - base) + tl.sum(tl.exp(x - base), axis=0)
            largest = top
        counts = target != ignored
        sum = tl.where(inside | (target == ignored), sum, float("nan"))
        total += tl.where(counts, tl.log(sum) + (largest - picked), 0.0)
        count += tl.where(counts, 1.0, 0.0)

        # store
        tl.store(kept_ptr + 2 * tl.cast(row, tl.int64), largest)
        tl.store(kept_ptr + 2 * tl.cast(row, tl.int64) + 1, sum)
    tl.store(sums_ptr + 2 * tl.program_id(0), total)
    tl.store(sums_ptr + 2 * tl.program_id(0) + 1, count)


@triton.jit
def loss_mean_kernel(sums_ptr, loss_ptr, count_ptr, programs, BLOCK: tl.constexpr):
    """Add what the programs left, always in the same order; NaN where no row counts."""
    i = tl.arange(0, BLOCK)
    total = tl.sum(tl.load(sums_ptr + 2 * i, mask=i < programs, other=0.0), axis=0)
    count = tl.sum(tl.load(sums_ptr + 2 * i + 1, mask=i < programs, other=0.0), axis=0)
    mean = total / tl.where(count > 0, count, 1.0)
    tl.store(loss_ptr, tl.where(count > 0, mean, float("nan")))
    tl.store(count_ptr, count)


@triton.jit
def loss_backward_kernel(grad_ptr, logits_ptr, target_ptr, kept_ptr, count_ptr, out_ptr, ignored, CODES: tl.constexpr,
                         STRIDE: tl.constexpr, BLOCK: tl.constexpr, INTERPRET: tl.constexpr):  # fmt: skip
    """One row of the logits' gradient: ``(softmax - one hot) * grad / count``; zeros for a target that is ignored."""
    # where am I
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    DTYPE: tl.constexpr = out_ptr.dtype.element_ty

    # load
    target = tl.load(target_ptr + row)
    counts = target != ignored
    largest, sum = tl.load(kept_ptr + 2 * row), tl.load(kept_ptr + 2 * row + 1)
    scale = tl.load(grad_ptr).to(tl.float32) / tl.load(count_ptr)
    inverse = tl.div_rn(1.0, sum)
    for start in range(0, CODES, BLOCK):
        at = start + column
        x = tl.load(logits_ptr + row * STRIDE + at, mask=(at < CODES) & counts, other=0.0).to(tl.float32)

        # compute in fp32
        share = tl.exp(x - largest) * inverse - tl.where(at == target, 1.0, 0.0)
        out = tl.where(counts, share * scale, 0.0)

        # store
        tl.store(out_ptr + row * CODES + at, round_to(out, DTYPE, INTERPRET), mask=at < CODES)
