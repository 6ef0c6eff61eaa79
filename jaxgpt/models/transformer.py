"""A GPT as pure functions of a nested dict of parameters.

    h_BTD = hidden(params, config, tokens_BT)     the transformer, including the final norm
    logits_BTV = unembed(params, h_BTD)           the vocabulary head
    logp_BT, h_BTD = score(params, config, batch) what every training stage uses

One family: GPT (Radford et al. 2018), which normalises after each sub-layer; GPT-2 (2019), before it; and Llama
(Touvron et al. 2023), with rotary positions, RMSNorm, SwiGLU, keys and values shared by groups of heads, and no biases.
The settings decide which parameters a block has, and the parameters decide what is computed.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import TypeVar

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from jaxgpt import losses
from jaxgpt.config import ModelConfig
from jaxgpt.errors import UserError
from jaxgpt.losses import vocab_head
from jaxgpt.losses.checks import expect_value
from jaxgpt.models import attention, sharding
from jaxgpt.models.cpu_layers import CPU_LAYERS
from jaxgpt.models.layers import COLUMN_PARALLEL, ROW_PARALLEL, Attend, Layers, plain_layers, vocab_logits
from jaxgpt.models.layers import norm as plain_norm
from jaxgpt.models.sharding import ROW_AXES, constrain, constrain_rows
from jaxgpt.structs import Array, Batch, Params

Extra = TypeVar("Extra")


# How parameters are sharded over a mesh, by the end of their path; all others are replicated.
PARTITION = {
    "tokens_VD": P(*ROW_PARALLEL),
    "positions_TD": P(None, "fsdp"),
    "qkv/kernel": P(*COLUMN_PARALLEL),
    "qkv/bias": P("tensor"),
    "gate/kernel": P(*COLUMN_PARALLEL),
    "gate/bias": P("tensor"),
    "out/kernel": P(*ROW_PARALLEL),
    "up/kernel": P(*COLUMN_PARALLEL),
    "up/bias": P("tensor"),
    "down/kernel": P(*ROW_PARALLEL),
}


def init(key: Array, config: ModelConfig) -> Params:
    """GPT-2's initialisation: normal(0.02), projections into the residual stream scaled by 1/sqrt(2 N)."""
    D, F = config.width, config.mlp_hidden
    residual_scale = 0.02 / math.sqrt(2 * config.layers)

    def dense(key: Array, fan_in: int, fan_out: int, scale: float = 0.02) -> Params:
        layer = {"kernel": scale * jax.random.normal(key, (fan_in, fan_out))}
        return {**layer, "bias": jnp.zeros(fan_out)} if config.biases else layer

    def norm() -> Params:
        return {"scale": jnp.ones(D), "bias": jnp.zeros(D)} if config.norm == "layer" else {"scale": jnp.ones(D)}

    token_key, position_key, *block_keys = jax.random.split(key, 2 + config.layers)
    params: Params = {"embed": {"tokens_VD": 0.02 * jax.random.normal(token_key, (config.vocab, D))}}
    if config.positions == "learned":
        params["embed"]["positions_TD"] = 0.01 * jax.random.normal(position_key, (config.block, D))
    if config.norm_at == "input":
        params["final_norm"] = norm()
    if not config.tied:
        head_key = jax.random.fold_in(key, 1)
        params["unembed"] = {"tokens_VD": 0.02 * jax.random.normal(head_key, (config.vocab, D))}
    for n, block_key in enumerate(block_keys):
        qkv_key, out_key, up_key, down_key, *gate_key = jax.random.split(block_key, 5 if config.mlp == "swiglu" else 4)
        params[f"block_{n}"] = {
            "attention_norm": norm(),
            "qkv": dense(qkv_key, D, (config.heads + 2 * config.groups) * config.head_dim),
            "out": dense(out_key, D, D, residual_scale),
            "mlp_norm": norm(),
            "up": dense(up_key, D, F),
            "down": dense(down_key, F, D, residual_scale),
        }
        if gate_key:
            params[f"block_{n}"]["gate"] = dense(gate_key[0], D, F)
    return params


def init_scalar_head(key: Array | None, width: int) -> Params:
    """A linear head D -> 1: random for rewards (std 1/sqrt(D+1), Ziegler 2020); exactly 0 for values, without a key."""
    kernel_D = jnp.zeros(width) if key is None else jax.random.normal(key, (width,)) / math.sqrt(width + 1)
    return {"kernel_D": kernel_D, "bias": jnp.zeros(())}


