"""Statistics of an evaluation: intervals, percentiles, shares of the expert."""

from __future__ import annotations

import numpy as np
import pytest

from flexlam_fast.config import BottleneckConfig
from flexlam_fast.errors import InputError
from flexlam_fast.evaluate.summary import Score, disjoint_above, latency, normalised, percent_of_expert, score, student


@pytest.mark.parametrize(
    ("freedom", "quantile"),
    [
        *((1, 12.706205), (2, 4.302653), (5, 2.570582), (10, 2.228139), (11, 2.200985)),
        *((15, 2.131450), (20, 2.085963), (30, 2.042272), (49, 2.009575), (99, 1.984217), (10**7, 1.959964)),
    ],
)
def test_student_is_the_printed_table(freedom: int, quantile: float) -> None:
    assert student(freedom) == pytest.approx(quantile, abs=1e-5)


def test_interval_of_a_known_sample() -> None:
    result = score([2, 4, 4, 4, 5, 5, 7, 9])
    # s = sqrt(32 / 7) = 2.13809, t(7) = 2.36462, half width = t * s / sqrt(8)
    assert result.mean == 5
    assert result.ci95 == pytest.approx(1.78749, abs=1e-4)


def test_interval_covers_the_mean_19_times_in_20() -> None:
    samples = np.random.default_rng(1).normal(3.0, 2.0, (4000, 12))
    hits = sum(abs(s.mean - 3.0) <= s.ci95 for s in (score(row.tolist()) for row in samples))
    assert 0.94 < hits / len(samples) < 0.96


def test_statistics_refuse_too_little() -> None:
    with pytest.raises(InputError, match="values: expected at least 2, got 1"):
        score([1.0])
    with pytest.raises(InputError, match="expected at least one decision"):
        latency([])
    with pytest.raises(InputError, match="freedom: expected at least 1, got 0"):
        student(0)


def test_latency_percentiles() -> None:
    result = latency([float(n) for n in range(1, 102)])
    assert (result.mean, result.p50, result.decisions) == (51.0, 51.0, 101)
    assert result.p99 == pytest.approx(100.0)


def test_shares_of_the_expert() -> None:
    assert normalised(1.0, -1.0, 3.0) == 0.5
    assert percent_of_expert(1.0, 4.0) == 25.0
    assert normalised(1.0, 2.0, 2.0) is None
    assert percent_of_expert(1.0, -4.0) is None
    assert disjoint_above(Score(2, 0.4, ()), Score(1, 0.5, ()))
    assert not disjoint_above(Score(2, 0.6, ()), Score(1, 0.5, ()))


def test_default_budgets() -> None:
    assert BottleneckConfig(slots=16).ladder == (1, 2, 4, 8, 16)
    assert BottleneckConfig(slots=20).ladder == (1, 2, 4, 8, 16, 20)
    assert BottleneckConfig(slots=1).ladder == (1,)
