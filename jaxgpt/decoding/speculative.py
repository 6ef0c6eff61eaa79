"""Speculative decoding: a cheap draft proposes several tokens, and the model checks them all in one forward pass.

Leviathan et al. 2023 (algorithm 1); Chen et al. 2023. A drafted token x is accepted with probability
min(1, p(x) / q(x)), where p is the model's distribution and q the draft's; the first one rejected is replaced by a draw
from max(p - q, 0), normalised; if all are accepted, the same pass yields one more token. The output follows p exactly,
whatever the draft: a poor draft costs time, never quality.

    model_draft(params, config, k)   a smaller model with the same vocabulary
    ngram_draft(k, n)                prompt lookup: what followed the previous occurrence of the last n tokens

One prompt, with slot = position: a rejected token's cache slot is overwritten by the next pass, which starts there.
Two dimensions in addition to those of `structs`: J drafted tokens, and E = J + 1 tokens that the model reads per pass.
"""

from collections.abc import Callable, Sequence
from typing import Generic, NamedTuple, Protocol, TypeVar

import jax
import jax.numpy as jnp
from flax import struct

from jaxgpt import losses
from jaxgpt.config import ModelConfig
from jaxgpt.decoding import sampling
from jaxgpt.decoding.generate import check_fits_block
from jaxgpt.decoding.kv_cache import feed, prefill
from jaxgpt.decoding.weights import prepare, unembed
from jaxgpt.errors import UserError
from jaxgpt.structs import Answers, Array, KVCache, Params

ToProbabilities = Callable[[Array], Array]  # logits [..., V] -> the probabilities to draw from [..., V]
State = TypeVar("State")
# (key, state, text_T, n) -> state, J tokens to follow the first n of the text, and their distributions [J, V]
Propose = Callable[[Array, State, Array, Array], tuple[State, Array, Array]]


class Draft(Protocol[State]):
    """Proposes `k` tokens at a time; a pytree, so that it can be an argument of a jitted function."""

    @property
    def k(self) -> int:
        """Tokens per proposal."""
        ...

    def start(
        self, config: ModelConfig, prompt_BP: Array, length_B: Array, new_tokens: int, shape: ToProbabilities
    ) -> tuple[State, Propose[State]]:
        """Read the prompt: the initial state, and the function that proposes tokens."""
        ...


@struct.dataclass
class SpeculativeAnswer:
    """The answer, and what it cost: J * forwards tokens were drafted, and `accepted` of them are in the answer."""

    answers: Answers
    forwards: Array  # int32: passes of the model after the prompt's
    accepted: Array  # int32


class _Progress(NamedTuple, Generic[State]):
    """Between two passes of the model."""

    key: Array
    cache: KVCache
    state: State  # the draft's
    text_T: Array  # prompt and answer so far
    logp_T: Array  # of the answer's tokens
    n: Array  # tokens of the answer
    ended: Array  # bool
    forwards: Array
    accepted: Array


