"""Log-probabilities straight from hidden states and head weights, one tile of tokens at a time.

A batch's logits, [B, T, V] in float32, are often its largest array by far, and their gradient is another. Here each
tile of T goes through the head, is reduced to a few numbers per token and discarded; the backward pass recomputes it.
Peak memory falls from B T V to B tile V, at the cost of one more matrix product in the backward pass. Rows may be
sharded: tiles run along T only.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxgpt.losses.checks import expect, expect_value
from jaxgpt.losses.tokens import expected


class HeadOutputs(NamedTuple):
    """What losses need from each token's logits, [..., T], in nats; float32, or float64 for float64 hidden states."""

    logp: Array  # log softmax(logits)[token]; the NLL is -logp
    log_z: Array  # log sum_v e^logit_v; the z-loss is its square
    mean_logp: Array  # 1/V sum_v log p_v; label smoothing is -(1 - eps) logp - eps mean_logp
    entropy: Array  # -sum_v p_v log p_v


def tiled_head_outputs(
    hidden: Array, head_VD: Array, tokens: Array, *, tile: int = 128, temperature: float = 1.0
) -> HeadOutputs:
    """All of `HeadOutputs` for logits = hidden @ head^T / temperature.  [..., T, D], [V, D], [..., T] -> [..., T].

    The product is computed in the dtype of `hidden` and accumulated in float32, or in float64 if that is its dtype.
    Values and gradients equal those of the losses on full logits; under jit, unused outputs are not computed.
    """
    expect(hidden=(hidden, "float ... T D"), tokens=(tokens, "int ... T"), head=(head_VD, "float V D"))
    expect_value(tile >= 1, "tile is {tile}; it must be at least 1", tile=tile)
    T = tokens.shape[-1]
    tile = min(tile, max(T, 1))
    tiles = -(-T // tile)
    padding = tiles * tile - T
    hidden = jnp.pad(hidden, [(0, 0)] * (hidden.ndim - 2) + [(0, padding), (0, 0)])
    tokens = jnp.pad(tokens, [(0, 0)] * (tokens.ndim - 1) + [(0, padding)])
    hidden_tiles = jnp.moveaxis(hidden.reshape(*hidden.shape[:-2], tiles, tile, hidden.shape[-1]), -3, 0)
    tokens_tiles = jnp.moveaxis(tokens.reshape(*tokens.shape[:-1], tiles, tile), -2, 0)
    tile_outputs = jax.checkpoint(functools.partial(_tile_outputs, head_VD, temperature))
    found = jax.lax.map(lambda x: tile_outputs(*x), (hidden_tiles, tokens_tiles))
    return HeadOutputs(*(jnp.moveaxis(x, 0, -2).reshape(*tokens.shape[:-1], tiles * tile)[..., :T] for x in found))


def _tile_outputs(head_VD: Array, temperature: float, hidden: Array, tokens: Array) -> HeadOutputs:
    """The outputs of one tile, from its full logits."""
    dtype = jnp.float64 if hidden.dtype == jnp.float64 else jnp.float32
    logits = jnp.einsum("...d,vd->...v", hidden, head_VD.astype(hidden.dtype), preferred_element_type=dtype)
    logits = logits / temperature
    logp = jax.nn.log_softmax(logits)  # first: log z - E[logit] would lose precision for large logits
    chosen = jnp.take_along_axis(logp, tokens[..., None], axis=-1)[..., 0]
    return HeadOutputs(chosen, jax.nn.logsumexp(logits, axis=-1), logp.mean(axis=-1), -expected(logp, logp))


def log_prob(hidden: Array, head_VD: Array, tokens: Array, *, tile: int = 128, temperature: float = 1.0) -> Array:
    """`losses.log_prob` of logits = hidden @ head^T / temperature, without storing them.  -> [..., T], nats."""
    return tiled_head_outputs(hidden, head_VD, tokens, tile=tile, temperature=temperature).logp


def nll(hidden: Array, head_VD: Array, tokens: Array, *, tile: int = 128, temperature: float = 1.0) -> Array:
    """`losses.nll` of logits = hidden @ head^T / temperature, without storing them.  -> [..., T], nats per token."""
    return -log_prob(hidden, head_VD, tokens, tile=tile, temperature=temperature)
