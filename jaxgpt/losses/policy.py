"""Policy gradients: losses whose gradient makes better-than-expected actions more likely.

The ratio is computed separately, so that one clipped loss serves all algorithms: `log_ratio` per token (PPO, GRPO), or
`sequence_log_ratio` per answer (GSPO). Advantages come from `jaxgpt.losses.returns`; they carry no gradient.
"""

import jax
import jax.numpy as jnp
from jax import Array

from jaxgpt.losses.checks import expect, expect_value, promote
from jaxgpt.losses.kl import LOG_RATIO_LIMIT
from jaxgpt.losses.mean import Mean, reduce, sequence_mean


def log_ratio(logp: Array, old_logp: Array) -> Array:
    """log( pi / pi_old ) per element, clipped to [-20, 20] (no gradient beyond); `ratio_metrics` says how often."""
    expect(logp=(logp, "float ..."), old_logp=(old_logp, "float ..."))
    logp, old_logp = promote(logp, old_logp)
    return jnp.clip(logp - jax.lax.stop_gradient(old_logp), -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)


def sequence_log_ratio(logp_BT: Array, old_logp_BT: Array, mask_BT: Array) -> Array:
    """1 / |y| log( pi(y) / pi_old(y) ) per answer, [B], clipped to [-20, 20] (GSPO: Zheng et al. 2025).

    Use it with [B] advantages, and reduce over answers.
    """
    expect(logp=(logp_BT, "float B T"), old_logp=(old_logp_BT, "float B T"), mask=(mask_BT, "bool B T"))
    logp_BT, old_logp_BT = promote(logp_BT, old_logp_BT)
    mean_B = sequence_mean(logp_BT - jax.lax.stop_gradient(old_logp_BT), mask_BT)
    return jnp.clip(mean_B, -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)


def ppo_clip(log_ratio: Array, advantage: Array, clip: float = 0.2, clip_high: float | None = None) -> Array:
    """PPO's clipped surrogate as a loss, one value per element (Schulman et al. 2017, eq. 7).

    L = -min( r A, clip(r, 1 - clip, 1 + clip_high) A ),  r = exp(log_ratio)

    `clip_high` defaults to `clip` (DAPO's "clip-higher" sets it: Yu et al. 2025).
    """
    expect(log_ratio=(log_ratio, "float ..."), advantage=(advantage, "float ..."))
    log_ratio, advantage = promote(log_ratio, advantage)
    ratio = jnp.exp(log_ratio)
    clipped = jnp.clip(ratio, 1 - clip, 1 + (clip if clip_high is None else clip_high))
    return -jnp.minimum(ratio * advantage, clipped * advantage)


def dual_clip(
    log_ratio: Array, advantage: Array, clip: float = 0.2, clip_high: float | None = None, limit: float = 3.0
) -> Array:
    """`ppo_clip` with the loss for A < 0 capped at limit * |A|, one value per element (Ye et al. 2020).

    L = -max( min( r A, clip(r) A ), limit A ) for A < 0: a bad action with a huge ratio can't dominate the batch.
    """
    edge = 1 + (clip if clip_high is None else clip_high)
    expect_value(limit > edge, "limit is {limit}; it must be above the clip, {edge}", limit=limit, edge=edge)
    loss = ppo_clip(log_ratio, advantage, clip, clip_high)
    advantage = jnp.asarray(advantage, loss.dtype)
    return jnp.where(advantage < 0, jnp.minimum(loss, -limit * advantage), loss)


def reinforce(logp: Array, advantage: Array) -> Array:
    """-A log pi, one value per element: its gradient is the policy gradient for on-policy samples (Williams 1992).

    A is the return minus a baseline: a critic's value, a running mean, or the other answers' mean (`returns.rloo`).
    """
    expect(logp=(logp, "float ..."), advantage=(advantage, "float ..."))
    logp, advantage = promote(logp, advantage)
    return -jax.lax.stop_gradient(advantage) * logp


def value_clip(value: Array, old_value: Array, returns: Array, clip: float = 0.2) -> Array:
    """Squared error of the critic, with predictions clipped around the old ones, one value per element.

    L = 1/2 max( (V - R)^2, (V_old + clip(V - V_old, -eps, eps) - R)^2 )      clip = inf: the plain squared error
    """
    expect(value=(value, "float ..."), old_value=(old_value, "float ..."), returns=(returns, "float ..."))
    value, old_value, returns = promote(value, old_value, returns)
    clipped = old_value + jnp.clip(value - old_value, -clip, clip)
    return 0.5 * jnp.maximum(jnp.square(value - returns), jnp.square(clipped - returns))


def ratio_metrics(
    log_ratio: Array, advantage: Array, mask: Array, clip: float = 0.2, clip_high: float | None = None
) -> dict[str, Mean | Array]:
    """Diagnostics of the ratio: means over the masked elements, and maxima.

    approx_kl: d^2 / 2, nats per element; clip_fraction: where `ppo_clip` cuts off the gradient (ratio too high with
    A > 0, too low with A < 0); clamp_fraction: log-ratios at +-20 (any at all means the policies have diverged);
    ratio_max; ratio_error_max: the largest |r - 1|, 0 in a rollout's first step.
    """
    expect(log_ratio=(log_ratio, "float ..."), advantage=(advantage, "float ..."), mask=(mask, "bool ..."))
    log_ratio, advantage = promote(log_ratio, advantage)
    d = jnp.where(mask, log_ratio, 0.0)
    change = jnp.expm1(d)
    too_high = (advantage > 0) & (change > (clip if clip_high is None else clip_high))
    too_low = (advantage < 0) & (change < -clip)
    return {
        "approx_kl": reduce(0.5 * jnp.square(d), mask),
        "clip_fraction": reduce((too_high | too_low).astype(d.dtype), mask),
        "clamp_fraction": reduce((jnp.abs(d) >= LOG_RATIO_LIMIT).astype(d.dtype), mask),
        "ratio_max": jnp.exp(d.max(initial=-jnp.inf if d.size else 0.0)),
        "ratio_error_max": jnp.abs(change).max(initial=0.0),
    }
