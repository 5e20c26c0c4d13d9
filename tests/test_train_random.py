"""One integer for each sample in one go: what it depends on, that it is the generator it says, and that it is even."""

from __future__ import annotations

import numpy as np
import pytest

from flexlam_fast.errors import InputError
from flexlam_fast.train.random import picks


def test_a_pick_depends_on_nothing_but_its_sample() -> None:
    whole = picks(1000, 3, "lam", 17, np.arange(500))
    assert (whole.dtype, whole.shape) == (np.int64, (500,))
    some = np.array([[499, 7], [7, 0]])
    np.testing.assert_array_equal(picks(1000, 3, "lam", 17, some), whole[some])
    np.testing.assert_array_equal(picks(1000, 3, "lam", 17, [4]), whole[4:5])
    assert picks(1000, 3, "lam", 17, []).shape == (0,)
    for other in ((4, "lam", 17), (3, "lam-test", 17), (3, "lam", 18), (3, "lam", 17 + (1 << 32))):
        assert (picks(1000, *other, np.arange(500)) == whole).mean() < 0.02
    assert (picks(1000, 3, "lam", 17, np.arange(500) + (1 << 32)) == whole).mean() < 0.02


def test_picks_of_a_run_stay_what_they_were() -> None:
    """A changed number here is another batch for a run that resumes."""
    assert picks(100_000, 0, "lam", 0, [0, 1, 2]).tolist() == [90606, 24240, 69987]


@pytest.mark.parametrize("count", [1, 2, 7, 64])
def test_every_integer_is_as_likely_as_the_next(count: int) -> None:
    n = 100_000
    found = np.concatenate([picks(count, 5, "lam", step, np.arange(1000)) for step in range(n // 1000)])
    counts = np.bincount(found, minlength=count)
    assert counts.size == count
    chi = float(((counts - n / count) ** 2 / (n / count)).sum())
    assert chi < (count - 1) + 4 * np.sqrt(2 * (count - 1)) + 8


def test_neighbours_are_not_correlated_and_large_pools_are_reached_to_their_ends() -> None:
    x = np.stack([picks(1 << 32, 5, "lam", step, np.arange(2000)) for step in range(50)]) / 2**32 - 0.5
    for a, b in ((x[:, 1:], x[:, :-1]), (x[1:], x[:-1])):
        assert abs((a * b).mean()) < 4 / 12 / np.sqrt(a.size)
    assert x.min() < -0.4999
    assert x.max() > 0.4999


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        ((0, 0, "lam", 0, [0]), r"^count: expected an integer in 1\.\.2\^32, got 0$"),
        (((1 << 32) + 1, 0, "lam", 0, [0]), r"^count: expected an integer in 1\.\.2\^32, got 4294967297$"),
        ((5, 0, "lam", -1, [0]), r"^samples: expected integers from 0 on at a step from 0 on, got \[0\] at -1$"),
        ((5, 0, "lam", 0, [-1]), r"^samples: expected integers from 0 on at a step from 0 on, got \[-1\] at 0$"),
        ((5, 0, "lam", 0, [0.5]), r"^samples: expected integers from 0 on at a step from 0 on, got \[0\.5\] at 0$"),
    ],
)
def test_one_sentence_says_what_is_wrong(args: tuple[object, ...], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        picks(*args)  # type: ignore[arg-type]
