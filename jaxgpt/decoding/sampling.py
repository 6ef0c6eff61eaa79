"""From logits to tokens: logit filters and two samplers.

A filter maps logits [..., V] to logits [..., V]; a sampler maps (keys [B], logits [B, V]) to tokens [B]. Compose them:

    sample = lambda key_B, logits_BV: categorical(key_B, top_k(logits_BV / 0.8, 50))

Row b of a call draws token t with `token_keys(answer_keys(key, arange(B)), t)[b]`: it depends on the key, b and t
alone, not on the other rows, nor on when the token is drawn.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxgpt.errors import UserError
from jaxgpt.losses import MASKED_LOGIT
from jaxgpt.structs import Array

Filter = Callable[[Array], Array]


def temperature(logits: Array, t: float | Array) -> Array:
    """logits / t. The temperature is part of the policy: training and the reference policy use the same one."""
    if isinstance(t, (int, float)) and not t > 0:
        raise UserError(f"temperature is {t}; it must be above 0 (for 0, use greedy decoding)")
    return logits / t


def top_k(logits: Array, k: int) -> Array:
    """Keep the k largest logits and ties with the k-th; all of them if there are no more than k."""
    if k < 1:
        raise UserError(f"top-k is {k}; it must be at least 1")
    if k >= logits.shape[-1]:
        return logits
    threshold = jax.lax.platform_dependent(
        logits,
        cpu=lambda x: jax.lax.top_k(x, k)[0][..., -1:],
        default=lambda x: _threshold(x, jnp.ones(x.shape, jnp.int32), k),  # where a top_k sorts the vocabulary
    )
    return jnp.where(logits >= threshold, logits, MASKED_LOGIT)


def top_p(logits: Array, p: float | Array) -> Array:
    """Nucleus sampling: keep the smallest set of top tokens whose total probability reaches p (and ties).

    Always keeps at least one, also at p = 0 (Holtzman et al. 2020). Nothing is sorted (`_threshold`).
    """
    if isinstance(p, (int, float)):
        if not 0 <= p <= 1:
            raise UserError(f"top-p is {p}; it must be at least 0 and at most 1")
        if p == 1:
            return logits
    p = jnp.maximum(p, float(np.finfo(np.float32).tiny))  # every threshold reaches 0, but only some reach more
    probability = jax.nn.softmax(logits.astype(jnp.float32))
    threshold = jax.lax.platform_dependent(
        logits, probability, p, cpu=functools.partial(_threshold, bits=1), default=_threshold
    )
    return jnp.where(logits >= threshold, logits, MASKED_LOGIT)


def _threshold(logits: Array, weights: Array, least: ArrayLike, bits: int = 4) -> Array:
    """The largest number at or above which the logits' weights add up to `least`, [..., 1] float32.

    It is found from its highest bits down, `bits` of them in each pass over the logits: 2^bits - 1 candidates are
    tried at once. With 4 there are 8 passes, which suits memory that is slow to read; a CPU computes least with 1."""
    order, zero = _sortable_bits(logits), np.zeros((), weights.dtype)

    def next_bits(i: Array, threshold: Array) -> Array:
        shift = (32 - bits * (i + 1)).astype(jnp.uint32)
        candidates = [threshold | jax.lax.shift_left(jnp.uint32(n), shift) for n in range(1, 2**bits)]
        above = tuple(jnp.where(order >= x, weights, 0) for x in candidates)
        sums = jax.lax.reduce(above, (zero,) * len(above), _add_each, (order.ndim - 1,))  # in a single kernel
        highest = functools.reduce(jnp.add, ((one[..., None] >= least).astype(jnp.uint32) for one in sums))
        return threshold | jax.lax.shift_left(highest, shift)

    return _from_sortable_bits(
        jax.lax.fori_loop(0, 32 // bits, next_bits, jnp.zeros((*logits.shape[:-1], 1), jnp.uint32))
    )


def _add_each(xs: tuple[Array, ...], ys: tuple[Array, ...]) -> tuple[Array, ...]:
    return tuple(x + y for x, y in zip(xs, ys, strict=True))


_SIGN = 1 << 31


def _sortable_bits(x: Array) -> Array:
    """float32 mapped to uint32 in the same order; both zeros to the same."""
    bits = jax.lax.bitcast_convert_type(jnp.where(x == 0, 0.0, x).astype(jnp.float32), jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(_SIGN))


def _from_sortable_bits(order: Array) -> Array:
    bits = jnp.where(order >> 31 == 1, order ^ jnp.uint32(_SIGN), ~order)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def min_p(logits: Array, p: float) -> Array:
    """Keep tokens at least p times as probable as the most probable one (Nguyen et al. 2024)."""
    if not 0 <= p <= 1:
        raise UserError(f"min-p is {p}; it must be at least 0 and at most 1")
    if p == 0:
        return logits
    return jnp.where(logits >= logits.max(axis=-1, keepdims=True) + math.log(p), logits, MASKED_LOGIT)


def repetition_penalty(logits: Array, seen: Array, penalty: float) -> Array:
    """Divide positive and multiply negative logits of `seen` tokens (bool [..., V]) by the penalty.

    Keskar et al. 2019 (CTRL), section 4.1: typically about 1.2; 1 changes nothing.
    """
    if not penalty > 0:
        raise UserError(f"repetition penalty is {penalty}; it must be above 0 (1 changes nothing)")
    return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def answer_keys(key: Array, number_B: Array) -> Array:
    """Each answer's key, [B]: `key` folded with the answer's number."""
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, number_B)


def token_keys(key_B: Array, t: Array | int) -> Array:
    """The key for token t of each answer: the answer's key folded with t (a number, or one for each row), [B]."""
    return jax.vmap(jax.random.fold_in)(key_B, jnp.broadcast_to(t, key_B.shape))


