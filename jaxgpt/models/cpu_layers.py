"""The layers of `layers.PLAIN` with gradients written by hand, for a CPU.

XLA's CPU compiler fuses element-wise work into the transposed operands of the backward pass's matrix products, which
then leave its fast kernels. `FAST` writes each weight's gradient as one product x^T dy of arrays that have been
materialised (behind a barrier), and saves only what the formula needs. Values are those of `PLAIN` and gradients equal
to rounding; a reverse-mode gradient is all they have.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxgpt.models import attention, sharding
from jaxgpt.models.layers import COLUMNS, LINES, NEVER, Layers, dense, gelu, norm_arrays, normalise, swiglu
from jaxgpt.structs import Array, Params

Saved = tuple[Any, ...]  # by a forward pass for its backward pass
COPIES = 4  # parts in which a matrix is transposed
_together = jax.lax.optimization_barrier  # materialise


def _flat(x: Array) -> Array:
    return x.reshape(-1, x.shape[-1])


def _transposed(x: Array) -> Array:
    """x^T of a matrix, copied: XLA:CPU's fast bfloat16 product takes no transposed operand, and a transpose alone is a
    change of layout, even behind a barrier. A loop's result is laid out in order."""
    x = _flat(x)
    rows = x.shape[0] // COPIES
    if x.dtype == jnp.float32 or x.shape[0] % COPIES or sharding.divided():
        return x.T

    def copy(i: Array, out: Array) -> Array:
        part = jax.lax.dynamic_slice_in_dim(x, i * rows, rows)
        return jax.lax.dynamic_update_slice_in_dim(out, part.T, i * rows, axis=1)

    return jax.lax.fori_loop(0, COPIES, copy, jnp.zeros(x.shape[::-1], x.dtype))


