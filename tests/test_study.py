"""Many runs as one program, best-of-n without bias, derivatives through a reward model; and each study at toy size."""

import dataclasses
import functools
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import arithmetic, how_many_labels
from jaxgpt import kl, model, optim, reward, sharding, through_reward
from jaxgpt.config import UserError
from jaxgpt.data.preferences import Ranking
from jaxgpt.evaluate import SimulatedAnnotator, best_of_n_kl_bound, crossed_interval
from jaxgpt.ppo import PPOConfig
from jaxgpt.run import Run
from jaxgpt.structs import Batch
from jaxgpt.study import figures, groups, laws, methods, runs, sums
from jaxgpt.study.cells import Cells
from jaxgpt.study.task import Seen, Task, best_of_kl, best_of_weights, log_probs, sample, seen
from jaxgpt.tokenizer import train_char
from jaxgpt.train import make_nll
from tests.helpers import TINY, batch_of, params_of

STOP = 3


@pytest.fixture(autouse=True, scope="module")
def keys_in_rows():
    """JAX's check of reused keys takes the vmapped keys of a scan for used ones; those of single runs are checked
    elsewhere."""
    with jax.debug_key_reuse(False):
        yield


def tiny_task() -> Task:
    """A tiny model that answers with at most five tokens; the gold score is how often it says token 7."""

    def gold(texts):
        return np.array([text.split().count("7") for text in texts], float)

    return Task(
        TINY, train_char(["ab"]), params_of(scale=1.0), [[1, 5], [1, 6, 8], [1, 9]], [[1, 4], [1, 7, 9]], gold, gold,
        lambda ids, mask: " ".join(map(str, ids[mask])), STOP, PPOConfig(new_tokens=5, epochs=2, minibatches=2),
        sharding.make_mesh(devices=jax.devices()[:1]),
    )  # fmt: skip


def likes_seven(params, rows):
    return (jnp.where(rows.mask_BT, rows.tokens_BT == 7, False)).sum(1) * params["scale"]


BETAS, SCALES = (0.0, 0.5), (1.0, 2.0)  # of two runs


@functools.cache
def trained(which: tuple[int, ...], how: str = "vmap", devices: int = 1, on_host: bool = False):
    """(policies, curves) of these runs, which differ in seed, beta, and the scale of their reward."""
    task = dataclasses.replace(tiny_task(), mesh=sharding.make_mesh(devices=jax.devices()[:devices]))
    tx = runs.ppo_optimizer(task, 1e-3, 2)
    learn = runs.learn_by_ppo(task, tx, None if on_host else likes_seven)
    program = runs.OnPolicy(task, learn, tx, 2, 8, host=task.gold if on_host else None, how=how)
    controls = [kl.FixedKL(jnp.float32(BETAS[n])) for n in which]
    return program.train(controls, which, [{} if on_host else {"scale": jnp.float32(SCALES[n])} for n in which])


def close(a, b, tolerance=2e-5):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=tolerance), a, b)


@pytest.mark.parametrize("how", ["vmap", pytest.param("map", marks=pytest.mark.slow)])
def test_runs_together_are_the_runs_alone(how):
    policies, curves = trained((0, 1), how)
    alone, curve = trained((1,))
    close(policies[1], alone[0])
    for name in ("gold", "kl", "score"):
        np.testing.assert_allclose(curves[name][:, 1], curve[name][:, 0], atol=1e-4)
    assert curves["kl"][0] == pytest.approx(0.0, abs=1e-6)  # a run starts at the reference
    assert np.abs(curves["ratio_error_first"]).max() == 0.0
    assert max(np.abs(a - b).max() for a, b in zip(*map(jax.tree.leaves, policies), strict=True)) > 1e-4


@pytest.mark.slow
def test_runs_divided_among_devices_are_the_same_runs():
    close(trained((0, 1))[0], trained((0, 1), devices=2)[0])