def generate(
    params: Params,
    config: ModelConfig,
    prompt_BP: Array,
    length_B: Array,
    key: Array,
    *,
    draft: Draft[State],
    new_tokens: int,
    stop: int | Sequence[int],
    pad: int = 0,
    filter_logits: sampling.Filter = lambda logits: logits,
    greedy: bool = False,
) -> SpeculativeAnswer:
    """`generate` for one prompt [1, P] in fewer passes: the same distribution, or the same tokens if `greedy`.

    `filter_logits` shapes both the model's and the draft's distribution; log-probabilities are the shaped model's.
    Raises UserError while tracing for more than one prompt, too many tokens for the block of model or draft, or a draft
    with another vocabulary.
    """
    (B, P), A, J = prompt_BP.shape, new_tokens, draft.k
    if B != 1:
        raise UserError(f"speculative decoding takes one prompt at a time, not {B}; use decoding.generate for a batch")
    check_fits_block(config, P, A)
    stops = jnp.atleast_1d(jnp.asarray(stop, jnp.int32))
    length = length_B[0]

    filter_logits = jax.named_scope("sample")(filter_logits)

    @jax.named_scope("sample")
    def shape(logits: Array) -> Array:
        if greedy:
            return jax.nn.one_hot(jnp.argmax(filter_logits(logits), axis=-1), logits.shape[-1])
        return jax.nn.softmax(filter_logits(logits))

    params = prepare(params, config)
    cache, _ = prefill(params, config, prompt_BP, length_B, A + J)
    state, propose = draft.start(config, prompt_BP, length_B, A, shape)

    def body(now: _Progress[State]) -> _Progress[State]:
        key, draft_key, verify_key = jax.random.split(now.key, 3)
        end = length + now.n  # of the text so far
        state, draft_J, q_JV = propose(draft_key, now.state, now.text_T, end)
        fed_E = jnp.concatenate([jax.lax.dynamic_slice(now.text_T, (end - 1,), (1,)), draft_J])
        cache, logits_BEV = feed_sequence(params, config, now.cache, fed_E[None], end - 1)
        tokens_E, good = verify(verify_key, draft_J, q_JV, shape(logits_BEV[0]))
        stop_E = (tokens_E[:, None] == stops).any(axis=1)
        first_stop = jnp.where(stop_E.any(), jnp.argmax(stop_E), J + 1)
        added = jnp.minimum(jnp.minimum(good, first_stop) + 1, A - now.n)
        logp_E = losses.log_prob(filter_logits(logits_BEV[0]), tokens_E)
        return _Progress(
            key=key,
            cache=cache,
            state=state,
            text_T=jax.lax.dynamic_update_slice(now.text_T, tokens_E, (end,)),
            logp_T=jax.lax.dynamic_update_slice(now.logp_T, logp_E, (now.n,)),
            n=now.n + added,
            ended=first_stop < added,
            forwards=now.forwards + 1,
            accepted=now.accepted + jnp.minimum(good, added),
        )

    zero = jnp.zeros((), jnp.int32)
    start = _Progress(
        key=key,
        cache=cache,
        state=state,
        text_T=jnp.pad(prompt_BP[0].astype(jnp.int32), (0, A + J)),
        logp_T=jnp.zeros(A + J),
        n=zero,
        ended=jnp.zeros((), bool),
        forwards=zero,
        accepted=zero,
    )
    done = jax.lax.while_loop(lambda now: (now.n < A) & ~now.ended, body, start)
    inside_A = jnp.arange(A) < done.n
    tokens_A = jnp.where(inside_A, jax.lax.dynamic_slice(done.text_T, (length,), (A,)), pad)
    logp_A = jnp.where(inside_A, done.logp_T[:A], 0.0)
    answers = Answers(tokens_A[None], logp_A[None], done.n[None], done.ended[None])
    return SpeculativeAnswer(answers, done.forwards, done.accepted)


def feed_sequence(
    params: Params, config: ModelConfig, cache: KVCache, tokens_BE: Array, start: Array
) -> tuple[KVCache, Array]:
    """Feed E tokens at once into slots and positions start ... start + E - 1: the cache, and the logits after each.

    Each attends to all slots up to its own. tokens_BE [B, E], start a scalar -> cache, logits [B, E, V]. The slots must
    exist (they would be clamped silently). Positions beyond the block use the last one: only tokens after the answer's
    end have such positions.
    """
    position_BE = jnp.broadcast_to(start + jnp.arange(tokens_BE.shape[1]), tokens_BE.shape)
    visible_BES = jnp.arange(cache.keys[0].shape[-2]) <= position_BE[:, :, None]
    inside_BE = jnp.minimum(position_BE, config.block - 1)
    cache, h_BED = feed(params, config, cache, tokens_BE, inside_BE, start, visible_BES)
    return cache, unembed(params, config, h_BED)


def acceptance_probability(p: Array, q: Array) -> Array:
    """Probability of accepting each token if it was drafted: min(1, p / q), [..., V]."""
    return jnp.where(p < q, p / jnp.where(p < q, q, 1.0), 1.0)


def residual_distribution(p: Array, q: Array) -> Array:
    """The distribution to draw from after a rejection: max(p - q, 0) normalised, [..., V]; p itself if that is 0."""
    rest = jnp.maximum(p - q, 0.0)
    total = rest.sum(axis=-1, keepdims=True)
    return jnp.where(total > 0, rest / jnp.where(total > 0, total, 1.0), p)


@jax.named_scope("sample")
def verify(key: Array, draft_J: Array, q_JV: Array, p_EV: Array) -> tuple[Array, Array]:
    """The core step: turn tokens drafted from q into tokens distributed as p.

    Returns tokens [E], of which the first `accepted` are the draft's and the next one is drawn from the residual, or
    from p's last row if all are accepted (those after it are meaningless); and `accepted`.
    """
    J = draft_J.shape[0]
    accept_key, draw_key = jax.random.split(key)
    keep_J = jnp.take_along_axis(acceptance_probability(p_EV[:J], q_JV), draft_J[:, None], axis=1)[:, 0]
    accepted = jnp.cumprod(jax.random.uniform(accept_key, (J,)) < keep_J, dtype=jnp.int32).sum()
    q_EV = jnp.pad(q_JV, ((0, 1), (0, 0)))  # no draft for the last position: its residual is p
    log_rest_V = jnp.log(residual_distribution(p_EV[accepted], q_EV[accepted]))
    drawn = sampling.categorical(draw_key[None], log_rest_V[None])
    return jnp.where(jnp.arange(J + 1) == accepted, drawn, jnp.pad(draft_J, (0, 1))), accepted