def greedy(key_B: Array, logits_BV: Array) -> Array:
    """The most probable token, [B]; the keys are not used."""
    return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)


def categorical(key_B: Array, logits_BV: Array) -> Array:
    """A sample from softmax(logits) with each row's own key, [B], by inverting the cumulative distribution.

    Uses one random number per row. The Gumbel trick needs V of them and an argmax, which on a CPU take 1.6 times
    as long as a whole decoding step. The vocabulary is searched in two levels, first blocks (axis G) and then the
    tokens of one block (axis I), so that float32 sums stay short. Logits may be -inf; a row of only -inf gives token 0.
    """
    B, V = logits_BV.shape
    block_size = 1 << ((V - 1).bit_length() + 1) // 2  # about sqrt(V)
    top_B1 = jnp.maximum(logits_BV.max(axis=-1, keepdims=True), MASKED_LOGIT)
    weights_BV = jnp.exp(logits_BV - top_B1).astype(jnp.float32)
    weights_BGI = jnp.pad(weights_BV, ((0, 0), (0, -V % block_size))).reshape(B, -1, block_size)
    block_weight_BG = weights_BGI.sum(axis=-1)
    cumulative_BG = jnp.cumsum(block_weight_BG, axis=-1)
    target_B1 = jax.vmap(jax.random.uniform)(key_B)[:, None] * cumulative_BG[:, -1:]
    block_B1 = _first_above(cumulative_BG, target_B1)
    before_B1 = jnp.take_along_axis(cumulative_BG - block_weight_BG, block_B1, axis=1)
    rest_B1 = jnp.maximum(target_B1 - before_B1, 0.0)
    inside_BI = jnp.take_along_axis(weights_BGI, block_B1[:, :, None], axis=1)[:, 0]
    token_B1 = block_B1 * block_size + _first_above(jnp.cumsum(inside_BI, axis=-1), rest_B1)
    return token_B1[:, 0].astype(jnp.int32)


def _first_above(cumulative: Array, target: Array) -> Array:
    """Index [B, 1] of the first entry above the target; if rounding leaves none, the last one with any weight."""
    last = (cumulative < cumulative[:, -1:]).sum(axis=-1, keepdims=True)
    return jnp.minimum((cumulative <= target).sum(axis=-1, keepdims=True), last)
