"""The head in tiles: the numbers and gradients of whole logits, without whole logits."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt import losses, vocab_head

B, T, D, V = 2, 11, 8, 37


def inputs(dtype=jnp.float32, B: int = B, T: int = T, D: int = D, V: int = V):
    keys = jax.random.split(jax.random.key(0), 3)
    hidden, head = jax.random.normal(keys[0], (B, T, D), dtype), jax.random.normal(keys[1], (V, D))
    return hidden, head, jax.random.randint(keys[2], (B, T), 0, V)


def whole(hidden, head, temperature=1.0):
    logits = jnp.einsum("btd,vd->btv", hidden, head.astype(hidden.dtype), preferred_element_type=jnp.float32)
    return logits / temperature


def test_outputs_by_hand():
    """Probabilities of 1/2, 1/4 and 1/4 and a normaliser of e^7 for one token; the other is sure of nothing."""
    head = jnp.log(jnp.array([[0.5], [0.25], [0.25]])) * jnp.array([[1.0, 0.0]]) + jnp.array([[7.0, 0.0]])
    out = vocab_head.outputs(jnp.array([[1.0, 0.0], [0.0, 1.0]]), head, jnp.array([1, 2]), tile=1)
    log2, log3 = np.log(2), np.log(3)
    np.testing.assert_allclose(out.logp, [-2 * log2, -log3], rtol=1e-5)
    np.testing.assert_allclose(out.log_z, [7.0, log3], rtol=1e-5)
    np.testing.assert_allclose(out.mean_logp, [-5 / 3 * log2, -log3], rtol=1e-5)
    np.testing.assert_allclose(out.entropy, [1.5 * log2, log3], rtol=1e-5)


@pytest.mark.parametrize("tile", [1, 4, 11, 64])
@pytest.mark.parametrize(("dtype", "rtol"), [(jnp.float32, 1e-5), (jnp.bfloat16, 2e-2)])
def test_values_and_gradients_are_those_of_whole_logits(tile, dtype, rtol):
    hidden, head, tokens = inputs(dtype)
    mask = jnp.arange(T) < jnp.array([[7], [11]])

    def ours(hidden, head):
        return losses.reduce(vocab_head.nll(hidden, head, tokens, tile=tile, temperature=0.7), mask).value

    def plain(hidden, head):
        return losses.reduce(losses.nll(whole(hidden, head, 0.7), tokens), mask).value

    found, expected = (jax.jit(jax.value_and_grad(f, (0, 1)))(hidden, head) for f in (ours, plain))
    for f, e in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert f.dtype == e.dtype
        scale = float(jnp.abs(e).max())
        np.testing.assert_allclose(np.asarray(f, np.float32), np.asarray(e, np.float32), rtol=rtol, atol=rtol * scale)


def test_all_token_losses_can_be_made_of_its_outputs():
    hidden, head, tokens = inputs()
    out, logits = vocab_head.outputs(hidden, head, tokens, tile=4), whole(hidden, head)
    smooth = -0.9 * out.logp - 0.1 * out.mean_logp
    for found, expected in (
        (-out.logp, losses.nll(logits, tokens)),
        (jnp.square(out.log_z), losses.z_loss(logits)),
        (smooth, losses.label_smoothing(logits, tokens, 0.1)),
        (out.entropy, losses.entropy(logits)),
    ):
        np.testing.assert_allclose(found, expected, rtol=2e-5, atol=1e-5)


def test_a_common_offset_of_the_logits_costs_no_digits():
    """A feature that adds 10,000 to every logit, as a bias would."""
    hidden, head, tokens = inputs()
    offset = jnp.concatenate([hidden, jnp.ones((B, T, 1))], 2), jnp.concatenate([head, jnp.full((V, 1), 1e4)], 1)
    found = vocab_head.outputs(*offset, tokens, tile=4).entropy
    np.testing.assert_allclose(found, losses.entropy(whole(*offset)), rtol=1e-4, atol=1e-5)


def test_bfloat16_products_are_accumulated_in_float32():
    """Against float64 of the same bfloat16 numbers: no rounding of the logits, nor of what is made of them."""
    hidden, head, tokens = inputs(jnp.bfloat16, D=256)
    head = head.astype(jnp.bfloat16)
    logits = np.einsum("btd,vd->btv", *(np.asarray(x, np.float64) for x in (hidden, head)))
    logp = (
        logits
        - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
        - logits.max(-1)[..., None]
    )
    expected = np.take_along_axis(logp, np.asarray(tokens)[..., None], -1)[..., 0]
    found = vocab_head.log_prob(hidden, head, tokens, tile=4)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-4)


def test_it_never_holds_the_logits():
    """What the compiler sets aside for the gradient, against one float32 [B, T, V]; and no array of that size."""
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