def apply_scalar_head(head: Params, h_BTD: Array) -> Array:
    """One float32 number per position, [B, T]."""
    return jnp.einsum("...d,d->...", h_BTD.astype(jnp.float32), head["kernel_D"]) + head["bias"]


def split_heads(qkv: Array, config: ModelConfig) -> tuple[Array, Array, Array]:
    """q [..., H, K], k and v [..., G, K] from [..., (H + 2G) K], in which a key, its value and the queries that share
    them are adjacent: sharding the last axis shards the groups of heads."""
    shared = config.heads // config.groups
    x = qkv.reshape(*qkv.shape[:-1], config.groups, shared + 2, config.head_dim)
    q = x[..., :shared, :].reshape(*qkv.shape[:-1], config.heads, config.head_dim)
    return q, x[..., shared, :], x[..., shared + 1, :]


def rotary_angles(config: ModelConfig, positions_BT: Array) -> tuple[Array, Array] | None:
    """Cosine and sine of every position times every frequency, [B, T, 1, K/2] float32, for rotary positions (Su et al.
    2021). Pair i turns by theta^(-2i/K) per token; with rope_factor, pairs that turn less than once in rope_block turn
    that much slower, those with more than four turns as before, and those between are interpolated (Llama 3.1)."""
    if config.positions != "rotary":
        return None
    frequency = config.rope_theta ** -(np.arange(0, config.head_dim, 2) / config.head_dim)
    if config.rope_factor > 1.0:
        turns = config.rope_block * frequency / (2 * np.pi)
        kept = np.clip((turns - 1.0) / (4.0 - 1.0), 0.0, 1.0)
        frequency = frequency * (kept + (1.0 - kept) / config.rope_factor)
    angle_BTK = positions_BT[..., None, None] * jnp.asarray(frequency, jnp.float32)
    return jnp.cos(angle_BTK), jnp.sin(angle_BTK)


def rotate(x_BTHK: Array, angles: tuple[Array, Array] | None) -> Array:
    """Rotate each pair (i, i + K/2) by its angle; without angles returns x itself."""
    if angles is None:
        return x_BTHK
    cos, sin = angles
    a, b = jnp.split(x_BTHK.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BTHK.dtype)


def mlp(block: Params, x: Array, layers: Layers) -> Array:
    """Two dense layers with a GELU (tanh form, as in GPT-2) between them; or, if there is a gate, a SwiGLU."""
    up = layers.dense(block["up"], x, COLUMN_PARALLEL)
    inside = layers.swiglu(layers.dense(block["gate"], x, COLUMN_PARALLEL), up) if "gate" in block else layers.gelu(up)
    return layers.dense(block["down"], inside, ROW_PARALLEL)


def dropout(key: Array | None, rate: float, x: Array) -> Array:
    """Inverted dropout; the identity without a key."""
    if key is None or rate == 0.0:
        return x
    return jnp.where(jax.random.bernoulli(key, 1.0 - rate, x.shape), x / (1.0 - rate), 0).astype(x.dtype)


def embed(params: Params, config: ModelConfig, tokens: Array, positions: Array) -> Array:
    """Token embeddings, plus learned position embeddings if there are any, in the activations' dtype."""
    table = params["embed"]
    x = table["tokens_VD"][tokens]
    return (x + table["positions_TD"][positions] if "positions_TD" in table else x).astype(config.dtype)


def embed_rows(params: Params, config: ModelConfig, tokens_BT: Array, positions_BT: Array) -> Array:
    """`embed` for rows sharded over devices, and tables sharded along 'fsdp'.

    Each device looks up its own columns for all rows, and sends each row's to the device it belongs to; or, if the
    table is smaller than these activations, the tables are gathered first."""
    B, T = tokens_BT.shape
    if config.vocab * sharding.count_shards(B, ROW_AXES) > B * T:
        ids = [constrain(x, "data", None) for x in (tokens_BT, positions_BT)]
        x_BTD = constrain(embed(params, config, *ids), "data", None, "fsdp")
    else:
        axes = {"tokens_VD": ROW_PARALLEL, "positions_TD": (None, "fsdp")}
        whole = {name: sharding.gather_fsdp(x, axes[name], lookup=True) for name, x in params["embed"].items()}
        x_BTD = embed({"embed": whole}, config, tokens_BT, positions_BT)
    return constrain(x_BTD, ROW_AXES, None, None)


