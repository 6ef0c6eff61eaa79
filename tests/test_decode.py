"""Decoding with a cache is the full forward pass, token by token."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt import decode, layers, model, sampling
from jaxgpt.config import ModelConfig, UserError
from tests.helpers import FAMILY, TINY, generate, generate_until, hidden, params_of, prompts_of, score


@functools.cache
def generated(width: int = 12, new_tokens: int = 16, temperature: float = 1.0, config: ModelConfig = TINY):
    prompts, lengths = prompts_of(6, width)
    answers = generate(
        params_of(config), config, prompts, lengths, jax.random.key(3), new_tokens=new_tokens, stop=5,
        filter_logits=lambda logits: logits / temperature,
    )  # fmt: skip
    return prompts, lengths, answers


@pytest.mark.parametrize(
    ("name", "temperature"), [("gpt2", 1.0), ("gpt2", 0.6), ("gpt", 0.6), ("llama", 0.6), ("llama3", 0.6)]
)
def test_log_probs_of_the_sampler_equal_those_of_the_trainer(name, temperature):
    config = FAMILY[name]
    prompts, lengths, answers = generated(temperature=temperature, config=config)
    rows, sampler_logp = decode.join(prompts, lengths, answers)
    logp, _ = score(params_of(config), config, rows, temperature=temperature)
    np.testing.assert_allclose(jnp.where(rows.mask_BT, logp, 0.0), sampler_logp, atol=1e-5)
    assert int(rows.mask_BT.sum()) == int(answers.length_B.sum())


@pytest.mark.parametrize(("name", "rows"), [("gpt2", 3), ("llama", 3), ("llama", 1), ("llama3", 1)])
def test_greedy_decoding_equals_argmax_of_the_full_forward(name, rows):
    config, (prompts, lengths) = FAMILY[name], prompts_of(rows, 7)
    params, key = params_of(config), jax.random.key(0)
    answers = generate(params, config, prompts, lengths, key, new_tokens=9, stop=5, sample=sampling.greedy)
    rows, _ = decode.join(prompts, lengths, answers)
    best = jnp.argmax(model.unembed(params, hidden(params, config, rows.tokens_BT)), axis=-1)
    for b in range(len(prompts)):
        t = np.flatnonzero(rows.mask_BT[b])
        np.testing.assert_array_equal(best[b, t - 1], rows.tokens_BT[b, t])


def test_padding_of_the_prompt_changes_nothing():
    params, (prompts, lengths) = params_of(), prompts_of(4, 8)
    run = functools.partial(generate, params, TINY, new_tokens=10, stop=5)
    a = run(prompts, lengths, jax.random.key(1))
    b = run(jnp.pad(prompts, ((0, 0), (0, 9)), constant_values=17), lengths, jax.random.key(1))
    np.testing.assert_array_equal(a.tokens_BA, b.tokens_BA)
    np.testing.assert_allclose(a.logp_BA, b.logp_BA, atol=1e-5)


def test_rows_stop_at_the_stop_token_and_stay_padded():
    params, (prompts, lengths) = params_of(scale=1.0), prompts_of(64, 4)
    answers = generate(params, TINY, prompts, lengths, jax.random.key(2), new_tokens=40, stop=5, pad=0)
    tokens, size = np.asarray(answers.tokens_BA), np.asarray(answers.length_B)
    assert answers.ended_B.any() and not answers.ended_B.all()
    for row, n, ended, logp in zip(tokens, size, np.asarray(answers.ended_B), np.asarray(answers.logp_BA), strict=True):
        assert (row[n - 1] == 5) == ended
        assert 5 not in row[: n - 1]
        assert (row[n:] == 0).all() and (logp[n:] == 0).all() and (logp[:n] < 0).all()


def test_samples_follow_the_models_distribution():
    params = params_of(scale=2.0)
    prompts = jnp.tile(jnp.array([[7, 9, 11]]), (4000, 1))
    answers = generate(params, TINY, prompts, jnp.full(4000, 3), jax.random.key(5), new_tokens=1, stop=5)
    expected = np.asarray(jax.nn.softmax(model.unembed(params, hidden(params, TINY, prompts[:1]))[0, -1]))
    counts = np.bincount(np.asarray(answers.tokens_BA[:, 0]), minlength=TINY.vocab)
    common = expected * 4000 >= 5
    chi2 = ((counts - 4000 * expected) ** 2 / (4000 * expected))[common].sum()
    freedom = common.sum() - 1
    assert chi2 < freedom + 4 * np.sqrt(2 * freedom)


def test_join_leaves_no_gap_between_prompt_and_answer():
    prompts, lengths, answers = generated()
    rows, _ = decode.join(prompts, lengths, answers)
    for b in range(len(prompts)):
        p, a = int(lengths[b]), int(answers.length_B[b])
        expected = [*np.asarray(prompts[b, :p]), *np.asarray(answers.tokens_BA[b, :a])]
        np.testing.assert_array_equal(rows.tokens_BT[b, : p + a], expected)
        assert (rows.tokens_BT[b, p + a :] == 0).all()
        np.testing.assert_array_equal(np.flatnonzero(rows.mask_BT[b]), np.arange(p, p + a))


def test_streaming_gives_the_tokens_of_generate():
    params, (prompts, lengths) = params_of(), prompts_of(1, 9)
    whole = generate(params, TINY, prompts, lengths, jax.random.key(4), new_tokens=12, stop=5)
    parts = list(decode.stream(params, TINY, prompts, lengths, jax.random.key(4), new_tokens=12, stop=5))
    used = int(whole.length_B[0]) - int(whole.ended_B[0])
    assert parts == [int(t) for t in whole.tokens_BA[0, :used]]


def test_a_vmapped_program_gives_each_keys_own_answers():
    params, (prompts, lengths) = params_of(), prompts_of(2, 5)
    run = functools.partial(decode.generate, params, TINY, prompts, lengths, new_tokens=6, stop=5)
    with jax.debug_key_reuse(False):  # it refuses slices of a vmapped key array
        many = jax.jit(jax.vmap(lambda seed: run(key=jax.random.key(seed))))(jnp.arange(3))
    np.testing.assert_array_equal(many.tokens_BA[1], jax.jit(run)(key=jax.random.key(1)).tokens_BA)


def test_what_does_not_fit_the_block_is_refused():
    prompts, lengths = prompts_of(2, 40)
    with pytest.raises(UserError, match="40 tokens and 9 new ones don't fit the model's block of 48"):
        generate(params_of(), TINY, prompts, lengths, jax.random.key(0), new_tokens=9, stop=5)
    full = generate(params_of(), TINY, prompts, lengths, jax.random.key(0), new_tokens=8, stop=5)
    assert full.tokens_BA.shape == (2, 8)


@functools.cache
def both_ways(new_tokens: int = 20, segment: int = 128, **settings):
    """generate and generate_until on the same prompts and key."""
    prompts, lengths = prompts_of(6, 9)
    run = {"new_tokens": new_tokens, "stop": 5, "segment": segment, **settings}
    params = params_of(scale=1.5)
    return [f(params, TINY, prompts, lengths, jax.random.key(3), **run) for f in (generate, generate_until)]


@pytest.mark.parametrize("segment", [*(pytest.param(n, marks=pytest.mark.slow) for n in (1, 7)), 19, 128])
def test_the_growth_of_the_cache_and_the_kind_of_loop_change_nothing(segment):
    expected = both_ways()[0]
    for answers in both_ways(segment=segment):
        np.testing.assert_array_equal(answers.tokens_BA, expected.tokens_BA)
        np.testing.assert_array_equal(answers.length_B, expected.length_B)
        np.testing.assert_array_equal(answers.ended_B, expected.ended_B)
        np.testing.assert_allclose(answers.logp_BA, expected.logp_BA, atol=1e-5)


def test_the_loop_that_stops_early_does_so_and_pads():
    """Every token is a stop: one step is enough, and the rest is padding."""
    everything = tuple(range(64))
    for answers in both_ways(stop=everything, pad=3):
        np.testing.assert_array_equal(answers.length_B, 1)
        assert (answers.tokens_BA[:, 1:] == 3).all() and (answers.logp_BA[:, 1:] == 0).all() and answers.ended_B.all()
    counted = []

    def loop(step, carry, xs):
        def counting(carry, x):
            jax.debug.callback(lambda: counted.append(1))
            return step(carry, x)

        return decode.until_all_ended(counting, carry, xs)

    prompts, lengths = prompts_of(6, 9)
    program = jax.jit(
        lambda p, key: decode.generate(p, TINY, prompts, lengths, key, new_tokens=20, stop=everything, loop=loop)
    )
    jax.block_until_ready(program(params_of(), jax.random.key(0)))
    jax.effects_barrier()
    assert not counted


def test_any_of_several_stops_ends_an_answer():
    one, several = both_ways(stop=5)[0], both_ways(stop=(5, 9, 11))[0]
    assert int(several.length_B.sum()) < int(one.length_B.sum())
    for row, n, ended in zip(several.tokens_BA, several.length_B, several.ended_B, strict=True):
        assert (int(row[n - 1]) in (5, 9, 11)) == bool(ended)
        assert not set(np.asarray(row[: n - 1]).tolist()) & {5, 9, 11}


def test_samples_of_one_prompt_are_those_of_the_prompt_repeated():
    params, (prompts, lengths) = params_of(), prompts_of(2, 7)
    run = functools.partial(generate, params, TINY, new_tokens=8, stop=5)
    shared = run(prompts, lengths, jax.random.key(1), samples=3)
    repeated = run(jnp.repeat(prompts, 3, axis=0), jnp.repeat(lengths, 3), jax.random.key(1))
    np.testing.assert_array_equal(shared.tokens_BA, repeated.tokens_BA)
    np.testing.assert_allclose(shared.logp_BA, repeated.logp_BA, atol=1e-5)
    assert len({tuple(row.tolist()) for row in np.asarray(shared.tokens_BA)}) > 2
    with pytest.raises(UserError, match="samples is 0"):
        decode.generate(params, TINY, prompts, lengths, jax.random.key(1), new_tokens=8, stop=5, samples=0)


def test_values_are_the_critics_of_the_state_before_each_token():
    params, (prompts, lengths) = params_of(), prompts_of(4, 7)
    head = model.scalar_head(jax.random.key(9), TINY.width)
    answers = generate(params, TINY, prompts, lengths, jax.random.key(1), new_tokens=8, stop=5, value_head=head)
    rows, _ = decode.join(prompts, lengths, answers)
    expected = np.asarray(model.apply_scalar_head(head, hidden(params, TINY, rows.tokens_BT)))
    for b in range(4):
        t = np.flatnonzero(rows.mask_BT[b])
        np.testing.assert_allclose(answers.value_BA[b, : len(t)], expected[b, t - 1], atol=1e-5)
        assert (answers.value_BA[b, len(t) :] == 0).all()


def test_a_repetition_penalty_sees_prompt_and_answer():
    """A penalty so strong that nothing comes twice, nor anything of the prompt."""
    params, (prompts, lengths) = params_of(), prompts_of(4, 7)
    never_again = lambda logits, seen: jnp.where(seen, sampling.NEVER, logits)  # noqa: E731
    answers = generate(
        params, TINY, prompts, lengths, jax.random.key(1), new_tokens=20, stop=-1, filter_seen=never_again, segment=6
    )
    for row, prompt, n in zip(answers.tokens_BA, prompts, lengths, strict=True):
        assert len(set(np.asarray(row).tolist()) | set(np.asarray(prompt[:n]).tolist())) == 20 + len(
            set(np.asarray(prompt[:n]).tolist())
        )


def loop_bodies(compiled) -> str:
    """HLO of the loop bodies and of everything that they call."""
    parts = re.split(r"\n(?=(?:ENTRY )?%[\w.\-]+ \()", compiled.as_text())
    text = {re.match(r"(?:ENTRY )?%([\w.\-]+)", part)[1]: part for part in parts if re.match(r"(?:ENTRY )?%", part)}
    called = {name: set(re.findall(r"%([\w.\-]+)", part)) & text.keys() - {name} for name, part in text.items()}
    found, todo = set(), {name for part in text.values() for name in re.findall(r"body=%([\w.\-]+)", part)}
    while todo:
        name = todo.pop()
        found.add(name)
        todo |= called[name] - found
    assert found
    return "\n".join(text[name] for name in found)


KINDS = {
    "gpt2": {},
    "llama": {"kv_heads": 2, "mlp": "swiglu", "norm": "rms", "positions": "rotary", "biases": False},
}


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize(
    ("program", "dtype", "kind"),
    [
        (decode.generate, "float32", "gpt2"),
        (decode.generate, "bfloat16", "gpt2"),
        (decode.generate_until, "float32", "gpt2"),
        (decode.generate_until, "bfloat16", "gpt2"),
        (decode.generate, "float32", "llama"),
    ],
)
def test_no_loop_body_copies_the_cache_sorts_the_vocabulary_or_converts_weights(program, dtype, kind, rows):
    config = ModelConfig(layers=2, width=64, heads=4, block=192, vocab=1024, dtype=dtype, **KINDS[kind])
    B, P, new = rows, 8, 100
    params = jax.eval_shape(lambda key: model.init(key, config), jax.random.key(0))
    shapes = (params, jax.ShapeDtypeStruct((B, P), jnp.int32), jax.ShapeDtypeStruct((B,), jnp.int32))

    def run(params, prompts, lengths, key):
        nucleus = lambda logits: sampling.top_p(sampling.min_p(logits, 0.01), 0.9)  # noqa: E731
        return program(params, config, prompts, lengths, key, new_tokens=new, stop=5, filter_logits=nucleus)

    compiled = jax.jit(run).lower(*shapes, jax.eval_shape(lambda: jax.random.key(0))).compile()
    cache = B * config.groups * (P + new - 1) * config.head_dim
    weights = {",".join(map(str, w.shape)) for w in jax.tree.leaves(params) if w.ndim == 2} | {"64,1024"}

    def size(dims: str) -> int:
        return int(np.prod([int(n) for n in dims.split(",") if n]))

    inside = loop_bodies(compiled)
    for dims, kind in re.findall(r"= \(?\w+\[([\d,]*)\][^ ]* (copy|sort|convert)\(", inside):
        assert kind != "convert" or dims not in weights, dims
        assert size(dims) < (config.vocab if kind == "sort" else cache), (kind, dims)


def test_temporary_memory_does_not_grow_with_the_steps():
    """Beyond the cache itself: the same model, prompts and cache room; twice the new tokens."""
    config = ModelConfig(layers=2, width=64, heads=4, block=1024, vocab=512)
    params = jax.eval_shape(lambda key: model.init(key, config), jax.random.key(0))
    shapes = (params, jax.ShapeDtypeStruct((2, 8), jnp.int32), jax.ShapeDtypeStruct((2,), jnp.int32))

    def beyond_cache(new: int) -> int:
        run = lambda p, x, n, key: decode.generate(p, config, x, n, key, new_tokens=new, stop=5, segment=1024)  # noqa: E731
        compiled = jax.jit(run).lower(*shapes, jax.eval_shape(lambda: jax.random.key(0))).compile()
        cache = 2 * config.layers * 2 * config.width * (8 + new - 1) * 4
        return compiled.memory_analysis().temp_size_in_bytes - 2 * cache  # the loop's, and the one it starts from

    assert beyond_cache(800) - beyond_cache(200) < 100_000


def test_one_trace_a_segment():
    traced = []

    def noting(logits):
        traced.append(1)
        return logits

    prompts, lengths = prompts_of(2, 6)
    run = jax.jit(
        lambda params, key: decode.generate(
            params, TINY, prompts, lengths, key, new_tokens=21, stop=5, segment=10, filter_logits=noting
        )
    )
    for seed in range(3):
        run(params_of(), jax.random.key(seed))
    assert len(traced) == 3  # the token after the prompt, and a body for each of the two segments


@pytest.mark.parametrize("name", ["gpt2", "llama3"])
@pytest.mark.parametrize("rows", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_int8_weights_decode_nearly_the_same(name, rows):
    """Within what rounding to 127 levels costs, and by far more than rounding to 15 levels would; int8 in memory."""
    config, (prompts, lengths) = FAMILY[name], prompts_of(rows, 9)
    prepared = decode.prepare(params_of(config, scale=2.0), config)
    small = jax.jit(decode.int8)(prepared)
    matrices = [x for x in jax.tree.leaves(small) if x.ndim == 2 and x.dtype == jnp.int8]
    assert len(matrices) == config.layers * (5 if config.mlp == "swiglu" else 4) + 1
    read = jax.jit(lambda p: decode.prefill(p, config, prompts, lengths, 4))
    (_, logits), (cache, rough) = read(prepared), read(small)
    error = float(jnp.abs(rough - logits).max() / logits.std())
    assert 1e-4 < error < 0.1
    token = jnp.full(rows, 7)
    step = jax.jit(lambda p: decode.decode_step(p, config, cache, token, lengths, prompts.shape[1], jnp.asarray(0))[1])
    assert 1e-4 < float(jnp.abs(step(prepared) - step(small)).max() / logits.std()) < 0.1


@pytest.mark.parametrize(("rows", "fan_in", "fan_out"), [(1, 64, 96), (3, 128, 40), (1, 9000, 8), (1, 100, 30_000)])
def test_the_int8_product_is_that_of_the_widened_matrix(rows, fan_in, fan_out, monkeypatch):
    rng = np.random.default_rng(0)
    kernel = rng.integers(-127, 128, (fan_in, fan_out)).astype(np.int8)
    x, scale = rng.normal(size=(rows, fan_in)).astype(np.float32), rng.uniform(0.5, 2.0, fan_out).astype(np.float32)
    expected = x.astype(np.float64) @ (kernel * scale.astype(np.float64))
    found = jax.jit(layers.int8_product)(x, kernel, scale)
    np.testing.assert_allclose(found, expected, atol=2e-3 * np.abs(expected).max())
    monkeypatch.setattr(layers.sharding, "platform", lambda: "gpu")
    elsewhere = jax.jit(lambda *arrays: layers.int8_product(*arrays))
    np.testing.assert_allclose(elsewhere(x, kernel, scale), expected, atol=1e-4 * np.abs(expected).max())
    monkeypatch.undo()
    worst = jax.jit(layers.int8_product)(np.ones((1, fan_in), np.float32), np.full_like(kernel, 127), scale)
    np.testing.assert_allclose(worst[0], 127.0 * fan_in * scale, rtol=1e-5)  # the largest sum does not overflow
