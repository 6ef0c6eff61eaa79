"""Collecting experience: sample answers, and look at them through the trainer's own eyes."""

import jax
import jax.numpy as jnp

from jaxgpt import decode, losses, model
from jaxgpt.config import ModelConfig
from jaxgpt.structs import Answers, Array, Batch, Params


def collect(
    policy: Params,
    config: ModelConfig,
    prompt_BP: Array,
    length_B: Array,
    key: Array,
    *,
    new_tokens: int,
    stop: int,
    temperature: float = 1.0,
) -> tuple[Batch, Array, Answers]:
    """One answer to each prompt from the whole distribution at `temperature` (no top-k or top-p: they would bias the ratio).

    Returns rows of prompt + answer with the answer's mask, the sampler's log-probabilities on them, and the answers.
    """
    answers = decode.generate(
        policy, config, prompt_BP, length_B, key,
        new_tokens=new_tokens, stop=stop, filter_logits=lambda logits: logits / temperature,
    )  # fmt: skip
    rows, sampler_logp_BT = decode.join(prompt_BP, length_B, answers)
    return rows, sampler_logp_BT, answers


def policy_outputs(
    policy: Params, value_head: Params, config: ModelConfig, batch: Batch, temperature: float = 1.0
) -> tuple[Array, Array, Array]:
    """(logp_BT, value_BT, entropy_BT) of the policy and its critic, which reads the same trunk.

    value_BT[t] belongs to the state before token t, entropy_BT[t] to the distribution that token t was drawn from.
    PPO's old log-probabilities and its loss both come from here: at the same shapes the first ratio is exactly 1.
    """
    h_BTD = model.hidden(policy, config, batch.tokens_BT)[:, :-1]
    logits_BTV = jax.lax.optimization_barrier(model.unembed(policy, h_BTD) / temperature)
    logp_BT = losses.log_prob(logits_BTV, batch.tokens_BT[:, 1:])
    value_BT = model.apply_scalar_head(value_head, h_BTD)
    outputs = (logp_BT, value_BT, losses.entropy(logits_BTV))
    return tuple(jnp.pad(x, ((0, 0), (1, 0))) for x in outputs)  # type: ignore[return-value]


def in_minibatches(f, tree, minibatches: int):
    """Apply f to `minibatches` equal parts of the leading axis, one after another, and join the results."""
    parts = jax.tree.map(lambda x: x.reshape(minibatches, -1, *x.shape[1:]), tree)
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), jax.lax.map(f, parts))
