"""KL divergence between policy pi and reference rho: estimators and controllers. All in nats.

Estimators (Schulman, "Approximating KL divergence") of KL(pi || rho) from tokens sampled from pi, one value a token,
with d = log pi - log rho. As a *loss* or inside the *reward* they have different gradients; PPO here puts k1 into
the reward.
"""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
from jax import Array


def k1(logp: Array, ref_logp: Array) -> Array:
    """d: unbiased, can be negative."""
    return logp - ref_logp


def k2(logp: Array, ref_logp: Array) -> Array:
    """d^2 / 2: biased, low variance, never negative."""
    return 0.5 * jnp.square(logp - ref_logp)


def k3(logp: Array, ref_logp: Array) -> Array:
    """exp(-d) - 1 + d: unbiased and never negative."""
    d = logp - ref_logp
    return jnp.expm1(-d) + d


def exact(logits: Array, ref_logits: Array) -> Array:
    """sum_v pi_v (log pi_v - log rho_v) for one prefix.  [..., V] twice -> [...]."""
    chex.assert_equal_shape((logits, ref_logits))
    logp = jax.nn.log_softmax(logits.astype(jnp.float32))
    ref_logp = jax.nn.log_softmax(ref_logits.astype(jnp.float32))
    return jnp.sum(jnp.exp(logp) * (logp - ref_logp), axis=-1)


def sequence_kl(logp_BT: Array, ref_logp_BT: Array, mask_BT: Array) -> Array:
    """k1 summed over an answer's tokens: nats a sequence, [B]."""
    return jnp.where(mask_BT, k1(logp_BT, ref_logp_BT), 0.0).sum(-1)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["beta"], meta_fields=["target", "horizon"])
@dataclasses.dataclass(frozen=True)
class AdaptiveKL:
    """Ziegler et al. 2020, section 2.2: beta follows the measured KL towards a target.

    e = clip(KL / target - 1, -0.2, 0.2);   beta <- beta (1 + e episodes / horizon)
    """

    beta: Array  # reward units a nat
    target: float = 6.0  # nats a sequence
    horizon: float = 10_000.0  # episodes

    def update(self, kl_nats_a_sequence: Array, episodes: int) -> "AdaptiveKL":
        """The controller after `episodes` answers whose mean KL was measured."""
        error = jnp.clip(kl_nats_a_sequence / self.target - 1.0, -0.2, 0.2)
        return dataclasses.replace(self, beta=self.beta * (1.0 + error * episodes / self.horizon))


@functools.partial(jax.tree_util.register_dataclass, data_fields=["beta"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class FixedKL:
    """A constant beta, in reward units a nat."""

    beta: Array

    def update(self, kl_nats_a_sequence: Array, episodes: int) -> "FixedKL":
        """The same beta, whatever was measured."""
        return self
