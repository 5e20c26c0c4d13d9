"""Launchers of the C++ and CUDA kernels: tensors to addresses, nothing else. Arguments have been checked.

``contracts.py`` hands in the extension, so this file can be imported where there is none.
"""

from __future__ import annotations

from functools import lru_cache
from types import ModuleType

import torch
from torch import Tensor

from flexlam_fast.ops import philox, reference
from flexlam_fast.ops.reference import level_table
from flexlam_fast.ops.thresholds import thresholds

TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
#: What codes are made like: a microsecond cheaper than naming their dtype.
_CODES = torch.empty(0, dtype=torch.int32, device="cpu")
#: Elements below which one thread does it all, in 25 us at most; above, two were faster even after a pause.
_ALONE = 2**15


def fsq(
    extension: ModuleType, z: Tensor, levels: tuple[int, ...], keep: Tensor | None, null: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Launch the forward kernel."""
    z = z.contiguous()
    latents = torch.empty_like(z)
    codes = _CODES.new_empty(*z.shape[:-1]) if z.is_cpu else z.new_empty(z.shape[:-1], dtype=torch.int32)
    tokens = codes.numel()
    slots, lengths, fill = 1, 0, 0
    if keep is not None and null is not None:
        keep, null = keep.to(torch.int32).contiguous(), null.to(torch.float32).contiguous()
        slots, lengths, fill = z.shape[-2], keep.data_ptr(), null.data_ptr()
    if not tokens:
        return latents, codes
    args = (z.data_ptr(), latents.data_ptr(), codes.data_ptr(), tokens, TYPES[z.dtype], slots, lengths, fill)
    if z.is_cuda:
        with torch.cuda.device(z.device):
            _on_cuda(extension, levels, z.device).forward(*args, torch.cuda.current_stream().cuda_stream)
    else:
        _on_cpu(extension, levels).forward(*args, _threads(tokens * len(levels)))
    return latents, codes


def fsq_backward(
    extension: ModuleType, grad: Tensor, z: Tensor, levels: tuple[int, ...], keep: Tensor | None, with_null: bool
) -> tuple[Tensor, Tensor]:
    """Launch the backward kernel: gradients of ``z`` and, fp32 ``[d]``, of the null (zeros where nobody asks)."""
    grad, z = grad.to(z.dtype).contiguous(), z.contiguous()
    grad_z = torch.empty_like(z)
    dim, tokens = z.shape[-1], z.numel() // z.shape[-1]
    if keep is not None:
        keep = keep.to(torch.int32).contiguous()
    slots = 1 if keep is None else z.shape[-2]
    with_null = with_null and keep is not None
    if not tokens:
        return grad_z, torch.zeros(dim, dtype=torch.float32, device=z.device)
    if z.is_cuda:
        sums = torch.empty(extension.cuda_partials() if with_null else 0, dim, dtype=torch.float32, device=z.device)
    else:
        chunks = -(-tokens // extension.chunk_tokens(slots, dim)) if with_null else 0
        sums = torch.zeros(chunks, dim, dtype=torch.float64, device="cpu")
    ends = (grad.data_ptr(), z.data_ptr(), grad_z.data_ptr(), sums.data_ptr() if with_null else 0)
    sizes = (tokens, TYPES[z.dtype], slots, 0 if keep is None else keep.data_ptr())
    if z.is_cuda:
        with torch.cuda.device(z.device):
            stream = torch.cuda.current_stream().cuda_stream
            _on_cuda(extension, levels, z.device).backward(*ends, *sizes, stream)
    else:
        _on_cpu(extension, levels).backward(*ends, *sizes, _threads(tokens * len(levels)))
    return grad_z, sums.sum(0).float() if with_null else sums.new_zeros(dim, dtype=torch.float32)


def codes_to_latents(
    extension: ModuleType, codes: Tensor, levels: tuple[int, ...], keep: Tensor | None, null: Tensor | None
) -> Tensor:
    """Launch the lookup on the CPU; on a GPU it is the reference's, which Triton's backend has as a kernel."""
    if codes.is_cuda:
        return reference.codes_to_latents(codes, levels, keep, null)
    codes = codes.to(torch.int32).contiguous()
    latents = torch.empty(*codes.shape, len(levels), dtype=torch.float32, device="cpu")
    slots, lengths, fill = 1, 0, 0
    if keep is not None and null is not None:
        keep, null = keep.to(torch.int32).contiguous(), null.to(torch.float32).contiguous()
        slots, lengths, fill = codes.shape[-1], keep.data_ptr(), null.data_ptr()
    tokens = codes.numel()
    if tokens:
        pattern = _on_cpu(extension, levels)
        args = (codes.data_ptr(), latents.data_ptr(), tokens, slots, lengths, fill)
        pattern.codes_to_latents(*args, _threads(tokens * len(levels)))
    return latents


def sample_prefix(extension: ModuleType, seed: Tensor, edges: Tensor, count: int) -> Tensor:
    """Draw retained lengths, int32 ``[count]``; on a GPU by the reference, whose arithmetic is the same."""
    if seed.is_cuda:
        return philox.sample_prefix(seed, edges, count)
    keep = torch.empty(count, dtype=torch.int32, device="cpu")
    key, offset = seed.tolist()
    extension.sample_prefix(key, offset, edges.data_ptr(), edges.numel(), keep.data_ptr(), count)
    return keep


def _threads(elements: int) -> int:
    return 1 if elements < _ALONE else torch.get_num_threads()


@lru_cache(maxsize=64)
def _on_cpu(extension: ModuleType, levels: tuple[int, ...]):  # type: ignore[no-untyped-def]  # a pybind11 class
    return _pattern(extension, levels, torch.device("cpu"))


@lru_cache(maxsize=64)
def _on_cuda(extension: ModuleType, levels: tuple[int, ...], device: torch.device):  # type: ignore[no-untyped-def]
    return extension.CudaLevels(_pattern(extension, levels, device))


def _pattern(extension: ModuleType, levels: tuple[int, ...], device: torch.device):  # type: ignore[no-untyped-def]
    table = level_table(levels, device)
    borders = thresholds(levels, device).flatten().tolist()
    return extension.LevelPattern(list(levels), borders, table.half.tolist(), table.shift.tolist())
