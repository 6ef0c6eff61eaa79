"""KL divergence between policy pi and reference rho: estimators, standard errors, controllers. All in nats.

Estimators (Schulman 2020, "Approximating KL divergence") of KL(pi || rho) from tokens sampled from pi, one value per
token, with d = log pi - log rho. The expected gradient depends on where the estimator is used (see docs/maths.md):

    in the reward (a constant)   k1: grad KL(pi || rho).  k3: grad KL(pi || rho) - grad KL(rho || pi)
    as a loss (differentiated)   k1: zero.  k2: grad KL(pi || rho).  k3: grad KL(rho || pi)

This holds for a single token's distribution; a loss term ignores a token's effect on the states after it.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import Array

from jaxgpt.losses.checks import expect, promote
from jaxgpt.losses.mean import sequence_sum
from jaxgpt.losses.tokens import expected

# Log-ratios are clipped to [-20, 20] before exponentiating: products with e^20 = 4.9e8 stay finite.
LOG_RATIO_LIMIT = 20.0


def k1(logp: Array, ref_logp: Array) -> Array:
    """d = log pi - log rho, in nats: unbiased, can be negative."""
    expect(logp=(logp, "float ..."), ref_logp=(ref_logp, "float ..."))
    logp, ref_logp = promote(logp, ref_logp)
    return logp - ref_logp


def k2(logp: Array, ref_logp: Array) -> Array:
    """d^2 / 2: biased, low variance, never negative."""
    expect(logp=(logp, "float ..."), ref_logp=(ref_logp, "float ..."))
    logp, ref_logp = promote(logp, ref_logp)
    return 0.5 * jnp.square(logp - ref_logp)


def k3(logp: Array, ref_logp: Array) -> Array:
    """exp(-d) - 1 + d: unbiased and never negative. d is clipped to [-20, 20], with no gradient beyond.

    The value itself is not capped (some libraries cap it at 10): one token with rho >> pi can dominate a batch.
    """
    expect(logp=(logp, "float ..."), ref_logp=(ref_logp, "float ..."))
    logp, ref_logp = promote(logp, ref_logp)
    d = jnp.clip(logp - ref_logp, -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    return jnp.expm1(-d) + d


def exact(logits: Array, ref_logits: Array) -> Array:
    """sum_v pi_v (log pi_v - log rho_v) for one prefix, in nats: both [..., V] -> [...].

    Exact for each prefix; summed over sampled prefixes it is still only an estimate of the sequence's KL. Logits may be
    -inf: a token with pi_v = 0 adds 0, and the KL is +inf, with a gradient of 0, where rho_v = 0 < pi_v.
    """
    expect(logits=(logits, "float ... V"), ref_logits=(ref_logits, "float ... V"))
    logp, ref_logp = map(jax.nn.log_softmax, promote(logits, ref_logits))
    unbounded = (ref_logp == -jnp.inf) & (logp > -jnp.inf)
    finite = expected(logp, jnp.where(unbounded, 0.0, logp - ref_logp))
    return jnp.where(unbounded.any(axis=-1), jnp.inf, finite)


def sequence_kl(logp_BT: Array, ref_logp_BT: Array, mask_BT: Array) -> Array:
    """k1 summed over an answer's tokens: nats per sequence, [B]."""
    return sequence_sum(k1(logp_BT, ref_logp_BT), mask_BT)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["sequences", "tokens", "total", "squared_nats", "squared_tokens", "products"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class Estimate:
    """A KL with its standard error, in nats per sequence and nats per token; the sequences are independent samples.

    Holds sums over sequences, so that parts of a batch add up with `+` (and `jax.lax.psum`).
    """

    sequences: Array  # how many
    tokens: Array  # how many, over all sequences
    total: Array  # nats, over all sequences
    squared_nats: Array  # sum over sequences of nats squared
    squared_tokens: Array  # sum over sequences of tokens squared
    products: Array  # sum over sequences of nats times tokens

    def __add__(self, other: "Estimate") -> "Estimate":
        return jax.tree.map(jnp.add, self, other)

    @property
    def nats_per_sequence(self) -> Array:
        """Mean KL of a sequence: total nats / sequences."""
        return self.total / jnp.maximum(self.sequences, 1)

    @property
    def nats_per_token(self) -> Array:
        """Mean KL of a token: total nats / tokens, so that long sequences count more."""
        return self.total / jnp.maximum(self.tokens, 1)

    @property
    def nats_per_sequence_error(self) -> Array:
        """Standard error of the mean over sequences; 0 with fewer than two."""
        return self._spread(self.nats_per_sequence, 0.0) / jnp.maximum(self.sequences, 1)

    @property
    def nats_per_token_error(self) -> Array:
        """Standard error of the ratio nats / tokens (linearised), because an answer's tokens aren't independent."""
        return self._spread(0.0, self.nats_per_token) / jnp.maximum(self.tokens, 1)

    def _spread(self, a: Array | float, b: Array | float) -> Array:
        """sqrt(n / (n - 1) sum_i e_i^2) of the residuals e_i = nats_i - a - b tokens_i (which have mean 0)."""
        squares = (
            self.squared_nats
            - 2 * (a * self.total + b * self.products)
            + a**2 * self.sequences
            + 2 * a * b * self.tokens
            + b**2 * self.squared_tokens
        )
        return jnp.sqrt(jnp.maximum(squares, 0.0) * self.sequences / jnp.maximum(self.sequences - 1, 1))


def estimate(values_BT: Array, mask_BT: Array) -> Estimate:
    """The mean of an estimator's values over the masked tokens of B sequences, with standard errors.

    values: k1, k2, k3 or `exact`, one per token. A row without masked tokens doesn't count as a sequence.
    """
    total_B = sequence_sum(values_BT, mask_BT)
    tokens_B = mask_BT.sum(axis=-1).astype(total_B.dtype)
    sums = (tokens_B > 0, tokens_B, total_B, total_B**2, tokens_B**2, total_B * tokens_B)
    return Estimate(*(x.astype(total_B.dtype).sum() for x in sums))


@functools.partial(jax.tree_util.register_dataclass, data_fields=["beta"], meta_fields=["target", "horizon", "unit"])
@dataclasses.dataclass(frozen=True)
class AdaptiveKL:
    """Adaptive KL coefficient (Ziegler et al. 2020, section 2.2): adjusts beta to drive the measured KL to a target.

    e = clip(KL / target - 1, -0.2, 0.2);   beta <- beta * (1 + e * episodes / horizon)
    """

    beta: Array  # reward units per nat
    target: float = 6.0  # nats per `unit`
    horizon: float = 10_000.0  # episodes
    unit: str = "sequence"  # or "token": in some libraries a target of 6 means nats per token

    def update(self, measured: Estimate) -> "AdaptiveKL":
        """The controller with beta adjusted to the KL of these episodes. Raises ValueError for an unknown unit."""
        units = {"sequence": measured.nats_per_sequence, "token": measured.nats_per_token}
        if self.unit not in units:
            raise ValueError(f"AdaptiveKL: unit is {self.unit!r}; choose sequence or token")
        error = jnp.clip(units[self.unit] / self.target - 1.0, -0.2, 0.2)
        beta = jnp.asarray(self.beta, error.dtype)
        factor = 1.0 + error * measured.sequences / self.horizon
        return dataclasses.replace(self, beta=jnp.where(jnp.isfinite(factor), beta * factor, beta))


@functools.partial(jax.tree_util.register_dataclass, data_fields=["beta"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class FixedKL:
    """A constant beta, in reward units per nat."""

    beta: Array

    def update(self, measured: Estimate) -> "FixedKL":
        """The same beta, whatever was measured."""
        return self
