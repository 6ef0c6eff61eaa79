"""A GPT as pure functions of a nested dict of parameters.

    h_BTD = hidden(params, config, tokens_BT)     the transformer, final norm included
    logits_BTV = unembed(params, config, h_BTD)   the tied head
    logp_BT, h_BTD = score(params, config, batch) what every training stage uses

Radford et al. 2019 (GPT-2): learned positions, LayerNorm before each sub-layer, GELU, output head tied to the
embedding.
"""

import dataclasses
import math
from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp

from jaxgpt import losses
from jaxgpt.config import ModelConfig, UserError
from jaxgpt.structs import Array, Batch, Params

Attend = Callable[[Array, Array, Array, Array | None], Array]


def init(key: Array, config: ModelConfig) -> Params:
    """GPT-2's initialisation: normal(0.02), projections into the residual stream scaled by 1/sqrt(2 N)."""
    D, F = config.width, config.width * config.mlp_ratio
    residual_scale = 0.02 / math.sqrt(2 * config.layers)

    def dense(key: Array, fan_in: int, fan_out: int, scale: float) -> Params:
        return {"kernel": scale * jax.random.normal(key, (fan_in, fan_out)), "bias": jnp.zeros(fan_out)}

    def norm() -> Params:
        return {"scale": jnp.ones(D), "bias": jnp.zeros(D)}

    token_key, position_key, *block_keys = jax.random.split(key, 2 + config.layers)
    params: Params = {
        "embed": {
            "tokens_VD": 0.02 * jax.random.normal(token_key, (config.vocab, D)),
            "positions_TD": 0.01 * jax.random.normal(position_key, (config.block, D)),
        },
        "final_norm": norm(),
    }
    for n, block_key in enumerate(block_keys):
        qkv_key, out_key, up_key, down_key = jax.random.split(block_key, 4)
        params[f"block_{n}"] = {
            "attention_norm": norm(),
            "qkv": dense(qkv_key, D, 3 * D, 0.02),
            "out": dense(out_key, D, D, residual_scale),
            "mlp_norm": norm(),
            "up": dense(up_key, D, F, 0.02),
            "down": dense(down_key, F, D, residual_scale),
        }
    return params


def scalar_head(key: Array | None, width: int) -> Params:
    """A linear head D -> 1 for rewards (std 1/sqrt(D+1), Ziegler 2020) or, with no key, exactly 0 for values."""
    kernel_D = jnp.zeros(width) if key is None else jax.random.normal(key, (width,)) / math.sqrt(width + 1)
    return {"kernel_D": kernel_D, "bias": jnp.zeros(())}


def apply_scalar_head(head: Params, h_BTD: Array) -> Array:
    """One float32 number a position, [B, T]."""
    return jnp.einsum("...d,d->...", h_BTD.astype(jnp.float32), head["kernel_D"]) + head["bias"]


def attend(q_BTHK: Array, k_BTHK: Array, v_BTHK: Array, segments_BT: Array | None) -> Array:
    """Causal attention; tokens of different segments don't see each other."""
    if segments_BT is None:
        return jax.nn.dot_product_attention(q_BTHK, k_BTHK, v_BTHK, is_causal=True)
    same_B1TT = segments_BT[:, None, :, None] == segments_BT[:, None, None, :]
    return jax.nn.dot_product_attention(q_BTHK, k_BTHK, v_BTHK, mask=same_B1TT, is_causal=True)


def layer_norm(norm: Params, x: Array, epsilon: float) -> Array:
    """LayerNorm over the last axis, computed in float32, returned in x's dtype."""
    x32 = x.astype(jnp.float32)
    centred = x32 - x32.mean(-1, keepdims=True)
    variance = jnp.square(centred).mean(-1, keepdims=True)
    return (centred * jax.lax.rsqrt(variance + epsilon) * norm["scale"] + norm["bias"]).astype(x.dtype)


