"""Many runs as one program, unbiased best-of-n, derivatives through a reward model.

`tests/experiments/test_stages.py` runs each study."""

import dataclasses
import functools
import itertools
import json
import types

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.studies import arithmetic, how_many_labels, imdb
from jaxgpt.data.comparisons import TokenizedPreference
from jaxgpt.data.tokenizer import train_char
from jaxgpt.errors import UserError
from jaxgpt.losses import kl, reduce
from jaxgpt.models import sharding, transformer
from jaxgpt.rlhf import group_policy, reward, through_reward
from jaxgpt.rlhf.annotator import SimulatedAnnotator
from jaxgpt.rlhf.intervals import best_of_n_kl_bound
from jaxgpt.rlhf.ppo import PPOConfig
from jaxgpt.rlhf.rollout import SampledAnswers
from jaxgpt.runs.run import Run
from jaxgpt.structs import Batch
from jaxgpt.study import figures, laws, many, methods, results, sums
from jaxgpt.study.cells import ResultCache
from jaxgpt.study.task import (
    Evaluation,
    Task,
    best_of_n_kl,
    best_of_n_weights,
    distinct_prompts,
    evaluate_answers,
    log_probs,
    sample_task_answers,
)
from jaxgpt.training import optim
from tests.helpers import TINY, batch_of, hidden, params_of

STOP = 3
ONE = dataclasses.replace(TINY, layers=1)
make_one_layer = jax.jit(functools.partial(params_of, ONE))


def one_layer(seed=0, scale=4.0):
    return make_one_layer(seed, scale)


@pytest.fixture(autouse=True, scope="module")
def keys_in_rows():
    """JAX's key-reuse check mistakes the vmapped keys of a scan for used ones; single runs are checked elsewhere."""
    with jax.debug_key_reuse(False):
        yield


def tiny_task() -> Task:
    """A tiny model that answers with at most five tokens; the gold reward is how often it says token 7."""

    def gold(texts):
        return np.array([text.split().count("7") for text in texts], float)

    return Task(
        ONE,
        train_char(["ab"]),
        one_layer(scale=1.0),
        [[1, 5], [1, 6, 8], [1, 9]],
        [[1, 4], [1, 7, 9]],
        gold,
        gold,
        lambda ids, mask: " ".join(map(str, ids[mask])),
        STOP,
        PPOConfig(new_tokens=5, epochs=2, minibatches=2),
        sharding.make_mesh(devices=jax.devices()[:1]),
    )


def likes_seven(params, rows):
    return (jnp.where(rows.mask_BT, rows.tokens_BT == 7, False)).sum(1) * params["scale"]


BETAS, SCALES = (0.0, 0.5), (1.0, 2.0)  # of two runs


@functools.cache
def program(how: str, devices: int, on_host: bool) -> many.OnPolicyTrainer:
    task = dataclasses.replace(tiny_task(), mesh=sharding.make_mesh(devices=jax.devices()[:devices]))
    tx = many.make_ppo_optimizer(task, 1e-3, 2)
    learn = many.make_ppo_learner(task, tx, None if on_host else likes_seven)
    return many.OnPolicyTrainer(task, learn, tx, 2, 8, host=task.gold if on_host else None, how=how)


@functools.cache
def outcome(which: tuple[int, ...], *how):
    controls = [kl.FixedKL(jnp.float32(BETAS[n])) for n in which]
    own = program(*how)
    return own.train(controls, which, [{} if own.host else {"scale": jnp.float32(SCALES[n])} for n in which])


def trained(which: tuple[int, ...], how: str = "vmap", devices: int = 1, on_host: bool = False):
    """(policies, curves) of these runs, which differ in seed, beta and reward scale."""
    return outcome(which, how, devices, on_host)


def close(a, b, tolerance=2e-5):
    chex.assert_trees_all_close(a, b, atol=tolerance, rtol=1e-7)


def apart(a, b) -> bool:
    return max(np.abs(x - y).max() for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)) > 1e-4


def same_run(a, b, n=1):
    """Compare run 1 of `a` with run n of `b`."""
    close(a[0][1], b[0][n])
    for name in ("gold", "kl", "score"):
        np.testing.assert_allclose(a[1][name][:, 1], b[1][name][:, n], atol=1e-4, err_msg=name)


