"""Speculative decoding changes how long an answer takes and nothing else."""

import dataclasses
import functools
import itertools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt import decoding
from jaxgpt.config import ModelConfig
from jaxgpt.decoding import sampling, speculative
from jaxgpt.errors import UserError
from jaxgpt.models import transformer
from jaxgpt.structs import KVCache
from tests.helpers import TINY, random_params

ONE = dataclasses.replace(TINY, layers=1)
SMALLER = dataclasses.replace(ONE, mlp_width=64)
FEW = ModelConfig(layers=1, width=16, heads=2, block=16, vocab=6)
FEW_DRAFT = ModelConfig(layers=1, width=8, heads=1, block=12, vocab=6)
STATIC = ("new_tokens", "pad", "filter_logits", "greedy")
P, NEW = 10, 38  # the longest prompt and its answer fill the block of 48
NEVER, STOPS = (-1, -1), (14, 43)
speculate = jax.jit(speculative.generate, static_argnums=1, static_argnames=STATIC)


@functools.cache
def lively():
    """Parameters whose greedy answers don't just repeat one token."""
    params = random_params(ONE, seed=2, scale=8.0)
    embed = params["embed"]
    return {**params, "embed": {**embed, "positions_TD": 2 * embed["positions_TD"]}}


def nearly(params, noise: float = 0.02):
    """Slightly perturbed parameters: a draft that is sometimes right."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda w: w + noise * rng.standard_normal(w.shape).astype(np.float32), params)


def pruned(params):
    """A smaller model, with half of the hidden units, that is sometimes right."""
    block = params["block_0"]
    up, down = {name: w[..., :64] for name, w in block["up"].items()}, block["down"]
    return {**params, "block_0": {**block, "up": up, "down": {**down, "kernel": down["kernel"][:64]}}}


@functools.cache
def draft_of(kind: str, k: int) -> speculative.Draft:
    return {
        "itself": lambda: speculative.model_draft(lively(), ONE, k),
        "near": lambda: speculative.model_draft(nearly(lively()), ONE, k),
        "other": lambda: speculative.model_draft(random_params(ONE, seed=7), ONE, k),
        "smaller": lambda: speculative.model_draft(pruned(lively()), SMALLER, k),
        "ngram": lambda: speculative.ngram_draft(k, 1),
    }[kind]()


def cool(logits):
    return sampling.top_k(sampling.temperature(logits, 0.7), 20)


def rows(pad_with: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Six prompts, one of a single token."""
    tokens, lengths = np.random.default_rng(0).integers(6, 64, (6, P)), np.array([P, 1, 4, 7, 2, P], np.int32)
    return np.where(np.arange(P) < lengths[:, None], tokens, pad_with).astype(np.int32), lengths


def answer(
    draft: speculative.Draft, b: int = 0, stop: tuple[int, int] = NEVER, pad_with: int = 17, **settings
) -> speculative.SpeculativeAnswer:
    prompts, lengths = rows(pad_with)
    return jax.device_get(
        speculate(
            lively(),
            ONE,
            prompts[b : b + 1],
            lengths[b : b + 1],
            jax.random.key(b),
            draft=draft,
            new_tokens=NEW,
            stop=np.array(stop),
            **settings,
        )
    )


# ---- greedy -------------------------------------------------------------------------------------------------------


@jax.jit
def greedily(params, prompts, lengths, stop) -> decoding.Answers:
    settings = {"new_tokens": NEW, "stop": stop, "sample": sampling.greedy}
    return decoding.generate(params, ONE, prompts, lengths, jax.random.key(0), **settings)


@functools.cache
def greedy_answers(stop: tuple[int, int]) -> decoding.Answers:
    """The expected answers: plain greedy decoding."""
    return jax.device_get(greedily(lively(), *rows(), np.array(stop)))


