"""The judge: a sentiment classifier of reviews (TF-IDF and logistic regression), fitted on human labels.

No stage trains on its verdicts or on those labels, so it is an independent check on whether answers that the annotator
likes look positive to anyone else.
"""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from jaxgpt.errors import needs_extra
from jaxgpt.rlhf.intervals import Interval, in_percent, share

if TYPE_CHECKING:
    from sklearn.pipeline import Pipeline


@dataclasses.dataclass(frozen=True)
class Judge:
    """A classifier of reviews, and its accuracy on reviews that it has not seen, with its 95 % interval."""

    classifier: "Pipeline"  # from scikit-learn
    accuracy: Interval
    reviews: int  # on which the accuracy was measured

    def __str__(self) -> str:
        return in_percent(self.accuracy, self.reviews)

    def positive_probability(self, texts: Sequence[str]) -> np.ndarray:
        """P(positive) of each text."""
        return self.classifier.predict_proba(list(texts))[:, 1]


def fit_judge(train: tuple[Sequence[str], Sequence[int]], test: tuple[Sequence[str], Sequence[int]]) -> Judge:
    """Fit logistic regression on TF-IDF features of words and word pairs, to human labels; deterministic."""
    with needs_extra("eval"):
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline

    classifier = make_pipeline(
        TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True), LogisticRegression(C=4.0, max_iter=200)
    )
    classifier.fit(list(train[0]), list(train[1]))
    right = classifier.predict(list(test[0])) == np.array(test[1])
    return Judge(classifier, share(right), len(right))
