"""The reward model: a GPT whose scalar head is read at the answer's last token.

    h(x, y) = gain * (w · hidden[last] + b) + bias

Gain and bias are set so that h has mean 0 and standard deviation 1 on samples from the reference policy (Ziegler et al.
2020). Parameters: {'model': GPT, 'head': scalar head, 'gain': (), 'bias': ()}.
"""

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxgpt import losses
from jaxgpt.config import ModelConfig
from jaxgpt.errors import UserError
from jaxgpt.losses import Mean, returns
from jaxgpt.models import sharding, transformer
from jaxgpt.rlhf.intervals import (
    Interval,
    calibration,
    calibration_by_chance,
    check_finite,
    in_percent,
    ratio_interval,
    share,
)
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


def loss(
    params: Params, config: ModelConfig, preferences: Preferences, tie_rate: float = 0.0
) -> tuple[Mean, dict[str, Mean]]:
    """-log softmax(h)[choice], and how often the favourite has the highest reward. For people's ties and `tie_rate` see
    `losses.preference_nll`."""
    scores_BC = candidate_scores(params, config, preferences)
    return losses.preference_objective(scores_BC, preferences.choice_B, preferences.present_BC, tie_rate)


def make_loss(config: ModelConfig, tie_rate: float = 0.0) -> LossFn[Preferences]:
    """`loss` in the form that a training step takes."""

    def loss_fn(params: Params, batch: Preferences, key: Array | None = None) -> tuple[Mean, Metrics]:
        return loss(params, config, batch, tie_rate)

    return loss_fn


def trainable_names() -> tuple[str, ...]:
    """The parameters that gradients train; gain and bias are set from samples instead."""
    return ("model", "head")


def normalise_on(params: Params, config: ModelConfig, batch: Batch) -> Params:
    """Change gain and bias so that the rewards of these rows have mean 0 and standard deviation 1."""
    gain, bias = returns.fit_normalisation(jax.jit(score, static_argnums=1)(params, config, batch))
    return {**params, "gain": params["gain"] * gain, "bias": params["bias"] * gain + bias}


class HeldoutMetrics(NamedTuple):
    """How well scores predict choices that were not trained on. People's ties are counted, and in no other figure."""

    accuracy: float  # mean of `losses.favourite_hits`: how often the favourite has the highest score
    accuracy_interval: Interval  # 95 %, over prompts
    choices: int  # those with a favourite
    prompts: int  # that they are about; answers to one prompt are not independent
    ties: int
    chance: float  # accuracy of a uniform guess: the mean of 1 / C
    nll: float  # mean negative log-likelihood of the choices under softmax(h), nats
    nll_interval: Interval  # 95 %, over prompts; infinite for a single one
    chance_nll: float  # of a uniform guess: the mean of log C
    calibration: list[dict[str, float]]  # table of softmax(h) against choices, see `intervals.calibration`
    calibration_error: float
    calibration_by_chance: float  # 95 % of perfectly calibrated predictions would have a smaller error

    @property
    def loss_text(self) -> str:
        """Loss and calibration error, each beside what chance alone would give."""
        return (
            f"loss {self.nll_interval.plus_minus()} (guessing {self.chance_nll:.3f}); calibration error "
            f"{self.calibration_error:.3f} (by chance up to {self.calibration_by_chance:.3f})"
        )

    def __str__(self) -> str:
        return f"{in_percent(self.accuracy_interval, self.choices)}, chance {self.chance:.1%}"


def heldout_metrics(
    score_BC: np.ndarray, choice_B: np.ndarray, present_BC: np.ndarray, prompts: Sequence[Hashable] | None = None
) -> HeldoutMetrics:
    """`HeldoutMetrics` from scores [B, C], the favourite's index (or `TIE`) [B], which candidates exist [B, C], and
    what each row's prompt is (without it, every row has its own); on the host. UserError if no row has a favourite, or
    if a score is not finite."""
    check_finite(np.asarray(score_BC)[np.asarray(present_BC)], "scores of held-out answers")
    kept = np.flatnonzero(np.asarray(choice_B) != losses.TIE)
    if not len(kept):
        raise UserError(f"all {len(choice_B)} held-out preferences are ties; hold out some that have a favourite")
    prompts = [prompts[int(i)] for i in kept] if prompts is not None else list(range(len(kept)))
    choice_B, present_BC, ties = choice_B[kept], present_BC[kept], len(choice_B) - len(kept)
    logits_BC = np.where(present_BC, np.asarray(score_BC, np.float64)[kept], -np.inf)
    chosen_BC = np.arange(logits_BC.shape[1]) == choice_B[:, None]
    logp_BC = logits_BC - np.logaddexp.reduce(logits_BC, axis=1, keepdims=True)
    table, error = calibration(np.exp(logp_BC)[present_BC], chosen_BC[present_BC])
    arrays = map(jnp.asarray, (np.float32(logits_BC), chosen_BC, present_BC))
    hit_B = np.asarray(losses.favourite_hits(*arrays), np.float64)
    nll_B, count_B = -logp_BC[chosen_BC], present_BC.sum(1)
    return HeldoutMetrics(
        accuracy=float(hit_B.mean()),
        accuracy_interval=share(hit_B, prompts),
        choices=len(kept),
        prompts=len(set(prompts)),
        ties=ties,
        chance=float((1 / count_B).mean()),
        nll=float(nll_B.mean()),
        nll_interval=ratio_interval(nll_B, np.ones(len(kept)), prompts),
        chance_nll=float(np.log(count_B).mean()),
        calibration=table,
        calibration_error=error,
        calibration_by_chance=calibration_by_chance(np.exp(logp_BC), prompts),
    )


def evaluate(
    scores: Callable[[Params, Preferences], Array], params: Params, batches: Iterable[Preferences], mesh: Mesh
) -> HeldoutMetrics:
    """`heldout_metrics` of host batches of one shape; rows without any candidate are padding and don't count.
    `scores(params, batch)` gives [B, C]. Identical answers get one score, whatever their rounding."""
    program, parts, prompts = jit_on(mesh, scores), [], []
    for batch in batches:
        real_B = np.asarray(batch.present_BC).any(1)
        score_BC = np.asarray(program(params, sharding.place_whole(batch, mesh)))
        parts.append(
            (_equal_where_identical(score_BC, batch)[real_B], batch.choice_B[real_B], batch.present_BC[real_B])
        )
        rows = zip(batch.tokens_BCT[real_B, 0], batch.mask_BCT[real_B, 0], strict=True)
        prompts += [tokens_T[: int(mask_T.argmax())].tobytes() for tokens_T, mask_T in rows]
    score_BC, choice_B, present_BC = (np.concatenate(part) for part in zip(*parts, strict=True))
    return heldout_metrics(score_BC, choice_B, present_BC, prompts)


def _equal_where_identical(score_BC: np.ndarray, batch: Preferences) -> np.ndarray:
    same_BCC = (batch.tokens_BCT[:, :, None] == batch.tokens_BCT[:, None]).all(-1)
    return np.take_along_axis(score_BC, same_BCC.argmax(2), axis=1)
