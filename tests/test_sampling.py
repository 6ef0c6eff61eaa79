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
