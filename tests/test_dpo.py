"""DPO reaches the optimum that can be enumerated, and starts at log B."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxgpt import dpo, model, optim, train
from jaxgpt.config import ModelConfig
from jaxgpt.structs import Batch, Preferences
from tests.helpers import params_of

CONFIG = ModelConfig(layers=1, width=32, heads=2, block=8, vocab=10)


def every_answer() -> Preferences:
    """One prompt (6, 7) whose candidates are all answers of one token and the stop."""
    rows = jnp.array([[6, 7, v, 5] for v in range(CONFIG.vocab) if v != 5] + [[6, 7, 5, 0]])
    mask = (jnp.arange(4) >= 2) & (jnp.arange(4) < jnp.array([4] * 9 + [3])[:, None])
    return Preferences(rows[None], mask[None], jnp.zeros(1, jnp.int32), jnp.ones((1, len(rows)), bool))


def test_the_loss_starts_at_log_b_and_the_reference_gets_no_gradient():
    params = {"policy": params_of(CONFIG), "reference": params_of(CONFIG)}
    batch = every_answer()
    (value, slope) = jax.jit(jax.value_and_grad(lambda p: dpo.make_loss(CONFIG, beta=0.3)(p, batch, None)[0].value))(
        params
    )
    assert float(value) == pytest.approx(np.log(10), rel=1e-5)
    assert max(float(jnp.abs(x).max()) for x in jax.tree.leaves(slope["reference"])) == 0.0
    assert max(float(jnp.abs(x).max()) for x in jax.tree.leaves(slope["policy"])) > 0.0


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_dpo_converges_to_the_policy_that_is_optimal_for_the_reward(temperature):
    """With choices in exact proportion to softmax(r), the optimum is pi* proportional to rho exp(r / beta)."""
    beta, batch = 0.5, every_answer()
    reward_C = jnp.linspace(-0.5, 0.5, 10)
    weight_C = jax.nn.softmax(reward_C)
    each = jax.tree.map(lambda x: jnp.repeat(x, 10, axis=0), batch).replace(choice_B=jnp.arange(10))
    loss = dpo.make_loss(CONFIG, beta, temperature)

    def expected(params, batch, key):  # the loss of every choice, weighted by its probability
        one = jax.vmap(lambda row: loss(params, jax.tree.map(lambda x: x[None], row), None)[0].value)(each)
        return train.losses.reduce(10 * weight_C * one), {}

    tx = optax.adam(optim.linear_to_zero(3e-3, 600))
    start = params_of(CONFIG, scale=1.0)
    state = train.init_state({"policy": start}, tx, {"reference": optim.copy(start)})
    step = jax.jit(train.make_train_step(expected, tx), donate_argnums=0)
    for _ in range(600):
        state, _ = step(state, None, None)

    def logp(params):
        rows = Batch(batch.tokens_BCT[0], batch.mask_BCT[0])
        return jax.nn.log_softmax(model.answer_logp(params, CONFIG, rows, temperature=temperature))

    optimum = jax.nn.log_softmax(logp(state.frozen["reference"]) + reward_C / beta)
    policy, reference = logp(state.trainable["policy"]), logp(state.frozen["reference"])
    divergence = float((jnp.exp(policy) * (policy - optimum)).sum())
    assert divergence < 1e-3 < float((jnp.exp(reference) * (reference - optimum)).sum())
