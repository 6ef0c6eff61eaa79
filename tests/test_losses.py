"""Losses against values computed by hand and float64 references."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt import losses
from jaxgpt.losses import Mean, reduce


def test_reduce_counts_the_mask_and_gives_zero_for_an_empty_one(strict):
    values = jnp.array([1.0, jnp.nan, 3.0])
    assert float(reduce(values, jnp.array([True, False, True])).value) == 2.0
    assert float(reduce(values, jnp.zeros(3, bool)).value) == 0.0
    slope = jax.grad(lambda x: reduce(x, jnp.zeros(3, bool)).value)(jnp.ones(3))
    np.testing.assert_array_equal(slope, 0.0)


def test_means_pool_to_the_mean_of_the_whole():
    x, mask = jnp.arange(10.0), jnp.arange(10) % 3 != 0
    parts = [reduce(x[i : i + 2], mask[i : i + 2]) for i in range(0, 10, 2)]
    pooled = parts[0] + parts[1] + parts[2] + parts[3] + parts[4]
    assert isinstance(pooled, Mean)
    assert float(pooled.value) == pytest.approx(float(x[mask].mean()))


def test_log_prob_and_entropy_by_hand():
    logits = jnp.log(jnp.array([[0.5, 0.25, 0.25]])) + 7.0
    assert float(losses.log_prob(logits, jnp.array([1]))[0]) == pytest.approx(np.log(0.25), rel=1e-6)
    assert float(losses.entropy(logits)[0]) == pytest.approx(1.5 * np.log(2), rel=1e-6)


def test_log_prob_gradient_is_one_hot_minus_softmax():
    logits = jax.random.normal(jax.random.key(0), (5, 7))
    tokens = jnp.array([0, 3, 6, 2, 2])
    slope = jax.grad(lambda x: losses.log_prob(x, tokens).sum())(logits)
    np.testing.assert_allclose(slope, jax.nn.one_hot(tokens, 7) - jax.nn.softmax(logits), atol=1e-6)


def test_log_prob_has_the_same_bits_with_and_without_a_gradient():
    logits = 5 * jax.random.normal(jax.random.key(0), (4, 50, 300))
    tokens = jax.random.randint(jax.random.key(1), (4, 50), 0, 300)
    plain = jax.jit(losses.log_prob)(logits, tokens)
    _, differentiated = jax.jit(jax.grad(lambda x: (lambda y: (y.sum(), y))(losses.log_prob(x, tokens)), has_aux=True))(
        logits
    )
    np.testing.assert_array_equal(plain, differentiated)


def test_preference_nll_is_the_softmax_of_the_notes():
    scores = np.array([[0.3, -1.2, 2.0], [1.0, 1.0, 1.0]])
    expected = -np.log(np.exp([scores[0, 2], scores[1, 0]]) / np.exp(scores).sum(1))
    found = losses.preference_nll(jnp.asarray(scores, jnp.float32), jnp.array([2, 0]))
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_two_answers_are_bradley_terry_and_missing_ones_do_not_count():
    scores = jnp.array([[0.7, -0.4]])
    assert float(losses.preference_nll(scores, jnp.array([0]))[0]) == pytest.approx(np.log1p(np.exp(-1.1)), rel=1e-6)
    ragged = losses.preference_nll(jnp.array([[0.7, -0.4, 50.0]]), jnp.array([0]), jnp.array([[True, True, False]]))
    np.testing.assert_allclose(ragged, losses.preference_nll(scores, jnp.array([0])), rtol=1e-6)


def test_preference_nll_refuses_whole_number_scores():
    with pytest.raises(TypeError, match=r"`scores` is int32\[2, 3\]; expected float \[B, C\]"):
        losses.preference_nll(jnp.ones((2, 3), jnp.int32), jnp.array([0, 1]))


@pytest.mark.parametrize("candidates", [2, 4, 7])
def test_dpo_starts_at_log_b(candidates):
    logp = jax.random.normal(jax.random.key(0), (3, candidates)) * 20
    h = losses.implicit_reward(logp, logp, beta=0.3)
    np.testing.assert_allclose(losses.preference_nll(h, jnp.array([0, 1, 1])), np.log(candidates), rtol=1e-6)


def test_dpo_of_two_is_equation_7_of_the_paper():
    logp, ref = jnp.array([[-10.0, -12.0]]), jnp.array([[-11.0, -11.5]])
    margin = 0.1 * ((-10 + 11) - (-12 + 11.5))
    h = losses.implicit_reward(logp, ref, 0.1)
    expected = -np.log(1 / (1 + np.exp(-margin)))
    assert float(losses.preference_nll(h, jnp.array([0]))[0]) == pytest.approx(expected, rel=1e-6)


def test_ppo_clip_by_hand():
    old = jnp.zeros(4)
    logp = jnp.log(jnp.array([1.5, 1.5, 0.5, 0.5]))
    advantage = jnp.array([1.0, -1.0, 1.0, -1.0])
    found = losses.ppo_clip(losses.log_ratio(logp, old), advantage, clip=0.2)
    np.testing.assert_allclose(found, [-1.2, 1.5, -0.5, 0.8], rtol=1e-6)


def test_ppo_at_ratio_one_is_the_policy_gradient():
    logp, advantage = jax.random.normal(jax.random.key(0), (2, 6)), jax.random.normal(jax.random.key(1), (2, 6))
    slope = jax.grad(lambda x: losses.ppo_clip(losses.log_ratio(x, logp), advantage).sum())(logp)
    np.testing.assert_allclose(slope, -advantage, rtol=1e-6)


def test_value_clip_by_hand():
    found = losses.value_clip(jnp.array([1.0, 1.0]), jnp.array([0.0, 0.9]), jnp.array([2.0, 2.0]), clip=0.2)
    np.testing.assert_allclose(found, [0.5 * 1.8**2, 0.5 * 1.0], rtol=1e-6)