@jax.named_scope("sample")
def _draw(key: Array, q_V: Array) -> Array:
    """One token with these probabilities, [1]."""
    return sampling.categorical(key[None], jnp.log(q_V)[None])


@struct.dataclass
class ModelDraft:
    """A smaller model with its own cache."""

    params: Params
    config: ModelConfig = struct.field(pytree_node=False)
    k: int = struct.field(pytree_node=False)

    def start(
        self, config: ModelConfig, prompt_BP: Array, length_B: Array, new_tokens: int, shape: ToProbabilities
    ) -> tuple[KVCache, Propose[KVCache]]:
        """See `Draft.start`."""
        if self.config.vocab != config.vocab:
            raise UserError(
                f"the draft has a vocabulary of {self.config.vocab}, the model one of {config.vocab}; "
                "choose a draft with the same tokenizer"
            )
        check_fits_block(self.config, prompt_BP.shape[1], new_tokens)
        params = prepare(self.params, self.config)

        def propose(key: Array, cache: KVCache, text_T: Array, n: Array) -> tuple[KVCache, Array, Array]:
            # Read the last two tokens of the text: if all drafts were accepted, the last one has not been read yet.
            begin = jnp.maximum(n - 2, 0)
            two = jax.lax.dynamic_slice(text_T, (begin,), (2,))
            cache, logits_BEV = feed_sequence(params, self.config, cache, two[None], begin)
            q_V = shape(logits_BEV[0, n - 1 - begin])
            first_key, key = jax.random.split(key)

            def step(
                carry: tuple[KVCache, Array, Array], position: Array
            ) -> tuple[tuple[KVCache, Array, Array], tuple[Array, Array]]:
                cache, token, key = carry
                draw_key, key = jax.random.split(key)
                cache, logits_BEV = feed_sequence(params, self.config, cache, token[None], position)
                q_V = shape(logits_BEV[0, 0])
                token = _draw(draw_key, q_V)
                return (cache, token, key), (token[0], q_V)

            first = _draw(first_key, q_V)
            (cache, _, _), (rest, q_rest) = jax.lax.scan(step, (cache, first, key), n + jnp.arange(self.k - 1))
            return cache, jnp.concatenate([first, rest]), jnp.concatenate([q_V[None], q_rest])

        return prefill(params, self.config, prompt_BP, length_B, new_tokens + self.k)[0], propose


@struct.dataclass
class NgramDraft:
    """Prompt lookup in the prompt and the answer so far; the proposal is deterministic, so q is one-hot."""

    k: int = struct.field(pytree_node=False)
    n: int = struct.field(pytree_node=False)

    def start(
        self, config: ModelConfig, prompt_BP: Array, length_B: Array, new_tokens: int, shape: ToProbabilities
    ) -> tuple[None, Propose[None]]:
        """See `Draft.start`."""
        if self.n > prompt_BP.shape[1] + new_tokens:
            raise UserError(f"n is {self.n}, more tokens than prompt and answer have; choose a smaller n")

        def propose(key: Array, state: None, text_T: Array, n: Array) -> tuple[None, Array, Array]:
            begin = jnp.arange(text_T.shape[0] - self.n + 1)
            windows = text_T[begin[:, None] + jnp.arange(self.n)]
            recent = jax.lax.dynamic_slice(text_T, (n - self.n,), (self.n,))
            found = (windows == recent).all(axis=1) & (begin + self.n < n)  # the next token is known
            after = jnp.where(found, begin + self.n, -1).max()
            after = jnp.where(after < 0, n - 1, after)  # not found: repeat the last token
            draft_J = text_T[after + jnp.arange(self.k) % (n - after)]  # past the text's end: repeat
            return None, draft_J, jax.nn.one_hot(draft_J, config.vocab)

        return None, propose


def model_draft(params: Params, config: ModelConfig, k: int) -> ModelDraft:
    """`k` tokens drawn from a smaller model with the same vocabulary. Raises UserError for k < 1."""
    _check_positive(k=k)
    return ModelDraft(params, config, k)


def ngram_draft(k: int, n: int = 2) -> NgramDraft:
    """The `k` tokens after the previous occurrence of the last `n` (Saxena 2023, prompt lookup decoding).

    Needs no draft model; pays off where answers repeat the prompt. Raises UserError for k < 1 or n < 1.
    """
    _check_positive(k=k, n=n)
    return NgramDraft(k, n)


def _check_positive(**numbers: int) -> None:
    for name, number in numbers.items():
        if number < 1:
            raise UserError(f"a draft's {name} is {number}; it must be at least 1")