@pytest.mark.parametrize(
    ("kind", "k"),
    [
        ("itself", 3),
        ("near", 3),
        ("other", 3),
        ("smaller", 1),
        ("ngram", 4),
        pytest.param("itself", 1, marks=pytest.mark.slow),
    ],
)
def test_greedy_gives_the_tokens_of_generate(kind, k):
    """Whatever the draft and the padding after the prompt, up to the block's last position; and the draft's cache stays
    in sync when some tokens are accepted and some rejected."""
    saved = wasted = 0
    for stop in (NEVER, STOPS):
        expected = greedy_answers(stop)
        assert len(set(expected.ended_B.tolist())) == (1 if stop == NEVER else 2)
        for b in range(6):
            out = answer(draft_of(kind, k), b, stop, greedy=True)
            for name in ("tokens_BA", "length_B", "ended_B"):
                message = f"{name} of row {b}, stop {stop}"
                np.testing.assert_array_equal(
                    getattr(out.answers, name)[0], getattr(expected, name)[b], err_msg=message
                )
            np.testing.assert_allclose(out.answers.logp_BA[0], expected.logp_BA[b], atol=2e-5)
            size, forwards, accepted = int(out.answers.length_B[0]), int(out.forwards), int(out.accepted)
            assert size - forwards <= accepted <= min(size, k * forwards)
            saved, wasted = saved + accepted, wasted + k * forwards - accepted
    assert (saved > 0 or kind == "other") and (wasted > 0 or kind == "itself")


