"""PPO: the parts, the identities that hold at its start, and that it reaches a known optimum."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxgpt import kl, losses, model, optim, ppo, returns, reward, sharding, train
from jaxgpt.config import ModelConfig, UserError
from jaxgpt.ppo import PPOConfig, Prompts
from jaxgpt.structs import Batch
from tests.helpers import AS_USERS_RUN_IT, TINY, params_of, prompts_of

collect = jax.jit(ppo.collect, static_argnums=(1, 2), static_argnames="stop")
score = jax.jit(ppo.score, static_argnums=(1, 2))


def started(config: PPOConfig, rows: int = 8, learning_rate: float = 1e-3, scale: float = 2.0):
    """A jitted iteration, its state and prompts."""
    tx = optim.adam_tf(optax.constant_schedule(learning_rate))
    policy = params_of(scale=scale)
    reward_params = reward.init(jax.random.key(9), params_of(seed=1), TINY.width)
    state = ppo.init(policy, TINY, tx, {"reward": reward_params})
    iteration = functools.partial(
        ppo.ppo_iteration, config=TINY, ppo=config, tx=tx, stop=5,
        reward_fn=lambda params, rows: reward.score(params["reward"], TINY, rows),
    )  # fmt: skip
    return iteration, state, Prompts(*prompts_of(rows, 6))


@pytest.mark.slow  # compiled as users run it; tests/test_study.py has the first ratio too
@pytest.mark.parametrize(
    ("epochs", "minibatches", "temperature", "whole_logits"), [(1, 1, 1.0, 2**29), (2, 4, 0.7, 2**12)]
)
def test_minibatches_and_epochs_start_at_ratio_one_exactly_and_are_traced_once(
    epochs, minibatches, temperature, whole_logits, monkeypatch
):
    """With the logits whole, and in tiles."""
    monkeypatch.setattr(model, "WHOLE_LOGITS", whole_logits)
    config = PPOConfig(new_tokens=10, epochs=epochs, minibatches=minibatches, temperature=temperature)
    iteration, state, prompts = started(config)
    program = jax.jit(iteration, donate_argnums=(0, 1), compiler_options=AS_USERS_RUN_IT)
    control: ppo.Controller = kl.AdaptiveKL(jnp.float32(0.1))
    for i in range(3):
        state, control, metrics = program(state, control, prompts, jax.random.key(i))
        found = train.to_floats(metrics)
        assert found["ratio_error_first"] == 0.0
        assert found["sampler_gap_max"] < 1e-5
        if epochs > 1:
            assert found["ratio_error_max"] > 0
    assert program._cache_size() == 1


def test_the_first_kl_is_zero_and_the_reference_stays():
    iteration, state, prompts = started(PPOConfig(new_tokens=10))
    before = optim.copy(state.frozen)
    program = jax.jit(iteration, donate_argnums=(0, 1))
    state, control, first = program(state, kl.FixedKL(jnp.float32(0.1)), prompts, jax.random.key(0))
    state, _, second = program(state, control, prompts, jax.random.key(1))
    assert float(first["kl"]) == pytest.approx(0.0, abs=1e-5)
    assert train.to_floats(first)["ratio_error_first"] == train.to_floats(second)["ratio_error_first"] == 0.0
    assert abs(float(second["kl"])) > 1e-4
    jax.tree.map(np.testing.assert_array_equal, before, state.frozen)


def test_rewards_of_an_answer_sum_to_score_minus_beta_kl():
    iteration, state, prompts = started(PPOConfig(new_tokens=10))
    config = PPOConfig(new_tokens=10)
    state = dataclasses.replace(state, trainable={**state.trainable, "policy": params_of(seed=7, scale=2.0)})
    rows, sampler_logp, ended = collect(state, TINY, config, prompts, jax.random.key(0), stop=5)
    experience, _ = score(state, TINY, config, rows, sampler_logp, ended, jnp.arange(8.0))
    reward_BT = returns.shaped_rewards(
        experience.score_B, kl.k1(experience.logp_BT, experience.ref_logp_BT), experience.mask_BT, 0.3
    )
    kl_B = kl.sequence_kl(experience.logp_BT, experience.ref_logp_BT, experience.mask_BT)
    np.testing.assert_allclose(reward_BT.sum(1), experience.score_B - 0.3 * kl_B, rtol=1e-4)


def test_answers_that_never_ended_get_the_fixed_score():
    config = PPOConfig(new_tokens=10, unfinished_score=-7.0)
    _, state, prompts = started(config, rows=64)
    rows, sampler_logp, ended = collect(state, TINY, config, prompts, jax.random.key(1), stop=5)
    experience, _ = score(state, TINY, config, rows, sampler_logp, ended, jnp.full(64, 2.0))
    assert ended.any() and not ended.all()
    np.testing.assert_array_equal(experience.score_B, np.where(ended, 2.0, -7.0))


def test_the_critic_starts_at_zero_and_reads_the_state_before_the_token():
    config = PPOConfig(new_tokens=10)
    _, state, prompts = started(config)
    rows, sampler_logp, ended = collect(state, TINY, config, prompts, jax.random.key(1), stop=5)
    experience, _ = score(state, TINY, config, rows, sampler_logp, ended, jnp.zeros(8))
    assert (experience.value_BT == 0).all()
    head = {"kernel_D": jnp.linspace(-1.0, 1.0, TINY.width), "bias": jnp.zeros(())}
    state = dataclasses.replace(state, trainable={**state.trainable, "value_head": head})
    before, _ = score(state, TINY, config, rows, sampler_logp, ended, jnp.zeros(8))
    t = int(jnp.argmax(rows.mask_BT[0])) + 1
    other = Batch(rows.tokens_BT.at[0, t].set(63), rows.mask_BT)
    after, _ = score(state, TINY, config, other, sampler_logp, ended, jnp.zeros(8))
    np.testing.assert_array_equal(before.value_BT[0, : t + 1], after.value_BT[0, : t + 1])
    assert float(jnp.abs(before.value_BT[0, t + 1] - after.value_BT[0, t + 1])) > 1e-4


@pytest.mark.slow  # tests/test_sharding.py has the same for a larger mesh
def test_divided_rows_give_the_update_of_one_device():
    config = PPOConfig(new_tokens=8, epochs=2, minibatches=1)
    tx = optax.sgd(0.05)
    _, state, prompts = started(config, rows=16)
    state = ppo.init(params_of(scale=2.0), TINY, tx, {})
    rows, sampler_logp, ended = collect(state, TINY, config, prompts, jax.random.key(1), stop=5)
    score_B = jnp.linspace(-1.0, 1.0, 16)

    def learn(state, rows, sampler_logp, ended, score_B):
        experience, _ = score(state, TINY, config, rows, sampler_logp, ended, score_B)
        control = kl.FixedKL(jnp.float32(0.1))
        return ppo.update(state, TINY, config, tx, experience, control, jax.random.key(2))[0].trainable

    alone = jax.jit(learn)(state, rows, sampler_logp, ended, score_B)
    mesh = sharding.data_mesh()
    divided = sharding.place_rows((rows, sampler_logp, ended, score_B), mesh)
    together = jax.jit(learn)(sharding.replicate(state, mesh), *divided)
    for a, b in zip(jax.tree.leaves(alone), jax.tree.leaves(together), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_impossible_settings_are_refused():
    with pytest.raises(UserError, match="batch of 10 prompts doesn't divide into 4"):
        ppo.check_batch(10, PPOConfig(minibatches=4), TINY, 5)
    with pytest.raises(UserError, match="block of 48"):
        ppo.check_batch(8, PPOConfig(new_tokens=44), TINY, 5)
    with pytest.raises(UserError, match="temperature"):
        PPOConfig(temperature=0.0)


@pytest.mark.slow
def test_ppo_finds_the_optimum_that_can_be_enumerated():
    """One prompt, two-token answers over 4 letters and the stop: pi* is proportional to rho exp(r / beta)."""
    config = ModelConfig(layers=1, width=32, heads=2, block=8, vocab=10)
    setting = PPOConfig(new_tokens=3, epochs=2, minibatches=1, lam=1.0, unfinished_score=0.0, value_weight=0.5)
    steps, rows, beta = 600, 256, 0.5
    tx = optim.adam_tf(optim.linear_to_zero(3e-3, steps * setting.epochs))
    rho = params_of(config, scale=1.0)
    state = ppo.init(optim.copy(rho), config, tx, {})
    prompts = Prompts(jnp.tile(jnp.array([[6, 7]]), (rows, 1)), jnp.full(rows, 2))

    def reward_fn(params, batch):  # an 8 anywhere in the answer is worth 1
        return ((batch.tokens_BT == 8) & batch.mask_BT).any(1).astype(jnp.float32)

    # answers that never end count through reward_fn as well: every episode is scored
    def iteration(state, control, prompts, key):
        sample_key, update_key = jax.random.split(key)
        batch, sampler_logp, ended = collect(state, config, setting, prompts, sample_key, stop=5)
        all_ended = jnp.ones_like(ended)
        experience, _ = score(state, config, setting, batch, sampler_logp, all_ended, reward_fn(None, batch))
        return ppo.update(state, config, setting, tx, experience, control, update_key)

    program = jax.jit(iteration, donate_argnums=(0, 1))
    control: ppo.Controller = kl.FixedKL(jnp.float32(beta))
    for i in range(steps):
        state, control, _ = program(state, control, prompts, jax.random.key(i))

    answers = _all_answers(config.vocab, 3)
    batch = Batch(jnp.concatenate([jnp.tile(jnp.array([[6, 7]]), (len(answers), 1)), answers], 1),
                  jnp.concatenate([jnp.zeros((len(answers), 2), bool), answers >= 0], 1))  # fmt: skip
    batch = Batch(jnp.maximum(batch.tokens_BT, 0), batch.mask_BT)
    nll = functools.partial(_answer_logp, config=config, batch=batch)
    reference, policy = nll(rho), nll(state.trainable["policy"])
    assert float(jnp.exp(reference).sum()) == pytest.approx(1.0, abs=1e-4)
    optimum = jax.nn.log_softmax(reference + reward_fn(None, batch) / beta)
    divergence = float((jnp.exp(policy) * (policy - optimum)).sum())
    assert divergence < 0.01 < float((jnp.exp(reference) * (reference - optimum)).sum())


def _all_answers(vocab: int, length: int):
    """Every answer: stop (5) ends it early; what follows is -1."""
    rows = [[]]
    done = []
    for _ in range(length):
        grown = [[*row, v] for row in rows for v in range(vocab)]
        done += [row + [-1] * (length - len(row)) for row in grown if row[-1] == 5]
        rows = [row for row in grown if row[-1] != 5]
    return jnp.array(done + rows)


def _answer_logp(params, config, batch):
    logp, _ = model.score(params, config, batch)
    return jnp.where(batch.mask_BT, logp, 0.0).sum(1)


def test_losses_module_is_what_the_update_uses():
    """At the first step the surrogate's gradient is the policy gradient of the whitened advantages."""
    config = PPOConfig(new_tokens=8, value_weight=0.0)
    _, state, prompts = started(config)
    rows, sampler_logp, ended = collect(state, TINY, config, prompts, jax.random.key(1), stop=5)
    experience, _ = score(state, TINY, config, rows, sampler_logp, ended, jnp.linspace(-1, 1, 8))
    batch = ppo.targets(experience, config, jnp.float32(0.1))
    loss = ppo.make_loss(TINY, config)
    slope = jax.jit(jax.grad(lambda p: loss({**state.params, "policy": p}, batch, None)[0].value))(
        state.trainable["policy"]
    )

    def policy_gradient(policy):
        logp, _ = model.score(policy, TINY, rows)
        return losses.reduce(-logp * batch.advantage_BT, rows.mask_BT).value

    expected = jax.jit(jax.grad(policy_gradient))(state.trainable["policy"])
    for a, b in zip(jax.tree.leaves(slope), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_a_host_reward_gives_the_numbers_of_the_same_reward_in_jax():
    """`host_iteration` with h = share of token 7 in the answer against `ppo_iteration` with the same, to rounding."""
    config = PPOConfig(new_tokens=6, epochs=2, temperature=0.9)
    tx = optax.sgd(0.1)
    prompts = Prompts(*prompts_of(8, 5))
    asked = []

    def in_jax(params, rows):
        return jnp.where(rows.mask_BT, rows.tokens_BT == 7, False).sum(1) / rows.mask_BT.sum(1)

    def on_host(rows):
        assert isinstance(rows.tokens_BT, np.ndarray)
        asked.append(len(rows.tokens_BT))
        return [(t[m] == 7).mean() for t, m in zip(rows.tokens_BT, rows.mask_BT, strict=True)]

    def start():
        return ppo.init(params_of(), TINY, tx, {}), kl.FixedKL(jnp.float32(0.1))

    one = jax.jit(functools.partial(ppo.ppo_iteration, config=TINY, ppo=config, tx=tx, reward_fn=in_jax, stop=5))
    other = ppo.host_iteration(TINY, config, tx, on_host, stop=5)
    key = jax.random.key(0)
    expected, _, metrics = one(*start(), prompts, jax.random.clone(key))
    found, _, others = other(*start(), prompts, key)
    assert asked == [8] and metrics.keys() == others.keys()
    for name in ("score", "kl", "policy_loss", "length"):
        np.testing.assert_allclose(train.to_floats(metrics)[name], train.to_floats(others)[name], atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), expected.trainable, found.trainable)
    for wrong in (lambda rows: [1.0], lambda rows: [float("nan")] * 8):
        with pytest.raises(UserError, match="one finite number each"):
            ppo.host_iteration(TINY, config, tx, wrong, stop=5)(*start(), prompts, jax.random.key(1))
