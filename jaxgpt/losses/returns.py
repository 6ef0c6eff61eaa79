"""From scores (one reward per answer) to advantages: per token, in rows [B, T] with a mask over the answer's tokens, or
per answer, in groups [B, C] of C answers to the same prompt.

A mask may have gaps: other speakers' turns or a tool's output between the policy's own tokens. A gap is part of the one
step from the token before it to the token after it. What precedes a row's first masked token or follows its last (a
prompt, padding) is ignored.
"""

import jax
import jax.numpy as jnp
from jax import Array

from jaxgpt.losses.checks import expect, expect_value, promote


def last_token_mask(mask_BT: Array) -> Array:
    """True at the last masked token of each row, [B, T]."""
    expect(mask=(mask_BT, "bool B T"))
    return mask_BT & (_count_to_come(mask_BT) == 1)


def shaped_rewards(score_B: Array, kl_BT: Array, mask_BT: Array, beta: Array | float) -> Array:
    """r_t = -beta kl_t on every answer token, plus the score on the last one (Ziegler et al. 2020, eq. 2), [B, T]."""
    expect_value(beta >= 0, "beta is {beta}; it can't be negative", beta=beta)
    expect(score=(score_B, "float B"), kl=(kl_BT, "float B T"), mask=(mask_BT, "bool B T"))
    score_B, kl_BT = promote(score_B, kl_BT)
    beta = jnp.asarray(beta, kl_BT.dtype)
    return jnp.where(mask_BT, -beta * kl_BT, 0.0) + jnp.where(last_token_mask(mask_BT), score_B[:, None], 0.0)


def gae(
    reward_BT: Array, value_BT: Array, mask_BT: Array, gamma: float = 1.0, lam: float = 0.95
) -> tuple[Array, Array]:
    """Generalised advantage estimation (Schulman et al. 2016): (advantage, return), both [B, T], 0 outside the mask.

    delta_t = r_t + gamma V_{t+1} - V_t,   A_t = delta_t + gamma lam A_{t+1},   R_t = A_t + V_t

    `value_BT[t]` is the value of the state *before* token t. An answer is one episode: nothing is bootstrapped after
    its last token, whether it ended by itself or was truncated (its score already reflects that).

    t + 1 is the next masked token: inside a gap of the mask there is no gamma or lam, values are ignored, and rewards
    go to the token before the gap.
    """
    expect(reward=(reward_BT, "float B T"), value=(value_BT, "float B T"), mask=(mask_BT, "bool B T"))
    reward_BT, value_BT = promote(reward_BT, value_BT)
    reward_BT = jnp.where(_count_to_come(mask_BT) > 0, reward_BT, 0.0)

    def back(carry: tuple[Array, ...], x: tuple[Array, ...]) -> tuple[tuple[Array, ...], Array]:
        advantage_B, next_value_B, gap_reward_B = carry
        reward_B, value_B, mask_B = x
        reward_B += gap_reward_B
        delta_B = reward_B + gamma * next_value_B - value_B
        advantage_B = jnp.where(mask_B, delta_B + gamma * lam * advantage_B, advantage_B)
        next_value_B = jnp.where(mask_B, value_B, next_value_B)
        return (advantage_B, next_value_B, jnp.where(mask_B, 0.0, reward_B)), advantage_B

    start: tuple[Array, ...] = (jnp.zeros_like(reward_BT.sum(axis=1)),) * 3
    xs = jax.tree.map(lambda x: x.swapaxes(0, 1), (reward_BT, value_BT, mask_BT))
    _, advantage_TB = jax.lax.scan(back, start, xs, reverse=True)
    advantage_BT = jnp.where(mask_BT, advantage_TB.swapaxes(0, 1), 0.0)
    return advantage_BT, jnp.where(mask_BT, advantage_BT + value_BT, 0.0)


def rewards_to_go(reward_BT: Array, mask_BT: Array, gamma: float = 1.0) -> Array:
    """G_t = r_t + gamma G_{t+1} inside the mask, [B, T]: the return that weights log pi_t in REINFORCE.

    Gaps of the mask are skipped as in `gae`.
    """
    return gae(reward_BT, jnp.zeros_like(reward_BT, jnp.float32), mask_BT, gamma, 1.0)[0]


def masked_moments(x: Array, mask: Array) -> tuple[Array, Array]:
    """Mean and population variance over the True elements (both 0 if there are none)."""
    expect(x=(x, "float ..."), mask=(mask, "bool ..."))
    (x,) = promote(x)
    count = jnp.maximum(mask.sum(), 1).astype(x.dtype)
    # Average the differences from the largest element, so that the mean of equal numbers is exactly that number.
    top = jax.lax.stop_gradient(jnp.where(mask, x, -jnp.inf).max(initial=-jnp.inf))
    top = jnp.where(mask.any(), top, 0.0)
    mean = top + jnp.where(mask, x - top, 0.0).sum() / count
    return mean, jnp.where(mask, jnp.square(x - mean), 0.0).sum() / count


