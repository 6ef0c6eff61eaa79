"""Rewards and advantages on ragged rows, against plain loops in float64."""

import jax
import numpy as np
import pytest

from jaxgpt.losses import returns

gae, shaped_rewards = jax.jit(returns.gae), jax.jit(returns.shaped_rewards)
gaes = jax.jit(jax.vmap(returns.gae, in_axes=(None, None, None, 0, 0)))


def run(f, *args):
    """f's result in NumPy. Jitted, since an eager call would compile each primitive separately."""
    return jax.tree.map(np.asarray, jax.jit(f)(*args))


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
    expected = np.where(mask, -0.3 * kl, 0.0)
    for b, row in enumerate(mask):
        expected[b, np.flatnonzero(row)[-1]] += score[b]
    found = shaped_rewards(score, kl, mask, 0.3)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7)
    assert (np.asarray(found)[~mask] == 0).all()


def test_no_answer_means_no_reward():
    """And no advantage."""
    mask, kl, value, score = ragged()
    mask[1] = False
    reward = np.asarray(shaped_rewards(score, kl, mask, 0.3))
    assert (reward[1] == 0).all()
    assert all((np.asarray(found)[1] == 0).all() for found in gae(reward, value, mask, 1.0, 0.95))


def test_rewards_and_advantages_by_hand():
    """A prompt token, then an answer of two with a score of 4."""

    def f(mask, score, kl, reward, value):
        shaped = returns.shaped_rewards(score, kl, mask, 0.5)
        return returns.last_token_mask(mask), shaped, *returns.gae(reward, value, mask, gamma=0.5, lam=0.5)

    mask, kl = np.array([[False, True, True]]), np.array([[9.0, 1.0, 2.0]])
    # values of 2: delta_2 = 4 - 2, delta_1 = 0 + 2 / 2 - 2; A_2 = 2, A_1 = -1 + 2 / 4
    reward, value = np.array([[7.0, 0.0, 4.0]]), np.array([[7.0, 2.0, 2.0]])
    last, shaped, advantage, target = run(f, mask, np.array([4.0]), kl, reward, value)
    np.testing.assert_array_equal(last, [[False, False, True]])
    np.testing.assert_allclose(shaped, [[0.0, -0.5, 4.0 - 1.0]])
    np.testing.assert_allclose(advantage, [[0.0, -0.5, 2.0]])
    np.testing.assert_allclose(target, [[0.0, 1.5, 4.0]])


def test_moments_and_whitening_by_hand():
    def f(x, mask):
        return returns.masked_moments(x, mask), returns.whiten(x, mask), returns.whiten_keep_mean(x, mask)

    moments, white, kept = run(f, np.array([[0.0, 4.0, 99.0]]), np.array([[True, True, False]]))
    assert moments == (2.0, 4.0)
    np.testing.assert_allclose(white, [[-1.0, 1.0, 0.0]], rtol=1e-5)
    np.testing.assert_allclose(kept, [[1.0, 3.0, 0.0]], rtol=1e-5)


def test_numbers_that_are_all_alike_have_no_spread():
    """Not even a rounding error: nothing is better than expected, and normalisation only removes the mean."""

    def f(x, mask):
        return returns.whiten(x, mask), returns.grpo(x, mask), returns.fit_normalisation(x[0])

    white, group, (gain, bias) = run(f, np.full((1, 7), 1000.1), np.ones((1, 7), bool))
    np.testing.assert_allclose(white, 0.0, atol=1e-3)
    np.testing.assert_allclose(group, 0.0, atol=1e-3)
    assert gain == 1.0 and bias == pytest.approx(-1000.1)


def gae_by_loop(reward, value, mask, gamma: float, lam: float):
    """Advantages of one row, [T]: from one masked token to the next is one step, with all rewards on the way."""
    expected, steps = np.zeros(len(mask)), np.flatnonzero(mask)
    following = ahead = 0.0
    for t, end in reversed(list(zip(steps, [*steps[1:], steps[-1] + 1] if len(steps) else [], strict=True))):
        delta = reward[t:end].sum() + gamma * following - value[t]
        expected[t] = ahead = delta + gamma * lam * ahead
        following = value[t]
    return expected


@pytest.mark.parametrize("gaps", [False, True])
def test_gae_equals_a_loop(gaps):
    mask, reward, value, _ = ragged()
    mask = np.random.default_rng(0).random(mask.shape) < 0.5 if gaps else mask
    settings = [(1.0, 0.95), (0.9, 0.7), (1.0, 1.0), (0.97, 0.0)]
    found = map(np.asarray, gaes(reward, value, mask, *np.array(settings).T))
    for (gamma, lam), advantage, target in zip(settings, *found, strict=True):
        rows = zip(reward, value, mask, strict=True)
        expected = np.stack([gae_by_loop(*row, gamma, lam) for row in rows])
        named = f"gamma {gamma}, lambda {lam}"
        np.testing.assert_allclose(advantage, expected, rtol=1e-4, atol=1e-5, err_msg=named)
        np.testing.assert_allclose(target, np.where(mask, expected + value, 0), rtol=1e-4, atol=1e-5, err_msg=named)
        assert (advantage[~mask] == 0).all() and (target[~mask] == 0).all(), named


