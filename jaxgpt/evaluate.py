"""How good are answers? A simulated annotator, an independent judge, and figures with intervals.

The *simulated annotator* stands in for a person. Its gold score of a text is VADER's compound sentiment (Hutto &
Gilbert 2014, a lexicon; -1 to 1), or how short it is, and it picks a favourite with probability
softmax(gold / temperature). It is a program and is called one wherever its labels appear.

The *judge* is a classifier of reviews (TF-IDF and logistic regression) fitted on labels that people gave. No stage
trains on its verdicts or on those labels, so it tells whether what the annotator likes is seen by someone else too.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from jaxgpt.config import UserError


@dataclasses.dataclass(frozen=True)
class SimulatedAnnotator:
    """Prefers cheerful answers, or short ones, noisily: P(choose i) = softmax(gold / temperature)_i."""

    temperature: float = 0.15
    wish: Literal["cheerful", "short"] = "cheerful"

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise UserError(
                f"annotator temperature is {self.temperature}; it must be above 0 (small: hardly any noise)"
            )
        if self.wish not in ("cheerful", "short"):
            raise UserError(f"annotator wish is {self.wish!r}; choose cheerful or short")

    @property
    def name(self) -> str:
        kind = "VADER" if self.wish == "cheerful" else "number of words"
        return f"simulated annotator ({kind}, temperature {self.temperature:g})"

    def gold(self, texts: Sequence[str]) -> np.ndarray:
        """The score that the choices come from, float64: `gold_scores`, or -words / 20 (where an answer that says
        nothing is as bad as one of 40 words)."""
        if self.wish == "cheerful":
            return gold_scores(texts)
        return -np.array([len(text.split()) or 40 for text in texts]) / 20.0

    def probabilities(self, scores_BC: np.ndarray) -> np.ndarray:
        """P(choice) for gold scores [B, C], float64."""
        shifted = (scores_BC - scores_BC.max(1, keepdims=True)) / self.temperature
        weights = np.exp(shifted)
        return weights / weights.sum(1, keepdims=True)

    def choose(self, scores_BC: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """One noisy favourite a row, [B]."""
        cumulative = self.probabilities(scores_BC).cumsum(1)
        return (rng.random((len(scores_BC), 1)) > cumulative[:, :-1]).sum(1)

    def ceiling(self, scores_BC: np.ndarray) -> float:
        """The accuracy of whoever knows the gold scores: what no reward model can beat, because the choice is noisy."""
        return float(self.probabilities(scores_BC).max(1).mean())


def gold_scores(texts: Sequence[str]) -> np.ndarray:
    """VADER's compound sentiment of each text, in [-1, 1], float64."""
    return np.array([_vader().polarity_scores(text)["compound"] for text in texts])


@functools.cache
def _vader() -> Any:
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    return SentimentIntensityAnalyzer()


@dataclasses.dataclass(frozen=True)
class Judge:
    """A classifier of reviews with its accuracy on reviews it has not seen."""

    classifier: Any
    accuracy: float

    def scores(self, texts: Sequence[str]) -> np.ndarray:
        """P(positive) of each text."""
        return self.classifier.predict_proba(list(texts))[:, 1]


def fit_judge(train: tuple[Sequence[str], Sequence[int]], test: tuple[Sequence[str], Sequence[int]]) -> Judge:
    """TF-IDF of words and pairs of words, and logistic regression, on human labels; deterministic."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    classifier = make_pipeline(
        TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True), LogisticRegression(C=4.0, max_iter=200)
    )
    classifier.fit(list(train[0]), list(train[1]))
    return Judge(classifier, float(classifier.score(list(test[0]), list(test[1]))))


@dataclasses.dataclass(frozen=True)
class Interval:
    """A mean with its 95 % confidence interval (normal approximation, over prompts)."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


def interval(values: Sequence[float] | np.ndarray) -> Interval:
    """Mean ± 1.96 standard errors; the values must be independent (one a prompt)."""
    x = np.asarray(values, np.float64)
    if x.size < 2:
        raise UserError(f"an interval needs at least 2 values, not {x.size}; evaluate on more prompts")
    half = 1.96 * x.std(ddof=1) / np.sqrt(x.size)
    return Interval(float(x.mean()), float(x.mean() - half), float(x.mean() + half))


def crossed_interval(values_SN: np.ndarray, resamples: int = 1000) -> Interval:
    """The mean over S runs and the N prompts that all of them answered, with a 95 % percentile bootstrap that draws
    runs and prompts anew (Owen 2007): how far other seeds on other prompts could be. With three runs it is still too
    narrow (a t-interval over the three would be wider)."""
    x = np.atleast_2d(np.asarray(values_SN, np.float64))
    if x.shape[1] < 2:
        raise UserError(f"an interval needs at least 2 values, not {x.shape[1]}; evaluate on more prompts")
    rng = np.random.default_rng(0)
    S, N = x.shape
    runs = rng.multinomial(S, np.full(S, 1 / S), resamples) / S
    prompts = rng.multinomial(N, np.full(N, 1 / N), resamples) / N
    low, high = np.quantile(((runs @ x) * prompts).sum(1), [0.025, 0.975])
    return Interval(float(x.mean()), float(low), float(high))


def wins(scores: np.ndarray, baseline: np.ndarray) -> np.ndarray:
    """1 where the score is higher than the baseline's on the same prompt, 1/2 where equal, else 0."""
    return (scores > baseline) + 0.5 * (scores == baseline)


def best_of_n_kl_bound(n: int) -> float:
    """log n - (n-1)/n nats: an upper bound of best-of-n's KL to the policy it samples from."""
    return float(np.log(n) - (n - 1) / n)


def distinct_2(texts: Sequence[str], limit: int = 4000) -> float:
    """Different pairs of neighbouring words among the first `limit` pairs, as a fraction: falls when answers repeat
    themselves. (It falls with the number of pairs too: that is why they are limited.)"""
    pairs = [pair for text in texts for pair in zip(text.split(), text.split()[1:], strict=False)][:limit]
    return len(set(pairs)) / max(len(pairs), 1)


def calibration(
    probabilities: np.ndarray, outcomes: np.ndarray, bins: int = 10
) -> tuple[list[dict[str, float]], float]:
    """Reliability table (mean prediction, observed frequency, count) and the expected calibration error.

    Both arguments are flat: the predicted probability of each candidate, and whether it was chosen.
    """
    table = []
    index = np.minimum((probabilities * bins).astype(int), bins - 1)
    for b in range(bins):
        inside = index == b
        if inside.any():
            predicted, observed = float(probabilities[inside].mean()), float(outcomes[inside].mean())
            table.append({"predicted": predicted, "observed": observed, "count": int(inside.sum())})
    total = sum(row["count"] for row in table)
    error = sum(row["count"] * abs(row["predicted"] - row["observed"]) for row in table) / total
    return table, float(error)