def hidden(
    params: Params,
    config: ModelConfig,
    tokens_BT: Array,
    *,
    positions_BT: Array | None = None,
    segments_BT: Array | None = None,
    embedding_offset_BTD: Array | None = None,
    key: Array | None = None,
    attend: Attend | None = None,
) -> Array:
    """The hidden states after the final norm, [B, T, D]; position t has seen tokens 0…t.

    Without `positions_BT`, positions count from 0. `embedding_offset_BTD` is added to the embeddings, to differentiate
    with respect to the input or to feed something that isn't a token. `key` turns dropout on. `attend` replaces the
    attention implementation.
    Raises UserError if a row is longer than config.block (checked while tracing; positions would be clamped silently).
    """
    return hidden_and_kv(
        params,
        config,
        tokens_BT,
        positions_BT=positions_BT,
        segments_BT=segments_BT,
        embedding_offset_BTD=embedding_offset_BTD,
        key=key,
        attend=attend,
    )[0]


def hidden_and_kv(
    params: Params,
    config: ModelConfig,
    tokens_BT: Array,
    *,
    positions_BT: Array | None = None,
    segments_BT: Array | None = None,
    embedding_offset_BTD: Array | None = None,
    key: Array | None = None,
    attend: Attend | None = None,
) -> tuple[Array, list[tuple[Array, Array]]]:
    """`hidden`, and each layer's keys and values [B, T, G, K], which a prefill stores."""
    chex.assert_rank(tokens_BT, 2)
    T = tokens_BT.shape[1]
    if config.block < T:
        raise UserError(
            f"{T} tokens don't fit the model's block of {config.block}; shorten the rows or enlarge model.block"
        )
    if positions_BT is None:
        positions_BT = jnp.broadcast_to(jnp.arange(T), tokens_BT.shape)
    layers = select_layers(config)
    layers = layers._replace(attend=attend or layers.attend)
    embed_key, keys = (None, None) if key is None else _split_for(key, config.layers)
    with jax.named_scope("embed"):
        x_BTD = embed_rows(params, config, tokens_BT, positions_BT)
        if embedding_offset_BTD is not None:
            x_BTD += embedding_offset_BTD.astype(x_BTD.dtype)
        x_BTD = dropout(embed_key, config.dropout, x_BTD)

    turned = rotary_angles(config, positions_BT)

    def with_kv(q: Array, k: Array, v: Array) -> tuple[Array, tuple[Array, Array]]:
        return layers.attend(q, k, v, segments_BT), (k, v)

    def one(x_BTD: Array, block: Params, key: Array | None) -> tuple[Array, tuple[Array, Array]]:
        return transformer_block(block, config, layers, x_BTD, turned, with_kv, key)

    if config.remat != "none":
        policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if config.remat == "dots" else None
        one = jax.checkpoint(one, policy=policy)
    blocks = [params[f"block_{n}"] for n in range(config.layers)]
    kv = []
    if config.scan:
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks)
        x_BTD, both = jax.lax.scan(lambda x, xs: one(x, *xs), x_BTD, (stacked, keys))
        kv = [(both[0][n], both[1][n]) for n in range(config.layers)]
    else:
        for n, block in enumerate(blocks):
            x_BTD, both = one(x_BTD, block, None if keys is None else keys[n])
            kv.append(both)
    return final_norm(params, config, x_BTD, layers), kv


def final_norm(params: Params, config: ModelConfig, x_BTD: Array, layers: Layers | None = None) -> Array:
    """The norm after the last block, if the model has one."""
    norm = plain_norm if layers is None else layers.norm
    return norm(params["final_norm"], x_BTD, config.norm_epsilon) if "final_norm" in params else x_BTD


def _split_for(key: Array, layers: int) -> tuple[Array, Array]:
    """A key for the embedding, and one for each layer [N]."""
    first, rest = jax.random.split(key)
    return first, jax.random.split(rest, layers)