@pytest.mark.parametrize("k", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_a_perfect_draft_is_always_accepted(k):
    """Every pass yields k + 1 tokens: if all were accepted, the draft also reads its own last token."""
    for b in range(6):
        out = answer(draft_of("itself", k), b, greedy=True)
        assert int(out.forwards) == -(-NEW // (k + 1))
        assert int(out.accepted) == NEW - NEW // (k + 1)
        assert int(out.answers.length_B[0]) == NEW and not out.answers.ended_B[0]


# ---- sampled ------------------------------------------------------------------------------------------------------


@jax.jit
def cool_logp(params, prompts, lengths, answers):
    batch, ours = decoding.join_prompt_and_answer(prompts, lengths, answers)
    _, h = transformer.token_log_probs(params, ONE, batch)
    logp_V = jax.nn.log_softmax(cool(transformer.unembed(params, h)))
    return batch.mask_BT, ours, jnp.take_along_axis(logp_V[:, :-1], batch.tokens_BT[:, 1:, None], axis=2)[..., 0]


@pytest.mark.parametrize("b", [0, 2])
@pytest.mark.parametrize("kind", ["itself", "near"])
def test_sampled_log_probs_equal_those_of_the_full_forward(kind, b):
    """And a perfect draft, shaped by the same filter, is always accepted while sampling too."""
    out = answer(draft_of(kind, 3), b, filter_logits=cool)
    assert (int(out.forwards) == 10 and int(out.accepted) == 29) == (kind == "itself")
    prompts, lengths = rows()
    mask_BT, ours, logp = cool_logp(lively(), prompts[b : b + 1], lengths[b : b + 1], out.answers)
    np.testing.assert_allclose(np.where(mask_BT[:, 1:], logp, 0.0), ours[:, 1:], atol=2e-5)
    assert mask_BT.sum() == NEW


def test_padding_of_the_prompt_changes_nothing():
    a, b = (answer(draft_of("near", 3), 2, pad_with=pad_with, filter_logits=cool) for pad_with in (0, 17))
    np.testing.assert_array_equal(a.answers.tokens_BA, b.answers.tokens_BA)
    np.testing.assert_allclose(a.answers.logp_BA, b.answers.logp_BA, atol=1e-5)
    assert (int(a.forwards), int(a.accepted)) == (int(b.forwards), int(b.accepted))


def test_ngrams_are_looked_up_in_prompt_and_answer():
    """The last occurrence with a known continuation; repeated past the text's end; otherwise the last token."""
    text = np.array([7, 8, 9, 7, 8, 3, 1, 7, 8, 0, 9, 7, 8])

    @jax.jit
    def proposed(size):
        found = {}
        for n in (2, 3, 4):
            state, propose = speculative.ngram_draft(5, n).start(ONE, text[None], np.array([13]), 5, jax.nn.softmax)
            found[n] = propose(jax.random.key(0), state, jnp.asarray(text), size)[1:]
        return found

    for n, size, expected in [
        (2, 9, [3, 1, 7, 8, 3]),  # text[9:] is not known yet
        (2, 5, [9, 7, 8, 9, 7]),
        (3, 13, [3, 1, 7, 8, 0]),
        (2, 2, [8, 8, 8, 8, 8]),
        (4, 2, [8, 8, 8, 8, 8]),
    ]:
        tokens, q = proposed(size)[n]
        np.testing.assert_array_equal(tokens, expected, err_msg=f"{n} of {size}")
        np.testing.assert_array_equal(q, np.eye(64)[expected])


# ---- the distribution ---------------------------------------------------------------------------------------------


def chi_square(counts: np.ndarray, expected: np.ndarray) -> tuple[float, int]:
    """Chi-square over the common outcomes, with rare ones pooled; and the degrees of freedom."""
    common = expected >= 5
    pooled = [(counts[common], expected[common]), (counts[~common].sum(), expected[~common].sum())]
    chi2 = sum(np.sum((c - e) ** 2 / e) for c, e in pooled if np.all(e > 0))
    return float(chi2), int(common.sum()) - (0 if expected[~common].sum() > 0 else 1)


def enumerated(params, prompt: list[int], answers: int, stop: int, filter_logits) -> dict[tuple[int, ...], float]:
    """The probability of every answer of that many tokens, cut after the stop token, by the full forward pass."""
    rows = np.array(list(itertools.product(range(FEW.vocab), repeat=answers)))
    tokens = np.concatenate([np.tile(prompt, (len(rows), 1)), rows], axis=1)
    read = jax.jit(
        lambda p, x: jax.nn.log_softmax(filter_logits(transformer.unembed(p, transformer.hidden(p, FEW, x))))
    )
    logp = np.asarray(read(params, tokens), np.float64)
    found = {}
    for row, logp_TV in zip(rows, logp, strict=True):
        size = list(row).index(stop) + 1 if stop in row else answers
        total = sum(logp_TV[len(prompt) - 1 + t, row[t]] for t in range(size))
        found[tuple(int(x) for x in row[:size])] = float(np.exp(total))
    assert abs(sum(found.values()) - 1) < 1e-5
    return found


def warm(logits):
    return sampling.top_k(sampling.temperature(logits, 1.4), 4)


DISTRIBUTION_DRAFTS = {
    "bad": lambda: speculative.model_draft(random_params(FEW_DRAFT, seed=9, scale=8.0), FEW_DRAFT, 2),
    "near": lambda: speculative.model_draft(nearly(random_params(FEW, scale=5.0), 0.1), FEW, 3),
    "ngram": lambda: speculative.ngram_draft(2, 1),
}


def as_they_are(logits):
    return logits


@pytest.mark.parametrize(
    ("kind", "filter_logits"),
    [
        pytest.param("bad", warm, marks=pytest.mark.slow),
        pytest.param("near", as_they_are, marks=pytest.mark.slow),
        ("ngram", warm),
    ],
)
def test_answers_follow_the_models_distribution(kind, filter_logits):
    """Chi-square of many samples against all answers of three tokens, enumerated."""
    params, prompt, draws = random_params(FEW, scale=5.0), [1, 2, 3, 1, 2, 3], 20_000
    expected = enumerated(params, prompt, 3, 5, filter_logits)
    draft = DISTRIBUTION_DRAFTS[kind]()

    @jax.jit
    def draw(params, draft, key):
        one = lambda key: speculative.generate(  # noqa: E731
            params,
            FEW,
            jnp.array([[*prompt, 0]]),
            jnp.array([6]),
            key,
            draft=draft,
            new_tokens=3,
            stop=5,
            filter_logits=filter_logits,
        )
        return jax.vmap(one)(jax.random.split(key, draws))

    out = jax.device_get(draw(params, draft, jax.random.key(11)))
    assert 0.05 * draws < int(out.accepted.sum()) < 2.5 * draws
    names = {answer: i for i, answer in enumerate(expected)}
    tokens, sizes = np.asarray(out.answers.tokens_BA[:, 0]), np.asarray(out.answers.length_B[:, 0])
    drawn = [names[tuple(row[:n].tolist())] for row, n in zip(tokens, sizes, strict=True)]
    counts = np.bincount(drawn, minlength=len(names))
    probability = np.array(list(expected.values()))
    chi2, freedom = chi_square(counts, draws * probability)
    assert freedom > 20 and chi2 < freedom + 4 * np.sqrt(2 * freedom)
    np.testing.assert_allclose(out.answers.logp_BA[:, 0].sum(axis=1), np.log(probability[drawn]), atol=1e-4)


# ---- the core step ------------------------------------------------------------------------------------------------


def distributions(rows: int = 200, V: int = 7) -> tuple[np.ndarray, np.ndarray]:
    """Pairs (p, q): flat, peaked, equal, disjoint and one-hot ones, with zeros."""
    rng = np.random.default_rng(0)
    p, q = (np.exp(rng.normal(size=(rows, V)) * rng.choice([0.1, 2.0, 20.0], (rows, 1))) for _ in range(2))
    p[rng.random(p.shape) < 0.2] = 0.0
    q[rng.random(q.shape) < 0.2] = 0.0
    p[:, 0] += 1e-3
    q[:, 1] += 1e-3
    q[:20] = p[:20]
    q[20:40] = np.eye(V)[rng.integers(0, V, 20)]
    p[40], q[40] = np.eye(V)[2], np.eye(V)[3]
    return p / p.sum(axis=1, keepdims=True), q / q.sum(axis=1, keepdims=True)


def test_acceptance_and_residual_add_up_to_p():
    """q(x) a(x) + P(rejected) r(x) = p(x), in float64: the theorem of both papers."""
    p, q = distributions()
    with jax.enable_x64(True):
        both = jax.jit(lambda p, q: (speculative.acceptance_probability(p, q), speculative.residual_distribution(p, q)))
        a, r = map(np.asarray, both(p, q))
    assert a.dtype == r.dtype == np.float64
    np.testing.assert_allclose(q * a + (1 - (q * a).sum(axis=1, keepdims=True)) * r, p, atol=1e-15)
    np.testing.assert_allclose(r.sum(axis=1), 1.0, atol=1e-14)
    assert ((a >= 0) & (a <= 1)).all()


@jax.jit
def verified(key, q, p):
    def draw(key):
        draft_key, verify_key = jax.random.split(key)
        drafted = sampling.categorical(sampling.answer_keys(draft_key, jnp.arange(len(q))), jnp.log(q))
        return (*speculative.verify(verify_key, drafted, q, p), drafted)

    return jax.vmap(draw)(jax.random.split(key, 40_000))


@pytest.mark.parametrize("deterministic", [False, True])
def test_the_kernel_draws_from_p(deterministic):
    """Three drafted tokens: the first result follows the first row of p; each later one, given acceptance, its own."""
    V, J = 7, 3
    p, q = (x[100:].astype(np.float32) for x in distributions())
    p = 0.5 * p[: J + 1] + np.float32(0.5 / V)
    q = np.eye(V, dtype=np.float32)[p[:J].argmax(axis=1)] if deterministic else 0.5 * q[:J] + np.float32(0.5 / V)
    tokens, accepted, drafted = map(np.asarray, verified(jax.random.key(2), q, p))
    for j in range(J + 1):
        reached = accepted >= j
        assert reached.sum() > 200
        chi2, freedom = chi_square(
            np.bincount(tokens[reached, j], minlength=V), reached.sum() * np.asarray(p[j], np.float64)
        )
        assert chi2 < freedom + 4 * np.sqrt(2 * freedom)
    kept = np.arange(J) < accepted[:, None]
    assert (tokens[:, :J] == drafted)[kept].all()
    q_kept = np.minimum(p[:J], q).sum(axis=1)
    np.testing.assert_allclose((accepted >= 1).mean(), q_kept[0], atol=0.01)
    np.testing.assert_allclose((accepted >= 3).mean(), q_kept.prod(), atol=0.01)


@functools.partial(jax.jit, static_argnums=1)
def extend(params, config, cache, tokens, start):
    return speculative.feed_sequence(params, config, cache, tokens, start)


def test_extend_equals_the_full_forward():
    """Several tokens at once, over slots that hold others: the full forward's logits, bfloat16 within its rounding."""
    rng = np.random.default_rng(1)
    tokens, params = rng.integers(6, 64, (2, 20)), random_params()
    expected = jax.jit(lambda p, x: transformer.unembed(p, transformer.hidden(p, TINY, x)))(params, tokens)
    for config, atol in ((TINY, 1e-4), (dataclasses.replace(TINY, dtype="bfloat16"), 0.3)):
        keys, values = (tuple(rng.normal(size=(2, 2, 24, 16)).astype(np.float32) for _ in range(2)) for _ in range(2))
        cache = KVCache(keys, values)  # of two layers
        for start in range(0, 20, 4):
            cache, logits = extend(params, config, cache, tokens[:, start : start + 4], start)
            np.testing.assert_allclose(logits, expected[:, start : start + 4], atol=atol, err_msg=config.dtype)


def primitives(jaxpr, scope: str = "") -> Iterator[tuple[str, str]]:
    """(primitive, named scopes) of every equation, those of inner functions and loops included."""
    for one in jaxpr.eqns:
        inside = f"{scope}/{one.source_info.name_stack}"
        yield one.primitive.name, inside
        for part in jax.tree.leaves(list(one.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            if hasattr(inner := getattr(part, "jaxpr", part), "eqns"):
                yield from primitives(inner, inside)


@pytest.mark.parametrize("kind", ["other", "ngram"])
def test_whatever_draws_a_token_is_in_the_scope_that_profiles_name(kind):
    prompts, lengths = rows()
    generate = functools.partial(
        speculative.generate, draft=draft_of(kind, 2), new_tokens=5, stop=5, filter_logits=jnp.sinh
    )
    traced = jax.make_jaxpr(generate, static_argnums=1)(lively(), ONE, prompts[:1], lengths[:1], jax.random.key(0))
    found = [(name, scope) for name, scope in primitives(traced.jaxpr) if name in ("random_bits", "sinh")]
    assert {name for name, _ in found} == {"random_bits", "sinh"}
    assert all("sample" in scope for _, scope in found), found


# ---- edges --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda: speculative.model_draft({}, TINY, 0), "k is 0; it must be at least 1"),
        (lambda: speculative.ngram_draft(0), "k is 0; it must be at least 1"),
        (lambda: speculative.ngram_draft(2, 0), "n is 0; it must be at least 1"),
        (lambda: run_with(draft=speculative.ngram_draft(2, 30)), "n is 30, more tokens than prompt and answer"),
        (lambda: run_with(draft_config=FEW_DRAFT), "a vocabulary of 6, the model one of 64"),
        (lambda: run_with(new_tokens=45), "don't fit the model's block of 48"),
        (lambda: run_with(new_tokens=0), "ask for at least 1"),
        (lambda: run_with(prompts=2), "one prompt at a time, not 2"),
        (
            lambda: run_with(new_tokens=20, draft_config=dataclasses.replace(ONE, block=12)),
            "don't fit the model's block of 12",
        ),
    ],
)
def test_mistakes_are_named(make, complaint):
    with pytest.raises(UserError, match=complaint):
        make()


def shapes_of(config: ModelConfig):
    return jax.eval_shape(lambda: transformer.init(jax.random.key(0), config))


def run_with(prompts: int = 1, new_tokens: int = 5, draft=None, draft_config=None) -> speculative.SpeculativeAnswer:
    draft = speculative.model_draft(shapes_of(draft_config), draft_config, 2) if draft_config else draft
    run = functools.partial(speculative.generate, config=ONE, new_tokens=new_tokens, stop=5)
    return jax.eval_shape(
        lambda params, draft, key, prompts, lengths: run(
            params, prompt_BP=prompts, length_B=lengths, key=key, draft=draft
        ),
        shapes_of(ONE),
        draft or speculative.ngram_draft(2),
        jax.random.key(0),
        np.ones((prompts, 4), np.int32),
        np.full(prompts, 4),
    )
