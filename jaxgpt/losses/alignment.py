"""Direct alignment: train the policy on preferences without a reward model.

An answer's log-probability is the sum over its tokens, in nats (`sequence_sum`), or the mean over them
(`sequence_mean`) where a function says so. Each loss returns one value per prompt, pair or answer.
"""

import math

import jax
import jax.numpy as jnp
from jax import Array

from jaxgpt.losses.checks import expect, expect_value, promote
from jaxgpt.losses.mean import reduce
from jaxgpt.losses.preferences import preference_nll, smooth_choice, soft_preference_nll


def implicit_reward(logp_sum: Array, ref_logp_sum: Array, beta: float | Array) -> Array:
    """DPO's reward h = beta log( pi(y|x) / rho(y|x) ), up to a prompt-only term (Rafailov et al. 2023, eq. 5).

    beta: reward units per nat. As the scores of a likelihood in `losses.preferences`, h gives DPO for that kind of
    preference: `preference_nll` for one favourite among C, `plackett_luce_nll` for rankings, `favourites_nll` for ties.
    Raises ValueError for a negative beta (concrete, or under checkify).
    """
    expect(logp_sum=(logp_sum, "float ..."), ref_logp_sum=(ref_logp_sum, "float ..."))
    expect_value(beta >= 0, "beta is {beta}; it can't be negative", beta=beta)
    logp_sum, ref_logp_sum = promote(logp_sum, ref_logp_sum)
    return jnp.asarray(beta, logp_sum.dtype) * (logp_sum - ref_logp_sum)


def dpo(
    logp_BC: Array, ref_logp_BC: Array, choice_B: Array, beta: float | Array, present_BC: Array | None = None
) -> Array:
    """-log softmax(beta log(pi / rho))[choice], [B]: DPO for any number of candidates (Rafailov et al. 2023, eq. 7).

    Equals log C where pi = rho. Log-probabilities are sums over an answer's tokens.
    """
    expect(logp=(logp_BC, "float B C"), ref_logp=(ref_logp_BC, "float B C"), choice=(choice_B, "int B"))
    return preference_nll(implicit_reward(logp_BC, ref_logp_BC, beta), choice_B, present_BC)


def cdpo(
    logp_BC: Array,
    ref_logp_BC: Array,
    choice_B: Array,
    beta: float | Array,
    epsilon: float | Array,
    present_BC: Array | None = None,
) -> Array:
    """Conservative DPO, [B]: assumes that each label is wrong with probability epsilon (Mitchell 2023, for C = 2).

    L = (1 - epsilon) L_dpo(choice) + epsilon mean_{j != choice} L_dpo(j). At the optimum P(choice) = 1 - epsilon.
    """
    expect(logp=(logp_BC, "float B C"), ref_logp=(ref_logp_BC, "float B C"), choice=(choice_B, "int B"))
    present_BC = jnp.ones(logp_BC.shape, bool) if present_BC is None else present_BC
    scores_BC = implicit_reward(logp_BC, ref_logp_BC, beta)
    weight_BC = smooth_choice(choice_B, present_BC, jnp.asarray(epsilon, scores_BC.dtype))
    return soft_preference_nll(scores_BC, weight_BC, present_BC)


def ipo(chosen_log_ratio: Array, rejected_log_ratio: Array, tau: float) -> Array:
    """(h_w - h_l - 1 / (2 tau))^2, one value per pair (Azar et al. 2023, eq. 17): pulls the margin to 1 / (2 tau).

    h = log(pi / rho) of an answer: the sum over its tokens in the paper, the mean in TRL.
    """
    expect(chosen_log_ratio=(chosen_log_ratio, "float ..."), rejected_log_ratio=(rejected_log_ratio, "float ..."))
    expect_value(tau > 0, "tau is {tau}; it must be above 0", tau=tau)
    chosen_log_ratio, rejected_log_ratio = promote(chosen_log_ratio, rejected_log_ratio)
    return jnp.square(chosen_log_ratio - rejected_log_ratio - 1.0 / (2.0 * tau))


