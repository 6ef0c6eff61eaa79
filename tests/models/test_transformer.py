"""The forward pass: causal, and invariant to padding, packing and compilation."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt.config import PRESETS, ModelConfig
from jaxgpt.errors import UserError
from jaxgpt.models import transformer
from jaxgpt.structs import Batch
from tests.helpers import FAMILY, TINY, random_params, tokens_of

T, SHORT = 40, 11
FIRST, SECOND = 9, 6  # lengths of the two examples of a packed row
CHANGED = slice(1, 1 + T)
PADDED, PACKED, ALONE = 1 + T, 2 + T, 3 + T  # rows

family = pytest.mark.parametrize("name", FAMILY)
score = jax.jit(transformer.token_log_probs, static_argnums=1, static_argnames="temperature")


def batch() -> Batch:
    """A row; that row with token t changed, for each t; its start, padded; its start as two examples; and the second
    example alone."""
    row, t = np.random.default_rng(0).integers(6, TINY.vocab, T), np.arange(T)
    tokens = np.tile(row, (ALONE + 1, 1))
    tokens[CHANGED][t, t] = 6 + (row - 5) % (TINY.vocab - 6)
    tokens[PADDED, SHORT:] = 0
    tokens[PACKED, FIRST + SECOND :] = 0
    tokens[ALONE] = np.where(t < SECOND, np.roll(row, -FIRST), 0)
    segments, positions = np.tile(1, tokens.shape), np.tile(t, (len(tokens), 1))
    segments[PADDED, SHORT:] = segments[ALONE, SECOND:] = 0
    segments[PACKED] = np.repeat([1, 2, 0], [FIRST, SECOND, T - FIRST - SECOND])
    positions[PACKED, FIRST : FIRST + SECOND] = np.arange(SECOND)
    return Batch(tokens.astype(np.int32), positions > 0, segments, positions)


@functools.partial(jax.jit, static_argnums=1)
def _look(params, config, batch):
    logp, h = transformer.token_log_probs(params, config, batch)
    return logp, h, transformer.unembed(params, h)


@functools.cache
def seen(config: ModelConfig, scale: float = 4.0, short: bool = False):
    """(logp, hidden states, logits) of `batch()`, or of the first tokens of its first two rows, without segments."""
    rows = Batch(batch().tokens_BT[:2, :SHORT], batch().mask_BT[:2, :SHORT]) if short else batch()
    return jax.device_get(_look(random_params(config, scale=scale), config, rows))


def plain(config: ModelConfig) -> ModelConfig:
    return dataclasses.replace(config, gradients="plain")


@family
def test_each_position_depends_on_itself_and_the_past_only(name):
    _, h, _ = seen(FAMILY[name])
    reach_TT = np.abs(h[CHANGED] - h[0]).max(axis=2)  # [which token was changed, where the change is seen]
    past, future = reach_TT[np.triu_indices(T)], reach_TT[np.tril_indices(T, -1)]
    assert past.min() > 1e-3, "the past must matter"
    assert future.max() < 1e-6, "the future must not"


@family
@pytest.mark.parametrize("way", ["auto", "plain"])
def test_logits_and_log_probs_equal_a_float64_reference(name, way):
    config = FAMILY[name]
    params = jax.tree.map(lambda w: np.asarray(w, np.float64), random_params(config))
    logp, _, logits = seen(plain(config), short=True) if way == "plain" else seen(config)
    tokens = batch().tokens_BT[:2, : logp.shape[1]]
    expected = _reference_logits(params, config, tokens)
    np.testing.assert_allclose(logits[:2], expected, rtol=2e-4, atol=2e-4)
    np.testing.assert_allclose(logp[:2, 1:], _log_probs(expected, tokens), atol=2e-4)
    assert (logp[:, 0] == 0).all()


@family
def test_the_count_of_parameters_is_what_init_makes(name):
    config = FAMILY[name]
    shapes = jax.eval_shape(lambda: transformer.init(jax.random.key(0), config))
    positions = shapes["embed"].pop("positions_TD").size if config.positions == "learned" else 0
    assert transformer.count_parameters(shapes) == config.parameters and (positions > 0) == (
        config.positions == "learned"
    )


@family
def test_padding_behind_a_row_changes_nothing(name):
    (logp, h, _), (short_logp, short_h, _) = seen(FAMILY[name]), seen(plain(FAMILY[name]), short=True)
    np.testing.assert_allclose(logp[PADDED, :SHORT], short_logp[0], atol=1e-5)
    np.testing.assert_allclose(h[PADDED, :SHORT], short_h[0], atol=1e-4)


@family
def test_packed_rows_equal_unpacked_ones(name):
    logp, _, _ = seen(FAMILY[name])
    np.testing.assert_allclose(logp[PACKED, 1:FIRST], logp[0, 1:FIRST], atol=1e-5)
    np.testing.assert_allclose(logp[PACKED, FIRST + 1 : FIRST + SECOND], logp[ALONE, 1:SECOND], atol=1e-5)


def test_a_window_around_the_answer_gives_the_same_log_probs_and_gradients():
    config, length = dataclasses.replace(TINY, layers=1), 16
    start, t = np.array([1, 3, 6, 9])[:, None], np.arange(length)
    batch = Batch(tokens_of(4, length), (t >= start) & (t < start + 7))

    @jax.jit
    def outcomes(params):
        def total(params, window):
            logp, _ = transformer.token_log_probs(params, config, batch, window=window)
            return jnp.where(batch.mask_BT, jnp.sin(logp), 0.0).sum(), logp

        return [jax.grad(total, has_aux=True)(params, window) for window in (None, 7, 9)]

    (whole, logp), *others = jax.device_get(outcomes(random_params(config)))
    for window, (part, window_logp) in zip((7, 9), others, strict=True):
        np.testing.assert_allclose(window_logp[batch.mask_BT], logp[batch.mask_BT], atol=1e-5, err_msg=str(window))
        assert (window_logp[t < start] == 0).all(), window
        for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(part), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4, err_msg=str(window))


def test_a_window_that_does_not_hold_an_answer_is_refused():
    """Where the mask is known; a compiled program has NaN in the place of the tokens that it doesn't hold."""
    mask = np.array([[0, 1, 1, 0, 0, 0], [0, 0, 1, 0, 0, 1]], bool)  # the second has a gap
    for width in (4, 5):
        transformer.target_window(mask, width)
    with pytest.raises(ValueError, match=r"beyond the window of 3 tokens; raise the window \(a policy's new_tokens\)"):
        transformer.target_window(mask, 3)
    found = jax.jit(lambda mask: transformer.target_window(mask, 3).put(jnp.ones((2, 3))))(mask)
    np.testing.assert_array_equal(found, [[0, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, np.nan]])