def test_a_run_does_not_depend_on_those_beside_it():
    policies, curves = both = trained((0, 1))
    same_run(both, trained((1, 1)))
    assert apart(*policies)
    assert curves["kl"][0] == pytest.approx(0.0, abs=1e-6)  # a run starts at the reference
    assert np.abs(curves["ratio_error_first"]).max() == 0.0


@pytest.mark.slow
@pytest.mark.parametrize("how", ["vmap", "map"])
def test_runs_together_are_the_runs_alone(how):
    same_run(trained((0, 1), how=how), trained((1,)), 0)


@pytest.mark.slow
def test_runs_divided_among_devices_are_the_same_runs():
    close(trained((0, 1))[0], trained((0, 1), devices=2)[0])


@pytest.mark.slow  # tests/rlhf/test_ppo.py tests it for a single run
def test_a_reward_on_the_host_is_the_same_reward():
    close(trained((0, 1))[0][0], trained((0,), on_host=True)[0][0])  # its scale is 1


def squares(params, batch, key=None):
    return reduce((batch["x"] @ params["w"] - batch["y"]) ** 2), {}


def some_points(seed):
    rng = np.random.default_rng(seed)
    return {"x": rng.normal(size=(5, 3)).astype(np.float32), "y": rng.normal(size=5).astype(np.float32)}


def test_fitting_together_is_fitting_alone():
    tx, mesh = optim.adamw(1e-2), sharding.make_mesh(devices=jax.devices()[:1])
    batches = [[some_points(10 * n + i) for i in range(3)] for n in range(2)]
    start = [{"w": np.full(3, n, np.float32)} for n in range(2)]
    both = many.train_runs(squares, tx, start, {}, many.zip_batches(batches), mesh)
    for n in range(2):
        (alone,) = many.train_runs(squares, tx, start[n : n + 1], {}, many.zip_batches(batches[n : n + 1]), mesh)
        close(both[n], alone)
        assert apart(both[n], start[n])


def test_a_run_whose_loss_is_not_finite_is_named():
    good, bad = some_points(0), {**some_points(0), "y": np.full(5, np.nan, np.float32)}
    start, mesh = [{"w": np.ones(3, np.float32)}] * 2, sharding.make_mesh(devices=jax.devices()[:1])
    with pytest.raises(UserError, match=r"run \[1\] was not finite in step 2"):
        many.train_runs(squares, optim.adamw(1e-2), start, {}, many.zip_batches([[good, good], [good, bad]]), mesh)


def test_dpo_with_several_betas_is_dpo_with_each():
    task = tiny_task()
    rng = np.random.default_rng(0)
    rows = [([1, 5, *map(int, rng.integers(4, 60, 4))], [0, 0, 1, 1, 1, 1]) for _ in range(16)]
    rankings = [TokenizedPreference((rows[i], rows[i + 1]), i % 2) for i in range(0, 16, 2)]
    options = {"learning_rate": 1e-3, "batch": 4}
    both = methods.train_dpo_policies(task, [rankings] * 2, [0.1, 2.0], [0, 0], **options)
    close(both[1], methods.train_dpo_policies(task, [rankings], [2.0], [0], **options)[0])
    assert apart(*both)


# ---- best-of-n ----


@pytest.mark.parametrize("n", [1, 2, 3, 6])
def test_best_of_weights_are_those_of_all_subsets(n):
    score = np.array([0.3, -1.0, 2.0, 0.3, 5.0, 0.0])
    count = np.zeros(6)
    for subset in itertools.combinations(range(6), n):
        count[max(subset, key=lambda i: (score[i], i))] += 1
    np.testing.assert_allclose(best_of_n_weights(score, n), count / count.sum(), atol=1e-12)


def test_best_of_kl_is_the_bound_where_no_answer_has_much_probability():
    rng = np.random.default_rng(0)
    for n in (1, 2, 8, 32):
        estimate = best_of_n_kl(np.full(64, -40.0), rng.normal(size=64), n)
        assert estimate == pytest.approx(best_of_n_kl_bound(n), abs=1e-9)


