"""Beam search between its two ends: one beam is greedy decoding, a beam for every answer is exhaustive search."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt import beam, decode, model, sampling
from jaxgpt.config import ModelConfig, UserError
from tests.helpers import TINY, hidden, params_of, prompts_of, score

FEW = ModelConfig(layers=2, width=16, heads=2, block=12, vocab=4)
search = jax.jit(beam.beam_search, static_argnums=1, static_argnames=("beams", "new_tokens", "pad"))
NEVER, A = (-1, -1), 3


@functools.cache
def exhaustive(stop: tuple[int, int]) -> list[dict[tuple[int, ...], float]]:
    """The log-probability of every answer of up to A tokens, by the full forward; a dict for each of three prompts."""
    params, (prompts, lengths) = params_of(FEW, scale=5.0), few_prompts()
    answers = np.array(list(itertools.product(range(FEW.vocab), repeat=A)))
    found = []
    for prompt, n in zip(np.asarray(prompts), np.asarray(lengths), strict=True):
        rows = np.concatenate([np.tile(prompt[:n], (len(answers), 1)), answers], axis=1)
        logits = model.unembed(params, hidden(params, FEW, jnp.asarray(rows)))
        logp = np.asarray(jax.nn.log_softmax(logits), np.float64)
        one = {}
        for i, row in enumerate(answers):
            ends = [t for t in range(A) if row[t] in stop]
            size = ends[0] + 1 if ends else A
            one[tuple(row[:size].tolist())] = sum(logp[i, n - 1 + t, row[t]] for t in range(size))
        found.append(one)
    return found


def few_prompts() -> tuple[jax.Array, jax.Array]:
    return jnp.array([[1, 2, 3, 1], [3, 0, 0, 0], [2, 2, 0, 0]]), jnp.array([4, 1, 2])


@pytest.mark.parametrize("stop", [NEVER, (1, 1), (2, 0)])
@pytest.mark.parametrize("length_penalty", [0.0, 0.7, 1.0, 3.0])
def test_beams_for_all_answers_are_exhaustive_search(stop, length_penalty):
    """All answers, in the right order; places left over are marked."""
    out = search(
        params_of(FEW, scale=5.0), FEW, *few_prompts(), beams=70, new_tokens=A, stop=jnp.array(stop), pad=3,
        length_penalty=length_penalty,
    )  # fmt: skip
    for b, expected in enumerate(exhaustive(stop)):
        scores = {answer: logp / len(answer) ** length_penalty for answer, logp in expected.items()}
        real = len(scores)
        np.testing.assert_allclose(out.score_BC[b, :real], sorted(scores.values(), reverse=True), atol=1e-5)
        assert (np.asarray(out.score_BC[b, real:]) == -np.inf).all() and (out.length_BC[b, real:] == 0).all()
        assert not out.ended_BC[b, real:].any()
        seen = set()
        for c in range(real):
            n = int(out.length_BC[b, c])
            answer = tuple(out.tokens_BCA[b, c, :n].tolist())
            np.testing.assert_allclose(out.score_BC[b, c], scores[answer], atol=1e-5)
            assert bool(out.ended_BC[b, c]) == (answer[-1] in stop)
            assert (out.tokens_BCA[b, c, n:] == 3).all()
            seen.add(answer)
        assert seen == set(scores)


@pytest.mark.parametrize("length_penalty", [0.0, 1.0])
def test_one_beam_is_greedy_decoding(length_penalty):
    params, (prompts, lengths) = params_of(), prompts_of(8, 7)
    decoding = jax.jit(
        lambda stop: decode.generate(
            params, TINY, prompts, lengths, jax.random.key(0), new_tokens=12, stop=stop, sample=sampling.greedy
        ),
    )
    for stop in (NEVER, (15, 46)):
        greedy = decoding(jnp.array(stop))
        out = search(
            params, TINY, prompts, lengths, beams=1, new_tokens=12, stop=jnp.array(stop), length_penalty=length_penalty
        )
        assert greedy.ended_B.any() == (stop != NEVER)
        np.testing.assert_array_equal(out.tokens_BCA[:, 0], greedy.tokens_BA)
        np.testing.assert_array_equal(out.length_BC[:, 0], greedy.length_B)
        np.testing.assert_array_equal(out.ended_BC[:, 0], greedy.ended_B)
        expected = greedy.logp_BA.sum(axis=1) / greedy.length_B**length_penalty
        np.testing.assert_allclose(out.score_BC[:, 0], expected, atol=2e-5)


@functools.cache
def five_beams(pad_prompt: int = 0) -> beam.Beams:
    prompts, lengths = prompts_of(4, 8)
    prompts = jnp.pad(prompts, ((0, 0), (0, pad_prompt)), constant_values=17)
    return search(
        params_of(), TINY, prompts, lengths, beams=5, new_tokens=12, stop=jnp.array((15, 46)), length_penalty=0.6
    )


def test_scores_are_those_of_the_full_forward():
    """Each hypothesis keeps the cache of its own ancestors; none comes twice, the best comes first."""
    prompts, lengths = prompts_of(4, 8)
    out = five_beams()
    assert out.ended_BC.any() and not out.ended_BC.all()
    assert (jnp.diff(out.score_BC, axis=1) <= 0).all()
    for c in range(5):
        answers = decode.Answers(
            out.tokens_BCA[:, c], jnp.zeros(out.tokens_BCA[:, c].shape), out.length_BC[:, c], out.ended_BC[:, c]
        )
        rows, _ = decode.join(prompts, lengths, answers)
        logp, _ = score(params_of(), TINY, rows)
        total = jnp.where(rows.mask_BT, logp, 0.0).sum(axis=1)
        np.testing.assert_allclose(out.score_BC[:, c], total / out.length_BC[:, c] ** 0.6, atol=2e-5)
    for b in range(4):
        assert len({tuple(row) for row in out.tokens_BCA[b].tolist()}) == 5


def test_more_beams_find_a_better_answer():
    """With greedy's mistakes in reach: on these prompts never worse, and better somewhere."""
    params, (prompts, lengths) = params_of(), prompts_of(8, 7)
    best = {
        beams: search(params, TINY, prompts, lengths, beams=beams, new_tokens=12, stop=jnp.array(NEVER)).score_BC[:, 0]
        for beams in (1, 8)
    }
    assert (best[8] >= best[1] - 1e-5).all() and (best[8] > best[1] + 0.1).any()


