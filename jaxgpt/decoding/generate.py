"""Autoregressive decoding: the model's output is its next input.

Prompts are read in one parallel pass that fills the first P cache slots; `jax.lax.scan` then adds one token per step.
Prompts stay padded on the right. The t-th new token of a row whose prompt has len tokens goes to slot P + t with
position len + t, and attends to slots s < len and P <= s <= P + t: one scalar cursor serves all rows. The cache grows
one segment at a time, so that a token's cost depends on the tokens so far, not on the maximum length.

    generate          a fixed number of steps: can be vmapped
    generate_until    the same tokens with a `while_loop` that stops when every row has ended
"""

import functools
from collections.abc import Callable, Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
from flax import struct

from jaxgpt import losses
from jaxgpt.config import ModelConfig
from jaxgpt.decoding import sampling
from jaxgpt.errors import UserError
from jaxgpt.models import layers, lora, sharding, transformer
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


def prepare(params: Params, config: ModelConfig) -> Params:
    """Weights in the form decoding reads, made once outside the loop: adapters merged, all but norms in the dtype they
    are used in, shards along 'fsdp' gathered, and the head as [D, V], which a product with few rows reads far faster
    than its transpose."""
    if "head_DV" in params:
        return params
    params = lora.merge(params)

    biases = jnp.float32 if sharding.target_platform(config) == "cpu" else config.dtype  # as `layers.dense` adds them

    def ready(path: tuple[jax.tree_util.DictKey, ...], w: Array) -> Array:
        if not path[-2].key.endswith("norm"):
            w = w.astype(config.dtype if w.ndim >= 2 else biases)
        return sharding.gather_fsdp(w, tuple(sharding.find_rule(path, transformer.PARTITION)))

    cast = jax.tree_util.tree_map_with_path(ready, params)
    head_DV = jax.lax.optimization_barrier(transformer.head_weights(cast).T)
    return {**{name: part for name, part in cast.items() if name != "unembed"}, "head_DV": head_DV}


def quantise_int8(params: Params) -> Params:
    """Quantise every matrix of `prepare`'s parameters to int8, with one scale per column: w ~ round(w / s) s with
    s = max|w| / 127. Norms, biases and the embedding (a token reads one row of it) stay as they are.
    For decoding only."""

    def quantise(w: Array) -> tuple[Array, Array]:
        w = w.astype(jnp.float32)
        scale = jnp.maximum(jnp.abs(w).max(axis=0), 1e-30) / 127.0
        return jnp.round(w / scale).astype(jnp.int8), scale

    def layer(part: Params) -> Params:
        if "kernel" not in part:
            return part
        kernel, scale = quantise(part["kernel"])
        return {**part, "kernel": kernel, "scale": scale}

    blocks = {
        name: {inner: layer(part) for inner, part in block.items()}
        for name, block in params.items()
        if name.startswith("block_")
    }
    head_DV, scale_V = quantise(params["head_DV"])
    return {**params, **blocks, "head_DV": head_DV, "head_scale_V": scale_V}


@jax.named_scope("head")
def unembed(params: Params, config: ModelConfig, h: Array) -> Array:
    """`transformer.unembed`, with the head made by `prepare` if there is one: float32 logits."""
    if "head_DV" not in params:
        return transformer.unembed(params, h)
    if "head_scale_V" in params:
        return layers.int8_product(h, params["head_DV"], params["head_scale_V"], sharding.target_platform(config))
    return jnp.matmul(h, params["head_DV"], preferred_element_type=jnp.float32)


def prefill_hidden(
    params: Params, config: ModelConfig, prompt_BP: Array, length_B: Array, slots: int, copies: int = 1
) -> tuple[KVCache, Array]:
    """The cache after the prompts, with room for `slots` new tokens, and each prompt's last hidden state [B, D].

    Each prompt gets `copies` adjacent rows of the cache. On a CPU the cache is float32: XLA would convert an entire
    bfloat16 one in every step.
    """
    h_BPD, kv = transformer.hidden_and_kv(params, config, prompt_BP)
    dtype = jnp.float32 if sharding.target_platform(config) == "cpu" else config.dtype

    def layout(x_BPGK: Array) -> Array:
        x_BGPK = jnp.repeat(x_BPGK.swapaxes(1, 2).astype(dtype), copies, axis=0)
        x_BGPK = sharding.constrain(x_BGPK, sharding.ROW_AXES, "tensor", None, None)
        return x_BGPK.reshape(*(n for n in x_BGPK.shape[:2] if n > 1), *x_BGPK.shape[2:])

    keys, values = (tuple(layout(layer[i]) for layer in kv) for i in (0, 1))
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
    dtype = jnp.float32 if sharding.target_platform(config) == "cpu" else config.dtype
    zeros_BGSK = jnp.zeros((rows, config.groups, slots, config.head_dim), dtype)
    zeros_BGSK = sharding.constrain(zeros_BGSK, sharding.ROW_AXES, "tensor", None, None)
    one = zeros_BGSK.reshape(*(n for n in zeros_BGSK.shape[:2] if n > 1), *zeros_BGSK.shape[2:])
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
