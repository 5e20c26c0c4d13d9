"""Attention over whole sequences with a gradient, for training: encoder, decoder and sequence model (design section 2).

The C++ of ``csrc/attention_train.h`` reads queries, keys and values where the projection left them, keeps the
log-sum-exp of each query instead of the probabilities, and forms these again for the gradient. On a GPU ``auto`` is
torch's own fused attention, which has FlashAttention-2 inside.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flexlam_fast.ambient import outside_autocast
from flexlam_fast.backend import AUTO, NATIVE, REFERENCE, named
from flexlam_fast.checks import check_number, check_tensor, describe
from flexlam_fast.errors import InputError
from flexlam_fast.ops import native_attention
from flexlam_fast.ops.arguments import FLOATS, MAX_FP32, choose_native
from flexlam_fast.ops.contracts import compiled
from flexlam_fast.ops.differentiable import define_differentiable, define_plain
from flexlam_fast.ops.gradients import is_transformed

_TORCH = "torch"  # what ``auto`` is on a GPU
_MOST_DIM, _WHOLE = 128, 16


@outside_autocast
def self_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    backend: str | None = AUTO,
) -> Tensor:
    """Attend from every query to the keys that it sees: ``softmax(scale q k^T) v``, softmax in at least fp32.

    A query that sees no key at all gets zeros and gives no gradient.

    Args:
        q: ``[B, N, H, D]`` floating, any strides; C++ copies nothing as long as the numbers of a head are neighbours.
        k: ``[B, M, G, D]`` of the same dtype; ``G`` divides ``H``, and ``H / G`` neighbouring heads share a key head.
        v: as ``k``.
        mask: bool ``[N, M]``, True where a query sees a key, shared by batch and heads; None: it sees all.
        causal: besides, query ``i`` sees keys ``0..M-N+i`` only, which needs ``M >= N``.
        scale: of the scores, above 0; None is ``1 / sqrt(D)``.
        backend: ``"reference"`` or, on a CPU, ``"native"``, which takes fp32, fp16 and bf16 and a ``D`` of whole 16s up
            to 128; None or ``"auto"`` takes C++ on a CPU where it can, and torch's fused attention on a GPU.

    Returns:
        ``[B, N, H, D]`` in ``q``'s dtype; differentiable once in ``q``, ``k`` and ``v``.

    Raises:
        InputError: wrong shapes, dtypes or devices, no keys, a scale that is not above 0, or ``causal`` with more
            queries than keys.
        BackendError: a backend asked for by name that cannot run here or does not take such arguments.
    """
    _check(q, k, v)
    scale = _check_rest(q, k.shape[1], mask, causal, scale)
    name = _pick(named(backend), q.device, q.dtype, q.shape[-1])
    if name == NATIVE:
        return _attend(q, k, v, _bytes(mask), causal, scale)[0]
    return (_fused if name == _TORCH else reference)(q, k, v, mask, causal, scale)


@outside_autocast
def self_attention_packed(
    qkv: Tensor,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    backend: str | None = AUTO,
) -> Tensor:
    """:func:`self_attention` of one projection, whose gradient then is one contiguous tensor too.

    Args:
        qkv: ``[B, N, 3, H, D]`` floating: queries, keys and values.
        mask: as in :func:`self_attention`.
        causal: likewise.
        scale: likewise.
        backend: likewise.

    Returns:
        ``[B, N, H, D]`` in ``qkv``'s dtype, the same bits as from the three parts.

    Raises:
        InputError: as :func:`self_attention`.
        BackendError: likewise.
    """
    if not isinstance(qkv, Tensor) or qkv.dim() != 5 or qkv.shape[2] != 3 or qkv.dtype not in FLOATS:
        check_tensor("qkv", qkv, ["B", "N", 3, "H", "D"], FLOATS)
    if not all(qkv.shape[1:]):
        raise InputError(f"qkv: expected at least one token, head and dimension, got {describe(qkv)}")
    q = qkv[:, :, 0]
    scale = _check_rest(q, q.shape[1], mask, causal, scale)
    name = _pick(named(backend), q.device, q.dtype, q.shape[-1])
    if name == NATIVE:
        return _attend_packed(qkv, _bytes(mask), causal, scale)[0]
    q, k, v = qkv.unbind(2)
    return (_fused if name == _TORCH else reference)(q, k, v, mask, causal, scale)


def reference(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float) -> Tensor:
    """Two products in the dtype of the tensors with a softmax in at least fp32 between them; arguments are checked."""
    queries, keys, share, dtype = q.shape[1], k.shape[1], q.shape[2] // k.shape[2], q.dtype
    if share > 1:
        k, v = (t.repeat_interleave(share, dim=2) for t in (k, v))
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    scores = (q @ k.transpose(-1, -2)).to(torch.promote_types(q.dtype, torch.float32)) * scale
    seen = _seen(queries, keys, mask, causal, q.device)
    if seen is None:
        weights = scores.softmax(-1)
    else:
        blind = ~seen.any(-1, keepdim=True)  # of these any weights but NaN will do, for they are dropped afterwards
        weights = scores.masked_fill(~(seen | blind), -torch.inf).softmax(-1).masked_fill(blind, 0.0)
    return (weights.to(dtype) @ v).to(dtype).transpose(1, 2)  # autocast would leave its own dtype


def _fused(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float) -> Tensor:
    """Torch's own, whose ``is_causal`` is aligned to the first key, so that only a square without a mask takes it."""
    # sizes are tensors in torch.jit.trace
    square = bool(causal and mask is None and q.shape[1] == k.shape[1])
    grouped = bool(q.shape[2] != k.shape[2])
    seen = None if square else _seen(q.shape[1], k.shape[1], mask, causal, q.device)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    call = F.scaled_dot_product_attention
    return call(q, k, v, attn_mask=seen, is_causal=square, scale=scale, enable_gqa=grouped).transpose(1, 2)


