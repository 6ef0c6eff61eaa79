"""The forward pass: causal, indifferent to padding, packing and compilation."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt import model
from jaxgpt.config import PRESETS, ModelConfig, UserError
from jaxgpt.structs import Batch
from tests.helpers import FAMILY, TINY, batch_of, hidden, params_of, score, tokens_of

family = pytest.mark.parametrize("config", FAMILY.values(), ids=FAMILY)


@family
def test_each_position_depends_on_itself_and_the_past_only(config):
    params, tokens = (
        params_of(config),
        jnp.arange(10)[None],
    )  # every token once, so that its embedding is one position's
    weights_D = jax.random.normal(
        jax.random.key(8), (config.width,)
    )  # a plain sum over a normalised vector is constant

    @jax.jit
    def slopes(change_TD):
        table = params["embed"]["tokens_VD"].at[:10].add(change_TD)
        moved = {**params, "embed": {**params["embed"], "tokens_VD": table}}
        return model.hidden(moved, config, tokens)[0] @ weights_D

    reach_TT = np.abs(jax.jacrev(slopes)(jnp.zeros((10, config.width)))).max(axis=2)
    assert (reach_TT[np.tril_indices(10)] > 0).all(), "the past must matter"
    assert (reach_TT[np.triu_indices(10, 1)] == 0).all(), "the future must not"


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


@family
@pytest.mark.parametrize("gradients", ["auto", "plain"])
def test_forward_equals_a_float64_reference(config, gradients):
    params, tokens = params_of(config), tokens_of(2, 40)
    expected = _reference_logits(jax.tree.map(lambda w: np.asarray(w, np.float64), params), config, np.asarray(tokens))
    found = model.unembed(params, hidden(params, dataclasses.replace(config, gradients=gradients), tokens))
    np.testing.assert_allclose(found, expected, rtol=2e-4, atol=2e-4)


@family
def test_the_count_of_parameters_is_what_init_makes(config):
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), config))
    positions = shapes["embed"].pop("positions_TD").size if config.positions == "learned" else 0
    assert model.count_parameters(shapes) == config.parameters and (positions > 0) == (config.positions == "learned")


@family
def test_padding_behind_a_row_changes_nothing(config):
    params, batch = params_of(config), batch_of(3, 12)
    logp, h = score(params, config, batch)
    padded = Batch(jnp.pad(batch.tokens_BT, ((0, 0), (0, 7))), jnp.pad(batch.mask_BT, ((0, 0), (0, 7))))
    padded_logp, padded_h = score(params, config, padded)
    np.testing.assert_allclose(padded_logp[:, :12], logp, atol=1e-5)
    np.testing.assert_allclose(padded_h[:, :12], h, atol=1e-4)


@family
def test_packed_rows_equal_unpacked_ones(config):
    params = params_of(config)
    a, b = tokens_of(1, 9, seed=1), tokens_of(1, 6, seed=2)
    packed = Batch(
        jnp.concatenate([a, b], axis=1), jnp.ones((1, 15), bool),
        segments_BT=jnp.array([[1] * 9 + [2] * 6]), positions_BT=jnp.array([[*range(9), *range(6)]]),
    )  # fmt: skip
    logp, _ = score(params, config, packed)
    for row, part in ((a, logp[0, 1:9]), (b, logp[0, 10:])):
        alone, _ = score(params, config, Batch(row, row > 0))
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


@family
def test_bfloat16_is_close_to_float32(config):
    params, batch = params_of(config, scale=1.0), batch_of(2, 16)
    exact, _ = score(params, config, batch)
    rough, h = score(params, dataclasses.replace(config, dtype="bfloat16"), batch)
    assert h.dtype == jnp.bfloat16 and rough.dtype == jnp.float32
    np.testing.assert_allclose(rough, exact, atol=0.03)


def test_dropout_needs_a_key_and_keeps_the_mean():
    config = dataclasses.replace(TINY, dropout=0.5)
    params, tokens = params_of(), tokens_of(2, 8)
    np.testing.assert_array_equal(hidden(params, config, tokens), hidden(params, TINY, tokens))
    with jax.numpy_dtype_promotion("strict"):
        drop = jax.jit(lambda key: hidden(params, config, tokens, key=key))
        a, b = (drop(jax.random.key(seed)) for seed in (0, 1))
    assert float(jnp.abs(a - b).max()) > 0.1
    x = model.dropout(jax.random.key(2), 0.5, jnp.ones(20_000))
    assert float(x.mean()) == pytest.approx(1.0, abs=0.03)


def test_rows_longer_than_the_block_are_refused():
    with pytest.raises(UserError, match="49 tokens don't fit the model's block of 48"):
        hidden(params_of(), TINY, tokens_of(1, 49))


@pytest.mark.parametrize(
    "change",
    [
        {"width": 33}, {"layers": 0}, {"dropout": 1.0}, {"dtype": "float16"}, {"kv_heads": 3}, {"mlp_width": -1},
        {"positions": "rotary", "width": 6}, {"rope_theta": 0.0}, {"norm": "batch"},
    ],
    ids=str,
)  # fmt: skip
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


@pytest.mark.parametrize(("name", "millions"), [("gpt", 116.6), ("gpt2", 124.5), ("smollm2-135m", 134.5)])
def test_presets_have_their_models_sizes(name, millions):
    """GPT's and GPT-2's tables are padded to a multiple of 128 rows."""
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), PRESETS[name]))
    assert model.count_parameters(shapes) / 1e6 == pytest.approx(millions, abs=0.1)


def _reference_logits(p: dict, config: ModelConfig, tokens: np.ndarray) -> np.ndarray:
    """The same models in NumPy, float64, with explicit loops over heads and rotations as complex numbers."""
    B, T = tokens.shape
    H, G, K = config.heads, config.groups, config.head_dim

    def norm(layer, x):
        if config.norm == "layer":
            x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + config.norm_epsilon) * layer["scale"] + layer.get("bias", 0)

    def dense(layer, x):
        return x @ layer["kernel"] + layer.get("bias", 0)

    def turned(x):  # [B, T, K]
        if config.positions != "rotary":
            return x
        speed = config.rope_theta ** (-2 * np.arange(K // 2) / K)
        for i, one in enumerate(speed):
            wavelength = 2 * np.pi / one
            if config.rope_factor > 1 and wavelength > config.rope_block:
                speed[i] = one / config.rope_factor
            elif config.rope_factor > 1 and wavelength > config.rope_block / 4:
                share = (config.rope_block / wavelength - 1) / 3
                speed[i] = (1 - share) * one / config.rope_factor + share * one
        z = (x[..., : K // 2] + 1j * x[..., K // 2 :]) * np.exp(1j * np.arange(T)[:, None] * speed)
        return np.concatenate([z.real, z.imag], axis=-1)

    def attention(block, x):
        qkv = dense(block["qkv"], x).reshape(B, T, G, H // G + 2, K)
        mixed = np.zeros((B, T, H * K))
        for head in range(H):
            group, place = divmod(head, H // G)
            q, k, v = turned(qkv[:, :, group, place]), turned(qkv[:, :, group, -2]), qkv[:, :, group, -1]
            scores = np.where(np.tril(np.ones((T, T), bool)), q @ k.swapaxes(1, 2) / np.sqrt(K), -np.inf)
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            mixed[..., head * K : (head + 1) * K] = weights / weights.sum(-1, keepdims=True) @ v
        return dense(block["out"], mixed)

    def mlp(block, x):
        u = dense(block["up"], x)
        if config.mlp == "swiglu":
            gate = dense(block["gate"], x)
            return dense(block["down"], gate / (1 + np.exp(-gate)) * u)
        return dense(block["down"], 0.5 * u * (1 + np.tanh(np.sqrt(2 / np.pi) * (u + 0.044715 * u**3))))

    x = p["embed"]["tokens_VD"][tokens]
    if config.positions == "learned":
        x = x + p["embed"]["positions_TD"][:T]
    for n in range(config.layers):
        block = p[f"block_{n}"]
        for part, name in ((attention, "attention_norm"), (mlp, "mlp_norm")):
            before = config.norm_at == "input"
            x = x + part(block, norm(block[name], x)) if before else norm(block[name], x + part(block, x))
    if config.norm_at == "input":
        x = norm(p["final_norm"], x)
    return x @ (p["embed"] if config.tied else p["unembed"])["tokens_VD"].T