def test_credit_crosses_a_gap_in_one_step():
    """Two tokens, a tool's output, two tokens, and a reward of 1 at the end or inside the gap."""
    mask, end, inside = np.array([1, 1, 0, 1, 1], bool), np.eye(5)[4], np.eye(5)[2]
    none, values = np.zeros(5), np.array([0.1, 0.2, 9.0, 0.4, 0.5])
    cases = [  # reward, value, gamma, lambda, advantages
        (end, none, 1.0, 1.0, [1, 1, 0, 1, 1]),
        (end, none, 1.0, 0.5, [0.125, 0.25, 0, 0.5, 1]),
        (end, none, 0.9, 1.0, [0.729, 0.81, 0, 0.9, 1]),
        (end, values, 1.0, 0.5, [0.2875, 0.375, 0, 0.35, 0.5]),
        (inside, none, 0.9, 0.5, [0.45, 1, 0, 0, 0]),
    ]
    *given, expected = (np.array(x, np.float32) for x in zip(*cases, strict=True))

    def f(reward, value, gamma, lam):
        row = reward[None], value[None], mask[None]
        return returns.gae(*row, gamma, lam)[0][0], returns.rewards_to_go(row[0], row[2], gamma)[0]

    advantage, to_go = run(jax.vmap(f), *given)
    np.testing.assert_allclose(advantage, expected, rtol=1e-5)
    np.testing.assert_allclose(to_go[[0, 2, 4]], [[1, 1, 0, 1, 1], expected[2], [0.9, 1, 0, 0, 0]], rtol=1e-5)


def test_lambda_one_is_return_minus_value():
    mask, reward, value, _ = ragged(seed=3)
    reward = reward * mask
    _, target = gae(reward, value, mask, 1.0, 1.0)
    to_come = np.cumsum(reward[:, ::-1], axis=1)[:, ::-1]
    np.testing.assert_allclose(np.asarray(target)[mask], to_come[mask], rtol=1e-4, atol=1e-5)


def test_what_stands_outside_the_mask_does_not_matter():
    mask, reward, value, _ = ragged()
    dirty = np.where(mask, value, 1e6)
    clean, same = (gae(reward * mask, x, mask, 1.0, 0.95) for x in (value, dirty))
    for a, b in zip(clean, same, strict=True):
        np.testing.assert_array_equal(a, b)


def test_whitening_uses_the_population_variance_of_the_mask(strict):
    def f(x, mask):
        slope = jax.grad(lambda x: returns.whiten(x, mask).sum())(x)
        return returns.whiten(x, mask), returns.whiten_keep_mean(x, mask), slope

    mask, x, _, _ = ragged(seed=5)
    x, f = np.float32(3 * x + 7), jax.jit(f)
    white, kept, _ = map(np.asarray, f(x, mask))
    assert white[mask].mean() == pytest.approx(0, abs=1e-5) and white[mask].std() == pytest.approx(1, rel=1e-4)
    assert kept[mask].mean() == pytest.approx(x[mask].mean(), rel=1e-4)
    assert kept[mask].std() == pytest.approx(1, rel=1e-4)
    assert all(np.isfinite(found).all() for found in f(x, np.zeros_like(mask)))


def test_rewards_to_go_by_hand():
    reward, mask = np.array([[0.0, 1.0, 2.0, 4.0]]), np.array([[False, True, True, True]])
    found = run(lambda *x: returns.rewards_to_go(*x, 0.5), reward, mask)
    np.testing.assert_allclose(found, [[0.0, 3.0, 4.0, 4.0]])


def test_group_baselines_by_hand():
    """Two groups of three, one with an absent answer, and one with a single answer and so no baseline."""

    def f(score, present):
        return (
            returns.centre_scores(score, present),
            returns.rloo(score, present),
            returns.grpo(score, present, epsilon=0.0),
        )

    score = np.array([[0.0, 0.0, 3.0], [5.0, 5.0, 5.0], [1.0, 3.0, 99.0], [7.0, 99.0, 99.0]])
    present = np.array([[True] * 3, [True] * 3, [True, True, False], [True, False, False]])
    centred, rloo, grpo = run(f, score, present)
    np.testing.assert_allclose(centred, [[-1, -1, 2], [0, 0, 0], [-1, 1, 0], [0, 0, 0]], atol=1e-6)
    np.testing.assert_allclose(rloo, [[-1.5, -1.5, 3], [0, 0, 0], [-2, 2, 0], [0, 0, 0]], atol=1e-6)
    sd = np.sqrt([(1 + 1 + 4) / 2, 2.0])
    np.testing.assert_allclose(grpo[[0, 2]], [[-1, -1, 2], [-1, 1, 0]] / sd[:, None], rtol=1e-5)


def test_equal_and_lone_scores_have_no_advantage():
    def f(*scores):
        return {f.__name__: [f(x) for x in scores] for f in (returns.rloo, returns.grpo, returns.centre_scores)}

    for name, found in run(f, np.full((1, 3), 5.0), np.array([[7.0]])).items():
        assert all((advantage == 0).all() for advantage in found), name


def test_normalisation_on_reference_samples():
    score = np.array([1.0, 3.0, 1.0, 3.0, 50.0])
    gain, bias = run(returns.fit_normalisation, score, np.array([True, True, True, True, False]))
    np.testing.assert_allclose(gain * score + bias, [-1, 1, -1, 1, 48], rtol=1e-5)


def test_an_advantage_lies_on_each_token_of_its_answer():
    mask = np.array([[False, True, True], [True, False, False]])
    np.testing.assert_array_equal(
        run(returns.broadcast_to_tokens, np.array([2.0, -1.0]), mask), [[0, 2, 2], [-1, 0, 0]]
    )