def transformer_block(
    block: Params,
    config: ModelConfig,
    layers: Layers,
    x_BTD: Array,
    angles: tuple[Array, Array] | None,
    attend: Callable[[Array, Array, Array], tuple[Array, Extra]],
    key: Array | None = None,
) -> tuple[Array, Extra]:
    """An attention and an MLP sub-layer, each added to its input, with a norm before it or after the sum.

    attend(q [B, T, H, K], k, v [B, T, G, K]) -> (mixed [B, T, H, K], anything); the latter is returned too: the keys
    and values of a whole row, or the updated cache.
    """
    attention_key, mlp_key = (None, None) if key is None else jax.random.split(key)

    def norm(name: str, x: Array, at: str) -> Array:
        return layers.norm(block[name], x, config.norm_epsilon) if config.norm_at == at else x

    with jax.named_scope("attention"):
        normed = norm("attention_norm", x_BTD, "input")
        q, k, v = split_heads(layers.dense(block["qkv"], normed, COLUMN_PARALLEL), config)
        qkv = (constrain(x, ROW_AXES, None, "tensor", None) for x in (rotate(q, angles), rotate(k, angles), v))
        mixed_BTHK, kept = attend(*qkv)
        mixed_BTD = mixed_BTHK.reshape(x_BTD.shape)
        x_BTD += dropout(attention_key, config.dropout, layers.dense(block["out"], mixed_BTD, ROW_PARALLEL))
        x_BTD = norm("attention_norm", x_BTD, "output")
    with jax.named_scope("mlp"):
        x_BTD += dropout(mlp_key, config.dropout, mlp(block, norm("mlp_norm", x_BTD, "input"), layers))
        return constrain(norm("mlp_norm", x_BTD, "output"), ROW_AXES, None, None), kept


def select_layers(config: ModelConfig) -> Layers:
    """The layers that a config asks for: plain formulas, or for gradients "auto" the fastest on the target platform: on
    a CPU `CPU_LAYERS`, elsewhere the plain ones with an attention kernel."""
    platform = sharding.target_platform(config)
    plain = plain_layers(platform)
    if config.gradients == "plain":
        return plain
    fast = {
        "cpu": CPU_LAYERS,
        "gpu": plain._replace(attend=attention.cudnn),
        "tpu": plain._replace(attend=attention.splash),
    }
    return fast.get(platform, plain)


def head_weights(params: Params) -> Array:
    """The weights of the vocabulary head, [V, D]: the embedding's if they are tied."""
    return params["unembed" if "unembed" in params else "embed"]["tokens_VD"]


def unembed(params: Params, h: Array, layers: Layers | None = None) -> Array:
    """Float32 logits from hidden states."""
    product = vocab_logits if layers is None else layers.product_VD
    return product(h, head_weights(params))


