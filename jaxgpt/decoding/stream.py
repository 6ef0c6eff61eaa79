"""Streaming: one answer, token by token, for interactive use."""

import functools
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp

from jaxgpt.config import ModelConfig
from jaxgpt.decoding import sampling
from jaxgpt.decoding.generate import SEGMENT, Sampler, check_fits_block
from jaxgpt.decoding.kv_cache import decode_step, grow_cache, prefill
from jaxgpt.decoding.weights import prepare
from jaxgpt.errors import UserError
from jaxgpt.structs import Array, KVCache, Params


def stream(
    params: Params,
    config: ModelConfig,
    prompt_BP: Array,
    length_B: Array,
    key: Array,
    *,
    new_tokens: int,
    stop: int | Sequence[int],
    sample: Sampler = sampling.categorical,
    filter_logits: sampling.Filter = lambda logits: logits,
    segment: int = SEGMENT,
) -> Iterator[int]:
    """Yield the tokens of `generate` for one prompt, one at a time as they come.

    The cache doubles when it is full. Parameters that already went through `prepare` are used as they are. A new
    `sample` or `filter_logits` is compiled again, so pass the same functions each time; the numbers held by a
    `jax.tree_util.Partial` may change without recompiling. UserError if a logit is not finite."""
    P = prompt_BP.shape[1]
    check_fits_block(config, P, new_tokens)
    stops = {stop} if isinstance(stop, int) else set(stop)
    if "head_DV" not in params:
        params = jax.jit(prepare, static_argnums=1)(params, config)
    room = min(segment, new_tokens)
    chosen = {"sample": _as_partial(sample), "filter_logits": _as_partial(filter_logits)}
    key_B = sampling.answer_keys(key, jnp.arange(1))
    cache, token_B = _first_token(params, config, prompt_BP, length_B, room, key_B, **chosen)
    for t in range(new_tokens):
        token = int(token_B[0])
        if token < 0:
            raise UserError("the model's logits are NaN or infinite; train it again with a lower learning rate")
        if token in stops:
            return
        yield token
        if t + 1 == new_tokens:
            return
        if t == room:
            more = min(room, new_tokens - room)
            cache, room = grow_cache(cache, more), room + more
        cache, token_B = _next_token(params, config, cache, token_B, length_B, P, jnp.asarray(t), key_B, **chosen)


def _as_partial(function: Callable[..., Array]) -> jax.tree_util.Partial:
    """A function that jit takes as an argument: the numbers a `Partial` holds are traced, everything else is static."""
    return function if isinstance(function, jax.tree_util.Partial) else jax.tree_util.Partial(function)


@jax.named_scope("sample")
def _draw(key_B: Array, logits_BV: Array, sample: Sampler, filter_logits: sampling.Filter) -> Array:
    """One token for each row; -1 where a logit is not finite."""
    finite_B = jnp.isfinite(logits_BV).all(axis=-1)
    return jnp.where(finite_B, sample(key_B, filter_logits(logits_BV)), -1)


@functools.partial(jax.jit, static_argnums=(1, 4))
def _first_token(
    params: Params,
    config: ModelConfig,
    prompt_BP: Array,
    length_B: Array,
    slots: int,
    key_B: Array,
    *,
    sample: Sampler,
    filter_logits: sampling.Filter,
) -> tuple[KVCache, Array]:
    cache, logits_BV = prefill(params, config, prompt_BP, length_B, slots)
    return cache, _draw(sampling.token_keys(key_B, 0), logits_BV, sample, filter_logits)


@functools.partial(jax.jit, static_argnums=(1, 5), donate_argnums=2)
def _next_token(
    params: Params,
    config: ModelConfig,
    cache: KVCache,
    token_B: Array,
    length_B: Array,
    prompt_slots: int,
    t: Array,
    key_B: Array,
    *,
    sample: Sampler,
    filter_logits: sampling.Filter,
) -> tuple[KVCache, Array]:
    cache, logits_BV = decode_step(params, config, cache, token_B, length_B, prompt_slots, t)
    return cache, _draw(sampling.token_keys(key_B, t + 1), logits_BV, sample, filter_logits)
