"""The cache of keys and values: filled by the prompts in one parallel pass, then fed token by token.

On a CPU it is float32: XLA would convert an entire bfloat16 one in every step. Axes of size 1 (one row, one key/value
head) are left out, so that products with them are plain ones.
"""

import functools

import jax
import jax.numpy as jnp
from flax import struct
from jax.typing import DTypeLike

from jaxgpt import losses
from jaxgpt.config import ModelConfig
from jaxgpt.decoding.weights import unembed
from jaxgpt.models import layers, sharding, transformer
from jaxgpt.structs import Array, KVCache, Params


def _dtype(config: ModelConfig) -> DTypeLike:
    return jnp.float32 if sharding.target_platform(config) == "cpu" else config.dtype


def _layout(x_BGSK: Array) -> Array:
    x_BGSK = sharding.constrain(x_BGSK, sharding.ROW_AXES, "tensor", None, None)
    return x_BGSK.reshape(*(n for n in x_BGSK.shape[:2] if n > 1), *x_BGSK.shape[2:])


def prefill_hidden(
    params: Params, config: ModelConfig, prompt_BP: Array, length_B: Array, slots: int, copies: int = 1
) -> tuple[KVCache, Array]:
    """The cache after the prompts, with room for `slots` new tokens, and each prompt's last hidden state [B, D].

    Each prompt gets `copies` adjacent rows of the cache.
    """
    h_BPD, kv = transformer.hidden_and_kv(params, config, prompt_BP)

    def rows(x_BPGK: Array) -> Array:
        return _layout(jnp.repeat(x_BPGK.swapaxes(1, 2).astype(_dtype(config)), copies, axis=0))

    keys, values = (tuple(rows(layer[i]) for layer in kv) for i in (0, 1))
    h_BD = jnp.take_along_axis(h_BPD, (length_B - 1)[:, None, None], axis=1)[:, 0]
    return grow_cache(KVCache(keys, values), slots), h_BD


def prefill(
    params: Params, config: ModelConfig, prompt_BP: Array, length_B: Array, slots: int, copies: int = 1
) -> tuple[KVCache, Array]:
    """The cache of `prefill_hidden`, and the logits of the first new token [B, V]."""
    cache, h_BD = prefill_hidden(params, config, prompt_BP, length_B, slots, copies)
    return cache, unembed(params, config, h_BD)


def empty_cache(config: ModelConfig, rows: int, slots: int) -> KVCache:
    """A cache of zeros, in the form of `prefill_hidden`'s."""
    one = _layout(jnp.zeros((rows, config.groups, slots, config.head_dim), _dtype(config)))
    return KVCache((one,) * config.layers, (one,) * config.layers)


def grow_cache(cache: KVCache, slots: int) -> KVCache:
    """The cache with `slots` empty (zero) slots appended."""
    return jax.tree.map(lambda x: jnp.pad(x, (*[(0, 0)] * (x.ndim - 2), (0, slots), (0, 0))), cache)


