"""Launchers of training's attention in C++ (``csrc/attention_train.h``): tensors to addresses. Arguments were checked.

``contracts.compiled`` hands in the extension, so this file can be imported where there is none.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from flexlam_fast.ops.native import TYPES


def forward(
    extension: ModuleType, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Attended values ``[B, N, H, D]`` and the log-sum-exp of the scores, fp32 ``[B, H, N]``."""
    q, k, v = _rows(q), _rows(k), _rows(v)
    out, lse = q.new_empty(q.shape), q.new_empty(_log_sums(q), dtype=torch.float32)
    if out.numel():
        extension.self_attention(_places(q, k, v, out), lse.data_ptr(), *_rest(q, k, mask, causal, scale))
    return out, lse


def backward(
    extension: ModuleType,
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
    causal: bool,
    scale: float,
    into: tuple[Tensor, ...],
) -> None:
    """Write the gradients of ``q``, ``k`` and ``v`` into three tensors of their shapes, whose ``D`` are neighbours."""
    if not out.numel():
        for t in into:
            t.zero_()  # keys that no query looks at
        return
    q, k, v, grad = _rows(q), _rows(k), _rows(v), _rows(grad.to(q.dtype))
    places = _places(q, k, v, out), _places(grad, *into)
    extension.self_attention_backward(*places, lse.data_ptr(), *_rest(q, k, mask, causal, scale))


def _log_sums(q: Tensor) -> tuple[int, int, int]:
    return q.shape[0], q.shape[2], q.shape[1]


def _rows(tensor: Tensor) -> Tensor:
    """The tensor, copied if the numbers of a head are no neighbours."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _places(*tensors: Tensor) -> list[tuple[int, ...]]:
    """Address, then elements from a session, a token and a head to the next."""
    return [(t.data_ptr(), *t.stride()[:3]) for t in tensors]


def _rest(q: Tensor, k: Tensor, mask: Tensor | None, causal: bool, scale: float) -> tuple[object, ...]:
    sizes = (q.shape[0], q.shape[1], k.shape[1], q.shape[2], k.shape[2], q.shape[3])
    return 0 if mask is None else mask.data_ptr(), sizes, TYPES[q.dtype], causal, scale, torch.get_num_threads()
