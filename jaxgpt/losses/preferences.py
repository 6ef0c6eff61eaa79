"""One likelihood for every kind of preference: a favourite of C, pairs, rankings, ties.

The worth of answer j is exp(s_j), where its score s_j is a reward model's h or DPO's beta log(pi / rho). Everything
below is `favourites_nll` (Luce 1959; ties after Davidson 1970 and Firth et al. 2019) or a sequence of such choices.
Scores are float [B, C]: B prompts, C candidates; `present` is False where a prompt has fewer. A prompt with no
favourite, no candidate or a single candidate gives 0. A choice is an index, or `TIE` where all candidates tie.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array

from jaxgpt.losses.checks import expect, expect_value, promote
from jaxgpt.losses.mean import Mean, reduce
from jaxgpt.losses.tokens import MASKED_LOGIT

TIE = -1  # in place of a choice: a person found all candidates equally good


def favourites_nll(
    scores_BC: Array, favourite_BC: Array, present_BC: Array | None = None, log_tie: Sequence[float] | Array = ()
) -> Array:
    """-log P(these are the favourites), [...]: the Davidson-Luce choice model (Firth, Kosmidis & Turner 2019).

        P(S | A) = delta_|S| g(S) / sum_t delta_t sum_{T in A, |T| = t} g(T),   g(T) = prod_{i in T} exp(s_i)^(1 / |T|)

    favourite [..., C] bool marks S: one answer, or several that tie. `log_tie` = (log delta_2, log delta_3, ...) sets
    how often two, three, ... answers tie (numbers, or [C - 1, ...]: one per row); delta_1 = 1. Without it nothing ties,
    and P is the plain softmax over the candidates (Luce; Ziegler et al. 2020, eq. 1). With C = 2 and one log_tie this
    is Davidson's model of pairs.
    Raises ValueError (concrete values; otherwise under checkify) if more answers tie than `log_tie` allows, or if a
    favourite isn't present.
    """
    expect(
        scores=(scores_BC, "float ... C"), favourite=(favourite_BC, "bool ... C"), present=(present_BC, "bool ... C")
    )
    (scores_BC,) = promote(scores_BC)
    if present_BC is None:
        present_BC = jnp.ones_like(favourite_BC)
    size = favourite_BC.sum(axis=-1)
    log_delta = [jnp.zeros((), scores_BC.dtype), *jnp.asarray(log_tie, scores_BC.dtype)]
    expect_value(size <= len(log_delta), f"more than {len(log_delta)} answers tie; extend log_tie to larger ties")
    expect_value(present_BC | ~favourite_BC, "a favourite is not present")
    any_favourite = size > 0
    # Rows without favourites end as 0 but must stay finite until then: give them equal scores. Only differences
    # matter, so subtracting the maximum keeps large scores precise.
    scores_BC = jnp.where(present_BC & any_favourite[..., None], scores_BC, 0.0)
    top_B1 = jnp.where(present_BC, scores_BC, MASKED_LOGIT).max(axis=-1, keepdims=True, initial=MASKED_LOGIT)
    scores_BC = scores_BC - jax.lax.stop_gradient(jnp.maximum(top_B1, MASKED_LOGIT / 2))
    totals = [delta + _log_subsets(scores_BC, present_BC, t) for t, delta in enumerate(log_delta, 1)]
    mean = jnp.where(favourite_BC, scores_BC, 0.0).sum(axis=-1) / jnp.maximum(size, 1).astype(scores_BC.dtype)
    delta = sum(jnp.where(size == t, log_delta[t - 1], 0.0) for t in range(1, len(log_delta) + 1))
    total = totals[0] if len(totals) == 1 else jax.nn.logsumexp(jnp.stack(totals, -1), axis=-1)
    return jnp.where(any_favourite, total - (delta + mean), 0.0)


def _log_subsets(scores_BC: Array, present_BC: Array, t: int) -> Array:
    """log of the sum over all subsets T of t present answers of prod_{i in T} exp(s_i / t)."""
    worth = jnp.where(present_BC, scores_BC, MASKED_LOGIT) / t
    if t == 1:
        return jax.nn.logsumexp(worth, axis=-1)
    # Elementary symmetric polynomials, one answer at a time: e_k <- e_k + w e_{k-1}, in log space.
    sums = [jnp.zeros(worth.shape[:-1], worth.dtype)] + [jnp.full(worth.shape[:-1], MASKED_LOGIT, worth.dtype)] * t
    for c in range(worth.shape[-1]):
        sums = sums[:1] + [jnp.logaddexp(sums[k], sums[k - 1] + worth[..., c]) for k in range(1, t + 1)]
    return jnp.maximum(sums[t], MASKED_LOGIT)


def preference_nll(
    scores_BC: Array,
    choice_B: Array,
    present_BC: Array | None = None,
    margin_B: Array | float = 0.0,
    tie_rate: float = 0.0,
) -> Array:
    """-log P(the chosen answer is the favourite of C candidates), [B]: the reward model's loss.

        J(phi) = -log( exp(h(x, y^b) - m) / (exp(h(x, y^b) - m) + sum_{j != b} exp(h(x, y^j))) )

    Ziegler et al. 2020, eq. 1; Bradley-Terry for C = 2; a margin m demands a score that much higher (Llama 2, eq. 2).
    With a `tie_rate` r above 0, a choice may be `TIE`, and `favourites_nll` has one more outcome, the tie of all:
    log delta_C = log C + log r / (1 - r), so that r is its probability where all are worth the same.
    Raises ValueError (concrete values; otherwise under checkify) if a choice is outside 0..C-1 and isn't such a tie.
    """
    expect(scores=(scores_BC, "float B C"), choice=(choice_B, "int B"), present=(present_BC, "bool B C"))
    (scores_BC,), C = promote(scores_BC), scores_BC.shape[1]
    lowest = TIE if tie_rate else 0
    expect_value((choice_B >= lowest) & (choice_B < C), f"a choice is outside 0..{C - 1}, the {C} candidates")
    chosen_BC = choice_B[:, None] == jnp.arange(C)
    if present_BC is not None:
        chosen_BC &= present_BC.any(axis=1)[:, None]  # batch padding has no favourite
    expect(choice=(choice_B, "int B"), margin=(margin_B if jnp.ndim(margin_B) else None, "float B"))
    margin_B = jnp.broadcast_to(jnp.asarray(margin_B, scores_BC.dtype), choice_B.shape)
    scores_BC = scores_BC - jnp.where(chosen_BC, margin_B[:, None], 0.0)
    if not tie_rate:
        return favourites_nll(scores_BC, chosen_BC, present_BC)
    present_BC = jnp.ones_like(chosen_BC) if present_BC is None else present_BC
    count_B, sizes = present_BC.sum(axis=1), jnp.arange(2, C + 1)[:, None]
    log_tie_CB = jnp.where(count_B == sizes, jnp.log(sizes) + math.log(tie_rate / (1 - tie_rate)), -jnp.inf)
    return favourites_nll(scores_BC, chosen_BC | (present_BC & (choice_B == TIE)[:, None]), present_BC, log_tie_CB)


def bradley_terry_nll(chosen: Array, rejected: Array, margin: Array | float = 0.0) -> Array:
    """-log sigmoid(s_chosen - s_rejected - margin), one value per pair (Bradley & Terry 1952; InstructGPT, eq. 1)."""
    array = margin if jnp.ndim(margin) else None
    expect(chosen=(chosen, "float ..."), rejected=(rejected, "float ..."), margin=(array, "float ..."))
    chosen, rejected = promote(chosen, rejected)
    return -jax.nn.log_sigmoid(chosen - rejected - jnp.asarray(margin, chosen.dtype))


def plackett_luce_nll(
    scores_BC: Array, rank_BC: Array, present_BC: Array | None = None, log_tie: Sequence[float] | Array = ()
) -> Array:
    """-log P(ranking), [B]: the favourite of all, then of the remaining ones, and so on (Plackett 1975).

        -sum_i [ s_i - log sum_{j: rank_j >= rank_i} exp(s_j) ]

    rank [B, C] int: 0 is the best; gaps don't matter; -1 is an answer known only to be worse than all ranked ones, so
    that (0, -1, -1) is a favourite of three. Equal ranks are ties and need `log_tie` (see `favourites_nll`).
    """
    expect(scores=(scores_BC, "float B C"), rank=(rank_BC, "int B C"), present=(present_BC, "bool B C"))
    C = scores_BC.shape[1]
    expect_value((rank_BC >= -1) & (rank_BC < C), f"a rank is outside -1..{C - 1}")
    (scores_BC,) = promote(scores_BC)
    present_BC = jnp.ones(rank_BC.shape, bool) if present_BC is None else present_BC
    stage_C1 = jnp.arange(C)[:, None]
    favourite_BCC = (rank_BC[:, None, :] == stage_C1) & present_BC[:, None, :]
    remaining_BCC = ((rank_BC[:, None, :] >= stage_C1) | (rank_BC[:, None, :] < 0)) & present_BC[:, None, :]
    scores_BCC = jnp.broadcast_to(scores_BC[:, None, :], favourite_BCC.shape)
    return favourites_nll(scores_BCC, favourite_BCC, remaining_BCC, log_tie).sum(axis=1)


def all_pairs_nll(scores_BC: Array, rank_BC: Array, present_BC: Array | None = None) -> Array:
    """The mean of -log sigmoid(s_i - s_j) over the pairs of a ranking with rank_i < rank_j, [B] (InstructGPT, eq. 1).

    Ranks as in `plackett_luce_nll`; tied answers form no pair, and neither do two unranked ones.
    """
    expect(scores=(scores_BC, "float B C"), rank=(rank_BC, "int B C"), present=(present_BC, "bool B C"))
    (scores_BC,), C = promote(scores_BC), scores_BC.shape[1]
    expect_value((rank_BC >= -1) & (rank_BC < C), f"a rank is outside -1..{C - 1}")
    rank_BC = jnp.where(rank_BC < 0, C, rank_BC)
    better_BCC = rank_BC[:, :, None] < rank_BC[:, None, :]
    if present_BC is not None:
        better_BCC &= present_BC[:, :, None] & present_BC[:, None, :]
    gap_BCC = jnp.where(better_BCC, scores_BC[:, :, None] - scores_BC[:, None, :], 0.0)
    nll_BCC = jnp.where(better_BCC, -jax.nn.log_sigmoid(gap_BCC), 0.0)
    return nll_BCC.sum(axis=(1, 2)) / jnp.maximum(better_BCC.sum(axis=(1, 2)), 1).astype(nll_BCC.dtype)


def soft_preference_nll(scores_BC: Array, weight_BC: Array, present_BC: Array | None = None) -> Array:
    """-sum_c w_c log softmax(s)_c, [B]: the expected NLL of a favourite that is c with probability w_c.

    For vote shares of several annotators, exact preference probabilities, or label noise (`smooth_choice`).
    """
    expect(scores=(scores_BC, "float B C"), weight=(weight_BC, "float B C"), present=(present_BC, "bool B C"))
    scores_BC, weight_BC = promote(scores_BC, weight_BC)
    if present_BC is None:
        present_BC = jnp.ones(scores_BC.shape, bool)
    logp_BC = jax.nn.log_softmax(jnp.where(present_BC, scores_BC, MASKED_LOGIT), axis=1)
    counted_BC = present_BC & ((weight_BC != 0) | (logp_BC > -jnp.inf))  # 0 log 0 is 0
    return -jnp.where(counted_BC, weight_BC * jnp.where(counted_BC, logp_BC, 0.0), 0.0).sum(axis=1)


def smooth_choice(choice_B: Array, present_BC: Array, epsilon: float | Array) -> Array:
    """Target probabilities if a label is wrong with probability eps: 1 - eps for the choice, eps shared by the other
    candidates, [B, C] in the dtype of epsilon (a lone candidate keeps 1; a row without candidates gets 0)."""
    expect(choice=(choice_B, "int B"), present=(present_BC, "bool B C"))
    C = present_BC.shape[1]
    expect_value((choice_B >= 0) & (choice_B < C), f"a choice is outside 0..{C - 1}, the {C} candidates")
    chosen_BC = choice_B[:, None] == jnp.arange(C)
    expect_value((~chosen_BC | present_BC | ~present_BC.any(1, keepdims=True)), "a favourite is not present")
    chosen_BC &= present_BC
    (epsilon,) = promote(epsilon)
    others_B1 = present_BC.sum(axis=1, keepdims=True).astype(epsilon.dtype) - 1
    doubt_B1 = jnp.where(others_B1 > 0, epsilon, 0.0)
    weight_BC = jnp.where(chosen_BC, 1.0 - doubt_B1, doubt_B1 / jnp.maximum(others_B1, 1))
    return jnp.where(present_BC, weight_BC, 0.0)


def reward_centering(scores_BC: Array, present_BC: Array | None = None) -> Array:
    """(sum_c s_c)^2, [B]: a term (weight ~0.01) that pins down the scores' free offset (Eisenstein et al. 2023)."""
    expect(scores=(scores_BC, "float B C"), present=(present_BC, "bool B C"))
    (scores_BC,) = promote(scores_BC)
    return jnp.square(jnp.where(True if present_BC is None else present_BC, scores_BC, 0.0).sum(axis=1))