@pytest.mark.parametrize("width", [None, 15, 40])
def test_a_window_as_wide_as_the_rows_is_none(width):
    window = transformer.target_window(np.arange(16)[None] >= 3, width)
    assert window.width == 15 and (window.first_B == 1).all()


def test_temperature_divides_the_logits():
    rows = Batch(batch().tokens_BT[:2], batch().mask_BT[:2])
    logp, _ = score(random_params(), TINY, rows, temperature=0.5)
    _, _, logits = seen(TINY)
    np.testing.assert_allclose(logp[:, 1:], _log_probs(logits[:2].astype(np.float64) / 0.5, rows.tokens_BT), atol=1e-4)


@family
def test_bfloat16_is_close_to_float32(name):
    exact, _, _ = seen(FAMILY[name], scale=1.0)
    rough, h, _ = seen(dataclasses.replace(FAMILY[name], dtype="bfloat16"), scale=1.0)
    assert h.dtype == jnp.bfloat16 and rough.dtype == np.float32
    np.testing.assert_allclose(rough, exact, atol=0.03)


def test_dropout_needs_a_key_and_keeps_the_mean():
    config = dataclasses.replace(TINY, layers=1)
    dropping = dataclasses.replace(config, dropout=0.5)

    @jax.jit
    def outcomes(params, keys, key):
        one, tokens = functools.partial(transformer.hidden, params), tokens_of(2, 8)
        dropped = jax.vmap(lambda key: one(dropping, tokens, key=key))(keys)
        return one(config, tokens), one(dropping, tokens), dropped, transformer.dropout(key, 0.5, jnp.ones(20_000))

    with jax.numpy_dtype_promotion("strict"):
        keys, key = jax.random.split(jax.random.key(0)), jax.random.key(2)
        never, keyless, (a, b), x = outcomes(random_params(config), keys, key)
    np.testing.assert_array_equal(keyless, never)
    assert np.abs(a - b).max() > 0.1
    assert float(x.mean()) == pytest.approx(1.0, abs=0.03)


def test_rows_longer_than_the_block_are_refused():
    with pytest.raises(UserError, match="49 tokens don't fit the model's block of 48"):
        jax.eval_shape(lambda: transformer.hidden(random_params(), TINY, np.zeros((1, 49), np.int32)))


@pytest.mark.parametrize(
    "change",
    [
        {"width": 33},
        {"layers": 0},
        {"dropout": 1.0},
        {"dtype": "float16"},
        {"kv_heads": 3},
        {"mlp_width": -1},
        {"positions": "rotary", "width": 6},
        {"rope_theta": 0.0},
        {"norm": "batch"},
    ],
    ids=str,
)
def test_impossible_configurations_are_refused(change):
    with pytest.raises(UserError):
        dataclasses.replace(TINY, **change)


def test_at_last_token_reads_the_last_masked_position():
    mask = np.array([[0, 1, 1, 0, 0, 0], [0, 0, 1, 1, 1, 1]], bool)
    x = np.arange(12.0, dtype=np.float32).reshape(2, 6)
    np.testing.assert_array_equal(jax.jit(transformer.at_last_token)(x, mask), [2.0, 11.0])


def test_value_head_is_exactly_zero_and_reward_head_has_the_stated_scale():
    @jax.jit
    def outcomes(key, h):
        return transformer.apply_scalar_head(transformer.init_scalar_head(None, 2000), h), transformer.init_scalar_head(
            key, 2000
        )["kernel_D"]

    values, kernel = jax.device_get(outcomes(jax.random.key(1), np.linspace(-1, 1, 24_000).reshape(3, 4, 2000)))
    assert (values == 0).all()
    assert kernel.std() == pytest.approx(1 / np.sqrt(2001), rel=0.05)


@pytest.mark.parametrize(("name", "millions"), [("gpt", 116.6), ("gpt2", 124.5), ("smollm2-135m", 134.5)])
def test_presets_have_their_models_sizes(name, millions):
    """The embeddings of GPT and GPT-2 are padded to a multiple of 128 rows."""
    config = PRESETS[name]
    positions = config.block * config.width if config.positions == "learned" else 0
    assert (config.parameters + positions) / 1e6 == pytest.approx(millions, abs=0.1)


def _log_probs(logits: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Log-probability of each token but the first, from the logits at the one before it."""
    logp = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
    return np.take_along_axis(logp[:, :-1], tokens[:, 1:, None], axis=-1)[..., 0]


def _reference_logits(p: dict, config: ModelConfig, tokens: np.ndarray) -> np.ndarray:
    """The same models in float64 NumPy, with explicit loops over heads and rotations as complex numbers."""
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