def _dot(x: Array, w: Array, dtype: DTypeLike) -> Array:
    """x @ w summed in float32 and rounded to dtype."""
    return jnp.matmul(x, w, preferred_element_type=jnp.float32).astype(dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _linear(x: Array, kernel: Array, bias: Array | None, axes: tuple[str, str]) -> Array:
    return _linear_forward(x, kernel, bias, axes)[0]


def _linear_forward(x: Array, kernel: Array, bias: Array | None, axes: tuple[str, str]) -> tuple[Array, Saved]:
    x, ready = _together((x, sharding.gathered(kernel.astype(x.dtype), axes)))
    product = jnp.matmul(x, ready, preferred_element_type=jnp.float32)
    likes = jnp.zeros((), kernel.dtype), None if bias is None else jnp.zeros((), bias.dtype)
    return (product if bias is None else product + bias).astype(x.dtype), (x, ready, *likes)


def _linear_backward(axes: tuple[str, str], saved: Saved, dy: Array) -> tuple[Array, Array, Array | None]:
    x, kernel, like, bias_like = saved
    dy = _together(dy)
    dkernel = jnp.matmul(_transposed(x), _flat(dy), preferred_element_type=jnp.float32)
    dbias = None if bias_like is None else _flat(dy).sum(axis=0, dtype=jnp.float32)
    return _dot(dy, _transposed(kernel), x.dtype), sharding.constrain(dkernel, *axes).astype(like.dtype), dbias


_linear.defvjp(_linear_forward, _linear_backward)


def _fast_dense(layer: Params, x: Array, axes: tuple[str, str] = COLUMNS) -> Array:
    if "scale" in layer:
        return dense(layer, x, axes)
    bias = layer["bias"].astype(jnp.float32) if "bias" in layer else None
    if "lora_a" in layer:
        return _adapted(x, layer["kernel"], layer["lora_a"], layer["lora_b"], bias, axes)
    return _linear(x, layer["kernel"], bias, axes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _adapted(x: Array, kernel: Array, a: Array, b: Array, bias: Array | None, axes: tuple[str, str]) -> Array:
    return _adapted_forward(x, kernel, a, b, bias, axes)[0]


def _adapted_forward(
    x: Array, kernel: Array, a: Array, b: Array, bias: Array | None, axes: tuple[str, str]
) -> tuple[Array, Saved]:
    """x W + (x A) B. XLA would compute dy anew in each of the five products that it is an operand of."""
    product, saved = _linear_forward(x, kernel, bias, axes)
    x = saved[0]
    xa = _together(x @ a.astype(x.dtype))
    return product + xa @ b.astype(x.dtype), (saved, a, b, xa)


def _adapted_backward(axes: tuple[str, str], saved: Saved, dy: Array) -> tuple[Array | None, ...]:
    linear, a, b, xa = saved
    dy = _together(dy)
    dxa = _together(dy @ b.astype(dy.dtype).T)
    dx, dkernel, dbias = _linear_backward(axes, linear, dy)
    da = jnp.matmul(_flat(linear[0]).T, _flat(dxa), preferred_element_type=jnp.float32).astype(a.dtype)
    db = jnp.matmul(_flat(xa).T, _flat(dy), preferred_element_type=jnp.float32).astype(b.dtype)
    return dx + dxa @ a.astype(dxa.dtype).T, dkernel, da, db, dbias


_adapted.defvjp(_adapted_forward, _adapted_backward)


_norm_vjp = jax.custom_vjp(norm_arrays, nondiff_argnums=(3,))


def _norm_forward(x: Array, scale: Array, bias: Array | None, epsilon: float) -> tuple[Array, Saved]:
    return _norm_vjp(x, scale, bias, epsilon), (x, scale, bias)


def _norm_backward(epsilon: float, saved: Saved, dy: Array) -> tuple[Array, Array, Array | None]:
    x, scale, bias = saved
    normal, inverse = normalise(x, epsilon, centre=bias is not None)
    dy = dy.astype(jnp.float32)
    g = dy * scale
    dx = g - normal * (g * normal).mean(-1, keepdims=True)
    if bias is None:
        return (inverse * dx).astype(x.dtype), _flat(dy * normal).sum(axis=0), None
    dx = inverse * (dx - g.mean(-1, keepdims=True))
    return dx.astype(x.dtype), _flat(dy * normal).sum(axis=0), _flat(dy).sum(axis=0)


_norm_vjp.defvjp(_norm_forward, _norm_backward)


def _fast_norm(norm: Params, x: Array, epsilon: float) -> Array:
    return _norm_vjp(x, norm["scale"], norm.get("bias"), epsilon)


@jax.custom_vjp
def _fast_gelu(x: Array) -> Array:
    return gelu(x)


def _gelu_backward(x: Array, dy: Array) -> tuple[Array]:
    x, dy = _together((x, dy))
    x32, c = x.astype(jnp.float32), 0.7978845608028654  # sqrt(2 / pi)
    t = jnp.tanh(c * (x32 + 0.044715 * x32**3))
    slope = 0.5 * (1 + t) + 0.5 * x32 * (1 - t * t) * c * (1 + 3 * 0.044715 * x32 * x32)
    return ((dy * slope).astype(x.dtype),)


_fast_gelu.defvjp(lambda x: (_fast_gelu(x), x), _gelu_backward)


@jax.custom_vjp
def _fast_swiglu(gate: Array, up: Array) -> Array:
    return swiglu(gate, up)


def _swiglu_backward(saved: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    gate, up, dy = _together((*saved, dy))
    g, u, dy32 = (x.astype(jnp.float32) for x in (gate, up, dy))
    s = jax.nn.sigmoid(g)
    return (dy32 * u * s * (1 + g * (1 - s))).astype(gate.dtype), (dy32 * g * s).astype(up.dtype)


_fast_swiglu.defvjp(lambda gate, up: (_fast_swiglu(gate, up), (gate, up)), _swiglu_backward)


@jax.custom_vjp
def _attention(q_BHTK: Array, k_BHTK: Array, v_BHTK: Array, seen_TT: Array) -> Array:
    return _attention_forward(q_BHTK, k_BHTK, v_BHTK, seen_TT)[0]


def _halves(T: int) -> tuple[tuple[int, int], ...]:
    """Rows (begin, end) of the causal triangle in two parts. The first sees nothing of the second's keys: a quarter of
    the square is never computed. More and smaller products are no faster."""
    return ((0, T // 2), (T // 2, T)) if T > 1 else ((0, T),)


def _attention_forward(q_BHTK: Array, k_BHTK: Array, v_BHTK: Array, seen_TT: Array) -> tuple[Array, Saved]:
    weights, outs = [], []
    for begin, end in _halves(q_BHTK.shape[2]):
        q, k, v, seen = q_BHTK[:, :, begin:end], k_BHTK[:, :, :end], v_BHTK[:, :, :end], seen_TT[..., begin:end, :end]
        scores = jnp.einsum("bhqk,bhsk->bhqs", q, k, preferred_element_type=jnp.float32)
        p = jax.nn.softmax(jnp.where(seen, scores * q.shape[-1] ** -0.5, NEVER)).astype(q.dtype)
        weights.append(_together(p))
        outs.append(jnp.einsum("bhqs,bhsk->bhqk", weights[-1], v, preferred_element_type=jnp.float32).astype(q.dtype))
    out = jnp.concatenate(outs, axis=2)
    return out, (q_BHTK, k_BHTK, v_BHTK, weights, out)


def _attention_backward(saved: Saved, dy: Array) -> tuple[Array, Array, Array, None]:
    """With P = softmax(S): dS = P (dP - sum(dy out)). Gradients of k and v contract the small arrays' transposes."""
    q, k, v, weights, out = saved
    dtype, T = q.dtype, q.shape[2]
    dy = _together(dy)
    inner = (dy.astype(jnp.float32) * out.astype(jnp.float32)).sum(axis=-1, keepdims=True)
    q_BHKT, dy_BHKT = _together((q.swapaxes(2, 3), dy.swapaxes(2, 3)))
    dqs, dks, dvs = [], [], []
    for (begin, end), p in zip(_halves(T), weights, strict=True):
        later = ((0, 0), (0, 0), (0, 0), (0, T - end))
        dv = jnp.einsum("bhkq,bhqs->bhks", dy_BHKT[..., begin:end], p, preferred_element_type=jnp.float32)
        dp = jnp.einsum("bhqk,bhsk->bhqs", dy[:, :, begin:end], v[:, :, :end], preferred_element_type=jnp.float32)
        ds = p.astype(jnp.float32) * (dp - inner[:, :, begin:end]) * q.shape[-1] ** -0.5
        ds = _together(ds.astype(dtype))
        dqs.append(jnp.einsum("bhqs,bhsk->bhqk", ds, k[:, :, :end], preferred_element_type=jnp.float32).astype(dtype))
        dk = jnp.einsum("bhkq,bhqs->bhks", q_BHKT[..., begin:end], ds, preferred_element_type=jnp.float32)
        dks.append(jnp.pad(dk, later))
        dvs.append(jnp.pad(dv, later))
    dk, dv = (functools.reduce(jnp.add, parts).astype(dtype).swapaxes(2, 3) for parts in (dks, dvs))
    return jnp.concatenate(dqs, axis=2), dk, dv, None


_attention.defvjp(_attention_forward, _attention_backward)


def _fast_attend(q_BTHK: Array, k_BTHK: Array, v_BTHK: Array, segments_BT: Array | None) -> Array:
    T = q_BTHK.shape[1]
    seen = jnp.tril(jnp.ones((T, T), bool))
    if segments_BT is not None:
        seen = seen & (segments_BT[:, None, :, None] == segments_BT[:, None, None, :])
    k_BTHK, v_BTHK = (attention.for_all_heads(x, q_BTHK.shape[2]) for x in (k_BTHK, v_BTHK))
    q, k, v = _together(tuple(x.swapaxes(1, 2) for x in (q_BTHK, k_BTHK, v_BTHK)))
    return _attention(q, k, v, seen).swapaxes(1, 2)


@jax.custom_vjp
def _fast_product_VD(h: Array, table_VD: Array) -> Array:
    return _product_forward(h, table_VD)[0]


def _product_forward(h: Array, table_VD: Array) -> tuple[Array, Saved]:
    h, ready = _together((h, sharding.gathered(table_VD.astype(h.dtype), LINES)))
    logits = jnp.matmul(h, _transposed(ready), preferred_element_type=jnp.float32)
    return logits, (h, ready, jnp.zeros((), table_VD.dtype))


def _product_backward(saved: Saved, dy: Array) -> tuple[Array, Array]:
    h, table_VD, like = saved
    dy = _together(dy.astype(h.dtype))
    dtable = _together(jnp.matmul(_transposed(h), _flat(dy), preferred_element_type=jnp.float32)).T
    return _dot(dy, table_VD, h.dtype), sharding.constrain(dtable, *LINES).astype(like.dtype)


_fast_product_VD.defvjp(_product_forward, _product_backward)

FAST = Layers(_fast_dense, _fast_norm, _fast_gelu, _fast_swiglu, _fast_attend, _fast_product_VD)
