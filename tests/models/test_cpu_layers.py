"""Hand-written gradients equal JAX's own; so do those of rematerialised and scanned layers."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import keystr, tree_leaves_with_path

from jaxgpt import losses
from jaxgpt.config import ModelConfig
from jaxgpt.errors import UserError
from jaxgpt.models import cpu_layers, layers, transformer
from jaxgpt.structs import Batch
from tests.helpers import TINY, random_params, tokens_of

B, T, D, F, H, K = 3, 10, 16, 24, 2, 8


SEGMENTS = np.tile(np.where(np.arange(T) < 4, 1, 2), (B, 1))


def draw(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


CASES = {
    "dense": lambda of, x, y: of.dense({"kernel": y, "bias": y[0]}, x, layers.COLUMN_PARALLEL),
    "dense, no bias": lambda of, x, y: of.dense({"kernel": y}, x, layers.COLUMN_PARALLEL),
    "dense, adapters": lambda of, x, y: of.dense(
        {"kernel": y, "bias": y[0], "lora_a": jnp.tanh(y[:, :4]), "lora_b": jnp.sin(y[:4])}, x, layers.COLUMN_PARALLEL
    ),
    "rms norm": lambda of, x, y: of.norm({"scale": y[0, :D]}, 3.0 * x + 1.0, 1e-5),
    "swiglu": lambda of, x, y: of.swiglu(x, jnp.flip(x, axis=0) * 2),
    "norm": lambda of, x, y: of.norm({"scale": y[0, :D], "bias": y[1, :D]}, 3.0 * x + 1.0, 1e-5),
    "gelu": lambda of, x, y: of.gelu(x),
    "attend": lambda of, x, y: of.attend(*attention_inputs(x, y), None),
    "attend, segments and shared keys": lambda of, x, y: of.attend(*shared_keys(*attention_inputs(x, y)), SEGMENTS),
    "product_VD": lambda of, x, y: of.product_VD(x, y.T),
}


def attention_inputs(x, y):
    mixed = jnp.tanh(x @ y.astype(x.dtype))
    return (part.reshape(B, T, H, K) for part in (x, mixed[..., :D], mixed[..., -D:]))


def shared_keys(q, k, v):
    return q, k[:, :, :1], v[:, :, :1]


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_are_those_of_the_plain_formula(name):
    """float32 to 1e-5; bfloat16 as close to the float32 gradients as JAX's own."""

    def outcome(of, dtype, x, y):
        out, back = jax.vjp(lambda x, y: CASES[name](of, x.astype(dtype), y).astype(jnp.float32), x, y)
        return out, *back(draw(2, *out.shape))

    @jax.jit
    def outcomes(x, y):
        return [
            outcome(of, dtype, x, y)
            for dtype in ("float32", "bfloat16")
            for of in (layers.plain_layers("cpu"), cpu_layers.CPU_LAYERS)
        ]

    found = jax.device_get(outcomes(draw(0, B, T, D), draw(1, D, F) / 4))
    for part, exact, fast, rough, fast_rough in zip(("value", "dx", "dy"), *found, strict=True):
        size = np.abs(exact).max()
        allowed = 0.01 * size + 1.5 * np.abs(rough - exact).max()
        np.testing.assert_allclose(fast, exact, atol=1e-5 * size + 1e-7, err_msg=f"{part}, float32")
        np.testing.assert_allclose(fast_rough, exact, atol=allowed + 1e-7, err_msg=f"{part}, bfloat16")


def batch(*, packed: bool) -> Batch:
    """Four rows; the last two hold two examples each if packed."""
    tokens, t = np.asarray(tokens_of(4, 12)), np.broadcast_to(np.arange(12), (4, 12))
    if not packed:
        return Batch(tokens, t > 0)
    second = (t >= 7) & (np.arange(4) >= 2)[:, None]
    positions = np.where(second, t - 7, t)
    return Batch(tokens, positions > 0, np.where(second, 2, 1), positions)


