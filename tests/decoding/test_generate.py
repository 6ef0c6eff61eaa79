"""Decoding with a cache equals the full forward pass, token by token."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt import decoding, losses
from jaxgpt.config import ModelConfig
from jaxgpt.decoding import sampling
from jaxgpt.errors import UserError
from jaxgpt.models import layers, transformer
from jaxgpt.structs import Answers
from tests.helpers import FAMILY, TINY, random_params

MODELS = {name: config if name == "gpt2" else dataclasses.replace(config, layers=1) for name, config in FAMILY.items()}
ROWS, P, WIDE, A = 8, 8, 12, 36  # a wide prompt and its answer fill the block of 48
GREEDY = np.arange(ROWS) % 2 == 1  # every other row
SEVERAL, ALL = (8, 24, 45, 60), tuple(range(64))


def prompts_of() -> tuple[np.ndarray, np.ndarray]:
    """Ragged prompts, padded on the right, and their lengths."""
    lengths = np.array([P, 3, 5, 2, 7, P, 4, 6], np.int32)
    tokens = np.random.default_rng(0).integers(6, 64, (ROWS, P))
    return np.where(np.arange(P) < lengths[:, None], tokens, 0).astype(np.int32), lengths


def settings_of(stops=(), temperature: float = 1.0, greedy=GREEDY, pad: int = 0) -> dict:
    """Settings that `answers_of` takes as arrays, so that one program serves all of them."""
    stops = np.array([*stops, *[-1] * (64 - len(stops))], np.int32)
    return {"stop": stops, "temperature": np.float32(temperature), "greedy": greedy, "pad": np.int32(pad)}


def answers_of(
    params,
    config,
    prompts,
    lengths,
    key,
    *,
    temperature,
    greedy,
    once=None,
    new_tokens: int = A,
    watch=None,
    program=decoding.generate,
    **settings,
) -> Answers:
    """Some rows greedy, some sampled at a temperature; with `once`, no token occurs twice. Each step calls `watch`."""

    def sample(key, logits):
        return jnp.where(greedy, sampling.greedy(key, logits), sampling.categorical(key, logits))

    def cool(logits):
        if watch:
            watch()
        return sampling.temperature(logits, temperature)

    def never_again(logits, seen):
        return jnp.where(seen & once, losses.MASKED_LOGIT, logits)

    return program(
        params,
        config,
        prompts,
        lengths,
        key,
        new_tokens=new_tokens,
        sample=sample,
        filter_logits=cool,
        filter_seen=None if once is None else never_again,
        **settings,
    )


answer = jax.jit(answers_of, static_argnums=1, static_argnames=("new_tokens", "program", "samples", "segment"))


@functools.partial(jax.jit, static_argnums=1)
def read_back(params, config, prompts, lengths, answers, temperature):
    """The joined rows, the sampler's log-probs, and the log-probs, logits and hidden states of a full forward pass."""
    rows, sampler_logp = decoding.join_prompt_and_answer(prompts, lengths, answers)
    logp, h = transformer.token_log_probs(params, config, rows, temperature=temperature)
    return rows, sampler_logp, logp, transformer.unembed(params, h), h


@functools.cache
def value_head() -> dict:
    return {"kernel_D": np.random.default_rng(9).normal(size=TINY.width).astype(np.float32), "bias": np.float32(0.5)}


@functools.cache
def generated(name: str = "gpt2", seed: int = 3, once: bool = False, **changes) -> Answers:
    """A model's answers to all prompts; every call for the same model runs the same program."""
    config, settings = MODELS[name], settings_of(**changes) | {"once": once, "value_head": value_head()}
    return jax.device_get(answer(random_params(config), config, *prompts_of(), jax.random.key(seed), **settings))


@functools.cache
def alone(greedy: bool, pad_with: int = 17, name: str = "llama3") -> Answers:
    """The answer to one short prompt by itself, followed by a lot of padding."""
    (prompts, lengths), config = prompts_of(), MODELS[name]
    wide = np.pad(prompts[1:2], ((0, 0), (0, WIDE - P)))
    wide = np.where(np.arange(WIDE) < lengths[1], wide, pad_with).astype(np.int32)
    settings = settings_of(SEVERAL, greedy=np.array([greedy]))
    return jax.device_get(answer(random_params(config), config, wide, lengths[1:2], jax.random.key(4), **settings))


