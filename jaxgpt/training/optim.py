"""Optimisers and learning-rate schedules, built on optax alone."""

import math
from collections.abc import Hashable

import jax
import jax.numpy as jnp
import optax
from flax import traverse_util

from jaxgpt.errors import UserError
from jaxgpt.structs import Array, Params


def warmup_cosine(peak: float, steps: int, warmup: int, final: float = 0.1) -> optax.Schedule:
    """Linear from 0 to `peak` over `warmup` steps, then half a cosine down to `final` * peak at `steps`."""
    if warmup >= steps:
        raise UserError(f"warmup of {warmup} steps is not shorter than the {steps} steps of training; lower it")
    return optax.warmup_cosine_decay_schedule(0.0, peak, warmup, steps, peak * final)


def linear_to_zero(peak: float, steps: int, warmup: int = 0) -> optax.Schedule:
    """Linear from 0 to `peak` over `warmup` steps, then linear down to 0 at `steps`."""
    up = optax.linear_schedule(0.0, peak, warmup) if warmup else optax.constant_schedule(peak)
    return optax.join_schedules([up, optax.linear_schedule(peak, 0.0, max(steps - warmup, 1))], [warmup])


def decay_mask(params: Params) -> Params:
    """True for what weight decay acts on: matrices; not biases, norms, positions or scalar heads."""

    def decays(path: tuple[Hashable, ...], leaf: Array) -> bool:
        return leaf.ndim >= 2 and path[-1] != "positions_TD"

    return dict(traverse_util.path_aware_map(decays, params))


class Bounded(optax.GradientTransformation):  # type: ignore[misc]  # optax has no types
    """A transformation whose updates are finite if the gradient's norm is, as long as `size(step)` is at most 1.

    It clips the gradient, so that Adam's moments are finite, and Adam's direction is at most about
    (1 - b1) / sqrt((1 - b2) (1 - b1^2 / b2)) by Cauchy-Schwarz. The guard need not look at such updates, which saves
    reading gradients, moments and parameters once more."""

    size: optax.Schedule  # |learning rate|, times the weight decay where that is above 1


def _bounded(
    tx: optax.GradientTransformation,
    rate: optax.ScalarOrSchedule,
    *,
    b2: float,
    eps: float,
    clip: float,
    weight_decay: float = 0.0,
) -> optax.GradientTransformation:
    """tx as `Bounded`, if these settings make it so."""
    if not (0 <= b2 < 1 and eps > 0 and math.isfinite(clip) and math.isfinite(weight_decay)):
        return tx
    found = Bounded(tx.init, tx.update)
    found.size = lambda step: jnp.abs(rate(step) if callable(rate) else rate) * max(1.0, abs(weight_decay))
    return found


def adamw(
    schedule: optax.Schedule, *, weight_decay: float = 0.1, b2: float = 0.95, clip: float = 1.0
) -> optax.GradientTransformation:
    """Clipping by global norm, then AdamW with decay on matrices only."""
    tx = optax.chain(
        optax.clip_by_global_norm(clip),
        optax.adamw(schedule, b1=0.9, b2=b2, weight_decay=weight_decay, mask=decay_mask),
    )
    return _bounded(tx, schedule, b2=b2, eps=1e-8, clip=clip, weight_decay=weight_decay)


def scale_by_adam_tf(b1: float = 0.9, b2: float = 0.999, eps: float = 1e-5) -> optax.GradientTransformation:
    """Adam's direction as TensorFlow computes it: sqrt(1 - b2^t) / (1 - b1^t) * m / (sqrt(v) + eps).

    optax and PyTorch add eps *after* correcting v for its bias; here it is added before, so that its effect is
    eps / sqrt(1 - b2^t): about 32 times larger in the first step. PPO for language models was tuned with this form.
    """

    def update(
        updates: optax.Updates, state: optax.ScaleByAdamState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.ScaleByAdamState]:
        del params
        mu = optax.tree.update_moment(updates, state.mu, b1, 1)
        nu = optax.tree.update_moment_per_elem_norm(updates, state.nu, b2, 2)
        count = optax.safe_increment(state.count)
        t = count.astype(jnp.float32)
        correction = jnp.sqrt(1 - b2**t) / (1 - b1**t)
        direction = jax.tree.map(lambda m, v: correction * m / (jnp.sqrt(v) + eps), mu, nu)
        return direction, optax.ScaleByAdamState(count=count, mu=mu, nu=nu)

    return optax.GradientTransformation(optax.scale_by_adam(b1, b2).init, update)


def adam_tf(schedule: optax.Schedule, *, eps: float = 1e-5, clip: float = 1.0) -> optax.GradientTransformation:
    """Clipping, then Adam in TensorFlow's form: the optimiser of PPO here."""
    tx = optax.chain(optax.clip_by_global_norm(clip), scale_by_adam_tf(eps=eps), optax.scale_by_learning_rate(schedule))
    return _bounded(tx, schedule, b2=0.999, eps=eps, clip=clip)


def split(params: Params, trainable: tuple[str, ...]) -> tuple[Params, Params]:
    """Trainable and frozen parameters, by top-level names: ('policy',) leaves 'reference' and 'reward' frozen."""
    missing = set(trainable) - set(params)
    if missing:
        raise UserError(f"no parameters named {sorted(missing)}; there are {sorted(params)}")
    frozen = {name: part for name, part in params.items() if name not in trainable}
    return {name: part for name, part in params.items() if name in trainable}, frozen


def copy(params: Params) -> Params:
    """New buffers with the same values. A frozen reference needs its own: donating the original deletes its aliases."""
    return jax.tree.map(jnp.copy, params)
