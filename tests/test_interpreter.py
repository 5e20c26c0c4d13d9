"""The product of the tests' interpreter: right, and with sums that depend on nothing but the row and the column."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

interpreter = pytest.importorskip("interpreter", reason="Triton is not installed")
triton = pytest.importorskip("triton")
tl = triton.language


@given(st.integers(1, 20), st.integers(1, 33), st.integers(1, 9))
def test_a_product_is_exact_where_it_can_be_and_rows_are_alone(rows: int, inner: int, columns: int) -> None:
    rng = np.random.default_rng(rows * 1000 + inner * 10 + columns)
    a, b = rng.integers(-9, 9, (rows, inner)), rng.integers(-9, 9, (inner, columns))
    assert np.array_equal(interpreter.product(a, b, np.float32), (a @ b).astype(np.float32))
    x, y = (rng.standard_normal(t.shape).astype(np.float32) for t in (a, b))
    whole = interpreter.product(x, y, np.float32)
    np.testing.assert_allclose(whole, x.astype(np.float64) @ y, rtol=1e-4, atol=1e-5)
    for i in range(rows):
        assert np.array_equal(interpreter.product(x[i : i + 1], y, np.float32)[0], whole[i])
    for j in range(columns):
        assert np.array_equal(interpreter.product(x, y[:, j : j + 1], np.float32)[:, 0], whole[:, j])


def test_batches_are_products_one_by_one() -> None:
    x, y = (np.random.default_rng(0).standard_normal(s).astype(np.float32) for s in ((3, 4, 16), (3, 16, 5)))
    both = interpreter.product(x, y, np.float32)
    assert all(np.array_equal(both[i], interpreter.product(x[i], y[i], np.float32)) for i in range(3))


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled where there is a GPU")
@pytest.mark.filterwarnings("error::DeprecationWarning")
def test_a_number_that_was_loaded_ends_a_range() -> None:
    """What numpy 2.5 refuses, numpy 2.4 warns of."""

    @triton.jit
    def count_kernel(end_ptr, out_ptr):  # type: ignore[no-untyped-def]
        total = 0
        for i in range(tl.load(end_ptr)):
            total += i
        tl.store(out_ptr, total)

    out = torch.zeros(1, dtype=torch.int32)
    count_kernel[(1,)](torch.tensor([5], dtype=torch.int32), out)
    assert int(out) == 10