@functools.cache
def outcome(config: ModelConfig, *, packed: bool, key: int | None = None) -> dict[str, np.ndarray]:
    """Loss and gradients, by name."""
    rows = batch(packed=packed)

    def loss(params, key):
        logp_BT, _ = transformer.token_log_probs(params, config, rows, key=key)
        return losses.reduce(-logp_BT, rows.mask_BT).value

    key = None if key is None else jax.random.key(key)
    value, slope = jax.jit(jax.value_and_grad(loss))(random_params(scale=2.0), key)
    return {"loss": np.asarray(value), **{keystr(path): np.asarray(x) for path, x in tree_leaves_with_path(slope)}}


def assert_same(found, expected, rtol=1e-5):
    assert found.keys() == expected.keys()
    for name, want in expected.items():
        atol = rtol * np.abs(want).max() + 1e-9
        np.testing.assert_allclose(found[name], want, rtol=rtol, atol=atol, err_msg=name)


@pytest.mark.parametrize(
    "change", [{"remat": "full"}, {"remat": "dots"}, {"scan": True}, {"gradients": "auto"}], ids=str
)
def test_a_model_computed_otherwise_has_the_same_loss_and_gradients(change):
    plain = dataclasses.replace(TINY, gradients="plain")
    assert_same(outcome(dataclasses.replace(plain, **change), packed=True), outcome(plain, packed=True))


def test_scanned_and_rematerialised_layers_drop_the_same():
    config = dataclasses.replace(TINY, dropout=0.2)
    scanned = dataclasses.replace(config, scan=True, remat="full")
    assert_same(outcome(scanned, packed=False, key=3), outcome(config, packed=False, key=3))


def test_rematerialised_layers_keep_less():
    """Memory kept for the backward pass: less with "dots", least with "full"."""
    params = jax.eval_shape(random_params)

    def kept(remat):
        config = dataclasses.replace(TINY, remat=remat, gradients="plain")
        tokens = np.zeros((4, 40), np.int32)
        left = jax.eval_shape(lambda p: jax.vjp(lambda p: transformer.hidden(p, config, tokens), p)[1], params)
        return sum(x.size for x in jax.tree.leaves(left))

    assert kept("full") < kept("dots") < kept("none")


def test_forward_mode_through_hand_written_gradients_names_the_setting():
    """Also in a compiled program, and for derivatives of gradients; reverse mode and vmap combine as ever."""

    def total(x):
        return cpu_layers.CPU_LAYERS.gelu(x).sum()

    x, both = np.ones(3, np.float32), np.ones((2, 3), np.float32)
    slope = functools.partial(jax.jvp, total, (x,))
    refused = (slope, jax.jit(slope).lower, jax.jit(lambda t: jax.jvp(jax.jit(total), (x,), t)).lower)
    for derivative in (*refused, lambda t: jax.jacfwd(total)(*t), lambda t: jax.hessian(total)(*t)):
        with pytest.raises(UserError, match='gradients="plain"'):
            derivative((x,))
    jax.jit(jax.vmap(jax.grad(total))).lower(both)
    jax.jit(jax.grad(lambda both: jax.vmap(total)(both).sum())).lower(both)


def test_plain_gradients_allow_forward_mode():
    config = dataclasses.replace(TINY, layers=1, gradients="plain")

    @jax.jit
    def slopes(params):
        def total(params):
            return transformer.token_log_probs(params, config, Batch(tokens_of(1, 6), np.ones((1, 6), bool)))[0].sum()

        return jax.jvp(total, (params,), (params,))[1], jax.grad(total)(params)

    params = random_params(config)
    forward, backward = slopes(params)
    inner = sum(np.vdot(x, y) for x, y in zip(jax.tree.leaves(params), jax.tree.leaves(backward), strict=True))
    assert float(forward) == pytest.approx(float(inner), rel=1e-4)


@pytest.mark.parametrize("change", [{"gradients": "quick"}, {"remat": "some"}])
def test_unknown_choices_are_refused(change):
    with pytest.raises(UserError, match="choose"):
        ModelConfig(**change)