@pytest.mark.slow  # tests/test_ppo.py has it for a single run
def test_a_reward_on_the_host_is_the_same_reward():
    close(trained((0, 1))[0][0], trained((0,), on_host=True)[0][0])  # its scale is 1


def test_fitting_together_is_fitting_alone():
    tx, mesh = optax.sgd(0.1), sharding.make_mesh(devices=jax.devices()[:1])  # Adam would magnify rounding
    batches = [[jax.tree.map(np.asarray, batch_of(seed=10 * n + i)) for i in range(2)] for n in range(2)]
    start = [params_of(seed=n, scale=1.0) for n in range(2)]
    both = runs.fit(make_nll(TINY), tx, start, {}, runs.together(batches), mesh)
    for n in range(2):
        (alone,) = runs.fit(make_nll(TINY), tx, start[n : n + 1], {}, runs.together(batches[n : n + 1]), mesh)
        close(both[n], alone)


def test_a_run_whose_loss_is_not_finite_is_named():
    def loss(params, batch, key=None):
        objective, metrics = make_nll(TINY)(params, batch[1], key)
        return dataclasses.replace(objective, sum=objective.sum * batch[0]), metrics

    batch = jax.tree.map(np.asarray, batch_of())
    batches = runs.together([[(np.float32(1.0), batch)], [(np.float32(np.nan), batch)]])
    with pytest.raises(UserError, match=r"run \[1\] was not finite in step 1"):
        runs.fit(loss, optim.adamw(1e-2), [params_of()] * 2, {}, batches, sharding.make_mesh(devices=jax.devices()[:1]))


def test_dpo_with_several_betas_is_dpo_with_each():
    task = tiny_task()
    rng = np.random.default_rng(0)
    rows = [([1, 5, *map(int, rng.integers(4, 60, 4))], [0, 0, 1, 1, 1, 1]) for _ in range(16)]
    rankings = [Ranking((rows[i], rows[i + 1]), i % 2) for i in range(0, 16, 2)]
    options = {"learning_rate": 1e-3, "batch": 4}
    both = methods.dpo_policies(task, [rankings] * 2, [0.1, 2.0], [0, 0], **options)
    close(both[1], methods.dpo_policies(task, [rankings], [2.0], [0], **options)[0])
    assert max(np.abs(a - b).max() for a, b in zip(*map(jax.tree.leaves, both), strict=True)) > 1e-4


# ---- best-of-n ----


@pytest.mark.parametrize("n", [1, 2, 3, 6])
def test_best_of_weights_are_those_of_all_subsets(n):
    score = np.array([0.3, -1.0, 2.0, 0.3, 5.0, 0.0])
    count = np.zeros(6)
    for subset in itertools.combinations(range(6), n):
        count[max(subset, key=lambda i: (score[i], i))] += 1
    np.testing.assert_allclose(best_of_weights(score, n), count / count.sum(), atol=1e-12)


def test_best_of_kl_is_the_bound_where_no_answer_has_much_probability():
    rng = np.random.default_rng(0)
    for n in (1, 2, 8, 32):
        estimate = best_of_kl(np.full(64, -40.0), rng.normal(size=64), n)
        assert estimate == pytest.approx(best_of_n_kl_bound(n), abs=1e-9)


def test_best_of_kl_is_that_of_the_enumerated_distribution():
    """Six answers with scores of their own: best-of-n gives y the probability F^n - (F - p)^n."""
    rng = np.random.default_rng(0)
    p, score, n = np.array([0.02, 0.08, 0.1, 0.2, 0.25, 0.35]), np.array([3.0, 1.0, 4.0, 0.0, 2.0, 5.0]), 8
    upto = np.array([p[score <= s].sum() for s in score])
    best = upto**n - (upto - p) ** n
    exact = best @ np.log(best / p)
    draws = rng.choice(6, size=(200, 400), p=p)
    found = np.mean([best_of_kl(np.log(p[row]), score[row], n) for row in draws])
    assert exact < best_of_n_kl_bound(n) - 0.2
    assert found == pytest.approx(exact, abs=0.03)


