"""The library's losses and returns against an enumerated optimum, in float64, answer by answer.

pi*(y) = rho(y) exp(r(y) / beta) / Z over all 15 answers of up to three tokens, for five random problems.
"""

import dataclasses
import functools
import itertools
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import oracle
from experiments.oracle import Method, Task, all_groups, all_sets, enumerate_answers, learn, make_group_loss, make_tasks
from jaxgpt.losses import returns

SETTINGS = oracle.Settings(updates=150, learning_rate=0.1)
SPACE = enumerate_answers(SETTINGS.vocab, SETTINGS.tokens)
CONVERGENT = ("PPO", "RLOO", "centred", "DPO, pairs", "DPO, sets of 3", "GRPO, KL in the score")
ADVANTAGES = {"rloo": returns.rloo, "centred": returns.centre_scores, "grpo": returns.grpo}
answer_logp = jax.jit(jax.vmap(SPACE.answer_logp))


@functools.cache
def problems():
    """The five problems, and five with three prompts each that share a table."""
    made = jax.jit(lambda: (make_tasks(SETTINGS, SPACE), make_tasks(SETTINGS, SPACE, oracle.SCORE_STDS)))()
    return jax.tree.map(np.asarray, made)


@pytest.fixture(scope="module")
def tasks():
    return problems()[0]


@pytest.fixture(scope="module")
def triple():
    return problems()[1]


@functools.cache
def learned(name):
    """The method's policy for each problem."""
    params, _ = learn(SETTINGS, SPACE, oracle.methods(SETTINGS, SPACE)[name], problems()[0])
    return jax.tree.map(np.asarray, params)


def problem(i, tree):
    return jax.tree.map(lambda x: x[i], tree)


def measured(logits_PSV, tasks):
    return [oracle.measure(SPACE, problem(i, tasks), logits_PSV[i]) for i in range(SETTINGS.problems)]


def answer_tuples():
    """Each answer as a tuple of its tokens."""
    return [tuple(row[mask].tolist()) for row, mask in zip(SPACE.tokens_YT, SPACE.mask_YT, strict=True)]


def probabilities(logits_SV):
    """pi(y) in float64, from an independent enumeration along the prefixes."""
    row = dict(zip([p for n in range(3) for p in itertools.product(range(2), repeat=n)], range(7), strict=True))
    x = np.asarray(logits_SV, np.float64)
    table = np.exp(x) / np.exp(x).sum(axis=1, keepdims=True)
    return np.array([np.prod([table[row[y[:t]], y[t]] for t in range(len(y))]) for y in answer_tuples()])


def soft_values(task):
    """beta log sum_y rho(y | s) exp(r(y) / beta) over the answers below each prefix s: a perfect critic's values."""
    rho_Y = probabilities(task.ref_SV)
    worth_Y = np.exp(np.asarray(task.score_Y, np.float64) / SETTINGS.beta)
    prefixes = [p for n in range(3) for p in itertools.product(range(2), repeat=n)]
    below = [[i for i, y in enumerate(answer_tuples()) if y[: len(p)] == p] for p in prefixes]
    return np.array([SETTINGS.beta * np.log((rho_Y * worth_Y)[i].sum() / rho_Y[i].sum()) for i in below])


def optimal_logits(task):
    """A table whose policy is pi*: the log of its probability below each prefix, token by token."""
    mean_Y = np.asarray(task.score_Y, np.float64).reshape(-1, len(SPACE.tokens_YT)).mean(axis=0)
    best_Y = probabilities(task.ref_SV) * np.exp(mean_Y / SETTINGS.beta)
    mass_SV = np.zeros(SPACE.shape)
    np.add.at(
        mass_SV,
        (SPACE.prefix_YT[SPACE.mask_YT], SPACE.tokens_YT[SPACE.mask_YT]),
        np.repeat(best_Y, SPACE.mask_YT.sum(axis=1)),
    )
    return np.log(mass_SV).astype(np.float32)


def optima(tasks):
    return np.stack([optimal_logits(problem(i, tasks)) for i in range(SETTINGS.problems)])


def expected_gradients(losses):
    """By name: the gradient, at a policy, of the expected loss over that policy's own groups of three answers."""
    draw = all_groups(SPACE, 3)

    def gradients(task, logits_SV):
        params = {"logits_SV": logits_SV, "value_S": jnp.zeros(len(logits_SV))}
        rows_BC, weight_B = draw(jax.random.key(0), SPACE.answer_logp(logits_SV))
        return {
            name: jax.grad(lambda p, loss=loss: weight_B @ loss(SPACE, task, p, params, rows_BC))(params)["logits_SV"]
            for name, loss in losses.items()
        }

    return jax.jit(jax.vmap(gradients))