@jax.named_scope("head")
def predict(
    params: Params, config: ModelConfig, h_BWD: Array, tokens_BW: Array, temperature: float = 1.0
) -> tuple[Array, Array]:
    """log P of the token that follows each hidden state, and the entropy of its distribution, [B, W] float32.

    Logits of more than `config.logits_bytes` per device are computed and discarded one tile at a time (`vocab_head`).
    Smaller ones are stored on a CPU, where computing them twice costs more than memory.
    """
    B, W, _ = h_BWD.shape
    parts, vocab_parts = sharding.count_shards(B, ROW_AXES), sharding.count_shards(config.vocab, "tensor")
    most = max(1, config.logits_bytes // (4 * B // parts * config.vocab // vocab_parts))  # positions in a tile
    if most >= W and (config.gradients == "plain" or sharding.target_platform(config) == "cpu"):
        # The barrier makes rounding the same with and without gradients: PPO's first ratio is exactly 1.
        logits = jax.lax.optimization_barrier(unembed(params, h_BWD, select_layers(config)) / temperature)
        return losses.log_prob(logits, tokens_BW), losses.entropy(logits)
    # One copy of the table per row shard, so that its gradient is summed across devices once, not in every tile.
    table_PVD = sharding.copy_for_rows(head_weights(params).astype(h_BWD.dtype), ROW_PARALLEL, parts)
    rows = [constrain_rows(x.reshape(parts, B // parts, *x.shape[1:])) for x in (h_BWD, tokens_BW)]
    tile = -(-W // -(-W // most))  # of equal sizes
    tiles = functools.partial(
        vocab_head.tiled_head_outputs, tile=tile, temperature=temperature, gradients=config.gradients
    )
    found = jax.vmap(tiles)(rows[0], table_PVD, rows[1])
    return found.logp.reshape(B, W), found.entropy.reshape(B, W)


def token_log_probs(
    params: Params,
    config: ModelConfig,
    batch: Batch,
    *,
    temperature: float = 1.0,
    window: int | None = None,
    key: Array | None = None,
    attend: Attend | None = None,
) -> tuple[Array, Array]:
    """log P(token t | tokens before t) at `temperature`, [B, T] float32 with 0 at t = 0, and hidden states [B, T, D].

    With `window`, only that many tokens of each row, starting at its first target, go through the vocabulary head, and
    the others get 0; all targets must lie in it (`target_window`). Every stage uses this function: finetuning, the
    reward model, DPO, PPO, the reference policy, and the check of the sampler's log-probabilities.
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
    before = target_window(batch.mask_BT, window)
    logp_BW, _ = predict(params, config, before.take(h_BTD), before.targets(batch.tokens_BT), temperature)
    return before.put(logp_BW), h_BTD


def answer_logp(
    params: Params, config: ModelConfig, batch: Batch, *, temperature: float = 1.0, window: int | None = None
) -> Array:
    """log P(y | x) of each row: the sum of `token_log_probs` over the masked tokens, [B]."""
    logp_BT, _ = token_log_probs(params, config, batch, temperature=temperature, window=window)
    return jnp.where(batch.mask_BT, logp_BT, 0.0).sum(axis=1)


@dataclasses.dataclass(frozen=True)
class Window:
    """W consecutive targets of each row, predicted from the positions before them.

    `take` gathers what was computed one position before each target; `put` sets values at the targets and 0 elsewhere,
    but NaN at a target that the window doesn't hold.
    """

    first_B: Array
    width: int
    length: int
    missed_BT: Array | None = None

    @property
    def _target_BW(self) -> Array:
        return jnp.minimum(self.first_B[:, None] + jnp.arange(self.width), self.length - 1)

    def take(self, x_BTD: Array) -> Array:
        """The window's columns of [B, T, ...], [B, W, ...]."""
        if self.width == self.length - 1:
            return x_BTD[:, :-1]
        return jnp.take_along_axis(x_BTD, self._target_BW[:, :, None] - 1, axis=1)

    def targets(self, tokens_BT: Array) -> Array:
        """The token that follows each column of the window, [B, W]."""
        if self.width == self.length - 1:
            return tokens_BT[:, 1:]
        return jnp.take_along_axis(tokens_BT, self._target_BW, axis=1)

    def put(self, x_BW: Array) -> Array:
        """Scatter [B, W] back to [B, T], with 0 outside the window, and NaN at targets there."""
        if self.width == self.length - 1:
            return jnp.pad(x_BW, ((0, 0), (1, 0)))
        offset_BT = jnp.arange(self.length) - self.first_B[:, None]
        inside_BT = (offset_BT >= 0) & (offset_BT < self.width)
        outside_BT = 0.0 if self.missed_BT is None else jnp.where(self.missed_BT, jnp.nan, 0.0)
        index_BT = jnp.clip(offset_BT, 0, self.width - 1)
        return jnp.where(inside_BT, jnp.take_along_axis(x_BW, index_BT, axis=1), outside_BT)


def target_window(mask_BT: Array, width: int | None) -> Window:
    """The window of `width` targets starting at each row's first one; all T - 1 without a width.

    Raises ValueError if a row's last target lies outside (where the mask is concrete, or under checkify); a compiled
    program gives NaN there, never a sum that lacks some tokens.
    """
    T = mask_BT.shape[1]
    if width is None or width >= T - 1:
        return Window(jnp.ones(mask_BT.shape[0], jnp.int32), T - 1, T)
    first_B = jnp.maximum(jnp.argmax(mask_BT, axis=1), 1)
    missed_BT = mask_BT & (jnp.arange(T) >= first_B[:, None] + width)
    message = "an answer reaches beyond the window of {width} tokens; raise the window (a policy's new_tokens)"
    expect_value(~missed_BT, message, width=width)
    return Window(first_B, width, T, missed_BT)


def at_last_token(x_BT: Array, mask_BT: Array) -> Array:
    """x at the last True of each row's mask, [B]: where the reward model reads its score."""
    T = mask_BT.shape[1]
    last_B = T - 1 - jnp.argmax(mask_BT[:, ::-1], axis=1)
    return jnp.take_along_axis(x_BT, last_B[:, None], axis=1)[:, 0]


def count_parameters(params: Params) -> int:
    """Total number of elements in a nested dict of parameters."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))
