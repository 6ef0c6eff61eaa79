"""The reward model: where it reads, what it learns, how it is normalised."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxgpt import optim, reward, train
from jaxgpt.structs import Batch, Preferences
from tests.helpers import TINY, batch_of, params_of, tokens_of

score = jax.jit(reward.score, static_argnums=1)
loss = jax.jit(reward.loss, static_argnums=1)


def reward_params(seed: int = 0):
    return reward.init(jax.random.key(seed), params_of(scale=2.0), TINY.width)


def rows(length: int = 12) -> Batch:
    tokens = batch_of(3, length).tokens_BT
    ends = jnp.array([5, 9, 12])[:, None]
    t = jnp.arange(length)
    return Batch(jnp.where(t < ends, tokens, 0), (t >= 3) & (t < ends))


def test_the_score_does_not_depend_on_padding():
    params, batch = reward_params(), rows()
    longer = Batch(
        jnp.pad(batch.tokens_BT, ((0, 0), (0, 10)), constant_values=33), jnp.pad(batch.mask_BT, ((0, 0), (0, 10)))
    )
    np.testing.assert_allclose(score(params, TINY, batch), score(params, TINY, longer), atol=1e-5)


def test_the_score_is_read_at_the_last_answer_token():
    params, batch = reward_params(), rows()

    def changed(t: int) -> np.ndarray:
        other = Batch(batch.tokens_BT.at[:, t].set(60), batch.mask_BT)
        return np.abs(score(params, TINY, other) - score(params, TINY, batch)) > 1e-5

    np.testing.assert_array_equal(changed(8), [False, True, True])  # the first row's answer ended before
    np.testing.assert_array_equal(changed(11), [False, False, True])


def test_normalising_gives_mean_zero_and_deviation_one():
    params, batch = reward_params(), batch_of(32, 12)
    found = np.asarray(score(reward.normalise_on(params, TINY, batch), TINY, batch))
    assert found.mean() == pytest.approx(0, abs=1e-5) and found.std() == pytest.approx(1, rel=1e-4)
    twice = reward.normalise_on(reward.normalise_on(params, TINY, batch_of(32, 12, seed=5)), TINY, batch)
    np.testing.assert_allclose(score(twice, TINY, batch), found, rtol=1e-3, atol=1e-4)


def test_it_learns_to_prefer_what_was_chosen():
    """Of four answers the one with the token 60 is always chosen."""
    rng = np.random.default_rng(0)
    tokens = np.array(tokens_of(64 * 4, 10)).reshape(64, 4, 10)
    tokens[tokens == 60] = 61
    choice = rng.integers(0, 4, 64)
    tokens[np.arange(64), choice, rng.integers(3, 10, 64)] = 60
    mask = np.broadcast_to(np.arange(10) >= 3, tokens.shape)
    batch = Preferences(jnp.asarray(tokens), jnp.asarray(mask), jnp.asarray(choice), jnp.ones((64, 4), bool))
    trainable, frozen = optim.split(reward_params(), reward.trainable_names())
    tx = optax.adam(1e-3)
    step = jax.jit(train.make_train_step(lambda params, batch, key: reward.loss(params, TINY, batch), tx))
    state = train.init_state(trainable, tx, frozen)
    for _ in range(80):
        state, metrics = step(state, batch, None)
    found = train.to_floats(metrics)
    assert found["accuracy"] > 0.95 and found["loss"] < 0.3
    assert float(state.params["gain"]) == 1.0


def test_rankings_that_are_all_padding_count_for_nothing():
    batch = Preferences(
        jnp.asarray(tokens_of(6, 8)).reshape(2, 3, 8),
        jnp.ones((2, 3, 8), bool),
        jnp.array([1, 0]),
        jnp.array([[True] * 3, [False] * 3]),
    )
    both, _ = loss(reward_params(), TINY, batch)
    first, _ = loss(reward_params(), TINY, jax.tree.map(lambda x: x[:1], batch))
    assert float(both.count) == 1
    np.testing.assert_allclose(both.value, first.value, rtol=1e-5)
