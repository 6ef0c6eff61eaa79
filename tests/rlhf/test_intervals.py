"""Intervals, wins, the bound of best-of-n, repetition and calibration."""

import math

import numpy as np
import pytest

from jaxgpt.errors import UserError
from jaxgpt.rlhf.intervals import (
    best_of_n_kl_bound,
    calibration,
    calibration_by_chance,
    distinct_2,
    in_percent,
    in_words,
    interval,
    proportion,
    share,
    summarise_seeds,
    wins,
)


def test_intervals_cover_the_truth_as_often_as_they_say():
    rng = np.random.default_rng(0)
    intervals = [interval(rng.normal(3.0, 2.0, 100)) for _ in range(1000)]
    assert np.mean([i.low <= 3.0 <= i.high for i in intervals]) == pytest.approx(0.95, abs=0.025)
    with pytest.raises(UserError, match="at least 2"):
        interval([1.0])


@pytest.mark.parametrize("seeds", [5, 8])
def test_an_interval_over_paired_seeds_covers_the_difference_as_often_as_it_says(seeds):
    """Two settings whose seeds differ in what they do, on shared prompts that differ more: 95 % of t-intervals hold the
    true difference; a percentile bootstrap over 5 seeds holds it in less than 90 %."""
    rng = np.random.default_rng(seeds)
    a, b = rng.normal([[[0.3]], [[0.0]]], 0.2, (2000, 2, seeds, 1)).swapaxes(0, 1)  # [repetition, seed, 1]
    both = 2 * rng.normal(size=(2000, 1, 40)) + rng.normal(size=(2000, seeds, 1))  # of prompts and paired seeds
    found = [summarise_seeds(x) for x in (a + both) - (b + both)]
    assert 0.93 <= np.mean([one.low <= 0.3 <= one.high for one in found]) <= 0.97
    assert {one.spread for one in found} == {"95 % t-interval over seeds"}


def test_below_5_seeds_their_points_and_range_are_shown_beside_an_interval_over_prompts():
    """The interval covers other prompts answered by these very runs, and is named so; it does not cover other seeds."""
    rng = np.random.default_rng(0)
    seed_S, noise = rng.normal(size=(2000, 3, 1)), rng.normal(size=(2000, 3, 60)) + rng.normal(size=(2000, 1, 60))
    found = [summarise_seeds(x) for x in seed_S + noise]
    hits = [one.prompts.low <= mean <= one.prompts.high for one, mean in zip(found, seed_S.mean((1, 2)), strict=True)]
    assert 0.93 <= np.mean(hits) <= 0.97
    assert all((one.low, one.high) == (min(one.seeds), max(one.seeds)) for one in found)
    assert found[0].spread == "range of seeds"
    three = summarise_seeds(np.array([[1.0, 1.5], [2.0, 2.5], [3.0, 3.5]]))
    assert three.text(2) == "2.25 (1.25, 2.25, 3.25) [1.76, 2.74]"
    assert summarise_seeds(np.array([1.0, 3.0])).text(1) == "2.0 (1.0, 3.0)"
    alone = summarise_seeds(np.array([[1.0, 1.5]]))
    assert alone.spread == "95 % interval over prompts" and (alone.low, alone.text(2)) == (
        alone.prompts.low,
        "1.25 [0.76, 1.74]",
    )
    assert summarise_seeds(np.array([1.0, 2.0, 3.0, 4.0, 5.0])).text(2) == "3.00 [1.04, 4.96]"


def test_an_interval_counts_prompts_not_rows():
    """Rows of one prompt that all agree are one observation: the interval is that of one row per prompt."""
    rng = np.random.default_rng(0)
    hits, nats = rng.integers(0, 2, 40).astype(float), rng.normal(size=40)
    thrice = np.repeat(np.arange(40), 3).tolist()
    for f, x in ((share, hits), (interval, nats)):
        one, rows, clustered = f(x), f(np.repeat(x, 3)), f(np.repeat(x, 3), thrice)
        np.testing.assert_allclose((clustered.mean, clustered.low, clustered.high), (one.mean, one.low, one.high))
        assert rows.high - rows.low < 0.65 * (one.high - one.low)
    with pytest.raises(UserError, match="at least 2"):
        interval([1.0, 2.0, 3.0], ["p"] * 3)


def test_a_share_covers_the_truth_whether_or_not_a_prompt_s_rows_agree():
    """40 prompts with 1 to 4 rows each; all of a prompt's rows agree, or none depends on another. Where all rows are
    hits, the interval is Wilson's for the number of prompts."""
    rng = np.random.default_rng(1)
    prompts = np.repeat(np.arange(40), 1 + np.arange(40) % 4)
    for p in (0.3, 0.9):
        for agree in (True, False):
            drawn = rng.random((300, 40))[:, prompts] if agree else rng.random((300, len(prompts)))
            found = [share(hits, prompts.tolist()) for hits in drawn < p]
            assert np.mean([one.low <= p <= one.high for one in found]) > 0.91
    assert share([1.0] * 6, "aabbcc") == proportion(3, 3) and share([1.0]) == proportion(1, 1)


def test_a_share_of_few_rows_says_that_they_are_too_few():
    few, many = share([1.0]), share([1.0, 0.0] * 200)
    assert in_percent(few, 1) == "100.0% of 1 (95 % interval 20.7% to 100.0%: too few to say)"
    assert in_percent(many, 400) == "50.0% of 400 (95 % interval 45.1% to 54.9%)"


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


def test_calibrated_predictions_have_a_larger_error_than_by_chance_in_5_percent():
    """Answers to one prompt that go together are one choice, which leaves more to chance."""
    rng = np.random.default_rng(0)
    p = rng.dirichlet(np.ones(3), 60)
    p[:20, 2], p[:20] = 0.0, p[:20] / p[:20].sum(1, keepdims=True)
    p /= p.sum(1, keepdims=True)
    limit = calibration_by_chance(p)

    def error() -> float:
        chosen = np.arange(3) == (rng.random((60, 1)) > p.cumsum(1)[:, :-1]).sum(1)[:, None]
        return calibration(p[p > 0], chosen[p > 0])[1]

    assert 0.02 <= np.mean([error() > limit for _ in range(200)]) <= 0.1
    twice = np.repeat(p, 2, 0)
    assert calibration_by_chance(twice) < 0.8 * calibration_by_chance(twice, np.repeat(np.arange(60), 2).tolist())


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
    ("hits", "words"), [(7, "too few to say"), (10, "more often than chance"), (0, "less often than chance")]
)
def test_a_comparison_in_words_claims_no_more_than_its_interval(hits, words):
    assert in_words("you preferred it", hits, 10).startswith(f"you preferred it in {hits} of 10: {words} (95 %")