def test_a_crossed_interval_widens_with_either_spread():
    rng = np.random.default_rng(0)
    prompts, seeds = rng.normal(size=200), np.array([[-0.3], [0.0], [0.3]])
    one = crossed_interval(prompts)
    assert one.high - one.low == pytest.approx(2 * 1.96 * prompts.std() / np.sqrt(200), rel=0.15)
    assert (wide := crossed_interval(prompts + seeds)).high - wide.low > 1.5 * (one.high - one.low)
    same = crossed_interval(np.stack([prompts] * 3))
    assert same.high - same.low == pytest.approx(one.high - one.low, rel=0.1)


# ---- through the reward model ----


def test_conditional_gumbel_chooses_the_token_and_is_gumbel_on_average():
    logits = jnp.array([1.0, -2.0, 0.5, 0.0])
    logp = np.asarray(jax.nn.log_softmax(logits))
    tokens = jax.random.categorical(jax.random.key(0), logits, shape=(40_000,))
    z = through_reward.conditional_gumbel(jax.random.key(1), jnp.broadcast_to(logits, (40_000, 4)), tokens)
    assert (z.argmax(-1) == tokens).all()
    noise = np.asarray(z) - logp
    np.testing.assert_allclose(noise.mean(0), np.euler_gamma, atol=0.03)
    np.testing.assert_allclose(noise.var(0), np.pi**2 / 6, atol=0.08)
    np.testing.assert_allclose(np.corrcoef(noise.T), np.eye(4), atol=0.03)


def test_the_input_can_be_nudged_to_another_token():
    batch = batch_of()
    params, other = params_of(), batch.tokens_BT.at[:, 4].set(9)
    table = params["embed"]["tokens_VD"]
    nudged = model.hidden(params, TINY, batch.tokens_BT, nudge_BTD=table[other] - table[batch.tokens_BT])
    np.testing.assert_allclose(nudged, model.hidden(params, TINY, other), atol=1e-4)


def test_the_derivative_through_the_reward_model_raises_the_reward():
    """One token after one prompt: the expected h, summed over the vocabulary, rises along the gradient; the value that
    is differentiated is that of the sampled tokens, or (not straight through) of mixtures."""
    policy, judge = params_of(seed=1, scale=1.0), reward.init(jax.random.key(2), params_of(seed=3), TINY.width)
    every = jnp.stack([jnp.full(64, 1), jnp.arange(64)], 1)
    h_V = jax.jit(reward.score, static_argnums=1)(judge, TINY, Batch(every, every > -1))

    @jax.jit
    def logits(policy):
        return model.unembed(policy, model.hidden(policy, TINY, every[:1]))[0, 0]

    def expected(policy):
        return jax.nn.softmax(logits(policy)) @ h_V

    tokens = jax.random.categorical(jax.random.key(4), logits(policy), shape=(512,))
    rows = Batch(jnp.stack([jnp.ones_like(tokens), tokens], 1), jnp.tile(jnp.array([False, True]), (512, 1)))
    frozen = {"reference": policy, "reward": judge}

    def objective(policy, how):
        loss = through_reward.make_loss(TINY, TINY, 0.0, how)
        mean, metrics = loss({"policy": policy, **frozen}, rows, jax.random.key(5))
        return mean.value, metrics

    objective = jax.jit(jax.value_and_grad(objective, has_aux=True), static_argnums=1)
    (value, metrics), slope = objective(policy, through_reward.ThroughReward(tau=0.5))
    np.testing.assert_allclose(-value, h_V[tokens].mean(), rtol=1e-4)
    assert float(metrics["kl_exact"].value) == pytest.approx(0.0, abs=1e-6)
    step = 1e-2 / optax.tree.norm(slope)
    assert expected(jax.tree.map(lambda w, g: w - step * g, policy, slope)) > expected(policy) + 1e-4
    (mixed, _), _ = objective(policy, through_reward.ThroughReward(tau=0.5, straight_through=False))
    assert abs(float(mixed - value)) > 1e-3


