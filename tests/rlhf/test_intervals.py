"""Intervals, wins, the bound of best-of-n, repetition and calibration."""

import math

import numpy as np
import pytest

from jaxgpt.errors import UserError
from jaxgpt.rlhf.intervals import (
    best_of_n_kl_bound,
    calibration,
    distinct_2,
    in_words,
    interval,
    proportion,
    wins,
)


def test_intervals_cover_the_truth_as_often_as_they_say():
    rng = np.random.default_rng(0)
    intervals = [interval(rng.normal(3.0, 2.0, 100)) for _ in range(1000)]
    assert np.mean([i.low <= 3.0 <= i.high for i in intervals]) == pytest.approx(0.95, abs=0.025)
    with pytest.raises(UserError, match="at least 2"):
        interval([1.0])


def test_wins_count_ties_as_half():
    np.testing.assert_array_equal(wins(np.array([1.0, 0.0, 2.0]), np.array([0.0, 0.0, 3.0])), [1, 0.5, 0])


def test_the_bound_of_best_of_n():
    assert best_of_n_kl_bound(1) == 0.0
    assert best_of_n_kl_bound(4) == pytest.approx(np.log(4) - 0.75)


def test_distinct_2_falls_with_repetition():
    assert distinct_2(["a b c", "d e"]) == 1.0
    assert distinct_2(["a b a b", "a b"]) == pytest.approx(2 / 4)
    assert distinct_2([""]) == 0.0


def test_calibration_by_hand():
    table, error = calibration(np.array([0.05, 0.05, 0.95, 1.0]), np.array([0, 1, 1, 1]))
    assert [row["count"] for row in table] == [2, 2]
    assert error == pytest.approx((2 * 0.45 + 2 * 0.025) / 4)


def test_a_proportion_covers_the_truth_for_few_trials_too():
    """Wilson's interval by hand, and its coverage, counted exactly over all outcomes of ten trials."""
    found = proportion(7, 10)
    np.testing.assert_allclose((found.mean, found.low, found.high), (0.7, 0.3968, 0.8922), atol=1e-4)
    for p in (0.1, 0.3, 0.5, 0.8):
        chance = [math.comb(10, k) * p**k * (1 - p) ** (10 - k) for k in range(11)]
        covered = sum(c for k, c in enumerate(chance) if proportion(k, 10).low <= p <= proportion(k, 10).high)
        assert covered > 0.9
    assert proportion(0, 3).low == 0.0 and proportion(3, 3).high == 1.0
    for hits, count in ((0, 0), (4, 3), (-1, 3)):
        with pytest.raises(UserError, match="no proportion"):
            proportion(hits, count)


@pytest.mark.parametrize(
    ("hits", "words"), [(7, "too few to be sure"), (10, "more often than chance"), (0, "less often than chance")]
)
def test_a_comparison_in_words_claims_no_more_than_its_interval(hits, words):
    assert in_words("you preferred it", hits, 10).startswith(f"you preferred it in {hits} of 10: {words} (95 %")
