"""Beam search between its two extremes: one beam is greedy decoding, a beam per answer is exhaustive search."""

import dataclasses
import functools
import itertools

import jax
import numpy as np
import pytest

from jaxgpt.config import ModelConfig
from jaxgpt.decoding import beam
from jaxgpt.errors import UserError
from jaxgpt.models import transformer
from tests.helpers import TINY, random_params

FEW = ModelConfig(layers=2, width=16, heads=2, block=12, vocab=4)
A = 3  # tokens of an answer of FEW
ONE = dataclasses.replace(TINY, layers=1)
ROWS, P, LONG = 8, 8, 12  # prompts of ONE, and the tokens of its answers
NEVER, STOPS = (-1, -1), (14, 37)
search = jax.jit(beam.beam_search, static_argnums=1, static_argnames=("beams", "new_tokens", "pad"))


@functools.partial(jax.jit, static_argnums=1)
def log_probs(params, config, tokens):
    """Log-probabilities of the token after each position, by the full forward pass."""
    return jax.nn.log_softmax(transformer.unembed(params, transformer.hidden(params, config, tokens)))


# ---- few answers: all of them ----


def few_prompts(width: int = 4) -> tuple[np.ndarray, np.ndarray]:
    prompts = np.array([[1, 2, 3, 1], [3, 0, 0, 0], [2, 2, 0, 0]], np.int32)
    return np.pad(prompts, ((0, 0), (0, width - 4)), constant_values=2), np.array([4, 1, 2], np.int32)


@functools.cache
def after_each_answer(seed: int) -> list[dict[tuple[int, ...], np.ndarray]]:
    """For each prompt, the log-probabilities of the token after every answer of fewer than A tokens."""
    prompts, lengths = few_prompts()
    answers = np.array(list(itertools.product(range(FEW.vocab), repeat=A)))
    found = []
    for prompt, n in zip(prompts, lengths, strict=True):
        rows = np.concatenate(
            [np.tile(prompt[:n], (len(answers), 1)), answers, np.zeros((len(answers), 4 - n))], axis=1
        )
        logp = np.asarray(log_probs(few_params(seed), FEW, rows.astype(np.int32)), np.float64)
        found.append({tuple(row[:t]): logp[i, n - 1 + t] for i, row in enumerate(answers.tolist()) for t in range(A)})
    return found


def few_params(seed: int):
    return random_params(FEW, seed, scale=20.0)


def exhaustive(after: dict[tuple[int, ...], np.ndarray], stop: tuple[int, int]) -> dict[tuple[int, ...], float]:
    """The log-probability of every answer."""
    found = {}
    for row in itertools.product(range(FEW.vocab), repeat=A):
        size = next((t + 1 for t in range(A) if row[t] in stop), A)
        found[row[:size]] = sum(after[row[:t]][row[t]] for t in range(size))
    return found


@pytest.mark.parametrize("stop", [NEVER, (1, 1), (2, 0)])
@pytest.mark.parametrize("length_penalty", [0.0, 0.7, 1.0, 3.0])
def test_beams_for_all_answers_are_exhaustive_search(stop, length_penalty):
    """All answers, in the right order; unused places are marked."""
    out = jax.device_get(
        search(
            few_params(0),
            FEW,
            *few_prompts(),
            beams=70,
            new_tokens=A,
            stop=np.array(stop),
            pad=3,
            length_penalty=length_penalty,
        )
    )
    for b, after in enumerate(after_each_answer(0)):
        scores = {answer: logp / len(answer) ** length_penalty for answer, logp in exhaustive(after, stop).items()}
        real = len(scores)
        np.testing.assert_allclose(out.score_BC[b, :real], sorted(scores.values(), reverse=True), atol=1e-5)
        assert (out.score_BC[b, real:] == -np.inf).all() and (out.length_BC[b, real:] == 0).all()
        assert not out.ended_BC[b, real:].any()
        seen = set()
        for c in range(real):
            n = int(out.length_BC[b, c])
            answer = tuple(out.tokens_BCA[b, c, :n].tolist())
            np.testing.assert_allclose(out.score_BC[b, c], scores[answer], atol=1e-5)
            assert out.ended_BC[b, c] == (answer[-1] in stop)
            assert (out.tokens_BCA[b, c, n:] == 3).all()
            seen.add(answer)
        assert seen == set(scores)


def by_the_rule(after, beams: int, stop: int) -> list[tuple[tuple[int, ...], float]]:
    """A reference implementation of beam search in plain Python."""
    done: dict[tuple[int, ...], float] = {}
    live: dict[tuple[int, ...], float] = {(): 0.0}
    for _ in range(A):
        longer = {(*answer, v): total + x for answer, total in live.items() for v, x in enumerate(after[answer])}
        kept = sorted(longer.items(), key=lambda item: -item[1])[: beams - len(done)]
        done |= {answer: total for answer, total in kept if answer[-1] == stop}
        live = {answer: total for answer, total in kept if answer[-1] != stop}
    return sorted((done | live).items(), key=lambda item: -item[1])