def sizes(slopes):
    """The largest entry of each problem's gradient, by name."""
    return {name: np.abs(slope).max(axis=(1, 2)) for name, slope in jax.tree.map(np.asarray, slopes).items()}


def test_every_answer_is_there_once(tasks):
    """Lengths 1, 2 and 3: an answer ends with the stop token or at the last position."""
    answers = answer_tuples()
    assert len(set(answers)) == len(answers) == 15
    assert Counter(map(len, answers)) == {1: 1, 2: 2, 3: 12}
    assert all(2 not in y[:-1] and (len(y) == 3 or y[-1] == 2) for y in answers)
    for logp_Y, ref_SV in zip(np.asarray(answer_logp(tasks.ref_SV)), tasks.ref_SV, strict=True):
        pi_Y = probabilities(ref_SV)
        assert pi_Y.sum() == pytest.approx(1.0, abs=1e-12) and pi_Y.std() > 0.02
        np.testing.assert_allclose(np.exp(logp_Y), pi_Y, rtol=1e-4)


def test_the_groups_are_all_that_can_be_drawn(tasks):
    """Weighted by group, the answers' frequencies are pi; the answers of a set all differ."""
    logp_Y = np.asarray(answer_logp(tasks.ref_SV))[0]
    draws = all_groups(SPACE, 3), all_sets(SPACE, 2)
    (rows_BC, weight_B), (sets_BC, _) = jax.tree.map(
        np.asarray, jax.jit(lambda logp_Y: [draw(None, logp_Y) for draw in draws])(logp_Y)
    )
    assert len(rows_BC) == 15 * 16 * 17 // 6
    share_Y = np.zeros(15)
    np.add.at(share_Y, rows_BC, weight_B[:, None] / 3)
    np.testing.assert_allclose(share_Y, np.exp(logp_Y), rtol=1e-4)
    assert len(sets_BC) == 15 * 14 // 2 and (sets_BC[:, 0] != sets_BC[:, 1]).all()


def test_pi_star_is_optimal(tasks):
    """No other policy has a higher E[r] - beta KL, and that of pi* is beta log sum rho exp(r / beta)."""
    rng = np.random.default_rng(0)
    best_PY = np.exp(jax.jit(jax.vmap(functools.partial(oracle.optimum, SPACE)))(tasks))
    for i in range(SETTINGS.problems):
        task, star = problem(i, tasks), optimal_logits(problem(i, tasks))
        found = oracle.measure(SPACE, task, star)
        assert found["kl_to_optimum"] == pytest.approx(0.0, abs=1e-6)
        best = found["score"] - SETTINGS.beta * found["kl"]
        assert best == pytest.approx(soft_values(task)[0], abs=1e-6)
        assert (found["optimal_score"], found["optimal_kl"]) == pytest.approx((found["score"], found["kl"]), abs=1e-5)
        np.testing.assert_allclose(best_PY[i], probabilities(star), rtol=1e-4, atol=1e-7)
        for size in (0.1, 1.0, 5.0):
            other = oracle.measure(SPACE, task, star + size * rng.normal(size=star.shape))
            loss = SETTINGS.beta * other["kl_to_optimum"]
            assert best - other["score"] + SETTINGS.beta * other["kl"] == pytest.approx(loss, abs=1e-5)
            assert loss > 0


@pytest.mark.parametrize("name", [n if n == "PPO" else pytest.param(n, marks=pytest.mark.slow) for n in CONVERGENT])
def test_the_method_converges_to_the_optimum(tasks, name):
    """KL(pi || pi*) below 0.01 nats in all five problems, from at least 0.1 at the start."""
    before = [found["kl_to_optimum"] for found in measured(tasks.ref_SV, tasks)]
    after = [found["kl_to_optimum"] for found in measured(learned(name)["logits_SV"], tasks)]
    assert min(before) > 0.1
    assert max(after) < 0.01, after


def test_ppo_s_critic_learns_the_soft_values(tasks):
    """At the prefixes the policy visits: the root, and those in at least one answer of twenty."""
    for i in range(SETTINGS.problems):
        pi_Y = probabilities(learned("PPO")["logits_SV"][i])
        visits_S = np.zeros(SPACE.shape[0])
        np.add.at(visits_S, SPACE.prefix_YT[SPACE.mask_YT], np.repeat(pi_Y, SPACE.mask_YT.sum(axis=1)))
        often_S = visits_S > 0.05
        found_S = learned("PPO")["value_S"][i][often_S]
        np.testing.assert_allclose(found_S, soft_values(problem(i, tasks))[often_S], atol=0.1)


