"""Root-mean-square norm with its gradient, for training the sequence model (paper B.4, design section 2)."""

from __future__ import annotations

import torch
from torch import Tensor

from flexlam_fast.ambient import outside_autocast
from flexlam_fast.backend import REFERENCE
from flexlam_fast.ops import row_norm
from flexlam_fast.ops.arguments import check_eps
from flexlam_fast.ops.rows import check_dtype, check_like, check_rows, pick_for


@outside_autocast
def rms_norm(
    x: Tensor, weight: Tensor, eps: float, *, dtype: torch.dtype | None = None, backend: str | None = None
) -> Tensor:
    """Return ``weight * (x / sqrt(mean(x^2) + eps))`` over the last dimension, with the module's rounding.

    The norm is fp32 inside and rounded to ``x``'s dtype before its weight, as the module's; the product is fp32 and
    rounded once, to ``dtype``. The weight's gradient is summed in fp32 and a fixed order. Differentiable once.

    Args:
        x: ``[..., W]`` floating.
        weight: ``[W]`` floating.
        eps: added to the mean square.
        dtype: of the result; None is the product's, which is ``x``'s where the two have one dtype.
        backend: ``"reference"``, ``"triton"`` or, on a CPU, ``"native"``; None or ``"auto"`` takes Triton on CUDA, for
            widths up to 8,192, and C++ on a CPU.

    Returns:
        ``[..., W]`` in ``dtype``, with gradients for ``x`` and ``weight`` in their dtypes.

    Raises:
        InputError: wrong shape, dtype or device.
        BackendError: a backend asked for by name that cannot run here or does not take such arguments.
    """
    check_rows("x", x)
    check_like("weight", weight, x.shape[-1:], x.device)
    check_dtype(dtype)
    eps = check_eps(eps)
    out_dtype = dtype or torch.promote_types(x.dtype, weight.dtype)
    name = pick_for(backend, x, weight, out_dtype, most=x.shape[-1])
    if name == REFERENCE:
        return row_norm.reference(x, weight, None, eps, False, False, out_dtype)
    out: Tensor = row_norm.run(x, weight, None, eps, False, False, out_dtype, name)[0]
    return out
