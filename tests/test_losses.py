"""Losses against values computed by hand and float64 references."""

import itertools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt import losses
from jaxgpt.losses import Mean, reduce


def test_reduce_counts_the_mask_and_gives_zero_for_an_empty_one(strict):
    values = jnp.array([1.0, jnp.nan, 3.0])
    assert float(reduce(values, jnp.array([True, False, True])).value) == 2.0
    assert float(reduce(values, jnp.zeros(3, bool)).value) == 0.0
    slope = jax.grad(lambda x: reduce(x, jnp.zeros(3, bool)).value)(jnp.ones(3))
    np.testing.assert_array_equal(slope, 0.0)


def test_means_pool_to_the_mean_of_the_whole():
    x, mask = jnp.arange(10.0), jnp.arange(10) % 3 != 0
    parts = [reduce(x[i : i + 2], mask[i : i + 2]) for i in range(0, 10, 2)]
    pooled = parts[0] + parts[1] + parts[2] + parts[3] + parts[4]
    assert isinstance(pooled, Mean)
    assert float(pooled.value) == pytest.approx(float(x[mask].mean()))


def test_log_prob_and_entropy_by_hand():
    logits = jnp.log(jnp.array([[0.5, 0.25, 0.25]])) + 7.0
    assert float(losses.log_prob(logits, jnp.array([1]))[0]) == pytest.approx(np.log(0.25), rel=1e-6)
    assert float(losses.entropy(logits)[0]) == pytest.approx(1.5 * np.log(2), rel=1e-6)


def test_log_prob_gradient_is_one_hot_minus_softmax():
    logits = jax.random.normal(jax.random.key(0), (5, 7))
    tokens = jnp.array([0, 3, 6, 2, 2])
    slope = jax.grad(lambda x: losses.log_prob(x, tokens).sum())(logits)
    np.testing.assert_allclose(slope, jax.nn.one_hot(tokens, 7) - jax.nn.softmax(logits), atol=1e-6)


def test_log_prob_has_the_same_bits_with_and_without_a_gradient():
    logits = 5 * jax.random.normal(jax.random.key(0), (4, 50, 300))
    tokens = jax.random.randint(jax.random.key(1), (4, 50), 0, 300)
    plain = jax.jit(losses.log_prob)(logits, tokens)
    _, differentiated = jax.jit(jax.grad(lambda x: (lambda y: (y.sum(), y))(losses.log_prob(x, tokens)), has_aux=True))(
        logits
    )
    np.testing.assert_array_equal(plain, differentiated)


def test_preference_nll_is_the_softmax_of_the_notes():
    scores = np.array([[0.3, -1.2, 2.0], [1.0, 1.0, 1.0]])
    expected = -np.log(np.exp([scores[0, 2], scores[1, 0]]) / np.exp(scores).sum(1))
    found = losses.preference_nll(jnp.asarray(scores, jnp.float32), jnp.array([2, 0]))
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_two_answers_are_bradley_terry_and_missing_ones_do_not_count():
    scores = jnp.array([[0.7, -0.4]])
    assert float(losses.preference_nll(scores, jnp.array([0]))[0]) == pytest.approx(np.log1p(np.exp(-1.1)), rel=1e-6)
    ragged = losses.preference_nll(jnp.array([[0.7, -0.4, 50.0]]), jnp.array([0]), jnp.array([[True, True, False]]))
    np.testing.assert_allclose(ragged, losses.preference_nll(scores, jnp.array([0])), rtol=1e-6)


def test_preference_nll_refuses_whole_number_scores():
    with pytest.raises(TypeError, match=r"`scores` is int32\[2, 3\]; expected float \[B, C\]"):
        losses.preference_nll(jnp.ones((2, 3), jnp.int32), jnp.array([0, 1]))


@pytest.mark.parametrize("candidates", [2, 4, 7])
def test_dpo_starts_at_log_b(candidates):
    logp = jax.random.normal(jax.random.key(0), (3, candidates)) * 20
    h = losses.implicit_reward(logp, logp, beta=0.3)
    np.testing.assert_allclose(losses.preference_nll(h, jnp.array([0, 1, 1])), np.log(candidates), rtol=1e-6)


