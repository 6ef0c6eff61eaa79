"""PPO: the parts, the identities that hold at its start, and that it reaches a known optimum."""

import dataclasses
import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxgpt import losses, training
from jaxgpt.config import ModelConfig
from jaxgpt.errors import UserError
from jaxgpt.losses import kl, returns
from jaxgpt.models import transformer
from jaxgpt.rlhf import ppo
from jaxgpt.rlhf.ppo import PPOConfig
from jaxgpt.structs import Batch, Prompts
from jaxgpt.training import optim
from tests.helpers import AS_USERS_RUN_IT, TINY, prompts_of, random_params

collect = jax.jit(ppo.collect, static_argnames="policy")
score = jax.jit(ppo.score, static_argnames=("policy", "ppo"))
MODEL = dataclasses.replace(TINY, layers=1)
PPO = PPOConfig(new_tokens=8, epochs=2, minibatches=2, temperature=0.9, unfinished_score=-7.0)
POLICY = ppo.policy_of(MODEL, PPO, stop=5)
SGD = optax.sgd(0.1)
ROWS, BETA = 32, 0.1


def prompts() -> Prompts:
    return Prompts(*prompts_of(ROWS, 6))


@jax.jit
def started(policy, frozen):
    return ppo.init(POLICY, policy, SGD, frozen)


def share(params, rows):
    """The reward: how much of an answer is the token `target`."""
    return jnp.where(rows.mask_BT, rows.tokens_BT == params["target"], False).sum(1) / rows.mask_BT.sum(1)


def start():
    return started(random_params(MODEL, scale=2.0), {"target": np.int32(7)}), kl.FixedKL(np.float32(BETA))


@functools.cache
def sampled():
    """Answers of the first policy."""
    return jax.device_get(collect(start()[0], prompts(), jax.random.key(2), policy=POLICY))


def scored(rows=None, scores=1.0, **other_params):
    """What `score` makes of the sampled rows, or of others."""
    state = start()[0]
    state = dataclasses.replace(state, trainable={**state.trainable, **other_params})
    experience = sampled() if rows is None else sampled().replace(rows=rows)
    scores = np.broadcast_to(np.float32(scores), ROWS)
    return jax.device_get(score(state, experience, scores, policy=POLICY, ppo=PPO)[0])


ITERATION = jax.jit(
    functools.partial(ppo.ppo_iteration, policy=POLICY, ppo=PPO, tx=SGD, reward_fn=share), donate_argnums=(0, 1)
)


@functools.cache
def two_iterations():
    """(state, metrics) at the start and after each."""
    state, control = start()
    history = [(jax.device_get(state), {})]
    for seed in range(2):
        state, control, _, metrics = ITERATION(state, control, prompts(), jax.random.key(seed))
        history.append((jax.device_get(state), training.to_floats(metrics)))
    return history


def test_a_trace_names_the_phases_and_the_parts_of_the_model():
    program = ITERATION.lower(*start(), prompts(), jax.random.key(0)).as_text(dialect="hlo", debug_info=True)
    names = [set(re.findall(r"\w+", name)) for name in re.findall(r'op_name="([^"]+)"', program)]
    model = {"embed", "attention", "mlp", "head"}
    assert {"collect", "reward", "score", "update", "loss", "optimiser"} | model <= set().union(*names)
    assert model | {"sample"} <= set().union(*(name for name in names if "collect" in name))
    assert model | {"loss"} <= set().union(*(name for name in names if "transpose" in name)), "of the gradients"


def test_the_first_kl_is_zero_and_the_reference_stays():
    (before, _), (_, first), (after, second) = two_iterations()
    assert first["kl"] == pytest.approx(0.0, abs=1e-5)
    assert first["ratio_error_first"] == second["ratio_error_first"] == 0.0
    assert abs(second["kl"]) > 1e-4
    assert first["sampler_gap_max"] < 1e-5 and second["sampler_gap_max"] < 1e-5
    chex.assert_trees_all_equal(before.frozen, after.frozen)


