"""From scores to advantages, on rows of tokens whose answer is marked by a mask."""

import chex
import jax
import jax.numpy as jnp
from jax import Array


def last_token(mask_BT: Array) -> Array:
    """True at the last masked token of each row, [B, T]."""
    after_BT = jnp.cumsum(mask_BT[:, ::-1], axis=1)[:, ::-1]
    return mask_BT & (after_BT == 1)


def shaped_rewards(score_B: Array, kl_BT: Array, mask_BT: Array, beta: Array | float) -> Array:
    """r_t = -beta kl_t on every answer token, plus the score on its last one (Ziegler et al. 2020, eq. 2), [B, T]."""
    chex.assert_type(score_B, float)
    chex.assert_equal_shape((kl_BT, mask_BT))
    return jnp.where(mask_BT, -beta * kl_BT, 0.0) + jnp.where(last_token(mask_BT), score_B[:, None], 0.0)


def gae(
    reward_BT: Array, value_BT: Array, mask_BT: Array, gamma: float = 1.0, lam: float = 0.95
) -> tuple[Array, Array]:
    """Generalised advantage estimation (Schulman et al. 2016): (advantage, return), both [B, T], 0 outside the mask.

    delta_t = r_t + gamma V_{t+1} - V_t,   A_t = delta_t + gamma lam A_{t+1},   R_t = A_t + V_t

    `value_BT[t]` is the value of the state *before* token t. An answer is one episode: nothing is bootstrapped after
    its last token, whether it ended by itself or was cut (a cut answer's score already says so).
    """
    chex.assert_equal_shape((reward_BT, value_BT, mask_BT))

    def back(carry: tuple[Array, Array], x: tuple[Array, Array, Array]) -> tuple[tuple[Array, Array], Array]:
        advantage_B, next_value_B = carry
        reward_B, value_B, mask_B = x
        delta_B = reward_B + gamma * next_value_B - value_B
        advantage_B = jnp.where(mask_B, delta_B + gamma * lam * advantage_B, 0.0)
        return (advantage_B, jnp.where(mask_B, value_B, 0.0)), advantage_B

    zeros_B = jnp.zeros_like(reward_BT[:, 0])
    xs = jax.tree.map(lambda x: x.swapaxes(0, 1), (reward_BT, value_BT, mask_BT))
    _, advantage_TB = jax.lax.scan(back, (zeros_B, zeros_B), xs, reverse=True)
    advantage_BT = advantage_TB.swapaxes(0, 1)
    return advantage_BT, jnp.where(mask_BT, advantage_BT + value_BT, 0.0)


def masked_moments(x: Array, mask: Array) -> tuple[Array, Array]:
    """Mean and population variance over the True elements (0 and 0 when there are none)."""
    count = jnp.maximum(mask.sum(), 1).astype(x.dtype)
    mean = jnp.where(mask, x, 0.0).sum() / count
    return mean, jnp.where(mask, jnp.square(x - mean), 0.0).sum() / count


def whiten(x: Array, mask: Array) -> Array:
    """Mean 0, variance 1 over the True elements; 0 elsewhere."""
    mean, variance = masked_moments(x, mask)
    return jnp.where(mask, (x - mean) * jax.lax.rsqrt(variance + 1e-8), 0.0)


def whiten_keep_mean(x: Array, mask: Array) -> Array:
    """Variance 1 over the True elements with the mean left where it is; 0 elsewhere."""
    mean, variance = masked_moments(x, mask)
    return jnp.where(mask, (x - mean) * jax.lax.rsqrt(variance + 1e-8) + mean, 0.0)