def test_best_of_kl_is_that_of_the_enumerated_distribution():
    """Six answers with distinct scores: best-of-n gives y the probability F^n - (F - p)^n."""
    rng = np.random.default_rng(0)
    p, score, n = np.array([0.02, 0.08, 0.1, 0.2, 0.25, 0.35]), np.array([3.0, 1.0, 4.0, 0.0, 2.0, 5.0]), 8
    upto = np.array([p[score <= s].sum() for s in score])
    best = upto**n - (upto - p) ** n
    exact = best @ np.log(best / p)
    draws = rng.choice(6, size=(200, 400), p=p)
    found = np.mean([best_of_n_kl(np.log(p[row]), score[row], n) for row in draws])
    assert exact < best_of_n_kl_bound(n) - 0.2
    assert found == pytest.approx(exact, abs=0.01)


def test_best_of_kl_counts_ties_at_the_top():
    """A policy with a single answer stays as it is: 0. Where 3/4 tie for the best, best-of-n gives them 1 - (1/4)^n."""
    for n in (1, 4, 16):
        assert best_of_n_kl(np.zeros(16), np.ones(16), n) == pytest.approx(0, abs=1e-9)
        score, top = np.repeat([1.0, 0.0], [768, 256]), 1 - 0.25**n
        exact = top * np.log(top / 0.75) + (1 - top) * np.log((1 - top) / 0.25)
        found = best_of_n_kl(np.log(np.where(score == 1, 0.75, 0.25)), score, n)
        assert found == pytest.approx(exact, abs=1e-3), n


# ---- through the reward model ----


def test_conditional_gumbel_chooses_the_token_and_is_gumbel_on_average():
    logits = np.array([1.0, -2.0, 0.5, 0.0], np.float32)
    p = np.exp(logits) / np.exp(logits).sum()
    tokens = np.random.default_rng(0).choice(4, size=40_000, p=p / p.sum(dtype=float))
    z = jax.jit(through_reward.conditional_gumbel)(jax.random.key(1), np.tile(logits, (40_000, 1)), tokens)
    assert (np.argmax(z, -1) == tokens).all()
    noise = np.asarray(z) - np.log(p)
    np.testing.assert_allclose(noise.mean(0), np.euler_gamma, atol=0.03)
    np.testing.assert_allclose(noise.var(0), np.pi**2 / 6, atol=0.08)
    np.testing.assert_allclose(np.corrcoef(noise.T), np.eye(4), atol=0.03)


def test_the_input_can_be_nudged_to_another_token():
    params, tokens = one_layer(), np.asarray(batch_of().tokens_BT)
    other, table = tokens.copy(), np.asarray(params["embed"]["tokens_VD"])
    other[:, 4] = 9
    nudged = hidden(params, ONE, tokens, embedding_offset_BTD=table[other] - table[tokens])
    np.testing.assert_allclose(
        nudged, hidden(params, ONE, other, embedding_offset_BTD=np.zeros_like(table[tokens])), atol=1e-4
    )


def test_the_derivative_through_the_reward_model_raises_the_reward():
    """One token after one prompt: the expected h, summed over the vocabulary, rises along the gradient; the
    differentiated value is that of the sampled tokens or, without straight-through, of mixtures."""
    policy, judge = one_layer(seed=1, scale=1.0), reward.init(jax.random.key(2), one_layer(seed=3), ONE.width)
    every = np.stack([np.full(64, 1), np.arange(64)], 1)
    h_V = np.asarray(jax.jit(reward.score, static_argnums=1)(judge, ONE, Batch(every, every > -1)))

    @jax.jit
    def first_token(policy):
        """The expected h, and sampled tokens."""
        logits_V = transformer.unembed(policy, transformer.hidden(policy, ONE, every[:1]))[0, 0]
        return jax.nn.softmax(logits_V) @ h_V, jax.random.categorical(jax.random.key(4), logits_V, shape=(512,))

    expected, tokens = map(np.asarray, first_token(policy))
    rows = Batch(np.stack([np.ones_like(tokens), tokens], 1), np.tile([False, True], (512, 1)))

    def objective(policy, **how):
        loss = through_reward.make_loss(ONE, ONE, 0.0, through_reward.ThroughRewardConfig(tau=0.5, **how))
        mean, metrics = loss({"policy": policy, "reference": policy, "reward": judge}, rows, jax.random.key(5))
        return mean.value, metrics["kl_exact"].value

    (value, kl_exact), slope = jax.jit(jax.value_and_grad(objective, has_aux=True))(policy)
    np.testing.assert_allclose(-value, h_V[tokens].mean(), rtol=1e-4)
    assert kl_exact == pytest.approx(0.0, abs=1e-6)
    slope = jax.tree.map(np.asarray, slope)
    step = 1e-2 / np.sqrt(sum((g**2).sum() for g in jax.tree.leaves(slope)))
    assert first_token(jax.tree.map(lambda w, g: w - step * g, policy, slope))[0] > expected + 1e-4
    mixed, _ = jax.jit(functools.partial(objective, straight_through=False))(policy)
    assert abs(mixed - value) > 1e-3


