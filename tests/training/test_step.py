"""The shared training step."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxgpt import losses, training
from jaxgpt.errors import UserError
from jaxgpt.models import sharding
from jaxgpt.structs import Batch
from jaxgpt.training import optim
from tests.helpers import TINY, tokens_of

MODEL = dataclasses.replace(TINY, layers=1)
SGD, ADAM = optax.sgd(0.1), optax.adam(1e-3)


@functools.cache
def weights():
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: rng.normal(0, 0.1, x.shape).astype(np.float32), training.param_shapes(MODEL))


@functools.cache
def step_of(microbatches=1):
    return jax.jit(training.make_train_step(training.make_nll(MODEL), SGD, microbatches=microbatches))


def sgd_step(batch: Batch, microbatches: int = 1):
    return jax.device_get(step_of(microbatches)(training.init_state(weights(), SGD), batch, None))


def batch_of(kept: list[int]) -> Batch:
    """Four rows of 20 tokens, each with so many targets."""
    return Batch(np.asarray(tokens_of(4, 20)), (np.arange(20) > 0) & (np.arange(20) <= np.array(kept)[:, None]))


UNEVEN = [0, 3, 19, 8]  # one row without a target


def assert_same(found, expected):
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-6)


@pytest.mark.parametrize("microbatches", [pytest.param(2, marks=pytest.mark.slow), 4])
def test_accumulated_gradients_equal_those_of_the_whole_batch(microbatches):
    whole, metrics = sgd_step(batch_of(UNEVEN))
    parts, accumulated = sgd_step(batch_of(UNEVEN), microbatches)
    assert float(accumulated["loss"].value) == pytest.approx(float(metrics["loss"].value), rel=1e-6)
    assert_same(parts.trainable, whole.trainable)


def test_metrics_of_microbatches_pool_and_take_the_larger_of_maxima():
    def loss_fn(params, batch, key):
        return losses.reduce(batch * params["w"]), {"mean": losses.reduce(batch), "largest": batch.max()}

    step = jax.jit(training.make_train_step(loss_fn, SGD, microbatches=3))
    _, metrics = step(training.init_state({"w": np.float32(1.0)}, SGD), np.arange(6.0, dtype=np.float32)[::-1], None)
    assert training.to_floats(metrics)["largest"] == 5.0 and training.to_floats(metrics)["mean"] == 2.5


def test_masked_rows_are_as_good_as_absent():
    """The mean over two rows is that over each of them twice."""
    batch = batch_of([3, 8, 0, 0])
    twice = jax.tree.map(lambda x: np.concatenate([x[:2], x[:2]]), batch)
    assert_same(sgd_step(batch)[0].trainable, sgd_step(twice)[0].trainable)


def test_an_all_masked_batch_gives_zero_and_moves_nothing():
    state, metrics = sgd_step(batch_of([0, 0, 0, 0]))
    assert float(metrics["loss"].value) == 0.0 and float(metrics["grad_norm"]) == 0.0
    chex.assert_trees_all_equal(state.trainable, weights())


def test_frozen_parameters_are_seen_but_not_trained_and_survive_donation():
    def loss_fn(params, batch, key):
        return losses.reduce((params["policy"]["w"] - params["reference"]["w"] - batch) ** 2), {}

    policy = {"w": jnp.ones(4)}
    state = training.init_state({"policy": policy}, SGD, {"reference": optim.copy(policy)})
    step = jax.jit(training.make_train_step(loss_fn, SGD), donate_argnums=0)
    for _ in range(3):
        state, _ = step(state, np.full(4, 2.0, np.float32), None)
    np.testing.assert_array_equal(state.frozen["reference"]["w"], 1.0)
    np.testing.assert_allclose(state.trainable["policy"]["w"], 3 - 2 * 0.95**3, rtol=1e-6)
    assert int(state.step) == 3


def distance(params, batch, key=None):
    """The mean over rows of how far they are from w."""
    x_BD, mask_B = batch
    return losses.reduce(jnp.square(x_BD - params["w"]).mean(1), mask_B), {}


def points(rows=8, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(rows, 256)).astype(np.float32), rng.random(rows) < 0.7


def test_the_step_is_traced_once_and_updates_in_place():
    step = jax.jit(chex.assert_max_traces(training.make_train_step(distance, ADAM), n=1), donate_argnums=0)
    state = training.init_state({"w": jnp.zeros(256)}, ADAM)
    for _ in range(3):
        state, _ = step(state, points(), None)
    chex.clear_trace_counter()
    aliased = step.lower(state, points(), None).compile().memory_analysis().alias_size_in_bytes
    assert aliased >= sum(x.nbytes for x in jax.tree.leaves((state.trainable, state.opt_state)))


def test_rows_divided_among_eight_devices_give_the_same_step():
    assert jax.device_count() == 8
    mesh = sharding.data_mesh()
    state = training.init_state({"w": np.ones(256, np.float32)}, SGD)
    alone, metrics = jax.jit(training.make_train_step(distance, SGD))(state, points(), None)
    step = training.jit_step(distance, SGD, mesh)
    together, pooled = step(sharding.replicate(state, mesh), sharding.place_local_rows(points(), mesh), None)
    np.testing.assert_allclose(together.trainable["w"], alone.trainable["w"], rtol=1e-5, atol=1e-6)
    assert training.to_floats(pooled) == pytest.approx(training.to_floats(metrics), rel=1e-5)
    with pytest.raises(UserError, match="16 rows doesn't divide into 3 microbatches"):
        sharding.check_batch(16, 3, mesh)
    with pytest.raises(UserError, match="9 rows doesn't divide among 8 devices"):
        sharding.check_rows(9, mesh, "a batch")
