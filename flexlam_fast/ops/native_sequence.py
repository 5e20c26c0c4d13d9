"""Launchers of the C++ kernels of the sequence model's training: tensors to addresses, nothing else.

Arguments have been checked. ``contracts.compiled`` hands in the extension, so this file can be imported where there is
none.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from flexlam_fast.ops.native import TYPES


def norm_rope(
    extension: ModuleType,
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Norm and rotate ``q [B, N, H, D]`` and ``k [B, N, G, D]``; contiguous, in ``dtype``."""
    out = q.new_empty(q.shape, dtype=dtype), k.new_empty(k.shape, dtype=dtype)
    if q.numel() + k.numel():
        kept, shared = _shared(q, k, q_weight, k_weight, cos, sin, eps)
        results = *(t.data_ptr() for t in out), TYPES[dtype]
        extension.rotary_forward(*shared, *results, threads=torch.get_num_threads())
        del kept  # copies that the call has read
    return out


def norm_rope_backward(
    extension: ModuleType,
    grad_q: Tensor,
    grad_k: Tensor,
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of ``q`` and ``k`` in their dtypes, contiguous, and of both weights, fp32 ``[D]``."""
    of_q, of_k = (torch.zeros(q.shape[-1], dtype=torch.float32, device="cpu") for _ in range(2))
    out = q.new_empty(q.shape), k.new_empty(k.shape), of_q, of_k
    if q.numel() + k.numel():
        kept, shared = _shared(q, k, q_weight, k_weight, cos, sin, eps)
        grad_q, grad_k = _rows(grad_q), _rows(grad_k)
        results = _heads(grad_q), _heads(grad_k), *(t.data_ptr() for t in out)
        extension.rotary_backward(*shared, *results, threads=torch.get_num_threads())
        del kept
    return out


def mean_cross_entropy(
    extension: ModuleType, logits: Tensor, target: Tensor, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean loss, largest logit and sum of exponentials of every row ``[M, 2]``, and how many targets count; fp32."""
    logits, target = _rows(logits), target.contiguous()
    kept = torch.empty(logits.shape[0], 2, dtype=torch.float32, device="cpu")
    args = _loss(logits, target, kept, ignore_index)
    total, count = extension.loss_forward(*args, threads=torch.get_num_threads())
    mean = total / count if count else torch.nan
    return kept.new_tensor(mean), kept, kept.new_tensor(count)


def mean_cross_entropy_backward(
    extension: ModuleType,
    grad: Tensor,
    logits: Tensor,
    target: Tensor,
    kept: Tensor,
    count: Tensor,
    ignore_index: int,
) -> Tensor:
    """Gradient of the logits, contiguous, in their dtype."""
    out = logits.new_empty(logits.shape)
    logits, target = _rows(logits), target.contiguous()
    scale = float(grad) / max(float(count), 1.0)
    args = _loss(logits, target, kept, ignore_index)
    extension.loss_backward(*args, scale, out.data_ptr(), threads=torch.get_num_threads())
    return out


def _shared(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, eps: float
) -> tuple[list[Tensor], tuple[object, ...]]:
    """Return the arguments of ``csrc/rotary.h`` and the tensors that they point into."""
    q, k = _rows(q), _rows(k)
    weights = [w.to(torch.float32).contiguous() for w in (q_weight, k_weight)]
    same = cos.stride() == sin.stride() and cos.stride(-1) == 1
    cos, sin = (cos, sin) if same else (cos.contiguous(), sin.contiguous())
    batch, tokens, _, dim = q.shape
    by_batch = cos.stride(0) if cos.dim() == 3 else 0
    angles = cos.data_ptr(), sin.data_ptr(), by_batch, cos.stride(-2), cos.shape[-1] - dim // 2
    addresses = [w.data_ptr() for w in weights]
    return [q, k, *weights, cos, sin], (_heads(q), _heads(k), *addresses, angles, (batch, tokens, dim), eps)


def _heads(x: Tensor) -> tuple[int, ...]:
    return x.data_ptr(), x.shape[2], *x.stride()[:3], TYPES[x.dtype]


def _rows(t: Tensor) -> Tensor:
    """Return ``t`` if its last dimension stands side by side, else a copy in which it does."""
    return t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


def _loss(logits: Tensor, target: Tensor, kept: Tensor, ignore_index: int) -> tuple[int, ...]:
    addresses = logits.data_ptr(), target.data_ptr(), kept.data_ptr()
    return *addresses, *logits.shape, logits.stride(0), ignore_index, TYPES[logits.dtype]
