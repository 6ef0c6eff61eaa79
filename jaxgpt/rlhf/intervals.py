"""Statistics of answers: means with confidence intervals, win rates, calibration, diversity."""

import dataclasses
from collections.abc import Hashable, Sequence

import numpy as np

from jaxgpt.errors import UserError, needs_extra

TOO_WIDE = 0.1  # half the width of a share's interval, above which the share says too little
TOO_FEW = "too few to say"
SEEDS_FOR_AN_INTERVAL = 5  # with fewer, each seed's own value says more than an interval as wide as t would make it
OVER_SEEDS = ("range of seeds", "95 % t-interval over seeds")
OVER_PROMPTS = "95 % interval over prompts"


@dataclasses.dataclass(frozen=True)
class Interval:
    """A mean with its 95 % confidence interval (normal approximation, over prompts)."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"

    def times(self, factor: float) -> "Interval":
        """The same interval in another unit."""
        return Interval(self.mean * factor, self.low * factor, self.high * factor)

    def plus_minus(self, digits: int = 3) -> str:
        """The mean and half the interval's width."""
        half = (self.high - self.low) / 2
        return f"{self.mean:.{digits}f} " + (
            f"± {half:.{digits}f}" if np.isfinite(half) else "(too few for an interval)"
        )


@dataclasses.dataclass(frozen=True)
class SeedSummary:
    """A mean over runs that differ in their seed, and what so many seeds say about it (`summarise_seeds`)."""

    mean: float
    low: float
    high: float
    spread: str  # what `low` and `high` are: the range of 2 to 4 seeds, an interval over more, or one over prompts
    seeds: tuple[float, ...]  # each seed's own mean
    prompts: Interval | None  # 95 % interval over prompts: for these very runs on other prompts

    def text(self, digits: int = 3) -> str:
        """The mean; of 2 to 4 seeds each one's own in parentheses; and in brackets an interval, over seeds from 5 of
        them on, otherwise over prompts."""
        parts = [f"{self.mean:.{digits}f}"]
        if 1 < len(self.seeds) < SEEDS_FOR_AN_INTERVAL:
            parts.append(f"({', '.join(f'{one:.{digits}f}' for one in self.seeds)})")
        shown = self if self.spread == OVER_SEEDS[1] else self.prompts
        if shown is not None and shown.low < shown.high:
            parts.append(f"[{shown.low:.{digits}f}, {shown.high:.{digits}f}]")
        return " ".join(parts)

    def __str__(self) -> str:
        return self.text()


HOW_TO_READ = (
    "In parentheses each seed's own mean, where there are 2 to 4. In brackets the 95 % interval over prompts of these "
    f"very runs, or from {SEEDS_FOR_AN_INTERVAL} seeds on Student's t-interval over seeds."
)


def check_finite(values: np.ndarray, what: str) -> np.ndarray:
    """The values, if all are finite; otherwise UserError. A model's activations may overflow although its weights are
    finite (which `runs.saved_model` guarantees), and every figure computed from them would be wrong."""
    wrong = int((~np.isfinite(values)).sum())
    if wrong:
        raise UserError(
            f"{wrong:,} of {values.size:,} {what} are NaN or infinite: the model's numbers overflow; train it again "
            "with a lower learning rate, or use another temperature"
        )
    return values


def interval(values: Sequence[float] | np.ndarray, clusters: Sequence[Hashable] | None = None) -> Interval:
    """Mean ± 1.96 standard errors. The values must be independent, one per prompt; or `clusters` names each value's
    prompt, and only prompts are independent (Liang & Zeger 1986)."""
    x = np.asarray(values, np.float64)
    groups = len(set(clusters)) if clusters is not None else x.size
    if groups < 2:
        raise UserError(f"an interval needs at least 2 values, not {groups}; evaluate on more prompts")
    return ratio_interval(x, np.ones_like(x), clusters)


def ratio_interval(sums: np.ndarray, counts: np.ndarray, clusters: Sequence[Hashable] | None = None) -> Interval:
    """The mean over all elements of rows that have a sum and a count each (nats and tokens, say), with the interval of
    `interval`; it is infinite for a single row or cluster."""
    mean, error = _mean_and_error(np.asarray(sums, np.float64), np.asarray(counts, np.float64), clusters)
    return Interval(mean, mean - 1.96 * error, mean + 1.96 * error)


def _mean_and_error(sums: np.ndarray, counts: np.ndarray, clusters: Sequence[Hashable] | None) -> tuple[float, float]:
    """sum / count, and its standard error where clusters of rows are independent; infinite if there is only one."""
    mean = float(sums.sum() / counts.sum())
    deviations = np.asarray(sums - mean * counts, np.float64)
    if clusters is not None:
        index = {cluster: n for n, cluster in enumerate(dict.fromkeys(clusters))}
        deviations = np.bincount([index[one] for one in clusters], deviations).astype(np.float64)
    groups = len(deviations)
    if groups < 2:
        return mean, float("inf")
    return mean, float(np.sqrt((deviations**2).sum() * groups / (groups - 1)) / counts.sum())


