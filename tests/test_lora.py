"""Adapters: the model is unchanged at first, the frozen rest stays, and merging computes the same."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxgpt import dpo, lora, losses, model, ppo, train
from jaxgpt.config import UserError
from jaxgpt.kl import FixedKL
from jaxgpt.ppo import PPOConfig, Prompts
from jaxgpt.structs import Preferences
from tests.helpers import FAMILY, TINY, batch_of, generate, params_of, prompts_of, score

LLAMA = FAMILY["llama"]


def adapters_of(params, rank=3, seed=4, size=0.3):
    """Trained ones: B is no longer 0."""
    made = lora.init(jax.random.key(seed), params, rank)
    keys = iter(jax.random.split(jax.random.key(seed + 1), 100))
    return jax.tree.map(lambda x: x + size * jax.random.normal(next(keys), x.shape), made)


def leaves(tree):
    return {jax.tree_util.keystr(path): np.asarray(x) for path, x in jax.tree_util.tree_flatten_with_path(tree)[0]}


@pytest.mark.parametrize("config", [TINY, LLAMA], ids=["gpt2", "llama"])
def test_new_adapters_change_nothing_and_sit_at_every_dense_layer(config):
    params, batch = params_of(config), batch_of(3, 12)
    adapters = lora.init(jax.random.key(0), params, 4)
    kernels = [path for path in leaves(params) if path.endswith("['kernel']")]
    assert len(leaves(adapters)) == 2 * len(kernels) > 0
    logp, _ = score(train.merged(params, adapters), config, batch)
    np.testing.assert_allclose(logp, score(params, config, batch)[0], atol=2e-6)  # another program: other roundings
    assert all(not x.any() for path, x in leaves(adapters).items() if "lora_b" in path)
    assert len({x.tobytes() for path, x in leaves(adapters).items() if "lora_a" in path}) == len(kernels)


@pytest.mark.parametrize("gradients", [pytest.param("auto", marks=pytest.mark.slow), "plain"])
@pytest.mark.parametrize("config", [TINY, LLAMA], ids=["gpt2", "llama"])
def test_merging_computes_the_same(config, gradients):
    config = dataclasses.replace(config, gradients=gradients)
    params, batch = params_of(config), batch_of(3, 12)
    both = train.merged(params, adapters_of(params))
    whole = lora.merge(both)
    assert leaves(whole).keys() == leaves(params).keys() == leaves(lora.base(both)).keys()
    np.testing.assert_allclose(score(both, config, batch)[0], score(whole, config, batch)[0], atol=2e-4)
    assert float(jnp.abs(score(whole, config, batch)[0] - score(params, config, batch)[0]).max()) > 0.1
    prompts = prompts_of(2, 5)
    run = {"new_tokens": 6, "stop": 5}
    a, b = (generate(p, config, *prompts, jax.random.key(1), **run) for p in (both, whole))
    np.testing.assert_array_equal(a.tokens_BA, b.tokens_BA)


def test_only_adapters_are_trained_and_their_gradient_is_that_of_the_merged_kernel():
    """dL/dA = dL/dW B^T and dL/dB = A^T dL/dW."""
    params, batch = params_of(LLAMA, scale=2.0), batch_of(3, 12)
    adapters = adapters_of(params)

    def loss(tree):
        logp_BT, _ = model.score(tree, LLAMA, batch)
        return losses.reduce(-logp_BT, batch.mask_BT).value

    small = jax.jit(jax.grad(lambda x: loss(train.merged(params, x))))(adapters)
    large = jax.jit(jax.grad(loss))(lora.merge(train.merged(params, adapters)))
    for block in ("block_0", "block_1"):
        for name, pair in adapters[block].items():
            slope = large[block][name]["kernel"]
            a, b = slope @ pair["lora_b"].T, pair["lora_a"].T @ slope
            np.testing.assert_allclose(small[block][name]["lora_a"], a, atol=2e-4 * float(jnp.abs(a).max()))
            np.testing.assert_allclose(small[block][name]["lora_b"], b, atol=2e-4 * float(jnp.abs(b).max()))


def test_sft_with_adapters_learns_and_leaves_the_rest():
    params, batch, tx = params_of(LLAMA, scale=1.0), batch_of(4, 12), optax.adam(1e-2)
    trainable, frozen = lora.start(jax.random.key(0), params, 4)
    state = train.init_state(trainable, tx, jax.tree.map(jnp.copy, frozen))
    step = jax.jit(train.make_train_step(train.make_nll(LLAMA), tx), donate_argnums=0)
    values = []
    for _ in range(30):
        state, metrics = step(state, batch, None)
        values.append(float(metrics["loss"].value))
    assert values[-1] < values[0] - 0.3
    jax.tree.map(np.testing.assert_array_equal, state.frozen, params)
    assert sum(x.size for x in jax.tree.leaves(state.opt_state)) < 0.5 * model.count_parameters(params)


def test_dpo_with_adapters_starts_at_log_b_and_equals_dpo_with_a_reference():
    params = params_of(TINY, scale=2.0)
    tokens = batch_of(6, 16).tokens_BT.reshape(2, 3, 16)
    mask = jnp.broadcast_to(jnp.arange(16) >= 6, tokens.shape)
    batch = Preferences(tokens, mask, jnp.array([0, 2]), jnp.ones((2, 3), bool))
    loss = jax.jit(dpo.make_loss(TINY, 0.1))
    first = train.merged({"policy": params}, {"policy": lora.init(jax.random.key(0), params, 2)})
    assert float(loss(first, batch, None)[0].value) == pytest.approx(np.log(3), rel=1e-5)
    later = train.merged(params, adapters_of(params))
    by_base = loss({"policy": later}, batch, None)[0].value
    by_copy = loss({"policy": lora.merge(later), "reference": params}, batch, None)[0].value
    assert float(by_base) == pytest.approx(float(by_copy), rel=1e-3)


def test_a_ppo_iteration_with_adapters():
    """The first ratio is exactly 1, the first KL 0; afterwards only adapters and the value head have moved."""
    params, tx = params_of(TINY, scale=1.0), optax.adam(1e-2)
    adapters = lora.init(jax.random.key(0), params, 2)
    settings = PPOConfig(new_tokens=8, epochs=2, minibatches=2)
    state = ppo.init(params, TINY, tx, {"target": jnp.float32(20.0)}, adapters)
    assert "reference" not in state.frozen

    prompts = Prompts(*prompts_of(16, 5))

    def iterate(state, key):
        return ppo.ppo_iteration(
            state, FixedKL(jnp.float32(0.0)), prompts, key, config=TINY, ppo=settings, tx=tx,
            reward_fn=lambda params, rows: (rows.tokens_BT < params["target"]).mean(1).astype(jnp.float32), stop=5,
        )  # fmt: skip

    iterate = jax.jit(iterate)
    state, _, metrics = iterate(state, jax.random.key(1))
    floats = train.to_floats(metrics)
    assert floats["ratio_error_first"] == 0.0 and abs(floats["kl"]) < 1e-5
    jax.tree.map(np.testing.assert_array_equal, state.frozen["policy"], params)
    assert float(jnp.abs(state.trainable["policy"]["block_0"]["qkv"]["lora_b"]).max()) > 0
    _, _, metrics = iterate(state, jax.random.key(2))
    assert train.to_floats(metrics)["kl"] > 1e-4


def test_a_rank_below_one_is_refused():
    with pytest.raises(UserError, match="rank must be at least 1"):
        lora.init(jax.random.key(0), params_of(), -1)
