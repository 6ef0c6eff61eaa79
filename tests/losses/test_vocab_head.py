"""The tiled head gives the values and gradients of full logits without computing them."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt import losses
from jaxgpt.losses import vocab_head

B, T, D, V = 2, 11, 8, 37
outputs = jax.jit(vocab_head.tiled_head_outputs, static_argnames="tile")


def inputs(D: int = D):
    rng = np.random.default_rng(0)
    hidden, head = (rng.normal(size=shape).astype(np.float32) for shape in ((B, T, D), (V, D)))
    return hidden, head, rng.integers(0, V, (B, T))


def whole(hidden, head, temperature=1.0):
    logits = jnp.einsum("btd,vd->btv", hidden, head.astype(hidden.dtype), preferred_element_type=jnp.float32)
    return logits / temperature


def test_outputs_by_hand():
    """Probabilities of 1/2, 1/4 and 1/4 and a normaliser of e^7 for one token; uniform for the other."""
    head = np.log([[0.5], [0.25], [0.25]]) * [[1.0, 0.0]] + [[7.0, 0.0]]
    out = outputs(np.eye(2, dtype=np.float32), head.astype(np.float32), np.array([1, 2]), tile=1)
    log2, log3 = np.log(2), np.log(3)
    np.testing.assert_allclose(out.logp, [-2 * log2, -log3], rtol=1e-5)
    np.testing.assert_allclose(out.log_z, [7.0, log3], rtol=1e-5)
    np.testing.assert_allclose(out.mean_logp, [-5 / 3 * log2, -log3], rtol=1e-5)
    np.testing.assert_allclose(out.entropy, [1.5 * log2, log3], rtol=1e-5)


@functools.partial(jax.jit, static_argnames="tile")
def value_and_gradients(hidden, head, tokens, mask, tile):
    """Values and gradients of the masked mean, in tiles or (None) from full logits."""

    def loss(hidden, head):
        if tile is None:
            nll = losses.nll(whole(hidden, head, 0.7), tokens)
        else:
            nll = vocab_head.nll(hidden, head, tokens, tile=tile, temperature=0.7)
        return losses.reduce(nll, mask).value

    return jax.value_and_grad(loss, (0, 1))(hidden, head)


@pytest.mark.parametrize("tile", [4, *(pytest.param(tile, marks=pytest.mark.slow) for tile in (1, 11, 64))])
@pytest.mark.parametrize(("dtype", "rtol"), [("float32", 1e-5), ("bfloat16", 2e-2)])
def test_values_and_gradients_are_those_of_whole_logits(tile, dtype, rtol):
    hidden, head, tokens = inputs()
    mask = np.arange(T) < np.array([[7], [11]])
    arguments = hidden.astype(dtype), head, tokens, mask
    found, expected = value_and_gradients(*arguments, tile=tile), value_and_gradients(*arguments, tile=None)
    for f, e in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert f.dtype == e.dtype
        f, e = (np.asarray(x, np.float32) for x in (f, e))
        np.testing.assert_allclose(f, e, rtol=rtol, atol=rtol * np.abs(e).max())


@jax.jit
def of_whole_logits(hidden, head, tokens):
    logits = whole(hidden, head)
    smooth = losses.label_smoothing(logits, tokens, 0.1)
    return losses.nll(logits, tokens), losses.z_loss(logits), smooth, losses.entropy(logits)


def test_all_token_losses_can_be_made_of_its_outputs():
    hidden, head, tokens = inputs()
    logp, log_z, mean_logp, entropy = (np.asarray(x) for x in outputs(hidden, head, tokens, tile=11))
    found = -logp, log_z**2, -0.9 * logp - 0.1 * mean_logp, entropy
    for ours, expected in zip(found, of_whole_logits(hidden, head, tokens), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=2e-5, atol=1e-5)


def test_a_common_offset_of_the_logits_costs_no_digits():
    """A feature that adds 10,000 to every logit, as a bias would."""
    hidden, head, tokens = inputs()
    hidden = np.concatenate([hidden, np.ones((B, T, 1), np.float32)], 2)
    head = np.concatenate([head, np.full((V, 1), 1e4, np.float32)], 1)
    found = outputs(hidden, head, tokens, tile=4).entropy
    np.testing.assert_allclose(found, of_whole_logits(hidden, head, tokens)[3], rtol=1e-4, atol=1e-5)


def test_bfloat16_products_are_accumulated_in_float32():
    """Against float64 of the same bfloat16 numbers: neither the logits nor the results are rounded."""
    hidden, head, tokens = inputs(D=256)
    hidden, head = hidden.astype("bfloat16"), head.astype("bfloat16")
    logits = np.einsum("btd,vd->btv", *(np.asarray(x, np.float64) for x in (hidden, head)))
    logp = (
        logits
        - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
        - logits.max(-1)[..., None]
    )
    expected = np.take_along_axis(logp, tokens[..., None], -1)[..., 0]
    found = outputs(hidden, head, tokens, tile=64).logp
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-4)


def test_it_never_holds_the_logits():
    """Memory the compiler allocates for the gradient, against one float32 [B, T, V]; and no array of that size."""
    shape = {"B": 4, "T": 512, "D": 32, "V": 4096}
    B, T, D, V = shape.values()
    args = [
        jax.ShapeDtypeStruct((B, T, D), jnp.float32),
        jax.ShapeDtypeStruct((V, D), jnp.float32),
        jax.ShapeDtypeStruct((B, T), jnp.int32),
    ]

    def compiled(nll):
        return jax.jit(jax.grad(lambda *x: nll(*x).mean(), (0, 1))).lower(*args).compile()

    def largest(program) -> int:
        shapes = re.findall(r"\b[a-z]+\d+\[([\d,]+)\]", program.as_text())  # of any type
        return max(np.prod([int(n) for n in dims.split(",")]) for dims in shapes)

    tiled = compiled(lambda h, w, t: vocab_head.nll(h, w, t, tile=16))
    plain = compiled(lambda h, w, t: losses.nll(whole(h, w), t))
    logits = B * T * V
    assert plain.memory_analysis().temp_size_in_bytes >= 4 * logits and largest(plain) >= logits
    assert tiled.memory_analysis().temp_size_in_bytes < 4 * logits / 4 and largest(tiled) < logits / 4


def test_a_transposed_head_is_named():
    hidden, head, tokens = inputs()
    with pytest.raises(ValueError, match=r"`head` is float32\[8, 37\]; expected float \[V, D\] with D = 8 as in `hid"):
        vocab_head.nll(hidden, head.T, tokens)


def total(outputs, weights):
    """A loss that uses every output, differently at every token."""
    return sum((w * x).sum() for w, x in zip(weights, outputs, strict=True))


@pytest.mark.parametrize("tile", [1, 4, 128])
def test_the_gradient_of_a_bfloat16_table_is_that_of_float64_to_0_3_percent(tile):
    """NLL, entropy and z-loss at 128 positions, in 128, 32 tiles and 1: the tiles' gradients are not rounded apart."""
    B, T, D, V = 4, 128, 32, 301
    rng = np.random.default_rng(0)
    hidden, head = (rng.normal(size=shape).astype("bfloat16") for shape in ((B, T, D), (V, D)))
    tokens, weights = rng.integers(0, V, (B, T)), rng.normal(size=(4, B, T)).astype(np.float32)

    def gradient(hidden, head):
        return jax.grad(lambda *x: total(vocab_head.tiled_head_outputs(*x, tokens, tile=tile), weights), (0, 1))(
            hidden, head
        )

    found = jax.jit(gradient)(hidden, head.astype(np.float32))  # as trainers do: the table is float32
    h, w = np.asarray(hidden, np.float64), np.asarray(head, np.float64)
    logits = h @ w.T
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    p, one_hot = np.exp(logp), np.eye(V)[tokens]
    entropy = -(p * logp).sum(-1, keepdims=True)
    a, b, c, d = (x[..., None].astype(np.float64) for x in weights)
    slope = a * (one_hot - p) + b * p + c * (1 / V - p) - d * p * (logp + entropy)
    for ours, exact in zip(found, (slope @ w, np.einsum("btv,btd->vd", slope, h)), strict=True):
        assert np.linalg.norm(np.asarray(ours, np.float64) - exact) < 0.003 * np.linalg.norm(exact)


