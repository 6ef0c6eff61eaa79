"""Autoregressive decoding: the model's output is its next input.

The prompt is read in one parallel pass that fills the first P cache slots; `jax.lax.scan` then adds one token a step.
Prompts stay padded on the right. The t-th new token of a row whose prompt has len tokens goes to slot P + t with
position len + t, and sees the slots s < len and P <= s <= P + t: one scalar cursor serves all rows.
"""

from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp

from jaxgpt import losses, model, sampling
from jaxgpt.config import ModelConfig, UserError
from jaxgpt.structs import Answers, Array, Batch, KVCache, Params

Sampler = Callable[[Array, Array], Array]


def prefill(
    params: Params, config: ModelConfig, prompt_BP: Array, length_B: Array, slots: int
) -> tuple[KVCache, Array]:
    """The cache after the prompts, with room for `slots` new tokens, and the logits of the first of them [B, V]."""
    h_BPD, kv = model.hidden_and_kv(params, config, prompt_BP)
    room = ((0, 0), (0, 0), (0, slots), (0, 0))
    keys, values = (tuple(jnp.pad(layer[i].swapaxes(1, 2), room) for layer in kv) for i in (0, 1))
    h_BD = jnp.take_along_axis(h_BPD, (length_B - 1)[:, None, None], axis=1)[:, 0]
    return KVCache(keys, values), model.unembed(params, h_BD)


def decode_step(
    params: Params, config: ModelConfig, cache: KVCache, token_B: Array, length_B: Array, prompt_slots: int, t: Array
) -> tuple[KVCache, Array]:
    """Feed the t-th new token: the cache with it, and the logits of the next token [B, V]."""
    slots = jnp.arange(cache.keys[0].shape[2])
    new_S = (slots >= prompt_slots) & (slots <= prompt_slots + t)
    visible_B1S = ((slots < length_B[:, None]) | new_S)[:, None, :]
    x_BD = model.embed(params, config, token_B, length_B + t)
    start = (0, 0, prompt_slots + t, 0)
    keys, values = [], []
    for n in range(config.layers):
        block = params[f"block_{n}"]
        normed = model.layer_norm(block["attention_norm"], x_BD, config.norm_epsilon)
        q_BHK, k_BHK, v_BHK = model.split_heads(model.dense(block["qkv"], normed), config.heads)
        keys.append(jax.lax.dynamic_update_slice(cache.keys[n], k_BHK[:, :, None], start))
        values.append(jax.lax.dynamic_update_slice(cache.values[n], v_BHK[:, :, None], start))
        scores_BHS = jnp.einsum("bhk,bhsk->bhs", q_BHK, keys[n], preferred_element_type=jnp.float32)
        scores_BHS = jnp.where(visible_B1S, scores_BHS * config.head_dim**-0.5, sampling.NEVER)
        weights_BHS = jax.nn.softmax(scores_BHS).astype(x_BD.dtype)
        mixed_BHK = jnp.einsum("bhs,bhsk->bhk", weights_BHS, values[n])
        x_BD += model.dense(block["out"], mixed_BHK.reshape(x_BD.shape))
        normed = model.layer_norm(block["mlp_norm"], x_BD, config.norm_epsilon)
        x_BD += model.mlp(block, normed)
    h_BD = model.layer_norm(params["final_norm"], x_BD, config.norm_epsilon)
    return KVCache(tuple(keys), tuple(values)), model.unembed(params, h_BD)