def test_dpo_of_two_is_equation_7_of_the_paper():
    logp, ref = jnp.array([[-10.0, -12.0]]), jnp.array([[-11.0, -11.5]])
    margin = 0.1 * ((-10 + 11) - (-12 + 11.5))
    np.testing.assert_allclose(losses.implicit_reward(logp, ref, 0.1), [[0.1, -0.05]], rtol=1e-5)
    expected = -np.log(1 / (1 + np.exp(-margin)))
    assert float(losses.dpo(logp, ref, jnp.array([0]), 0.1)[0]) == pytest.approx(expected, rel=1e-6)
    # conservative: one label in five points the wrong way
    wrong = -np.log(1 / (1 + np.exp(margin)))
    found = losses.cdpo(logp, ref, jnp.array([0]), 0.1, 0.2)
    assert float(found[0]) == pytest.approx(0.8 * expected + 0.2 * wrong, rel=1e-6)


def test_ppo_clip_by_hand():
    old = jnp.zeros(4)
    logp = jnp.log(jnp.array([1.5, 1.5, 0.5, 0.5]))
    advantage = jnp.array([1.0, -1.0, 1.0, -1.0])
    found = losses.ppo_clip(losses.log_ratio(logp, old), advantage, clip=0.2)
    np.testing.assert_allclose(found, [-1.2, 1.5, -0.5, 0.8], rtol=1e-6)


def test_ppo_at_ratio_one_is_the_policy_gradient():
    logp, advantage = jax.random.normal(jax.random.key(0), (2, 6)), jax.random.normal(jax.random.key(1), (2, 6))
    slope = jax.grad(lambda x: losses.ppo_clip(losses.log_ratio(x, logp), advantage).sum())(logp)
    np.testing.assert_allclose(slope, -advantage, rtol=1e-6)
    reinforce = jax.grad(lambda x: losses.reinforce(x, advantage).sum())(logp)
    np.testing.assert_allclose(slope, reinforce, rtol=1e-6)


def test_reinforce_by_hand_and_no_gradient_into_the_advantage():
    assert float(losses.reinforce(jnp.array(-2.0), jnp.array(3.0))) == 6.0
    slopes = jax.grad(lambda *x: losses.reinforce(*x), (0, 1))(jnp.array(-2.0), jnp.array(3.0))
    assert [float(slope) for slope in slopes] == [-3.0, 0.0]


def test_value_clip_by_hand():
    found = losses.value_clip(jnp.array([1.0, 1.0]), jnp.array([0.0, 0.9]), jnp.array([2.0, 2.0]), clip=0.2)
    np.testing.assert_allclose(found, [0.5 * 1.8**2, 0.5 * 1.0], rtol=1e-6)


jitted = SimpleNamespace(**{name: jax.jit(getattr(losses, name)) for name in losses.__all__ if name.endswith("_nll")})


def scores_of(B: int = 5, C: int = 4, seed: int = 0):
    return jax.random.normal(jax.random.key(seed), (B, C)) * 2


def test_token_losses_by_hand():
    logits = jnp.log(jnp.array([0.5, 0.25, 0.25])) + 7.0  # a constant doesn't count, except in log Z
    token = jnp.array(1)
    assert float(losses.nll(logits, token)) == pytest.approx(2 * np.log(2), rel=1e-6)
    assert float(losses.z_loss(logits)) == pytest.approx(49.0, rel=1e-5)
    assert float(losses.entropy(logits)) == pytest.approx(1.5 * np.log(2), rel=1e-5)
    # 0.7 of the NLL, and 0.3 of the mean of log 2, 2 log 2, 2 log 2
    assert float(losses.label_smoothing(logits, token, 0.3)) == pytest.approx((0.7 * 2 + 0.3 * 5 / 3) * np.log(2))
    assert float(losses.label_smoothing(logits, token, 0.0)) == pytest.approx(float(losses.nll(logits, token)))


def test_one_likelihood_a_favourite_is_a_ranking_of_one():
    scores, choice = scores_of(), jnp.array([0, 1, 2, 3, 0])
    favourite = choice[:, None] == jnp.arange(4)
    expected = jitted.preference_nll(scores, choice)
    np.testing.assert_allclose(jitted.favourites_nll(scores, favourite), expected, rtol=1e-6)
    np.testing.assert_allclose(jitted.plackett_luce_nll(scores, jnp.where(favourite, 0, -1)), expected, rtol=1e-6)
    np.testing.assert_allclose(jitted.soft_preference_nll(scores, favourite.astype(float)), expected, rtol=1e-5)
    for never in (-50.0, -np.inf):
        no_ties = jitted.favourites_nll(scores, favourite, log_tie=(never, never))
        np.testing.assert_allclose(no_ties, expected, rtol=1e-6)


