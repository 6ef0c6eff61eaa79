"""The simulated annotator chooses as it says, and likes what people like."""

import numpy as np
import pytest

from jaxgpt.errors import UserError
from jaxgpt.rlhf.annotator import SimulatedAnnotator, gold_scores


def test_the_annotator_chooses_with_the_stated_probabilities():
    annotator = SimulatedAnnotator(temperature=0.5)
    scores = np.array([[0.2, -0.3, 0.9]])
    expected = np.exp(scores / 0.5) / np.exp(scores / 0.5).sum()
    np.testing.assert_allclose(annotator.probabilities(scores), expected)
    choices = annotator.choose(np.repeat(scores, 20_000, axis=0), np.random.default_rng(0))
    np.testing.assert_allclose(np.bincount(choices, minlength=3) / 20_000, expected[0], atol=0.015)
    assert annotator.ceiling(scores) == pytest.approx(expected.max())


def test_the_annotator_is_always_called_simulated():
    assert "simulated" in SimulatedAnnotator().name and "VADER" in SimulatedAnnotator().name
    with pytest.raises(UserError, match="temperature"):
        SimulatedAnnotator(temperature=0.0)


def test_gold_scores_like_what_people_like():
    praise, blame, nothing = gold_scores(["a wonderful , charming film", "an awful , boring mess", "a film"])
    assert praise > 0.5 > nothing == 0.0 > -0.5 > blame
