"""The bottleneck's ops: check, pick a backend, call (design sections 2 and 5)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flexlam_fast.ambient import outside_autocast
from flexlam_fast.backend import AUTO, REFERENCE, TRITON, named
from flexlam_fast.checks import check_list, check_number, check_tensor
from flexlam_fast.ops import arguments as check
from flexlam_fast.ops import gradients, philox, reference


@outside_autocast
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
        z: ``[..., K, d]`` floating; arithmetic is fp32 whatever the dtype. Other than contiguous layouts cost a copy.
        levels: ``d`` integers of at least 2.
        keep: ``[...]`` int32 or int64, retained prefix length of each block, within ``0..K``; None keeps every slot.
        null: ``[d]`` floating, the shared null latent; needed with ``keep``.
        backend: ``"reference"``, ``"triton"``, ``"native"``; None or ``"auto"`` takes the fastest that works here.

    Returns:
        latents: ``[..., K, d]`` in ``z``'s dtype: FSQ values in ``[-1, 1]`` in slots below ``keep``, ``null`` above.
            The gradient of ``z`` is straight-through; the gradient of ``null`` sums over the suffix slots.
        codes: ``[..., K]`` int32 in ``[0, C)``, of every slot, whatever ``keep`` is. Where ``z`` is NaN the latents
            are NaN and the code is of no meaning.

    Raises:
        InputError: wrong shape, dtype, device, levels, or ``keep`` outside ``0..K`` (values are read on the CPU only).
        BackendError: a backend asked for by name that cannot run here or does not take such arguments.
    """
    levels = check.levels_of(levels)
    check.check_latents("z", z, len(levels))
    if keep is None:
        null = None
    else:
        check.check_prefix(keep, null, z.shape[:-2], z.shape[-2], len(levels), z.device)
    name = check.pick(named(backend), z.device, z.dtype, levels)
    if name == REFERENCE or (backend in (None, AUTO) and gradients.is_transformed()):
        return reference.fsq(z, levels, keep, null)
    return gradients.fsq(z, levels, keep, null, name)


@outside_autocast
def fsq_project(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    levels: Sequence[int],
    keep: Tensor | None = None,
    null: Tensor | None = None,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`fsq` of ``x @ weight.T + bias``, the encoder's last projection and the bottleneck in one.

    Triton runs it as one kernel that reads ``x`` once, for ``W`` up to 2048; otherwise PyTorch projects, in fp32 and
    whatever autocast says. The sums of a projection have no fixed order, so a code may differ between backends where
    ``z`` lies within rounding of a threshold.

    Args:
        x: ``[..., K, W]`` floating.
        weight: ``[d, W]`` floating.
        bias: ``[d]`` floating, or None.
        levels: as in :func:`fsq`.
        keep: as in :func:`fsq`.
        null: as in :func:`fsq`.
        backend: as in :func:`fsq`.

    Returns:
        latents ``[..., K, d]`` in ``x``'s dtype and codes ``[..., K]`` int32, as :func:`fsq` has them, with gradients
        for ``x``, ``weight``, ``bias`` and ``null``.

    Raises:
        InputError: wrong shape, dtype, device or levels, or ``keep`` outside ``0..K``.
        BackendError: a backend asked for by name that cannot run here or does not take such arguments.
    """
    levels = check.levels_of(levels)
    check.check_latents("x", x, x.shape[-1] if isinstance(x, Tensor) and x.dim() else 1)
    check_tensor("weight", weight, [len(levels), x.shape[-1]], check.FLOATS, x.device)
    if bias is not None:
        check_tensor("bias", bias, [len(levels)], check.FLOATS, x.device)
    check.check_prefix(keep, null, x.shape[:-2], x.shape[-2], len(levels), x.device)
    name = check.pick(named(backend), x.device, x.dtype, levels)
    null = null if keep is not None else None
    if name == TRITON and x.shape[-1] <= check.MAX_INNER:
        return gradients.fsq_project(x, weight, bias, levels, keep, null, name)
    z = reference.project(x, weight, bias)
    latents, codes = fsq(z, levels, keep, null, backend=backend)
    return latents.to(x.dtype), codes


@outside_autocast
def fsq_sample(
    z: Tensor,
    levels: Sequence[int],
    null: Tensor,
    seed: Tensor,
    weights: Sequence[float] | None = None,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`fsq` whose retained lengths are drawn where ``z`` is, from a counter: no host round trip in training.

    Args:
        z: ``[..., K, d]`` floating.
        levels: as in :func:`fsq`.
        null: ``[d]`` floating.
        seed: int64 ``[2]`` on ``z``'s device: a key, and the counter of the first block (add the number of blocks to
            it after a step). Both are read on the device, so a captured graph draws afresh when they change.
        weights: odds of the lengths ``0..K``; None: all alike (paper A.3).
        backend: as in :func:`fsq`.

    Returns:
        latents ``[..., K, d]`` and codes ``[..., K]`` as :func:`fsq` has them, and the lengths ``[...]`` int32, which
        are the same on every backend.

    Raises:
        InputError: wrong shape, dtype, device, levels or weights.
        BackendError: a backend asked for by name that cannot run here or does not take such arguments.
    """
    levels = check.levels_of(levels)
    check.check_latents("z", z, len(levels))
    check.check_null(null, len(levels), z.device)
    check_tensor("seed", seed, [2], torch.int64, z.device)
    edges = philox.prefix_edges(z.shape[-2], _odds(weights, z.shape[-2] + 1), z.device)
    name = check.pick(named(backend), z.device, z.dtype, levels)
    if name != REFERENCE and not (backend in (None, AUTO) and gradients.is_transformed()):
        return gradients.fsq_sample(z, levels, null, seed, edges, name)
    keep = philox.sample_prefix(seed, edges, z.shape[:-2].numel()).view(z.shape[:-2])
    return *reference.fsq(z, levels, keep, null), keep


@outside_autocast
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
        InputError: wrong shape, dtype, device or levels, or a retained code outside ``[0, C)`` (read on the CPU only).
        BackendError: a backend asked for by name that cannot run here or does not take such arguments.
    """
    levels = check.levels_of(levels)
    if not isinstance(codes, Tensor) or codes.dim() < 1 or codes.dtype not in check.INTEGERS:
        check_tensor("codes", codes, ["...", "K"], check.INTEGERS)
    check.check_prefix(keep, null, codes.shape[:-1], codes.shape[-1], len(levels), codes.device)
    check.check_codes(codes, levels, keep)
    name = check.pick(named(backend), codes.device, torch.float32, levels)
    if name == REFERENCE or (backend in (None, AUTO) and gradients.is_transformed()):
        return reference.codes_to_latents(codes, levels, keep, null)
    return gradients.codes_to_latents(codes, levels, keep, null if keep is not None else None, name)


def _odds(weights: Sequence[float] | None, count: int) -> tuple[float, ...] | None:
    """Check the odds of retained lengths one by one."""
    if weights is None:
        return None
    given = check_list("weights", weights, f"{count} odds")
    return tuple(float(check_number("weights", odds, 0, check.MAX_FP32)) for odds in given)
