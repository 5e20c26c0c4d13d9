"""Many numbers in few: a mean with its 95% confidence interval, and latency percentiles."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from flexlam_fast.errors import InputError

#: 97.5% quantile of the standard normal, and of Student's t for 1 to 10 degrees of freedom.
_NORMAL = 1.959963984540054
_STUDENT = (12.706205, 4.302653, 3.182446, 2.776445, 2.570582, 2.446912, 2.364624, 2.306004, 2.262157, 2.228139)


class Score(NamedTuple):
    """Mean of ``values``, half the width of its 95% confidence interval, and the values themselves."""

    mean: float
    ci95: float
    values: tuple[float, ...]


class Latency(NamedTuple):
    """Milliseconds per decision: mean, median, 99th percentile, over ``decisions`` of them."""

    mean: float
    p50: float
    p99: float
    decisions: int


def student(freedom: int) -> float:
    """The 97.5% quantile of Student's t distribution, within 1e-4.

    From a table up to 10 degrees of freedom, from there on by its expansion around the normal quantile
    (Abramowitz and Stegun 26.7.5).

    Raises:
        InputError: below one degree of freedom.
    """
    if freedom < 1:
        raise InputError(f"freedom: expected at least 1, got {freedom}")
    if freedom <= len(_STUDENT):
        return _STUDENT[freedom - 1]
    z = _NORMAL
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / freedom ** (i + 1) for i, term in enumerate(terms))


def score(values: Sequence[float]) -> Score:
    """Mean and 95% confidence interval by Student's t, of independent values such as the returns of episodes.

    Raises:
        InputError: for fewer than two values.
    """
    n = len(values)
    if n < 2:
        raise InputError(f"values: expected at least 2, got {n}")
    mean = math.fsum(values) / n
    variance = math.fsum((v - mean) ** 2 for v in values) / (n - 1)
    return Score(mean, student(n - 1) * math.sqrt(variance / n), tuple(float(v) for v in values))


def fixed(value: Score, digits: int) -> str:
    """Write a mean and its interval with so many digits: ``0.812 ± 0.012``."""
    return f"{value.mean:.{digits}f} ± {value.ci95:.{digits}f}"


def latency(ms: Sequence[float]) -> Latency:
    """Summarise the milliseconds of single decisions.

    Raises:
        InputError: for no decision at all.
    """
    if not ms:
        raise InputError("ms: expected at least one decision, got none")
    p50, p99 = np.percentile(ms, [50, 99])
    return Latency(math.fsum(ms) / len(ms), float(p50), float(p99), len(ms))


def normalised(value: float, random: float, expert: float) -> float | None:
    """``(value - random) / (expert - random)``: 0 plays like random, 1 like the expert; None where those are equal."""
    return (value - random) / (expert - random) if expert != random else None


def percent_of_expert(value: float, expert: float) -> float | None:
    """``100 * value / expert``; None where the expert's return is not positive and a share of it means nothing."""
    return 100 * value / expert if expert > 0 else None


def disjoint_above(upper: Score, lower: Score) -> bool:
    """Whether ``upper`` is the larger mean and the two 95% intervals do not touch."""
    return upper.mean - upper.ci95 > lower.mean + lower.ci95