@struct.dataclass
class Prefix:
    """The cache of prompts [B, G, P, K] that several adjacent rows share, `samples` for each prompt: stored and read
    once for all of them."""

    cache: KVCache
    length_B: Array

    def scores(self, config: ModelConfig, n: int, q_BEHK: Array) -> Array:
        """Scaled scores of every row's queries in layer n, [B * samples, H, E, P]."""
        keys = self.cache.keys[n]
        q = self._by_prompt(config, q_BEHK.swapaxes(1, 2)).astype(keys.dtype)
        scores = jnp.einsum("...ek,...pk->...ep", q, keys, preferred_element_type=jnp.float32)
        visible_B1P = jnp.repeat(jnp.arange(keys.shape[-2]) < self.length_B[:, None], self._samples(q_BEHK), axis=0)
        scaled = self._by_row(config, scores, q_BEHK.shape[0]) * config.head_dim**-0.5
        return jnp.where(visible_B1P[:, None, None], scaled, losses.MASKED_LOGIT)

    def mix(self, config: ModelConfig, n: int, weights_BHEP: Array) -> Array:
        """The values of layer n, weighted, [B * samples, H, E, K]."""
        values = self.cache.values[n]
        weights = self._by_prompt(config, weights_BHEP).astype(values.dtype)
        return self._by_row(config, jnp.einsum("...ep,...pk->...ek", weights, values), weights_BHEP.shape[0])

    def _samples(self, rows: Array) -> int:
        return rows.shape[0] // len(self.length_B)

    def _by_prompt(self, config: ModelConfig, x_BHEX: Array) -> Array:
        """[B * samples, H, E, X] as [B, G, samples * H / G * E, X], axes of size 1 left out as in the cache."""
        rows, H, E, X = x_BHEX.shape
        x = x_BHEX.reshape(-1, rows // len(self.length_B), config.groups, H // config.groups * E, X).swapaxes(1, 2)
        return x.reshape(*self.cache.keys[0].shape[:-2], -1, X)

    def _by_row(self, config: ModelConfig, x: Array, rows: int) -> Array:
        """The inverse of `_by_prompt`."""
        B, G, X = len(self.length_B), config.groups, x.shape[-1]
        return x.reshape(B, G, rows // B, -1, X).swapaxes(1, 2).reshape(rows, config.heads, -1, X)


def feed(
    params: Params,
    config: ModelConfig,
    cache: KVCache,
    tokens_BE: Array,
    position_BE: Array,
    slot: Array | int,
    visible_BES: Array,
    prefix: Prefix | None = None,
) -> tuple[KVCache, Array]:
    """Feed E tokens per row into the slots starting at `slot`: the updated cache, and the hidden states [B, E, D].

    visible_BES says which slots each token attends to (leading axes may be 1); those of its `prefix` come in addition,
    under the same softmax. The slots must exist: otherwise they would be clamped silently.
    """
    B, E = tokens_BE.shape
    *rows, _, K = cache.keys[0].shape
    H, shared = config.heads, config.heads // config.groups
    some, e = ((shared * E,), "e") if shared * E > 1 else ((), "")  # axes of size 1 are left out, as in the cache

    def store(all_: Array, new_BEGK: Array) -> Array:
        new = new_BEGK.swapaxes(1, 2).reshape(*rows, E, K).astype(all_.dtype)
        return jax.lax.dynamic_update_slice_in_dim(all_, new, slot, axis=len(rows))

    def attend(n: int, q_BEHK: Array, k_BEGK: Array, v_BEGK: Array) -> tuple[Array, tuple[Array, Array]]:
        # Without the barrier XLA would write, and so copy, the cache twice: for the loop and for the product.
        k, v = jax.lax.optimization_barrier((store(cache.keys[n], k_BEGK), store(cache.values[n], v_BEGK)))
        q = q_BEHK.swapaxes(1, 2).reshape(*rows, *some, K).astype(k.dtype)
        scores = jnp.einsum(f"...{e}k,...sk->...{e}s", q, k, preferred_element_type=jnp.float32)
        scores_BHES = jnp.where(visible_BES[:, None], scores.reshape(B, H, E, -1) * K**-0.5, losses.MASKED_LOGIT)
        if prefix is not None:
            scores_BHES = jnp.concatenate([prefix.scores(config, n, q_BEHK), scores_BHES], axis=-1)
        weights_BHES = jax.nn.softmax(scores_BHES)
        own = weights_BHES[..., -visible_BES.shape[-1] :].reshape(scores.shape).astype(v.dtype)
        mixed_BHEK = jnp.einsum(f"...{e}s,...sk->...{e}k", own, v).reshape(B, H, E, K)
        if prefix is not None:
            mixed_BHEK += prefix.mix(config, n, weights_BHES[..., : -visible_BES.shape[-1]])
        return mixed_BHEK.astype(q_BEHK.dtype).swapaxes(1, 2), (k, v)

    with jax.named_scope("embed"):
        x_BED = transformer.embed(params, config, tokens_BE, position_BE)
    turned = transformer.rotary_angles(config, position_BE)
    plain, stored = layers.plain_layers(sharding.target_platform(config)), []
    for n in range(config.layers):
        one = functools.partial(attend, n)
        x_BED, kv = transformer.transformer_block(params[f"block_{n}"], config, plain, x_BED, turned, one)
        stored.append(kv)
    keys, values = zip(*stored, strict=True)
    return KVCache(keys, values), transformer.final_norm(params, config, x_BED)


def feed_next_token(
    params: Params,
    config: ModelConfig,
    cache: KVCache,
    token_B: Array,
    length_B: Array,
    prompt_slots: int,
    t: Array,
    prefix: Prefix | None = None,
) -> tuple[KVCache, Array]:
    """Feed the t-th new token: the updated cache, and the token's hidden state after the final norm [B, D]. Prompts
    are in the cache's first slots, or in `prefix`, and then prompt_slots is 0."""
    slots = jnp.arange(cache.keys[0].shape[-2])
    new_S = (slots >= prompt_slots) & (slots <= prompt_slots + t)
    visible_BS = new_S[None] if prefix is not None else (slots < length_B[:, None]) | new_S
    position_B = length_B + t
    slot, visible_BES = prompt_slots + t, visible_BS[:, None]
    cache, h_BED = feed(params, config, cache, token_B[:, None], position_B[:, None], slot, visible_BES, prefix)
    return cache, h_BED[:, 0]


def decode_step(
    params: Params, config: ModelConfig, cache: KVCache, token_B: Array, length_B: Array, prompt_slots: int, t: Array
) -> tuple[KVCache, Array]:
    """Feed the t-th new token: the updated cache, and the logits of the token after it [B, V]."""
    cache, h_BD = feed_next_token(params, config, cache, token_B, length_B, prompt_slots, t)
    return cache, unembed(params, config, h_BD)
