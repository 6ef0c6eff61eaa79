"""Continuous batching gives the answers of `generate`, in as many steps as a queue before B slots needs."""

import dataclasses
import functools

import hypothesis
import jax
import numpy as np
import pytest
from hypothesis import strategies as st

from jaxgpt.decoding import engine
from jaxgpt.errors import UserError
from jaxgpt.models import sharding, transformer
from jaxgpt.models.sharding import MeshConfig
from jaxgpt.structs import Answers, Prompts
from jaxgpt.training.step import jit_on
from tests.decoding.test_generate import MODELS, SEVERAL, assert_same, loop_bodies
from tests.helpers import TINY, generate, random_params

Q, WIDE, A = 24, 32, 12  # prompts of up to 32 tokens are read in buckets of 8, 16 and 32
STOPS = (*SEVERAL, 1, 2, 3, 4)  # about one token in eight
drain = jax.jit(engine.drain, static_argnums=0, static_argnames="refill")
start, admit, advance = (jax.jit(f, static_argnums=0) for f in (engine.init, engine.admit, engine.advance))


@functools.cache
def queue(width: int = WIDE) -> Prompts:
    """Prompts of 1 to `width` tokens, most of them short."""
    rng = np.random.default_rng(0)
    lengths = np.minimum(rng.geometric(0.15, Q), width).astype(np.int32)
    lengths[5] = width
    tokens = rng.integers(6, 64, (Q, width))
    return Prompts(np.where(np.arange(width) < lengths[:, None], tokens, 0).astype(np.int32), lengths)


def engine_of(name: str = "gpt", slots: int = 4, width: int = WIDE, stop=STOPS) -> engine.Engine:
    return engine.Engine(MODELS[name], slots, width, A, stop, pad=3)


@functools.cache
def generated(name: str = "gpt", width: int = WIDE, seed: int = 1, stop=STOPS) -> Answers:
    prompts, config, key = queue(width), MODELS[name], jax.random.key(seed)
    how = {"new_tokens": A, "stop": stop, "pad": 3}
    return jax.device_get(generate(random_params(config), config, prompts.tokens_BP, prompts.length_B, key, **how))


def steps_of_a_queue(lengths: np.ndarray, slots: int, refill: int) -> int:
    """How many steps it takes: by hand, from the time at which each slot is free again."""
    step, ends, waiting = 0, [], list(lengths)
    while waiting:
        ends += [step + n - 1 for n in waiting[:refill] if n > 1]
        waiting = waiting[refill:]
        while slots - len(ends) < (refill if waiting else slots):
            step = min(ends)
            ends = [end for end in ends if end > step]
    return step


# ---- the same answers ----


def test_a_queue_may_be_narrower_than_the_engine():
    found = drain(engine_of(), random_params(MODELS["gpt"]), queue(20), jax.random.key(1), refill=2)
    assert_same(found.answers, generated("gpt", 20))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "slots", "refill"),
    [
        ("gpt", 4, 3),
        ("llama", 1, 1),
        ("llama3", 7, None),
        ("gpt2", 60, 60),
    ],
)
def test_a_drained_queue_has_the_answers_of_generate(name, slots, refill):
    expected = generated(name)
    found = drain(engine_of(name, slots), random_params(MODELS[name]), queue(), jax.random.key(1), refill=refill)
    assert_same(found.answers, expected)
    assert len(set(expected.length_B.tolist())) > 5 and set(expected.ended_B.tolist()) == {True, False}
    np.testing.assert_array_equal(found.answers.logp_BA == 0, np.arange(A) >= expected.length_B[:, None])


