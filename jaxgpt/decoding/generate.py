"""Autoregressive decoding: the model's output is its next input.

Prompts are read in one parallel pass that fills the first P cache slots; `jax.lax.scan` then adds one token per step.
Prompts stay padded on the right. The t-th new token of a row whose prompt has len tokens goes to slot P + t with
position len + t, and attends to slots s < len and P <= s <= P + t: one scalar cursor serves all rows. The cache grows
one segment at a time, so that a token's cost depends on the tokens so far, not on the maximum length.

    generate          a fixed number of steps: can be vmapped
    generate_until    the same tokens with a `while_loop` that stops when every row has ended
"""

from collections.abc import Callable, Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp

from jaxgpt import losses
from jaxgpt.config import ModelConfig
from jaxgpt.decoding import sampling
from jaxgpt.decoding.kv_cache import Prefix, empty_cache, feed_next_token, grow_cache, prefill_hidden
from jaxgpt.decoding.weights import prepare, unembed
from jaxgpt.errors import UserError
from jaxgpt.models import transformer
from jaxgpt.structs import Answers, Array, Batch, KVCache, Params

X = TypeVar("X")
Y = TypeVar("Y")
Sampler = Callable[[Array, Array], Array]  # (keys [B], logits [B, V]) -> tokens [B]
Carry = tuple[KVCache, Array, Array, Array | None]  # cache, token_B, ended_B, seen_BV
Loop = Callable[..., tuple[Carry, tuple[Array, ...]]]  # like jax.lax.scan: (step, carry, xs) -> (carry, collected)
SeenFilter = Callable[[Array, Array], Array]  # (logits [B, V], seen [B, V] bool) -> logits
SEGMENT = 128  # slots by which the cache grows; each segment is compiled separately
STATIC_ARGNAMES = (  # for jax.jit(generate, static_argnums=1, static_argnames=STATIC_ARGNAMES)
    "new_tokens",
    "stop",
    "pad",
    "sample",
    "filter_logits",
    "filter_seen",
    "samples",
    "segment",
    "loop",
)


def generate(
    params: Params,
    config: ModelConfig,
    prompt_BP: Array,
    length_B: Array,
    key: Array,
    *,
    new_tokens: int,
    stop: int | Sequence[int],
    pad: int = 0,
    sample: Sampler = sampling.categorical,
    filter_logits: sampling.Filter = lambda logits: logits,
    filter_seen: SeenFilter | None = None,
    samples: int = 1,
    value_head: Params | None = None,
    segment: int = SEGMENT,
    loop: Loop = jax.lax.scan,
) -> Answers:
    """Sample up to `new_tokens` tokens for each prompt, until `stop` (a token, or any of several).

    prompt_BP: prompts padded on the right; length_B: their lengths. `filter_logits` shapes the distribution
    (temperature, top-k, top-p); before it, `filter_seen(logits, seen)` may use which tokens the prompt and the answer
    so far contain (a repetition penalty); `sample` draws from the result, and the returned log-probabilities are those
    of that distribution. Each answer has its own keys (`sampling.answer_keys`). `samples` answers per prompt share its
    cache; those of prompt b start at row b * samples. `value_head` adds a critic's values. The cache grows by
    `segment` slots, each segment compiled separately. `loop` runs the steps: `jax.lax.scan`, with a fixed length that
    can be vmapped, or `scan_until_all_ended`. Rows that have ended yield `pad`. Raises UserError while tracing if
    prompt and answer don't fit the model's block.
    """
    P = prompt_BP.shape[1]
    check_fits_block(config, P, new_tokens)
    if samples < 1 or segment < 1:
        raise UserError(f"samples is {samples} and segment {segment}; both must be at least 1")
    params = prepare(params, config)
    ends = [*range(segment, new_tokens - 1, segment), new_tokens - 1]  # tokens fed by the end of each segment
    cache, h_BD = prefill_hidden(params, config, prompt_BP, length_B, ends[0] if samples == 1 else 0)
    prefix, prompt_slots = None, P
    if samples > 1:
        prefix, prompt_slots = Prefix(cache, length_B), 0
        cache = empty_cache(config, len(length_B) * samples, ends[0])
    h_BD, prompt_BP, length_B = (jnp.repeat(x, samples, axis=0) for x in (h_BD, prompt_BP, length_B))
    B = length_B.shape[0]
    stops = jnp.atleast_1d(jnp.asarray(stop, jnp.int32))
    seen_BV = None
    if filter_seen:
        real_BP = jnp.arange(P) < length_B[:, None]
        seen_BV = jnp.zeros((B, config.vocab), bool).at[jnp.arange(B)[:, None], prompt_BP].max(real_BP)

    def emit(
        key_B: Array, h_BD: Array, ended_B: Array, seen_BV: Array | None
    ) -> tuple[Array, Array | None, tuple[Array, ...]]:
        """The next token from the hidden state before it: (ended, seen, outputs to collect)."""
        logits_BV = unembed(params, config, h_BD)
        with jax.named_scope("sample"):
            if filter_seen is not None and seen_BV is not None:
                logits_BV = filter_seen(logits_BV, seen_BV)
            logits_BV = filter_logits(logits_BV)
            token_B = sample(key_B, logits_BV)
        out = [jnp.where(ended_B, pad, token_B).astype(jnp.int32)]
        out += [jnp.where(ended_B, 0.0, losses.log_prob(logits_BV, token_B)), ended_B]
        if value_head is not None:
            out.append(jnp.where(ended_B, 0.0, transformer.apply_scalar_head(value_head, h_BD)))
        if seen_BV is not None:
            seen_BV = seen_BV.at[jnp.arange(B), token_B].set(True)
        return ended_B | (token_B[:, None] == stops).any(axis=1), seen_BV, tuple(out)

    def step(carry: Carry, x: tuple[Array, Array]) -> tuple[Carry, tuple[Array, ...]]:
        cache, token_B, ended_B, seen_BV = carry
        t, key_B = x
        cache, h_BD = feed_next_token(params, config, cache, token_B, length_B, prompt_slots, t, prefix)
        ended_B, seen_BV, out = emit(key_B, h_BD, ended_B, seen_BV)
        return (cache, out[0], ended_B, seen_BV), out

    key_B = sampling.answer_keys(key, jnp.arange(B))
    key_AB = jax.vmap(sampling.token_keys, in_axes=(None, 0))(key_B, jnp.arange(new_tokens))
    ended_B, seen_BV, out = emit(key_AB[0], h_BD, jnp.zeros(B, bool), seen_BV)
    carry, collected = (cache, out[0], ended_B, seen_BV), [jax.tree.map(lambda x: x[None], out)]
    for begin, end in zip([0, *ends], ends, strict=False):
        if begin == end:
            continue
        if begin:
            carry = (grow_cache(carry[0], end - begin), *carry[1:])
        carry, out = loop(step, carry, (jnp.arange(begin, end), key_AB[1 + begin : 1 + end]))
        collected.append(out)
    tokens_AB, logp_AB, before_AB, *values = (jnp.concatenate(part) for part in zip(*collected, strict=True))
    tokens_AB = jnp.where(before_AB, pad, tokens_AB)
    return Answers(
        tokens_AB.T, logp_AB.T, (~before_AB).sum(0).astype(jnp.int32), carry[2], values[0].T if values else None
    )


