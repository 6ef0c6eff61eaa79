"""Continuous batching: a slot whose answer has ended takes the next prompt, while the other slots go on.

    state = init(engine, key)                                           B free slots
    state = admit(engine, params, state, prompts, number_R, slot_R)     read R prompts, draw their first tokens
    state = advance(engine, params, state, k)                           k more tokens for every slot in use
    answers, steps = drain(engine, params, prompts, key)                Q prompts through the B slots

All are pure functions to jit with `static_argnums=0`; a server calls the first three, `drain` nests them in two loops.
Padding everyone takes Q / B batches of A steps. `drain` with R = 1, which refills a slot as soon as it is free, takes
at most sum(lengths) / B + longest steps: slots are only empty once the queue is (Graham 1969).

The answer with number q is row q of `generate`, whichever slot it is in and whoever its neighbours are: its tokens are
drawn with the key folded with q and the token's index. The cache has P slots for a row's prompt, and A slots that are
used in turn: step s writes to slot P + s mod A in every row, so that one scalar cursor serves rows of any age, and each
row sees the slots of its own last n tokens. With a cursor for each row the write would be a scatter, which XLA:CPU runs
as a loop over the rows.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from jaxgpt import losses
from jaxgpt.config import ModelConfig
from jaxgpt.decoding import sampling
from jaxgpt.decoding.generate import Sampler, check_fits_block
from jaxgpt.decoding.kv_cache import empty_cache, feed, prefill_hidden
from jaxgpt.decoding.weights import prepare, unembed
from jaxgpt.errors import UserError
from jaxgpt.models import sharding
from jaxgpt.structs import Answers, Array, KVCache, Params, Prompts

NARROWEST = 32  # prompt tokens; wider prompts are read in buckets of P / 4, P / 2 and P


def _identity(logits_BV: Array) -> Array:
    return logits_BV


@dataclasses.dataclass(frozen=True)
class Engine:
    """What is fixed when the functions are compiled: the model's settings, sizes, and how tokens are drawn (see
    `generate`). Raises UserError if prompt and answer don't fit the model's block."""

    config: ModelConfig
    slots: int  # B, answers in progress at a time
    prompt_tokens: int  # P, the longest prompt
    new_tokens: int  # A, the longest answer
    stop: int | Sequence[int]
    pad: int = 0
    sample: Sampler = sampling.categorical
    filter_logits: sampling.Filter = _identity

    def __post_init__(self) -> None:
        check_fits_block(self.config, self.prompt_tokens, self.new_tokens)
        if self.slots < 1:
            raise UserError(f"slots is {self.slots}; it must be at least 1")

    @property
    def widths(self) -> tuple[int, ...]:
        """To which prompts are padded when they are read: the narrowest that suits all R."""
        P = self.prompt_tokens
        return (P,) if P < NARROWEST else (-(-P // 4), -(-P // 2), P)


@struct.dataclass
class State:
    """B slots. A slot in use has an answer of 1 to A - 1 tokens that hasn't ended; what a free slot holds is the answer
    that was there last, until another is admitted."""

    cache: KVCache  # [B, G, P + A, K] for each layer, without axes of size 1
    step: Array  # int32: steps since the beginning
    key: Array
    number_B: Array  # int32: of each slot's answer
    length_B: Array  # int32: tokens of its prompt
    answers: Answers  # so far
    in_use_B: Array  # bool


class Drained(NamedTuple):
    """The answers to a queue of prompts, in the prompts' order, and the decoding steps that each shard took."""

    answers: Answers
    steps: Array  # int32 [shards]


def init(engine: Engine, key: Array) -> State:
    """B free slots; all answers are drawn with this key, folded with their numbers."""
    B = engine.slots
    return State(
        cache=empty_cache(engine.config, B, engine.prompt_tokens + engine.new_tokens),
        step=jnp.zeros((), jnp.int32),
        key=key,
        number_B=jnp.zeros(B, jnp.int32),
        length_B=jnp.zeros(B, jnp.int32),
        answers=_no_answers(engine, B),
        in_use_B=jnp.zeros(B, bool),
    )


def admit(engine: Engine, params: Params, state: State, prompts: Prompts, number_R: Array, slot_R: Array) -> State:
    """Read R prompts, padded to any width up to P, into the slots slot_R, and draw the first tokens of their answers,
    which get the numbers number_R.

    The slots must be free (not `state.in_use_B`) and different from each other. A prompt of length 0 leaves its slot
    free, so that one program admits any number up to R. Raises UserError while tracing if prompts are wider than P."""
    _check_width(engine, prompts)
    params = prepare(params, engine.config)
    cache, h_RD = prefill_hidden(params, engine.config, prompts.tokens_BP, prompts.length_B, 0)
    return _seat(engine, params, state, cache, h_RD, prompts.length_B, number_R, slot_R)