# ---- what the studies are made of ----


def test_the_kl_of_a_policy_is_measured_on_its_own_answers():
    task, other = tiny_task(), params_of(seed=1, scale=1.0)
    for policy in (task.start, other):
        answers = sample(task, policy, task.heldout, jax.random.key(0))
        found = seen(task, policy, answers)
        expected = log_probs(task, policy, answers.rows) - log_probs(task, task.start, answers.rows)
        np.testing.assert_allclose(found.kl, expected, atol=1e-6)
        assert (np.abs(found.kl) > 1e-2).any() == (policy is other)


def test_a_running_mean_passes_over_what_is_missing():
    curves = [[1.0, np.nan, 3.0, 5.0, np.nan], [3.0, np.nan, np.nan, np.nan, np.nan]]
    np.testing.assert_allclose(figures.running_mean(curves, 1), [2.0, np.nan, 3.0, 5.0, np.nan])
    np.testing.assert_allclose(figures.running_mean(curves, 3), [2.0, 7 / 3, 4.0, 4.0, 5.0])


def test_the_intervals_of_a_fit_hold_what_made_the_data():
    """Prompts, or iterations, differ by noise alone; a KL estimate may be below 0."""
    rng, kl_n = np.random.default_rng(0), np.array([0.2, 0.6, 1.2, 1.8, 2.5])
    gain_nP = laws.gain("best-of-n", np.sqrt(kl_n), 0.5, 0.1)[:, None] + 0.05 * rng.normal(size=(5, 80))
    kl_SI = np.stack([np.linspace(-0.01, 40, 60)] * 2)
    with np.errstate(divide="ignore", invalid="ignore"):
        clean_SI = np.where(kl_SI > 0.1, laws.gain("RL", laws.distance(kl_SI), 0.7, 0.2), 0.0)
    fits = laws.fit_best_of(kl_n, gain_nP), laws.fit_rl(kl_SI, clean_SI + 0.05 * rng.normal(size=kl_SI.shape))
    for fit, made in zip(fits, ({"alpha": 0.5, "beta": 0.1}, {"alpha": 0.7, "beta": 0.2}), strict=True):
        for name, value in made.items():
            estimate, low, high = fit[name]
            assert low < value < high and low < estimate < high and high - low < 0.2, (name, fit)


def test_cells_are_made_once_a_study(tmp_path):
    made = []

    def start(value):
        with Run(tmp_path, arithmetic.Settings(seed=value), stage="arithmetic") as run, run.progress(3, "x") as bar:
            cells = Cells(run)
            found = cells("a part", lambda: made.append(value) or {"x": np.arange(3) + value}, 2, bar)
            weights = cells.model("m", lambda: made.append(-value) or (params_of(seed=value), TINY), 1, bar)[0]
            return found, weights

    first, again = start(1), start(1)
    assert made == [1, -1] and first[0] == again[0] == {"x": [1, 2, 3]}
    close(first[1], again[1], 0)
    start(2)
    assert made == [1, -1, 2, -2]


def test_fits_of_overoptimisation_find_what_made_the_data():
    d = np.linspace(0.2, 3.0, 20)
    np.testing.assert_allclose(laws.least_squares("best-of-n", d, d * (1.2 - 0.3 * d)), [1.2, 0.3], atol=1e-9)
    np.testing.assert_allclose(laws.least_squares("RL", d, d * (0.7 - 0.4 * np.log(d))), [0.7, 0.4], atol=1e-9)


@pytest.mark.parametrize(
    ("text", "right"),
    [("37+85=122", True), ("37+85=...122", True), ("37+85=12.2", False), ("37+85=122.", False), ("37+85=", False),
     ("37+85=0122", False), ("0+0=0", True), ("0+0=...", False)],
)  # fmt: skip
def test_a_sum_is_right_or_wrong(text, right):
    assert sums.solved(text) is right


