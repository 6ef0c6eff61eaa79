"""Logit filters against exact distributions, and edge cases."""

import functools

import jax
import numpy as np
import pytest

from jaxgpt.decoding import sampling
from jaxgpt.errors import UserError

P = np.array([0.4, 0.3, 0.15, 0.1, 0.05])
LOGITS = np.log(P).astype(np.float32)
IMPOSSIBLE = np.array([0, 0, 0, 0, -np.inf], np.float32)
SEEN = np.array([1, 0, 0, 0, 1], bool)
FILTERS = {  # the filter, the logits, and the resulting distribution
    "top-k 1": (lambda x: sampling.top_k(x, 1), LOGITS, [1, 0, 0, 0, 0]),
    "top-k 2": (lambda x: sampling.top_k(x, 2), LOGITS, [4 / 7, 3 / 7, 0, 0, 0]),
    "top-k 9": (lambda x: sampling.top_k(x, 9), LOGITS, P),
    "top-p 0": (lambda x: sampling.top_p(x, 0.0), LOGITS, [1, 0, 0, 0, 0]),
    "top-p 0, traced": (lambda x: nucleus(x, np.float32(0)), LOGITS, [1, 0, 0, 0, 0]),
    "top-p 0 of ties": (lambda x: sampling.top_p(x, 0), IMPOSSIBLE, [0.25, 0.25, 0.25, 0.25, 0]),
    "top-k 5": (lambda x: sampling.top_k(x, 5), LOGITS, P),
    "top-p 1e-6": (lambda x: sampling.top_p(x, 1e-6), LOGITS, [1, 0, 0, 0, 0]),
    "top-p 0.65": (lambda x: sampling.top_p(x, 0.65), LOGITS, [4 / 7, 3 / 7, 0, 0, 0]),
    "top-p 1": (lambda x: sampling.top_p(x, 1.0), LOGITS, P),
    "temperature 0.5": (lambda x: sampling.temperature(x, 0.5), LOGITS, P**2 / (P**2).sum()),
    "min-p 0": (lambda x: sampling.min_p(x, 0.0), LOGITS, P),
    "min-p 0.3": (lambda x: sampling.min_p(x, 0.3), LOGITS, [8 / 17, 6 / 17, 3 / 17, 0, 0]),  # 0.3 * 0.4 = 0.12
    "min-p 1": (lambda x: sampling.min_p(x, 1.0), LOGITS, [1, 0, 0, 0, 0]),
    "repetition 2": (  # 0.4 -> 0.4**2 and 0.05 -> 0.05**2: logits below 0 are multiplied
        lambda x: sampling.repetition_penalty(x, SEEN, 2.0),
        LOGITS,
        np.array([0.16, 0.3, 0.15, 0.1, 0.0025]) / 0.7125,
    ),
    "top-k of ties": (lambda x: sampling.top_k(x, 2), IMPOSSIBLE, [0.25, 0.25, 0.25, 0.25, 0]),
    "temperature, top-k, top-p": (
        lambda x: sampling.top_p(sampling.top_k(x / 0.5, 3), 0.8),
        LOGITS,
        [0.64, 0.36, 0, 0, 0],
    ),
}
nucleus = jax.jit(sampling.top_p)


@jax.jit
def draw(key, logits):
    return sampling.categorical(sampling.answer_keys(key, np.arange(len(logits))), logits)


@functools.cache
def filtered() -> dict[str, np.ndarray]:
    apply = jax.jit(lambda logits: {name: f(logits[name]) for name, (f, *_) in FILTERS.items()})
    return jax.device_get(apply({name: logits for name, (_, logits, _) in FILTERS.items()}))


@pytest.mark.parametrize("name", FILTERS)
def test_filters_give_the_exact_distribution(name):
    logits, expected = filtered()[name].astype(np.float64), np.array(FILTERS[name][2], float)
    likely = np.exp(logits - logits.max())
    np.testing.assert_allclose(likely / likely.sum(), expected, atol=1e-6)
    counts = np.bincount(draw(jax.random.key(0), np.tile(filtered()[name], (8000, 1))), minlength=5)
    assert (counts[expected == 0] == 0).all()
    chi2 = ((counts - 8000 * expected) ** 2 / np.maximum(8000 * expected, 1)).sum()
    assert chi2 < 25


def test_what_changes_nothing_returns_the_logits_themselves():
    for name in ("top-k 9", "top-p 1", "min-p 0"):
        np.testing.assert_array_equal(filtered()[name], LOGITS, err_msg=name)


def test_greedy_takes_the_largest(strict):
    assert jax.jit(sampling.greedy)(jax.random.key(0), LOGITS[None, ::-1])[0] == 4


