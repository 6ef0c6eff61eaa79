"""Token log-probabilities, and losses made of them. `jaxgpt.losses.vocab_head` computes them from hidden states."""

import jax
import jax.numpy as jnp
import optax
from jax import Array

from jaxgpt.losses.checks import expect, promote

MASKED_LOGIT = -1e30  # of what can't be chosen: probability 0, but finite, so that sums and differences are never NaN


def expected(logp: Array, x: Array) -> Array:
    """sum_v p_v x_v, [..., V] -> [...]. Where log p_v = -inf it adds 0, without gradient, even if x_v is infinite."""
    return jnp.sum(jnp.exp(logp) * jnp.where(logp > -jnp.inf, x, 0.0), axis=-1)


def log_prob(logits: Array, tokens: Array) -> Array:
    """log softmax(logits)[tokens], in nats.  logits [..., V], tokens [...] integers -> [...].

    The backward pass recomputes the softmax instead of storing it: this saves memory, and the forward pass compiles the
    same with and without a gradient, so its values are bit-identical (PPO's first ratio is exactly 1).
    A token outside the vocabulary gives NaN: check ids on the host.
    """
    expect(logits=(logits, "float ... V"), tokens=(tokens, "int ..."))
    (logits,) = promote(logits)
    logits = logits - jax.lax.stop_gradient(logits.max(axis=-1, keepdims=True))  # a common offset costs no precision
    return -jax.checkpoint(optax.softmax_cross_entropy_with_integer_labels)(logits, tokens)


def nll(logits: Array, tokens: Array) -> Array:
    """-log P(token), the loss of pretraining and finetuning (Radford et al. 2018, eq. 1).  -> [...], nats per token."""
    return -log_prob(logits, tokens)


def label_smoothing(logits: Array, tokens: Array, epsilon: float) -> Array:
    """Cross-entropy to a target with 1 - eps on the token and eps spread evenly (Szegedy et al. 2016, section 7).

    L = (1 - eps) (-log p_y) + eps / V sum_v (-log p_v)            [..., V], [...] -> [...]

    With eps > 0 a logit of -inf gives +inf; with eps = 0 it is `nll`.
    """
    expect(logits=(logits, "float ... V"), tokens=(tokens, "int ..."))
    (logits,) = promote(logits)
    uniform = -jax.nn.log_softmax(logits).mean(axis=-1)
    return (1.0 - epsilon) * nll(logits, tokens) + epsilon * jnp.where(epsilon == 0, 0.0, uniform)


def z_loss(logits: Array) -> Array:
    """(log sum_v e^logit_v)^2, which keeps the softmax's normaliser near 1 (PaLM, section 5; weight 1e-4).

    [..., V] -> [...]. A term to add to an NLL, returned unweighted.
    """
    expect(logits=(logits, "float ... V"))
    return jnp.square(jax.nn.logsumexp(promote(logits)[0], axis=-1))


def entropy(logits: Array) -> Array:
    """H = -sum_v p_v log p_v of the full softmax, in nats.  [..., V] -> [...].

    As a bonus it is subtracted from a loss: add -weight * entropy. A token of probability 0 (a logit of -inf) adds 0.
    """
    expect(logits=(logits, "float ... V"))
    logp = jax.nn.log_softmax(promote(logits)[0])
    return -expected(logp, logp)