def test_one_likelihood_two_answers():
    scores, choice = scores_of(C=2), jnp.array([0, 1, 1, 0, 1])
    chosen, rejected = (jnp.take_along_axis(scores, c[:, None], 1)[:, 0] for c in (choice, 1 - choice))
    pair = jitted.bradley_terry_nll(chosen, rejected)
    rank = (jnp.arange(2) != choice[:, None]).astype(jnp.int32)
    np.testing.assert_allclose(jitted.preference_nll(scores, choice), pair, rtol=1e-5)
    np.testing.assert_allclose(jitted.plackett_luce_nll(scores, rank), pair, rtol=1e-5)
    np.testing.assert_allclose(jitted.all_pairs_nll(scores, rank), pair, rtol=1e-5)
    davidson = jitted.favourites_nll(scores, rank == 0, log_tie=(-np.inf,))
    np.testing.assert_allclose(davidson, pair, rtol=1e-5)
    margin = jnp.linspace(0, 1, 5)
    with_margin = jitted.bradley_terry_nll(chosen, rejected, margin)
    np.testing.assert_allclose(jitted.preference_nll(scores, choice, margin_B=margin), with_margin, rtol=1e-5)
    np.testing.assert_allclose(with_margin, np.log1p(np.exp(rejected - chosen + margin)), rtol=1e-5)


def test_a_tied_pair_is_davidsons_model():
    a, b, nu = 2.0, 0.5, 1.7  # worths, and Davidson's nu
    scores = jnp.log(jnp.array([[a, b]] * 3))
    outcome = jnp.array([[True, False], [False, True], [True, True]])
    total = a + b + nu * np.sqrt(a * b)
    expected = -np.log(np.array([a, b, nu * np.sqrt(a * b)]) / total)
    np.testing.assert_allclose(jitted.favourites_nll(scores, outcome, log_tie=(np.log(nu),)), expected, rtol=1e-5)


def test_preferences_by_hand():
    """Worths of 4, 2 and 1."""
    scores = jnp.log(jnp.array([[4.0, 2.0, 1.0]]))

    def nll(f, *x, **more):
        return float(f(scores, *x, **more)[0])

    log = np.log
    assert nll(losses.preference_nll, jnp.array([1])) == pytest.approx(-log(2 / 7), rel=1e-5)
    # log 2 off the second's score halves its worth: 1 of 4 + 1 + 1
    margin = jnp.log(jnp.array([2.0]))
    assert nll(losses.preference_nll, jnp.array([1]), margin_B=margin) == pytest.approx(-log(1 / 6), rel=1e-5)
    # a tie of the first two is worth half the root of 4 * 2; other ties: the roots of 4 * 1 and 2 * 1, halved
    total = 7 + 0.5 * (8**0.5 + 4**0.5 + 2**0.5)
    two = jnp.array([[True, True, False]])
    tied = nll(losses.favourites_nll, two, log_tie=(log(0.5),))
    assert tied == pytest.approx(-log(0.5 * 8**0.5 / total), rel=1e-5)
    assert nll(losses.plackett_luce_nll, jnp.array([[0, 1, 2]])) == pytest.approx(-log(4 / 7 * 2 / 3), rel=1e-5)
    assert nll(losses.plackett_luce_nll, jnp.array([[2, 1, 0]])) == pytest.approx(-log(1 / 7 * 2 / 6), rel=1e-5)
    assert nll(losses.plackett_luce_nll, jnp.array([[0, -1, -1]])) == pytest.approx(-log(4 / 7), rel=1e-5)
    # first tied with second, in place of a ranking of the two; the third is alone then
    ranked = nll(losses.plackett_luce_nll, jnp.array([[0, 0, 2]]), log_tie=(log(0.5),))
    assert ranked == pytest.approx(tied, rel=1e-5)
    pairs = [log(1 + 2 / 4), log(1 + 1 / 4), log(1 + 1 / 2)]
    assert nll(losses.all_pairs_nll, jnp.array([[0, 1, 2]])) == pytest.approx(np.mean(pairs), rel=1e-5)
    assert nll(losses.all_pairs_nll, jnp.array([[0, 0, -1]])) == pytest.approx(np.mean(pairs[1:]), rel=1e-5)
    votes = jnp.array([[0.5, 0.25, 0.25]])
    expected = -(0.5 * log(4 / 7) + 0.25 * log(2 / 7) + 0.25 * log(1 / 7))
    assert nll(losses.soft_preference_nll, votes) == pytest.approx(expected, rel=1e-5)
    assert float(losses.bradley_terry_nll(scores[0, 0], scores[0, 1])) == pytest.approx(log(3 / 2), rel=1e-5)