def test_the_kl_in_the_score_keeps_the_optimum_stationary(tasks):
    """At pi* all answers of a prompt have the same h = r - beta log(pi / rho), so every advantage is 0."""
    slopes = expected_gradients({name: make_group_loss(f, "score") for name, f in ADVANTAGES.items()})
    at_rest, elsewhere = sizes(slopes(tasks, optima(tasks))), sizes(slopes(tasks, tasks.ref_SV))
    for name in ADVANTAGES:
        assert at_rest[name].max() < 1e-3 < 0.05 < elsewhere[name].min(), (name, at_rest, elsewhere)


def test_the_kl_as_a_loss_moves_a_normalised_policy_off_the_optimum(tasks):
    """k2 of the answer has the gradient of KL(pi || rho): pi* is stationary with `rloo`, but not with `grpo`, since the
    standard deviation divides the scores and not the KL. k3 per token has a different gradient: neither is stationary.
    """
    pairs = itertools.product(("rloo", "grpo"), ("k2", "k3"))
    slopes = expected_gradients(
        {f"{name}, {penalty}": make_group_loss(ADVANTAGES[name], penalty) for name, penalty in pairs}
    )
    size = sizes(slopes(tasks, optima(tasks)))
    assert size.pop("rloo, k2").max() < 1e-4
    for name, least in size.items():
        assert least.min() > 0.01, (name, least)


def test_normalised_grpo_with_k3_converges_to_its_own_stationary_point(tasks):
    """More than 0.1 nats from pi*, and the same policy from samples as from all groups. Tripling the scores changes pi*
    but not that policy, since only the scores' order and relative distances remain."""
    sampled = learned("GRPO, k3 as a loss")["logits_SV"]
    lands = [found["kl_to_optimum"] for found in measured(sampled, tasks)]
    assert min(lands) > 0.1, lands
    both = jax.tree.map(lambda *x: np.concatenate(x), tasks, tasks._replace(score_Y=3 * tasks.score_Y))
    method = Method(make_group_loss(returns.grpo, "k3"), all_groups(SPACE, 3))
    rests = np.asarray(learn(SETTINGS, SPACE, method, both)[0]["logits_SV"])
    for i in range(SETTINGS.problems):
        here, there, by_samples = (probabilities(x) for x in (rests[i], rests[i + 5], sampled[i]))
        assert by_samples @ np.log(by_samples / here) < 0.01
        np.testing.assert_allclose(there, here, atol=5e-3)
        stars = [probabilities(optimal_logits(problem(j, both))) for j in (i, i + 5)]
        assert np.abs(stars[0] - stars[1]).max() > 0.05


def test_prompts_that_share_parameters_are_weighed_by_their_spread(triple):
    """Three prompts, one table, scores of different spread. pi* maximises their mean and is stationary for `rloo` and
    `centre_scores`, but not for `grpo`, which divides by each prompt's own standard deviation, even with the KL in the
    score.
    """
    slopes = expected_gradients(
        {name: oracle.average_over_prompts(make_group_loss(f, "score")) for name, f in ADVANTAGES.items()}
    )
    size = sizes(slopes(triple, optima(triple)))
    assert size["rloo"].max() < 1e-4 and size["centred"].max() < 1e-4 and size["grpo"].min() > 0.01, size


@pytest.mark.slow
def test_the_experiment_runs_at_toy_size(tmp_path):
    """A table, a figure and results; a second call only reads them."""
    settings = dataclasses.replace(oracle.PRESETS["toy"], run=tmp_path / "run")
    found = oracle.main(settings)
    assert (tmp_path / "run/oracle.png").stat().st_size > 10_000
    assert len(found["PPO"]["kl_to_optimum"]) == settings.problems and np.isfinite(found["RLOO"]["score"])
    assert oracle.main(settings) == found


def test_scores_of_several_prompts_are_averaged(triple):
    """The optimum for several prompts is the optimum for their mean score."""
    assert triple.score_Y.shape == (5, 3, 15)
    mean = Task(triple.ref_SV, triple.score_Y.mean(axis=1), triple.beta)
    found, expected = jax.jit(lambda *both: [jax.vmap(functools.partial(oracle.optimum, SPACE))(x) for x in both])(
        triple, mean
    )
    np.testing.assert_allclose(found, expected, rtol=1e-5)
