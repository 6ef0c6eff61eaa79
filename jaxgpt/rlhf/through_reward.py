"""Backpropagation through the learned reward model: the derivative of h itself, instead of a policy gradient.

    maximise  h(x, y) - beta sum_t KL(pi(. | x, y_<t) || rho(. | x, y_<t))

The answer y is sampled as usual. To differentiate h with respect to the policy's logits, each token of y enters the
reward model as a straight-through Gumbel-softmax sample (Jang et al. 2017; Bengio et al. 2013): its value is the
token's embedding, its gradient that of softmax((logits + G) / tau) E, with E the embedding table. The Gumbel noise G is
drawn conditionally on y being the argmax of logits + G (Paulus et al. 2021), so any sampler may produce y, and several
draws of G may be averaged.

This gradient is biased, however many samples there are, for two reasons: softmax is not argmax (a small tau reduces
this bias and adds noise instead), and a token's effect on the policy's later tokens is left out.
"""

import dataclasses

import jax
import jax.numpy as jnp

from jaxgpt import losses
from jaxgpt.config import Count, ModelConfig, Positive, check_settings
from jaxgpt.losses import Mean, kl
from jaxgpt.models import transformer
from jaxgpt.rlhf import reward
from jaxgpt.structs import Array, Batch, Params
from jaxgpt.training.step import LossFn, Metrics


@dataclasses.dataclass(frozen=True)
class ThroughRewardConfig:
    """Settings of the relaxation through which h is differentiated."""

    tau: Positive = 1.0  # temperature of the relaxation
    draws: Count = 1  # of the Gumbel noise per sampled answer; their rewards are averaged
    straight_through: bool = True  # False: the reward model reads the mixture of embeddings itself

    def __post_init__(self) -> None:
        check_settings(self)


def conditional_gumbel(key: Array, logits: Array, tokens: Array) -> Array:
    """log softmax(logits) + Gumbel noise, given that its argmax is `tokens`.  [..., V], [...] -> [..., V] float32.

    With one exponential variable E_v per token: z_y = -log E_y, and z_v = -log(E_v / p_v + E_y) for all other v
    (Maddison & Tarlow 2017).
    """
    logp = jax.nn.log_softmax(logits.astype(jnp.float32))
    log_e = jnp.log(jax.random.exponential(key, logits.shape) + 1e-30)
    log_e_chosen = jnp.take_along_axis(log_e, tokens[..., None], axis=-1)
    is_chosen = tokens[..., None] == jnp.arange(logits.shape[-1])
    return -jnp.where(is_chosen, log_e_chosen, jnp.logaddexp(log_e - logp, log_e_chosen))


def relax_tokens(key: Array, logits: Array, tokens: Array, tau: float) -> Array:
    """softmax((logits + G) / tau), with G drawn given that the argmax is `tokens`; no gradient flows through G."""
    noise = jax.lax.stop_gradient(conditional_gumbel(key, logits, tokens) - logits)
    return jax.nn.softmax((logits + noise) / tau)


def make_loss(
    config: ModelConfig,
    reward_config: ModelConfig,
    beta: float | Array,
    how: ThroughRewardConfig,
    temperature: float = 1.0,
) -> LossFn[Batch]:
    """loss(params, rows, key) of answers that the policy sampled: the mean over answers of -h + beta KL. Parameters:
    'policy', frozen 'reference' and 'reward'. Metrics: `h_seen`, the reward model's output here (without
    straight_through, for mixtures of embeddings); `kl_exact`, nats per sequence."""

    def loss_fn(params: Params, rows: Batch, key: Array | None = None) -> tuple[Mean, Metrics]:
        if key is None:
            raise ValueError("through_reward needs a key: it draws Gumbel noise")
        tokens_BT = rows.tokens_BT
        target_BT, mask_BT = tokens_BT[:, 1:], rows.mask_BT[:, 1:]  # from here on, T is one shorter

        def logits_of(params: Params) -> Array:
            h_BTD = transformer.hidden(params, config, tokens_BT)[:, :-1]
            return transformer.unembed(params, h_BTD) / temperature

        logits_BTV = logits_of(params["policy"])
        ref_logits_BTV = jax.lax.stop_gradient(logits_of(params["reference"]))
        table_VD = params["reward"]["model"]["embed"]["tokens_VD"]
        real_BTD = table_VD[target_BT]

        def relaxed_reward(key: Array) -> Array:
            mixed_BTD = relax_tokens(key, logits_BTV, target_BT, how.tau) @ table_VD
            base_BTD = jax.lax.stop_gradient(mixed_BTD) if how.straight_through else real_BTD
            offset_BTD = jnp.where(mask_BT[..., None], mixed_BTD - base_BTD, 0.0)
            return reward.score(
                params["reward"],
                reward_config,
                rows,
                embedding_offset_BTD=jnp.pad(offset_BTD, ((0, 0), (1, 0), (0, 0))),
            )

        h_B = jnp.stack([relaxed_reward(k) for k in jax.random.split(key, how.draws)]).mean(0)
        kl_B = losses.sequence_sum(kl.exact(logits_BTV, ref_logits_BTV), mask_BT)
        return losses.reduce(beta * kl_B - h_B), {"h_seen": losses.reduce(h_B), "kl_exact": losses.reduce(kl_B)}

    return loss_fn
