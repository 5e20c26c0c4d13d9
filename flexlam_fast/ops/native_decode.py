"""Launchers of the decision's C++ kernels: tensors to addresses, nothing else. Arguments have been checked.

``contracts.compiled`` hands in the extension, so this file can be imported where there is none.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from flexlam_fast.ops.native import TYPES

MANY = 16  # queries of a session from which tiles of so many pay


def fused_linear(
    extension: ModuleType,
    x: Tensor,
    norm: Tensor | None,
    weight: Tensor,
    residual: Tensor | None,
    eps: float,
    gated: bool,
    fp32_out: bool,
) -> Tensor:
    """RMSNorm where there is ``norm``, product, SwiGLU if ``gated``, sum where there is ``residual``."""
    x, weight = x.contiguous(), weight.contiguous()
    norm, residual = (None if t is None else t.contiguous() for t in (norm, residual))
    inner, outs = x.shape[-1], weight.shape[0] // (2 if gated else 1)
    out = x.new_empty((*x.shape[:-1], outs), dtype=torch.float32 if fp32_out else x.dtype)
    if out.numel():
        addresses = x.data_ptr(), _address(norm), weight.data_ptr(), _address(residual), out.data_ptr()
        sizes = x.numel() // inner, inner, outs, TYPES[x.dtype]
        extension.linear(*addresses, *sizes, gated, fp32_out, eps, torch.get_num_threads())
    return out


def page_write(
    extension: ModuleType,
    qkv: Tensor,
    q_norm: Tensor,
    k_norm: Tensor,
    positions: Tensor,
    rows: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    theta: float,
    eps: float,
) -> Tensor:
    """Norm and rotate queries and keys, store keys and values, return the queries ``[B, N, H, D]``."""
    kv_heads, dim = k_pages.shape[2:]
    heads = qkv.shape[2] // dim - 2 * kv_heads
    q = qkv.new_empty((*qkv.shape[:2], heads, dim))
    if q.numel():
        reads = [t.contiguous() for t in (qkv, q_norm, k_norm, positions, rows)]
        addresses = [t.data_ptr() for t in (*reads, k_pages, v_pages, q)]
        sizes = qkv.shape[0] * qkv.shape[1], heads, kv_heads, dim, k_pages.shape[0] * k_pages.shape[1]
        extension.page_write(*addresses, *sizes, TYPES[qkv.dtype], theta, eps, torch.get_num_threads())
    return q


def page_attend(
    extension: ModuleType, q: Tensor, k_pages: Tensor, v_pages: Tensor, table: Tensor, context: Tensor, start: Tensor
) -> Tensor:
    """Attention ``[B, N, H, D]`` over the pages that ``table`` names."""
    q, table, context, start = (t.contiguous() for t in (q, table, context, start))
    out = torch.empty_like(q)
    if q.numel():
        pages, page, kv_heads, dim = k_pages.shape
        addresses = [t.data_ptr() for t in (q, k_pages, v_pages, table, context, start, out)]
        sizes = *q.shape[:3], kv_heads, dim, page, table.shape[1], pages
        how = ("tiles",) if q.shape[1] >= MANY and takes_tiles(extension, k_pages) else ()
        extension.page_attend(*addresses, *sizes, TYPES[q.dtype], torch.get_num_threads(), *how)
    return out


def takes_tiles(extension: ModuleType, pages: Tensor) -> bool:
    """Whether attention of many tokens over such pages goes by the processor's matrix tiles here."""
    return bool(extension.takes_tiles(pages.shape[-1], pages.shape[-3], TYPES[pages.dtype]))


def page_attend_add(extension: ModuleType, *args: Tensor) -> Tensor:
    """``residual + attended @ weight.T``, ``[B, N, W]``; the last two arguments are ``weight`` and ``residual``."""
    *seen, weight, residual = args
    attended = page_attend(extension, *seen)
    return fused_linear(extension, attended.flatten(2), None, weight, residual, 0.0, False, False)


def norm_rows(extension: ModuleType, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root mean square norm of rows ``[..., W]``, as the model's module has it."""
    x = x.contiguous()
    out = torch.empty_like(x)
    width = x.shape[-1]
    sizes = x.numel() // width, width, TYPES[x.dtype]
    extension.norm_rows(x.data_ptr(), weight.data_ptr(), out.data_ptr(), *sizes, eps, torch.get_num_threads())
    return out


def swiglu_rows(extension: ModuleType, x: Tensor) -> Tensor:
    """``silu(gate) * up`` of rows ``[..., 2 I]`` that hold both, one behind the other."""
    x = x.contiguous()
    inner = x.shape[-1] // 2
    out = x.new_empty((*x.shape[:-1], inner))
    sizes = x.numel() // (2 * inner), inner, TYPES[x.dtype]
    extension.swiglu_rows(x.data_ptr(), out.data_ptr(), *sizes, torch.get_num_threads())
    return out


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