def test_sums_are_held_out():
    train, heldout = sums.split(99, 500, seed=31)
    assert len(heldout) == 500 and len(train) == 9500 and not set(train) & set(heldout)


def test_demonstrations_are_right_whatever_their_dots():
    tok = train_char([sums.CHARACTERS])
    prompts = ["9+9", "99+99", "0+7"]
    batch = next(sums.demonstrations(prompts, tok, 3, 64, seed=0))
    texts = [tok.decode([i for i in ids if not tok.is_special(int(i))]) for ids in batch.tokens_BT]
    answers = {prompt: {text.removeprefix(prompt) for text in texts if text.startswith(prompt)} for prompt in prompts}
    assert answers["99+99"] == {"198", ".198", "..198", "...198"} and answers["0+7"] == {"7", ".7", "..7", "...7"}
    assert sum(map(len, answers.values())) == 12 == len(set(texts))


def test_groups_weigh_as_their_method_says():
    """Dr. GRPO's weight of a group is 2 p (1 - p) in right answers p; GRPO's falls off more slowly to either side."""
    score_BC = (jnp.arange(8) < jnp.arange(1, 8)[:, None]).astype(jnp.float32)
    found = {name: groups.weights(score_BC, groups.METHODS[name].advantage(score_BC)) for name in
             ("GRPO", "GRPO, neither (Dr. GRPO)")}  # fmt: skip
    grpo, unbiased = (np.array([one[f"weight_{n}"].value for n in range(1, 8)]) for one in found.values())
    p = np.arange(1, 8) / 8
    np.testing.assert_allclose(unbiased, 2 * p * (1 - p), rtol=1e-5)
    np.testing.assert_allclose(grpo / grpo.max(), 2 * np.sqrt(p * (1 - p)), rtol=1e-3)


def test_labels_are_asked_for_with_equal_effort():
    s = dataclasses.replace(how_many_labels.PRESETS["toy"], labels=(8, 32), noise_labels=16)
    rng = np.random.default_rng(0)
    rows = [[[1, n], [0, 1]] for n in range((s.pool + s.heldout) * 8)]
    pool = {"rows": rows, "gold": rng.normal(size=(s.pool + s.heldout, 8)).tolist()}
    for one in how_many_labels.conditions(s):
        found = how_many_labels.asked(s, pool, one, 0)
        ids = [row[0][1] for ranking in found for row in ranking.rows]
        assert len(found) == one.choices and {len(ranking.rows) for ranking in found} == {one.candidates}
        assert len(set(ids)) == len(ids) and max(ids) < s.pool * 8
        if one.group.startswith("answers"):
            assert len(ids) == s.read
    certain = dataclasses.replace(how_many_labels.conditions(s)[0], temperature=1e-6)
    for ranking in how_many_labels.asked(s, pool, certain, 0):
        gold = [pool["gold"][row[0][1] // 8][row[0][1] % 8] for row in ranking.rows]
        assert ranking.choice == int(np.argmax(gold))


def test_an_annotator_who_likes_it_short():
    annotator = SimulatedAnnotator(wish="short")
    gold = annotator.gold(["one two three", "one", ""])
    assert gold.argmax() == 1 and gold.argmin() == 2
    assert "words" in annotator.name and "VADER" in SimulatedAnnotator().name
    with pytest.raises(UserError, match="cheerful or short"):
        SimulatedAnnotator(wish="loud")  # type: ignore[arg-type]


def test_what_was_seen_comes_back_from_a_file():
    seen = Seen(["a", "b"], *(np.arange(2.0) + n for n in range(6)), np.array([np.nan, 1.0]))
    back = Seen.from_json(json.loads(json.dumps({**seen.to_json(), "proxy": [None, 1.0]})))
    for name in ("gold", "kl", "ended", "proxy"):
        np.testing.assert_array_equal(getattr(back, name), getattr(seen, name))
