"""Speculative decoding changes how long an answer takes, and nothing else."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt import decode, model, sampling, speculative
from jaxgpt.config import ModelConfig, UserError
from tests.helpers import TINY, hidden, params_of, prompts_of

SMALLER = ModelConfig(layers=1, width=16, heads=1, block=48, vocab=64)
FEW = ModelConfig(layers=1, width=16, heads=2, block=16, vocab=6)
FEW_DRAFT = ModelConfig(layers=1, width=8, heads=1, block=12, vocab=6)
STATIC = ("new_tokens", "pad", "filter_logits", "greedy")
NEVER, NEW = (-1, -1), 18
speculate = jax.jit(speculative.generate, static_argnums=1, static_argnames=STATIC)


@functools.partial(jax.jit, static_argnums=4)
def greedily(params, prompts, lengths, stop, new_tokens) -> decode.Answers:
    """What is to come out: plain greedy decoding."""
    settings = {"new_tokens": new_tokens, "stop": stop, "sample": sampling.greedy}
    return decode.generate(params, TINY, prompts, lengths, jax.random.key(0), **settings)


def lively(config: ModelConfig = TINY, seed: int = 2):
    """Parameters whose greedy answers don't just repeat one token."""
    params = params_of(config, seed, scale=8.0)
    embed = params["embed"]
    return {**params, "embed": {**embed, "positions_TD": 4 * embed["positions_TD"]}}


def nearly(params, noise: float = 0.02):
    """Parameters a little beside these: a draft that is right now and then."""
    leaves, tree = jax.tree.flatten(params)
    rng = np.random.default_rng(0)
    return jax.tree.unflatten(tree, [w + noise * rng.standard_normal(w.shape).astype(np.float32) for w in leaves])


def draft_of(kind: str, k: int) -> speculative.Draft:
    return {
        "itself": lambda: speculative.model_draft(lively(), TINY, k),
        "near": lambda: speculative.model_draft(nearly(lively()), TINY, k),
        "other": lambda: speculative.model_draft(params_of(seed=7), TINY, k),
        "smaller": lambda: speculative.model_draft(params_of(SMALLER, seed=7), SMALLER, k),
        "ngram": lambda: speculative.ngram_draft(k, 1 + k % 2),
    }[kind]()


def cool(logits):
    return sampling.top_k(sampling.temperature(logits, 0.7), 20)


def rows() -> tuple[jax.Array, jax.Array]:
    """Six prompts, one of a single token."""
    prompts, lengths = prompts_of(6, 9)
    return prompts.at[1, 1:].set(0), lengths.at[1].set(1)


def answer(draft: speculative.Draft, b: int = 0, stop: tuple[int, int] = NEVER, **settings) -> speculative.Speculated:
    prompts, lengths = rows()
    return speculate(
        lively(), TINY, prompts[b : b + 1], lengths[b : b + 1], jax.random.key(b), draft=draft, new_tokens=NEW,
        stop=jnp.array(stop), **settings,
    )  # fmt: skip


# ---- greedy -------------------------------------------------------------------------------------------------------


@functools.cache
def greedy_answers(stop: tuple[int, int]):
    prompts, lengths = rows()
    return greedily(lively(), prompts, lengths, jnp.array(stop), NEW)


@pytest.mark.parametrize(
    ("kind", "k"),
    [("itself", 1), ("near", 3), ("smaller", 2), ("ngram", 4)]
    + [pytest.param(*one, marks=pytest.mark.slow) for one in (("itself", 3), ("near", 1), ("other", 3), ("ngram", 1))],
)
def test_greedy_gives_the_tokens_of_generate(kind, k):
    """Whatever the draft; and with some accepted and some rejected, the draft's cache stays in step."""
    saved = wasted = 0
    for stop in (NEVER, (37, 54)):
        expected = greedy_answers(stop)
        assert len(set(expected.ended_B.tolist())) == (1 if stop == NEVER else 2)
        for b in range(6):
            out = answer(draft_of(kind, k), b, stop, greedy=True)
            for name in ("tokens_BA", "length_B", "ended_B"):
                np.testing.assert_array_equal(getattr(out.answers, name)[0], getattr(expected, name)[b])
            np.testing.assert_allclose(out.answers.logp_BA[0], expected.logp_BA[b], atol=2e-5)
            size, forwards, accepted = int(out.answers.length_B[0]), int(out.forwards), int(out.accepted)
            assert size - forwards <= accepted <= min(size, k * forwards)
            saved, wasted = saved + accepted, wasted + k * forwards - accepted
    assert (saved > 0 or kind in ("other", "smaller")) and (wasted > 0 or kind == "itself")