def assert_same(found: Answers, expected: Answers, message: str = "") -> None:
    for name in ("tokens_BA", "length_B", "ended_B"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name), err_msg=f"{message} {name}")
    np.testing.assert_allclose(found.logp_BA, expected.logp_BA, atol=1e-5, err_msg=message)


# ---- against the full forward pass ----


@pytest.mark.parametrize(
    ("name", "temperature"), [("gpt2", 1.0), ("gpt2", 0.6), ("gpt", 0.6), ("llama", 0.6), ("llama3", 0.6)]
)
def test_log_probs_of_the_sampler_equal_those_of_the_trainer(name, temperature):
    config, answers = MODELS[name], generated(name, temperature=temperature, stops=SEVERAL)
    rows, sampler_logp, logp, *_ = read_back(random_params(config), config, *prompts_of(), answers, temperature)
    np.testing.assert_allclose(np.where(rows.mask_BT, logp, 0.0), sampler_logp, atol=1e-5)
    assert rows.mask_BT.sum() == answers.length_B.sum()


@pytest.mark.parametrize("name", MODELS)
def test_greedy_decoding_equals_argmax_of_the_full_forward(name):
    config, answers = MODELS[name], generated(name, temperature=0.6, stops=SEVERAL)
    rows, _, _, logits, _ = jax.device_get(read_back(random_params(config), config, *prompts_of(), answers, 0.6))
    best = logits.argmax(axis=-1)
    agrees = (best[:, :-1] == rows.tokens_BT[:, 1:])[rows.mask_BT[:, 1:] & GREEDY[:, None]]
    assert agrees.all() and len(agrees) > 2 * A
    drawn = rows.mask_BT[:, 1:] & ~GREEDY[:, None]
    assert (best[:, :-1] != rows.tokens_BT[:, 1:])[drawn].any()


def test_values_are_the_critics_of_the_state_before_each_token():
    answers = generated(stops=SEVERAL)
    rows, *_, h = jax.device_get(read_back(random_params(), TINY, *prompts_of(), answers, 1.0))
    expected = h @ value_head()["kernel_D"] + value_head()["bias"]
    for b, n in enumerate(answers.length_B):
        t = np.flatnonzero(rows.mask_BT[b])
        np.testing.assert_allclose(answers.value_BA[b, :n], expected[b, t - 1], atol=1e-5)
        assert (answers.value_BA[b, n:] == 0).all()


def test_samples_follow_the_models_distribution():
    config, params = MODELS["gpt"], random_params(MODELS["gpt"], scale=8.0)
    prompts, lengths = prompts_of()
    draw = jax.jit(functools.partial(decoding.generate, config=config, new_tokens=1, stop=5, samples=4000))
    drawn = draw(params, prompt_BP=prompts[:1], length_B=lengths[:1], key=jax.random.key(5)).tokens_BA
    counts = np.bincount(np.asarray(drawn)[:, 0], minlength=config.vocab)
    *_, logits, _ = read_back(params, config, prompts, lengths, generated("gpt"), 1.0)
    likely = np.exp(np.asarray(logits, np.float64)[0, P - 1])
    expected = 4000 * likely / likely.sum()
    common = expected >= 5
    chi2 = ((counts - expected) ** 2 / expected)[common].sum()
    freedom = common.sum() - 1
    assert freedom > 20 and chi2 < freedom + 4 * np.sqrt(2 * freedom)


def test_join_leaves_no_gap_between_prompt_and_answer():
    (prompts, lengths), answers = prompts_of(), generated(stops=SEVERAL)
    rows, *_ = jax.device_get(read_back(random_params(), TINY, prompts, lengths, answers, 1.0))
    for b, (p, a) in enumerate(zip(lengths, answers.length_B, strict=True)):
        np.testing.assert_array_equal(rows.tokens_BT[b, : p + a], [*prompts[b, :p], *answers.tokens_BA[b, :a]])
        assert (rows.tokens_BT[b, p + a :] == 0).all()
        np.testing.assert_array_equal(np.flatnonzero(rows.mask_BT[b]), np.arange(p, p + a))


# ---- invariances ----


