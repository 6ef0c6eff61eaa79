"""Means that can still be pooled, and the sums that lead to them."""

import dataclasses
import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax import Array

from jaxgpt.losses.checks import expect


@functools.partial(jax.tree_util.register_dataclass, data_fields=["sum", "count"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Mean:
    """A mean that can still be pooled: sum and count, so that parts of a batch combine exactly.

    Parts add up with `+`; inside shard_map or pmap `jax.lax.psum(mean, axis_name)` pools the devices' parts.
    """

    sum: Array
    count: Array

    @property
    def value(self) -> Array:
        """sum / count, and 0 where nothing was counted."""
        return self.sum / jnp.maximum(self.count, 1)

    def __add__(self, other: "Mean") -> "Mean":
        return Mean(self.sum + other.sum, self.count + other.count)


def reduce(values: Array, mask: Array | None = None) -> Mean:
    """Sum and count over the elements where `mask` is True (all, without one); an all-False mask gives 0.

    A sum and a count, not a mean: parts of a batch then add up to exactly the whole batch's mean.
    """
    expect(values=(values, "float ..."), mask=(mask, "bool ..."))
    values = jnp.asarray(values)
    values = values.astype(jnp.promote_types(values.dtype, jnp.float32))
    if mask is None:
        return Mean(values.sum(), jnp.asarray(values.size, jnp.float32))
    return Mean(jnp.where(mask, values, 0).sum(), mask.sum().astype(jnp.float32))


def combine(
    terms: Mapping[str, Array], mask: Array | None = None, weights: Mapping[str, float | Array] | None = None
) -> tuple[Mean, dict[str, Mean]]:
    """Losses add: the mean of sum_i weight_i term_i, and each term's own mean as a metric under its name.

    The terms are values of the same elements, so that one count divides them all; a weight not given is 1.
    """
    weights = weights or {}
    strangers = sorted(set(weights) - set(terms))
    if strangers or not terms:
        raise ValueError(f"combine: weights for {strangers}, but the terms are {sorted(terms)}")
    expect(**{name: (values, "float ...") for name, values in terms.items()}, mask=(mask, "bool ..."))
    means = {name: reduce(values, mask) for name, values in terms.items()}
    total = sum(weights.get(name, 1.0) * mean.sum for name, mean in means.items())
    return Mean(jnp.asarray(total), next(iter(means.values())).count), means


def sequence_sum(values_BT: Array, mask_BT: Array) -> Array:
    """The sum over each row's masked tokens, [B]: nats an answer, from nats a token."""
    expect(values=(values_BT, "float ... T"), mask=(mask_BT, "bool ... T"))
    values_BT = values_BT.astype(jnp.promote_types(values_BT.dtype, jnp.float32))
    return jnp.where(mask_BT, values_BT, 0).sum(axis=-1)


def sequence_mean(values_BT: Array, mask_BT: Array) -> Array:
    """The mean over each row's masked tokens, [B]; 0 for a row without any.

    Reduced over rows it weighs answers alike, whatever their length (GRPO's first form); `reduce(values_BT, mask_BT)`
    weighs tokens alike (DAPO); `sequence_sum` divided by a constant length does so without the batch's own
    lengths (Dr. GRPO).
    """
    return sequence_sum(values_BT, mask_BT) / jnp.maximum(mask_BT.sum(axis=-1), 1)