@pytest.mark.parametrize(("beams", "width"), [(2, 4), (3, 7)])
def test_a_finished_hypothesis_keeps_its_place(beams, width):
    """The same answers as the reference with full forward passes, whichever token stops, however wide the prompts."""
    for stop in range(FEW.vocab):
        settings = {"beams": beams, "new_tokens": A, "stop": np.array((stop, stop))}
        out = jax.device_get(search(few_params(3), FEW, *few_prompts(width), **settings))
        for b, after in enumerate(after_each_answer(3)):
            expected = by_the_rule(after, beams, stop)
            sizes = out.length_BC[b]
            found = [tuple(row[:size]) for row, size in zip(out.tokens_BCA[b].tolist(), sizes, strict=True)]
            assert found == [answer for answer, _ in expected], f"stop {stop}, row {b}"
            np.testing.assert_allclose(out.score_BC[b], [total for _, total in expected], atol=5e-5)


def test_one_new_token_gives_the_most_probable_ones():
    out = jax.device_get(search(few_params(0), FEW, *few_prompts(), beams=3, new_tokens=1, stop=np.array(NEVER)))
    for b, after in enumerate(after_each_answer(0)):
        best = np.argsort(-after[()])[:3]
        np.testing.assert_array_equal(out.tokens_BCA[b, :, 0], best)
        np.testing.assert_allclose(out.score_BC[b], after[()][best], atol=1e-5)


# ---- longer answers ----


def prompts_of(pad_with: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Ragged prompts, padded on the right, and their lengths."""
    lengths = np.array([P, 3, 5, 2, 7, P, 4, 6], np.int32)
    tokens = np.random.default_rng(0).integers(6, 64, (ROWS, P))
    return np.where(np.arange(P) < lengths[:, None], tokens, pad_with).astype(np.int32), lengths


def params_of_one():
    return random_params(ONE, seed=2, scale=8.0)


@functools.cache
def found(beams: int, stop: tuple[int, int] = STOPS, length_penalty: float = 0.6, pad_with: int = 0) -> beam.Beams:
    settings = {"beams": beams, "new_tokens": LONG, "stop": np.array(stop), "length_penalty": length_penalty}
    return jax.device_get(search(params_of_one(), ONE, *prompts_of(pad_with), **settings))


def full_forward(out: beam.Beams, c: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Log-probabilities before each token of the c-th answers [B, A, V], those of the tokens, and which are real."""
    prompts, lengths = prompts_of()
    rows = np.zeros((ROWS, P + LONG), np.int32)
    for b, (prompt, n) in enumerate(zip(prompts, lengths, strict=True)):
        rows[b, : n + LONG] = [*prompt[:n], *out.tokens_BCA[b, c]]
    logp = np.asarray(log_probs(params_of_one(), ONE, rows))
    before = np.stack([logp[b, n - 1 : n - 1 + LONG] for b, n in enumerate(lengths)])
    chosen = np.take_along_axis(before, out.tokens_BCA[:, c, :, None], axis=2)[..., 0]
    return before, chosen, np.arange(LONG) < out.length_BC[:, c, None]


@pytest.mark.parametrize("length_penalty", [0.0, 1.0])
@pytest.mark.parametrize("stop", [NEVER, STOPS])
def test_one_beam_is_greedy_decoding(length_penalty, stop):
    """Each token is the most probable one, up to the first stop."""
    out = found(1, stop, length_penalty)
    before, chosen, real = full_forward(out, 0)
    assert (before.argmax(axis=2) == out.tokens_BCA[:, 0])[real].all()
    assert set(out.ended_BC[:, 0].tolist()) == ({False} if stop == NEVER else {False, True})
    for row, n, ended in zip(out.tokens_BCA[:, 0].tolist(), out.length_BC[:, 0], out.ended_BC[:, 0], strict=True):
        assert (row[n - 1] in stop) == ended and (ended or n == LONG)
        assert not set(row[: n - 1]) & set(stop) and not any(row[n:])
    expected = np.where(real, chosen, 0.0).sum(axis=1) / out.length_BC[:, 0] ** length_penalty
    np.testing.assert_allclose(out.score_BC[:, 0], expected, atol=2e-5)


def test_scores_are_those_of_the_full_forward():
    """Each hypothesis keeps the cache of its own ancestors; there are no duplicates, and the best comes first."""
    out = found(5)
    assert out.ended_BC.any() and not out.ended_BC.all()
    assert (np.diff(out.score_BC, axis=1) <= 0).all()
    for c in range(5):
        _, chosen, real = full_forward(out, c)
        expected = np.where(real, chosen, 0.0).sum(axis=1) / out.length_BC[:, c] ** 0.6
        np.testing.assert_allclose(out.score_BC[:, c], expected, atol=2e-5, err_msg=f"place {c}")
    for b in range(ROWS):
        assert len({tuple(row) for row in out.tokens_BCA[b].tolist()}) == 5


def test_more_beams_find_a_better_answer():
    """Where greedy decoding makes mistakes: on these prompts never worse, and better for at least one."""
    one, five = (found(beams, NEVER, 0.0).score_BC[:, 0] for beams in (1, 5))
    assert (five >= one - 1e-5).all() and (five > one + 0.1).any()


def test_padding_of_the_prompt_and_other_rows_change_nothing():
    a, b = found(5), found(5, pad_with=17)
    np.testing.assert_array_equal(a.tokens_BCA, b.tokens_BCA)
    np.testing.assert_allclose(a.score_BC, b.score_BC, atol=2e-5)
    prompts, lengths = prompts_of()
    prompts[:2], lengths[3] = 9, 1
    others = search(
        params_of_one(), ONE, prompts, lengths, beams=5, new_tokens=LONG, stop=np.array(STOPS), length_penalty=0.6
    )
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
        beam.beam_search({}, ONE, *prompts_of(), **{"beams": 2, "new_tokens": 4, "stop": 5, **settings})
