"""Losses against values computed by hand. tests/losses/test_proofs.py compares each with a float64 reference."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import softmax

from jaxgpt import losses
from jaxgpt.losses import kl, reduce, vocab_head

LOG2 = np.log(2)


def run(f, *args):
    """f's result in NumPy. Jitted, since an eager call would compile each primitive separately."""
    return jax.tree.map(np.asarray, jax.jit(f)(*args))


def agree(found, expected, rtol=1e-6, atol=0.0):
    """Compare two dicts; the first entry that differs is named."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], np.broadcast_to(value, found[name].shape), rtol, atol, err_msg=name)


def scores_of(B: int = 5, C: int = 4, seed: int = 0):
    return np.random.default_rng(seed).normal(0, 2, (B, C)).astype(np.float32)


# ---- means


def test_reduce_counts_the_mask_and_gives_zero_for_an_empty_one(strict):
    f = jax.jit(jax.value_and_grad(lambda x, mask: reduce(x, mask).value))
    values = np.array([1.0, np.nan, 3.0], np.float32)
    assert float(f(values, np.array([True, False, True]))[0]) == 2.0
    value, slope = f(values, np.zeros(3, bool))
    assert float(value) == 0.0
    np.testing.assert_array_equal(slope, 0.0)


def test_sums_do_not_stop_counting_in_bfloat16():
    """1,001 tokens of one nat each are 1,001 nats; bfloat16 can represent only 1,000 and 1,008."""
    found = run(
        lambda x, mask: (losses.sequence_sum(x, mask)[0], reduce(x, mask).sum, reduce(x).sum),
        np.ones((1, 1001), jnp.bfloat16),
        np.ones((1, 1001), bool),
    )
    assert [float(x) for x in found] == [1001] * 3  # NumPy would round 1,001 to bfloat16 before comparing


def test_losses_add():
    a, b, mask = np.array([1.0, 2.0, 9.0]), np.array([10.0, 20.0, 9.0]), np.array([True, True, False])
    total, metrics = run(lambda a, b, mask: losses.combine({"a": a, "b": b}, mask, {"b": 0.5}), a, b, mask)
    assert (total.sum, total.count) == (2 * 1.5 + 2 * 7.5, 2)
    assert (metrics["a"].sum, metrics["b"].sum) == (2 * 1.5, 2 * 15.0) and metrics["a"].count == 2
    with pytest.raises(ValueError, match=r"weights for \['c'\], but the terms are \['a', 'b'\]"):
        losses.combine({"a": a, "b": b}, mask, {"c": 1.0})


def test_three_ways_to_reduce_answers_of_different_length():
    """And an answer without tokens, which counts as 0 unless it is left out."""

    def f(values, mask):
        means, sums, real = losses.sequence_mean(values, mask), losses.sequence_sum(values, mask), mask.any(axis=1)
        return {
            "tokens alike": reduce(values, mask).value,
            "answers alike": reduce(means, real).value,
            "answers alike, with the empty one": reduce(means).value,
            "a constant length": reduce(sums / 4, real).value,
            "a constant length, with the empty one": reduce(sums / 4).value,
        }

    values = np.array([[3.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0], [9.0, 9.0, 9.0, 9.0]])
    mask = np.arange(4) < np.array([[1], [4], [0]])
    expected = {"tokens alike": 7 / 5, "answers alike": 2, "answers alike, with the empty one": 4 / 3}
    expected |= {"a constant length": 7 / 8, "a constant length, with the empty one": 7 / 12}
    agree(run(f, values, mask), expected)


# ---- tokens


def test_token_losses_by_hand():
    """Probabilities of 1/2, 1/4 and 1/4, and the second token. A constant offset matters only for log Z."""

    def f(logits, token):
        return {
            "log_prob": losses.log_prob(logits, token),
            "nll": losses.nll(logits, token),
            "z_loss": losses.z_loss(logits),
            "entropy": losses.entropy(logits),
            "label_smoothing": losses.label_smoothing(logits, token, 0.3),
            "label_smoothing of 0": losses.label_smoothing(logits, token, 0.0),
        }

    expected = {
        "log_prob": -2 * LOG2,
        "nll": 2 * LOG2,
        "z_loss": 49.0,
        "entropy": 1.5 * LOG2,
        # 0.7 of the NLL, and 0.3 of the mean of log 2, 2 log 2, 2 log 2
        "label_smoothing": (0.7 * 2 + 0.3 * 5 / 3) * LOG2,
        "label_smoothing of 0": 2 * LOG2,
    }
    agree(run(f, np.log([0.5, 0.25, 0.25]) + 7.0, np.array(1)), expected)


def test_a_token_of_probability_zero_adds_nothing():
    """Logits of -inf, as some samplers and padded vocabularies have them: 0 log 0 is 0, in values and gradients."""
    with np.errstate(divide="ignore"):
        logits, ref = np.log([0.5, 0.5, 0]) + 3, np.log([[0.25, 0.5, 0.25], [0.25, 0.75, 0], [0, 0.5, 0.5]])

    def f(x, ref, token):
        head = vocab_head.tiled_head_outputs(jnp.ones((1, 1)), x[:, None], token[None])
        return {
            "entropy": losses.entropy(x),
            "head": head.entropy[0],
            "label_smoothing": losses.label_smoothing(x, token, 0.0),
            "votes": losses.soft_preference_nll(x[None], jnp.array([[0.5, 0.5, 0.0]]))[0],
            "kl": kl.exact(jnp.broadcast_to(x, ref.shape), ref),
        }

    def finite(x, ref, token):
        found = f(x, ref[:2], token)
        return sum(leaf.sum() for leaf in jax.tree.leaves(found)), f(x, ref, token)

    slopes, found = run(jax.grad(finite, (0, 1), has_aux=True), logits, ref, np.array(1))
    far = [0.5 * LOG2, 0.5 * LOG2 + 0.5 * np.log(2 / 3), np.inf]  # rho = 0 < pi is infinitely far
    agree(found, {**dict.fromkeys(found, LOG2), "kl": far}, rtol=1e-6)
    assert all(np.isfinite(slope).all() for slope in slopes)
    assert np.isposinf(run(lambda x: losses.label_smoothing(x, np.array(1), 0.1), logits))


def test_log_prob_gradient_is_one_hot_minus_softmax():
    logits, tokens = scores_of(5, 7), np.array([0, 3, 6, 2, 2])
    slope = run(jax.grad(lambda x, tokens: losses.log_prob(x, tokens).sum()), logits, tokens)
    np.testing.assert_allclose(slope, np.eye(7)[tokens] - softmax(logits, axis=1), atol=1e-6)


def test_log_prob_has_the_same_bits_with_and_without_a_gradient():
    def both(x, tokens):
        logp = losses.log_prob(x, tokens)
        return logp.sum(), logp

    rng = np.random.default_rng(0)
    logits, tokens = rng.normal(0, 5, (4, 50, 300)), rng.integers(0, 300, (4, 50))
    _, differentiated = run(jax.grad(both, has_aux=True), logits, tokens)
    np.testing.assert_array_equal(run(losses.log_prob, logits, tokens), differentiated)


# ---- preferences


def test_preference_nll_refuses_whole_number_scores():
    with pytest.raises(TypeError, match=r"`scores` is int32\[2, 3\]; expected float \[B, C\]"):
        losses.preference_nll(np.ones((2, 3), np.int32), np.array([0, 1]))


def test_preferences_by_hand():
    """Worths of 4, 2 and 1."""
    tie = (np.log(0.5),)  # a tie is worth half the root of the product

    def f(scores, choice, margin, two, rank, tied, pairs, votes):
        def rows(like):
            return jnp.broadcast_to(scores, like.shape)

        return {
            "favourite": losses.preference_nll(scores, choice),
            "with a margin": losses.preference_nll(scores, choice, margin_B=margin),
            "two that tie": losses.favourites_nll(scores, two, log_tie=tie),
            "rankings": losses.plackett_luce_nll(rows(rank), rank),
            "a ranking that ties": losses.plackett_luce_nll(scores, tied, log_tie=tie),
            "pairs": losses.all_pairs_nll(rows(pairs), pairs),
            "votes": losses.soft_preference_nll(scores, votes),
            "a pair": losses.bradley_terry_nll(scores[0, 0], scores[0, 1]),
        }

    log = np.log
    ties = 0.5 * (8**0.5 + 4**0.5 + 2**0.5)  # of 4 and 2, 4 and 1, 2 and 1
    of_pairs = [log(1 + 2 / 4), log(1 + 1 / 4), log(1 + 1 / 2)]
    expected = {
        "favourite": -log(2 / 7),
        "with a margin": -log(1 / 6),  # lowering the second's score by log 2 halves its worth: 1 of 4 + 1 + 1
        "two that tie": -log(0.5 * 8**0.5 / (7 + ties)),
        "rankings": -log([4 / 7 * 2 / 3, 1 / 7 * 2 / 6, 4 / 7]),
        "a ranking that ties": -log(0.5 * 8**0.5 / (7 + ties)),  # the third is alone then
        "pairs": [np.mean(of_pairs), np.mean(of_pairs[1:])],
        "votes": -(0.5 * log(4 / 7) + 0.25 * log(2 / 7) + 0.25 * log(1 / 7)),
        "a pair": log(3 / 2),
    }
    found = run(
        f,
        log([[4.0, 2.0, 1.0]]),
        np.array([1]),
        log([2.0]),
        np.array([[True, True, False]]),
        np.array([[0, 1, 2], [2, 1, 0], [0, -1, -1]]),
        np.array([[0, 0, 2]]),
        np.array([[0, 1, 2], [0, 0, -1]]),
        np.array([[0.5, 0.25, 0.25]]),
    )
    agree(found, expected, rtol=1e-5)


def test_one_likelihood_a_favourite_is_a_ranking_of_one():
    def f(scores, choice, favourite, rank, never):
        return {
            "favourites": losses.favourites_nll(scores, favourite),
            "ranking": losses.plackett_luce_nll(scores, rank),
            "votes": losses.soft_preference_nll(scores, favourite.astype(jnp.float32)),
            "ties that never happen": losses.favourites_nll(scores, favourite, log_tie=(-50.0, -50.0)),
            "ties of no probability": losses.favourites_nll(scores, favourite, log_tie=(never, never)),
        }, losses.preference_nll(scores, choice)

    choice = np.array([0, 1, 2, 3, 0])
    favourite = choice[:, None] == np.arange(4)
    found, expected = run(f, scores_of(), choice, favourite, np.where(favourite, 0, -1), -np.inf)
    agree(found, dict.fromkeys(found, expected), rtol=2e-6)


def test_one_likelihood_two_answers():
    def f(scores, choice, rank, chosen, rejected, margin):
        return {
            "pair": losses.bradley_terry_nll(chosen, rejected),
            "favourite": losses.preference_nll(scores, choice),
            "ranking": losses.plackett_luce_nll(scores, rank),
            "all pairs": losses.all_pairs_nll(scores, rank),
            "Davidson": losses.favourites_nll(scores, rank == 0, log_tie=(-np.inf,)),
        }, {
            "pair": losses.bradley_terry_nll(chosen, rejected, margin),
            "favourite": losses.preference_nll(scores, choice, margin_B=margin),
        }

    scores, choice, margin = scores_of(C=2), np.array([0, 1, 1, 0, 1]), np.linspace(0, 1, 5)
    rank = (np.arange(2) != choice[:, None]).astype(int)
    chosen, rejected = scores[rank == 0], scores[rank == 1]
    plain, with_margin = run(f, scores, choice, rank, chosen, rejected, margin)
    agree(plain, dict.fromkeys(plain, np.log1p(np.exp(rejected - chosen))), rtol=1e-5)
    agree(with_margin, dict.fromkeys(with_margin, np.log1p(np.exp(rejected - chosen + margin))), rtol=1e-5)


def test_a_tied_pair_is_davidsons_model():
    a, b, nu = 2.0, 0.5, 1.7  # worths, and Davidson's nu
    outcome = np.array([[True, False], [False, True], [True, True]])
    found = run(
        lambda scores, outcome: losses.favourites_nll(scores, outcome, log_tie=(np.log(nu),)),
        np.log([[a, b]] * 3),
        outcome,
    )
    worths = np.array([a, b, nu * np.sqrt(a * b)])
    np.testing.assert_allclose(found, -np.log(worths / worths.sum()), rtol=1e-5)


def test_centering_doubt_and_agreement_by_hand():
    scores = np.array([[1.0, 2.0, -4.0], [1.0, 2.0, -4.0]])
    some = np.array([[True] * 3, [True, True, False]])
    np.testing.assert_array_equal(run(losses.reward_centering, scores, some), [1.0, 9.0])
    some = np.array([[True, True, True], [True, True, False], [False, True, False]])
    weight = run(lambda *x: losses.smooth_choice(*x, 0.2), np.array([0, 1, 1]), some)
    np.testing.assert_allclose(weight, [[0.8, 0.1, 0.1], [0.2, 0.8, 0], [0, 1, 0]], rtol=1e-6)
    # right, wrong, a three-way tie, and a row of padding that doesn't count
    scores = np.log([[1.0, 3.0, 1.0], [3.0, 1.0, 1.0], [5.0, 5.0, 5.0], [9.0, 9.0, 9.0]])
    present = np.array([[True, True, False]] * 2 + [[True] * 3, [False] * 3])
    mean, metrics = run(losses.preference_objective, scores, np.array([1, 1, 0, 0]), present)
    np.testing.assert_allclose(metrics["accuracy"].sum, 1 + 1 / 3, rtol=1e-6)
    np.testing.assert_allclose(mean.sum, -(np.log(3 / 4) + np.log(1 / 4) + np.log(1 / 3)), rtol=1e-6)
    assert mean.count == metrics["accuracy"].count == 3


def test_a_tie_of_all_is_one_more_outcome_and_as_frequent_as_asked_where_all_are_worth_the_same():
    """P(tie of all) and P(each is the favourite) by hand, where three and where two are present, and padding."""
    scores = np.log([[4.0, 2.0, 1.0], [4.0, 1.0, 9.0], [1.0, 1.0, 1.0], [9.0, 9.0, 9.0]])
    present = np.array([[True] * 3, [True, True, False], [True] * 3, [False] * 3])
    outcomes = np.array([losses.TIE, 0, 1])

    def every(scores, present):
        choose = lambda choice: jnp.where(present.any(1), choice, 0)  # noqa: E731
        nll = jax.vmap(lambda c: losses.preference_nll(scores, choose(c), present, tie_rate=0.2))(outcomes)
        mean, metrics = losses.preference_objective(scores, choose(outcomes[[0, 1, 0, 0]]), present, 0.2)
        plain, _ = losses.preference_objective(scores, choose(outcomes[[0, 1, 0, 0]]), present)
        return jnp.exp(-nll), mean, plain, metrics["accuracy"]

    p, mean, plain, accuracy = jax.jit(every)(scores.astype(np.float32), present)
    three, two = 7 + 0.75 * 8 ** (1 / 3), 5 + 0.5 * 2.0  # delta_3 = 3 / 4, delta_2 = 2 / 4: a fifth of the outcomes
    by_hand = [[0.75 * 2 / three, 4 / three, 2 / three], [1 / two, 4 / two, 1 / two], [0.2, 0.8 / 3, 0.8 / 3], [1] * 3]
    np.testing.assert_allclose(p.T, by_hand, rtol=1e-5)
    assert (mean.count, plain.count, accuracy.count) == (3, 1, 1), "a tie trains, and is in no accuracy"
    np.testing.assert_allclose(mean.sum, -np.log(p[[0, 1, 0], [0, 1, 2]]).sum(), rtol=1e-5)
    np.testing.assert_allclose((plain.sum, accuracy.sum), (-np.log(4 / 5), 1), rtol=1e-5)


def test_probabilities_of_all_outcomes_sum_to_one():
    """Over all sets of favourites, and all rankings. Those with more ties than log_tie allows have probability 0."""
    ties = np.array([[-np.inf] * 3, [0.3, -np.inf, -np.inf], [0.3, -0.5, -np.inf], [0.3, -0.5, 0.1]])
    sets = np.array([s for s in itertools.product([False, True], repeat=4) if any(s)])
    ranks = np.array([r for r in itertools.product(range(4), repeat=4) if set(r) == set(range(max(r) + 1))])
    together = [max(list(r).count(level) for level in r) for r in ranks]

    def f(log_tie, sets, ranks):
        def rows(like):
            return jnp.broadcast_to(scores_of(1, 4), like.shape)

        favourites = losses.favourites_nll(rows(sets), sets, log_tie=log_tie)
        return favourites, losses.plackett_luce_nll(rows(ranks), ranks, log_tie=log_tie)

    found_by_size = run(jax.vmap(f, in_axes=(0, None, None)), ties, sets, ranks)
    for size, *found in zip((1, 2, 3, 4), *found_by_size, strict=True):
        for nll, most in zip(found, (sets.sum(1), together), strict=True):
            np.testing.assert_allclose(np.exp(-nll).sum(), 1, rtol=1e-5, err_msg=f"ties of up to {size}")
            np.testing.assert_array_equal(np.isinf(nll), np.array(most) > size, err_msg=f"ties of up to {size}")


def test_a_partial_ranking_is_the_sum_over_the_whole_ones_it_leaves_open():
    rank = np.array([[0, 1, 2, 3], [0, 1, 3, 2], [0, 1, -1, -1]])
    *whole, part = np.exp(-run(losses.plackett_luce_nll, np.tile(scores_of(1, 4), (3, 1)), rank))
    np.testing.assert_allclose(part, sum(whole), rtol=1e-5)


def test_a_common_offset_costs_no_digits():
    """Scores or logits in eighths, and 8,192 added: only differences matter, and float32 represents both exactly."""

    @jax.jit
    def f(x, choice, favourite, rank, votes):
        return {
            "log_prob": losses.log_prob(x, choice),
            "nll": losses.nll(x, choice),
            "label_smoothing": losses.label_smoothing(x, choice, 0.1),
            "entropy": losses.entropy(x),
            "preference_nll": losses.preference_nll(x, choice),
            "favourites_nll": losses.favourites_nll(x, favourite),
            "plackett_luce_nll": losses.plackett_luce_nll(x, rank),
            "all_pairs_nll": losses.all_pairs_nll(x, rank),
            "soft_preference_nll": losses.soft_preference_nll(x, votes),
        }

    x, choice = np.round(8 * scores_of()) / 8, np.array([0, 1, 2, 3, 0])
    more = choice, choice[:, None] == np.arange(4), (choice[:, None] + np.arange(4)) % 4, softmax(x, axis=1)
    agree(f(x + 8192, *more), f(x, *more), rtol=1e-5, atol=1e-6)


# ---- direct alignment


def test_dpo_starts_at_the_log_of_the_number_of_outcomes():
    """Two, four and seven candidates, and the 24 rankings of four."""

    def f(logp, ref, choice, rank):
        found = {f"{C} candidates": losses.dpo(logp[:, :C], ref[:, :C], choice, 0.3) for C in (2, 4, 7)}
        h = losses.implicit_reward(logp[:, :4], ref[:, :4], beta=0.2)
        return found | {"rankings": losses.plackett_luce_nll(h, rank)}

    logp, rank = 10 * scores_of(3, 7), np.array([[0, 1, 2, 3], [3, 1, 0, 2], [2, 3, 1, 0]])
    expected = {f"{C} candidates": np.log(C) for C in (2, 4, 7)} | {"rankings": np.log(24)}
    agree(run(f, logp, logp, np.array([0, 1, 1]), rank), expected)


def test_dpo_of_two_is_equation_7_of_the_paper():
    def f(logp, ref, choice):
        return {
            "reward": losses.implicit_reward(logp, ref, 0.1),
            "dpo": losses.dpo(logp, ref, choice, 0.1),
            "cdpo": losses.cdpo(logp, ref, choice, 0.1, 0.2),
        }

    margin = 0.1 * ((-10 + 11) - (-12 + 11.5))
    right, wrong = np.log1p(np.exp([-margin, margin]))
    # conservative: one label in five is wrong
    expected = {"reward": [[0.1, -0.05]], "dpo": right, "cdpo": 0.8 * right + 0.2 * wrong}
    agree(run(f, np.array([[-10.0, -12.0]]), np.array([[-11.0, -11.5]]), np.array([0])), expected)


def test_conservative_dpo_has_its_minimum_where_it_should():
    """At P(choice) = 1 - eps; and with eps = 0 it is DPO."""

    def loss(logp, ref, choice, beta, epsilon):
        return losses.cdpo(logp, ref, choice, beta, epsilon).sum(), losses.dpo(logp, ref, choice, beta).sum()

    f = jax.jit(jax.value_and_grad(loss, has_aux=True))
    choice = np.array([0, 1, 0])
    (conservative, plain), _ = f(scores_of(3, 2, 1), scores_of(3, 2, 2), choice, 0.3, 0.0)
    assert float(conservative) == pytest.approx(float(plain), rel=1e-5)
    optimum = np.log(0.8 / 0.2) * (choice[:, None] == np.arange(2))
    _, slope = f(optimum, np.zeros((3, 2)), choice, 1.0, 0.2)
    np.testing.assert_allclose(slope, 0, atol=1e-6)


def test_direct_losses_by_hand():
    def f(one, zero, half, quarter, mismatched, mask, yes):
        return {
            "ipo": losses.ipo(one, zero, tau=0.25),
            "log_odds": losses.log_odds(quarter),
            "orpo": losses.orpo(half, quarter, weight=2.0),
            "simpo": losses.simpo(-one, -2 * one, beta=2.0, gamma=2.0),
            "kto, good": losses.kto(one, yes, 1.0, 0.5),
            "kto, bad": losses.kto(one, ~yes, 1.0, 0.5, undesirable_weight=3.0),
            "kto_reference": losses.kto_reference(mismatched, mask),
            "kto_reference, never below 0": losses.kto_reference(-mismatched[:2]),
        }

    expected = {
        "ipo": (1 - 2) ** 2,
        "log_odds": -np.log(3),
        "orpo": LOG2 + 2 * np.log(1 + 1 / 3),
        "simpo": LOG2,
        "kto, good": 0.5,
        "kto, bad": 1.5,
        "kto_reference": 3.0,
        "kto_reference, never below 0": 0.0,
    }
    odds = np.log(0.5), np.log(0.25)  # of 1, and of 1/3
    found = run(f, 1.0, 0.0, *odds, np.array([1.0, 5.0, -3.0]), np.array([True, True, False]), np.array(True))
    agree(found, expected, rtol=1e-5)


# ---- policy gradients


def test_clipped_losses_by_hand():
    ratio, advantage = np.array([1.5, 1.5, 0.5, 0.5]), np.array([1.0, -1.0, 1.0, -1.0])
    found = run(
        lambda logp, old, a: losses.ppo_clip(losses.log_ratio(logp, old), a, 0.2), np.log(ratio), 0 * ratio, advantage
    )
    np.testing.assert_allclose(found, [-1.2, 1.5, -0.5, 0.8], rtol=1e-6)
    two = np.array([2.0, 2.0])
    found = run(lambda *x: losses.value_clip(*x, clip=0.2), np.array([1.0, 1.0]), np.array([0.0, 0.9]), two)
    np.testing.assert_allclose(found, [0.5 * 1.8**2, 0.5 * 1.0], rtol=1e-6)


def test_ppo_at_ratio_one_is_the_policy_gradient():
    def both(x, old, advantage):
        ppo, reinforce = losses.ppo_clip(losses.log_ratio(x, old), advantage), losses.reinforce(x, advantage)
        return jnp.stack([ppo.sum(), reinforce.sum()])

    logp, advantage = scores_of(2, 6), scores_of(2, 6, seed=1)
    for slope in run(jax.jacrev(both), logp, logp, advantage):
        np.testing.assert_allclose(slope, -advantage, rtol=1e-6)


def test_reinforce_by_hand_and_no_gradient_into_the_advantage():
    value, slopes = run(jax.value_and_grad(losses.reinforce, (0, 1)), -2.0, 3.0)
    assert (value, slopes) == (6.0, (-3.0, 0.0))


def test_dual_clip_by_hand():
    def f(d, bad, good):
        value, back = jax.vjp(lambda x: losses.dual_clip(x, bad, clip=0.2, limit=3.0), d)
        return value, *back(jnp.ones_like(d)), losses.dual_clip(d, good), losses.ppo_clip(d, good)

    d = np.log([10.0, 2.0, 10.0, 0.5, 1e-3])
    value, slope, dual, plain = run(f, d, np.array([-1.0, -1.0, 1.0, 0.0, 2.0]), np.linspace(0.0, 2.0, 5))
    np.testing.assert_allclose(value, [3.0, 2.0, -1.2, 0.0, -2e-3], rtol=1e-5)
    np.testing.assert_allclose(slope, [0.0, 2.0, 0.0, 0.0, -2e-3], rtol=1e-5)
    np.testing.assert_array_equal(dual, plain)
    with pytest.raises(ValueError, match="dual_clip: limit is 1.3; it must be above the clip, 1.5"):
        losses.dual_clip(d, d, clip_high=0.5, limit=1.3)


def test_a_ratio_of_a_sequence_is_the_geometric_mean_of_its_tokens():
    logp, old = np.array([[-1.0, -2.0, 9.0], [-3.0, 9.0, 9.0]]), np.array([[-2.0, -5.0, 0.0], [-1.0, 0.0, 0.0]])
    mask = np.array([[True, True, False], [True, False, False]])
    found = run(lambda *x: (losses.sequence_log_ratio(*x), losses.log_ratio(*x[:2])), logp, old, mask)
    np.testing.assert_allclose(found[0], [2.0, -2.0])
    assert found[1][1, 0] == -2.0  # one token: the same


def test_log_ratios_are_clamped_and_the_clamp_is_counted():
    def f(logp, old, mask):
        d, back = jax.vjp(lambda x: losses.log_ratio(x, old), logp)
        return d, *back(jnp.ones_like(d)), losses.ratio_metrics(d, jnp.ones_like(d), mask)["clamp_fraction"]

    logp = np.array([[0.0, -1e4, 1e4, 19.0]])
    d, slope, clamped = run(f, logp, np.zeros((1, 4)), np.ones((1, 4), bool))
    np.testing.assert_array_equal(d, [[0.0, -20.0, 20.0, 19.0]])
    np.testing.assert_array_equal(slope, [[1.0, 0.0, 0.0, 1.0]])
    assert (clamped.sum, clamped.count) == (2, 4)


def test_ratio_metrics_by_hand():
    """Ratios 2, 1/2, 1 and 2 of good, good, good and bad tokens; a fifth isn't counted."""

    def f(*x):
        found, wide = losses.ratio_metrics(*x, clip=0.2), losses.ratio_metrics(*x, clip=0.2, clip_high=1.5)
        return {name: getattr(m, "value", m) for name, m in found.items()} | {"wide": wide["clip_fraction"].value}

    expected = {
        "approx_kl": 3 * LOG2**2 / 2 / 4,
        "clip_fraction": 0.25,  # a bad token that grew likelier, or a good one less: no clip
        "clamp_fraction": 0.0,
        "ratio_max": 2.0,
        "ratio_error_max": 1.0,
        "wide": 0.0,
    }
    advantage, mask = np.array([1.0, 1.0, 1.0, -1.0, 1.0]), np.array([True] * 4 + [False])
    agree(run(f, np.log([2.0, 0.5, 1.0, 2.0, 99.0]), advantage, mask), expected, rtol=1e-5)


def test_a_label_s_noise_is_as_precise_as_the_scores():
    """0.1 in float32 would put an error of 1e-9 into a float64 loss; float32 scores stay float32 all the same."""
    x, tenth = np.array([[0.3, -1.2, 0.5]]), 0.1
    logp = x - np.log(np.exp(x).sum())
    expected = -(0.9 * logp[0, 2] + 0.05 * (logp[0, 0] + logp[0, 1]))
    with jax.enable_x64(True):
        given = jnp.asarray(x), jnp.zeros((1, 3), jnp.float64), jnp.array([2])
        np.testing.assert_allclose(losses.cdpo(*given, 1.0, tenth)[0], expected, rtol=1e-14)
        single = losses.cdpo(given[0].astype(jnp.float32), jnp.zeros((1, 3), jnp.float32), given[2], 1.0, tenth)
        assert single.dtype == jnp.float32