def generate(
    params: Params,
    config: ModelConfig,
    prompt_BP: Array,
    length_B: Array,
    key: Array,
    *,
    new_tokens: int,
    stop: int,
    pad: int = 0,
    sample: Sampler = sampling.categorical,
    filter_logits: sampling.Filter = lambda logits: logits,
) -> Answers:
    """Sample up to `new_tokens` tokens for each prompt, until `stop`.

    prompt_BP: prompts padded on the right; length_B: their lengths. `filter_logits` shapes the distribution
    (temperature, top-k, top-p), `sample` draws from it; the returned log-probabilities are those of the shaped
    distribution. The program has a fixed length, so it can be vmapped; rows that have ended yield `pad`.
    Raises UserError while tracing when prompt and answer don't fit the model's block.
    """
    check_room(config, prompt_BP.shape[1], new_tokens)
    P = prompt_BP.shape[1]
    params = cast_weights(params, config)
    cache, logits_BV = prefill(params, config, prompt_BP, length_B, new_tokens)

    def emit(key: Array, logits_BV: Array, ended_B: Array) -> tuple[Array, Array, Array]:
        logits_BV = filter_logits(logits_BV)
        token_B = sample(key, logits_BV)
        logp_B = losses.log_prob(logits_BV, token_B)
        return (
            jnp.where(ended_B, pad, token_B).astype(jnp.int32),
            jnp.where(ended_B, 0.0, logp_B),
            ended_B | (token_B == stop),
        )

    def step(carry: tuple, x: tuple[Array, Array]) -> tuple[tuple, tuple[Array, Array, Array]]:
        cache, token_B, ended_B = carry
        t, key = x
        cache, logits_BV = decode_step(params, config, cache, token_B, length_B, P, t)
        token_B, logp_B, next_ended_B = emit(key, logits_BV, ended_B)
        return (cache, token_B, next_ended_B), (token_B, logp_B, ended_B)

    keys = jax.random.split(key, new_tokens)
    none_B = jnp.zeros(prompt_BP.shape[0], bool)
    token_B, logp_B, ended_B = emit(keys[0], logits_BV, none_B)
    rows = [(token_B[None], logp_B[None], none_B[None])]
    if new_tokens > 1:
        xs = (jnp.arange(new_tokens - 1), keys[1:])
        (_, _, ended_B), out = jax.lax.scan(step, (cache, token_B, ended_B), xs)
        rows.append(out)
    tokens_AB, logp_AB, before_AB = (jnp.concatenate(part) for part in zip(*rows, strict=True))
    return Answers(tokens_AB.T, logp_AB.T, (~before_AB).sum(0).astype(jnp.int32), ended_B)


def cast_weights(params: Params, config: ModelConfig) -> Params:
    """Matrix weights in the activations' dtype, once, outside the loop; norms stay float32."""
    return jax.tree.map(lambda w: w.astype(config.dtype) if w.ndim >= 2 else w, params)


def check_room(config: ModelConfig, prompt_tokens: int, new_tokens: int) -> None:
    """Refuse what would run past the model's block: positions and cache slots clamp in silence there."""
    if new_tokens < 1:
        raise UserError(f"new_tokens is {new_tokens}; ask for at least 1")
    if prompt_tokens + new_tokens > config.block:
        raise UserError(
            f"a prompt of {prompt_tokens} tokens and {new_tokens} new ones don't fit the model's block of "
            f"{config.block}; shorten the prompt, ask for fewer tokens or enlarge model.block"
        )


def join(prompt_BP: Array, length_B: Array, answers: Answers, pad: int = 0) -> tuple[Batch, Array]:
    """Rows of prompt + answer without a gap, [B, P + A], with the answers' mask; and the sampler's log-probs there."""
    P, A = prompt_BP.shape[1], answers.tokens_BA.shape[1]
    t_T = jnp.arange(P + A)
    in_prompt_BT = t_T < length_B[:, None]
    mask_BT = ~in_prompt_BT & (t_T < (length_B + answers.length_B)[:, None])
    source_BT = jnp.where(in_prompt_BT, t_T, jnp.clip(t_T - length_B[:, None] + P, 0, P + A - 1))
    both_BT = jnp.concatenate([prompt_BP, answers.tokens_BA], axis=1)
    tokens_BT = jnp.where(in_prompt_BT | mask_BT, jnp.take_along_axis(both_BT, source_BT, axis=1), pad)
    logp_BT = jnp.take_along_axis(jnp.pad(answers.logp_BA, ((0, 0), (P, 0))), source_BT, axis=1)
    return Batch(tokens_BT, mask_BT), jnp.where(mask_BT, logp_BT, 0.0)


def stream(
    params: Params,
    config: ModelConfig,
    prompt_BP: Array,
    length_B: Array,
    key: Array,
    *,
    new_tokens: int,
    stop: int,
    sample: Sampler = sampling.categorical,
    filter_logits: sampling.Filter = lambda logits: logits,
) -> Iterator[int]:
    """The tokens of `generate` for one prompt, one at a time as they come: for a person who reads along."""
    check_room(config, prompt_BP.shape[1], new_tokens)
    P = prompt_BP.shape[1]
    params = cast_weights(params, config)
    start = jax.jit(prefill, static_argnums=(1, 4))
    advance = jax.jit(decode_step, static_argnums=(1, 5), donate_argnums=2)
    cache, logits_BV = start(params, config, prompt_BP, length_B, new_tokens)
    for t, step_key in enumerate(jax.random.split(key, new_tokens)):
        token_B = sample(step_key, filter_logits(logits_BV))
        if int(token_B[0]) == stop:
            return
        yield int(token_B[0])
        if t + 1 < new_tokens:
            cache, logits_BV = advance(params, config, cache, token_B, length_B, P, jnp.asarray(t))
