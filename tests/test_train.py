"""The shared training step."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxgpt import losses, optim, sharding, train
from jaxgpt.config import UserError
from jaxgpt.structs import Batch
from tests.helpers import TINY, batch_of, params_of


def sgd_step(batch: Batch, microbatches: int = 1):
    tx = optax.sgd(0.1)
    step = jax.jit(train.make_train_step(train.make_nll(TINY), tx, microbatches=microbatches))
    return step(train.init_state(params_of(scale=1.0), tx), batch, None)


def uneven(batch: Batch) -> Batch:
    """Rows with very different numbers of targets, one with none."""
    keep = jnp.array([0, 3, 19, 8])[:, None]
    return Batch(batch.tokens_BT, batch.mask_BT & (jnp.arange(20) <= keep))


@pytest.mark.parametrize("microbatches", [pytest.param(2, marks=pytest.mark.slow), 4])
def test_accumulated_gradients_equal_those_of_the_whole_batch(microbatches):
    batch = uneven(batch_of(4, 20))
    whole, metrics = sgd_step(batch)
    parts, accumulated = sgd_step(batch, microbatches)
    assert float(accumulated["loss"].value) == pytest.approx(float(metrics["loss"].value), rel=1e-6)
    for a, b in zip(jax.tree.leaves(whole.trainable), jax.tree.leaves(parts.trainable), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_metrics_of_microbatches_pool_and_take_the_larger_of_maxima():
    def loss_fn(params, batch, key):
        return losses.reduce(batch * params["w"]), {"mean": losses.reduce(batch), "largest": batch.max()}

    tx = optax.sgd(0.1)
    step = train.make_train_step(loss_fn, tx, microbatches=3)
    _, metrics = step(train.init_state({"w": jnp.float32(1.0)}, tx), jnp.arange(6.0), None)
    assert train.to_floats(metrics)["largest"] == 5.0 and train.to_floats(metrics)["mean"] == 2.5


def test_masked_rows_are_as_good_as_absent():
    batch = uneven(batch_of(4, 20))
    subset = jax.tree.map(lambda x: x[1:], batch)
    a, _ = sgd_step(batch)
    b, _ = sgd_step(subset)
    for x, y in zip(jax.tree.leaves(a.trainable), jax.tree.leaves(b.trainable), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-6)


def test_an_all_masked_batch_gives_zero_and_moves_nothing():
    batch = batch_of(2, 8)
    state, metrics = sgd_step(Batch(batch.tokens_BT, jnp.zeros_like(batch.mask_BT)))
    assert float(metrics["loss"].value) == 0.0 and float(metrics["grad_norm"]) == 0.0
    for a, b in zip(jax.tree.leaves(state.trainable), jax.tree.leaves(params_of(scale=1.0)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_frozen_parameters_are_seen_but_not_trained_and_survive_donation():
    def loss_fn(params, batch, key):
        return losses.reduce((params["policy"]["w"] - params["reference"]["w"] - batch) ** 2), {}

    tx = optax.sgd(0.1)
    policy = {"w": jnp.ones(4)}
    state = train.init_state({"policy": policy}, tx, {"reference": optim.copy(policy)})
    step = jax.jit(train.make_train_step(loss_fn, tx), donate_argnums=0)
    for _ in range(3):
        state, _ = step(state, jnp.full(4, 2.0), None)
    np.testing.assert_array_equal(state.frozen["reference"]["w"], 1.0)
    assert float(state.trainable["policy"]["w"][0]) > 1.05
    assert int(state.step) == 3


def test_the_step_is_traced_once_and_updates_in_place():
    tx = optax.adam(1e-3)
    step = jax.jit(train.make_train_step(train.make_nll(TINY), tx), donate_argnums=0)
    state, batch = train.init_state(params_of(), tx), batch_of(4, 12)
    for _ in range(3):
        state, _ = step(state, batch, None)
    assert step._cache_size() == 1
    aliased = step.lower(state, batch, None).compile().memory_analysis().alias_size_in_bytes
    assert aliased >= sum(x.nbytes for x in jax.tree.leaves((state.trainable, state.opt_state)))


def test_rows_divided_among_eight_devices_give_the_same_step():
    assert jax.device_count() == 8
    mesh, tx = sharding.data_mesh(), optax.sgd(0.1)
    batch = batch_of(8, 12)
    alone, _ = jax.jit(train.make_train_step(train.make_nll(TINY), tx))(train.init_state(params_of(), tx), batch, None)
    step = train.jit_step(train.make_nll(TINY), tx, mesh)
    state = sharding.replicate(train.init_state(params_of(), tx), mesh)
    together, _ = step(state, sharding.place_rows(batch, mesh), None)
    for a, b in zip(jax.tree.leaves(alone.trainable), jax.tree.leaves(together.trainable), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    with pytest.raises(UserError, match="16 rows doesn't divide into 3 microbatches"):
        sharding.check_batch(16, 3, mesh)
    with pytest.raises(UserError, match="9 rows doesn't divide among 8 devices"):
        sharding.check_rows(9, mesh, "a batch")


def test_evaluation_pools_over_batches():
    mesh, loss = sharding.data_mesh(), jax.jit(train.make_nll(TINY))
    a, b = batch_of(8, 12, seed=1), batch_of(8, 12, seed=2)
    b = Batch(b.tokens_BT, b.mask_BT & (jnp.arange(12) < 3))
    params = params_of()
    both = jax.tree.map(lambda x, y: jnp.concatenate([x, y]), a, b)
    pooled = train.evaluate(loss, params, [a, b], mesh)["loss"]
    assert pooled == pytest.approx(float(loss(params, both)[0].value), rel=1e-5)