def _seen(queries: int, keys: int, mask: Tensor | None, causal: bool, device: torch.device) -> Tensor | None:
    if not causal:
        return mask
    earlier = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
    return earlier if mask is None else mask & earlier


def attend_self(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Attended values and, for the gradient, the log-sum-exp: fp32 ``[B, H, N]``."""
    return native_attention.forward(compiled(NATIVE), q, k, v, mask, causal, scale)


def attend_self_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``q``, ``k`` and ``v``, contiguous and of their dtype."""
    into = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    native_attention.backward(compiled(NATIVE), grad, q, k, v, mask, out, lse, causal, scale, into)
    return into


def attend_packed(qkv: Tensor, mask: Tensor | None, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """:func:`attend_self` of ``[B, N, 3, H, D]``."""
    q, k, v = qkv.unbind(2)
    return attend_self(q, k, v, mask, causal, scale)


def attend_packed_backward(
    grad: Tensor, qkv: Tensor, mask: Tensor | None, out: Tensor, lse: Tensor, causal: bool, scale: float
) -> Tensor:
    """Gradient of ``[B, N, 3, H, D]``, contiguous."""
    into = qkv.new_empty(qkv.shape)
    q, k, v = qkv.unbind(2)
    native_attention.backward(compiled(NATIVE), grad, q, k, v, mask, out, lse, causal, scale, into.unbind(2))
    return into


def _fake(q: Tensor, *rest: Any) -> Any:
    return q.new_empty(q.shape), q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32)


def _keep(ctx: Any, tensors: tuple[Tensor, ...], inputs: tuple[Any, ...], output: Any) -> None:
    mask, ctx.causal, ctx.scale = inputs
    ctx.save_for_backward(*tensors, mask, *output)
    ctx.mark_non_differentiable(output[1])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _keep(ctx, inputs[:3], inputs[3:], output)


def _setup_packed(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _keep(ctx, inputs[:1], inputs[1:], output)


def _backward(ctx: Any, grad: Tensor, _: Any) -> Any:
    return *_backward_self(grad, *ctx.saved_tensors, ctx.causal, ctx.scale), None, None, None


def _backward_of_packed(ctx: Any, grad: Tensor, _: Any) -> Any:
    return _backward_packed(grad, *ctx.saved_tensors, ctx.causal, ctx.scale), None, None, None


_REST, _KEPT = (
    "Tensor? mask, bool causal, float scale",
    "Tensor? mask, Tensor out, Tensor lse, bool causal, float scale",
)
_backward_self = define_plain(
    f"(Tensor grad, Tensor q, Tensor k, Tensor v, {_KEPT}) -> (Tensor, Tensor, Tensor)",
    attend_self_backward,
    lambda grad, q, k, v, *rest: (q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)),
)
_backward_packed = define_plain(
    f"(Tensor grad, Tensor qkv, {_KEPT}) -> Tensor",
    attend_packed_backward,
    lambda grad, qkv, *rest: qkv.new_empty(qkv.shape),
)
_attend = define_differentiable(
    f"(Tensor q, Tensor k, Tensor v, {_REST}) -> (Tensor, Tensor)", attend_self, _fake, _setup, _backward
)
_attend_packed = define_differentiable(
    f"(Tensor qkv, {_REST}) -> (Tensor, Tensor)",
    attend_packed,
    lambda qkv, *rest: _fake(qkv[:, :, 0]),
    _setup_packed,
    _backward_of_packed,
)


def _bytes(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.contiguous()


def _pick(backend: str, device: torch.device, dtype: torch.dtype, dim: int) -> str:
    if backend == AUTO and device.type == "cpu" and is_transformed():
        return REFERENCE
    return _known_pick(backend, device, dtype, dim)


# a backend is no part of a traced graph; see arguments.pick
_pick._dynamo_marked_constant = True  # type: ignore[attr-defined]


@lru_cache(maxsize=256)
def _known_pick(backend: str, device: torch.device, dtype: torch.dtype, dim: int) -> str:
    if backend == AUTO and device.type != "cpu":
        return _TORCH
    takes = dtype in FLOATS[:3] and dim % _WHOLE == 0 and dim <= _MOST_DIM
    wanted, got = "float32, float16 or bfloat16 and a head of whole 16s up to 128", str(dtype).split(".")[1]
    return choose_native(backend, device, takes, wanted, f"{dim} in {got}")


def _check(q: Tensor, k: Tensor, v: Tensor) -> None:
    if not isinstance(q, Tensor) or q.dim() != 4 or q.dtype not in FLOATS:
        check_tensor("q", q, ["B", "N", "H", "D"], FLOATS)
    batch, _, heads, dim = q.shape
    check_tensor("k", k, [batch, "M", "G", dim], q.dtype, q.device)
    check_tensor("v", v, list(k.shape), q.dtype, q.device)
    if not all(k.shape[1:]) or heads % k.shape[2]:
        raise InputError(f"k: expected at least one key and a number of heads that divides {heads}, got {describe(k)}")


def _check_rest(q: Tensor, keys: int, mask: Tensor | None, causal: bool, scale: float | None) -> float:
    """Check what goes beside queries ``[B, N, H, D]`` and ``keys``; return the scale."""
    if mask is not None:
        check_tensor("mask", mask, [q.shape[1], keys], torch.bool, q.device)
    if causal and keys < q.shape[1]:
        raise InputError(f"k: expected at least the {q.shape[1]} queries' number of keys with causal, got {keys}")
    if scale is None:
        return 1.0 / math.sqrt(q.shape[-1])
    return float(check_number("scale", scale, 0, MAX_FP32, open_low=True))
