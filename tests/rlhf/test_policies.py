"""A policy is functions of its parameters: ours, or any other library's."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from jaxgpt import training
from jaxgpt.losses import kl
from jaxgpt.models import transformer
from jaxgpt.rlhf import dpo, policies, ppo
from jaxgpt.rlhf.ppo import PPOConfig
from jaxgpt.structs import Preferences, Prompts
from tests.helpers import TINY, prompts_of, random_params

MODEL = dataclasses.replace(TINY, layers=1)
VOCAB, WIDTH = 16, 24
PPO = PPOConfig(new_tokens=6, epochs=2, minibatches=2, temperature=0.8)


def test_our_transformer_as_plain_functions_is_the_policy_that_we_bind():
    """Scores, entropies, values and gradients, and the log-probabilities that the sampler reports."""
    ours = policies.transformer_policy(MODEL, new_tokens=6, stop=5, temperature=0.8)
    plain = policies.from_functions(
        lambda params, tokens: transformer.hidden(params, MODEL, tokens),
        lambda params, h: transformer.unembed(params, h),
        width=MODEL.width,
        new_tokens=6,
        stop=5,
        temperature=0.8,
    )
    params, prompts = random_params(MODEL, scale=2.0), Prompts(*prompts_of(8, 5))
    head = {"kernel_D": np.linspace(-1, 1, MODEL.width, dtype=np.float32), "bias": np.float32(0.5)}
    found = jax.jit(plain.collect)(params, prompts, jax.random.key(3))
    outputs = [jax.jit(one.outputs)(params, head, found.rows) for one in (ours, plain)]
    chex.assert_trees_all_close(*outputs, atol=2e-5)
    chex.assert_trees_all_close(found.logp_BT, outputs[1].logp_BT, atol=2e-5)
    slopes = [
        jax.jit(jax.grad(lambda p, one=one: one.answer_logp(p, found.rows).sum()))(params) for one in (ours, plain)
    ]
    chex.assert_trees_all_close(*slopes, atol=5e-4)
    assert policies.transformer_policy(MODEL, new_tokens=6, stop=5, temperature=0.8) is ours


class Convolution(nnx.Module):
    """A small language model of another library and another kind: an embedding, a causal convolution, a head."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.embed = nnx.Embed(VOCAB, WIDTH, rngs=rngs)
        self.mix = nnx.Conv(WIDTH, WIDTH, kernel_size=(3,), padding="CAUSAL", rngs=rngs)
        self.head = nnx.Linear(WIDTH, VOCAB, rngs=rngs)

    def __call__(self, tokens_BT):
        return jax.nn.gelu(self.mix(self.embed(tokens_BT)))


def convolution():
    """The model's parameters as a nested dict, and the policy that it is."""
    graph, state = nnx.split(Convolution(nnx.Rngs(0)), nnx.Param)

    def model(params):
        pure = jax.tree.map(lambda x: x, state)
        nnx.replace_by_pure_dict(pure, params)
        return nnx.merge(graph, pure)

    found = policies.from_functions(
        lambda params, tokens_BT: model(params)(tokens_BT),
        lambda params, h: model(params).head(h),
        width=WIDTH,
        new_tokens=PPO.new_tokens,
        stop=1,
        temperature=PPO.temperature,
    )
    return nnx.to_pure_dict(state), found


def test_ppo_and_dpo_train_a_model_of_another_library():
    """An NNX model learns by PPO to say token 7, from a first ratio of exactly 1; DPO raises the favourite."""
    params, nets = convolution()
    tx = optax.adam(3e-2)
    state, control = ppo.init(nets, params, tx, {}), kl.FixedKL(jnp.float32(0.01))
    tokens, length = prompts_of(32, 4)
    prompts = Prompts(np.minimum(tokens, VOCAB - 1), length)

    @jax.jit
    def iterate(state, control, key):
        def share(params, rows):
            return jnp.where(rows.mask_BT, rows.tokens_BT == 7, False).mean(1)

        return ppo.ppo_iteration(state, control, prompts, key, policy=nets, ppo=PPO, tx=tx, reward_fn=share)

    history = []
    for i in range(12):
        state, control, _, metrics = iterate(state, control, jax.random.key(i))
        history.append(training.to_floats(metrics))
        assert history[-1]["ratio_error_first"] == 0.0 and history[-1]["sampler_gap_max"] < 1e-5
    first, last = (np.mean([row["score"] for row in part]) for part in (history[:3], history[-3:]))
    assert history[0]["kl"] == 0.0 and last > first + 0.1

    rows = ppo.collect(state, prompts, jax.random.key(99), policy=nets).rows
    pairs = Preferences(
        rows.tokens_BT.reshape(16, 2, -1), rows.mask_BT.reshape(16, 2, -1), np.zeros(16, int), np.ones((16, 2), bool)
    )
    start = training.init_state({"policy": params}, tx, {"reference": jax.tree.map(jnp.copy, params)})
    step = jax.jit(training.make_train_step(dpo.make_loss(nets, 0.5), tx))
    found = []
    for _ in range(5):
        start, metrics = step(start, pairs, None)
        found.append(training.to_floats(metrics)["loss"])
    np.testing.assert_allclose(found[0], np.log(2), rtol=1e-5)
    assert found[-1] < found[0] - 0.05
