"""Policy gradients on groups of answers to the same prompt: RLOO, GRPO, and GRPO without its two biases (Dr. GRPO)."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from jaxgpt import losses
from jaxgpt.losses import Mean, returns
from jaxgpt.rlhf.policies import Policy
from jaxgpt.rlhf.ppo import Controller
from jaxgpt.structs import Array, Batch, Experience, Params
from jaxgpt.training.step import Metrics, TrainState, make_train_step


@dataclasses.dataclass(frozen=True)
class Method:
    """How answers are weighted. `advantage`: from the rewards of B groups of C answers to their advantages, [B, C];
    `mean`: an answer's loss is the mean over its tokens, as in GRPO, and otherwise their sum."""

    advantage: Callable[[Array], Array]
    mean: bool


METHODS = {
    "RLOO": Method(returns.rloo, mean=False),
    "GRPO": Method(returns.grpo, mean=True),
    "GRPO, no deviation": Method(returns.centre_scores, mean=True),
    "GRPO, no length": Method(returns.grpo, mean=False),
    "GRPO, neither (Dr. GRPO)": Method(returns.centre_scores, mean=False),
}


def learn(
    policy: Policy, tx: optax.GradientTransformation, method: Method, each: int
) -> Callable[[TrainState, Controller, Experience, Array, Array], tuple[TrainState, Controller, Metrics]]:
    """A function that makes one update on groups of `each` answers. They are on-policy: the ratio is 1, and the clipped
    loss has REINFORCE's gradient."""
    per_answer = losses.sequence_mean if method.mean else losses.sequence_sum
    # Sums are divided by a constant length, so that one learning rate suits all methods.
    scale = 1.0 if method.mean else 1 / (policy.new_tokens or 1)

    def loss_fn(params: Params, batch: tuple[Batch, Array], key: Array | None) -> tuple[Mean, Metrics]:
        rows, advantage_B = batch
        outputs = policy.outputs(params["policy"], params["value_head"], rows)
        log_ratio_BT = losses.log_ratio(outputs.logp_BT, jax.lax.stop_gradient(outputs.logp_BT))
        loss_BT = losses.ppo_clip(log_ratio_BT, returns.broadcast_to_tokens(advantage_B, rows.mask_BT))
        objective = losses.reduce(per_answer(loss_BT, rows.mask_BT) * scale)
        return objective, {"entropy": losses.reduce(outputs.entropy_BT, rows.mask_BT)}

    train_step = make_train_step(loss_fn, tx)

    def step(
        state: TrainState, control: Controller, experience: Experience, score_B: Array, key: Array
    ) -> tuple[TrainState, Controller, Metrics]:
        rows = experience.rows
        score_BC = jnp.where(experience.ended_B, score_B, 0.0).reshape(-1, each)
        advantage_BC = method.advantage(score_BC)
        state, metrics = train_step(state, (rows, advantage_BC.reshape(-1)), None)
        return state, control, {**metrics, **length_metrics(rows, score_B), **advantage_metrics(score_BC, advantage_BC)}

    return step


def length_metrics(rows: Batch, score_B: Array) -> Metrics:
    """Mean lengths in tokens: of all answers, of the right ones (score 1) and of the wrong ones."""
    length_B = rows.mask_BT.sum(1).astype(jnp.float32)
    return {
        "length": losses.reduce(length_B),
        "length_right": losses.reduce(length_B, score_B > 0.5),
        "length_wrong": losses.reduce(length_B, score_B < 0.5),
    }


def advantage_metrics(score_BC: Array, advantage_BC: Array) -> Metrics:
    """The mean |advantage| of groups with n right answers, for each n: how much easy and hard prompts count."""
    right_B, group_size = score_BC.sum(1), score_BC.shape[1]
    weight_B = jnp.abs(advantage_BC).mean(1)
    return {f"weight_{n}": losses.reduce(weight_B, right_B == n) for n in range(1, group_size)}
