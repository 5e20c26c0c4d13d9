"""Triton's interpreter with a product whose sums have one order on every machine, and with any numpy.

The interpreter multiplies by numpy, whose BLAS adds in an order that depends on the processor and the number of rows.
No test is to depend on that: here a product is a binary tree over ``K``, whatever ``M`` and ``N`` are.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from triton.runtime import interpreter
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


def settle() -> None:
    """Have every interpreted ``tl.dot`` of this process add in that order, and every tensor of one number be an index.

    Triton 3.6 makes an index of an array of shape ``(1,)``, which numpy 2.5 refuses: ``range(tensor)`` fails.
    """
    InterpreterBuilder.create_dot = _create_dot
    original = interpreter._patch_lang_tensor

    def patch(tensor: Any, scope: Any) -> None:
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    interpreter._patch_lang_tensor = patch