def test_padding_of_the_prompt_and_other_rows_change_nothing():
    """The cache of a single row has no axes for rows and groups."""
    expected = jax.tree.map(lambda x: x[1:2], generated("llama3", stops=SEVERAL))
    for pad_with in (0, 17):
        assert_same(alone(True, pad_with), expected, f"padded with {pad_with}")


def test_streaming_gives_the_tokens_of_generate():
    whole, config = alone(False), MODELS["llama3"]
    prompts, lengths = prompts_of()
    prompt = np.pad(prompts[1:2], ((0, 0), (0, WIDE - P)))
    parts = list(
        decoding.stream(
            random_params(config), config, prompt, lengths[1:2], jax.random.key(4), new_tokens=A, stop=SEVERAL
        )
    )
    assert parts == whole.tokens_BA[0, : whole.length_B[0] - whole.ended_B[0]].tolist()


def test_a_vmapped_program_gives_each_keys_own_answers():
    config, (prompts, lengths) = MODELS["llama"], prompts_of()
    run = functools.partial(answers_of, config=config, prompts=prompts, lengths=lengths, **settings_of(SEVERAL))
    with jax.debug_key_reuse(False):  # it rejects slices of a vmapped key array
        many = jax.jit(jax.vmap(lambda params, seed: run(params, key=jax.random.key(seed)), in_axes=(None, 0)))(
            random_params(config), np.arange(3)
        )
    for seed in range(3):
        one = jax.tree.map(lambda x, seed=seed: x[seed], many)
        assert_same(one, generated("llama", seed=seed, stops=SEVERAL), f"seed {seed}")


@pytest.mark.parametrize(
    ("name", "samples", "segment"),
    [
        ("gpt", 2, 128),
        pytest.param("llama", 2, 20, marks=pytest.mark.slow),
        pytest.param("llama3", 8, 20, marks=pytest.mark.slow),
    ],
)
def test_samples_of_one_prompt_are_those_of_the_prompt_repeated(name, samples, segment):
    """They attend to one cache of the prompt, and each to its own of the answer; that of one prompt has no row axis."""
    config, (prompts, lengths), count = MODELS[name], prompts_of(), ROWS // samples
    run = functools.partial(answer, random_params(config), config, **settings_of(SEVERAL))
    shared = run(prompts[:count], lengths[:count], jax.random.key(1), samples=samples, segment=segment)
    settings = {"once": False, "value_head": value_head()}  # the program of `generated`
    rows = np.arange(ROWS) // samples
    repeated = run(prompts[rows], lengths[rows], jax.random.key(1), **settings)
    assert_same(shared, repeated)
    drawn = np.asarray(shared.tokens_BA)[~GREEDY]
    assert len({tuple(row) for row in drawn.tolist()}) == len(drawn)
    with pytest.raises(UserError, match="samples is 0"):
        decoding.generate({}, config, prompts, lengths, jax.random.key(1), new_tokens=8, stop=5, samples=0)


@pytest.mark.slow
def test_no_loop_body_copies_the_cache_of_shared_prompts_or_repeats_it():
    config = dataclasses.replace(TINY, layers=1, width=64, heads=4, block=1024)
    shapes = jax.eval_shape(lambda: (random_params(config), jax.random.key(0)))
    prompts = [jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((2, 600), (2,))]
    run = functools.partial(decoding.generate, config=config, new_tokens=100, stop=5, samples=3)
    lowered = jax.jit(lambda params, key, *prompts: run(params, prompt_BP=prompts[0], length_B=prompts[1], key=key))
    hlo = lowered.lower(*shapes, *prompts).compile().as_text()
    assert "[6,4,600,16]" not in hlo and "[2,4,600,16]" in loop_bodies(hlo)
    for line in loop_bodies(hlo).splitlines():
        assert " copy(" not in line or not ("[2,4,600,16]" in line or "[6,4,99,16]" in line), line


def test_the_cache_grows_by_segments_each_traced_once():
    traced = []
    config, (prompts, lengths) = MODELS["llama"], prompts_of()
    run = jax.jit(
        functools.partial(answers_of, config=config, segment=20, watch=lambda: traced.append(1), **settings_of(SEVERAL))
    )
    for seed in range(3):
        found = run(random_params(config), prompts=prompts, lengths=lengths, key=jax.random.key(seed))
        assert_same(found, generated("llama", seed=seed, stops=SEVERAL), f"seed {seed}")
    assert len(traced) == 3  # the token after the prompt, and a body for each of the two segments


