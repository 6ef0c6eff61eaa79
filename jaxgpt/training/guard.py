"""A guard around updates: it skips those with a loss, gradient or step that is not finite and, if asked, loss spikes.

Skipping means that parameters, optimiser and step counter keep every bit, inside the jitted program. Skips are counted,
and the host stops a run with too many in a row (`runs.loop.Loop`). Multiplying an update by 0 would keep a NaN,
and `optax.apply_if_finite` applies the NaN once its patience runs out.
"""

import dataclasses
from typing import TypeVar

import jax
import jax.numpy as jnp
from flax import struct

from jaxgpt.config import Count, Nonnegative, check_settings
from jaxgpt.structs import Array

T = TypeVar("T")
DECAY = 0.98  # of the running moments: they average over about the last 50 losses
MIN_ACCEPTED = 20  # accepted losses before a spike can be recognised


@dataclasses.dataclass(frozen=True)
class GuardConfig:
    """When an update is skipped, and when the run stops. A loss that is not finite is always skipped."""

    patience: Count = 5  # skipped updates in a row after which the run stops
    spike: Nonnegative = 0.0  # skip a loss more than this many standard deviations above its running mean; 0: never

    def __post_init__(self) -> None:
        check_settings(self)


@struct.dataclass
class Guard:
    """What the guard remembers between updates; scalars."""

    in_a_row: Array  # int32: updates skipped since the last accepted one
    skipped: Array  # int32: updates skipped in all
    accepted: Array  # int32: updates made
    mean: Array  # float32: running mean of the accepted losses, not yet corrected for its start at 0
    square: Array  # float32: the same of their squares


def init() -> Guard:
    """The guard before the first update."""
    count, moment = jnp.zeros((), jnp.int32), jnp.zeros((), jnp.float32)
    # Each field has its own buffer, because the step donates them.
    return Guard(count, jnp.copy(count), jnp.copy(count), moment, jnp.copy(moment))


def accepts(guard: Guard, loss: Array, grad_norm: Array, update_norm: Array, spike: float = 0.0) -> Array:
    """Whether this update may be made: the loss and the norms of gradient and update are finite and, with `spike`, the
    loss is at most that many running standard deviations above its running mean (checked once `MIN_ACCEPTED` losses
    have been accepted). Parameters stay finite: an update with a finite norm is too small to overflow them."""
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm) & jnp.isfinite(update_norm)
    if not spike:
        return finite
    weight = 1 - DECAY ** jnp.maximum(guard.accepted, 1).astype(jnp.float32)
    mean = guard.mean / weight
    deviation = jnp.sqrt(jnp.maximum(guard.square / weight - mean**2, 0.0))
    return finite & ((guard.accepted < MIN_ACCEPTED) | (loss <= mean + spike * deviation))


def update(guard: Guard, admitted: Array, loss: Array) -> Guard:
    """The guard after an update that was made or skipped."""
    moments = (DECAY * guard.mean + (1 - DECAY) * loss, DECAY * guard.square + (1 - DECAY) * loss**2)
    mean, square = select(admitted, moments, (guard.mean, guard.square))
    made = admitted.astype(jnp.int32)
    return Guard((guard.in_a_row + 1) * (1 - made), guard.skipped + 1 - made, guard.accepted + made, mean, square)


def select(admitted: Array, new: T, old: T) -> T:
    """`new` if admitted, else `old` bit for bit, whatever `new` holds."""
    return jax.tree.map(lambda a, b: jnp.where(admitted, a, b), new, old)