def favourite_hits(scores_BC: Array, favourite_BC: Array, present_BC: Array | None = None) -> Array:
    """How far the highest score is the favourite's, [B]: 1, 0, or the favourites' share of a tie at the top, so
    that n equal scores count 1 / n, which is chance. A row without candidates gives 0. Every accuracy is a mean of
    these."""
    expect(scores=(scores_BC, "float B C"), favourite=(favourite_BC, "bool B C"), present=(present_BC, "bool B C"))
    present_BC = jnp.ones_like(favourite_BC) if present_BC is None else present_BC
    scores_BC = jnp.where(present_BC, promote(scores_BC)[0], -jnp.inf)
    top_BC = present_BC & (scores_BC == scores_BC.max(axis=1, keepdims=True))
    share_B = (top_BC & favourite_BC).sum(axis=1, dtype=scores_BC.dtype)
    return share_B / jnp.maximum(top_BC.sum(axis=1, dtype=scores_BC.dtype), 1)


def preference_objective(
    scores_BC: Array, choice_B: Array, present_BC: Array, tie_rate: float = 0.0
) -> tuple[Mean, dict[str, Mean]]:
    """The mean of `preference_nll`, and of `favourite_hits`. Prompts without candidates (batch padding) are not
    counted; a `TIE` is not in the accuracy, and in the loss only with a `tie_rate` above 0."""
    expect(scores=(scores_BC, "float B C"), choice=(choice_B, "int B"), present=(present_BC, "bool B C"))
    has_favourite_B = present_BC.any(axis=1) & (choice_B != TIE)
    counted_B = present_BC.any(axis=1) if tie_rate else has_favourite_B
    choice_B = choice_B if tie_rate else jnp.where(choice_B == TIE, 0, choice_B)
    nll_B = preference_nll(scores_BC, choice_B, present_BC, tie_rate=tie_rate)
    hit_B = favourite_hits(scores_BC, choice_B[:, None] == jnp.arange(scores_BC.shape[1]), present_BC)
    return reduce(nll_B, counted_B), {"accuracy": reduce(hit_B, has_favourite_B)}