def test_a_host_reward_gives_the_numbers_of_the_same_reward_in_jax():
    """`host_iteration`, four answers at a time, against `ppo_iteration` with the share of token 7, to rounding."""
    asked, wrong = [], [[1.0], [float("nan")] * ROWS]

    def on_host(rows):
        assert isinstance(rows.tokens_BT, np.ndarray)
        asked.append(len(rows.tokens_BT))
        return wrong.pop() if wrong else [(t[m] == 7).mean() for t, m in zip(rows.tokens_BT, rows.mask_BT, strict=True)]

    policy = ppo.policy_of(MODEL, PPO, stop=5, slots=4)
    iteration = ppo.host_iteration(policy=policy, ppo=PPO, tx=SGD, reward_fn=on_host)
    while wrong:
        with pytest.raises(UserError, match="one finite number per answer"):
            iteration(*start(), prompts(), jax.random.key(0))
    found, _, _, metrics = iteration(*start(), prompts(), jax.random.key(0))
    metrics, (state, expected) = training.to_floats(metrics), two_iterations()[1]
    assert asked == [ROWS] * 3 and metrics.keys() == expected.keys()
    for name in ("score", "kl", "policy_loss", "length"):
        np.testing.assert_allclose(metrics[name], expected[name], atol=1e-5, err_msg=name)
    chex.assert_trees_all_close(found.trainable, state.trainable, atol=1e-5, rtol=1e-7)


def test_rewards_of_an_answer_sum_to_score_minus_beta_kl():
    experience = scored(policy=random_params(MODEL, seed=7, scale=2.0))

    @jax.jit
    def summed(x):
        return returns.shaped_rewards(x.score_B, kl.k1(x.logp_BT, x.ref_logp_BT), x.mask_BT, 0.3).sum(1)

    kl_B = np.where(experience.mask_BT, experience.logp_BT - experience.ref_logp_BT, 0.0).sum(1)
    assert np.abs(kl_B).max() > 0.1
    np.testing.assert_allclose(summed(experience), experience.score_B - 0.3 * kl_B, rtol=1e-4)


def test_answers_that_never_ended_get_the_fixed_score():
    experience = scored(scores=2.0)
    assert experience.ended_B.any() and not experience.ended_B.all()
    np.testing.assert_array_equal(experience.score_B, np.where(experience.ended_B, 2.0, -7.0))


def test_the_critic_starts_at_zero_and_reads_the_state_before_the_token():
    assert (scored().value_BT == 0).all()
    rows = sampled().rows
    head = {"kernel_D": np.linspace(-1.0, 1.0, MODEL.width, dtype=np.float32), "bias": np.float32(0)}
    t = int(np.argmax(rows.mask_BT[0])) + 1
    tokens = rows.tokens_BT.copy()
    tokens[0, t] = 63
    before, after = (scored(x, value_head=head).value_BT[0] for x in (rows, Batch(tokens, rows.mask_BT)))
    np.testing.assert_array_equal(before[: t + 1], after[: t + 1])
    assert np.abs(before[t + 1] - after[t + 1]) > 1e-4


def test_the_first_step_follows_the_policy_gradient_of_the_whitened_advantages():
    setting = dataclasses.replace(PPO, value_weight=0.0)
    experience, state = scored(scores=np.linspace(-1, 1, ROWS)), start()[0]

    @jax.jit
    def slopes(params, experience):
        batch = ppo.compute_targets(experience, setting, BETA)

        def surrogate(policy):
            return ppo.make_loss(POLICY, setting)({**params, "policy": policy}, batch, None)[0].value

        def policy_gradient(policy):
            rows = Batch(experience.tokens_BT, experience.mask_BT)
            logp_BT, _ = transformer.token_log_probs(policy, MODEL, rows, temperature=setting.temperature)
            return losses.reduce(-logp_BT * batch.advantage_BT, rows.mask_BT).value

        return batch.advantage_BT, jax.grad(surrogate)(params["policy"]), jax.grad(policy_gradient)(params["policy"])

    advantage_BT, found, expected = slopes(state.params, experience)
    advantages = np.asarray(advantage_BT)[experience.mask_BT]
    assert advantages.mean() == pytest.approx(0, abs=1e-5) and advantages.std() == pytest.approx(1, rel=1e-3)
    chex.assert_trees_all_close(found, expected, atol=1e-5, rtol=1e-7)


@pytest.mark.slow  # compiled as users run it; tests/study/test_many.py has the first ratio too
@pytest.mark.parametrize(
    ("epochs", "minibatches", "temperature", "whole_logits"), [(1, 1, 1.0, 2**29), (2, 4, 0.7, 2**12)]
)
def test_minibatches_and_epochs_start_at_ratio_one_exactly_and_are_traced_once(
    epochs, minibatches, temperature, whole_logits
):
    """With the logits whole, and in tiles."""
    config = dataclasses.replace(PPO, epochs=epochs, minibatches=minibatches, temperature=temperature)
    policy = ppo.policy_of(dataclasses.replace(MODEL, logits_bytes=whole_logits), config, stop=5)
    iteration = functools.partial(ppo.ppo_iteration, policy=policy, ppo=config, tx=SGD, reward_fn=share)
    chex.clear_trace_counter()
    once = chex.assert_max_traces(lambda *arguments: iteration(*arguments), n=1)
    program = jax.jit(once, donate_argnums=(0, 1), compiler_options=AS_USERS_RUN_IT)
    state, _ = start()
    control: ppo.Controller = kl.AdaptiveKL(jnp.float32(0.1))
    for i in range(3):
        state, control, _, metrics = program(state, control, prompts(), jax.random.key(i))
        found = training.to_floats(metrics)
        assert found["ratio_error_first"] == 0.0
        assert found["sampler_gap_max"] < 1e-5
        if epochs > 1:
            assert found["ratio_error_max"] > 0