def test_centering_doubt_and_agreement_by_hand():
    scores, present = jnp.array([[1.0, 2.0, -4.0], [1.0, 2.0, -4.0]]), jnp.array([[True] * 3, [True, True, False]])
    np.testing.assert_array_equal(losses.reward_centering(scores, present), [1.0, 9.0])
    present = jnp.array([[True, True, True], [True, True, False], [False, True, False]])
    weight = losses.smooth_choice(jnp.array([0, 1, 1]), present, 0.2)
    np.testing.assert_allclose(weight, [[0.8, 0.1, 0.1], [0.2, 0.8, 0], [0, 1, 0]], rtol=1e-6)
    # right, wrong, one of two that tie, and a row of padding that doesn't count
    scores = jnp.array([[0.0, np.log(3.0)], [np.log(3.0), 0.0], [5.0, 5.0], [9.0, 9.0]])
    mean, metrics = losses.preference_objective(
        scores, jnp.array([1, 1, 0, 0]), jnp.array([[True, True]] * 3 + [[False, False]])
    )
    assert float(metrics["accuracy"].value) == 0.5
    expected = -(np.log(3 / 4) + np.log(1 / 4) + np.log(1 / 2)) / 3
    assert float(mean.value) == pytest.approx(expected, rel=1e-6) and float(mean.count) == 3


@pytest.mark.parametrize("log_tie", [(), (0.3,), (0.3, -0.5), (0.3, -0.5, 0.1)])
def test_probabilities_of_all_outcomes_sum_to_one(log_tie):
    """Every set of favourites that may tie; and every ranking, with the ties that log_tie allows."""
    scores, D = scores_of(1, 4), 1 + len(log_tie)
    sets = jnp.array([s for s in itertools.product([False, True], repeat=4) if 1 <= sum(s) <= D])
    nll = jitted.favourites_nll(jnp.broadcast_to(scores, sets.shape), sets, log_tie=log_tie)
    assert float(jnp.exp(-nll).sum()) == pytest.approx(1, rel=1e-5)
    levels = [r for r in itertools.product(range(4), repeat=4) if set(r) == set(range(max(r) + 1))]
    ranks = jnp.array([r for r in levels if max(r.count(level) for level in r) <= D])
    nll = jitted.plackett_luce_nll(jnp.broadcast_to(scores, ranks.shape), ranks, log_tie=log_tie)
    assert float(jnp.exp(-nll).sum()) == pytest.approx(1, rel=1e-5)


@pytest.mark.parametrize("name", [
    "log_prob", "nll", "label_smoothing", "entropy",
    "preference_nll", "favourites_nll", "plackett_luce_nll", "all_pairs_nll", "soft_preference_nll",
])  # fmt: skip
def test_a_common_offset_costs_no_digits(name):
    """Scores or logits of eighths, and 8,192 more: only differences count, and float32 holds both exactly."""
    x = jnp.round(8 * scores_of(5, 4)) / 8
    choice = jnp.array([0, 1, 2, 3, 0])
    chosen, rank = choice[:, None] == jnp.arange(4), (choice[:, None] + jnp.arange(4)) % 4
    more = {
        "entropy": (), "log_prob": (choice,), "nll": (choice,), "label_smoothing": (choice, 0.1),
        "preference_nll": (choice,), "favourites_nll": (chosen,), "plackett_luce_nll": (rank,),
        "all_pairs_nll": (rank,), "soft_preference_nll": (jax.nn.softmax(x),),
    }[name]  # fmt: skip
    f = jax.jit(getattr(losses, name))
    np.testing.assert_allclose(f(x + 8192, *more), f(x, *more), rtol=1e-5, atol=1e-6)


def test_a_partial_ranking_is_the_sum_over_the_whole_ones_it_leaves_open():
    scores = scores_of(1, 4)
    whole = jnp.array([[0, 1, *rest] for rest in itertools.permutations([2, 3])])
    open_ = jnp.exp(-jitted.plackett_luce_nll(jnp.broadcast_to(scores, whole.shape), whole)).sum()
    part = jitted.plackett_luce_nll(scores, jnp.array([[0, 1, -1, -1]]))
    assert float(jnp.exp(-part[0])) == pytest.approx(float(open_), rel=1e-5)


