"""The library's losses and returns against an optimum that is enumerated, in float64, answer by answer.

pi*(y) = rho(y) exp(r(y) / beta) / Z over all 15 answers of up to three tokens, for five random problems.
"""

import dataclasses
import itertools
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import oracle
from experiments.oracle import Method, Task, enumerate_answers, every_group, every_set, grouped, learn, make_tasks
from jaxgpt import returns

SETTINGS = oracle.Settings(updates=600)
SPACE = enumerate_answers(SETTINGS.vocab, SETTINGS.tokens)
TASKS = make_tasks(SETTINGS, SPACE)
FIND_IT = ("PPO", "RLOO", "centred", "DPO, pairs", "DPO, sets of 3", "GRPO, KL in the score")
ADVANTAGES = {"rloo": returns.rloo, "centred": returns.centred, "grpo": returns.grpo}


@pytest.fixture(scope="module")
def learned():
    """Every method's policy for each problem."""
    return {name: learn(SETTINGS, SPACE, method, TASKS)[0] for name, method in oracle.methods(SETTINGS, SPACE).items()}


def problem(i, tree=TASKS):
    return jax.tree.map(lambda x: x[i], tree)


def measured(logits_PSV):
    return [oracle.measure(SPACE, problem(i), logits_PSV[i]) for i in range(SETTINGS.problems)]


def spelled():
    """Each answer as a tuple of its tokens."""
    return [tuple(row[mask].tolist()) for row, mask in zip(SPACE.tokens_YT, SPACE.mask_YT, strict=True)]


def probabilities(logits_SV):
    """pi(y) in float64, walking down the prefixes: an enumeration of its own."""
    row = dict(zip([p for n in range(3) for p in itertools.product(range(2), repeat=n)], range(7), strict=True))
    x = np.asarray(logits_SV, np.float64)
    table = np.exp(x) / np.exp(x).sum(axis=1, keepdims=True)
    return np.array([np.prod([table[row[y[:t]], y[t]] for t in range(len(y))]) for y in spelled()])


def soft_values(task):
    """beta log sum_y rho(y | s) exp(r(y) / beta) over the answers below each prefix s: what a perfect critic says."""
    rho_Y = probabilities(task.ref_SV)
    worth_Y = np.exp(np.asarray(task.score_Y, np.float64) / SETTINGS.beta)
    prefixes = [p for n in range(3) for p in itertools.product(range(2), repeat=n)]
    below = [[i for i, y in enumerate(spelled()) if y[: len(p)] == p] for p in prefixes]
    return np.array([SETTINGS.beta * np.log((rho_Y * worth_Y)[i].sum() / rho_Y[i].sum()) for i in below])


def optimal_logits(task):
    """A table whose policy is pi*: the log of its probability below each prefix, token by token."""
    mean_Y = np.asarray(task.score_Y, np.float64).reshape(-1, len(SPACE.tokens_YT)).mean(axis=0)
    best_Y = probabilities(task.ref_SV) * np.exp(mean_Y / SETTINGS.beta)
    mass_SV = np.zeros(SPACE.shape)
    np.add.at(mass_SV, (SPACE.prefix_YT[SPACE.mask_YT], SPACE.tokens_YT[SPACE.mask_YT]),
              np.repeat(best_Y, SPACE.mask_YT.sum(axis=1)))  # fmt: skip
    return jnp.asarray(np.log(mass_SV), jnp.float32)


def expected_gradient(method, task, logits_SV):
    """Of the loss over the policy's own groups, at the policy."""
    params = {"logits_SV": logits_SV, "value_S": jnp.zeros(len(logits_SV))}
    rows_BC, weight_B = method.draw(jax.random.key(0), SPACE.answer_logp(logits_SV))
    return jax.grad(lambda p: weight_B @ method.loss(SPACE, task, p, params, rows_BC))(params)["logits_SV"]


def test_every_answer_is_there_once():
    """Lengths 1, 2 and 3: the stop ends an answer, or the last place does."""
    answers = spelled()
    assert len(set(answers)) == len(answers) == 15
    assert Counter(map(len, answers)) == {1: 1, 2: 2, 3: 12}
    assert all(2 not in y[:-1] and (len(y) == 3 or y[-1] == 2) for y in answers)
    for i in range(SETTINGS.problems):
        pi_Y = probabilities(TASKS.ref_SV[i])
        assert pi_Y.sum() == pytest.approx(1.0, abs=1e-12) and pi_Y.std() > 0.02
        np.testing.assert_allclose(np.exp(SPACE.answer_logp(TASKS.ref_SV[i])), pi_Y, rtol=1e-4)


