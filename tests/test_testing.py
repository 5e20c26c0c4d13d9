"""The error budget lets through what plain PyTorch would do, and nothing worse."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flexlam_fast.testing import GRADIENT_FACTOR, assert_within_budget

BF16 = torch.bfloat16


def matmul(a: Tensor, b: Tensor) -> Tensor:
    return a @ b


def pair() -> tuple[Tensor, Tensor]:
    return torch.randn(64, 256), torch.randn(256, 32)


def exact_and_plain_error(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    exact = a.double() @ b.double()
    return exact, (a @ b).double() - exact


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_plain_pytorch_and_anything_better_pass(dtype: torch.dtype) -> None:
    a, b = pair()
    report = assert_within_budget(a.to(dtype) @ b.to(dtype), matmul, a, b, working_dtype=dtype)
    assert 0 < report.max_error <= report.max_budget
    assert 0 < report.rms_error <= report.rms_budget
    better = a.to(dtype).double() @ b.to(dtype).double()
    assert assert_within_budget(better, matmul, a, b, working_dtype=dtype).max_error == 0


def test_one_wrong_element_fails_by_the_largest_error() -> None:
    a, b = pair()
    wrong, plain = exact_and_plain_error(a, b)
    wrong[3, 4] += 2.1 * plain.abs().max()  # next to nothing in the rms of 2,048 elements
    with pytest.raises(AssertionError, match="scores: expected errors of at most"):
        assert_within_budget(wrong, matmul, a, b, working_dtype=torch.float32, name="scores")


def test_many_small_errors_fail_by_the_rms() -> None:
    a, b = pair()
    exact, plain = exact_and_plain_error(a, b)
    shifted = exact + 0.9 * plain.abs().max()
    with pytest.raises(AssertionError, match="rms"):
        assert_within_budget(shifted, matmul, a, b, working_dtype=torch.float32)


def test_rounding_the_inputs_further_fails() -> None:
    a, b = pair()
    with pytest.raises(AssertionError, match="expected errors"):
        assert_within_budget((a.bfloat16() @ b.bfloat16()).float(), matmul, a, b, working_dtype=torch.float32)


def test_the_factor_is_the_border() -> None:
    a, b = pair()
    exact, plain = exact_and_plain_error(a, b)
    report = assert_within_budget(exact + 1.99 * plain, matmul, a, b, working_dtype=torch.float32)
    assert report.max_budget == pytest.approx(2 * float(plain.abs().max()))
    with pytest.raises(AssertionError, match="2x those"):
        assert_within_budget(exact + 2.01 * plain, matmul, a, b, working_dtype=torch.float32)
    assert_within_budget(exact + 2.99 * plain, matmul, a, b, working_dtype=torch.float32, factor=GRADIENT_FACTOR)


def test_an_exact_measure_still_allows_one_unit_in_the_last_place() -> None:
    x = torch.tensor([1.0, -1.0, 1.0, 1.0])
    assert_within_budget(x * (1 + 2**-23), lambda x: x * 1, x, working_dtype=torch.float32)
    with pytest.raises(AssertionError, match="expected errors"):
        assert_within_budget(x * (1 + 2**-22), lambda x: x * 1, x, working_dtype=torch.float32)
    with pytest.raises(AssertionError, match="expected errors"):
        assert_within_budget(torch.full((4,), 1e-30), lambda x: x * 0, x, working_dtype=torch.float32)


def test_nan_and_infinity_fail_unless_the_exact_result_has_them() -> None:
    x = torch.tensor([0.0, 1.0, 4.0])
    for bad in (float("nan"), float("inf")):
        with pytest.raises(AssertionError, match="got 1 more"):
            assert_within_budget(torch.tensor([0.0, bad, 2.0]), torch.sqrt, x, working_dtype=torch.float32)
    assert_within_budget(x.log(), torch.log, x, working_dtype=torch.float32)
    with pytest.raises(AssertionError, match="only where"):
        assert_within_budget(-x.log().abs().neg(), torch.log, x, working_dtype=torch.float32)
    with pytest.raises(AssertionError, match="by plain PyTorch"):
        assert_within_budget(torch.tensor([9e4]), lambda x: x * x, torch.tensor([300.0]), working_dtype=torch.float16)


def test_shape_and_dtype_of_the_measure_are_checked() -> None:
    x = torch.ones(3)
    with pytest.raises(AssertionError, match=r"expected shape \(3,\), got \(1,\)"):
        assert_within_budget(x[:1], lambda x: x + 1, x, working_dtype=torch.float32)
    with pytest.raises(AssertionError, match="keep its arguments' dtype"):
        assert_within_budget(x, lambda x: x.float(), x, working_dtype=torch.float32)
    assert_within_budget(x[:0], lambda x: x[:0], x, working_dtype=torch.float32)


def test_weights_in_containers_and_whole_numbers_are_handed_over() -> None:
    table, rows = torch.randn(5, 4), torch.tensor([1, 3])

    def lookup(weights: dict[str, Tensor], pick: list[Tensor], scale: float) -> Tensor:
        return weights["table"][pick[0]] * scale

    actual = table.bfloat16()[rows] * 3.0
    assert_within_budget(actual, lookup, {"table": table}, [rows], 3.0, working_dtype=BF16)
