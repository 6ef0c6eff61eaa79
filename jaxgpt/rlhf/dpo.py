"""Direct preference optimisation (Rafailov et al. 2023) for any number of candidates.

    h(x, y) = beta log( pi(y|x) / rho(y|x) ),   J = -log( exp h(x, y^b) / sum_j exp h(x, y^j) )

y^b is the favourite. Parameters: trainable 'policy' and frozen 'reference'; or trainable adapters, where the policy's
frozen weights without them are the reference.
"""

import jax
import jax.numpy as jnp

from jaxgpt import losses
from jaxgpt.losses import Mean
from jaxgpt.models import lora, transformer
from jaxgpt.rlhf.policies import Policy
from jaxgpt.structs import Array, Params, Preferences
from jaxgpt.training.step import LossFn, Metrics


def _answer_logp(policy: Policy, params: Params, batch: Preferences) -> tuple[Array, Array]:
    """log P(y | x) of every candidate, and of its last token alone, [B, C]."""
    logp_RT = policy.logp(params, batch.rows)
    answer_R = jnp.where(batch.rows.mask_BT, logp_RT, 0.0).sum(axis=1)
    last_R = transformer.at_last_token(logp_RT, batch.rows.mask_BT)
    return answer_R.reshape(batch.present_BC.shape), last_R.reshape(batch.present_BC.shape)


def candidate_rewards(policy: Policy, params: Params, batch: Preferences, beta: float | Array) -> Array:
    """The implicit reward of every candidate, [B, C]."""
    logp_BC, _ = _answer_logp(policy, params["policy"], batch)
    ref_logp_BC, _ = _answer_logp(policy, lora.reference_params(params), batch)
    return losses.implicit_reward(logp_BC, ref_logp_BC, beta)


def make_loss(policy: Policy, beta: float | Array, tie_rate: float = 0.0) -> LossFn[Preferences]:
    """The loss for C candidates, log C where pi = rho. `beta`: reward units per nat. With the policy's
    `new_tokens`, the tokens of the longest answer, logits are computed only for a window of that many. For people's
    ties and `tie_rate` see `losses.preference_nll`.

    Metrics, over favourites ("chosen") and the other candidates ("rejected"), ties left out: log pi, implicit reward,
    tokens; `margin`, the favourite's reward above the mean of the others'; and `end_log_ratio`, log(pi / rho) of the
    last token of all of them, the end tag: below 0, the policy ends answers less readily than the reference."""

    def loss_fn(params: Params, batch: Preferences, key: Array | None = None) -> tuple[Mean, Metrics]:
        ref_logp_BC, ref_last_BC = jax.lax.stop_gradient(_answer_logp(policy, lora.reference_params(params), batch))
        logp_BC, last_BC = _answer_logp(policy, params["policy"], batch)
        h_BC = losses.implicit_reward(logp_BC, ref_logp_BC, beta)
        objective, metrics = losses.preference_objective(h_BC, batch.choice_B, batch.present_BC, tie_rate)
        chosen_BC = batch.present_BC & (batch.choice_B[:, None] == jnp.arange(h_BC.shape[1]))
        rejected_BC = batch.present_BC & ~chosen_BC & chosen_BC.any(axis=1, keepdims=True)
        length_BC = batch.mask_BCT.sum(axis=2, dtype=jnp.float32)
        for name, values_BC in {"logp": logp_BC, "reward": h_BC, "length": length_BC}.items():
            metrics[f"chosen_{name}"] = losses.reduce(values_BC, chosen_BC)
            metrics[f"rejected_{name}"] = losses.reduce(values_BC, rejected_BC)
        margin_B = losses.sequence_sum(h_BC, chosen_BC) - losses.sequence_mean(h_BC, rejected_BC)
        metrics["margin"] = losses.reduce(margin_B, rejected_BC.any(axis=1))
        metrics["end_log_ratio"] = losses.reduce(last_BC - ref_last_BC, chosen_BC | rejected_BC)
        return objective, jax.lax.stop_gradient(metrics)

    return loss_fn