def test_every_product_of_the_backward_pass_has_operands_in_the_dtype_of_the_hidden_states():
    args = [jnp.zeros((2, 8, 16), jnp.bfloat16), jnp.zeros((32, 16)), jnp.zeros((2, 8), jnp.int32)]
    text = jax.jit(jax.value_and_grad(lambda *x: vocab_head.nll(*x, tile=4).sum(), (0, 1))).lower(*args).as_text()
    products = re.findall(r"dot_general .*: \((.*)\) -> (.*)", text)
    assert len(products) == 4  # forward, recomputed, and one for each gradient
    assert all(x.count("bf16") == 2 for x, _ in products) and all("f32" in result for _, result in products)
    assert "scatter" not in text


def test_the_temperature_has_a_gradient_too():
    hidden, head, tokens = inputs()

    def slope(t, gradients):
        found = vocab_head.tiled_head_outputs(hidden, head, tokens, tile=4, temperature=t, gradients=gradients)
        return total(found, np.cos(np.arange(4 * B * T)).reshape(4, B, T))

    own, plain = (jax.jit(jax.grad(slope), static_argnums=1)(0.7, gradients) for gradients in ("auto", "plain"))
    np.testing.assert_allclose(own, plain, rtol=1e-4)


def test_plain_gradients_have_a_forward_mode():
    hidden, head, tokens = inputs()

    def loss(x, gradients):
        return vocab_head.tiled_head_outputs(x, head, tokens, tile=4, gradients=gradients).logp.sum()

    _, along = jax.jvp(lambda x: loss(x, "plain"), (hidden,), (hidden,))
    np.testing.assert_allclose(along, (jax.grad(loss)(hidden, "auto") * hidden).sum(), rtol=1e-4)
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(lambda x: loss(x, "auto"), (hidden,), (hidden,))
