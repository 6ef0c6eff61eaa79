"""Adapters: the model is unchanged at first, frozen weights stay, and merging leaves the output unchanged."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxgpt import losses, training
from jaxgpt.errors import UserError
from jaxgpt.losses.kl import FixedKL
from jaxgpt.models import lora, transformer
from jaxgpt.rlhf import dpo, ppo
from jaxgpt.rlhf.policies import transformer_policy
from jaxgpt.rlhf.ppo import PPOConfig
from jaxgpt.structs import Batch, Preferences, Prompts
from jaxgpt.training import optim
from tests.helpers import FAMILY, generate, prompts_of, random_params, score, tokens_of

GPT2, LLAMA = (dataclasses.replace(FAMILY[name], layers=1) for name in ("gpt2", "llama"))
both_families = pytest.mark.parametrize("config", [GPT2, FAMILY["llama"]], ids=["gpt2", "llama"])
init, merge = jax.jit(lora.init, static_argnums=2), jax.jit(lora.merge)


def adapters_of(params, rank=3, seed=4):
    """Adapters as after training: B is no longer 0."""
    rng = np.random.default_rng(seed)

    def draw(like):
        size = 0.3 + (like.shape[1] == rank) / np.sqrt(like.shape[0])
        return size * rng.standard_normal(like.shape, np.float32)

    return jax.tree.map(draw, jax.eval_shape(lambda: lora.init(jax.random.key(0), params, rank)))


def leaves(tree):
    return {jax.tree_util.keystr(path): np.asarray(x) for path, x in jax.tree_util.tree_flatten_with_path(tree)[0]}


def log_probs(params, config):
    return np.asarray(score(params, config, Batch(tokens_of(3, 12), np.ones((3, 12), bool)))[0])


@both_families
def test_new_adapters_change_nothing_and_sit_at_every_dense_layer(config):
    params = random_params(config)
    adapters = init(jax.random.key(0), params, 3)
    kernels = [path for path in leaves(params) if path.endswith("['kernel']")]
    assert len(leaves(adapters)) == 2 * len(kernels) > 0
    found, expected = log_probs(training.merge_params(params, adapters), config), log_probs(params, config)
    np.testing.assert_allclose(found, expected, atol=2e-6)  # another program rounds differently
    assert all(not x.any() for path, x in leaves(adapters).items() if "lora_b" in path)
    assert len({x.tobytes() for path, x in leaves(adapters).items() if "lora_a" in path}) == len(kernels)


@both_families
def test_merging_computes_the_same(config):
    params = random_params(config)
    both = training.merge_params(params, adapters_of(params))
    whole = merge(both)
    assert leaves(whole).keys() == leaves(params).keys() == leaves(lora.without_adapters(both)).keys()
    np.testing.assert_allclose(log_probs(both, config), log_probs(whole, config), atol=2e-4)
    assert np.abs(log_probs(whole, config) - log_probs(params, config)).max() > 0.1


@pytest.mark.slow  # PPO's `sampler_gap_max` below already shows that the sampler uses adapters
def test_merging_computes_and_samples_the_same_with_plain_gradients():
    config = dataclasses.replace(LLAMA, gradients="plain")
    params = random_params(config)
    both = training.merge_params(params, adapters_of(params))
    whole = merge(both)
    np.testing.assert_allclose(log_probs(both, config), log_probs(whole, config), atol=2e-4)
    run = {"new_tokens": 6, "stop": 5}
    a, b = (generate(p, config, *prompts_of(2, 5), jax.random.key(1), **run) for p in (both, whole))
    np.testing.assert_array_equal(a.tokens_BA, b.tokens_BA)


def test_only_adapters_are_trained_and_their_gradient_is_that_of_the_merged_kernel():
    """dL/dA = dL/dW B^T and dL/dB = A^T dL/dW."""
    params, batch = random_params(LLAMA, scale=2.0), Batch(tokens_of(3, 12), np.tile(np.arange(12) > 0, (3, 1)))
    adapters = adapters_of(params)

    @jax.jit
    def slopes(params, adapters):
        def loss(tree):
            logp_BT, _ = transformer.token_log_probs(tree, LLAMA, batch)
            return losses.reduce(-logp_BT, batch.mask_BT).value

        both = training.merge_params(params, adapters)
        return jax.grad(lambda x: loss(training.merge_params(params, x)))(adapters), jax.grad(loss)(lora.merge(both))

    small, large = jax.device_get(slopes(params, adapters))
    for name, pair in adapters["block_0"].items():
        slope, found = large["block_0"][name]["kernel"], small["block_0"][name]
        for part, want in (("lora_a", slope @ pair["lora_b"].T), ("lora_b", pair["lora_a"].T @ slope)):
            np.testing.assert_allclose(found[part], want, atol=2e-4 * np.abs(want).max(), err_msg=f"{name} {part}")


def test_sft_with_adapters_learns_and_leaves_the_rest():
    params, tx = random_params(LLAMA, scale=1.0), optax.adam(1e-2)
    batch = Batch(tokens_of(4, 12), np.tile(np.arange(12) > 0, (4, 1)))

    @jax.jit
    def start(key, params):
        trainable, frozen = lora.split_trainable(key, params, 4)
        return training.init_state(trainable, tx, frozen)

    state = start(jax.random.key(0), params)
    step = jax.jit(training.make_train_step(training.make_nll(LLAMA), tx), donate_argnums=0)
    values = []
    for _ in range(30):
        state, metrics = step(state, batch, None)
        values.append(float(metrics["loss"].value))
    assert values[-1] < values[0] - 0.3
    chex.assert_trees_all_equal(state.frozen, params)
    assert sum(x.size for x in jax.tree.leaves(state.opt_state)) < 0.5 * transformer.count_parameters(params)


def test_dpo_with_adapters_starts_at_log_b_and_equals_dpo_with_a_reference():
    params = random_params(GPT2, scale=2.0)
    mask = np.broadcast_to(np.arange(16) >= 6, (2, 3, 16))
    batch = Preferences(np.reshape(tokens_of(6, 16), mask.shape), mask, np.array([0, 2]), np.ones((2, 3), bool))

    @jax.jit
    def loss(params, batch):
        return dpo.make_loss(transformer_policy(GPT2), 0.1)(params, batch, None)[0].value

    first = training.merge_params({"policy": params}, {"policy": init(jax.random.key(0), params, 3)})
    assert float(loss(first, batch)) == pytest.approx(np.log(3), rel=1e-5)
    later = training.merge_params(params, adapters_of(params))
    by_base, by_copy = (
        float(loss(tree, batch)) for tree in ({"policy": later}, {"policy": merge(later), "reference": params})
    )
    assert by_base == pytest.approx(by_copy, rel=1e-3) and by_base != pytest.approx(np.log(3), rel=1e-2)


def test_a_ppo_iteration_with_adapters():
    """The first ratio is exactly 1, the first KL 0; afterwards only adapters and the value head have changed, and the
    sampler uses the adapters."""
    params, tx = random_params(GPT2, scale=1.0), optim.adam_tf(optax.constant_schedule(1e-2))
    settings = PPOConfig(new_tokens=8, epochs=2, minibatches=2)
    policy = ppo.policy_of(GPT2, settings, stop=5)

    @jax.jit
    def start(key, params):
        return ppo.init(policy, params, tx, {"target": 20}, lora.init(key, params, 3))

    prompts = Prompts(*prompts_of(16, 5))

    @jax.jit
    def iterate(state, key):
        return ppo.ppo_iteration(
            state,
            FixedKL(jnp.float32(0.0)),
            prompts,
            key,
            policy=policy,
            ppo=settings,
            tx=tx,
            reward_fn=lambda params, rows: (rows.tokens_BT < params["target"]).mean(1).astype(jnp.float32),
        )

    state = start(jax.random.key(0), params)
    assert "reference" not in state.frozen
    state, _, _, metrics = iterate(state, jax.random.key(1))
    floats = training.to_floats(metrics)
    assert floats["ratio_error_first"] == 0.0 and abs(floats["kl"]) < 1e-5
    chex.assert_trees_all_equal(state.frozen["policy"], params)
    assert np.abs(state.trainable["policy"]["block_0"]["qkv"]["lora_b"]).max() > 0
    floats = training.to_floats(iterate(state, jax.random.key(2)).metrics)
    assert floats["kl"] > 1e-4 and floats["sampler_gap_max"] < 1e-5


def test_a_rank_below_one_is_refused():
    with pytest.raises(UserError, match="rank must be at least 1"):
        lora.init(jax.random.key(0), {}, -1)
