"""Triton's interpreter with a product whose sums have one order on every machine.

The interpreter multiplies by numpy, whose BLAS adds in an order that depends on the processor and the number of rows.
No test is to depend on that: here a product is a binary tree over ``K``, whatever ``M`` and ``N`` are.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def product(a: np.ndarray, b: np.ndarray, dtype: Any) -> np.ndarray:
    """``a [..., M, K] @ b [..., K, N]`` in ``dtype``: halves of ``K`` are added until one is left.

    Products and sums are fp64 and rounded once: no processor's order of fp32 sums is taken for the kernel's.
    """
    wide = np.promote_types(dtype, np.float64) if np.issubdtype(dtype, np.floating) else dtype
    terms = a.astype(wide)[..., :, :, None] * b.astype(wide)[..., None, :, :]
    while (count := terms.shape[-2]) > 1:
        half = count // 2
        rest = terms[..., 2 * half :, :]
        terms = terms[..., :half, :] + terms[..., half : 2 * half, :]
        if rest.shape[-2]:
            terms = np.concatenate([terms, rest], axis=-2)
    return terms[..., 0, :].astype(dtype)


def _create_dot(self: Any, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> TensorHandle:
    # kernels widen what they multiply in the interpreter, so there is no 8-bit case to convert
    return TensorHandle(product(a.data, b.data, d.data.dtype) + d.data, d.dtype.scalar)


def fix_order_of_products() -> None:
    """Have every interpreted ``tl.dot`` of this process add in that order."""
    InterpreterBuilder.create_dot = _create_dot
