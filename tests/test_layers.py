"""Gradients written by hand equal JAX's own; so do rematerialised and scanned layers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt import layers, losses, model
from jaxgpt.config import ModelConfig, UserError
from jaxgpt.structs import Batch
from tests.helpers import TINY, batch_of, params_of

B, T, D, F, H, K = 3, 10, 16, 24, 2, 8


def draw(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def segments():
    return jnp.where(jnp.arange(T) < 4, 1, 2) * jnp.ones((B, 1), jnp.int32)


CASES = {
    "dense": lambda of, x, y: of.dense({"kernel": y, "bias": y[0]}, x, layers.COLUMNS),
    "dense, no bias": lambda of, x, y: of.dense({"kernel": y}, x, layers.COLUMNS),
    "dense, adapters": lambda of, x, y: of.dense(
        {"kernel": y, "bias": y[0], "lora_a": jnp.tanh(y[:, :4]), "lora_b": jnp.sin(y[:4])}, x, layers.COLUMNS
    ),
    "rms norm": lambda of, x, y: of.norm({"scale": y[0, :D]}, 3.0 * x + 1.0, 1e-5),
    "swiglu": lambda of, x, y: of.swiglu(x, jnp.flip(x, axis=0) * 2),
    "norm": lambda of, x, y: of.norm({"scale": y[0, :D], "bias": y[1, :D]}, 3.0 * x + 1.0, 1e-5),
    "gelu": lambda of, x, y: of.gelu(x),
    "attend": lambda of, x, y: of.attend(*attention_inputs(x, y), None),
    "attend, shared keys": lambda of, x, y: of.attend(*shared_keys(*attention_inputs(x, y)), segments()),
    "attend, segments": lambda of, x, y: of.attend(*attention_inputs(x, y), segments()),
    "product_VD": lambda of, x, y: of.product_VD(x, y.T),
}


def attention_inputs(x, y):
    mixed = jnp.tanh(x @ y.astype(x.dtype))
    return (part.reshape(B, T, H, K) for part in (x, mixed[..., :D], mixed[..., -D:]))


def shared_keys(q, k, v):
    return q, k[:, :, :1], v[:, :, :1]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_values_and_gradients_are_those_of_the_plain_formula(name, dtype):
    """float32 to 1e-5; bfloat16 as near to the float32 gradients as JAX's own are."""
    x, y = draw(0, B, T, D), draw(1, D, F) / 4

    def outcome(of, dtype):
        def loss(x, y):
            out = CASES[name](of, x.astype(dtype), y).astype(jnp.float32)
            return (out * draw(2, *out.shape)).sum(), out

        (_, out), grads = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(x, y)
        return out, *grads

    exact, plain, fast = outcome(layers.PLAIN, "float32"), outcome(layers.PLAIN, dtype), outcome(layers.FAST, dtype)
    for want, near, found in zip(exact, plain, fast, strict=True):
        size = float(jnp.abs(want).max())
        allowed = 1e-5 if dtype == "float32" else 0.01 + 1.5 * float(jnp.abs(near - want).max()) / max(size, 1e-6)
        np.testing.assert_allclose(found, want, atol=allowed * size + 1e-7)


def gradients(config, batch, key=None):
    def loss(params):
        logp_BT, _ = model.score(params, config, batch, key=key)
        return losses.reduce(-logp_BT, batch.mask_BT).value

    return jax.jit(jax.value_and_grad(loss))(params_of(scale=2.0))


def assert_same(a, b, rtol=1e-5):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=rtol, atol=rtol * float(jnp.abs(y).max()) + 1e-9)


PACKED = Batch(
    batch_of(2, 12).tokens_BT,
    jnp.ones((2, 12), bool).at[:, jnp.array([0, 7])].set(False),
    jnp.where(jnp.arange(12) < 7, 1, 2) * jnp.ones((2, 1), jnp.int32),
    jnp.where(jnp.arange(12) < 7, jnp.arange(12), jnp.arange(12) - 7) * jnp.ones((2, 1), jnp.int32),
)


@pytest.mark.parametrize("batch", [batch_of(3, 12), PACKED], ids=["rows", "packed"])
@pytest.mark.parametrize(
    "change",
    [{"remat": "full"}, {"remat": "dots"}, {"scan": True}, {"scan": True, "remat": "full"}, {"gradients": "auto"}],
    ids=str,
)
def test_a_model_computed_otherwise_has_the_same_loss_and_gradients(change, batch):
    plain = dataclasses.replace(TINY, gradients="plain")
    assert_same(gradients(dataclasses.replace(plain, **change), batch), gradients(plain, batch))


def test_dropout_is_the_same_for_scanned_and_unrolled_layers():
    config = dataclasses.replace(TINY, dropout=0.2)
    key = jax.random.key(3)
    scanned = dataclasses.replace(config, scan=True, remat="full")
    assert_same(gradients(scanned, batch_of(3, 12), jax.random.clone(key)), gradients(config, batch_of(3, 12), key))


def test_rematerialised_layers_keep_less():
    """What the forward pass leaves for the backward pass: less with "dots", least with "full"."""
    batch = batch_of(4, 40)

    def kept(remat):
        config = dataclasses.replace(TINY, remat=remat, layers=4, gradients="plain")
        shapes = jax.eval_shape(
            lambda p: jax.vjp(lambda p: model.hidden(p, config, batch.tokens_BT), p)[1], params_of(config)
        )
        return sum(x.size for x in jax.tree.leaves(shapes))

    assert kept("full") < kept("dots") < kept("none")


def test_plain_gradients_allow_forward_mode():
    config, batch = dataclasses.replace(TINY, gradients="plain"), batch_of(1, 6)
    params = params_of(config)
    total = jax.jit(lambda p: model.score(p, config, batch)[0].sum())
    slope = jax.jvp(total, (params,), (params,))[1]
    grads = jax.grad(total)(params)
    inner = sum(jnp.vdot(x, y) for x, y in zip(jax.tree.leaves(params), jax.tree.leaves(grads), strict=True))
    assert float(slope) == pytest.approx(float(inner), rel=1e-4)


@pytest.mark.parametrize("change", [{"gradients": "quick"}, {"remat": "some"}])
def test_unknown_choices_are_refused(change):
    with pytest.raises(UserError, match="choose"):
        ModelConfig(**change)