@pytest.mark.parametrize("k", [1, 3])
def test_a_perfect_draft_is_always_accepted(k):
    """Every pass yields k + 1 tokens: the draft reads the last of its own too when all were accepted."""
    for b in range(6):
        out = answer(draft_of("itself", k), b, greedy=True)
        assert int(out.forwards) == -(-NEW // (k + 1))
        assert int(out.accepted) == NEW - NEW // (k + 1)
        assert int(out.answers.length_B[0]) == NEW and not out.answers.ended_B[0]


def test_sampled_log_probs_equal_those_of_the_full_forward():
    """And a perfect draft, whose distribution the same filter shapes, is accepted while sampling too."""
    for kind in ("itself", "near", "ngram"):
        out = answer(draft_of(kind, 3), filter_logits=cool)
        assert kind != "itself" or (int(out.forwards), int(out.accepted)) == (5, 14)
        batch, ours = decode.join(rows()[0][:1], rows()[1][:1], out.answers)
        logp_V = jax.nn.log_softmax(cool(model.unembed(lively(), hidden(lively(), TINY, batch.tokens_BT))))
        logp = jnp.take_along_axis(logp_V[:, :-1], batch.tokens_BT[:, 1:, None], axis=2)[..., 0]
        np.testing.assert_allclose(jnp.where(batch.mask_BT[:, 1:], logp, 0.0), ours[:, 1:], atol=2e-5)
        assert int(batch.mask_BT.sum()) == NEW


def test_padding_of_the_prompt_changes_nothing():
    prompts, lengths = (x[2:3] for x in rows())
    wide = jnp.pad(prompts, ((0, 0), (0, 9)), constant_values=17)
    a, b = (
        speculate(
            lively(), TINY, x, lengths, jax.random.key(1), draft=draft_of("near", 3), new_tokens=NEW,
            stop=jnp.array(NEVER), filter_logits=cool,
        )
        for x in (prompts, wide)
    )  # fmt: skip
    np.testing.assert_array_equal(a.answers.tokens_BA, b.answers.tokens_BA)
    np.testing.assert_allclose(a.answers.logp_BA, b.answers.logp_BA, atol=1e-5)
    assert (int(a.forwards), int(a.accepted)) == (int(b.forwards), int(b.accepted))


def test_ngrams_are_looked_up_in_prompt_and_answer():
    """The last occurrence whose continuation is known; past the text's end its period; else the last token."""
    text = jnp.array([7, 8, 9, 7, 8, 3, 1, 7, 8, 0, 9, 7, 8])

    def proposed(n: int, k: int, size: int) -> list[int]:
        draft = speculative.ngram_draft(k, n)
        state, propose = draft.start(TINY, text[None], jnp.array([13]), 5, jax.nn.softmax)
        _, tokens, q = jax.jit(propose)(jax.random.key(0), state, text, jnp.array(size))
        np.testing.assert_array_equal(q, jax.nn.one_hot(tokens, 64))
        return tokens.tolist()

    assert proposed(2, 3, 9) == [3, 1, 7]  # text[9:] is not known yet
    assert proposed(2, 3, 5) == [9, 7, 8]
    assert proposed(2, 5, 5) == [9, 7, 8, 9, 7]
    assert proposed(3, 2, 13) == [3, 1]
    assert proposed(2, 2, 2) == [8, 8]
    assert proposed(4, 2, 2) == [8, 8]


# ---- the distribution ---------------------------------------------------------------------------------------------


def chi_square(counts: np.ndarray, expected: np.ndarray) -> tuple[float, int]:
    """Over the common outcomes, the rare ones taken together; and the degrees of freedom."""
    common = expected >= 5
    pooled = [(counts[common], expected[common]), (counts[~common].sum(), expected[~common].sum())]
    chi2 = sum(np.sum((c - e) ** 2 / e) for c, e in pooled if np.all(e > 0))
    return float(chi2), int(common.sum()) - (0 if expected[~common].sum() > 0 else 1)


def enumerated(params, prompt: list[int], answers: int, stop: int, filter_logits) -> dict[tuple[int, ...], float]:
    """The probability of every answer of so many tokens, cut after the stop token, by the full forward."""
    rows = np.array(list(itertools.product(range(FEW.vocab), repeat=answers)))
    tokens = jnp.asarray(np.concatenate([np.tile(prompt, (len(rows), 1)), rows], axis=1))
    logits = filter_logits(model.unembed(params, hidden(params, FEW, tokens)))
    logp = np.asarray(jax.nn.log_softmax(logits), np.float64)
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
    "bad": lambda: speculative.model_draft(params_of(FEW_DRAFT, seed=9, scale=8.0), FEW_DRAFT, 2),
    "near": lambda: speculative.model_draft(nearly(params_of(FEW, scale=5.0), 0.1), FEW, 3),
    "ngram": lambda: speculative.ngram_draft(2, 1),
}