def test_a_missing_answer_is_a_smaller_problem():
    scores, present = scores_of(3, 4), jnp.array([[True, True, True, False]] * 3)
    dirty = scores.at[:, 3].set(1e4)
    rank, choice = jnp.array([[2, 0, 1, -1]] * 3), jnp.array([0, 1, 2])
    for found, expected in (
        (jitted.preference_nll(dirty, choice, present), jitted.preference_nll(scores[:, :3], choice)),
        (jitted.plackett_luce_nll(dirty, rank, present), jitted.plackett_luce_nll(scores[:, :3], rank[:, :3])),
        (jitted.all_pairs_nll(dirty, rank, present), jitted.all_pairs_nll(scores[:, :3], rank[:, :3])),
    ):
        np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_dpo_of_rankings_starts_at_log_of_the_orders():
    logp = jax.random.normal(jax.random.key(1), (2, 4)) * 20
    h = losses.implicit_reward(logp, logp, beta=0.2)
    rank = jnp.array([[0, 1, 2, 3], [3, 1, 0, 2]])
    np.testing.assert_allclose(jitted.plackett_luce_nll(h, rank), np.log(24), rtol=1e-5)


def test_conservative_dpo_has_its_minimum_where_it_should():
    """At P(choice) = 1 - eps; and with eps = 0 it is DPO."""
    logp, ref, choice = scores_of(seed=1), scores_of(seed=2), jnp.array([0, 1, 2, 3, 0])
    np.testing.assert_allclose(losses.cdpo(logp, ref, choice, 0.3, 0.0), losses.dpo(logp, ref, choice, 0.3), rtol=1e-5)
    margin = np.log(0.8 / 0.2)
    slope = jax.grad(lambda x: losses.cdpo(x, jnp.zeros((1, 2)), jnp.array([0]), 1.0, 0.2)[0])
    np.testing.assert_allclose(slope(jnp.array([[margin, 0.0]])), 0, atol=1e-6)


def test_direct_losses_by_hand():
    one, zero = jnp.array(1.0), jnp.array(0.0)
    assert float(losses.ipo(one, zero, tau=0.25)) == pytest.approx((1 - 2) ** 2)
    half = np.log(0.5)  # odds of 1
    quarter = np.log(0.25)  # odds of 1/3
    assert float(losses.log_odds(jnp.array(quarter))) == pytest.approx(-np.log(3), rel=1e-5)
    orpo = losses.orpo(jnp.array(half), jnp.array(quarter), weight=2.0)
    assert float(orpo) == pytest.approx(np.log(2) + 2 * np.log(1 + 1 / 3), rel=1e-5)
    simpo = losses.simpo(jnp.array(-1.0), jnp.array(-2.0), beta=2.0, gamma=2.0)
    assert float(simpo) == pytest.approx(np.log(2), rel=1e-6)
    assert float(losses.kto(one, jnp.array(True), 1.0, 0.5)) == pytest.approx(0.5)
    assert float(losses.kto(one, jnp.array(False), 1.0, 0.5, undesirable_weight=3.0)) == pytest.approx(1.5)
    assert float(losses.kto_reference(jnp.array([1.0, 5.0, -3.0]), jnp.array([True, True, False]))) == 3.0
    assert float(losses.kto_reference(jnp.array([-1.0]))) == 0.0


def test_equal_scores_agree_with_the_choice_by_chance():
    _, metrics = losses.preference_objective(jnp.zeros((3, 4)), jnp.array([0, 1, 3]), jnp.ones((3, 4), bool))
    assert float(metrics["accuracy"].value) == 0.25


def test_dual_clip_by_hand():
    d = jnp.log(jnp.array([10.0, 2.0, 10.0]))
    found = losses.dual_clip(d, jnp.array([-1.0, -1.0, 1.0]), clip=0.2, limit=3.0)
    np.testing.assert_allclose(found, [3.0, 2.0, -1.2], rtol=1e-5)
    slope = jax.grad(lambda x: losses.dual_clip(x, jnp.array([-1.0, -1.0, 1.0])).sum())(d)
    np.testing.assert_allclose(slope, [0.0, 2.0, 0.0], rtol=1e-5)
    good = jnp.linspace(0.0, 2.0, 9)
    d = jnp.linspace(-5.0, 5.0, 9)
    np.testing.assert_array_equal(losses.dual_clip(d, good), losses.ppo_clip(d, good))
    with pytest.raises(ValueError, match="dual_clip: limit is 1.3; it must be above the clip, 1.5"):
        losses.dual_clip(d, d, clip_high=0.5, limit=1.3)