def test_the_loop_that_stops_early_gives_the_same_and_takes_no_step_too_many():
    """While the cache grows; steps that are not reached read as padding."""
    counted = []
    config, (prompts, lengths) = MODELS["llama"], prompts_of()
    run = jax.jit(
        functools.partial(
            answers_of,
            config=config,
            program=decoding.generate_until,
            segment=20,
            watch=lambda: jax.debug.callback(lambda: counted.append(1)),
        )
    )
    for stops in ((), SEVERAL, ALL):
        settings = settings_of(stops, pad=3)
        found = run(random_params(config), prompts=prompts, lengths=lengths, key=jax.random.key(3), **settings)
        expected = generated("llama", stops=stops, pad=3)
        assert_same(found, expected, f"stops {stops}")
        jax.effects_barrier()
        assert len(counted) == expected.length_B.max(), stops
        counted.clear()


@pytest.mark.slow
@pytest.mark.parametrize(("segment", "program"), [(1, decoding.generate_until), (3, decoding.generate)])
def test_segments_of_one_token_and_of_all_change_nothing(segment, program):
    config, settings = MODELS["llama"], settings_of(SEVERAL) | {"new_tokens": 4}
    run = functools.partial(answer, random_params(config), config, *prompts_of(), **settings)
    assert_same(run(jax.random.key(3), segment=segment, program=program), run(jax.random.key(3)))


# ---- stop tokens, and seen tokens ----


@pytest.mark.parametrize("stops", [(), SEVERAL[:1], SEVERAL, ALL], ids=["none", "one", "several", "all"])
def test_rows_stop_at_the_stop_token_and_stay_padded(stops):
    answers = generated(stops=stops, pad=3)
    assert set(answers.ended_B.tolist()) == {(): {False}, ALL: {True}}.get(stops, {True, False})
    for row, n, ended, logp in zip(answers.tokens_BA, answers.length_B, answers.ended_B, answers.logp_BA, strict=True):
        assert (row[n - 1] in stops) == ended and (ended or n == A)
        assert not set(row[: n - 1]) & set(stops)
        assert (row[n:] == 3).all() and (logp[n:] == 0).all() and (logp[:n] < 0).all()


def test_a_repetition_penalty_sees_prompt_and_answer():
    """With a penalty so strong that no token occurs twice, nor any of the prompt's."""
    prompts, lengths = prompts_of()
    for row, prompt, n in zip(generated(once=True).tokens_BA.tolist(), prompts.tolist(), lengths, strict=True):
        assert len({*row, *prompt[:n]}) == A + len(set(prompt[:n]))
    assert any(len(set(row)) < A for row in generated().tokens_BA.tolist())


def test_what_does_not_fit_the_block_is_refused():
    prompts, lengths = np.zeros((2, 40), np.int32), np.full(2, 40)
    with pytest.raises(UserError, match="40 tokens and 9 new ones don't fit the model's block of 48"):
        decoding.generate({}, TINY, prompts, lengths, jax.random.key(0), new_tokens=9, stop=5)
    assert alone(True).tokens_BA.shape == (1, TINY.block - WIDE)  # an exact fit is accepted


# ---- compiled programs ----


def loop_bodies(hlo: str) -> str:
    """HLO of the loop bodies and of everything they call."""
    parts = re.split(r"\n(?=(?:ENTRY )?%[\w.\-]+ \()", hlo)
    text = {re.match(r"(?:ENTRY )?%([\w.\-]+)", part)[1]: part for part in parts if re.match(r"(?:ENTRY )?%", part)}
    called = {name: set(re.findall(r"%([\w.\-]+)", part)) & text.keys() - {name} for name, part in text.items()}
    found, todo = set(), {name for part in text.values() for name in re.findall(r"body=%([\w.\-]+)", part)}
    while todo:
        name = todo.pop()
        found.add(name)
        todo |= called[name] - found
    assert found
    return "\n".join(text[name] for name in found)


def nucleus(logits):
    return sampling.top_p(sampling.min_p(logits, 0.01), 0.9)


KINDS = {
    "gpt2": {},
    "llama": {"kv_heads": 2, "mlp": "swiglu", "norm": "rms", "positions": "rotary", "biases": False},
}