def kto_reference(mismatched_log_ratio_B: Array, mask_B: Array | None = None) -> Array:
    """KTO's reference point z0, a scalar without gradient: max(0, mean log(pi / rho)) over *mismatched* answers.

    Pairing each prompt with another prompt's answer estimates KL(pi || rho) (Ethayarajh et al. 2024, section 4.1).
    It is a statistic of the whole batch: compute it before splitting the batch.
    """
    expect(mismatched_log_ratio=(mismatched_log_ratio_B, "float ..."), mask=(mask_B, "bool ..."))
    return jax.lax.stop_gradient(jnp.maximum(reduce(mismatched_log_ratio_B, mask_B).value, 0.0))


def kto(
    log_ratio: Array,
    desirable: Array,
    reference: Array | float,
    beta: float | Array,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Array:
    """KTO's loss for single answers labelled good or bad, one value per answer (Ethayarajh et al. 2024).

    L = w_d (1 - sigmoid(beta (h - z0))) for a desirable answer, w_u (1 - sigmoid(beta (z0 - h))) for an undesirable
    one; h = log(pi / rho) summed over the answer's tokens, z0 from `kto_reference`.
    """
    reference_array = reference if jnp.ndim(reference) else None  # a scalar has no shape to check
    expect(
        log_ratio=(log_ratio, "float ..."),
        desirable=(desirable, "bool ..."),
        reference=(reference_array, "float ..."),
    )
    expect_value(beta >= 0, "beta is {beta}; it can't be negative", beta=beta)
    (log_ratio,) = promote(log_ratio)
    beta, reference = (jnp.asarray(x, log_ratio.dtype) for x in (beta, reference))
    margin = beta * (log_ratio - reference)
    return jnp.where(desirable, desirable_weight * jax.nn.sigmoid(-margin), undesirable_weight * jax.nn.sigmoid(margin))


def log_odds(mean_logp: Array) -> Array:
    """log( P / (1 - P) ) for P = exp(mean log-probability of an answer's tokens), clipped to P <= exp(-1e-6)."""
    expect(mean_logp=(mean_logp, "float ..."))
    mean_logp = jnp.minimum(promote(mean_logp)[0], -1e-6)
    near_one = mean_logp > -math.log(2.0)
    log_complement = jnp.where(  # log(1 - P), accurate on both sides of P = 1/2; inner wheres keep gradients finite
        near_one,
        jnp.log(-jnp.expm1(jnp.where(near_one, mean_logp, -1.0))),
        jnp.log1p(-jnp.exp(jnp.where(near_one, -1.0, mean_logp))),
    )
    return mean_logp - log_complement


def orpo(chosen_mean_logp: Array, rejected_mean_logp: Array, weight: float) -> Array:
    """NLL of the chosen answer plus an odds-ratio penalty, one value per pair (Hong et al. 2024, eq. 6).

    L = -log P_w + weight (-log sigmoid(log odds_w - log odds_l)),  odds = P / (1 - P), P = exp(mean token log-prob).
    Needs no reference model.
    """
    expect(chosen_mean_logp=(chosen_mean_logp, "float ..."), rejected_mean_logp=(rejected_mean_logp, "float ..."))
    chosen_mean_logp, rejected_mean_logp = promote(chosen_mean_logp, rejected_mean_logp)
    log_odds_ratio = log_odds(chosen_mean_logp) - log_odds(rejected_mean_logp)
    return -chosen_mean_logp - weight * jax.nn.log_sigmoid(log_odds_ratio)


def simpo(chosen_mean_logp: Array, rejected_mean_logp: Array, beta: float, gamma: float) -> Array:
    """-log sigmoid(beta mean_logp_w - beta mean_logp_l - gamma), one value per pair (Meng et al. 2024, eq. 6).

    mean_logp is the mean log-probability over an answer's tokens; typically beta is about 2 and the margin gamma
    about 1. Needs no reference model.
    """
    expect(chosen_mean_logp=(chosen_mean_logp, "float ..."), rejected_mean_logp=(rejected_mean_logp, "float ..."))
    expect_value(beta >= 0, "beta is {beta}; it can't be negative", beta=beta)
    chosen_mean_logp, rejected_mean_logp = promote(chosen_mean_logp, rejected_mean_logp)
    return -jax.nn.log_sigmoid(beta * (chosen_mean_logp - rejected_mean_logp) - gamma)