def test_impossible_settings_are_refused():
    with pytest.raises(UserError, match="batch of 10 prompts doesn't divide into 4"):
        ppo.check_batch(10, PPOConfig(minibatches=4), TINY.block, 5)
    with pytest.raises(UserError, match="block of 48"):
        ppo.check_batch(8, PPOConfig(new_tokens=44), TINY.block, 5)
    with pytest.raises(UserError, match="horizon of 16 episodes .* above 16"):
        ppo.check_batch(80, PPOConfig(), TINY.block, 5, kl.FixedKL(0.1), kl.AdaptiveKL(0.1, 6.0, 16.0))
    with pytest.raises(UserError, match="temperature"):
        PPOConfig(temperature=0.0)


@pytest.mark.slow
def test_ppo_finds_the_optimum_that_can_be_enumerated():
    """One prompt, two-token answers over 4 letters and the stop: pi* is proportional to rho exp(r / beta)."""
    config = ModelConfig(layers=1, width=32, heads=2, block=8, vocab=10)
    setting = PPOConfig(new_tokens=3, epochs=2, minibatches=1, lam=1.0, unfinished_score=0.0, value_weight=0.5)
    steps, rows, beta = 200, 256, 0.5
    policy = ppo.policy_of(config, setting, stop=5)
    tx = optim.adam_tf(optim.linear_to_zero(6e-3, steps * setting.epochs))
    rho = random_params(config, scale=1.0)
    prompts = Prompts(np.tile([[6, 7]], (rows, 1)), np.full(rows, 2))

    def reward_fn(tokens, mask):  # an 8 anywhere in the answer is worth 1
        return ((tokens == 8) & mask).any(1).astype(np.float32)

    # answers that never end count through reward_fn as well: every episode is scored
    def iteration(state, control, prompts, key):
        sample_key, update_key = jax.random.split(key)
        found = collect(state, prompts, sample_key, policy=policy)
        found = found.replace(answers=found.answers.replace(ended_B=jnp.ones_like(found.ended_B)))
        score_B = reward_fn(found.rows.tokens_BT, found.rows.mask_BT)
        return ppo.learn(state, control, found, score_B, update_key, policy=policy, ppo=setting, tx=tx)[:2]

    program = jax.jit(iteration, donate_argnums=(0, 1), compiler_options={"xla_backend_optimization_level": 2})
    state, control = jax.jit(lambda rho: ppo.init(policy, rho, tx, {}))(rho), kl.FixedKL(jnp.float32(beta))
    for i in range(steps):
        state, control = program(state, control, prompts, jax.random.key(i))

    answers = _all_answers(config.vocab, 3)
    tokens = np.concatenate([np.tile([[6, 7]], (len(answers), 1)), np.maximum(answers, 0)], 1)
    mask = np.concatenate([np.zeros((len(answers), 2), bool), answers >= 0], 1)
    answer_logp = jax.jit(lambda params: transformer.answer_logp(params, config, Batch(tokens, mask)))
    reference, learned = (np.asarray(answer_logp(params), float) for params in (rho, state.trainable["policy"]))
    assert np.exp(reference).sum() == pytest.approx(1.0, abs=1e-4)
    optimum = reference + reward_fn(tokens, mask) / beta
    optimum -= np.logaddexp.reduce(optimum)
    divergence = (np.exp(learned) * (learned - optimum)).sum()
    assert divergence < 0.01 < (np.exp(reference) * (reference - optimum)).sum()


def _all_answers(vocab: int, length: int):
    """Every answer: stop (5) ends it early; what follows is -1."""
    rows = [[]]
    done = []
    for _ in range(length):
        grown = [[*row, v] for row in rows for v in range(vocab)]
        done += [row + [-1] * (length - len(row)) for row in grown if row[-1] == 5]
        rows = [row for row in grown if row[-1] != 5]
    return np.array(done + rows)
