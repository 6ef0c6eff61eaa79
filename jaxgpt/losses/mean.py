"""Means kept as sum and count, so that they can be pooled, and sums and means per sequence."""

import dataclasses
import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax import Array

from jaxgpt.losses.checks import expect, promote


@functools.partial(jax.tree_util.register_dataclass, data_fields=["sum", "count"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Mean:
    """A mean kept as sum and count, so that parts of a batch combine exactly.

    Parts add up with `+`; inside shard_map or pmap `jax.lax.psum(mean, axis_name)` pools the devices' parts.
    """

    sum: Array
    count: Array

    @property
    def value(self) -> Array:
        """sum / count, or 0 if nothing was counted."""
        return self.sum / jnp.maximum(self.count, 1)

    def __add__(self, other: "Mean") -> "Mean":
        return Mean(self.sum + other.sum, self.count + other.count)


def reduce(values: Array, mask: Array | None = None) -> Mean:
    """Sum and count over the elements where `mask` is True (all without a mask); an all-False mask gives 0.

    Returning sum and count rather than a mean lets parts of a batch add up to exactly the whole batch's mean.
    """
    expect(values=(values, "float ..."), mask=(mask, "bool ..."))
    (values,) = promote(values)
    if mask is None:
        return Mean(values.sum(), jnp.asarray(values.size, values.dtype))
    return Mean(jnp.where(mask, values, 0).sum(), mask.sum().astype(values.dtype))


def combine(
    terms: Mapping[str, Array], mask: Array | None = None, weights: Mapping[str, float | Array] | None = None
) -> tuple[Mean, dict[str, Mean]]:
    """Add losses: the mean of sum_i weight_i term_i, and each term's own mean as a metric under its name.

    All terms are values of the same elements, so that one count divides them all; weights default to 1.
    Raises ValueError if there are no terms, or a weight has no term.
    """
    weights = weights or {}
    unknown = sorted(set(weights) - set(terms))
    if unknown or not terms:
        raise ValueError(f"combine: weights for {unknown}, but the terms are {sorted(terms)}")
    expect(**{name: (values, "float ...") for name, values in terms.items()}, mask=(mask, "bool ..."))
    means = {name: reduce(values, mask) for name, values in terms.items()}
    total = sum(weights.get(name, 1.0) * mean.sum for name, mean in means.items())
    return Mean(jnp.asarray(total), next(iter(means.values())).count), means


def sequence_sum(values_BT: Array, mask_BT: Array) -> Array:
    """The sum over each row's masked tokens, [B]: turns nats per token into nats per answer."""
    expect(values=(values_BT, "float ... T"), mask=(mask_BT, "bool ... T"))
    (values_BT,) = promote(values_BT)
    return jnp.where(mask_BT, values_BT, 0).sum(axis=-1)


def sequence_mean(values_BT: Array, mask_BT: Array) -> Array:
    """The mean over each row's masked tokens, [B]; 0 for a row without any.

    Reduced over rows, it weights all answers equally, whatever their length (the original GRPO);
    `reduce(values_BT, mask_BT)` weights all tokens equally (DAPO); so does `sequence_sum` divided by a constant length,
    without depending on the batch's lengths (Dr. GRPO).
    """
    total_B = sequence_sum(values_BT, mask_BT)
    return total_B / jnp.maximum(mask_BT.sum(axis=-1), 1).astype(total_B.dtype)
