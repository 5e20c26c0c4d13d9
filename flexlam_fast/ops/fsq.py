"""The bottleneck's two ops: check, pick a backend, call (design sections 2 and 5)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from flexlam_fast import backend as backends
from flexlam_fast.checks import check_tensor, describe
from flexlam_fast.errors import InputError
from flexlam_fast.ops import reference

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
INTEGERS = (torch.int32, torch.int64)


def fsq(
    z: Tensor,
    levels: Sequence[int],
    keep: Tensor | None = None,
    null: Tensor | None = None,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Quantize latents with FSQ, keep a prefix, and fill the rest with the null latent (paper sections 4.1, A.3).

    Args:
        z: ``[..., K, d]`` floating; arithmetic is fp32 whatever the dtype.
        levels: ``d`` integers of at least 2.
        keep: ``[...]`` int32 or int64, retained prefix length of each block, within ``0..K``; None keeps every slot.
        null: ``[d]`` floating, the shared null latent; needed with ``keep``.
        backend: ``"reference"``, ``"triton"``, ``"native"``; None or ``"auto"`` takes the fastest that works here.

    Returns:
        latents: ``[..., K, d]`` in ``z``'s dtype: FSQ values in ``[-1, 1]`` in slots below ``keep``, ``null`` above.
            The gradient of ``z`` is straight-through; the gradient of ``null`` sums over the suffix slots.
        codes: ``[..., K]`` int32 in ``[0, C)``, of every slot, whatever ``keep`` is.

    Raises:
        InputError: wrong shape, dtype, device, levels, or ``keep`` outside ``0..K``.
        BackendError: a backend asked for by name that cannot run here.
    """
    check_levels(levels)
    check_tensor("z", z, ["...", "K", len(levels)], FLOATS)
    check_prefix(keep, null, z.shape[:-2], z.shape[-2], len(levels), z.device)
    backends.choose(backend or "auto", z.device)
    return reference.fsq(z, levels, keep, null)


def codes_to_latents(
    codes: Tensor,
    levels: Sequence[int],
    keep: Tensor | None = None,
    null: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """Turn codes into null-filled latents, the decode side of :func:`fsq`.

    Args:
        codes: ``[..., K]`` int32 or int64 in ``[0, C)``; slots at or beyond ``keep`` may hold any integer.
        levels: ``d`` integers of at least 2.
        keep: ``[...]`` int32 or int64 within ``0..K``; None keeps every slot.
        null: ``[d]`` floating; needed with ``keep``.
        backend: as in :func:`fsq`.

    Returns:
        latents ``[..., K, d]`` fp32. Slots at or beyond ``keep`` do not depend on ``codes`` by a single bit.

    Raises:
        InputError: wrong shape, dtype, device or levels, or a retained code outside ``[0, C)``.
        BackendError: a backend asked for by name that cannot run here.
    """
    check_levels(levels)
    check_tensor("codes", codes, ["...", "K"], INTEGERS)
    check_prefix(keep, null, codes.shape[:-1], codes.shape[-1], len(levels), codes.device)
    check_codes(codes, levels, keep)
    backends.choose(backend or "auto", codes.device)
    return reference.codes_to_latents(codes, levels, keep, null)


def check_levels(levels: Sequence[int]) -> None:
    """Check that ``levels`` is a non-empty sequence of integers of at least 2 whose codes fit in int32."""
    good = len(levels) > 0 and all(isinstance(n, int) and n >= 2 for n in levels)
    if not good:
        raise InputError(f"levels: expected integers of at least 2, got {list(levels)!r}")
    if math.prod(levels) >= 2**31:
        raise InputError(f"levels: expected a codebook below 2^31, got {list(levels)!r}")


def check_prefix(
    keep: Tensor | None, null: Tensor | None, blocks: torch.Size, slots: int, dim: int, device: torch.device
) -> None:
    """Check ``keep`` and ``null`` against the blocks they belong to."""
    if keep is None:
        return
    check_tensor("keep", keep, list(blocks), INTEGERS, device)
    if null is None:
        raise InputError("null: expected a null latent with keep, got None")
    check_tensor("null", null, [dim], FLOATS, device)
    # reading a device tensor would stall the stream: values are checked where that costs nothing
    if device.type == "cpu" and keep.numel() and (int(keep.min()) < 0 or int(keep.max()) > slots):
        raise InputError(f"keep: expected 0..{slots}, got {int(keep.min())}..{int(keep.max())}")


def check_codes(codes: Tensor, levels: Sequence[int], keep: Tensor | None) -> None:
    """Check that retained codes lie in the codebook (on the CPU, where reading them costs nothing)."""
    if codes.device.type != "cpu" or not codes.numel():
        return
    size = math.prod(levels)
    wrong = (codes < 0) | (codes >= size)
    if keep is not None:
        wrong &= torch.arange(codes.shape[-1]) < keep.unsqueeze(-1)
    if bool(wrong.any()):
        raise InputError(f"codes: expected 0..{size - 1}, got {describe(int(codes[wrong][0]))}")
