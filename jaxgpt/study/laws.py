"""The laws of overoptimisation (Gao et al. 2022), fitted by least squares.

With d = sqrt(KL to the start in nats), the gain R in gold reward from optimising a learned reward was found to be

    best-of-n   R(d) = d (alpha - beta d)          RL   R(d) = d (alpha - beta log d)

beta > 0 is overoptimisation: R peaks at d = alpha / (2 beta) for best-of-n and at log d = alpha / beta - 1 for RL.
"""

from collections.abc import Callable
from typing import Literal

import numpy as np

from jaxgpt.rlhf.intervals import OVER_PROMPTS, Interval, SeedSummary, summarise_seeds

Law = Literal["best-of-n", "RL"]
LawFit = dict[str, SeedSummary]  # of alpha and beta
PARAMETERS = ("alpha", "beta")
BEND_TERMS: dict[Law, Callable[[np.ndarray], np.ndarray]] = {"best-of-n": lambda d: d, "RL": np.log}


def gold_gain(law: Law, d: np.ndarray, alpha: float, beta: float) -> np.ndarray:
    """R(d) under a law; d > 0."""
    return d * (alpha - beta * BEND_TERMS[law](d))


def least_squares(law: Law, d_N: np.ndarray, gain_N: np.ndarray) -> np.ndarray:
    """(alpha, beta) fitted to points; NaN for fewer than two."""
    if len(d_N) < 2:
        return np.full(2, np.nan)
    return np.linalg.lstsq(np.stack([d_N, -d_N * BEND_TERMS[law](d_N)], 1), gain_N, rcond=None)[0]


def fit_best_of_n_law(kl_n: np.ndarray, gain_nP: np.ndarray, draws: int = 500) -> LawFit:
    """Fit the best-of-n law over every n, from each prompt's gain, with an interval over resampled prompts."""
    rng, d, P = np.random.default_rng(0), kl_distance(kl_n), gain_nP.shape[1]
    resampled = [least_squares("best-of-n", d, gain_nP[:, rng.integers(P, size=P)].mean(1)) for _ in range(draws)]
    low, high = np.quantile(np.array(resampled), [0.025, 0.975], axis=0)
    found = zip(PARAMETERS, least_squares("best-of-n", d, gain_nP.mean(1)), low, high, strict=True)
    return {
        name: SeedSummary(mean, down, up, OVER_PROMPTS, (mean,), Interval(mean, down, up))
        for name, mean, down, up in found
    }


def fit_rl_law(kl_SI: np.ndarray, gain_SI: np.ndarray, least: float = 0.1) -> LawFit:
    """Fit the RL law to each seed's run, over the iterations whose KL is above `least` nats (a measured KL may be below
    0). One run's iterations depend on each other, so that runs alone say how sure a fit is."""
    d_SI = kl_distance(kl_SI)
    each = [least_squares("RL", d[d**2 > least], own[d**2 > least]) for d, own in zip(d_SI, gain_SI, strict=True)]
    return dict(zip(PARAMETERS, map(summarise_seeds, np.transpose(each)), strict=True))


def kl_distance(kl: np.ndarray) -> np.ndarray:
    """d from KL estimates, some of which may be slightly below 0."""
    return np.sqrt(np.maximum(kl, 0.0))
