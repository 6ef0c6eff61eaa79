"""Losses for language-model alignment: arrays in, one value per element out; `reduce` divides by the global count.

    values, mask = ...                  one loss value per element
    mean = reduce(values, mask)         Mean(sum, count); mean.value is the loss
    mean, metrics = combine({"policy": a, "kl": b}, mask, weights={"kl": 0.05})      a weighted sum of losses

Nothing here knows about models, tokenizers, meshes or configuration, so jit, grad, vmap and sharded arrays just work.
docs/maths.md lists all equations. Shapes and dtypes are checked while tracing, values where they are concrete.
"""

from jaxgpt.losses.alignment import cdpo, dpo, implicit_reward, ipo, kto, kto_reference, log_odds, orpo, simpo
from jaxgpt.losses.kl import LOG_RATIO_LIMIT
from jaxgpt.losses.mean import Mean, combine, reduce, sequence_mean, sequence_sum
from jaxgpt.losses.policy import (
    dual_clip,
    log_ratio,
    ppo_clip,
    ratio_metrics,
    reinforce,
    sequence_log_ratio,
    value_clip,
)
from jaxgpt.losses.preferences import (
    TIE,
    all_pairs_nll,
    bradley_terry_nll,
    favourite_hits,
    favourites_nll,
    plackett_luce_nll,
    preference_nll,
    preference_objective,
    reward_centering,
    smooth_choice,
    soft_preference_nll,
)
from jaxgpt.losses.tokens import MASKED_LOGIT, entropy, label_smoothing, log_prob, nll, z_loss

__all__ = [
    "LOG_RATIO_LIMIT",
    "MASKED_LOGIT",
    "TIE",
    "Mean",
    "all_pairs_nll",
    "bradley_terry_nll",
    "cdpo",
    "combine",
    "dpo",
    "dual_clip",
    "entropy",
    "favourite_hits",
    "favourites_nll",
    "implicit_reward",
    "ipo",
    "kto",
    "kto_reference",
    "label_smoothing",
    "log_odds",
    "log_prob",
    "log_ratio",
    "nll",
    "orpo",
    "plackett_luce_nll",
    "ppo_clip",
    "preference_nll",
    "preference_objective",
    "ratio_metrics",
    "reduce",
    "reinforce",
    "reward_centering",
    "sequence_log_ratio",
    "sequence_mean",
    "sequence_sum",
    "simpo",
    "smooth_choice",
    "soft_preference_nll",
    "value_clip",
    "z_loss",
]
