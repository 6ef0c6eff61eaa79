"""The reward model: where it reads, what it learns, how it is normalised."""

import dataclasses

import jax
import numpy as np
import optax
import pytest

from jaxgpt import losses, training
from jaxgpt.errors import UserError
from jaxgpt.models import sharding
from jaxgpt.rlhf import reward
from jaxgpt.structs import Batch, Preferences
from jaxgpt.training import optim
from tests.helpers import TINY, random_params, tokens_of

MODEL = dataclasses.replace(TINY, layers=1)
T = 22
score = jax.jit(reward.score, static_argnums=1)
normalise_on = jax.jit(reward.normalise_on, static_argnums=1)
loss = jax.jit(reward.loss, static_argnums=1)


def reward_params(seed: int = 0):
    head = np.random.default_rng(seed).standard_normal(MODEL.width, np.float32) / np.sqrt(MODEL.width)
    params = reward.init(jax.random.key(seed), random_params(MODEL, scale=2.0), MODEL.width)
    return {**params, "head": {"kernel_D": head, "bias": np.float32(0)}}


def rows(seed: int = 0) -> Batch:
    """Answers from the third token to anywhere between the fifth and the twelfth, and padding; in the first three
    they end at 5, 9 and 12."""
    ends = np.random.default_rng(seed).integers(5, 13, (32, 1))
    ends[:3, 0] = 5, 9, 12
    t = np.arange(T)
    return Batch(np.where(t < ends, tokens_of(32, T, seed=seed), 0), (t >= 3) & (t < ends))


def test_the_score_does_not_depend_on_padding():
    params, batch = reward_params(), rows()
    found = score(params, MODEL, batch)
    other = np.where((np.arange(T) >= 3) & ~batch.mask_BT, 33, batch.tokens_BT)
    np.testing.assert_allclose(score(params, MODEL, Batch(other, batch.mask_BT)), found, atol=1e-5)
    shorter = Batch(batch.tokens_BT[:, :12], batch.mask_BT[:, :12])
    np.testing.assert_allclose(score(params, MODEL, shorter), found, atol=1e-5)


def test_the_score_is_read_at_the_last_answer_token():
    params, batch = reward_params(), rows()

    def changed(t: int) -> np.ndarray:
        tokens = batch.tokens_BT.copy()
        tokens[:, t] = 5
        return np.abs(score(params, MODEL, Batch(tokens, batch.mask_BT)) - score(params, MODEL, batch)) > 1e-5

    last = batch.mask_BT.shape[1] - 1 - np.argmax(batch.mask_BT[:, ::-1], axis=1)
    for t in (4, 8, 11):
        np.testing.assert_array_equal(changed(t), last >= t, err_msg=f"token {t}")


def test_normalising_gives_mean_zero_and_deviation_one():
    params, batch = reward_params(), rows()
    found = np.asarray(score(normalise_on(params, MODEL, batch), MODEL, batch))
    assert found.mean() == pytest.approx(0, abs=1e-5) and found.std() == pytest.approx(1, rel=1e-4)
    twice = normalise_on(normalise_on(params, MODEL, rows(seed=5)), MODEL, batch)
    np.testing.assert_allclose(score(twice, MODEL, batch), found, rtol=1e-3, atol=1e-4)


def test_it_learns_to_prefer_what_was_chosen():
    """Of four answers the one with the token 60 is always chosen."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(6, 60, (32, 4, 10), np.int32)
    choice = rng.integers(0, 4, 32)
    tokens[np.arange(32), choice, rng.integers(3, 10, 32)] = 60
    mask = np.broadcast_to(np.arange(10) >= 3, tokens.shape)
    batch = Preferences(tokens, mask, choice, np.ones((32, 4), bool))
    trainable, frozen = optim.split(reward_params(), reward.trainable_names())
    tx = optax.adam(1e-3)
    step = jax.jit(training.make_train_step(lambda params, batch, key: reward.loss(params, MODEL, batch), tx))
    state = jax.jit(lambda trainable, frozen: training.init_state(trainable, tx, frozen))(trainable, frozen)
    for _ in range(40):
        state, metrics = step(state, batch, None)
    found = training.to_floats(metrics)
    assert found["accuracy"] > 0.95 and found["loss"] < 0.3
    assert float(state.params["gain"]) == 1.0


def test_rankings_that_are_all_padding_count_for_nothing():
    tokens = np.reshape(tokens_of(6, 8), (2, 3, 8))
    batch = Preferences(tokens, np.ones((2, 3, 8), bool), np.array([1, 0]), np.array([[True] * 3, [False] * 3]))
    both, _ = loss(reward_params(), MODEL, batch)
    first, _ = loss(reward_params(), MODEL, jax.tree.map(lambda x: np.asarray(x)[[0, 0]], batch))  # twice
    assert float(both.count) == 1 and float(first.count) == 2
    np.testing.assert_allclose(both.value, first.value, rtol=1e-5)


@pytest.mark.parametrize("choice", [0, 1])
def test_equal_scores_are_chance_whichever_was_chosen(choice):
    """Identical answers, three to a prompt or two: 1/3 and 1/2, not 1 or 0. People's ties are in no figure."""
    present = np.array([[True] * 3] * 3 + [[True, True, False]] * 2)
    found = reward.heldout_metrics(np.zeros((5, 3)), np.array([choice] * 2 + [losses.TIE] + [choice] * 2), present)
    assert found.accuracy == pytest.approx((2 / 3 + 1) / 4) == found.chance and (found.choices, found.ties) == (4, 1)
    assert found.nll == pytest.approx((2 * np.log(3) + 2 * np.log(2)) / 4) == found.chance_nll
    with pytest.raises(UserError, match="all 5 held-out preferences are ties"):
        reward.heldout_metrics(np.zeros((5, 3)), np.full(5, losses.TIE), present)


def test_held_out_figures_count_prompts_and_give_identical_answers_one_score():
    """Whatever the rounding of their places in a batch; the first two rows are about one prompt."""
    tokens = np.tile(np.arange(6, 12, dtype=np.int32), (4, 2, 1))
    tokens[1, :, 4], tokens[2:, :, 0], tokens[3, 1, 5] = 40, 20, 30
    batch = Preferences(
        tokens, np.broadcast_to(np.arange(6) > 2, tokens.shape), np.zeros(4, np.int32), np.ones((4, 2), bool)
    )
    rounded = np.array([[0.0, 1e-7], [1e-7, 0.0], [0.5, 0.5000001], [1.0, 2.0]], np.float32)
    found = reward.evaluate(lambda params, batch: params, rounded, [batch], sharding.data_mesh())
    assert found.accuracy == 1.5 / 4 and (found.choices, found.prompts) == (4, 2)
    assert str(found).startswith("37.5% of 4 (95 % interval") and "too few to say), chance 50.0%" in str(found)


def test_scores_that_are_not_finite_are_no_accuracy():
    scores, choice, present = np.zeros((4, 3)), np.zeros(4, int), np.array([[True, True, False]] * 4)
    scores[:, 2] = np.nan  # absent
    assert reward.heldout_metrics(scores, choice, present).accuracy == 0.5
    for wrong in (np.nan, np.inf):
        scores[1, 0] = wrong
        with pytest.raises(UserError, match="1 of 8 scores of held-out answers are NaN or infinite"):
            reward.heldout_metrics(scores, choice, present)