@pytest.mark.parametrize(
    "call",
    [
        lambda: sampling.top_k(LOGITS, 0),
        lambda: sampling.top_p(LOGITS, -0.1),
        lambda: sampling.top_p(LOGITS, 1.5),
        lambda: sampling.temperature(LOGITS, 0.0),
    ],
)
def test_senseless_settings_are_refused(call):
    with pytest.raises(UserError):
        call()


@pytest.mark.parametrize("p", [1e-6, 0.1, 0.5, 0.9, 0.999])
def test_the_nucleus_found_without_a_sort_is_that_of_a_sort(p):
    logits = (np.random.default_rng(1).normal(size=(20, 333)) * 3).astype(np.float32)
    logits[0] = logits[0].round()  # ties
    kept = np.asarray(nucleus(logits, p)) > -1e20
    for row, found in zip(logits.astype(np.float64), kept, strict=True):
        order = np.argsort(-row, kind="stable")
        probability = np.exp(row - row.max()) / np.exp(row - row.max()).sum()
        before = np.cumsum(probability[order]) - probability[order]
        unsure = np.abs(before - p) < 1e-6  # float32 may or may not keep the token that just reaches p
        for wanted in (row >= row[order][(before < p) & ~unsure].min(), row >= row[order][(before < p) | unsure].min()):
            if (found == wanted).all():
                break
        else:
            raise AssertionError((found, wanted))


def test_the_threshold_is_that_of_a_sort_however_many_bits_a_pass_finds():
    """8 passes, which GPUs and TPUs make, and 32, which a CPU makes: with ties, zeros of both signs, and -inf."""
    logits = (np.random.default_rng(3).normal(size=(6, 97)) * 3).astype(np.float32)
    logits[0], logits[1, ::2], logits[2, ::3], logits[3, :90] = logits[0].round(), -0.0, 0.0, -np.inf
    for k in (1, 2, 40, 96):
        expected = np.sort(logits, axis=-1)[:, [-k]]
        for bits in (1, 4):
            found = jax.jit(sampling._threshold, static_argnums=3)(logits, np.ones(logits.shape, np.int32), k, bits)
            np.testing.assert_array_equal(found, expected)


def test_a_repetition_penalty_lowers_what_was_seen():
    logits, seen = np.array([2.0, -2.0, 2.0, -2.0], np.float32), np.array([True, True, False, False])
    penalised = jax.jit(sampling.repetition_penalty, static_argnums=2)
    np.testing.assert_allclose(penalised(logits, seen, 2.0), [1.0, -4.0, 2.0, -2.0])
    np.testing.assert_array_equal(penalised(logits, seen, 1.0), logits)
    with pytest.raises(UserError, match="repetition penalty is 0"):
        sampling.repetition_penalty(logits, seen, 0.0)


def test_filters_compose_and_never_leave_nothing():
    logits = (np.random.default_rng(2).normal(size=(50, 100)) * 5).astype(np.float32)
    strict = jax.jit(lambda x: sampling.top_p(sampling.top_k(sampling.min_p(x, 0.9), 5), 0.01))
    kept = np.asarray(strict(logits)) > -1e20
    assert (kept.sum(axis=1) >= 1).all()
    np.testing.assert_array_equal(kept.argmax(axis=1), logits.argmax(axis=1))


def test_impossible_tokens_are_never_drawn_and_a_row_of_them_gives_the_first():
    logits = np.full((501, 40), -np.inf, np.float32)
    logits[:500, [3, 39]] = 0.0
    drawn = np.asarray(draw(jax.random.key(0), logits))
    assert set(drawn[:500].tolist()) == {3, 39} and drawn[500] == 0
    assert jax.jit(sampling.greedy)(jax.random.key(0), logits)[500] == 0


def test_a_draw_depends_on_its_rows_number_its_tokens_and_the_key_alone():
    """Not on how many rows there are, nor on which token the other rows have come to; and no two draws share a key."""

    @functools.partial(jax.jit, static_argnums=1)
    def key_data(key, rows, t):
        return jax.random.key_data(sampling.token_keys(sampling.answer_keys(key, np.arange(rows)), t))

    few, many = (np.stack([key_data(jax.random.key(3), rows, t) for t in range(3)]) for rows in (2, 5))
    np.testing.assert_array_equal(many[:, :2], few)
    assert len({tuple(x) for x in many.reshape(15, -1).tolist()}) == 15
    t_B = np.array([2, 0, 1, 1, 2])
    np.testing.assert_array_equal(key_data(jax.random.key(3), 5, t_B), many[t_B, np.arange(5)])