def by_the_rule(logp_of, beams: int, stop: int) -> list[tuple[tuple[int, ...], float]]:
    """Beam search again, in plain Python: `logp_of` gives the log-probabilities of the token after an answer."""
    done: dict[tuple[int, ...], float] = {}
    live: dict[tuple[int, ...], float] = {(): 0.0}
    for _ in range(A):
        longer = {(*answer, v): total + x for answer, total in live.items() for v, x in enumerate(logp_of(answer))}
        kept = sorted(longer.items(), key=lambda item: -item[1])[: beams - len(done)]
        done |= {answer: total for answer, total in kept if answer[-1] == stop}
        live = {answer: total for answer, total in kept if answer[-1] != stop}
    return sorted((done | live).items(), key=lambda item: -item[1])


def test_a_finished_hypothesis_keeps_its_place():
    """The same answers as by the rule, over the full forward; whichever token stops."""
    params, (prompts, lengths) = params_of(FEW, seed=3, scale=9.0), few_prompts()  # living ones overtake here
    for b, n in enumerate(lengths.tolist()):

        @functools.cache
        def logp_of(answer: tuple[int, ...], b: int = b, n: int = n) -> list[float]:
            row = [*prompts[b, :n].tolist(), *answer]
            h = hidden(params, FEW, jnp.array([row + [0] * (FEW.block - len(row))]))[0, len(row) - 1]
            return jax.nn.log_softmax(model.unembed(params, h)).tolist()

        for beams, stop in itertools.product((2, 3), range(FEW.vocab)):
            out = search(params, FEW, prompts, lengths, beams=beams, new_tokens=A, stop=jnp.array((stop, stop)))
            expected = by_the_rule(logp_of, beams, stop)
            sizes = out.length_BC[b].tolist()
            found = [tuple(row[:size]) for row, size in zip(out.tokens_BCA[b].tolist(), sizes, strict=True)]
            assert found == [answer for answer, _ in expected]
            np.testing.assert_allclose(out.score_BC[b], [total for _, total in expected], atol=5e-5)


def test_padding_of_the_prompt_and_other_rows_change_nothing():
    a, b = five_beams(), five_beams(9)
    np.testing.assert_array_equal(a.tokens_BCA, b.tokens_BCA)
    np.testing.assert_allclose(a.score_BC, b.score_BC, atol=2e-5)
    prompts, lengths = prompts_of(4, 8)
    others = search(
        params_of(), TINY, prompts.at[:2].set(9), lengths.at[3].set(2), beams=5, new_tokens=12,
        stop=jnp.array((15, 46)), length_penalty=0.6,
    )  # fmt: skip
    np.testing.assert_array_equal(others.tokens_BCA[2], a.tokens_BCA[2])


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"beams": 0}, "beams is 0; ask for at least 1"),
        ({"new_tokens": 45}, "don't fit the model's block of 48"),
        ({"new_tokens": 0}, "new_tokens is 0; ask for at least 1"),
    ],
)
def test_mistakes_are_named(settings, complaint):
    with pytest.raises(UserError, match=complaint):
        beam.beam_search(params_of(), TINY, *prompts_of(2, 4), **{"beams": 2, "new_tokens": 4, "stop": 5, **settings})


def test_one_new_token_gives_the_most_probable_ones():
    params, (prompts, lengths) = params_of(), prompts_of(2, 8)
    out = search(params, TINY, prompts, lengths, beams=4, new_tokens=1, stop=jnp.array(NEVER))
    h = hidden(params, TINY, prompts)[jnp.arange(2), lengths - 1]
    logp, tokens = jax.lax.top_k(jax.nn.log_softmax(model.unembed(params, h)), 4)
    np.testing.assert_array_equal(out.tokens_BCA[:, :, 0], tokens)
    np.testing.assert_allclose(out.score_BC, logp, atol=1e-5)
