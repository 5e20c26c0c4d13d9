"""Launchers: tensors to kernels, one launch a call (two where tokens do not fill whole groups). Arguments are checked.

``flexlam_fast.ops.contracts`` imports this module at the first launch, and nothing else does.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
from flexlam_fast.kernels import fsq as kernels
from flexlam_fast.kernels import project
from torch import Tensor

WARPS = 4


def fsq(z: Tensor, levels: tuple[int, ...], keep: Tensor | None, null: Tensor | None) -> tuple[Tensor, Tensor]:
    """Forward of one batch."""
    return _forward(z, levels, keep, null, None, None)[:2]


def fsq_sample(
    z: Tensor, levels: tuple[int, ...], null: Tensor, seed: Tensor, edges: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Forward with lengths drawn in the same launch."""
    # zeros: where blocks have no slots, no program writes a length
    make = torch.empty if z.numel() else torch.zeros
    keep = make(z.shape[:-2], dtype=torch.int32, device=z.device)
    return _forward(z, levels, keep, null, seed.contiguous(), edges)


def _forward(
    z: Tensor,
    levels: tuple[int, ...],
    keep: Tensor | None,
    null: Tensor | None,
    seed: Tensor | None,
    edges: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    z = z.contiguous()
    latents = torch.empty_like(z)
    codes = torch.empty(z.shape[:-1], dtype=torch.int32, device=z.device)
    prefix = keep is not None and null is not None
    slots = z.shape[-2] if prefix else 1
    lengths, fill = _prefix(keep, null, codes)
    draws = (seed, edges) if seed is not None and edges is not None else (codes, codes)
    with _on(z.device):
        for tile in kernels.tiles_of(codes.numel(), levels, z.element_size(), z.device):
            kernels.fsq_forward_kernel[(tile.tiles,)](
                z, latents, codes, lengths, fill, *draws, tile.floats, tile.weight, tile.first, tile.end,
                SLOTS=slots, DIM=len(levels), GROUP=tile.group, WIDTH=tile.width, ROWS=tile.rows,
                STEPS=max(levels) - 1, PREFIX=prefix, SAMPLE=seed is not None, BITS=slots.bit_length(),
                INTERPRET=kernels.INTERPRETED, num_warps=WARPS,
            )  # fmt: skip
    return latents, codes, lengths


def fsq_backward(
    grad: Tensor, z: Tensor, levels: tuple[int, ...], keep: Tensor | None, with_null: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of z and, fp32 ``[d]``, of the null: partial sums in a fixed grid, added in a fixed order."""
    grad, z = grad.to(z.dtype).contiguous(), z.contiguous()
    grad_z, dim = torch.empty_like(z), len(levels)
    total = torch.zeros(dim, dtype=torch.float32, device=z.device)
    with_null = with_null and keep is not None
    slots = 1 if keep is None else z.shape[-2]
    lengths = z if keep is None else keep.to(torch.int32).contiguous()
    with _on(z.device):
        for tile in kernels.tiles_of(z.numel() // dim, levels, z.element_size(), z.device):
            programs = min(tile.tiles, kernels.PROGRAMS)
            sums = torch.empty(programs if with_null else 1, tile.width, dtype=torch.float32, device=z.device)
            kernels.fsq_backward_kernel[(programs,)](
                grad, z, grad_z, sums, lengths, tile.floats, tile.first, tile.end, tile.tiles,
                SLOTS=slots, DIM=dim, GROUP=tile.group, WIDTH=tile.width, ROWS=tile.rows, PREFIX=keep is not None,
                WITH_NULL=with_null, INTERPRET=kernels.INTERPRETED, num_warps=WARPS,
            )  # fmt: skip
            if with_null:
                total = total + sums[:, : tile.group * dim].sum(0).view(tile.group, dim).sum(0)
    return grad_z, total


def codes_to_latents(codes: Tensor, levels: tuple[int, ...], keep: Tensor | None, null: Tensor | None) -> Tensor:
    """Codes to null-filled fp32 latents."""
    codes = codes.to(torch.int32).contiguous()
    latents = torch.empty(*codes.shape, len(levels), dtype=torch.float32, device=codes.device)
    prefix = keep is not None and null is not None
    lengths, fill = _prefix(keep, null, codes)
    with _on(codes.device):
        for tile in kernels.tiles_of(codes.numel(), levels, 4, codes.device):
            kernels.lookup_kernel[(tile.tiles,)](
                codes, latents, lengths, fill, tile.floats, tile.basis, tile.counts, tile.first, tile.end,
                SLOTS=codes.shape[-1] if prefix else 1, DIM=len(levels), GROUP=tile.group, WIDTH=tile.width,
                ROWS=tile.rows, PREFIX=prefix, num_warps=WARPS,
            )  # fmt: skip
    return latents


def fsq_project(
    x: Tensor, weight: Tensor, bias: Tensor | None, levels: tuple[int, ...], keep: Tensor | None, null: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Forward from the encoder's width: x is read once."""
    x, weight = x.contiguous(), weight.float().contiguous()
    dim, codes = len(levels), torch.empty(x.shape[:-1], dtype=torch.int32, device=x.device)
    latents = torch.empty(*codes.shape, dim, dtype=x.dtype, device=x.device)
    lengths, fill = _prefix(keep, null, codes)
    group = 16 // x.element_size()
    group = 1 if (dim & (dim - 1) == 0 and dim * x.element_size() >= 16) or codes.numel() % group else group
    tokens, rows = codes.numel(), project.FORWARD_ROWS
    if tokens:
        with _on(x.device):
            project.project_forward_kernel[(triton.cdiv(tokens, rows),)](
                x, weight, _bias(bias, weight), latents, codes, lengths, fill, *_constants(levels, x.device), tokens,
                SLOTS=x.shape[-2], DIM=dim, INNER=x.shape[-1], CHUNK=project.CHUNK, ROWS=rows, STEPS=max(levels) - 1,
                PREFIX=keep is not None, PADDED=1 << (dim - 1).bit_length(), GROUP=group,
                INTERPRET=kernels.INTERPRETED, num_warps=project.forward_warps(x.element_size()),
            )  # fmt: skip
    return latents, codes


def fsq_project_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, levels: tuple[int, ...], keep: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, and in fp32 of weight ``[d, W]``, bias ``[d]`` and null ``[d]``."""
    x, weight = x.contiguous(), weight.float().contiguous()
    grad, grad_x, dim, inner = grad.contiguous(), torch.empty_like(x), len(levels), x.shape[-1]
    tokens = grad.numel() // dim
    tile = project.tile_of(tokens, inner)
    programs = min(tile.tiles, project.PROGRAMS)
    sums = torch.zeros(max(programs, 1), dim, tile.span + 2, dtype=torch.float32, device=x.device)
    lengths = grad if keep is None else keep.to(torch.int32).contiguous()
    if tokens:
        with _on(x.device):
            project.project_backward_kernel[(programs,)](
                grad, x, weight, _bias(bias, weight), grad_x, sums, lengths, *_constants(levels, x.device), tokens,
                tile.tiles, SLOTS=x.shape[-2], DIM=dim, INNER=inner, SPAN=tile.span, ROWS=tile.rows,
                PREFIX=keep is not None, INTERPRET=kernels.INTERPRETED, num_warps=tile.warps,
            )  # fmt: skip
    total = sums.sum(0)
    # tensors of their own, as the schema promises: views of one would alias
    weights, biases, nulls = (total[:, part].contiguous() for part in (slice(inner), tile.span, tile.span + 1))
    return grad_x, weights, biases, nulls


def _prefix(keep: Tensor | None, null: Tensor | None, unused: Tensor) -> tuple[Tensor, Tensor]:
    """Return lengths int32 and null fp32; any tensor where there are none, for a kernel that will not look."""
    if keep is None or null is None:
        return unused, unused
    return keep.to(torch.int32).contiguous(), null.to(torch.float32).contiguous()


def _bias(bias: Tensor | None, weight: Tensor) -> Tensor:
    return weight.new_zeros(weight.shape[0]) if bias is None else bias.float().contiguous()


@lru_cache(maxsize=64)
def _constants(levels: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return one token's constants without padding: fp32 ``[5 + steps, d]`` and int32 ``[d]``."""
    floats, weight, _, _ = kernels.columns(levels, 1, device)
    made = floats[:, : len(levels)].contiguous(), weight[: len(levels)].contiguous()
    kernels.settle(device)
    return made


def _on(device: torch.device) -> torch.cuda.device:
    """Launch on the tensors' device; without one, as in the interpreter, this does nothing."""
    return torch.cuda.device(device if device.type == "cuda" else -1)
