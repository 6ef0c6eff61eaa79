"""From logits to a token: filters of logits, and the two ways to draw.

A filter maps logits [..., V] to logits [..., V]; a sampler maps (key, logits [B, V]) to tokens [B]. Compose them:

    sample = lambda key, logits: categorical(key, top_k(logits / 0.8, 50))
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxgpt.config import UserError
from jaxgpt.structs import Array

Filter = Callable[[Array], Array]
NEVER = -1e30  # a logit that is never drawn; finite, so that no difference of two is NaN


def temperature(logits: Array, t: float) -> Array:
    """logits / t. The temperature is part of the policy: training and reference use the same one."""
    if not t > 0:
        raise UserError(f"temperature {t} must be above 0; use greedy decoding for the limit of 0")
    return logits / t


def top_k(logits: Array, k: int) -> Array:
    """Keep the k largest logits (and ties with the k-th)."""
    if k < 1:
        raise UserError(f"top-k {k} must be at least 1")
    if k >= logits.shape[-1]:
        return logits
    threshold = jax.lax.top_k(logits, k)[0][..., -1:]
    return jnp.where(logits >= threshold, logits, NEVER)


def top_p(logits: Array, p: float) -> Array:
    """Nucleus: keep the most probable tokens until their probabilities reach p; always at least one."""
    if not 0 < p <= 1:
        raise UserError(f"top-p {p} must be in (0, 1]")
    if p == 1:
        return logits
    descending = -jnp.sort(-logits, axis=-1)
    probability = jax.nn.softmax(descending)
    before = jnp.cumsum(probability, axis=-1) - probability
    threshold = jnp.min(jnp.where(before < p, descending, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits >= threshold, logits, NEVER)


def greedy(key: Array, logits_BV: Array) -> Array:
    """The most probable token, [B]; the key is not used."""
    return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)


def categorical(key: Array, logits_BV: Array) -> Array:
    """A draw from softmax(logits), [B], by inverting the cumulative distribution.

    One random number a row, where the Gumbel trick takes V of them and an argmax (1.6 times the time of a whole
    decoding step on a CPU). The vocabulary is walked in two levels, blocks and then tokens, so that float32 sums
    stay short.
    """
    B, V = logits_BV.shape
    size = 1 << ((V - 1).bit_length() + 1) // 2  # about sqrt(V)
    weights_BV = jnp.exp(logits_BV - logits_BV.max(axis=-1, keepdims=True)).astype(jnp.float32)
    weights_BGI = jnp.pad(weights_BV, ((0, 0), (0, -V % size))).reshape(B, -1, size)
    block_BG = weights_BGI.sum(axis=-1)
    upto_BG = jnp.cumsum(block_BG, axis=-1)
    target_B1 = jax.random.uniform(key, (B, 1)) * upto_BG[:, -1:]
    group_B1 = _first_above(upto_BG, target_B1)
    rest_B1 = jnp.maximum(target_B1 - jnp.take_along_axis(upto_BG - block_BG, group_B1, axis=1), 0.0)
    inside_BI = jnp.take_along_axis(weights_BGI, group_B1[:, :, None], axis=1)[:, 0]
    return (group_B1 * size + _first_above(jnp.cumsum(inside_BI, axis=-1), rest_B1))[:, 0].astype(jnp.int32)


def _first_above(cumulative: Array, target: Array) -> Array:
    """Index [B, 1] of the first entry above the target; where rounding leaves none, the last that adds weight."""
    last = (cumulative < cumulative[:, -1:]).sum(axis=-1, keepdims=True)
    return jnp.minimum((cumulative <= target).sum(axis=-1, keepdims=True), last)
