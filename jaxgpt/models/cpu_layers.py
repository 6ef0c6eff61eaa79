"""The layers of `layers.plain_layers` with hand-written gradients, for CPUs.

XLA's CPU compiler fuses element-wise work into the transposed operands of the backward pass's matrix products, which
then miss its fast kernels. `CPU_LAYERS` computes each weight's gradient as a single product x^T dy of arrays that a
barrier has materialised, and saves only what the gradient needs. Outputs are the same as those of the plain layers, and
gradients are equal up to rounding; only reverse-mode differentiation is supported, and
`CPU_LAYERS` says so.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxgpt.losses import MASKED_LOGIT
from jaxgpt.models import attention, sharding
from jaxgpt.models.layers import (
    COLUMN_PARALLEL,
    ROW_PARALLEL,
    Layers,
    dense,
    gelu,
    norm_arrays,
    normalise,
    swiglu,
)
from jaxgpt.structs import Array, Params

Saved = tuple[Any, ...]  # what a forward pass saves for its backward pass
TRANSPOSE_CHUNKS = 4  # a matrix is transposed in this many chunks of rows
_materialise = jax.lax.optimization_barrier


def _flatten(x: Array) -> Array:
    return x.reshape(-1, x.shape[-1])


def _copy_transposed(x: Array) -> Array:
    """A copy of x^T. XLA:CPU's fast bfloat16 product takes no transposed operand, and a plain transpose only
    changes the layout, even behind a barrier; the result of a loop has the standard layout."""
    x = _flatten(x)
    rows = x.shape[0] // TRANSPOSE_CHUNKS
    if x.dtype == jnp.float32 or x.shape[0] % TRANSPOSE_CHUNKS or sharding.is_partitioned():
        return x.T

    def copy_chunk(i: Array, out: Array) -> Array:
        part = jax.lax.dynamic_slice_in_dim(x, i * rows, rows)
        return jax.lax.dynamic_update_slice_in_dim(out, part.T, i * rows, axis=1)

    return jax.lax.fori_loop(0, TRANSPOSE_CHUNKS, copy_chunk, jnp.zeros(x.shape[::-1], x.dtype))


def _dot(x: Array, w: Array, dtype: DTypeLike) -> Array:
    """x @ w accumulated in float32 and rounded to dtype."""
    return jnp.matmul(x, w, preferred_element_type=jnp.float32).astype(dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _linear(x: Array, kernel: Array, bias: Array | None, axes: tuple[str, str]) -> Array:
    return _linear_forward(x, kernel, bias, axes)[0]


def _linear_forward(x: Array, kernel: Array, bias: Array | None, axes: tuple[str, str]) -> tuple[Array, Saved]:
    x, gathered = _materialise((x, sharding.gather_fsdp(kernel.astype(x.dtype), axes)))
    product = jnp.matmul(x, gathered, preferred_element_type=jnp.float32)
    dtypes = jnp.zeros((), kernel.dtype), None if bias is None else jnp.zeros((), bias.dtype)  # scalars carry dtypes
    return (product if bias is None else product + bias).astype(x.dtype), (x, gathered, *dtypes)


def _linear_backward(axes: tuple[str, str], saved: Saved, dy: Array) -> tuple[Array, Array, Array | None]:
    x, kernel, kernel_like, bias_like = saved
    dy = _materialise(dy)
    dkernel = jnp.matmul(_copy_transposed(x), _flatten(dy), preferred_element_type=jnp.float32)
    dbias = None if bias_like is None else _flatten(dy).sum(axis=0, dtype=jnp.float32)
    return (
        _dot(dy, _copy_transposed(kernel), x.dtype),
        sharding.constrain(dkernel, *axes).astype(kernel_like.dtype),
        dbias,
    )


_linear.defvjp(_linear_forward, _linear_backward)


def _fast_dense(layer: Params, x: Array, axes: tuple[str, str] = COLUMN_PARALLEL) -> Array:
    if "scale" in layer:
        return dense(layer, x, axes, platform="cpu")
    bias = layer["bias"].astype(jnp.float32) if "bias" in layer else None
    if "lora_a" in layer:
        return _lora_linear(x, layer["kernel"], layer["lora_a"], layer["lora_b"], bias, axes)
    return _linear(x, layer["kernel"], bias, axes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _lora_linear(x: Array, kernel: Array, a: Array, b: Array, bias: Array | None, axes: tuple[str, str]) -> Array:
    return _lora_linear_forward(x, kernel, a, b, bias, axes)[0]


def _lora_linear_forward(
    x: Array, kernel: Array, a: Array, b: Array, bias: Array | None, axes: tuple[str, str]
) -> tuple[Array, Saved]:
    """x W + (x A) B. The backward pass materialises dy, which XLA would otherwise recompute for all five products."""
    product, saved = _linear_forward(x, kernel, bias, axes)
    x = saved[0]
    xa = _materialise(x @ a.astype(x.dtype))
    return product + xa @ b.astype(x.dtype), (saved, a, b, xa)


def _lora_linear_backward(axes: tuple[str, str], saved: Saved, dy: Array) -> tuple[Array | None, ...]:
    linear_saved, a, b, xa = saved
    dy = _materialise(dy)
    dxa = _materialise(dy @ b.astype(dy.dtype).T)
    dx, dkernel, dbias = _linear_backward(axes, linear_saved, dy)
    da = jnp.matmul(_flatten(linear_saved[0]).T, _flatten(dxa), preferred_element_type=jnp.float32).astype(a.dtype)
    db = jnp.matmul(_flatten(xa).T, _flatten(dy), preferred_element_type=jnp.float32).astype(b.dtype)
    return dx + dxa @ a.astype(dxa.dtype).T, dkernel, da, db, dbias


_lora_linear.defvjp(_lora_linear_forward, _lora_linear_backward)


_norm_vjp = jax.custom_vjp(norm_arrays, nondiff_argnums=(3,))


def _norm_forward(x: Array, scale: Array, bias: Array | None, epsilon: float) -> tuple[Array, Saved]:
    return _norm_vjp(x, scale, bias, epsilon), (x, scale, bias)


def _norm_backward(epsilon: float, saved: Saved, dy: Array) -> tuple[Array, Array, Array | None]:
    x, scale, bias = saved
    normalised, inverse = normalise(x, epsilon, centre=bias is not None)
    dy = dy.astype(jnp.float32)
    g = dy * scale
    dx = g - normalised * (g * normalised).mean(-1, keepdims=True)
    if bias is None:
        return (inverse * dx).astype(x.dtype), _flatten(dy * normalised).sum(axis=0), None
    dx = inverse * (dx - g.mean(-1, keepdims=True))
    return dx.astype(x.dtype), _flatten(dy * normalised).sum(axis=0), _flatten(dy).sum(axis=0)


_norm_vjp.defvjp(_norm_forward, _norm_backward)


def _fast_norm(layer: Params, x: Array, epsilon: float) -> Array:
    return _norm_vjp(x, layer["scale"], layer.get("bias"), epsilon)


@jax.custom_vjp
def _fast_gelu(x: Array) -> Array:
    return gelu(x)


def _gelu_backward(x: Array, dy: Array) -> tuple[Array]:
    x, dy = _materialise((x, dy))
    x32, c = x.astype(jnp.float32), 0.7978845608028654  # sqrt(2 / pi)
    t = jnp.tanh(c * (x32 + 0.044715 * x32**3))
    slope = 0.5 * (1 + t) + 0.5 * x32 * (1 - t * t) * c * (1 + 3 * 0.044715 * x32 * x32)
    return ((dy * slope).astype(x.dtype),)


_fast_gelu.defvjp(lambda x: (_fast_gelu(x), x), _gelu_backward)


@jax.custom_vjp
def _fast_swiglu(gate: Array, up: Array) -> Array:
    return swiglu(gate, up)


def _swiglu_backward(saved: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    gate, up, dy = _materialise((*saved, dy))
    g, u, dy32 = (x.astype(jnp.float32) for x in (gate, up, dy))
    s = jax.nn.sigmoid(g)
    return (dy32 * u * s * (1 + g * (1 - s))).astype(gate.dtype), (dy32 * g * s).astype(up.dtype)


_fast_swiglu.defvjp(lambda gate, up: (_fast_swiglu(gate, up), (gate, up)), _swiglu_backward)


@jax.custom_vjp
def _attention(q_BHTK: Array, k_BHTK: Array, v_BHTK: Array, visible_TT: Array) -> Array:
    return _attention_forward(q_BHTK, k_BHTK, v_BHTK, visible_TT)[0]


def _causal_halves(T: int) -> tuple[tuple[int, int], ...]:
    """Two halves of the queries, each as (begin, end). The first never attends to the second's keys, so a quarter of
    the square of scores is never computed. Splitting further is no faster."""
    return ((0, T // 2), (T // 2, T)) if T > 1 else ((0, T),)


def _attention_forward(q_BHTK: Array, k_BHTK: Array, v_BHTK: Array, visible_TT: Array) -> tuple[Array, Saved]:
    weights, outs = [], []
    for begin, end in _causal_halves(q_BHTK.shape[2]):
        q, k, v = q_BHTK[:, :, begin:end], k_BHTK[:, :, :end], v_BHTK[:, :, :end]
        visible = visible_TT[..., begin:end, :end]
        scores = jnp.einsum("bhqk,bhsk->bhqs", q, k, preferred_element_type=jnp.float32)
        p = jax.nn.softmax(jnp.where(visible, scores * q.shape[-1] ** -0.5, MASKED_LOGIT)).astype(q.dtype)
        weights.append(_materialise(p))
        outs.append(jnp.einsum("bhqs,bhsk->bhqk", weights[-1], v, preferred_element_type=jnp.float32).astype(q.dtype))
    out = jnp.concatenate(outs, axis=2)
    return out, (q_BHTK, k_BHTK, v_BHTK, weights, out)


def _attention_backward(saved: Saved, dy: Array) -> tuple[Array, Array, Array, None]:
    """With P = softmax(S): dS = P (dP - sum(dy out)). For the gradients of k and v,
    q and dy are transposed rather than P and dS, which are larger."""
    q, k, v, weights, out = saved
    dtype, T = q.dtype, q.shape[2]
    dy = _materialise(dy)
    inner = (dy.astype(jnp.float32) * out.astype(jnp.float32)).sum(axis=-1, keepdims=True)
    q_BHKT, dy_BHKT = _materialise((q.swapaxes(2, 3), dy.swapaxes(2, 3)))
    dqs, dks, dvs = [], [], []
    for (begin, end), p in zip(_causal_halves(T), weights, strict=True):
        padding = ((0, 0), (0, 0), (0, 0), (0, T - end))  # keys after `end` get no gradient from these queries
        dv = jnp.einsum("bhkq,bhqs->bhks", dy_BHKT[..., begin:end], p, preferred_element_type=jnp.float32)
        dp = jnp.einsum("bhqk,bhsk->bhqs", dy[:, :, begin:end], v[:, :, :end], preferred_element_type=jnp.float32)
        ds = p.astype(jnp.float32) * (dp - inner[:, :, begin:end]) * q.shape[-1] ** -0.5
        ds = _materialise(ds.astype(dtype))
        dqs.append(jnp.einsum("bhqs,bhsk->bhqk", ds, k[:, :, :end], preferred_element_type=jnp.float32).astype(dtype))
        dk = jnp.einsum("bhkq,bhqs->bhks", q_BHKT[..., begin:end], ds, preferred_element_type=jnp.float32)
        dks.append(jnp.pad(dk, padding))
        dvs.append(jnp.pad(dv, padding))
    dk, dv = (functools.reduce(jnp.add, parts).astype(dtype).swapaxes(2, 3) for parts in (dks, dvs))
    return jnp.concatenate(dqs, axis=2), dk, dv, None


_attention.defvjp(_attention_forward, _attention_backward)


def _fast_attend(q_BTHK: Array, k_BTHK: Array, v_BTHK: Array, segments_BT: Array | None) -> Array:
    T = q_BTHK.shape[1]
    visible = jnp.tril(jnp.ones((T, T), bool))
    if segments_BT is not None:
        visible = visible & (segments_BT[:, None, :, None] == segments_BT[:, None, None, :])
    k_BTHK, v_BTHK = (attention.repeat_for_heads(x, q_BTHK.shape[2]) for x in (k_BTHK, v_BTHK))
    q, k, v = _materialise(tuple(x.swapaxes(1, 2) for x in (q_BTHK, k_BTHK, v_BTHK)))
    return _attention(q, k, v, visible).swapaxes(1, 2)


@jax.custom_vjp
def _fast_vocab_logits(h: Array, table_VD: Array) -> Array:
    return _vocab_logits_forward(h, table_VD)[0]


def _vocab_logits_forward(h: Array, table_VD: Array) -> tuple[Array, Saved]:
    h, gathered = _materialise((h, sharding.gather_fsdp(table_VD.astype(h.dtype), ROW_PARALLEL)))
    logits = jnp.matmul(h, _copy_transposed(gathered), preferred_element_type=jnp.float32)
    return logits, (h, gathered, jnp.zeros((), table_VD.dtype))


def _vocab_logits_backward(saved: Saved, dy: Array) -> tuple[Array, Array]:
    h, table_VD, table_like = saved
    dy = _materialise(dy.astype(h.dtype))
    dtable = _materialise(jnp.matmul(_copy_transposed(h), _flatten(dy), preferred_element_type=jnp.float32)).T
    return _dot(dy, table_VD, h.dtype), sharding.constrain(dtable, *ROW_PARALLEL).astype(table_like.dtype)


_fast_vocab_logits.defvjp(_vocab_logits_forward, _vocab_logits_backward)


def _reverse_mode_only(layer: Callable[..., Array]) -> Callable[..., Array]:
    return lambda *arguments: layer(*attention.reverse_mode_only(arguments))


_FAST = (_fast_dense, _fast_norm, _fast_gelu, _fast_swiglu, _fast_attend, _fast_vocab_logits)
CPU_LAYERS = Layers(*(_reverse_mode_only(layer) for layer in _FAST))
