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
    """A draw from softmax(logits), [B]."""
    return jax.random.categorical(key, logits_BV, axis=-1).astype(jnp.int32)
