"""The reward model: a GPT whose scalar head is read at the answer's last token.

    h(x, y) = gain * (w · hidden[last] + b) + bias

Gain and bias are set so that h has mean 0 and standard deviation 1 on samples from the reference policy (Ziegler et al.
2020). Parameters: {'model': GPT, 'head': scalar head, 'gain': (), 'bias': ()}.
"""

from collections.abc import Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxgpt import losses
from jaxgpt.config import ModelConfig
from jaxgpt.losses import Mean, returns
from jaxgpt.models import sharding, transformer
from jaxgpt.rlhf.intervals import calibration
from jaxgpt.structs import Array, Batch, Params, Preferences
from jaxgpt.training.step import LossFn, Metrics, jit_on


def init(key: Array, params: Params, width: int) -> Params:
    """A reward model that starts from a language model, with a fresh head and no normalisation yet."""
    return {
        "model": params,
        "head": transformer.init_scalar_head(key, width),
        "gain": jnp.ones(()),
        "bias": jnp.zeros(()),
    }


def score(params: Params, config: ModelConfig, batch: Batch, embedding_offset_BTD: Array | None = None) -> Array:
    """h(x, y) of each row, [B] float32. Padding after the answer has no effect. For `embedding_offset_BTD` see
    `transformer.hidden`."""
    h_BTD = transformer.hidden(params["model"], config, batch.tokens_BT, embedding_offset_BTD=embedding_offset_BTD)
    raw_B = transformer.at_last_token(transformer.apply_scalar_head(params["head"], h_BTD), batch.mask_BT)
    return params["gain"] * raw_B + params["bias"]


def candidate_scores(params: Params, config: ModelConfig, preferences: Preferences) -> Array:
    """h of every candidate, [B, C]."""
    return score(params, config, preferences.rows).reshape(preferences.present_BC.shape)


def loss(params: Params, config: ModelConfig, preferences: Preferences) -> tuple[Mean, dict[str, Mean]]:
    """-log softmax(h)[choice], and how often the favourite has the highest reward."""
    scores_BC = candidate_scores(params, config, preferences)
    return losses.preference_objective(scores_BC, preferences.choice_B, preferences.present_BC)


def make_loss(config: ModelConfig) -> LossFn[Preferences]:
    """`loss` in the form that a training step takes."""

    def loss_fn(params: Params, batch: Preferences, key: Array | None = None) -> tuple[Mean, Metrics]:
        return loss(params, config, batch)

    return loss_fn


def trainable_names() -> tuple[str, ...]:
    """The parameters that gradients train; gain and bias are set from samples instead."""
    return ("model", "head")


def normalise_on(params: Params, config: ModelConfig, batch: Batch) -> Params:
    """Change gain and bias so that the rewards of these rows have mean 0 and standard deviation 1."""
    gain, bias = returns.fit_normalisation(jax.jit(score, static_argnums=1)(params, config, batch))
    return {**params, "gain": params["gain"] * gain, "bias": params["bias"] * gain + bias}


class HeldoutMetrics(NamedTuple):
    """How well rewards predict choices that were not trained on."""

    accuracy: float  # how often the favourite has the highest reward
    chance: float  # accuracy of a uniform guess
    nll: float  # mean negative log-likelihood of the choices under softmax(h), nats
    calibration: list[dict[str, float]]  # table of softmax(h) against choices, see `intervals.calibration`
    calibration_error: float


def heldout_metrics(score_BC: np.ndarray, choice_B: np.ndarray, present_BC: np.ndarray) -> HeldoutMetrics:
    """`HeldoutMetrics` from rewards [B, C], the favourite's index [B], and which candidates exist [B, C]; on the
    host."""
    logits_BC = np.where(present_BC, np.asarray(score_BC, np.float64), -np.inf)
    chosen_BC = np.arange(logits_BC.shape[1]) == choice_B[:, None]
    logp_BC = logits_BC - np.logaddexp.reduce(logits_BC, axis=1, keepdims=True)
    table, error = calibration(np.exp(logp_BC)[present_BC], chosen_BC[present_BC])
    return HeldoutMetrics(
        accuracy=float((logits_BC.argmax(1) == choice_B).mean()),
        chance=float((1 / present_BC.sum(1)).mean()),
        nll=float(-logp_BC[chosen_BC].mean()),
        calibration=table,
        calibration_error=error,
    )


def evaluate(params: Params, config: ModelConfig, batches: Iterable[Preferences], mesh: Mesh) -> HeldoutMetrics:
    """`heldout_metrics` of host batches of one shape; rows without any candidate are padding and don't count."""
    program = jit_on(mesh, lambda params, batch: candidate_scores(params, config, batch))
    parts = []
    for batch in batches:
        real_B = np.asarray(batch.present_BC).any(1)
        score_BC = np.asarray(program(params, sharding.place_whole(batch, mesh)))
        parts.append((score_BC[real_B], batch.choice_B[real_B], batch.present_BC[real_B]))
    return heldout_metrics(*(np.concatenate(part) for part in zip(*parts, strict=True)))