@pytest.mark.parametrize(
    ("kind", "filter_logits"),
    [
        pytest.param("bad", warm, marks=pytest.mark.slow),
        pytest.param("near", lambda logits: logits, marks=pytest.mark.slow),
        pytest.param("ngram", warm, marks=pytest.mark.slow),
        ("ngram", lambda logits: logits),
    ],
)
def test_answers_follow_the_models_distribution(kind, filter_logits):
    """Chi-square of many draws against all answers of three tokens, enumerated."""
    params, prompt, draws = params_of(FEW, scale=5.0), [1, 2, 3, 1, 2, 3], 20_000
    expected = enumerated(params, prompt, 3, 5, filter_logits)
    draft = DISTRIBUTION_DRAFTS[kind]()

    @jax.jit
    def draw(params, draft, keys):
        one = lambda key: speculative.generate(  # noqa: E731
            params, FEW, jnp.array([prompt + [0]]), jnp.array([6]), key, draft=draft, new_tokens=3, stop=5,
            filter_logits=filter_logits,
        )  # fmt: skip
        return jax.vmap(one)(keys)

    out = draw(params, draft, jax.random.split(jax.random.key(11), draws))
    assert 0.05 * draws < int(out.accepted.sum()) < 2.5 * draws
    names = {answer: i for i, answer in enumerate(expected)}
    tokens, sizes = np.asarray(out.answers.tokens_BA[:, 0]), np.asarray(out.answers.length_B[:, 0])
    drawn = [names[tuple(row[:n].tolist())] for row, n in zip(tokens, sizes, strict=True)]
    counts = np.bincount(drawn, minlength=len(names))
    probability = np.array(list(expected.values()))
    chi2, freedom = chi_square(counts, draws * probability)
    assert freedom > 20 and chi2 < freedom + 4 * np.sqrt(2 * freedom)
    np.testing.assert_allclose(out.answers.logp_BA[:, 0].sum(axis=1), np.log(probability[drawn]), atol=1e-4)


# ---- the kernel ---------------------------------------------------------------------------------------------------


def distributions(rows: int = 200, V: int = 7) -> tuple[np.ndarray, np.ndarray]:
    """Pairs (p, q) with flat, peaked, equal, disjoint and one-hot ones, with zeros."""
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
        a, r = (
            speculative.acceptance(jnp.asarray(p), jnp.asarray(q)),
            speculative.residual(jnp.asarray(p), jnp.asarray(q)),
        )
        total = q * a + (1 - (q * a).sum(axis=1, keepdims=True)) * r
        assert total.dtype == jnp.float64
        np.testing.assert_allclose(total, p, atol=1e-15)
        np.testing.assert_allclose(r.sum(axis=1), 1.0, atol=1e-14)
        assert ((a >= 0) & (a <= 1)).all()