@functools.cache
def compile_for(kind: str, dtype: str, layers: int, rows: int, program, new_tokens: int):
    config = ModelConfig(
        layers=layers,
        width=64,
        heads=4,
        block=1024,
        vocab=1024,
        dtype=dtype,
        **KINDS[kind],
    )
    params = jax.eval_shape(lambda: transformer.init(jax.random.key(0), config))
    shapes = (params, jax.ShapeDtypeStruct((rows, 8), jnp.int32), jax.ShapeDtypeStruct((rows,), jnp.int32))

    def run(params, prompts, lengths, key):
        settings = {"new_tokens": new_tokens, "stop": 5, "filter_logits": nucleus, "segment": 1024}
        return program(params, config, prompts, lengths, key, **settings)

    return config, jax.jit(run).lower(*shapes, jax.eval_shape(lambda: jax.random.key(0))).compile()


@pytest.mark.parametrize(
    ("kind", "dtype", "layers", "rows", "program"),
    [
        ("llama", "float32", 1, 1, decoding.generate),
        ("gpt2", "bfloat16", 1, 3, decoding.generate),
        ("gpt2", "float32", 1, 3, decoding.generate_until),
        ("gpt2", "bfloat16", 1, 1, decoding.generate_until),
        pytest.param("llama", "float32", 2, 3, decoding.generate, marks=pytest.mark.slow),
        pytest.param("gpt2", "bfloat16", 2, 3, decoding.generate_until, marks=pytest.mark.slow),
    ],
)
def test_no_loop_body_copies_the_cache_sorts_the_vocabulary_or_converts_weights(kind, dtype, layers, rows, program):
    config, compiled = compile_for(kind, dtype, layers, rows, program, 100)
    cache = rows * config.groups * (8 + 100 - 1) * config.head_dim
    params = jax.eval_shape(lambda: transformer.init(jax.random.key(0), config))
    weights = {",".join(map(str, w.shape)) for w in jax.tree.leaves(params) if w.ndim == 2} | {"64,1024"}

    def size(dims: str) -> int:
        return int(np.prod([int(n) for n in dims.split(",") if n]))

    inside = loop_bodies(compiled.as_text())
    for dims, kind in re.findall(r"= \(?\w+\[([\d,]*)\][^ ]* (copy|sort|convert)\(", inside):
        assert kind != "convert" or dims not in weights, dims
        assert size(dims) < (config.vocab if kind == "sort" else cache), (kind, dims)


def test_temporary_memory_does_not_grow_with_the_steps():
    """Apart from the cache itself, for seven times as many new tokens."""

    def beyond_cache(new: int) -> int:
        config, compiled = compile_for("llama", "float32", 1, 1, decoding.generate, new)
        cache = 2 * config.groups * config.head_dim * (8 + new - 1) * 4
        return compiled.memory_analysis().temp_size_in_bytes - 2 * cache  # the loop's, and the one it starts from

    assert beyond_cache(700) - beyond_cache(100) < 100_000


# ---- int8 ----


@functools.partial(jax.jit, static_argnums=1)
def prepared(params, config):
    whole = decoding.prepare(params, config)
    return whole, decoding.quantise_int8(whole)


@functools.partial(jax.jit, static_argnums=1)
def two_tokens(params, config, prompts, lengths):
    """The logits of the first new token, and those of the second if the first is 7."""
    cache, first = decoding.prefill(params, config, prompts, lengths, 4)
    token = jnp.full(len(lengths), 7)
    return first, decoding.decode_step(params, config, cache, token, lengths, prompts.shape[1], jnp.asarray(0))[1]


