"""Rewards and advantages on ragged rows, against plain loops in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt import returns


def ragged(rows: int = 5, length: int = 9, seed: int = 0):
    rng = np.random.default_rng(seed)
    start = rng.integers(1, 4, rows)
    size = rng.integers(1, length - start.max() + 1, rows)
    size[0] = 1
    t = np.arange(length)
    mask = (t >= start[:, None]) & (t < (start + size)[:, None])
    return mask, rng.normal(size=(rows, length)), rng.normal(size=(rows, length)), rng.normal(size=rows)


def test_the_score_arrives_at_the_last_token_only():
    mask, kl, _, score = ragged()
    found = np.asarray(returns.shaped_rewards(jnp.asarray(score), jnp.asarray(kl), jnp.asarray(mask), 0.3))
    np.testing.assert_allclose(found.sum(1), score - 0.3 * (kl * mask).sum(1), rtol=1e-5)
    assert (found[~mask] == 0).all()
    for row, end, h in zip(found, mask.shape[1] - 1 - mask[:, ::-1].argmax(1), score, strict=True):
        assert row[end] == pytest.approx(h - 0.3 * kl[list(found.tolist()).index(row.tolist()), end], rel=1e-4)


def test_rewards_and_advantages_by_hand():
    """A prompt token, then an answer of two with a score of 4."""
    mask = jnp.array([[False, True, True]])
    np.testing.assert_array_equal(returns.last_token(mask), [[False, False, True]])
    reward = returns.shaped_rewards(jnp.array([4.0]), jnp.array([[9.0, 1.0, 2.0]]), mask, 0.5)
    np.testing.assert_allclose(reward, [[0.0, -0.5, 4.0 - 1.0]])
    # values of 2: delta_2 = 4 - 2, delta_1 = 0 + 2 / 2 - 2; A_2 = 2, A_1 = -1 + 2 / 4
    reward, value = jnp.array([[7.0, 0.0, 4.0]]), jnp.array([[7.0, 2.0, 2.0]])
    advantage, target = returns.gae(reward, value, mask, gamma=0.5, lam=0.5)
    np.testing.assert_allclose(advantage, [[0.0, -0.5, 2.0]])
    np.testing.assert_allclose(target, [[0.0, 1.5, 4.0]])


def test_moments_and_whitening_by_hand():
    x, mask = jnp.array([[0.0, 4.0, 99.0]]), jnp.array([[True, True, False]])
    mean, variance = returns.masked_moments(x, mask)
    assert (float(mean), float(variance)) == (2.0, 4.0)
    np.testing.assert_allclose(returns.whiten(x, mask), [[-1.0, 1.0, 0.0]], rtol=1e-5)
    np.testing.assert_allclose(returns.whiten_keep_mean(x, mask), [[1.0, 3.0, 0.0]], rtol=1e-5)


@pytest.mark.parametrize("f", [returns.whiten, returns.grpo, returns.normalisation])
def test_numbers_that_are_all_alike_have_no_spread(f):
    """Not even that of rounding: nothing is better than expected, and normalisation only takes the mean away."""
    x = jnp.full((1, 7), 1000.1)
    if f is returns.normalisation:
        gain, bias = f(x[0])
        assert float(gain) == 1.0 and float(bias) == pytest.approx(-1000.1)
    else:
        np.testing.assert_allclose(f(x, jnp.ones((1, 7), bool)), 0.0, atol=1e-3)


def test_no_answer_means_no_reward():
    mask = jnp.zeros((1, 4), bool)
    assert (returns.shaped_rewards(jnp.array([3.0]), jnp.ones((1, 4)), mask, 0.1) == 0).all()
    advantage, target = returns.gae(jnp.zeros((1, 4)), jnp.ones((1, 4)), mask)
    assert (advantage == 0).all() and (target == 0).all()


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.7), (1.0, 1.0), (0.97, 0.0)])
def test_gae_equals_a_loop(gamma, lam):
    mask, reward, value, _ = ragged()
    reward = reward * mask
    advantage, target = returns.gae(jnp.asarray(reward), jnp.asarray(value), jnp.asarray(mask), gamma, lam)
    for b in range(len(mask)):
        steps, following, ahead = np.flatnonzero(mask[b]), 0.0, 0.0
        for t in steps[::-1]:
            delta = reward[b, t] + gamma * following - value[b, t]
            ahead = delta + gamma * lam * ahead
            following = value[b, t]
            assert float(advantage[b, t]) == pytest.approx(ahead, rel=1e-4, abs=1e-5)
            assert float(target[b, t]) == pytest.approx(ahead + value[b, t], rel=1e-4, abs=1e-5)
    assert (np.asarray(advantage)[~mask] == 0).all()


def test_lambda_one_is_return_minus_value():
    mask, reward, value, _ = ragged(seed=3)
    reward = reward * mask
    _, target = returns.gae(jnp.asarray(reward), jnp.asarray(value), jnp.asarray(mask), 1.0, 1.0)
    to_come = np.cumsum(reward[:, ::-1], axis=1)[:, ::-1]
    np.testing.assert_allclose(np.asarray(target)[mask], to_come[mask], rtol=1e-4, atol=1e-5)


def test_what_stands_outside_the_mask_does_not_matter():
    mask, reward, value, _ = ragged()
    dirty = np.where(mask, value, 1e6)
    clean, _ = returns.gae(jnp.asarray(reward * mask), jnp.asarray(value), jnp.asarray(mask))
    same, _ = returns.gae(jnp.asarray(reward * mask), jnp.asarray(dirty), jnp.asarray(mask))
    np.testing.assert_array_equal(clean, same)


def test_whitening_uses_the_population_variance_of_the_mask(strict):
    mask, x, _, _ = ragged(seed=5)
    x32 = jnp.asarray(3 * x + 7, jnp.float32)
    white = np.asarray(returns.whiten(x32, jnp.asarray(mask)))
    assert white[mask].mean() == pytest.approx(0, abs=1e-5) and white[mask].std() == pytest.approx(1, rel=1e-4)
    kept = np.asarray(returns.whiten_keep_mean(x32, jnp.asarray(mask)))
    assert kept[mask].mean() == pytest.approx(float(x32[mask].mean()), rel=1e-4)
    assert kept[mask].std() == pytest.approx(1, rel=1e-4)
    assert np.isfinite(returns.whiten(x32, jnp.zeros(mask.shape, bool))).all()
    slope = jax.grad(lambda x: returns.whiten(x, jnp.zeros(mask.shape, bool)).sum())(x32)
    assert np.isfinite(slope).all()


def test_rewards_to_go_by_hand():
    reward, mask = jnp.array([[0.0, 1.0, 2.0, 4.0]]), jnp.array([[False, True, True, True]])
    np.testing.assert_allclose(returns.rewards_to_go(reward, mask, 0.5), [[0.0, 3.0, 4.0, 4.0]])


def test_group_baselines_by_hand():
    score = jnp.array([[0.0, 0.0, 3.0], [5.0, 5.0, 5.0]])
    np.testing.assert_allclose(returns.centred(score), [[-1, -1, 2], [0, 0, 0]], atol=1e-6)
    np.testing.assert_allclose(returns.rloo(score), [[-1.5, -1.5, 3], [0, 0, 0]], atol=1e-6)
    np.testing.assert_allclose(returns.rloo(score), 1.5 * returns.centred(score), atol=1e-6)
    sd = np.sqrt((1 + 1 + 4) / 2)
    np.testing.assert_allclose(returns.grpo(score, epsilon=0.0)[0], np.array([-1, -1, 2]) / sd, rtol=1e-5)
    np.testing.assert_array_equal(returns.grpo(score)[1], 0)


def test_an_absent_answer_is_a_smaller_group_and_a_lone_one_has_no_baseline():
    score, present = jnp.array([[1.0, 3.0, 99.0]]), jnp.array([[True, True, False]])
    np.testing.assert_allclose(returns.rloo(score, present), [[-2.0, 2.0, 0.0]])
    for f in (returns.rloo, returns.grpo, returns.centred):
        np.testing.assert_array_equal(f(jnp.array([[7.0]])), 0)


def test_normalisation_on_reference_samples():
    score = jnp.array([1.0, 3.0, 1.0, 3.0, 50.0])
    gain, bias = returns.normalisation(score, jnp.array([True, True, True, True, False]))
    np.testing.assert_allclose(gain * score + bias, [-1, 1, -1, 1, 48], rtol=1e-5)
    gain, bias = returns.normalisation(jnp.full(4, 2.0))
    assert (float(gain), float(bias)) == (1.0, -2.0)


def test_an_advantage_lies_on_each_token_of_its_answer():
    mask = jnp.array([[False, True, True], [True, False, False]])
    np.testing.assert_array_equal(returns.to_tokens(jnp.array([2.0, -1.0]), mask), [[0, 2, 2], [-1, 0, 0]])
