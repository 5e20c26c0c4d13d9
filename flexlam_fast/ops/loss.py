"""The sequence model's loss: cross-entropy of logits with codes, its mean, without a softmax in memory (paper B.2)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flexlam_fast.ambient import outside_autocast
from flexlam_fast.backend import AUTO, NATIVE, REFERENCE, TRITON
from flexlam_fast.checks import check_number, check_tensor
from flexlam_fast.errors import InputError
from flexlam_fast.ops import native_sequence
from flexlam_fast.ops.arguments import FLOATS, is_readable
from flexlam_fast.ops.contracts import compiled
from flexlam_fast.ops.differentiable import define_differentiable, define_plain
from flexlam_fast.ops.linear import pick


@outside_autocast
def cross_entropy(logits: Tensor, target: Tensor, *, ignore_index: int = -100, backend: str | None = AUTO) -> Tensor:
    """Mean cross-entropy over the targets that are not ignored.

    Logits are read once, row by row, in fp32 arithmetic; backward reads them again and writes their gradient, and
    nothing else of that size is ever made. The mean is added in an order that depends on the number of rows alone.

    Args:
        logits: ``[M, C]`` floating; rows may stand apart, as in a slice of a wider product. With ``C`` or the rows'
            distance a multiple of 8 (16 bytes of bf16) Triton's kernels move whole words.
        target: int64 ``[M]``, each in ``0..C-1`` or ``ignore_index``. On a GPU, where reading them would wait for the
            device, a target outside makes the loss and the gradient of its row NaN.
        ignore_index: the target of rows that do not count; it may lie inside ``0..C-1``.
        backend: ``"reference"``, ``"triton"`` or, on a CPU, ``"native"``; None or ``"auto"`` takes Triton on CUDA and
            C++ on a CPU, the reference for fp64.

    Returns:
        Scalar, fp32 (fp64 for fp64 logits); NaN where every target is ignored, as torch has it.

    Raises:
        InputError: wrong shape, dtype or device, or, on a CPU, a target that is no code.
        BackendError: a backend asked for by name that cannot run here or does not take such arguments.
    """
    check_tensor("logits", logits, ["M", "C"], FLOATS)
    rows, codes = logits.shape
    if not codes:
        raise InputError(f"logits: expected at least one column, got {list(logits.shape)}")
    check_tensor("target", target, [rows], torch.int64, logits.device)
    ignore_index = int(check_number("ignore_index", ignore_index, -(2**63), 2**63 - 1, integer=True))
    _check_codes(target, codes, ignore_index)
    name = pick(backend, logits.device, logits.dtype, 1, native=True)
    if name == REFERENCE:
        return reference(logits, target, ignore_index)
    return _call(logits, target, ignore_index, name)[0]


def reference(logits: Tensor, target: Tensor, ignore_index: int) -> Tensor:
    """Torch's, in at least fp32."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    return F.cross_entropy(logits.to(wide), target, ignore_index=ignore_index)


def _check_codes(target: Tensor, codes: int, ignore_index: int) -> None:
    """Check targets where reading them is free; torch would answer with a line of C++."""
    if not is_readable(target):
        return
    low, high = map(int, torch.aminmax(target.masked_fill(target == ignore_index, 0)))
    if low < 0 or high >= codes:
        raise InputError(f"target: expected 0..{codes - 1} or {ignore_index}, got {low if low < 0 else high}")


def mean_cross_entropy(
    logits: Tensor, target: Tensor, ignore_index: int, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the forward kernel on checked arguments.

    Returns:
        The mean; ``[M, 2]``, of each row the largest logit and the sum of exponentials relative to it, which together
        are its log-sum-exp; how many targets count. All fp32.
    """
    if backend == NATIVE:
        return native_sequence.mean_cross_entropy(compiled(NATIVE), logits, target, ignore_index)
    return compiled(TRITON, "launch_loss").mean_cross_entropy(logits, target, ignore_index)


def mean_cross_entropy_backward(
    grad: Tensor, logits: Tensor, target: Tensor, kept: Tensor, count: Tensor, ignore_index: int, backend: str
) -> Tensor:
    """Gradient of the logits in their dtype, from what forward kept."""
    args = grad, logits, target, kept, count, ignore_index
    if backend == NATIVE:
        return native_sequence.mean_cross_entropy_backward(compiled(NATIVE), *args)
    return compiled(TRITON, "launch_loss").mean_cross_entropy_backward(*args)


def _fake(logits: Tensor, target: Tensor, ignore_index: int, backend: str) -> Any:
    return tuple(logits.new_empty(shape, dtype=torch.float32) for shape in ((), (logits.shape[0], 2), ()))


def _fake_backward(grad: Tensor, logits: Tensor, *others: Any) -> Tensor:
    return logits.new_empty(logits.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, target, ctx.ignore_index, ctx.backend = inputs
    _, kept, count = output
    ctx.mark_non_differentiable(kept, count)
    ctx.save_for_backward(logits, target, kept, count)


def _backward(ctx: Any, grad: Tensor, *_: Any) -> Any:
    return _call_backward(grad, *ctx.saved_tensors, ctx.ignore_index, ctx.backend), None, None, None


_call_backward = define_plain(
    "(Tensor grad, Tensor logits, Tensor target, Tensor kept, Tensor count, int ignore_index, str backend) -> Tensor",
    mean_cross_entropy_backward,
    _fake_backward,
)
_call = define_differentiable(
    "(Tensor logits, Tensor target, int ignore_index, str backend) -> (Tensor, Tensor, Tensor)",
    mean_cross_entropy,
    _fake,
    _setup,
    _backward,
)