def test_the_groups_are_all_that_can_be_drawn():
    """Weights of the groups add up to 1, and their answers' shares to pi; sets hold different answers."""
    logp_Y = SPACE.answer_logp(TASKS.ref_SV[0])
    rows_BC, weight_B = every_group(SPACE, 3)(jax.random.key(0), logp_Y)
    assert len(rows_BC) == 15 * 16 * 17 // 6
    share_Y = np.zeros(15)
    np.add.at(share_Y, np.asarray(rows_BC), np.asarray(weight_B)[:, None] / 3)
    np.testing.assert_allclose(share_Y, np.exp(logp_Y), rtol=1e-4)
    sets_BC, _ = every_set(SPACE, 2)(jax.random.key(0), logp_Y)
    assert len(sets_BC) == 15 * 14 // 2 and (sets_BC[:, 0] != sets_BC[:, 1]).all()


def test_the_optimum_is_one():
    """No other policy has a higher E[r] - beta KL, and pi* has beta log sum rho exp(r / beta)."""
    rng = np.random.default_rng(0)
    for i in range(SETTINGS.problems):
        task, star = problem(i), optimal_logits(problem(i))
        found = oracle.measure(SPACE, task, star)
        assert found["kl_to_optimum"] == pytest.approx(0.0, abs=1e-6)
        best = found["score"] - SETTINGS.beta * found["kl"]
        assert best == pytest.approx(soft_values(task)[0], abs=1e-6)
        assert (found["optimal_score"], found["optimal_kl"]) == pytest.approx((found["score"], found["kl"]), abs=1e-5)
        np.testing.assert_allclose(np.exp(oracle.optimum(SPACE, task)), probabilities(star), rtol=1e-4, atol=1e-7)
        for size in (0.1, 1.0, 5.0):
            other = oracle.measure(SPACE, task, star + size * rng.normal(size=star.shape))
            loss = SETTINGS.beta * other["kl_to_optimum"]
            assert best - other["score"] + SETTINGS.beta * other["kl"] == pytest.approx(loss, abs=1e-5)
            assert loss > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", FIND_IT)
def test_the_method_converges_to_the_optimum(learned, name):
    """KL(pi || pi*) below 0.01 nats in all five problems, from at least 0.1 at the start."""
    before = [found["kl_to_optimum"] for found in measured(TASKS.ref_SV)]
    after = [found["kl_to_optimum"] for found in measured(learned[name]["logits_SV"])]
    assert min(before) > 0.1
    assert max(after) < 0.01, after


def test_ppo_s_critic_learns_the_soft_values(learned):
    """Where the policy goes: the root, and the prefixes it visits in at least one answer of twenty."""
    for i in range(SETTINGS.problems):
        pi_Y = probabilities(learned["PPO"]["logits_SV"][i])
        visits_S = np.zeros(SPACE.shape[0])
        np.add.at(visits_S, SPACE.prefix_YT[SPACE.mask_YT], np.repeat(pi_Y, SPACE.mask_YT.sum(axis=1)))
        often_S = visits_S > 0.05
        found_S = np.asarray(learned["PPO"]["value_S"][i])[often_S]
        np.testing.assert_allclose(found_S, soft_values(problem(i))[often_S], atol=0.1)


@pytest.mark.parametrize("advantage", ["rloo", "centred", "grpo"])
def test_the_kl_in_the_score_leaves_the_optimum_at_rest(advantage):
    """At pi* all answers of a prompt have the same h = r - beta log(pi / rho): whatever compares them sees nothing."""
    method = Method(grouped(ADVANTAGES[advantage], "score"), every_group(SPACE, 3))
    at_rest, elsewhere = (jax.jit(jax.vmap(lambda *x: expected_gradient(method, *x)))(TASKS, x) for x in (
        jnp.stack([optimal_logits(problem(i)) for i in range(SETTINGS.problems)]), TASKS.ref_SV))  # fmt: skip
    assert float(jnp.abs(at_rest).max()) < 1e-3 < 0.05 < float(jnp.abs(elsewhere).max(axis=(1, 2)).min())