# ---- parts of the studies ----


def test_the_kl_of_a_policy_is_measured_on_its_own_answers():
    task, other = tiny_task(), one_layer(seed=1, scale=1.0)
    for policy in (task.start, other):
        answers = sample_task_answers(task, policy, task.heldout, jax.random.key(0))
        found = evaluate_answers(task, policy, answers)
        expected = log_probs(task, policy, answers.rows) - log_probs(task, task.start, answers.rows)
        np.testing.assert_allclose(found.kl, expected, atol=1e-6)
        assert (np.abs(found.kl) > 1e-2).any() == (policy is other)


def test_a_running_mean_passes_over_what_is_missing():
    curves = [[1.0, np.nan, 3.0, 5.0, np.nan], [3.0, np.nan, np.nan, np.nan, np.nan]]
    np.testing.assert_allclose(figures.running_mean(curves, 1), [2.0, np.nan, 3.0, 5.0, np.nan])
    np.testing.assert_allclose(figures.running_mean(curves, 3), [2.0, 7 / 3, 4.0, 4.0, 5.0])


def test_a_fit_of_iterations_counts_runs_not_iterations():
    """Prompts differ by noise; runs by noise, and by an offset that all iterations of one share. A KL may be below 0.
    Two runs give their range, six an interval that holds what made the data, however many iterations they have."""
    rng, kl_n = np.random.default_rng(0), np.array([0.2, 0.6, 1.2, 1.8, 2.5])
    gain_nP = laws.gold_gain("best-of-n", np.sqrt(kl_n), 0.5, 0.1)[:, None] + 0.05 * rng.normal(size=(5, 80))
    kl_SI = np.stack([np.linspace(-0.01, 40, 60)] * 6)
    own_S = 0.7 + 0.05 * rng.normal(size=(6, 1))
    with np.errstate(divide="ignore", invalid="ignore"):
        gain_SI = np.where(kl_SI > 0.1, laws.gold_gain("RL", laws.kl_distance(kl_SI), own_S, 0.2), 0.0)
    gain_SI += 0.01 * rng.normal(size=kl_SI.shape)
    made = {"alpha": 0.5, "beta": 0.1}, {"alpha": 0.7, "beta": 0.2}
    for fit, true in zip((laws.fit_best_of_n_law(kl_n, gain_nP), laws.fit_rl_law(kl_SI, gain_SI)), made, strict=True):
        for name, value in true.items():
            assert fit[name].low < value < fit[name].high and fit[name].high - fit[name].low < 0.2, (name, fit)
    twice = laws.fit_rl_law(np.repeat(kl_SI, 2, axis=1), np.repeat(gain_SI, 2, axis=1))
    assert twice["alpha"].high == pytest.approx(fit["alpha"].high)
    pair = laws.fit_rl_law(kl_SI[:2], gain_SI[:2])["alpha"]
    assert (pair.low, pair.high) == (min(pair.seeds), max(pair.seeds)) and pair.spread == "range of seeds"


