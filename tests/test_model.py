"""The forward pass: causal, indifferent to padding, packing and compilation."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt import model
from jaxgpt.config import ModelConfig, UserError
from jaxgpt.structs import Batch
from tests.helpers import TINY, batch_of, hidden, params_of, score, tokens_of


def test_each_position_depends_on_itself_and_the_past_only():
    params, tokens = params_of(), tokens_of(1, 10)
    weights_D = jax.random.normal(jax.random.key(8), (TINY.width,))  # a plain sum over a normalised vector is constant

    def output(change_TD, t):  # a perturbation of each input embedding, by way of positions
        moved = {
            **params,
            "embed": {**params["embed"], "positions_TD": params["embed"]["positions_TD"].at[:10].add(change_TD)},
        }
        return hidden(moved, TINY, tokens)[0, t] @ weights_D

    for t in (0, 4, 9):
        slope_TD = jax.grad(output)(jnp.zeros((10, TINY.width)), t)
        reach_T = np.abs(slope_TD).max(axis=1)
        assert (reach_T[: t + 1] > 0).all(), "the past must matter"
        assert (reach_T[t + 1 :] == 0).all(), "the future must not"


def test_log_probs_are_a_distribution_over_the_next_token():
    params = params_of()
    start = tokens_of(1, 5)
    total = 0.0
    for v in range(TINY.vocab):
        row = jnp.concatenate([start, jnp.array([[v]])], axis=1)
        logp_BT, _ = score(params, TINY, Batch(row, row > 0))
        total += float(jnp.exp(logp_BT[0, -1]))
    assert total == pytest.approx(1.0, abs=1e-5)
    assert float(logp_BT[0, 0]) == 0.0


def test_forward_equals_a_float64_reference():
    params, tokens = params_of(), tokens_of(2, 12)
    expected = _reference_logits(jax.tree.map(lambda w: np.asarray(w, np.float64), params), TINY, np.asarray(tokens))
    found = model.unembed(params, hidden(params, TINY, tokens))
    np.testing.assert_allclose(found, expected, rtol=2e-4, atol=2e-4)


def test_padding_behind_a_row_changes_nothing():
    params, batch = params_of(), batch_of(3, 12)
    logp, h = score(params, TINY, batch)
    padded = Batch(jnp.pad(batch.tokens_BT, ((0, 0), (0, 7))), jnp.pad(batch.mask_BT, ((0, 0), (0, 7))))
    padded_logp, padded_h = score(params, TINY, padded)
    np.testing.assert_allclose(padded_logp[:, :12], logp, atol=1e-5)
    np.testing.assert_allclose(padded_h[:, :12], h, atol=1e-4)


def test_packed_rows_equal_unpacked_ones():
    params = params_of()
    a, b = tokens_of(1, 9, seed=1), tokens_of(1, 6, seed=2)
    packed = Batch(
        jnp.concatenate([a, b], axis=1), jnp.ones((1, 15), bool),
        segments_BT=jnp.array([[1] * 9 + [2] * 6]), positions_BT=jnp.array([[*range(9), *range(6)]]),
    )  # fmt: skip
    logp, _ = score(params, TINY, packed)
    for row, part in ((a, logp[0, 1:9]), (b, logp[0, 10:])):
        alone, _ = score(params, TINY, Batch(row, row > 0))
        np.testing.assert_allclose(part, alone[0, 1:], atol=1e-5)


@pytest.mark.parametrize("window", [7, 9, 15, 40])
def test_a_window_around_the_answer_gives_the_same_log_probs_and_gradients(window):
    params, batch = params_of(), batch_of(4, 16)
    start, t = jnp.array([1, 3, 6, 9])[:, None], jnp.arange(16)
    batch = Batch(batch.tokens_BT, (t >= start) & (t < start + 7))

    def total(params, window):
        logp, _ = model.score(params, TINY, batch, window=window)
        return jnp.where(batch.mask_BT, jnp.sin(logp), 0.0).sum(), logp

    slope = jax.jit(jax.grad(total, has_aux=True), static_argnums=1)
    (whole, logp), (part, window_logp) = slope(params, None), slope(params, window)
    np.testing.assert_allclose(jnp.where(batch.mask_BT, window_logp - logp, 0.0), 0.0, atol=1e-5)
    assert window >= 15 or (np.asarray(window_logp)[np.asarray(t < start)] == 0).all()
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(part), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


def test_temperature_divides_the_logits():
    params, batch = params_of(), batch_of(2, 8)
    logp, h = score(params, TINY, batch, temperature=0.5)
    logits = np.asarray(model.unembed(params, h), np.float64)[:, :-1] / 0.5
    expected = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
    picked = np.take_along_axis(expected, np.asarray(batch.tokens_BT)[:, 1:, None], axis=-1)[..., 0]
    np.testing.assert_allclose(logp[:, 1:], picked, atol=1e-4)


def test_bfloat16_is_close_to_float32():
    params, batch = params_of(scale=1.0), batch_of(2, 16)
    exact, _ = score(params, TINY, batch)
    rough, h = score(params, dataclasses.replace(TINY, dtype="bfloat16"), batch)
    assert h.dtype == jnp.bfloat16 and rough.dtype == jnp.float32
    np.testing.assert_allclose(rough, exact, atol=0.03)


def test_dropout_needs_a_key_and_keeps_the_mean(strict):
    config = dataclasses.replace(TINY, dropout=0.5)
    params, tokens = params_of(), tokens_of(2, 8)
    np.testing.assert_array_equal(hidden(params, config, tokens), hidden(params, TINY, tokens))
    drop = jax.jit(lambda key: hidden(params, config, tokens, key=key))
    a, b = (drop(jax.random.key(seed)) for seed in (0, 1))
    assert float(jnp.abs(a - b).max()) > 0.1
    x = model.dropout(jax.random.key(2), 0.5, jnp.ones(20_000))
    assert float(x.mean()) == pytest.approx(1.0, abs=0.03)


def test_rows_longer_than_the_block_are_refused():
    with pytest.raises(UserError, match="49 tokens don't fit the model's block of 48"):
        hidden(params_of(), TINY, tokens_of(1, 49))


@pytest.mark.parametrize("change", [{"width": 33}, {"layers": 0}, {"dropout": 1.0}, {"dtype": "float16"}])
def test_impossible_configurations_are_refused(change):
    with pytest.raises(UserError):
        dataclasses.replace(TINY, **change)


def test_at_last_token_reads_the_last_masked_position():
    x = jnp.arange(12.0).reshape(2, 6)
    mask = jnp.array([[0, 1, 1, 0, 0, 0], [0, 0, 1, 1, 1, 1]], bool)
    np.testing.assert_array_equal(model.at_last_token(x, mask), [2.0, 11.0])


def test_value_head_is_exactly_zero_and_reward_head_has_the_stated_scale():
    h = jax.random.normal(jax.random.key(0), (3, 4, 2000))
    assert (model.apply_scalar_head(model.scalar_head(None, 2000), h) == 0).all()
    head = model.scalar_head(jax.random.key(1), 2000)
    assert float(head["kernel_D"].std()) == pytest.approx(1 / np.sqrt(2001), rel=0.05)


def _reference_logits(p: dict, config: ModelConfig, tokens: np.ndarray) -> np.ndarray:
    """The same GPT-2 in NumPy, float64, with explicit loops over heads."""
    B, T = tokens.shape
    H, K = config.heads, config.head_dim

    def norm(layer, x):
        centred = x - x.mean(-1, keepdims=True)
        return (
            centred / np.sqrt((centred**2).mean(-1, keepdims=True) + config.norm_epsilon) * layer["scale"]
            + layer["bias"]
        )

    def dense(layer, x):
        return x @ layer["kernel"] + layer["bias"]

    x = p["embed"]["tokens_VD"][tokens] + p["embed"]["positions_TD"][:T]
    for n in range(config.layers):
        block = p[f"block_{n}"]
        qkv = dense(block["qkv"], norm(block["attention_norm"], x))
        q, k, v = np.moveaxis(qkv.reshape(B, T, H, 3, K), 3, 0).reshape(3, B, T, H * K)
        mixed = np.zeros_like(x)
        for head in range(H):
            part = slice(head * K, (head + 1) * K)
            scores = q[..., part] @ k[..., part].swapaxes(1, 2) / np.sqrt(K)
            scores = np.where(np.tril(np.ones((T, T), bool)), scores, -np.inf)
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            mixed[..., part] = weights / weights.sum(-1, keepdims=True) @ v[..., part]
        x = x + dense(block["out"], mixed)
        u = dense(block["up"], norm(block["mlp_norm"], x))
        u = 0.5 * u * (1 + np.tanh(np.sqrt(2 / np.pi) * (u + 0.044715 * u**3)))
        x = x + dense(block["down"], u)
    return norm(p["final_norm"], x) @ p["embed"]["tokens_VD"].T
