"""The one error budget: how far from the exact result a computation in low precision may be (design section 7).

A fixed tolerance is too tight for long sums and too loose for short ones. So the plain PyTorch computation in the
same dtype sets the measure: a faster path may be at most ``factor`` times as wrong as that.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

FORWARD_FACTOR = 2.0
GRADIENT_FACTOR = 3.0


class ErrorReport(NamedTuple):
    """Errors against the fp64 reference and what they may be, in the units of the result."""

    max_error: float
    max_budget: float
    rms_error: float
    rms_budget: float


def assert_within_budget(
    actual: Tensor,
    fn: Callable[..., Tensor],
    *args: Any,
    working_dtype: torch.dtype,
    factor: float = FORWARD_FACTOR,
    name: str = "result",
) -> ErrorReport:
    """Assert that ``actual`` is at most ``factor`` times as far from the exact result as plain PyTorch is.

    The floating tensors in ``args`` are rounded to ``working_dtype`` once; ``fn`` then runs on them in that dtype
    (the measure) and in fp64 (the exact result). Both the largest and the root-mean-square error must fit. A measure
    that happens to be exact, as it may for a few values, leaves what rounding costs: one unit in the last place of the
    largest value, and of the rms.

    Args:
        actual: what the code under test returned for the same, rounded arguments; any floating dtype.
        fn: the plain PyTorch computation; called with ``args`` only, so weights are arguments too.
        args: tensors, or tuples, lists and dicts of them; anything else is handed through.
        working_dtype: the dtype in which the code under test works.
        factor: 2 for values, 3 for gradients.
        name: what to call the result when it fails.

    Returns:
        The measured errors and their budgets.

    Raises:
        AssertionError: wrong shape, a value that is not finite where the exact one is, or an error over budget.
    """
    rounded = _cast(args, working_dtype)
    exact = fn(*_cast(rounded, torch.float64)).detach()
    plain = fn(*rounded).detach()
    if exact.dtype != torch.float64 or plain.dtype != working_dtype:
        raise AssertionError(f"{name}: expected fn to keep its arguments' dtype, got {exact.dtype} and {plain.dtype}")
    if actual.shape != exact.shape:
        raise AssertionError(f"{name}: expected shape {tuple(exact.shape)}, got {tuple(actual.shape)}")
    if exact.numel() == 0:
        return ErrorReport(0.0, 0.0, 0.0, 0.0)
    got = _finite_like(exact, actual.detach().to(exact.device, torch.float64), name)
    measure = _finite_like(exact, plain.to(torch.float64), f"{name} by plain PyTorch")
    value = exact[torch.isfinite(exact)]
    report = ErrorReport(
        max_error=_largest(got - value),
        max_budget=max(factor * _largest(measure - value), _ulp(_largest(value), working_dtype)),
        rms_error=_rms(got - value),
        rms_budget=max(factor * _rms(measure - value), _ulp(_rms(value), working_dtype)),
    )
    if report.max_error > report.max_budget or report.rms_error > report.rms_budget:
        raise AssertionError(
            f"{name}: expected errors of at most {report.max_budget:.3g} (largest) and {report.rms_budget:.3g} (rms), "
            f"{factor:g}x those of plain PyTorch in {working_dtype}, got {report.max_error:.3g} and "
            f"{report.rms_error:.3g}"
        )
    return report


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor):
        return value.detach().to(dtype) if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: _cast(part, dtype) for key, part in value.items()}
    if isinstance(value, (tuple, list)):
        parts = [_cast(part, dtype) for part in value]
        return parts if isinstance(value, list) else tuple(parts)
    return value


def _finite_like(exact: Tensor, value: Tensor, name: str) -> Tensor:
    """Return the values at the finite places of ``exact``, once both agree on where those are."""
    finite = torch.isfinite(exact)
    same = torch.equal(torch.isfinite(value), finite)
    if not same or not torch.allclose(value[~finite], exact[~finite], equal_nan=True):
        bad = int((~torch.isfinite(value) & finite).sum())
        raise AssertionError(f"{name}: expected NaN and infinity only where the exact result has them, got {bad} more")
    return value[finite]


def _largest(value: Tensor) -> float:
    return float(value.abs().max()) if value.numel() else 0.0


def _ulp(value: float, dtype: torch.dtype) -> float:
    """Return the gap between ``value`` and the next number of ``dtype``; 0 for 0."""
    return torch.finfo(dtype).eps * 2.0 ** (math.frexp(value)[1] - 1) if value else 0.0


def _rms(value: Tensor) -> float:
    return float(value.square().mean().sqrt()) if value.numel() else 0.0
