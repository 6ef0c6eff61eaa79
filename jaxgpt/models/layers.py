"""The layers of the transformer as plain formulas, differentiated by JAX.

Weights are sharded over a mesh: each is gathered along the 'fsdp' axis where it is used, and its gradient is scattered.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxgpt.models import attention, sharding
from jaxgpt.structs import Array, Params

Attend = Callable[[Array, Array, Array, Array | None], Array]
# Mesh axes over which a dense layer's weight [in, out] is sharded:
COLUMN_PARALLEL = ("fsdp", "tensor")
ROW_PARALLEL = ("tensor", "fsdp")


class Layers(NamedTuple):
    """The layer functions that `transformer.hidden` uses."""

    dense: Callable[[Params, Array, tuple[str, str]], Array]  # (layer, x, COLUMN_PARALLEL or ROW_PARALLEL)
    norm: Callable[[Params, Array, float], Array]
    gelu: Callable[[Array], Array]
    swiglu: Callable[[Array, Array], Array]  # (gate, up)
    attend: Attend
    product_VD: Callable[[Array, Array], Array]  # (h [..., D], table [V, D]) -> float32 [..., V]


def dense(layer: Params, x: Array, axes: tuple[str, str] = COLUMN_PARALLEL, *, platform: str) -> Array:
    """x @ kernel + bias in x's dtype; an int8 kernel has one scale per column (see `int8_product`).

    On a CPU the product stays in float32 until the bias is added: it is then rounded only once, and XLA's bfloat16
    product is up to 1.3 times as fast that way."""
    product_dtype: DTypeLike = jnp.float32 if platform == "cpu" else x.dtype
    if "scale" in layer:
        product = int8_product(x, layer["kernel"], layer["scale"], platform).astype(product_dtype)
    else:
        kernel = sharding.gather_fsdp(layer["kernel"].astype(x.dtype), axes)
        product = jnp.matmul(x, kernel, preferred_element_type=product_dtype)
    if "lora_a" in layer:
        product += lora_product(layer, x).astype(product.dtype)
    if "bias" in layer:
        product += layer["bias"].astype(product.dtype)
    return product.astype(x.dtype)


def lora_product(layer: Params, x: Array) -> Array:
    """(x A) B for a layer with adapters (`jaxgpt.models.lora`)."""
    return (x @ layer["lora_a"].astype(x.dtype)) @ layer["lora_b"].astype(x.dtype)


def norm(layer: Params, x: Array, epsilon: float) -> Array:
    """LayerNorm over the last axis, or RMSNorm (Zhang & Sennrich 2019) if it has no bias: computed in float32, returned
    in x's dtype."""
    return norm_arrays(x, layer["scale"], layer.get("bias"), epsilon)


def norm_arrays(x: Array, scale: Array, bias: Array | None, epsilon: float) -> Array:
    """`norm`, given arrays instead of a dict of parameters."""
    scaled = normalise(x, epsilon, centre=bias is not None)[0] * scale
    return (scaled if bias is None else scaled + bias).astype(x.dtype)


def normalise(x: Array, epsilon: float, centre: bool) -> tuple[Array, Array]:
    """((x - mean) / std, 1 / std) in float32; without `centre` the mean is taken as 0 (RMSNorm)."""
    x32 = x.astype(jnp.float32)
    centred = x32 - x32.mean(-1, keepdims=True) if centre else x32
    inverse = jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + epsilon)
    return centred * inverse, inverse


def gelu(x: Array) -> Array:
    """x Phi(x) in GPT-2's tanh approximation."""
    return jax.nn.gelu(x, approximate=True)


def swiglu(gate: Array, up: Array) -> Array:
    """silu(gate) * up (Shazeer 2020)."""
    return jax.nn.silu(gate) * up


def vocab_logits(h: Array, table_VD: Array) -> Array:
    """Dot products of hidden states with every row of an embedding table: operands in h's dtype, results in float32."""
    table_VD = sharding.gather_fsdp(table_VD.astype(h.dtype), ROW_PARALLEL)
    return jnp.einsum("...d,vd->...v", h, table_VD, preferred_element_type=jnp.float32)


INT8_CHUNK_ROWS = 64  # kernel rows converted to float32 at a time
INT8_MAX_UNCHUNKED = 2**21  # kernel elements; a larger kernel is converted in chunks even for a single row of x
INT8_LEVELS = 2047  # quantisation levels of an activation


def int8_product(x: Array, kernel: Array, scale: Array, platform: str) -> Array:
    """x @ (kernel * scale) in float32, for an int8 kernel [in, out] with one scale per column.

    XLA:CPU has no fast product of int8 and float: on a CPU, a single row of x is rounded to multiples of
    1/2047 of its largest absolute entry and multiplied as integers (int32 holds the sums exactly); for several rows,
    or a large kernel, `INT8_CHUNK_ROWS` kernel rows are converted to float32 at a time. On other platforms the
    conversion is part of the product."""
    rows, (fan_in, fan_out) = x.size // x.shape[-1], kernel.shape
    if platform != "cpu":
        return jnp.matmul(x, kernel.astype(x.dtype), preferred_element_type=jnp.float32) * scale
    if rows == 1 and kernel.size <= INT8_MAX_UNCHUNKED:
        levels = min(INT8_LEVELS, (2**31 - 1) // (127 * fan_in))
        x32 = x.reshape(-1).astype(jnp.float32)
        step = jnp.maximum(jnp.abs(x32).max(), 1e-30) / levels
        quantised = jnp.round(x32 / step).astype(jnp.int32)
        product = (quantised[:, None] * kernel.astype(jnp.int32)).sum(axis=0)
        return (product.astype(jnp.float32) * step * scale).reshape(*x.shape[:-1], fan_out)
    chunk = INT8_CHUNK_ROWS if fan_in % INT8_CHUNK_ROWS == 0 else fan_in
    flat = x.reshape(rows, fan_in).astype(jnp.float32)

    def add_chunk(i: Array, total: Array) -> Array:
        part = jax.lax.dynamic_slice_in_dim(kernel, i * chunk, chunk).astype(jnp.float32)
        return total + jax.lax.dynamic_slice_in_dim(flat, i * chunk, chunk, axis=1) @ jax.lax.optimization_barrier(part)

    product = jax.lax.fori_loop(0, fan_in // chunk, add_chunk, jnp.zeros((rows, fan_out), jnp.float32))
    return (product * scale).reshape(*x.shape[:-1], fan_out)


@functools.cache
def plain_layers(platform: str) -> Layers:
    """The layer functions of this module, for a program that runs on a "cpu", "gpu" or "tpu"."""
    return Layers(functools.partial(dense, platform=platform), norm, gelu, swiglu, attention.attend, vocab_logits)