def test_cells_are_made_once_a_study(tmp_path):
    made = []

    def start(value):
        with Run(tmp_path, arithmetic.Settings(seed=value), stage="arithmetic") as run, run.progress(3, "x") as bar:
            cells = ResultCache(run)
            found = cells("a part", lambda: made.append(value) or {"x": np.arange(3) + value}, 2, bar)
            weights = cells.model("m", lambda: made.append(-value) or (one_layer(seed=value), ONE), 1, bar)[0]
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
    [
        ("37+85=122", True),
        ("37+85=...122", True),
        ("37+85=12.2", False),
        ("37+85=122.", False),
        ("37+85=", False),
        ("37+85=0122", False),
        ("0+0=0", True),
        ("0+0=...", False),
    ],
)
def test_a_sum_is_right_or_wrong(text, right):
    assert sums.is_correct_sum(text) is right


def test_a_held_out_sum_is_not_trained_on_in_either_order():
    train, heldout = sums.split_sums(99, 500, seed=31)
    mirrors = {"+".join(one.split("+")[::-1]) for one in heldout}
    assert not {*train} & ({*heldout} | mirrors) and len({*heldout}) == 500
    assert len({*train} | {*heldout} | mirrors) == 100**2 and len({*train}) == len(train)
    assert any(one not in heldout for one in mirrors)  # larger and smaller number first
    with pytest.raises(UserError, match="less than half of the 5050 pairs"):
        arithmetic.Settings(heldout=2525)


def test_a_held_out_prompt_is_never_trained_on():
    task = tiny_task()
    with pytest.raises(UserError, match="1 of 2 held-out prompts are also trained on"):
        dataclasses.replace(task, prompts=[*task.prompts, task.heldout[0]])
    drawn = [[1, 2], [1, 3], [1, 2], [4], [1, 5]]
    assert distinct_prompts(drawn, 2, known=[(1, 3)]) == [[1, 2], [4]]
    with pytest.raises(UserError, match="only 4 new prompts, not 5"):
        distinct_prompts(drawn, 5)


def test_pairs_are_held_out_by_their_prefix(monkeypatch):
    """A prefix drawn twice counts once, so none is in both parts; every pair puts the better continuation first."""
    s = dataclasses.replace(imdb.PRESETS["toy"], prefixes=3, heldout=2, candidates=3)
    prefixes = [[1, 5], [1, 6], [1, 5], [1, 7], [1, 8], [1, 6], [1, 9]]
    gold = np.random.default_rng(0).permutation(15).astype(float)

    def sample(task, params, ids, key):
        rows = Batch(np.array([[*row, 20 + n] for n, row in enumerate(ids)]), np.array([[0, 0, 1]] * len(ids), bool))
        return SampledAnswers([""] * len(ids), rows, np.ones(len(ids), bool))

    monkeypatch.setattr(imdb, "sample_task_answers", sample)
    task = dataclasses.replace(tiny_task(), prompts=prefixes, heldout=[[1, 4]], gold=lambda texts: gold)
    made = imdb.make_pairs(s, task)
    seen = {split: {(*ids[:2],) for pair in pairs for ids, _ in pair} for split, pairs in made.items()}
    assert seen == {"train": {(1, 5), (1, 6), (1, 7)}, "heldout": {(1, 8), (1, 9)}}
    assert {split: len(pairs) for split, pairs in made.items()} == {"train": 9, "heldout": 6}
    assert all(
        gold[better[2] - 20] > gold[worse[2] - 20] for pairs in made.values() for (better, _), (worse, _) in pairs
    )


def test_votes_on_held_out_prompts_are_left_out():
    s, task = types.SimpleNamespace(seed=0, pool=2, heldout=1), tiny_task()
    pool = how_many_labels.pool_prompts(s, task)
    votes = [TokenizedPreference((([*ids, 2], [*[0] * len(ids), 1]),) * 2, 0) for ids in (*task.prompts, *task.heldout)]
    assert [list(one.prompt) for one in how_many_labels.leave_out_measured(s, task, votes)] == sorted(
        pool[:2], key=task.prompts.index
    )


