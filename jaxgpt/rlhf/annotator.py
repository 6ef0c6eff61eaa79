"""The simulated annotator: a program that stands in for a person and says so wherever its labels appear.

Its gold score of a text is VADER's compound sentiment (Hutto & Gilbert 2014, a lexicon; -1 to 1), or the text's
brevity, and it picks its favourite from softmax(gold / temperature).
"""

import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np

from jaxgpt.config import Positive, check_settings
from jaxgpt.errors import needs_extra

if TYPE_CHECKING:
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer


@dataclasses.dataclass(frozen=True)
class SimulatedAnnotator:
    """Prefers cheerful answers, or short ones, noisily: P(choose i) = softmax(gold / temperature)_i."""

    temperature: Positive = 0.15
    wish: Literal["cheerful", "short"] = "cheerful"

    def __post_init__(self) -> None:
        check_settings(self)

    @property
    def name(self) -> str:
        """Who annotates, as written in records and reports."""
        kind = "VADER" if self.wish == "cheerful" else "number of words"
        return f"simulated annotator ({kind}, temperature {self.temperature:g})"

    def gold(self, texts: Sequence[str]) -> np.ndarray:
        """The scores that choices are based on, float64: `gold_scores`, or -words / 20 (an empty answer counts as 40
        words)."""
        if self.wish == "cheerful":
            return gold_scores(texts)
        return -np.array([len(text.split()) or 40 for text in texts]) / 20.0

    def probabilities(self, scores_BC: np.ndarray) -> np.ndarray:
        """P(choice) for gold scores [B, C], float64."""
        shifted = (scores_BC - scores_BC.max(1, keepdims=True)) / self.temperature
        weights = np.exp(shifted)
        return weights / weights.sum(1, keepdims=True)

    def choose(self, scores_BC: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """One noisy favourite per row, [B]."""
        cumulative = self.probabilities(scores_BC).cumsum(1)
        return (rng.random((len(scores_BC), 1)) > cumulative[:, :-1]).sum(1)

    def ceiling(self, scores_BC: np.ndarray) -> float:
        """The accuracy of a predictor that knows the gold scores: choices are noisy, so no reward model can beat it."""
        return float(self.probabilities(scores_BC).max(1).mean())


def gold_scores(texts: Sequence[str]) -> np.ndarray:
    """VADER's compound sentiment of each text, in [-1, 1], float64."""
    return np.array([_vader().polarity_scores(text)["compound"] for text in texts])


@functools.cache
def _vader() -> "SentimentIntensityAnalyzer":
    with needs_extra("eval"):
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    return SentimentIntensityAnalyzer()


def simulated_ceiling(records: Iterable[Mapping[str, float | Sequence[float]]]) -> float | None:
    """`SimulatedAnnotator.ceiling`, computed from what the annotator recorded with its choices (`gold`, `temperature`);
    None where a person chose."""
    simulated = [record for record in records if "gold" in record]
    if not simulated:
        return None
    annotator = SimulatedAnnotator(np.asarray(simulated[0].get("temperature", 1.0)).item())
    return float(np.mean([annotator.ceiling(np.array([record["gold"]])) for record in simulated]))