@pytest.mark.parametrize("deterministic", [False, True])
def test_the_kernel_draws_from_p(deterministic):
    """Three drafted tokens: the first result has the first row's p; each next, given acceptance, its own."""
    V, J, draws = 7, 3, 40_000
    p, q = (x[100:] for x in distributions())
    p, q = jnp.asarray(p[: J + 1], jnp.float32), jnp.asarray(q[:J], jnp.float32)
    p = 0.5 * p + 0.5 / V
    q = jax.nn.one_hot(p[:J].argmax(axis=1), V) if deterministic else 0.5 * q + 0.5 / V

    @jax.jit
    @jax.vmap
    def draw(key):
        draft_key, verify_key = jax.random.split(key)
        drafted = sampling.categorical(draft_key, jnp.log(q))
        return (*speculative.verify(verify_key, drafted, q, p), drafted)

    tokens, accepted, drafted = map(np.asarray, draw(jax.random.split(jax.random.key(2), draws)))
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


def test_extend_equals_the_full_forward():
    """Several tokens at once, over slots that hold others: logits of the full forward; bfloat16 within its rounding."""
    tokens = prompts_of(2, 20)[0]
    full = jnp.asarray(np.random.default_rng(1).integers(6, 64, (2, 20)), jnp.int32)
    for dtype, atol in (("float32", 1e-4), ("bfloat16", 0.3)):
        config = ModelConfig(layers=2, width=32, heads=2, block=48, vocab=64, dtype=dtype)
        params = params_of(config)
        prefill = jax.jit(decode.prefill, static_argnums=(1, 4))
        cache, _ = prefill(params, config, tokens.at[:, :8].set(full[:, :8]), jnp.array([20, 20]), 0)
        extend = jax.jit(speculative.extend, static_argnums=1)
        expected = model.unembed(params, hidden(params, config, full))
        for start, end in ((8, 12), (12, 16), (16, 20)):
            cache, logits = extend(params, config, cache, full[:, start:end], jnp.array(start))
            np.testing.assert_allclose(logits, expected[:, start:end], atol=atol)


# ---- edges --------------------------------------------------------------------------------------------------------


def test_an_answer_up_to_the_last_position_of_the_block():
    """Drafts past the block's end are thrown away; the answer is the one of generate."""
    prompts, lengths = jnp.arange(8, 18)[None], jnp.array([10])
    expected = greedily(lively(), prompts, lengths, jnp.array(NEVER), 38)
    out = speculate(
        lively(), TINY, prompts, lengths, jax.random.key(0), draft=draft_of("near", 5), new_tokens=38,
        stop=jnp.array(NEVER), greedy=True,
    )  # fmt: skip
    np.testing.assert_array_equal(out.answers.tokens_BA, expected.tokens_BA)
    np.testing.assert_allclose(out.answers.logp_BA, expected.logp_BA, atol=2e-5)


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda: speculative.model_draft({}, TINY, 0), "k is 0; it must be at least 1"),
        (lambda: speculative.ngram_draft(0), "k is 0; it must be at least 1"),
        (lambda: speculative.ngram_draft(2, 0), "n is 0; it must be at least 1"),
        (lambda: run_with(draft=speculative.ngram_draft(2, 30)), "n is 30, more than prompt and answer"),
        (lambda: run_with(draft=DISTRIBUTION_DRAFTS["bad"]()), "a vocabulary of 6, the model one of 64"),
        (lambda: run_with(new_tokens=45), "don't fit the model's block of 48"),
        (lambda: run_with(new_tokens=0), "ask for at least 1"),
        (lambda: run_with(prompts_of(2, 4)), "one prompt at a time, not 2"),
        (lambda: run_with(new_tokens=20, draft=short_draft()), "don't fit the model's block of 12"),
    ],
)
def test_mistakes_are_named(make, complaint):
    with pytest.raises(UserError, match=complaint):
        make()


def short_draft() -> speculative.Draft:
    config = ModelConfig(layers=1, width=16, heads=1, block=12, vocab=64)
    return speculative.model_draft(params_of(config), config, 2)


def run_with(prompts=None, new_tokens: int = 5, draft=None) -> speculative.Speculated:
    draft = draft or speculative.ngram_draft(2)
    run = lambda *args: speculative.generate(args[0], TINY, *args[1:], draft=draft, new_tokens=new_tokens, stop=5)  # noqa: E731
    return jax.eval_shape(run, params_of(), *(prompts or prompts_of(1, 4)), jax.random.key(0))
