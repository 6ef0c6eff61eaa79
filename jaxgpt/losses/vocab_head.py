"""Log-probabilities straight from hidden states and head weights, one tile of tokens at a time.

A batch's logits, [B, T, V] in float32, are often its largest array by far, and their gradient is another. Here each
tile of T goes through the head, is reduced to a few numbers per token and discarded; the backward pass recomputes it.
Peak memory falls from B T V to B tile V, at the cost of one more matrix product in the backward pass. Rows may be
sharded: tiles run along T only.
"""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.custom_derivatives import CustomVJPPrimal, SymbolicZero
from jax.typing import ArrayLike, DTypeLike

from jaxgpt.losses.checks import expect, expect_value
from jaxgpt.losses.tokens import expected


class HeadOutputs(NamedTuple):
    """What losses need from each token's logits, [..., T], in nats; float32, or float64 for float64 hidden states."""

    logp: Array  # log softmax(logits)[token]; the NLL is -logp
    log_z: Array  # log sum_v e^logit_v; the z-loss is its square
    mean_logp: Array  # 1/V sum_v log p_v; label smoothing is -(1 - eps) logp - eps mean_logp
    entropy: Array  # -sum_v p_v log p_v


def tiled_head_outputs(
    hidden: Array,
    head_VD: Array,
    tokens: Array,
    *,
    tile: int = 128,
    temperature: ArrayLike = 1.0,
    gradients: Literal["auto", "plain"] = "auto",
) -> HeadOutputs:
    """All of `HeadOutputs` for logits = hidden @ head^T / temperature.  [..., T, D], [V, D], [..., T] -> [..., T].

    The product is computed in the dtype of `hidden` and accumulated in float32, or in float64 if that is its dtype.
    Values and gradients equal those of the losses on full logits; under jit, unused outputs are not computed.

    The gradient is written out (`_pull_back`): for bfloat16 hidden states the products of the backward pass have
    bfloat16 operands too, where JAX's own would be float32, and the head's gradient is summed over tiles in float32.
    gradients="plain" is differentiated by JAX, also in forward mode (jvp, hessian).
    """
    expect(hidden=(hidden, "float ... T D"), tokens=(tokens, "int ... T"), head=(head_VD, "float V D"))
    expect_value(tile >= 1, "tile is {tile}; it must be at least 1", tile=tile)
    T = tokens.shape[-1]
    tile = min(tile, max(T, 1))
    tiles = _split(hidden, tile, axis=-2), head_VD, _split(tokens, tile, axis=-1), temperature
    found = _own_gradient(*tiles) if gradients == "auto" else _by_tile(*tiles)
    return HeadOutputs(*(_join(x, T) for x in found))