def whiten(x: Array, mask: Array) -> Array:
    """Shift and scale to mean 0, variance 1 over the True elements; 0 elsewhere. Apply it before splitting a batch."""
    (x,), (mean, variance) = promote(x), masked_moments(x, mask)
    return jnp.where(mask, (x - mean) * jax.lax.rsqrt(variance + 1e-8), 0.0)


def whiten_keep_mean(x: Array, mask: Array) -> Array:
    """Scale to variance 1 over the True elements, keeping their mean; 0 elsewhere."""
    (x,), (mean, variance) = promote(x), masked_moments(x, mask)
    return jnp.where(mask, (x - mean) * jax.lax.rsqrt(variance + 1e-8) + mean, 0.0)


def fit_normalisation(score_B: Array, mask_B: Array | None = None) -> tuple[Array, Array]:
    """(gain, bias) so that gain * score + bias has mean 0 and standard deviation 1 on these scores (Ziegler 2020, 2.2).

    Compute them from samples of the reference policy, then apply them to every score. If all scores are equal, the gain
    is 1 and only their mean is removed.
    """
    expect(score=(score_B, "float ..."), mask=(mask_B, "bool ..."))
    mean, variance = masked_moments(score_B, jnp.ones(score_B.shape, bool) if mask_B is None else mask_B)
    gain = jnp.where(variance > 1e-12, jax.lax.rsqrt(jnp.maximum(variance, 1e-12)), 1.0)
    return gain, -gain * mean


def centre_scores(score_BC: Array, present_BC: Array | None = None) -> Array:
    """h_i - mean over the prompt's answers, [B, C]: GRPO without its bias towards small spreads (Liu et al. 2025).

    h_i is the score of answer i; B prompts have C sampled answers each. 0 where an answer is absent or the only one.
    """
    return _groups(score_BC, present_BC)[0]


def rloo(score_BC: Array, present_BC: Array | None = None) -> Array:
    """h_i - mean over the prompt's *other* answers, [B, C]: unbiased (Kool et al. 2019; Ahmadian et al. 2024).

    Equal to C / (C - 1) times `centre_scores`.
    """
    deviation_BC, count_B1 = _groups(score_BC, present_BC)
    return deviation_BC * count_B1 / jnp.maximum(count_B1 - 1, 1)


def grpo(score_BC: Array, present_BC: Array | None = None, epsilon: float = 1e-4) -> Array:
    """(h_i - mean) / (std + eps) over the prompt's answers, [B, C] (Shao et al. 2024, section 4.1.2).

    std is the sample standard deviation (C - 1 in the denominator). Dividing by it gives more weight to prompts with
    similar scores, and if the KL is a separate loss, the optimum no longer depends on the scores' scale
    (docs/maths.md): `centre_scores` avoids both.
    """
    deviation_BC, count_B1 = _groups(score_BC, present_BC)
    variance_B1 = jnp.square(deviation_BC).sum(axis=1, keepdims=True) / jnp.maximum(count_B1 - 1, 1)
    # The inner where keeps the gradient of sqrt(0) finite.
    std_B1 = jnp.where(variance_B1 > 0, jnp.sqrt(jnp.where(variance_B1 > 0, variance_B1, 1.0)), 0.0)
    return deviation_BC / (std_B1 + epsilon)


def broadcast_to_tokens(advantage_B: Array, mask_BT: Array) -> Array:
    """Give each token its answer's advantage, [B, T]; 0 outside the mask."""
    expect(advantage=(advantage_B, "float B"), mask=(mask_BT, "bool B T"))
    return jnp.where(mask_BT, promote(advantage_B)[0][:, None], 0.0)


def _count_to_come(mask_BT: Array) -> Array:
    """How many masked tokens there are from each position to the end of its row, [B, T]."""
    return jnp.cumsum(mask_BT[:, ::-1], axis=1)[:, ::-1]


def _groups(score_BC: Array, present_BC: Array | None) -> tuple[Array, Array]:
    """Deviations from each row's mean over its present answers, and how many are present."""
    expect(score=(score_BC, "float B C"), present=(present_BC, "bool B C"))
    (score_BC,) = promote(score_BC)
    present_BC = jnp.ones(score_BC.shape, bool) if present_BC is None else present_BC
    count_B1 = present_BC.sum(axis=1, keepdims=True).astype(score_BC.dtype)
    top_B1 = jax.lax.stop_gradient(
        jnp.where(present_BC, score_BC, -jnp.inf).max(axis=1, keepdims=True, initial=-jnp.inf)
    )
    top_B1 = jnp.where(count_B1 > 0, top_B1, 0.0)
    mean_B1 = top_B1 + jnp.where(present_BC, score_BC - top_B1, 0.0).sum(axis=1, keepdims=True) / jnp.maximum(
        count_B1, 1
    )
    return jnp.where(present_BC, score_BC - mean_B1, 0.0), count_B1
