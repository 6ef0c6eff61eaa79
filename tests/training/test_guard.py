"""Updates that must not be made change nothing, and are counted."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxgpt import losses, training
from jaxgpt.errors import UserError
from jaxgpt.losses import kl
from jaxgpt.models import transformer
from jaxgpt.rlhf import ppo
from jaxgpt.rlhf.ppo import PPOConfig
from jaxgpt.structs import Prompts
from jaxgpt.training import guard, optim
from tests.helpers import TINY, prompts_of

TX = optax.adamw(0.1)


def square(params, batch, key):
    return losses.reduce(jnp.square(params["w"] - batch)), {}


def cliff(params, batch, key):
    """Finite everywhere; its gradient is infinite at 0."""
    return losses.reduce(jnp.sqrt(jnp.abs(params["w"] * batch))), {}


@functools.cache
def step_of(loss, **options):
    return jax.jit(training.make_train_step(loss, TX, **options), donate_argnums=0)


def trained(batches, loss=square, **options):
    step, state, metrics = step_of(loss, **options), training.init_state({"w": np.ones((), np.float32)}, TX), {}
    for batch in batches:
        state, metrics = step(state, batch, None)
    return state, metrics


def bits(tree):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def full(value):
    return np.full(4, value, np.float32)


def good(n):
    return [full(0.1 * i) for i in range(n)]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e30])
@pytest.mark.parametrize("microbatches", [1, 2])
def test_a_bad_batch_is_as_if_it_had_never_been(bad, microbatches):
    poisoned = np.array([0.0, bad, 0.0, 0.0], np.float32)
    state, metrics = trained([*good(3), poisoned, *good(2)], microbatches=microbatches)
    clean, _ = trained([*good(3), *good(2)], microbatches=microbatches)
    assert bits((state.trainable, state.opt_state, state.step)) == bits((clean.trainable, clean.opt_state, clean.step))
    assert int(metrics["skipped"]) == 1 and int(metrics["skipped_in_a_row"]) == 0


def test_a_gradient_that_is_not_finite_counts_though_the_loss_is():
    state, metrics = trained([full(0.0)], cliff)
    assert np.isfinite(metrics["loss"].value) and not np.isfinite(metrics["grad_norm"])
    assert int(state.step) == 0 and int(metrics["skipped"]) == 1
    np.testing.assert_array_equal(state.trainable["w"], 1.0)


def test_a_gradient_that_is_not_finite_counts_though_the_update_is():
    """Only the sign of a gradient moves this parameter."""
    tx = optax.chain(optax.scale_by_sign(), optax.scale(-0.1))

    def slope(params, batch, key):
        return losses.reduce(jnp.sqrt(jnp.abs((params["w"] - 1.0) * batch))), {}

    step, state = jax.jit(training.make_train_step(slope, tx)), training.init_state({"w": np.float32(1.0)}, tx)
    state, metrics = step(state, full(1.0), None)
    assert np.isfinite(metrics["loss"].value) and not np.isfinite(metrics["grad_norm"])
    assert int(metrics["skipped"]) == 1 and float(state.trainable["w"]) == 1.0


@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize("rate", [1e10, 1e25, 1e38, 1e39])
def test_an_update_that_could_overflow_the_parameters_is_skipped(rate, plain):
    """Loss and gradient are finite; a large finite step is made, and no parameter ever becomes NaN or infinite."""
    tx = optax.adamw(rate, weight_decay=0.1) if plain else optim.adamw(lambda _: rate, weight_decay=0.1)
    step, state = jax.jit(training.make_train_step(square, tx)), training.init_state({"w": np.ones((), np.float32)}, tx)
    for batch in good(4):
        state, metrics = step(state, batch, None)
        assert np.isfinite(state.trainable["w"])
    assert (int(state.step) > 0) == (rate < 1e20)
    assert int(metrics["skipped"]) > 0 or (not plain and rate < 1e20)  # a clipped gradient is never too large


@pytest.mark.parametrize(
    "tx",
    [
        optim.adamw(lambda _: 0.1, b2=1.0),  # divides by 1 - b2^t = 0
        optim.adamw(lambda _: 0.1, weight_decay=np.nan),
        optim.adamw(lambda _: 0.1, clip=np.nan),
        optim.adamw(lambda _: -1e30),
        optim.adamw(lambda _: np.nan),
        optim.adam_tf(lambda _: 0.1, eps=0.0),
    ],
    ids=["b2", "decay", "clip", "negative rate", "rate", "eps"],
)
def test_settings_that_make_no_finite_update_are_noticed_whatever_the_optimiser(tx):
    """One weight has a gradient, one has none (0 / 0 without eps)."""
    step = jax.jit(training.make_train_step(lambda p, batch, key: square({"w": p["w"]}, batch, key), tx))
    state = training.init_state({"w": np.ones((1, 1), np.float32), "unused": np.ones((), np.float32)}, tx)
    state, metrics = step(state, good(1)[0], None)
    assert int(metrics["skipped"]) == 1
    assert all((x == 1.0).all() for x in jax.tree.leaves(state.trainable))


def test_those_in_a_row_are_counted():
    nan = full(np.nan)
    _, metrics = trained([*good(2), nan, nan, nan])
    assert int(metrics["skipped"]) == 3 and int(metrics["skipped_in_a_row"]) == 3


def noise(n, seed=0):
    return list(np.random.default_rng(seed).normal(size=(n, 4)).astype(np.float32))


@pytest.mark.parametrize(("spike", "skipped"), [(0.0, 0), (6.0, 1)])
def test_a_leap_of_the_loss_is_skipped_if_asked(spike, skipped):
    """Losses of a constant plus noise, then one 100 times as large, then more noise."""
    state, metrics = trained([*noise(40), full(40.0), *noise(5, seed=1)], spike=spike)
    assert int(metrics["skipped"]) == skipped
    assert int(state.step) == 46 - skipped


def test_a_leap_among_the_first_losses_is_let_through():
    _, metrics = trained([*noise(guard.MIN_ACCEPTED - 1), full(40.0)], spike=6.0)
    assert int(metrics["skipped"]) == 0


def test_running_moments_are_those_of_the_accepted_losses():
    """Against float64, with the weights written out."""
    losses_ = np.random.default_rng(0).normal(2.0, 0.5, 60).astype(np.float32)
    admitted = np.arange(60) % 7 != 3
    state, after = guard.init(), jax.jit(guard.update)
    for each in zip(admitted, losses_, strict=True):
        state = after(state, *each)
    kept = losses_[admitted].astype(np.float64)
    weights = guard.DECAY ** np.arange(len(kept))[::-1] * (1 - guard.DECAY)
    assert float(state.mean) == pytest.approx(float(weights @ kept), rel=1e-5)
    assert float(state.square) == pytest.approx(float(weights @ kept**2), rel=1e-5)
    limit = (weights @ kept) / weights.sum() + 3 * np.sqrt(
        (weights @ kept**2) / weights.sum() - ((weights @ kept) / weights.sum()) ** 2
    )
    admits = jax.jit(functools.partial(guard.accepts, spike=3.0))
    assert admits(state, np.float32(0.999 * limit), np.float32(1), np.float32(1))
    assert not admits(state, np.float32(1.001 * limit), np.float32(1), np.float32(1))


@pytest.mark.slow
def test_a_score_that_is_not_finite_moves_nothing_in_ppo():
    config, tx = dataclasses.replace(TINY, layers=1), optim.adam_tf(optax.constant_schedule(1e-3))
    settings = PPOConfig(new_tokens=4, epochs=2, unfinished_score=None)
    policy = ppo.policy_of(config, settings, stop=5)
    state = jax.jit(lambda key: ppo.init(policy, transformer.init(key, config), tx, {}))(jax.random.key(1))
    before = bits((state.trainable, state.opt_state))
    one = functools.partial(
        ppo.ppo_iteration,
        policy=policy,
        ppo=settings,
        tx=tx,
        reward_fn=lambda params, rows: jnp.full(4, jnp.nan),
    )
    control = kl.FixedKL(np.float32(0.1))
    state, _, _, metrics = jax.jit(one)(state, control, Prompts(*prompts_of(4, 6)), jax.random.key(0))
    assert int(metrics["skipped"]) == int(metrics["skipped_in_a_row"]) == 2
    assert bits((state.trainable, state.opt_state)) == before


@pytest.mark.parametrize("wrong", [{"patience": 0}, {"spike": -1.0}])
def test_senseless_settings_are_refused(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        guard.GuardConfig(**wrong)