@pytest.mark.parametrize(
    ("name", "rows"), [("gpt", 1), ("llama", 1), pytest.param("llama3", 3, marks=pytest.mark.slow)]
)
def test_int8_weights_decode_nearly_the_same(name, rows):
    """Errors as expected from rounding to 127 levels, and far below those of 15 levels; int8 in memory."""
    config, (prompts, lengths) = MODELS[name], prompts_of()
    params = random_params(config, scale=2.0)
    whole, small = prepared(params, config)
    matrices = [x for x in jax.tree.leaves(small) if x.ndim == 2 and x.dtype == jnp.int8]
    assert len(matrices) == config.layers * (5 if config.mlp == "swiglu" else 4) + 1
    exact, rough = (two_tokens(p, config, prompts[:rows], lengths[:rows]) for p in (whole, small))
    sevens = np.full((ROWS, A), 7, np.int32)
    answers = Answers(sevens, np.zeros((ROWS, A), np.float32), np.full(ROWS, A, np.int32), np.zeros(ROWS, bool))
    logits = np.asarray(read_back(params, config, prompts, lengths, answers, 1.0)[3])
    for n, (logits_BV, rough_BV) in enumerate(zip(exact, rough, strict=True)):
        expected = logits[np.arange(rows), lengths[:rows] - 1 + n]
        np.testing.assert_allclose(logits_BV, expected, atol=1e-5)
        assert 1e-4 < np.abs(rough_BV - expected).max() / expected.std() < 0.1


@pytest.mark.parametrize(
    ("rows", "fan_in", "fan_out"), [(1, 64, 96), (3, 128, 40), (70, 32, 24), (1, 9000, 8), (1, 100, 30_000)]
)
def test_the_int8_product_is_that_of_the_widened_matrix(rows, fan_in, fan_out):
    on_cpu = jax.jit(functools.partial(layers.int8_product, platform="cpu"))
    rng = np.random.default_rng(0)
    kernel = rng.integers(-127, 128, (fan_in, fan_out)).astype(np.int8)
    x, scale = rng.normal(size=(rows, fan_in)).astype(np.float32), rng.uniform(0.5, 2.0, fan_out).astype(np.float32)
    expected = x.astype(np.float64) @ (kernel * scale.astype(np.float64))
    found = on_cpu(x, kernel, scale)
    np.testing.assert_allclose(found, expected, atol=2e-3 * np.abs(expected).max())
    elsewhere = jax.jit(functools.partial(layers.int8_product, platform="gpu"))
    np.testing.assert_allclose(elsewhere(x, kernel, scale), expected, atol=1e-4 * np.abs(expected).max())
    worst = on_cpu(np.ones((1, fan_in), np.float32), np.full_like(kernel, 127), scale)
    np.testing.assert_allclose(worst[0], 127.0 * fan_in * scale, rtol=1e-5)  # the largest sum does not overflow


# ---- one row on a CPU ----


@pytest.mark.parametrize(("fan_in", "fan_out"), [(7, 5), (64, 96), (1000, 3), (1001, 40), (24, 20_000)])
@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_the_row_product_is_the_product_for_any_shape(dtype, fan_in, fan_out):
    rng = np.random.default_rng(0)
    kernel = rng.integers(-127, 128, (fan_in, fan_out)).astype(dtype)  # exact in both
    x = rng.normal(size=fan_in).astype(np.float32)
    expected = x.astype(np.float64) @ kernel.astype(np.float64)
    found = jax.jit(layers.row_product)(x, kernel)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5 * np.abs(x).sum() * 127)


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="before jax 0.11 the row product isn't used")
@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_the_row_product_never_widens_the_kernel(dtype):
    program = jax.jit(layers.row_product).lower(jnp.zeros(512), jnp.zeros((512, 640), dtype)).compile()
    assert not re.search(r"f32\[(512,640|\d+,\d+,640)\][^=]*(fusion|convert)\(", entry_and_loops(program.as_text()))
    assert program.memory_analysis().temp_size_in_bytes < 512 * 640 * 4 / 2


def entry_and_loops(text):
    """The program's text without the insides of fusions, whose values are never stored."""
    parts = re.split(r"\n(?=%|ENTRY)", text)
    return "\n".join(part for part in parts if not re.match(r"%\S*fused_computation|%wrapped", part))


def test_one_row_of_bfloat16_uses_it_where_it_is_fast(monkeypatch):
    layer = {"kernel": jnp.ones((64, 96), jnp.bfloat16)}

    def loops(rows):
        x = jnp.ones((rows, 64), jnp.bfloat16)
        return "scan" in str(jax.make_jaxpr(functools.partial(layers.dense, platform="cpu"))(layer, x))

    for version, expected in (((0, 10, 2), False), ((0, 12, 0), True)):
        monkeypatch.setattr(jax, "__version_info__", version)
        assert loops(1) == expected and not loops(2)