def test_the_kl_as_a_loss_moves_a_normalised_policy_off_the_optimum():
    """k2 of the answer has the gradient of KL(pi || rho): with `rloo` pi* is at rest, with `grpo` it isn't, since the
    deviation divides the scores and not the KL. k3 a token has another gradient altogether: neither is at rest."""
    star = jnp.stack([optimal_logits(problem(i)) for i in range(SETTINGS.problems)])
    size = {}
    for name, penalty in itertools.product(("rloo", "grpo"), ("k2", "k3")):
        method = Method(grouped(ADVANTAGES[name], penalty), every_group(SPACE, 3))
        slope = jax.jit(jax.vmap(lambda *x, method=method: expected_gradient(method, *x)))(TASKS, star)
        size[name, penalty] = np.abs(slope).max(axis=(1, 2))
    assert size["rloo", "k2"].max() < 1e-4
    for pair in (("grpo", "k2"), ("rloo", "k3"), ("grpo", "k3")):
        assert size[pair].min() > 0.01, (pair, size[pair])


def test_normalised_grpo_with_k3_lands_elsewhere_and_exactly_where_its_expected_update_rests(learned):
    """More than 0.1 nats from pi*, at the same place from samples as from all groups; three times the scores have a
    different pi* and the same landing place, for only their order and relative distances are left."""
    sampled = learned["GRPO, k3 as a loss"]["logits_SV"]
    lands = [found["kl_to_optimum"] for found in measured(sampled)]
    assert min(lands) > 0.1, lands
    both = jax.tree.map(lambda *x: jnp.concatenate(x), TASKS, TASKS._replace(score_Y=3 * TASKS.score_Y))
    method = Method(grouped(returns.grpo, "k3"), every_group(SPACE, 3))
    rests = learn(SETTINGS, SPACE, method, both)[0]["logits_SV"]
    for i in range(SETTINGS.problems):
        here, there, by_samples = (probabilities(x) for x in (rests[i], rests[i + 5], sampled[i]))
        assert by_samples @ np.log(by_samples / here) < 0.01
        np.testing.assert_allclose(there, here, atol=5e-3)
        stars = [probabilities(optimal_logits(problem(j, both))) for j in (i, i + 5)]
        assert np.abs(stars[0] - stars[1]).max() > 0.05


def test_prompts_that_share_parameters_are_weighed_by_their_spread():
    """Three prompts, one table, scores of different spread. pi* maximises their mean: `rloo` and `centred` rest there.
    `grpo` divides each prompt by its own deviation and doesn't, even with the KL in the score."""
    triple = make_tasks(SETTINGS, SPACE, oracle.SPREADS)
    star = jnp.stack([optimal_logits(problem(i, triple)) for i in range(SETTINGS.problems)])
    for name, advantage in ADVANTAGES.items():
        method = Method(oracle.shared(grouped(advantage, "score")), every_group(SPACE, 3))
        slope = jax.jit(jax.vmap(lambda *x, method=method: expected_gradient(method, *x)))(triple, star)
        size = np.abs(slope).max(axis=(1, 2))
        assert size.min() > 0.01 if name == "grpo" else size.max() < 1e-4, (name, size)


@pytest.mark.slow
def test_the_experiment_runs_at_toy_size(tmp_path):
    """A table, a figure and results; a second call only reads them."""
    settings = dataclasses.replace(oracle.PRESETS["toy"], run=tmp_path / "run")
    found = oracle.main(settings)
    assert (tmp_path / "run/oracle.png").stat().st_size > 10_000
    assert len(found["PPO"]["kl_to_optimum"]) == settings.problems and np.isfinite(found["RLOO"]["score"])
    assert oracle.main(settings) == found


def test_scores_of_several_prompts_are_averaged():
    """The optimum of several prompts is that of their mean score."""
    triple = problem(0, make_tasks(SETTINGS, SPACE, oracle.SPREADS))
    assert triple.score_Y.shape == (3, 15)
    mean = Task(triple.ref_SV, triple.score_Y.mean(axis=0), triple.beta)
    np.testing.assert_allclose(oracle.optimum(SPACE, triple), oracle.optimum(SPACE, mean), rtol=1e-5)