def test_a_server_may_admit_any_prompt_to_any_free_slot_at_any_time():
    """Answers in random order, 0 to 2 at a time, in random slots, of the narrowest width, a random number of steps."""
    one, params, prompts, rng = engine_of(), random_params(MODELS["gpt"]), queue(), np.random.default_rng(4)
    state = start(one, jax.random.key(1))
    waiting, number_B, found = list(rng.permutation(Q)), np.full(one.slots, -1), {}
    while waiting or (number_B >= 0).any():
        for b in np.flatnonzero((number_B >= 0) & ~np.asarray(state.in_use_B)):
            found[int(number_B[b])] = jax.tree.map(lambda x, b=b: np.asarray(x[b]), state.answers)
            number_B[b] = -1
        free = rng.permutation(np.flatnonzero(number_B < 0))
        if len(free) >= 2:
            chosen = [waiting.pop() for _ in range(min(rng.integers(3), len(waiting)))]
            number_R = np.array([*chosen, 0, 0][:2], np.int32)
            length_R = np.where(np.arange(2) < len(chosen), prompts.length_B[number_R], 0)
            width = 8 if length_R.max() <= 8 else WIDE
            admitted = Prompts(prompts.tokens_BP[number_R, :width], length_R)
            state = admit(one, params, state, admitted, number_R, free[:2])
            number_B[free[: len(chosen)]] = chosen
        state = advance(one, params, state, rng.integers(4))
    together = jax.tree.map(lambda *x: np.stack(x), *(found[number] for number in range(Q)))
    assert_same(together, generated())


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "queues"), [((8, 1, 1), 8), ((2, 4, 1), 8), ((2, 2, 2), 1), ((1, 1, 1), 1)])
def test_on_a_mesh_each_shard_of_the_rows_drains_its_own_queue(shape, queues):
    """And nothing passes between them while it does; with a tensor axis there is one queue."""
    config, prompts, count = TINY, queue(), int(np.prod(shape))
    mesh = sharding.make_mesh(MeshConfig(*shape), jax.devices()[:count])
    params = random_params(config)
    placed = sharding.place(params, sharding.shardings_by_path(params, transformer.PARTITION, mesh))
    run = jit_on(mesh, engine.drain, static_argnums=(0, 4))
    arguments = (placed, sharding.place_whole(prompts, mesh), jax.random.key(1), 1)
    found = run(dataclasses.replace(engine_of("gpt2", 8), config=config), *arguments)
    key, how = jax.random.key(1), {"new_tokens": A, "stop": STOPS, "pad": 3}
    expected = jax.device_get(generate(params, config, prompts.tokens_BP, prompts.length_B, key, **how))
    assert_same(found.answers, expected)
    own = [x.reshape(-1, queues).T for x in (prompts.length_B, expected.length_B)]
    by_hand = [steps_of_a_queue(n[np.argsort(-p, kind="stable")], 8 // queues, 1) for p, n in zip(*own, strict=True)]
    np.testing.assert_array_equal(found.steps, by_hand)
    if queues > 1:
        text = run.lower(dataclasses.replace(engine_of("gpt2", 8), config=config), *arguments).compile().as_text()
        inside = loop_bodies(text)
        assert not [name for name in ("all-reduce", "all-gather", "collective-permute", "all-to-all") if name in inside]


# ---- as few steps as possible ----


@functools.partial(jax.jit, static_argnames=("slots", "refill"))
def drain_short(params, prompts, key, stop, slots, refill):
    """Stops are an array, so that one program serves all."""
    return engine.drain(engine_of(slots=slots, width=8, stop=stop), params, prompts, key, refill)


def padded(stops) -> np.ndarray:
    return np.array([*stops, *[-1] * (60 - len(stops))])


def test_a_queue_drained_as_slots_get_free_has_the_answers_of_generate():
    found = drain_short(random_params(MODELS["gpt"]), queue(8), jax.random.key(1), padded(STOPS), slots=4, refill=1)
    assert_same(found.answers, generated(width=8))


@pytest.mark.parametrize("refill", [1, pytest.param(3, marks=pytest.mark.slow)])
@hypothesis.given(st.integers(0, 2**31 - 1), st.integers(0, 60))
@hypothesis.settings(max_examples=25, deadline=None)
def test_the_steps_are_those_of_a_queue(refill, seed, stops):
    """Whatever the lengths; with one free slot enough, within 1.1 times sum / B + longest."""
    prompts, stop = queue(8), padded(range(stops))
    run = functools.partial(drain_short, random_params(MODELS["gpt"]), prompts, slots=4, refill=refill)
    found = jax.device_get(run(jax.random.key(seed), stop))
    n = found.answers.length_B
    order = np.argsort(-prompts.length_B, kind="stable")
    assert found.steps.tolist() == [steps_of_a_queue(n[order], 4, refill)]
    if refill == 1:
        assert found.steps[0] <= 1.1 * (n.sum() / 4 + n.max())


@pytest.mark.slow
def test_no_loop_copies_the_cache():
    """Neither the steps nor the admission of the next prompts."""
    config = dataclasses.replace(TINY, layers=1, width=64, heads=4, block=1024)
    one, params = engine.Engine(config, 4, 8, 1000, 5), jax.eval_shape(lambda: random_params(config))
    key = jax.eval_shape(lambda: jax.random.key(0))
    compiled = drain.lower(one, params, Prompts.shapes(Q, 8), key, refill=1).compile()
    cache = "4,4,1008,16"
    inside = loop_bodies(compiled.as_text())
    assert cache in inside
    assert not [
        line for line in inside.splitlines() if f"[{cache}]" in line and (" copy(" in line or " select(" in line)
    ]


# ---- mistakes ----


def test_what_can_not_work_is_refused_before_anything_is_compiled():
    with pytest.raises(UserError, match="40 tokens and 9 new ones don't fit the model's block of 48"):
        engine.Engine(TINY, 4, 40, 9, 5)
    with pytest.raises(UserError, match="slots is 0"):
        engine.Engine(TINY, 0, 8, 8, 5)
    mesh = sharding.make_mesh(devices=jax.devices()[:4])
    with pytest.raises(UserError, match="24 prompts and 6 slots don't divide among 4 devices"):
        jit_on(mesh, engine.drain, static_argnums=0)(engine_of(slots=6), {}, queue(), jax.random.key(0))
    key, shapes = jax.random.key(0), jax.eval_shape
    with pytest.raises(UserError, match="refill is 0"):
        shapes(lambda: engine.drain(engine_of(), {}, queue(), key, refill=0))
    narrow = engine_of(width=WIDE - 1)
    with pytest.raises(UserError, match="prompts are 32 tokens wide and the engine takes 31"):
        shapes(lambda: engine.drain(narrow, {}, queue(), key))
    with pytest.raises(UserError, match="prompts are 32 tokens wide and the engine takes 31"):
        shapes(lambda: engine.admit(narrow, {}, engine.init(narrow, key), queue(), np.arange(Q), np.arange(Q)))
