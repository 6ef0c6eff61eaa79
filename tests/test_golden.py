"""Losses of 20 steps on fixed arrays, stored: they hold to 1e-4 on any CPU and any supported jax, which CI runs twice.

python -m tests.test_golden         writes tests/golden.json anew, after a change that is meant to change them
"""

import functools
import json
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import optax
import pytest

from jaxgpt import training
from jaxgpt.config import ModelConfig
from jaxgpt.losses import kl
from jaxgpt.rlhf import dpo, ppo, reward
from jaxgpt.rlhf.policies import transformer_policy
from jaxgpt.rlhf.ppo import PPOConfig
from jaxgpt.structs import Batch, Preferences, Rollout
from jaxgpt.training import optim

STORED = Path(__file__).with_name("golden.json")
STEPS = 20
CONFIG = ModelConfig(layers=2, width=32, heads=2, block=24, vocab=48)
RATE = 3e-3


def params_of(seed: int):
    """From NumPy's generator, whose stream is promised to stay."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: rng.normal(0, 0.08, x.shape).astype(np.float32), training.param_shapes(CONFIG))


def head_of(seed: int):
    rng = np.random.default_rng(seed)
    return {"kernel_D": rng.normal(0, 0.2, 32).astype(np.float32), "bias": np.float32(0.0)}


def tokens_of(*shape: int) -> np.ndarray:
    return np.random.default_rng(9).integers(6, 48, shape).astype(np.int32)


def step_of(loss_fn):
    return jax.jit(training.make_train_step(loss_fn, TX))


def losses_of(step, state, batch_of: Callable[[int], object]) -> list[float]:
    found = []
    for i in range(STEPS):
        state, metrics = step(state, batch_of(i), None)
        found.append(float(metrics["loss"].value))
    return found


TX = optim.adamw(optax.constant_schedule(RATE))
NLL = step_of(training.make_nll(CONFIG))


def pretrain() -> list[float]:
    """Whole rows, given as packed ones of one example each: finetuning's program takes them too."""
    tokens = tokens_of(STEPS, 4, 24)
    segments, positions = np.ones((4, 24), np.int32), np.tile(np.arange(24, dtype=np.int32), (4, 1))
    state = training.init_state(params_of(0), TX)
    return losses_of(NLL, state, lambda i: Batch(tokens[i], positions > 0, segments, positions))


def sft() -> list[float]:
    """Packed rows: two examples of 9 and 11 tokens, padding, targets in the second half of each."""
    tokens = tokens_of(STEPS, 4, 24)
    segments = np.tile(np.repeat([1, 2, 0], [9, 11, 4]), (4, 1)).astype(np.int32)
    positions = np.tile(np.concatenate([np.arange(9), np.arange(11), np.zeros(4)]), (4, 1)).astype(np.int32)
    mask = (positions >= 4) & (segments > 0)
    state = training.init_state(params_of(1), TX)
    return losses_of(NLL, state, lambda i: Batch(tokens[i], mask, segments, positions))


def preferences(i: int) -> Preferences:
    tokens = tokens_of(STEPS, 4, 3, 24)[i]
    mask = np.broadcast_to((np.arange(24) >= 8) & (np.arange(24) < 20), tokens.shape)
    present = np.ones((4, 3), bool)
    present[1, 2] = False
    return Preferences(tokens, mask, np.array([0, 1, 2, 0], np.int32), present)


def reward_model() -> list[float]:
    def loss_fn(params, batch, key):
        return reward.loss(params, CONFIG, batch)

    params = {"model": params_of(2), "head": head_of(3), "gain": np.float32(1.0), "bias": np.float32(0.0)}
    trainable, frozen = optim.split(params, reward.trainable_names())
    return losses_of(step_of(loss_fn), training.init_state(trainable, TX, frozen), preferences)


def dpo_() -> list[float]:
    state = training.init_state({"policy": params_of(4)}, TX, {"reference": params_of(5)})
    return losses_of(step_of(dpo.make_loss(transformer_policy(CONFIG, new_tokens=12), 0.1)), state, preferences)


def ppo_() -> list[float]:
    """Five updates of four epochs on a frozen rollout: four figures of each update's last epoch."""
    config, tx = PPOConfig(new_tokens=12, epochs=4, minibatches=1), optim.adam_tf(optax.constant_schedule(1e-3))
    rng = np.random.default_rng(6)
    mask = np.broadcast_to((np.arange(24) >= 8) & (np.arange(24) < 20), (8, 24))
    logp = np.where(mask, -3.9 + 0.1 * rng.normal(size=(8, 24)), 0).astype(np.float32)
    rollout = Rollout(
        tokens_BT=tokens_of(8, 24),
        mask_BT=mask,
        logp_BT=logp,
        ref_logp_BT=logp - np.where(mask, 0.05, 0).astype(np.float32),
        value_BT=np.where(mask, 0.1 * rng.normal(size=(8, 24)), 0).astype(np.float32),
        score_B=rng.normal(size=8).astype(np.float32),
        ended_B=np.ones(8, bool),
        sampler_logp_BT=logp,
    )
    head = {"kernel_D": np.zeros(32, np.float32), "bias": np.float32(0.0)}
    state = training.init_state({"policy": params_of(7), "value_head": head}, tx, {"reference": params_of(7)})
    control: ppo.Controller = kl.AdaptiveKL(np.float32(0.1))
    policy = ppo.policy_of(CONFIG, config, stop=5)
    update = jax.jit(functools.partial(ppo.update, policy=policy, ppo=config, tx=tx))
    found = []
    for i in range(5):
        state, control, _, metrics = update(state, control, rollout, jax.random.key(i))
        figures = training.to_floats(metrics)
        found += [figures[name] for name in ("loss", "value_loss", "grad_norm", "beta")]
    return found


STAGES = {"pretrain": pretrain, "sft": sft, "reward": reward_model, "dpo": dpo_, "ppo": ppo_}


@pytest.mark.parametrize("stage", STAGES)
def test_losses_are_the_stored_ones(stage):
    np.testing.assert_allclose(STAGES[stage](), json.loads(STORED.read_text())[stage], rtol=1e-4, atol=1e-6)


if __name__ == "__main__":
    STORED.write_text(json.dumps({name: stage() for name, stage in STAGES.items()}, indent=1) + "\n")