def _split(x: Array, tile: int, axis: int) -> Array:
    """[..., T, ...] with T at `axis` -> [tiles, ..., tile, ...], padded with zeros."""
    axis += x.ndim
    tiles = -(-x.shape[axis] // tile)
    padded = jnp.pad(x, [(0, tiles * tile - size if i == axis else 0) for i, size in enumerate(x.shape)])
    return jnp.moveaxis(padded.reshape(*x.shape[:axis], tiles, tile, *x.shape[axis + 1 :]), axis, 0)


def _join(x: Array, T: int) -> Array:
    """[tiles, ..., tile] -> [..., T]."""
    x = jnp.moveaxis(x, 0, -2)
    return x.reshape(*x.shape[:-2], x.shape[-2] * x.shape[-1])[..., :T]


def _by_tile(hidden_tiles: Array, head_VD: Array, token_tiles: Array, temperature: ArrayLike) -> HeadOutputs:
    """The outputs of all tiles, [tiles, ..., tile]; differentiated by JAX."""
    head_VD = head_VD.astype(hidden_tiles.dtype)

    @jax.checkpoint
    def outputs(hidden: Array, tokens: Array) -> HeadOutputs:
        logits = _logits(hidden, head_VD, temperature)
        top, log_sum = _normaliser(logits)
        chosen = jnp.take_along_axis(logits, tokens[..., None], axis=-1)
        logp = (logits - top) - log_sum
        chosen = (chosen - top) - log_sum  # first the largest logit: a common offset costs no precision
        return HeadOutputs(chosen[..., 0], (top + log_sum)[..., 0], logp.mean(axis=-1), -expected(logp, logp))

    return jax.lax.map(lambda x: outputs(*x), (hidden_tiles, token_tiles))


def _logits(hidden: Array, head_VD: Array, temperature: ArrayLike) -> Array:
    """h W^T / t of a tile, [..., V]."""
    dtype = _accumulator(hidden)
    product = jnp.einsum("...d,vd->...v", hidden, head_VD, preferred_element_type=dtype)
    return product / jnp.asarray(temperature, dtype)


def _normaliser(logits: Array) -> tuple[Array, Array]:
    """The largest logit, and log sum_v e^(logit_v - largest), [..., 1]."""
    top = jax.lax.stop_gradient(logits.max(axis=-1, keepdims=True))
    return top, jnp.log(jnp.exp(logits - top).sum(axis=-1, keepdims=True))


def _accumulator(hidden: Array) -> DTypeLike:
    return jnp.float64 if hidden.dtype == jnp.float64 else jnp.float32


_own_gradient = jax.custom_vjp(_by_tile)


def _forward(*primals: CustomVJPPrimal) -> tuple[HeadOutputs, tuple[Array, ...]]:
    arguments = tuple(x.value for x in primals)
    found = _by_tile(*arguments)
    return found, (*arguments, found.log_z)


def _pull_back(kept: tuple[Array, ...], out: HeadOutputs) -> tuple[Array | None, ...]:
    """The gradients of hidden states, head and temperature, tile by tile, from that of the logits l = h W^T / t.

    With p = softmax(l), and given the gradients of the outputs:

    dl_v = [v = token] d_logp + d_mean / V + p_v (d_log_z - d_logp - d_mean - d_entropy (log p_v + entropy))
    dh = dl W / t;   dW = dl^T h / t;   dt = -sum_v dl_v l_v / t
    """
    hidden_tiles, head_VD, token_tiles, temperature, log_z_tiles = kept
    dtype = _accumulator(hidden_tiles)
    rounded = hidden_tiles.dtype.itemsize < 4  # coarser than a float32 log z
    V = head_VD.shape[0]
    weights_VD = head_VD.astype(hidden_tiles.dtype)
    given = tuple(None if isinstance(x, SymbolicZero) else x[..., None] for x in out)  # None: of an unused output

    def one(total_VD: Array, tile: tuple[Array, Array, Array, Any]) -> tuple[Array, tuple[Array, Array]]:
        hidden, tokens, log_z, (d_logp, d_log_z, d_mean, d_entropy) = tile
        logits = _logits(hidden, weights_VD, temperature)
        logp = logits - log_z[..., None] if rounded else jax.nn.log_softmax(logits)
        terms = [sign * x for sign, x in ((1, d_log_z), (-1, d_logp), (-1, d_mean)) if x is not None]
        if d_entropy is not None:
            terms.append(-d_entropy * (jnp.where(logp > -jnp.inf, logp, 0.0) - expected(logp, logp)[..., None]))
        slope = jnp.exp(logp) * sum(terms, start=jnp.zeros((), dtype))
        if d_mean is not None:
            slope += d_mean / V
        if d_logp is not None:
            vocabulary = jax.lax.broadcasted_iota(tokens.dtype, logp.shape, logp.ndim - 1)
            slope += jnp.where(vocabulary == tokens[..., None], d_logp, 0.0)
        slope = slope / jnp.asarray(temperature, dtype)
        by_temperature = -jnp.where(slope == 0, 0.0, slope * logits).sum()
        # The barrier: one rounded array is what both products read.
        slope = jax.lax.optimization_barrier(slope.astype(hidden.dtype))
        by_hidden = jnp.einsum("...v,vd->...d", slope, weights_VD, preferred_element_type=dtype)
        total_VD += jnp.einsum(
            "...v,...d->vd", slope, hidden, preferred_element_type=dtype, out_sharding=_explicit_sharding(head_VD)
        )
        return total_VD, (by_hidden.astype(hidden.dtype), by_temperature)

    total_VD, (by_hidden, by_temperature) = jax.lax.scan(
        one, jnp.zeros(head_VD.shape, dtype), (hidden_tiles, token_tiles, log_z_tiles, given)
    )
    return by_hidden, total_VD.astype(head_VD.dtype), None, by_temperature.sum().astype(jnp.asarray(temperature).dtype)


def _explicit_sharding(x: Array) -> jax.sharding.NamedSharding | None:
    """The sharding of x on a mesh with explicit axes, where a sum over sharded rows has to say that of its result."""
    found = jax.typeof(x).sharding
    return found if jax.sharding.AxisType.Explicit in found.mesh.axis_types else None


_own_gradient.defvjp(_forward, _pull_back, symbolic_zeros=True)


def log_prob(hidden: Array, head_VD: Array, tokens: Array, *, tile: int = 128, temperature: ArrayLike = 1.0) -> Array:
    """`losses.log_prob` of logits = hidden @ head^T / temperature, without storing them.  -> [..., T], nats."""
    return tiled_head_outputs(hidden, head_VD, tokens, tile=tile, temperature=temperature).logp


def nll(hidden: Array, head_VD: Array, tokens: Array, *, tile: int = 128, temperature: ArrayLike = 1.0) -> Array:
    """`losses.nll` of logits = hidden @ head^T / temperature, without storing them.  -> [..., T], nats per token."""
    return -log_prob(hidden, head_VD, tokens, tile=tile, temperature=temperature)
