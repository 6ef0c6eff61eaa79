"""Statistics of answers: means with confidence intervals, win rates, calibration, diversity."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from jaxgpt.errors import UserError


@dataclasses.dataclass(frozen=True)
class Interval:
    """A mean with its 95 % confidence interval (normal approximation, over prompts)."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


def interval(values: Sequence[float] | np.ndarray) -> Interval:
    """Mean ± 1.96 standard errors; the values must be independent (one per prompt)."""
    x = np.asarray(values, np.float64)
    if x.size < 2:
        raise UserError(f"an interval needs at least 2 values, not {x.size}; evaluate on more prompts")
    margin = 1.96 * x.std(ddof=1) / np.sqrt(x.size)
    return Interval(float(x.mean()), float(x.mean() - margin), float(x.mean() + margin))


def crossed_interval(values_SN: np.ndarray, resamples: int = 1000) -> Interval:
    """The mean over S runs and the N prompts that all of them answered, with a 95 % percentile bootstrap that
    resamples both runs and prompts (Owen 2007), so it covers other seeds and other prompts. With three runs it is still
    too narrow (a t-interval over the three would be wider)."""
    x = np.atleast_2d(np.asarray(values_SN, np.float64))
    if x.shape[1] < 2:
        raise UserError(f"an interval needs at least 2 values, not {x.shape[1]}; evaluate on more prompts")
    rng = np.random.default_rng(0)
    S, N = x.shape
    run_weights = rng.multinomial(S, np.full(S, 1 / S), resamples) / S
    prompt_weights = rng.multinomial(N, np.full(N, 1 / N), resamples) / N
    low, high = np.quantile(((run_weights @ x) * prompt_weights).sum(1), [0.025, 0.975])
    return Interval(float(x.mean()), float(low), float(high))


def wins(scores: np.ndarray, baseline: np.ndarray) -> np.ndarray:
    """Per prompt: 1 where the score is higher than the baseline's, 1/2 where they are equal, else 0."""
    return (scores > baseline) + 0.5 * (scores == baseline)


def best_of_n_kl_bound(n: int) -> float:
    """log n - (n-1)/n nats: an upper bound on the KL of best-of-n from the policy that it samples from."""
    return float(np.log(n) - (n - 1) / n)


def distinct_2(texts: Sequence[str], limit: int = 4000) -> float:
    """The fraction of distinct pairs among the first `limit` pairs of neighbouring words.

    It falls when answers repeat themselves, and also as the number of pairs grows: hence the limit."""
    pairs = [pair for text in texts for pair in zip(text.split(), text.split()[1:], strict=False)][:limit]
    return len(set(pairs)) / max(len(pairs), 1)


def calibration(
    probabilities: np.ndarray, outcomes: np.ndarray, bins: int = 10
) -> tuple[list[dict[str, float]], float]:
    """Reliability table (mean prediction, observed frequency, count) and the expected calibration error.

    `probabilities` and `outcomes` are flat: the predicted probability of each candidate, and whether it was chosen.
    """
    table = []
    index = np.minimum((probabilities * bins).astype(int), bins - 1)
    for b in range(bins):
        in_bin = index == b
        if in_bin.any():
            predicted, observed = float(probabilities[in_bin].mean()), float(outcomes[in_bin].mean())
            table.append({"predicted": predicted, "observed": observed, "count": int(in_bin.sum())})
    total = sum(row["count"] for row in table)
    error = sum(row["count"] * abs(row["predicted"] - row["observed"]) for row in table) / total
    return table, float(error)


def proportion(hits: float, count: int) -> Interval:
    """A fraction with its 95 % interval by Wilson's score (1927), which holds for few trials; ties count half."""
    if count < 1 or not 0 <= hits <= count:
        raise UserError(f"{hits} of {count} is no proportion; there must be at least one trial, and no more hits")
    z, p = 1.96, hits / count
    middle = (p + z * z / (2 * count)) / (1 + z * z / count)
    half = z * np.sqrt(p * (1 - p) / count + z * z / (4 * count * count)) / (1 + z * z / count)
    return Interval(p, float(max(middle - half, 0.0)), float(min(middle + half, 1.0)))


def in_words(name: str, hits: float, count: int) -> str:
    """A blind comparison as a sentence: how often one side won, and whether that can be chance."""
    found = proportion(hits, count)
    verdict = "too few to be sure"
    if found.low > 0.5:
        verdict = "more often than chance"
    elif found.high < 0.5:
        verdict = "less often than chance"
    return f"{name} in {hits:g} of {count}: {verdict} (95 % interval {found.low:.0%} to {found.high:.0%})"
