"""A linear reward is the minimum of its convex objective, and its features are the hidden states it says."""

import dataclasses

import jax
import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import logsumexp

from jaxgpt.errors import UserError
from jaxgpt.models import transformer
from jaxgpt.models.sharding import make_mesh
from jaxgpt.rlhf import linear_reward
from jaxgpt.structs import Batch
from tests.helpers import TINY, random_params

MODEL = dataclasses.replace(TINY, layers=1)


def choices(count=12, candidates=4, size=30, seed=0):
    rng = np.random.default_rng(seed)
    feature = rng.normal(1.0, 3.0, (count, candidates, size)).astype(np.float32)
    present = np.arange(candidates) < rng.integers(2, candidates + 1, count)[:, None]
    return feature, rng.integers(0, 2, count), present


def test_the_fit_is_the_minimum_that_scipy_finds_in_float64():
    feature, choice, present = choices()
    found = linear_reward.fit(feature, choice, present, ridge=0.03)
    shown = feature[present].astype(np.float64)
    z = (feature - shown.mean(0)) / (shown.std(0) + 1e-3)

    def objective(w):
        h = np.where(present, z @ w, -np.inf)
        return (logsumexp(h, axis=1) - h[np.arange(len(h)), choice]).mean() + 0.03 * w @ w / 2

    best = minimize(objective, np.zeros(z.shape[-1]), method="BFGS", options={"gtol": 1e-9})
    np.testing.assert_allclose(found.weight_F, best.x, atol=2e-3)
    assert objective(found.weight_F.astype(np.float64)) == pytest.approx(best.fun, abs=1e-6)
    np.testing.assert_allclose(found.score(feature), z @ best.x, atol=2e-2)


def test_the_features_are_the_last_hidden_state_of_the_answer_and_their_mean():
    rng, params = np.random.default_rng(1), random_params(MODEL, scale=2.0)
    tokens = rng.integers(0, MODEL.vocab, (5, 12)).astype(np.int32)
    mask = (np.arange(12) >= 4) & (np.arange(12) < np.array([6, 12, 5, 9, 8])[:, None])
    found = linear_reward.features(params, MODEL, Batch(tokens, mask), 2, make_mesh(devices=jax.devices()[:1]))
    hidden = np.asarray(transformer.hidden(params, MODEL, tokens))
    for row, h, own in zip(found, hidden, mask, strict=True):
        np.testing.assert_allclose(row[: MODEL.width], h[np.flatnonzero(own)[-1]], atol=1e-5)
        np.testing.assert_allclose(row[MODEL.width :], h[own].mean(0), atol=1e-5)


@pytest.mark.parametrize("ridge", [0.0, -1.0, float("nan")])
def test_what_has_no_minimum_is_refused(ridge):
    with pytest.raises(UserError, match="ridge"):
        linear_reward.fit(*choices(), ridge=ridge)
    feature, choice, present = choices()
    with pytest.raises(UserError, match="at least one choice"):
        linear_reward.fit(feature[:0], choice[:0], present[:0])
    with pytest.raises(UserError, match="finite"):
        linear_reward.fit(feature * np.inf, choice, present)