def scan_until_all_ended(step: Callable[[Carry, X], tuple[Carry, Y]], carry: Carry, xs: X) -> tuple[Carry, Y]:
    """`jax.lax.scan` that stops early when every row has ended.

    The outputs of skipped steps are zeros, and True for booleans: their tokens count as ended.
    """
    steps = jax.tree.leaves(xs)[0].shape[0]
    # Keys are passed as raw data: each is used only once, but JAX's key-reuse check can't tell.
    is_key = jax.tree.map(lambda x: jnp.issubdtype(x.dtype, jax.dtypes.prng_key), xs)
    plain = jax.tree.map(lambda x, key: jax.random.key_data(x) if key else x, xs, is_key)

    def at(i: Array | int) -> X:
        return jax.tree.map(lambda x, key: jax.random.wrap_key_data(x[i]) if key else x[i], plain, is_key)

    shapes = jax.eval_shape(step, carry, at(0))[1]
    empty = jax.tree.map(lambda x: jnp.full((steps, *x.shape), x.dtype == jnp.bool, x.dtype), shapes)

    def body(state: tuple[Array, Carry, Y]) -> tuple[Array, Carry, Y]:
        i, carry, collected = state
        carry, out = step(carry, at(i))
        place = lambda all_, one: jax.lax.dynamic_update_index_in_dim(all_, one, i, 0)  # noqa: E731
        return i + 1, carry, jax.tree.map(place, collected, out)

    _, carry, collected = jax.lax.while_loop(
        lambda state: (state[0] < steps) & ~state[1][2].all(), body, (jnp.zeros((), jnp.int32), carry, empty)
    )
    return carry, collected


def generate_until(*args: object, **settings: object) -> Answers:
    """The same tokens as `generate` with the same arguments, in a loop that stops when every row has ended."""
    return generate(*args, loop=scan_until_all_ended, **settings)  # type: ignore[arg-type]


def check_fits_block(config: ModelConfig, prompt_tokens: int, new_tokens: int) -> None:
    """Raise UserError if the lengths exceed the model's block: positions and cache slots would be clamped silently."""
    if new_tokens < 1:
        raise UserError(f"new_tokens is {new_tokens}; ask for at least 1")
    if prompt_tokens + new_tokens > config.block:
        raise UserError(
            f"a prompt of {prompt_tokens} tokens and {new_tokens} new ones don't fit the model's block of "
            f"{config.block}; shorten the prompt, ask for fewer tokens or enlarge model.block"
        )


def join_prompt_and_answer(prompt_BP: Array, length_B: Array, answers: Answers, pad: int = 0) -> tuple[Batch, Array]:
    """Rows of prompt + answer without gaps, with the answers' mask; and the sampler's log-probabilities: [B, P + A]."""
    P, A = prompt_BP.shape[1], answers.tokens_BA.shape[1]
    t_T = jnp.arange(P + A)
    in_prompt_BT = t_T < length_B[:, None]
    mask_BT = ~in_prompt_BT & (t_T < (length_B + answers.length_B)[:, None])
    source_BT = jnp.where(in_prompt_BT, t_T, jnp.clip(t_T - length_B[:, None] + P, 0, P + A - 1))
    both_BT = jnp.concatenate([prompt_BP, answers.tokens_BA], axis=1)
    tokens_BT = jnp.where(in_prompt_BT | mask_BT, jnp.take_along_axis(both_BT, source_BT, axis=1), pad)
    logp_BT = jnp.take_along_axis(jnp.pad(answers.logp_BA, ((0, 0), (P, 0))), source_BT, axis=1)
    return Batch(tokens_BT, mask_BT), jnp.where(mask_BT, logp_BT, 0.0)
