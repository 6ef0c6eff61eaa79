"""Filters of logits against exact distributions, and their edges."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt import sampling
from jaxgpt.config import UserError

LOGITS = jnp.log(jnp.array([0.4, 0.3, 0.15, 0.1, 0.05]))


@pytest.mark.parametrize(
    ("filtered", "expected"),
    [
        (sampling.top_k(LOGITS, 1), [1, 0, 0, 0, 0]),
        (sampling.top_k(LOGITS, 2), [4 / 7, 3 / 7, 0, 0, 0]),
        (sampling.top_k(LOGITS, 9), [0.4, 0.3, 0.15, 0.1, 0.05]),
        (sampling.top_p(LOGITS, 1e-6), [1, 0, 0, 0, 0]),
        (sampling.top_p(LOGITS, 0.65), [4 / 7, 3 / 7, 0, 0, 0]),
        (sampling.top_p(LOGITS, 1.0), [0.4, 0.3, 0.15, 0.1, 0.05]),
        (sampling.temperature(LOGITS, 0.5), np.array([16, 9, 2.25, 1, 0.25]) / 28.5),
        (sampling.min_p(LOGITS, 0.3), [0.4 / 0.85, 0.3 / 0.85, 0.15 / 0.85, 0, 0]),
        (sampling.min_p(LOGITS, 1.0), [1, 0, 0, 0, 0]),
        # 0.4 -> 0.4**2 and 0.05 -> 0.05**2: logits below 0 are multiplied
        (
            sampling.repetition_penalty(LOGITS, jnp.array([1, 0, 0, 0, 1], bool), 2.0),
            np.array([0.16, 0.3, 0.15, 0.1, 0.0025]) / 0.7125,
        ),
        (sampling.top_k(jnp.zeros(5).at[4].set(-jnp.inf), 2), [0.25, 0.25, 0.25, 0.25, 0]),
        (sampling.top_p(sampling.top_k(LOGITS / 0.5, 3), 0.8), [0.64, 0.36, 0, 0, 0]),
    ],
)
def test_filters_give_the_exact_distribution(filtered, expected):
    np.testing.assert_allclose(jax.nn.softmax(filtered), expected, atol=1e-6)
    draws = sampling.categorical(jax.random.key(0), jnp.tile(filtered, (8000, 1)))
    counts = np.bincount(np.asarray(draws), minlength=5)
    expected = np.asarray(expected, float)
    assert (counts[expected == 0] == 0).all()
    chi2 = ((counts - 8000 * expected) ** 2 / np.maximum(8000 * expected, 1)).sum()
    assert chi2 < 25


def test_ties_with_the_kth_are_kept():
    kept = sampling.top_k(jnp.array([1.0, 1.0, 1.0, 0.0]), 2) > -1e20
    np.testing.assert_array_equal(kept, [True, True, True, False])


def test_greedy_takes_the_largest(strict):
    assert int(sampling.greedy(jax.random.key(0), LOGITS[None])[0]) == 0


@pytest.mark.parametrize(
    "call",
    [
        lambda: sampling.top_k(LOGITS, 0),
        lambda: sampling.top_p(LOGITS, 0.0),
        lambda: sampling.top_p(LOGITS, 1.5),
        lambda: sampling.temperature(LOGITS, 0.0),
    ],
)
def test_senseless_settings_are_refused(call):
    with pytest.raises(UserError):
        call()


@pytest.mark.parametrize("p", [1e-6, 0.1, 0.5, 0.9, 0.999])
def test_the_nucleus_found_without_a_sort_is_that_of_a_sort(p):
    logits = jax.random.normal(jax.random.key(1), (20, 333)) * 3
    logits = logits.at[0].set(jnp.round(logits[0]))  # ties
    kept = np.asarray(sampling.top_p(logits, p) > -1e20)
    for row, found in zip(np.asarray(logits, np.float64), kept, strict=True):
        order = np.argsort(-row, kind="stable")
        probability = np.exp(row - row.max()) / np.exp(row - row.max()).sum()
        before = np.cumsum(probability[order]) - probability[order]
        unsure = np.abs(before - p) < 1e-6  # float32 may take the token that just reaches p, or not
        for wanted in (row >= row[order][(before < p) & ~unsure].min(), row >= row[order][(before < p) | unsure].min()):
            if (found == wanted).all():
                break
        else:
            raise AssertionError((found, wanted))


def test_min_p_by_hand():
    kept = sampling.min_p(LOGITS, 0.3) > -1e20  # 0.3 * 0.4 = 0.12
    np.testing.assert_array_equal(kept, [True, True, True, False, False])
    np.testing.assert_array_equal(sampling.min_p(LOGITS, 0.0), LOGITS)
    np.testing.assert_array_equal(sampling.min_p(LOGITS, 1.0) > -1e20, [True, False, False, False, False])


def test_a_repetition_penalty_lowers_what_was_seen():
    logits, seen = jnp.array([2.0, -2.0, 2.0, -2.0]), jnp.array([True, True, False, False])
    np.testing.assert_allclose(sampling.repetition_penalty(logits, seen, 2.0), [1.0, -4.0, 2.0, -2.0])
    np.testing.assert_array_equal(sampling.repetition_penalty(logits, seen, 1.0), logits)
    with pytest.raises(UserError, match="repetition penalty 0"):
        sampling.repetition_penalty(logits, seen, 0.0)


def test_filters_compose_and_never_leave_nothing():
    logits = jax.random.normal(jax.random.key(2), (50, 100)) * 5
    kept = sampling.top_p(sampling.top_k(sampling.min_p(logits, 0.9), 5), 0.01) > -1e20
    assert (kept.sum(axis=1) >= 1).all()
    np.testing.assert_array_equal(kept.argmax(axis=1), logits.argmax(axis=1))


def test_impossible_tokens_are_never_drawn_and_a_row_of_them_gives_the_first():
    logits = jnp.full((500, 40), -jnp.inf).at[:, jnp.array([3, 39])].set(0.0)
    draws = set(np.asarray(sampling.categorical(jax.random.key(0), logits)).tolist())
    assert draws == {3, 39}
    assert int(sampling.categorical(jax.random.key(0), jnp.full((1, 40), -jnp.inf))[0]) == 0
    assert int(sampling.greedy(jax.random.key(0), jnp.full((1, 40), -jnp.inf))[0]) == 0