def test_a_ratio_of_a_sequence_is_the_geometric_mean_of_its_tokens():
    logp, old = jnp.array([[-1.0, -2.0, 9.0], [-3.0, 9.0, 9.0]]), jnp.array([[-2.0, -5.0, 0.0], [-1.0, 0.0, 0.0]])
    mask = jnp.array([[True, True, False], [True, False, False]])
    np.testing.assert_allclose(losses.sequence_log_ratio(logp, old, mask), [2.0, -2.0])
    assert float(losses.log_ratio(logp, old)[1, 0]) == -2.0  # one token: the same


def test_log_ratios_are_clamped_and_the_clamp_is_counted():
    logp = jnp.array([[0.0, -1e4, 1e4, 19.0]])
    d = losses.log_ratio(logp, jnp.zeros((1, 4)))
    np.testing.assert_array_equal(d, [[0.0, -20.0, 20.0, 19.0]])
    slope = jax.grad(lambda x: losses.log_ratio(x, jnp.zeros((1, 4))).sum())(logp)
    np.testing.assert_array_equal(slope, [[1.0, 0.0, 0.0, 1.0]])
    metrics = losses.ratio_metrics(d, jnp.ones((1, 4)), jnp.array([[True, True, True, True]]))
    assert float(metrics["clamp_fraction"].value) == 0.5


def test_ratio_metrics_by_hand():
    """Ratios 2, 1/2, 1 and 2 of good, good, good and bad tokens; a fifth isn't counted."""
    d = jnp.log(jnp.array([2.0, 0.5, 1.0, 2.0, 99.0]))
    advantage, mask = jnp.array([1.0, 1.0, 1.0, -1.0, 1.0]), jnp.array([True] * 4 + [False])
    found = losses.ratio_metrics(d, advantage, mask, clip=0.2)
    assert float(found["approx_kl"].value) == pytest.approx(3 * np.log(2) ** 2 / 2 / 4, rel=1e-5)
    assert float(found["clip_fraction"].value) == 0.25  # a bad token that grew likelier, or a good one less: no clip
    assert float(found["clamp_fraction"].value) == 0.0
    assert float(found["ratio_max"]) == pytest.approx(2) and float(found["ratio_error_max"]) == pytest.approx(1)
    wide = losses.ratio_metrics(d, advantage, mask, clip=0.2, clip_high=1.5)
    assert float(wide["clip_fraction"].value) == 0.0


def test_sums_do_not_stop_counting_in_bfloat16():
    """1,001 tokens of one nat each are 1,001 nats; bfloat16 knows 1,000 and 1,008."""
    ones, mask = jnp.ones((1, 1001), jnp.bfloat16), jnp.ones((1, 1001), bool)
    assert float(losses.sequence_sum(ones, mask)[0]) == float(reduce(ones, mask).sum) == float(reduce(ones).sum) == 1001


def test_losses_add():
    a, b, mask = jnp.array([1.0, 2.0, 9.0]), jnp.array([10.0, 20.0, 9.0]), jnp.array([True, True, False])
    total, metrics = losses.combine({"a": a, "b": b}, mask, {"b": 0.5})
    assert float(total.value) == 1.5 + 7.5 and float(total.count) == 2
    assert float(metrics["a"].value) == 1.5 and float(metrics["b"].value) == 15.0
    assert float(total.value) == float(reduce(a + 0.5 * b, mask).value)
    with pytest.raises(ValueError, match=r"weights for \['c'\], but the terms are \['a', 'b'\]"):
        losses.combine({"a": a, "b": b}, mask, {"c": 1.0})


def test_three_ways_to_reduce_answers_of_different_length():
    values = jnp.array([[3.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]])
    mask = jnp.array([[True, False, False, False], [True, True, True, True]])
    assert float(reduce(values, mask).value) == pytest.approx(7 / 5)  # tokens alike
    assert float(reduce(losses.sequence_mean(values, mask)).value) == 2.0  # answers alike
    assert float(reduce(losses.sequence_sum(values, mask) / 4).value) == pytest.approx(7 / 8)  # a constant length
