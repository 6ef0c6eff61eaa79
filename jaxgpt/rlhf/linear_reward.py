"""A reward that is linear in a frozen model's hidden states: fitted to a few dozen choices in about a second.

    h(x, y) = w . z(x, y)        z: the hidden state at the answer's last token and the mean hidden state over the
                                 answer, each feature standardised over all candidate answers
    J(w) = mean over choices of -log( exp h(x, y^b) / sum_j exp h(x, y^j) ) + ridge |w|^2 / 2,    y^b: the chosen answer

J is convex. Its first term is a reward model's loss (with ties, that of `losses.preference_nll`); the transformer is
frozen and only the head w is trained.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from jaxgpt import losses
from jaxgpt.config import ModelConfig
from jaxgpt.errors import UserError
from jaxgpt.models import transformer
from jaxgpt.rlhf.rollout import map_in_batches
from jaxgpt.structs import Array, Batch, Params
from jaxgpt.training.step import jit_on

STEPS = 200  # of L-BFGS; with a ridge it converges in far fewer


class LinearReward(NamedTuple):
    """The result of `fit`, with F = 2 D features. Only differences of h between answers to one prompt count."""

    weight_F: np.ndarray
    mean_F: np.ndarray  # of each feature
    deviation_F: np.ndarray  # standard deviation of each feature

    def score(self, feature_F: np.ndarray) -> np.ndarray:
        """h of answers with these features, [..., F] -> [...]."""
        return ((feature_F - self.mean_F) / self.deviation_F) @ self.weight_F


def features(params: Params, config: ModelConfig, rows: Batch, batch: int, mesh: Mesh) -> np.ndarray:
    """The hidden state at each answer's last token and the mean over the answer, [rows, 2 D] float32 on the host,
    `batch` rows at a time."""
    program = _feature_program(mesh, config)
    return np.asarray(map_in_batches(lambda part: program(params, part), rows, min(batch, len(rows.mask_BT)), mesh))


@functools.lru_cache(maxsize=8)
def _feature_program(mesh: Mesh, config: ModelConfig) -> Callable[[Params, Batch], Array]:
    return jit_on(mesh, lambda params, rows: _features(params, config, rows))


def _features(params: Params, config: ModelConfig, rows: Batch) -> Array:
    h_BTD = transformer.hidden(params, config, rows.tokens_BT).astype(jnp.float32)
    own_BT = rows.mask_BT.astype(jnp.float32)
    mean_BD = (h_BTD * own_BT[..., None]).sum(1) / jnp.maximum(own_BT.sum(1), 1)[:, None]
    last_B = rows.mask_BT.shape[1] - 1 - jnp.argmax(rows.mask_BT[:, ::-1], axis=1)
    last_BD = jnp.take_along_axis(h_BTD, last_B[:, None, None], axis=1)[:, 0]
    return jnp.concatenate([last_BD, mean_BD], axis=1)


def fit(feature_BCF: np.ndarray, choice_B: np.ndarray, present_BC: np.ndarray, ridge: float = 0.03) -> LinearReward:
    """Minimise J over B choices among up to C answers each; `present_BC` marks the answers that exist, and a choice may
    be `losses.TIE`. UserError if there are no choices, a feature isn't finite, or the ridge isn't above 0 (without it,
    w may grow without bound)."""
    if not len(choice_B) or not np.isfinite(feature_BCF).all():
        raise UserError("a linear reward needs at least one choice, and every feature must be finite")
    if not ridge > 0:
        raise UserError(f"ridge is {ridge}; it must be above 0")
    shown_NF = feature_BCF[present_BC]
    mean_F, deviation_F = shown_NF.mean(0), shown_NF.std(0) + 1e-3
    tie_rate = float((choice_B == losses.TIE).sum() / (len(choice_B) + 1))
    weight_F = _minimise((feature_BCF - mean_F) / deviation_F, choice_B, present_BC, ridge, tie_rate)
    return LinearReward(np.asarray(weight_F), mean_F, deviation_F)


@functools.partial(jax.jit, static_argnames="tie_rate")
def _minimise(z_BCF: Array, choice_B: Array, present_BC: Array, ridge: Array, tie_rate: float) -> Array:
    def objective(weight_F: Array) -> Array:
        nll_B = losses.preference_nll(z_BCF @ weight_F, choice_B, present_BC, tie_rate=tie_rate)
        return nll_B.mean() + ridge * (weight_F @ weight_F) / 2

    solver = optax.lbfgs()
    value_and_grad = optax.value_and_grad_from_state(objective)

    def step(carry: tuple[Array, optax.OptState], _: None) -> tuple[tuple[Array, optax.OptState], None]:
        weight_F, state = carry
        value, slope_F = value_and_grad(weight_F, state=state)
        updates, state = solver.update(slope_F, state, weight_F, value=value, grad=slope_F, value_fn=objective)
        return (optax.apply_updates(weight_F, updates), state), None

    first_F = jnp.zeros(z_BCF.shape[-1])
    return jax.lax.scan(step, (first_F, solver.init(first_F)), None, length=STEPS)[0][0]