def advance(engine: Engine, params: Params, state: State, k: Array | int, free: Array | int | None = None) -> State:
    """k more tokens for every slot in use, or until `free` slots are free (without it: all)."""
    params, least = prepare(params, engine.config), engine.slots - (engine.slots if free is None else free)

    def body(carry: tuple[Array, State]) -> tuple[Array, State]:
        i, state = carry
        return i + 1, _step(engine, params, state)

    def goes_on(carry: tuple[Array, State]) -> Array:
        i, state = carry
        return (i < k) & (state.in_use_B.sum() > least)

    return jax.lax.while_loop(goes_on, body, (jnp.zeros((), jnp.int32), state))[1]


def drain(
    engine: Engine, params: Params, prompts: Prompts, key: Array, refill: int | None = None, first: Array | int = 0
) -> Drained:
    """One answer to each of the Q prompts: row q of `generate(params, config, prompts, key)`, to rounding.

    The answers are numbered from `first`. A prompt of length 0 gets none, so that one program serves shorter queues.

    `refill` is R, how many slots must be free before as many prompts are read in one pass: 1 leaves no slot empty,
    more read the prompts in fewer passes (default: B / 8). On a mesh every shard of the rows drains its own part of the
    queue through its own slots, without communicating; with a tensor axis there is one queue for all. `vmap` would copy
    the cache in every step: use `generate` there. Raises UserError while tracing if slots or prompts don't divide among
    the shards, prompts are wider than P, or `refill` is below 1."""
    _check_width(engine, prompts)
    if refill is not None and refill < 1:
        raise UserError(f"refill is {refill}; it must be at least 1")
    Q, shards = prompts.tokens_BP.shape[0], sharding.count_independent_shards()
    if Q % shards or engine.slots % shards:
        raise UserError(
            f"{Q} prompts and {engine.slots} slots don't divide among {shards} devices; use multiples of {shards}"
        )
    narrower = engine.prompt_tokens - prompts.tokens_BP.shape[1]
    prompts = Prompts(jnp.pad(prompts.tokens_BP, ((0, 0), (0, narrower))), prompts.length_B)
    own = dataclasses.replace(engine, slots=min(engine.slots, Q) // shards)
    refill = min(refill or max(own.slots // 8, 1), own.slots)
    params = prepare(params, engine.config)
    # Dealt out in turn, so that shards have equally many prompts even if those at the queue's end are missing.
    deal = lambda x: x.reshape(-1, shards, *x.shape[1:]).swapaxes(0, 1).reshape(x.shape)  # noqa: E731
    gather = lambda x: x.reshape(shards, -1, *x.shape[1:]).swapaxes(0, 1).reshape(x.shape)  # noqa: E731
    queue = jax.tree.map(deal, (prompts, first + jnp.arange(Q)))
    run = functools.partial(_drain_shard, own, refill, shards)
    found = sharding.run_independently(run, (params, key), queue)
    return found._replace(answers=jax.tree.map(gather, found.answers))


def _drain_shard(
    engine: Engine, refill: int, shards: int, shared: tuple[Params, Array], queue: tuple[Prompts, Array]
) -> Drained:
    (params, key), (prompts, number_Q) = shared, queue
    Q, waiting = len(number_Q), (prompts.length_B > 0).sum()
    order_Q = jnp.argsort(-prompts.length_B)  # prompts of about the same length are read together
    ahead = (prompts.tokens_BP[order_Q], prompts.length_B[order_Q], number_Q[order_Q])
    padded = [jnp.pad(x, [(0, refill), *[(0, 0)] * (x.ndim - 1)]) for x in ahead]  # with prompts of length 0

    def read(width: int, tokens_RP: Array, length_R: Array) -> tuple[KVCache, Array]:
        room = engine.prompt_tokens - width
        return prefill_hidden(params, engine.config, tokens_RP[:, :width], length_R, room)

    def collect(done: Answers, state: State, slot_R: Array) -> Answers:
        place_R = (state.number_B[slot_R] - number_Q[0]) // shards
        place_R = jnp.where(state.answers.length_B[slot_R] > 0, place_R, Q)  # no answer: dropped
        return jax.tree.map(lambda all_, x: all_.at[place_R].set(x[slot_R], mode="drop"), done, state.answers)

    def admit_next(carry: tuple[Array, State, Answers]) -> tuple[Array, State, Answers]:
        i, state, done = carry
        slot_R = jax.lax.top_k(~state.in_use_B, refill)[1]  # the first free ones
        done = collect(done, state, slot_R)
        tokens_RP, length_R, number_R = (jax.lax.dynamic_slice_in_dim(x, i, refill) for x in padded)
        bucket = (length_R.max() > jnp.array(engine.widths[:-1], jnp.int32)).sum()
        reads = [functools.partial(read, width) for width in engine.widths]
        cache, h_RD = jax.lax.switch(bucket, reads, tokens_RP, length_R)
        state = _seat(engine, params, state, cache, h_RD, length_R, number_R, slot_R)
        i += refill
        state = advance(engine, params, state, engine.new_tokens, jnp.where(i < waiting, refill, engine.slots))
        return i, state, done

    start = (jnp.zeros((), jnp.int32), init(engine, key), _no_answers(engine, Q))
    _, state, done = jax.lax.while_loop(lambda carry: carry[0] < waiting, admit_next, start)
    return Drained(collect(done, state, jnp.arange(engine.slots)), state.step[None])


def _check_width(engine: Engine, prompts: Prompts) -> None:
    """Wider prompts would be cut off silently."""
    width = prompts.tokens_BP.shape[1]
    if width > engine.prompt_tokens:
        raise UserError(f"prompts are {width} tokens wide and the engine takes {engine.prompt_tokens}; make it wider")


def _no_answers(engine: Engine, count: int) -> Answers:
    tokens = jnp.full((count, engine.new_tokens), engine.pad, jnp.int32)
    return Answers(tokens, jnp.zeros(tokens.shape), jnp.zeros(count, jnp.int32), jnp.zeros(count, bool))


def _draw(
    engine: Engine, params: Params, key: Array, number_B: Array, t_B: Array | int, h_BD: Array
) -> tuple[Array, Array, Array]:
    """Token t of each answer, its log-probability, and whether it is a stop token, [B] each; h: the state before it."""
    logits_BV = unembed(params, engine.config, h_BD)
    with jax.named_scope("sample"):
        logits_BV = engine.filter_logits(logits_BV)
        key_B = sampling.token_keys(sampling.answer_keys(key, number_B), t_B)
        token_B = engine.sample(key_B, logits_BV)
        stop_B = (token_B[:, None] == jnp.atleast_1d(jnp.asarray(engine.stop, jnp.int32))).any(axis=1)
    return token_B, losses.log_prob(logits_BV, token_B), stop_B


def _step(engine: Engine, params: Params, state: State) -> State:
    """One more token for every slot in use; free slots compute too, and keep what they hold."""
    P, A, so_far, in_use_B = engine.prompt_tokens, engine.new_tokens, state.answers, state.in_use_B
    n_B = so_far.length_B
    token_B1 = jnp.take_along_axis(so_far.tokens_BA, jnp.maximum(n_B - 1, 0)[:, None], axis=1)
    cursor = state.step % A
    age_A = (cursor - jnp.arange(A)) % A  # of each slot of the ring
    visible_BS = jnp.concatenate([jnp.arange(P) < state.length_B[:, None], age_A < n_B[:, None]], axis=1)
    position_B1 = jnp.maximum(state.length_B + n_B - 1, 0)[:, None]
    cache, h_BED = feed(params, engine.config, state.cache, token_B1, position_B1, P + cursor, visible_BS[:, None])
    token_B, logp_B, stop_B = _draw(engine, params, state.key, state.number_B, n_B, h_BED[:, 0])
    here_BA = in_use_B[:, None] & (jnp.arange(A) == n_B[:, None])
    answers = Answers(
        tokens_BA=jnp.where(here_BA, token_B[:, None], so_far.tokens_BA),
        logp_BA=jnp.where(here_BA, logp_B[:, None], so_far.logp_BA),
        length_B=n_B + in_use_B,
        ended_B=so_far.ended_B | (in_use_B & stop_B),
    )
    in_use_B = in_use_B & ~stop_B & (answers.length_B < A)
    return state.replace(cache=cache, step=state.step + 1, answers=answers, in_use_B=in_use_B)  # type: ignore[attr-defined]


def _seat(
    engine: Engine,
    params: Params,
    state: State,
    read: KVCache,
    h_RD: Array,
    length_R: Array,
    number_R: Array,
    slot_R: Array,
) -> State:
    """The state with R prompts that were read in the slots slot_R, and their first tokens."""
    B, R = engine.slots, len(slot_R)
    token_R, logp_R, stop_R = _draw(engine, params, state.key, number_R, 0, h_RD)
    here_R, first_A = length_R > 0, jnp.arange(engine.new_tokens) == 0
    answers = Answers(
        tokens_BA=jnp.where(first_A & here_R[:, None], token_R[:, None], engine.pad),
        logp_BA=jnp.where(first_A & here_R[:, None], logp_R[:, None], 0.0),
        length_B=here_R.astype(jnp.int32),
        ended_B=here_R & stop_R,
    )
    in_use_R = here_R & ~stop_R & (engine.new_tokens > 1)

    def write(all_: Array, new: Array) -> Array:
        rows = all_.reshape(B, -1, *all_.shape[-2:])
        new = new.reshape(R, -1, *new.shape[-2:])
        return rows.at[slot_R, :, : new.shape[2]].set(new, unique_indices=True).reshape(all_.shape)

    old = (state.number_B, state.length_B, state.answers, state.in_use_B)
    new = (number_R, length_R, answers, in_use_R)
    number_B, length_B, answers, in_use_B = jax.tree.map(lambda x, y: x.at[slot_R].set(y), old, new)
    cache = jax.tree.map(write, state.cache, read)
    return State(cache, state.step, state.key, number_B, length_B, answers, in_use_B)