def test_a_gain_is_paired_by_seed_and_prompt():
    """What seeds and prompts do to both settings alike cancels; best-of-n's one run is compared with the mean run."""
    rng = np.random.default_rng(0)
    seed_S, prompt_N = rng.normal(size=(6, 1)), rng.normal(size=50)

    def point(values_SN):
        numbers = dict.fromkeys(("judge", "logp", "kl", "length", "ended", "proxy"), prompt_N)
        return results.Point("", [Evaluation([], gold=row, **numbers) for row in values_SN])

    start, other = point(seed_S + prompt_N), point(seed_S + prompt_N + 0.5)
    gain, own = other.gain(start, "gold"), other["gold"]
    assert gain.mean == pytest.approx(0.5) and gain.high - gain.low < 1e-9 < 0.5 < own.high - own.low
    one = point([prompt_N + 0.5]).gain(start, "gold")
    assert one.mean == pytest.approx(0.5 - seed_S.mean()) and one.spread == "95 % interval over prompts"
    assert (
        results.summarise_points({"start": [start], "x": [other]}, ["gold"])["x"][0]["gold_gain"]["spread"]
        == own.spread
    )


def test_demonstrations_are_right_whatever_their_dots():
    tok = train_char([sums.CHARACTERS])
    prompts = ["9+9", "99+99", "0+7"]
    batch = next(sums.demonstration_batches(prompts, tok, 3, 64, seed=0))
    texts = [tok.decode([i for i in ids if not tok.is_special(int(i))]) for ids in batch.tokens_BT]
    answers = {prompt: {text.removeprefix(prompt) for text in texts if text.startswith(prompt)} for prompt in prompts}
    assert answers["99+99"] == {"198", ".198", "..198", "...198"} and answers["0+7"] == {"7", ".7", "..7", "...7"}
    assert sum(map(len, answers.values())) == 12 == len(set(texts))


def test_groups_weigh_as_their_method_says():
    """Dr. GRPO weights a group by 2 p (1 - p), p the fraction of right answers; GRPO's weight falls off more slowly."""
    score_BC = (np.arange(8) < np.arange(1, 8)[:, None]).astype(np.float32)

    @jax.jit
    def weights(score_BC):
        methods = [group_policy.METHODS[name] for name in ("GRPO", "GRPO, neither (Dr. GRPO)")]
        found = [group_policy.advantage_metrics(score_BC, one.advantage(score_BC)) for one in methods]
        return [[one[f"weight_{n}"].value for n in range(1, 8)] for one in found]

    grpo, unbiased = map(np.array, weights(score_BC))
    p = np.arange(1, 8) / 8
    np.testing.assert_allclose(unbiased, 2 * p * (1 - p), rtol=1e-5)
    np.testing.assert_allclose(grpo / grpo.max(), 2 * np.sqrt(p * (1 - p)), rtol=1e-3)


def test_labels_are_asked_for_with_equal_effort():
    s = dataclasses.replace(how_many_labels.PRESETS["toy"], labels=(8, 32), noise_labels=16)
    rng = np.random.default_rng(0)
    rows = [[[1, n], [0, 1]] for n in range((s.pool + s.heldout) * 8)]
    pool = {"rows": rows, "gold": rng.normal(size=(s.pool + s.heldout, 8)).tolist()}
    for one in how_many_labels.make_conditions(s):
        found = how_many_labels.label_pool(s, pool, one, 0)
        ids = [row[0][1] for ranking in found for row in ranking.rows]
        assert len(found) == one.choices and {len(ranking.rows) for ranking in found} == {one.candidates}
        assert len(set(ids)) == len(ids) and max(ids) < s.pool * 8
        if one.group.startswith("answers"):
            assert len(ids) == s.answers_read
    certain = dataclasses.replace(how_many_labels.make_conditions(s)[0], temperature=1e-6)
    for ranking in how_many_labels.label_pool(s, pool, certain, 0):
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
    seen = Evaluation(["a", "b"], *(np.arange(2.0) + n for n in range(6)), np.array([np.nan, 1.0]))
    back = Evaluation.from_json(json.loads(json.dumps({**seen.to_json(), "proxy": [None, 1.0]})))
    for name in ("gold", "kl", "ended", "proxy"):
        np.testing.assert_array_equal(getattr(back, name), getattr(seen, name))
