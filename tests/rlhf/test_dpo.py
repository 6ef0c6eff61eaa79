"""DPO reaches the optimum that can be enumerated, and starts at log B."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxgpt import losses, training
from jaxgpt.config import ModelConfig
from jaxgpt.models import transformer
from jaxgpt.rlhf import dpo
from jaxgpt.rlhf.policies import transformer_policy
from jaxgpt.structs import Batch, Preferences
from jaxgpt.training import optim
from tests.helpers import random_params, score

CONFIG = ModelConfig(layers=1, width=32, heads=2, block=8, vocab=10)


def every_answer() -> Preferences:
    """One prompt (6, 7) whose candidates are all answers of one token and the stop."""
    rows = np.array([[6, 7, v, 5] for v in range(CONFIG.vocab) if v != 5] + [[6, 7, 5, 0]])
    mask = (np.arange(4) >= 2) & (np.arange(4) < np.array([4] * 9 + [3])[:, None])
    return Preferences(rows[None], mask[None], np.zeros(1, np.int32), np.ones((1, len(rows)), bool))


def reference_metrics(policy, reference, batch: Preferences, beta: float) -> dict[str, float]:
    """What DPO logs, in float64, from the log-probabilities of tokens under both models."""

    def logp(params):
        tokens = np.asarray(score(params, CONFIG, batch.rows)[0], np.float64)
        rows = [x[mask] for x, mask in zip(tokens, batch.rows.mask_BT, strict=True)]
        return np.array([x.sum() for x in rows]), np.array([x[-1] for x in rows])

    (pi, pi_end), (rho, rho_end) = logp(policy), logp(reference)
    chosen, h = np.arange(len(pi)) == batch.choice_B[0], beta * (pi - rho)
    length = batch.rows.mask_BT.sum(1)
    found = {"margin": h[chosen][0] - h[~chosen].mean(), "end_log_ratio": (pi_end - rho_end).mean()}
    for name, x in {"logp": pi, "reward": h, "length": length}.items():
        found |= {f"chosen_{name}": x[chosen][0], f"rejected_{name}": x[~chosen].mean()}
    return found


def test_the_loss_starts_at_log_b_and_the_reference_gets_no_gradient():
    """And the metrics are those of a float64 reference; a row that a person found tied is in none of them."""
    same = {"policy": random_params(CONFIG), "reference": random_params(CONFIG)}
    loss, beta = dpo.make_loss(transformer_policy(CONFIG), beta=0.3), 0.3
    batch = jax.tree.map(lambda x: np.concatenate([x, x]), every_answer()).replace(choice_B=np.array([2, losses.TIE]))

    def value_of(params, batch):
        objective, metrics = loss(params, batch, None)
        return objective.value, metrics

    run = jax.jit(jax.value_and_grad(value_of, has_aux=True))
    (value, _), slope = run(same, batch)
    assert float(value) == pytest.approx(np.log(10), rel=1e-5)
    assert max(np.abs(x).max() for x in jax.tree.leaves(slope["reference"])) == 0.0
    assert max(np.abs(x).max() for x in jax.tree.leaves(slope["policy"])) > 0.0
    other = {**same, "policy": random_params(CONFIG, seed=1)}
    found = training.to_floats(run(other, batch)[0][1])
    one = every_answer().replace(choice_B=np.array([2]))
    wanted = reference_metrics(other["policy"], other["reference"], one, beta)
    assert found.keys() == {*wanted, "accuracy"}
    np.testing.assert_allclose([found[name] for name in wanted], list(wanted.values()), rtol=1e-4)
    assert found["margin"] == pytest.approx(found["chosen_reward"] - found["rejected_reward"], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_dpo_converges_to_the_policy_that_is_optimal_for_the_reward(temperature):
    """With choices in exact proportion to softmax(r), the optimum is pi* proportional to rho exp(r / beta)."""
    beta, batch = 0.5, every_answer()
    reward_C = np.linspace(-0.5, 0.5, 10)
    weight_C = np.exp(reward_C) / np.exp(reward_C).sum()
    loss = dpo.make_loss(transformer_policy(CONFIG, temperature=temperature), beta)

    def expected(params, batch, key):  # the loss of every choice, weighted by its probability
        one = jax.vmap(lambda choice: loss(params, batch.replace(choice_B=choice[None]), None)[0].value)
        return losses.reduce(10 * weight_C * one(jnp.arange(10))), {}

    tx = optax.adam(optim.linear_to_zero(3e-3, 150))
    rho = random_params(CONFIG, scale=1.0)
    state = training.init_state({"policy": rho}, tx, {"reference": optim.copy(rho)})
    options = {"xla_backend_optimization_level": 2}
    step = jax.jit(training.make_train_step(expected, tx), donate_argnums=0, compiler_options=options)
    for _ in range(150):
        state, _ = step(state, batch, None)

    @jax.jit
    def logp(params):
        rows = Batch(batch.tokens_BCT[0], batch.mask_BCT[0])
        return jax.nn.log_softmax(transformer.answer_logp(params, CONFIG, rows, temperature=temperature))

    policy, reference = (np.asarray(logp(x), float) for x in (state.trainable["policy"], state.frozen["reference"]))
    optimum = reference + reward_C / beta
    optimum -= np.logaddexp.reduce(optimum)
    divergence = (np.exp(policy) * (policy - optimum)).sum()
    assert divergence < 1e-3 < (np.exp(reference) * (reference - optimum)).sum()
