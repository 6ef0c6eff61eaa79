"""Beam search: the most probable answers instead of samples.

Sutskever et al. 2014 (section 3.2); log-probabilities are normalised by length as in Wu et al. 2016 (section 7), with a
plain power of the length. A finished hypothesis keeps its beam, and the search continues with the beams that are left:
hypotheses compete only with others of the same length, one beam is greedy decoding, and one beam for every possible
answer is exhaustive search.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import struct

from jaxgpt.config import ModelConfig
from jaxgpt.decoding.generate import check_fits_block
from jaxgpt.decoding.kv_cache import decode_step, prefill
from jaxgpt.decoding.weights import prepare
from jaxgpt.errors import UserError
from jaxgpt.structs import Array, KVCache, Params


@struct.dataclass
class Beams:
    """C answers for each prompt, best first. Unused places (C > V**A) have score_BC -inf and length 0."""

    tokens_BCA: Array  # int32, padded after the stop token
    score_BC: Array  # float32: sum of log-probabilities / length**length_penalty
    length_BC: Array  # int32: tokens up to and including the stop token
    ended_BC: Array  # bool: the stop token was reached


def beam_search(
    params: Params,
    config: ModelConfig,
    prompt_BP: Array,
    length_B: Array,
    *,
    beams: int,
    new_tokens: int,
    stop: int | Sequence[int],
    pad: int = 0,
    length_penalty: float = 0.0,
) -> Beams:
    """The best `beams` answers of up to `new_tokens` tokens for each prompt, until `stop` (a token, or any of several).

    prompt_BP: prompts padded on the right; length_B: their lengths. `length_penalty` 0 ranks by log-probability, 1 by
    its mean per token; it only orders the results and does not steer the search. Raises UserError while tracing if
    beams < 1, or if prompt and answer don't fit the model's block.
    """
    (B, P), C, A = prompt_BP.shape, beams, new_tokens
    if C < 1:
        raise UserError(f"beams is {C}; ask for at least 1")
    check_fits_block(config, P, A)
    params = prepare(params, config)
    stops = jnp.atleast_1d(jnp.asarray(stop, jnp.int32))
    cache, logits_BV = prefill(params, config, prompt_BP, length_B, A - 1, copies=C)
    rows_length = jnp.repeat(length_B, C)

    def choose(t: Array, beams: Beams, logits_BCV: Array) -> tuple[Beams, Array]:
        """The hypotheses after token t, and the parent of each [B, C]."""
        V = logits_BCV.shape[-1]
        sum_BCV = beams.score_BC[:, :, None] + jax.nn.log_softmax(logits_BCV)
        finished_V = jnp.where(jnp.arange(V) == 0, jnp.inf, -jnp.inf)  # a single continuation, ahead of all others
        rank_BCV = jnp.where(beams.ended_BC[:, :, None], finished_V, sum_BCV)
        value_BC, index_BC = jax.lax.top_k(rank_BCV.reshape(B, -1), C)
        parent_BC, token_BC = index_BC // V, (index_BC % V).astype(jnp.int32)
        old = jax.tree.map(
            lambda x: jnp.take_along_axis(x, parent_BC.reshape(B, C, *[1] * (x.ndim - 2)), axis=1), beams
        )
        real_BC = value_BC > -jnp.inf  # False: a place without a hypothesis
        token_BC = jnp.where(old.ended_BC, pad, token_BC)
        ended_BC = old.ended_BC | (token_BC[:, :, None] == stops).any(axis=2)
        new = Beams(
            tokens_BCA=jax.lax.dynamic_update_index_in_dim(old.tokens_BCA, token_BC, t, axis=2),
            score_BC=jnp.where(old.ended_BC & real_BC, old.score_BC, value_BC),
            length_BC=old.length_BC + ~old.ended_BC,
            ended_BC=ended_BC & real_BC,
        )
        return new, parent_BC

    def step(carry: tuple[KVCache, Beams], t: Array) -> tuple[tuple[KVCache, Beams], None]:
        cache, beams = carry
        token_BC = jax.lax.dynamic_index_in_dim(beams.tokens_BCA, t, axis=2, keepdims=False)
        cache, logits = decode_step(params, config, cache, token_BC.reshape(-1), rows_length, P, t)
        beams, parent_BC = choose(t + 1, beams, logits.reshape(B, C, -1))
        if C > 1:  # beams of one prompt have the same prompt slots: reorder only the answers'
            rows = (jnp.arange(B)[:, None] * C + parent_BC).reshape(-1)
            cache = jax.tree.map(lambda x: x.at[..., P:, :].set(x[rows, ..., P:, :]), cache)
        return (cache, beams), None

    empty = Beams(
        tokens_BCA=jnp.full((B, C, A), pad, jnp.int32),
        score_BC=jnp.broadcast_to(jnp.where(jnp.arange(C) == 0, 0.0, -jnp.inf), (B, C)),
        length_BC=jnp.zeros((B, C), jnp.int32),
        ended_BC=jnp.zeros((B, C), bool),
    )
    found, _ = choose(jnp.zeros((), jnp.int32), empty, jnp.broadcast_to(logits_BV[:, None], (B, C, config.vocab)))
    (_, found), _ = jax.lax.scan(step, (cache, found), jnp.arange(A - 1))
    real_BC = found.score_BC > -jnp.inf
    length_BC = jnp.where(real_BC, found.length_BC, 0)
    score_BC = found.score_BC / jnp.maximum(length_BC, 1).astype(jnp.float32) ** length_penalty
    score_BC, order_BC = jax.lax.top_k(score_BC, C)
    tokens_BCA = jnp.where(real_BC[:, :, None], found.tokens_BCA, pad)
    return Beams(
        tokens_BCA=jnp.take_along_axis(tokens_BCA, order_BC[:, :, None], axis=1),
        score_BC=score_BC,
        length_BC=jnp.take_along_axis(length_BC, order_BC, axis=1),
        ended_BC=jnp.take_along_axis(found.ended_BC, order_BC, axis=1),
    )
