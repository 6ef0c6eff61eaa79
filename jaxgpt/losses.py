"""Losses of the pipeline: arrays in, one value an element out, and `reduce` to divide by the global count.

    values, mask = ...                  one loss value an element
    objective = reduce(values, mask)    Mean(sum, count); its .value is the loss

No model, tokenizer, mesh or configuration is known here.
"""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import optax
from jax import Array


@functools.partial(jax.tree_util.register_dataclass, data_fields=["sum", "count"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Mean:
    """A mean that can still be pooled: sum and count, so that parts of a batch combine exactly."""

    sum: Array
    count: Array

    @property
    def value(self) -> Array:
        """sum / count, and 0 where nothing was counted."""
        return self.sum / jnp.maximum(self.count, 1)

    def __add__(self, other: "Mean") -> "Mean":
        return Mean(self.sum + other.sum, self.count + other.count)


def reduce(values: Array, mask: Array | None = None) -> Mean:
    """Sum and count over the elements where `mask` is True (all, without one); an all-False mask gives 0.

    A sum and a count, not a mean: parts of a batch then add up to exactly the whole batch's mean.
    """
    if mask is None:
        return Mean(values.sum(), jnp.asarray(values.size, jnp.float32))
    chex.assert_equal_shape((values, mask))
    return Mean(jnp.where(mask, values, 0).sum(), mask.sum().astype(jnp.float32))


def log_prob(logits: Array, tokens: Array) -> Array:
    """log softmax(logits)[tokens], float32.  logits [..., V], tokens [...] integers -> [...].

    The backward pass computes the softmax again instead of keeping it: less memory, and the forward pass is compiled
    alike with and without a gradient, so that its numbers agree to the last bit (PPO's first ratio is exactly 1).
    """
    chex.assert_shape(tokens, logits.shape[:-1])
    chex.assert_type(tokens, int)
    return -jax.checkpoint(optax.softmax_cross_entropy_with_integer_labels)(logits.astype(jnp.float32), tokens)


def entropy(logits: Array) -> Array:
    """H = -sum_v p_v log p_v of the full softmax, in nats.  [..., V] -> [...]."""
    logp = jax.nn.log_softmax(logits.astype(jnp.float32))
    return -jnp.sum(jnp.exp(logp) * logp, axis=-1)


def preference_nll(scores_BC: Array, choice_B: Array, present_BC: Array | None = None) -> Array:
    """Negative log-likelihood of the chosen answer under a softmax over the C candidates' scores, [B].

    J(phi) = -log( exp(h(x, y^b)) / sum_j exp(h(x, y^j)) )   Ziegler et al. 2020; with C = 2 it is Bradley-Terry.
    Scores are floats; `present_BC` leaves out candidates that a prompt does not have.
    """
    chex.assert_rank((scores_BC, choice_B), (2, 1))
    chex.assert_type((scores_BC, choice_B), (float, int))
    if present_BC is not None:
        chex.assert_equal_shape((scores_BC, present_BC))
        scores_BC = jnp.where(present_BC, scores_BC, -1e30)
    return optax.softmax_cross_entropy_with_integer_labels(scores_BC, choice_B)


def preference_objective(scores_BC: Array, choice_B: Array, present_BC: Array) -> tuple[Mean, dict[str, Mean]]:
    """The mean of `preference_nll`, and how often the favourite has the highest score. Prompts with no candidate at all
    (padding of a batch) count for nothing."""
    real_B = present_BC.any(axis=1)
    best_B = jnp.argmax(jnp.where(present_BC, scores_BC, -jnp.inf), axis=1)
    nll_B = preference_nll(scores_BC, choice_B, present_BC)
    return reduce(nll_B, real_B), {"accuracy": reduce((best_B == choice_B).astype(jnp.float32), real_B)}


def implicit_reward(logp_sum: Array, ref_logp_sum: Array, beta: float) -> Array:
    """DPO's reward h = beta log( pi(y|x) / rho(y|x) ), up to a term of the prompt alone (Rafailov et al. 2023).

    Log-probabilities are sums over an answer's tokens. Put into `preference_nll` it gives the DPO loss for any C.
    """
    chex.assert_equal_shape((logp_sum, ref_logp_sum))
    return beta * (logp_sum - ref_logp_sum)


def ppo_clip(logp: Array, old_logp: Array, advantage: Array, clip: float = 0.2) -> Array:
    """PPO's clipped surrogate as a loss, one value a token (Schulman et al. 2017, eq. 7).

    L = -min( r A, clip(r, 1-eps, 1+eps) A ),  r = exp(logp - old_logp)
    """
    chex.assert_equal_shape((logp, old_logp, advantage))
    ratio = jnp.exp(logp - old_logp)
    return -jnp.minimum(ratio * advantage, jnp.clip(ratio, 1 - clip, 1 + clip) * advantage)


def value_clip(value: Array, old_value: Array, returns: Array, clip: float = 0.2) -> Array:
    """Squared error of the critic, with predictions held near the old ones, one value a token.

    L = 1/2 max( (V - R)^2, (V_old + clip(V - V_old, -eps, eps) - R)^2 )
    """
    chex.assert_equal_shape((value, old_value, returns))
    clipped = old_value + jnp.clip(value - old_value, -clip, clip)
    return 0.5 * jnp.maximum(jnp.square(value - returns), jnp.square(clipped - returns))