def dense(layer: Params, x: Array) -> Array:
    """x @ kernel + bias in x's dtype. On a CPU the sum is rounded once, at the end: XLA's bfloat16 product with a
    float32 result is up to 1.3 times as fast there as the one with a bfloat16 result."""
    wide = jnp.float32 if jax.default_backend() == "cpu" else x.dtype
    product = jnp.matmul(x, layer["kernel"].astype(x.dtype), preferred_element_type=wide)
    return (product + layer["bias"].astype(wide)).astype(x.dtype)


def split_heads(qkv: Array, heads: int) -> tuple[Array, Array, Array]:
    """[..., 3D] -> q, k, v of [..., H, K]."""
    q, k, v = jnp.split(qkv, 3, axis=-1)
    shape = (*q.shape[:-1], heads, q.shape[-1] // heads)
    return q.reshape(shape), k.reshape(shape), v.reshape(shape)


def mlp(block: Params, x: Array) -> Array:
    """Two dense layers with a GELU (tanh form, as GPT-2) between them."""
    return dense(block["down"], jax.nn.gelu(dense(block["up"], x), approximate=True))


def dropout(key: Array | None, rate: float, x: Array) -> Array:
    """Inverted dropout; the identity without a key."""
    if key is None or rate == 0.0:
        return x
    return jnp.where(jax.random.bernoulli(key, 1.0 - rate, x.shape), x / (1.0 - rate), 0).astype(x.dtype)


def embed(params: Params, config: ModelConfig, tokens: Array, positions: Array) -> Array:
    """Token plus position embedding, in the activations' dtype."""
    table = params["embed"]
    return (table["tokens_VD"][tokens] + table["positions_TD"][positions]).astype(config.dtype)


def hidden(
    params: Params,
    config: ModelConfig,
    tokens_BT: Array,
    *,
    positions_BT: Array | None = None,
    segments_BT: Array | None = None,
    key: Array | None = None,
    attend: Attend = attend,
) -> Array:
    """The hidden states after the final norm, [B, T, D]; position t has read tokens 0…t.

    Without `positions_BT` rows are counted from 0. `key` turns dropout on. `attend` may be another implementation.
    Raises UserError when a row is longer than config.block (checked while tracing; the positions would clamp in
    silence).
    """
    return hidden_and_kv(
        params, config, tokens_BT, positions_BT=positions_BT, segments_BT=segments_BT, key=key, attend=attend
    )[0]


def hidden_and_kv(
    params: Params,
    config: ModelConfig,
    tokens_BT: Array,
    *,
    positions_BT: Array | None = None,
    segments_BT: Array | None = None,
    key: Array | None = None,
    attend: Attend = attend,
) -> tuple[Array, list[tuple[Array, Array]]]:
    """`hidden`, and each layer's keys and values [B, T, H, K]: what a prefill stores."""
    chex.assert_rank(tokens_BT, 2)
    T = tokens_BT.shape[1]
    if T > config.block:
        raise UserError(
            f"{T} tokens don't fit the model's block of {config.block}; shorten the rows or enlarge model.block"
        )
    if positions_BT is None:
        positions_BT = jnp.broadcast_to(jnp.arange(T), tokens_BT.shape)
    keys = [None] * (2 * config.layers + 1) if key is None else list(jax.random.split(key, 2 * config.layers + 1))
    x_BTD = dropout(keys.pop(), config.dropout, embed(params, config, tokens_BT, positions_BT))
    kv = []
    for n in range(config.layers):
        block = params[f"block_{n}"]
        normed = layer_norm(block["attention_norm"], x_BTD, config.norm_epsilon)
        q, k, v = split_heads(dense(block["qkv"], normed), config.heads)
        kv.append((k, v))
        mixed_BTD = attend(q, k, v, segments_BT).reshape(x_BTD.shape)
        x_BTD += dropout(keys.pop(), config.dropout, dense(block["out"], mixed_BTD))
        normed = layer_norm(block["mlp_norm"], x_BTD, config.norm_epsilon)
        x_BTD += dropout(keys.pop(), config.dropout, mlp(block, normed))
    return layer_norm(params["final_norm"], x_BTD, config.norm_epsilon), kv


def unembed(params: Params, h: Array) -> Array:
    """Float32 logits from hidden states, with the transposed embedding as weights."""
    table_VD = params["embed"]["tokens_VD"].astype(h.dtype)
    return jnp.einsum("...d,vd->...v", h, table_VD, preferred_element_type=jnp.float32)


def score(
    params: Params,
    config: ModelConfig,
    batch: Batch,
    *,
    temperature: float = 1.0,
    window: int | None = None,
    key: Array | None = None,
    attend: Attend = attend,
) -> tuple[Array, Array]:
    """log P(token t | tokens before t) at `temperature`, [B, T] float32 with 0 at t = 0, and the hidden states [B,
    T, D].

    With `window` only that many tokens of each row, from its first target on, go through the vocabulary head; the
    others get 0. It must be at least the longest answer's length. Every stage goes through here: finetuning, reward,
    DPO, PPO, the reference, the sampler's check.
    """
    h_BTD = hidden(
        params,
        config,
        batch.tokens_BT,
        positions_BT=batch.positions_BT,
        segments_BT=batch.segments_BT,
        key=key,
        attend=attend,
    )
    before = window_before(batch.mask_BT, window)
    logits = unembed(params, before.take(h_BTD)) / temperature
    return before.put(losses.log_prob(logits, before.targets(batch.tokens_BT))), h_BTD


def answer_logp(
    params: Params, config: ModelConfig, batch: Batch, *, temperature: float = 1.0, window: int | None = None
) -> Array:
    """log P(y | x) of each row: the sum of `score` over the masked tokens, [B]."""
    logp_BT, _ = score(params, config, batch, temperature=temperature, window=window)
    return jnp.where(batch.mask_BT, logp_BT, 0.0).sum(axis=1)


@dataclasses.dataclass(frozen=True)
class Window:
    """W neighbouring targets of each row, seen from the positions before them.

    `take` gathers what was computed one position before each target, `put` sets values at the targets and 0 elsewhere.
    """

    first_B: Array
    width: int
    length: int

    @property
    def _target_BW(self) -> Array:
        return jnp.minimum(self.first_B[:, None] + jnp.arange(self.width), self.length - 1)

    def take(self, x_BTD: Array) -> Array:
        if self.width == self.length - 1:
            return x_BTD[:, :-1]
        return jnp.take_along_axis(x_BTD, self._target_BW[:, :, None] - 1, axis=1)

    def targets(self, tokens_BT: Array) -> Array:
        if self.width == self.length - 1:
            return tokens_BT[:, 1:]
        return jnp.take_along_axis(tokens_BT, self._target_BW, axis=1)

    def put(self, x_BW: Array) -> Array:
        if self.width == self.length - 1:
            return jnp.pad(x_BW, ((0, 0), (1, 0)))
        offset_BT = jnp.arange(self.length) - self.first_B[:, None]
        inside_BT = (offset_BT >= 0) & (offset_BT < self.width)
        return jnp.where(inside_BT, jnp.take_along_axis(x_BW, jnp.clip(offset_BT, 0, self.width - 1), axis=1), 0.0)


def window_before(mask_BT: Array, width: int | None) -> Window:
    """The window of `width` targets from each row's first one on; all T - 1 without a width."""
    T = mask_BT.shape[1]
    if width is None or width >= T - 1:
        return Window(jnp.ones(mask_BT.shape[0], jnp.int32), T - 1, T)
    return Window(jnp.maximum(jnp.argmax(mask_BT, axis=1), 1), width, T)


def at_last_token(x_BT: Array, mask_BT: Array) -> Array:
    """x at each row's last True of the mask, [B]: where the reward model reads its score."""
    T = mask_BT.shape[1]
    last_B = T - 1 - jnp.argmax(mask_BT[:, ::-1], axis=1)
    return jnp.take_along_axis(x_BT, last_B[:, None], axis=1)[:, 0]


def count_parameters(params: Params) -> int:
    """How many numbers a nested dict of parameters holds."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))