def share(values: Sequence[float] | np.ndarray, clusters: Sequence[Hashable] | None = None) -> Interval:
    """The mean of values between 0 and 1 (hits or wins; a tie of n counts 1 / n) with an interval that holds for few
    values too: Wilson's score (1927), `proportion`, for as many independent values as would vary that much."""
    x = np.asarray(values, np.float64)
    mean, error = _mean_and_error(x, np.ones_like(x), clusters)
    count = float(x.size if clusters is None else len(set(clusters)))
    if 0 < error < np.inf:
        count = min(mean * (1 - mean) / error**2, x.size)
    return proportion(mean * count, count)


def summarise_seeds(values: np.ndarray) -> SeedSummary:
    """The mean of [S, N] values over S seeds and the N prompts that all of them answered, or of one value per seed [S].

    From 5 seeds on with Student's 95 % interval, mean ± t_{S-1} sd / sqrt(S) over the seeds' own means, which are what
    is independent: it covers other seeds on these prompts. To compare two settings give their differences, paired by
    seed and prompt. Iterations of one run are not independent either: give each run's mean over them."""
    x_SN = np.asarray(values, np.float64)
    x_SN = x_SN[:, None] if x_SN.ndim == 1 else x_SN
    S, N = x_SN.shape
    seeds_S, mean = x_SN.mean(1), float(x_SN.mean())
    prompts = interval(x_SN.mean(0)) if N > 1 else None
    low, high, spread = float(seeds_S.min()), float(seeds_S.max()), OVER_SEEDS[0]
    if S >= SEEDS_FOR_AN_INTERVAL:
        with needs_extra("eval"):
            from scipy.special import stdtrit
        half = float(stdtrit(S - 1, 0.975) * seeds_S.std(ddof=1) / np.sqrt(S))
        low, high, spread = mean - half, mean + half, OVER_SEEDS[1]
    elif S == 1 and prompts is not None:
        low, high, spread = prompts.low, prompts.high, OVER_PROMPTS
    return SeedSummary(mean, low, high, spread, tuple(seeds_S.tolist()), prompts)


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


def calibration_by_chance(
    probability_BC: np.ndarray, clusters: Sequence[Hashable] | None = None, draws: int = 200
) -> float:
    """The 95 % quantile of `calibration`'s error if the predictions were perfectly calibrated, found by drawing the
    favourites from them `draws` times. Absent candidates have probability 0. The choices of one cluster are drawn
    together."""
    B, C = probability_BC.shape
    index = {cluster: n for n, cluster in enumerate(dict.fromkeys(clusters if clusters is not None else range(B)))}
    of_B = np.array([index[one] for one in clusters]) if clusters is not None else np.arange(B)
    rng, cumulative_BC, errors = np.random.default_rng(0), probability_BC.cumsum(1)[:, :-1], []
    for _ in range(draws):
        chosen_B = (rng.random(len(index))[of_B, None] > cumulative_BC).sum(1)
        hit_BC = np.arange(C) == chosen_B[:, None]
        errors.append(calibration(probability_BC[probability_BC > 0], hit_BC[probability_BC > 0])[1])
    return float(np.quantile(errors, 0.95))


def proportion(hits: float, count: float) -> Interval:
    """A fraction with its 95 % interval by Wilson's score (1927), which holds for few trials; ties count half."""
    if count < 1 or not 0 <= hits <= count:
        raise UserError(f"{hits} of {count} is no proportion; there must be at least one trial, and no more hits")
    z, p = 1.96, hits / count
    middle = (p + z * z / (2 * count)) / (1 + z * z / count)
    half = z * np.sqrt(p * (1 - p) / count + z * z / (4 * count * count)) / (1 + z * z / count)
    return Interval(p, float(max(middle - half, 0.0)), float(min(middle + half, 1.0)))


def too_wide(found: Interval) -> bool:
    """Whether half of a share's interval exceeds 10 points."""
    return (found.high - found.low) / 2 > TOO_WIDE


def in_percent(found: Interval, count: int) -> str:
    """A held-out share with its number of rows and its interval; says so where those are too few to say anything."""
    verdict = f": {TOO_FEW}" if too_wide(found) else ""
    return f"{found.mean:.1%} of {count:,} (95 % interval {found.low:.1%} to {found.high:.1%}{verdict})"


def in_words(name: str, hits: float, count: int) -> str:
    """A blind comparison as a sentence: how often one side won, and whether that can be chance."""
    found = proportion(hits, count)
    verdict = TOO_FEW if too_wide(found) else "as often as chance"
    if found.low > 0.5:
        verdict = "more often than chance"
    elif found.high < 0.5:
        verdict = "less often than chance"
    return f"{name} in {hits:g} of {count}: {verdict} (95 % interval {found.low:.0%} to {found.high:.0%})"
