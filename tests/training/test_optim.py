"""Schedules, masks, and Adam in TensorFlow's form."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxgpt.errors import UserError
from jaxgpt.training import optim
from tests.helpers import params_of


def test_schedules_at_their_corners():
    cosine, line = optim.warmup_cosine(1.0, steps=100, warmup=10, final=0.1), optim.linear_to_zero(2.0, steps=10)
    found = jax.jit(lambda x, y: (jax.vmap(cosine)(x), jax.vmap(line)(y)))(np.array([0, 10, 100]), np.array([0, 5, 10]))
    np.testing.assert_allclose(found[0], [0.0, 1.0, 0.1], rtol=1e-6)
    np.testing.assert_allclose(found[1], [2.0, 1.0, 0.0], rtol=1e-6)
    with pytest.raises(UserError, match="warmup of 20 steps"):
        optim.warmup_cosine(1.0, steps=20, warmup=20)


def test_decay_acts_on_matrices_only():
    mask = optim.decay_mask(jax.eval_shape(params_of))
    assert mask["embed"]["tokens_VD"] and mask["block_0"]["qkv"]["kernel"]
    assert not mask["embed"]["positions_TD"] and not mask["block_0"]["qkv"]["bias"] and not mask["final_norm"]["scale"]


def test_adam_tf_equals_tensorflows_formula():
    grads = [np.array([1e-6, 0.3, -2.0]), np.array([2e-5, -0.1, 0.5]), np.array([0.0, 0.2, 0.1])]
    tx = optim.scale_by_adam_tf(b1=0.9, b2=0.999, eps=1e-5)
    state, m, v = tx.init(np.zeros(3, np.float32)), np.zeros(3), np.zeros(3)
    update = jax.jit(tx.update)
    for t, g in enumerate(grads, 1):
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        expected = np.sqrt(1 - 0.999**t) / (1 - 0.9**t) * m / (np.sqrt(v) + 1e-5)
        found, state = update(g.astype(np.float32), state)
        np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_adam_tf_damps_small_gradients_where_optax_does_not():
    both = optim.scale_by_adam_tf(eps=1e-5), optax.scale_by_adam(eps=1e-5)
    ours, theirs = jax.jit(lambda g: [tx.update(g, tx.init(g))[0] for tx in both])(np.float32(1e-6))
    assert float(theirs) / float(ours) == pytest.approx(29, rel=0.05)  # (g + eps sqrt(1000)) / (g + eps)


@pytest.mark.parametrize("name", ["adamw", "adam_tf"])
def test_the_updates_of_a_bounded_optimiser_are_bounded_whatever_the_gradients(name):
    """Gradients of finite norm, tiny and huge by turns, with learning rate 1: by Cauchy-Schwarz a step is at most
    (1 - b1) / sqrt((1 - b2) (1 - b1^2 / b2)), corrections for bias at most double that, and eps only shortens it."""
    b2 = {"adamw": 0.95, "adam_tf": 0.999}[name]
    tx = (
        optim.adamw(optax.constant_schedule(1.0), weight_decay=0.0) if name == "adamw" else optim.adam_tf(lambda _: 1.0)
    )
    largest = 2 * 0.1 / np.sqrt((1 - b2) * (1 - 0.9**2 / b2))
    rng, params = np.random.default_rng(0), {"w": np.zeros((20, 5), np.float32)}
    signs = rng.choice([-1.0, 1.0], (60, 1, 5))
    grads = {"w": (signs * 10.0 ** rng.uniform(-38, 18, (60, 20, 5))).astype(np.float32)}

    def step(state, grad):
        updates, state = tx.update(grad, state, params)
        return state, updates["w"]

    updates = jax.jit(lambda grads: jax.lax.scan(step, tx.init(params), grads)[1])(grads)
    assert isinstance(tx, optim.Bounded) and np.abs(updates).max() <= largest
    assert optim.adamw(lambda _: 0.5, weight_decay=4.0).size(0) == 2.0


def test_split_by_name_and_copies_that_survive_donation():
    params = {"policy": {"w": jnp.ones(3)}, "reference": {"w": jnp.zeros(3)}}
    trainable, frozen = optim.split(params, ("policy",))
    assert list(trainable) == ["policy"] and list(frozen) == ["reference"]
    with pytest.raises(UserError, match="no parameters named"):
        optim.split(params, ("value",))
    kept = optim.copy(trainable)
    jax.jit(lambda x: jax.tree.map(lambda w: w + 1, x), donate_argnums=0)(trainable)
    np.testing.assert_array_equal(kept["policy"]["w"], 1.0)
