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
    if "scale" in layer:
        product = int8_product(x, layer["kernel"], layer["scale"], platform)
    else:
        product_dtype: DTypeLike = jnp.float32 if platform == "cpu" else x.dtype
        product = matmul(x, sharding.gather_fsdp(layer["kernel"].astype(x.dtype), axes), product_dtype, platform)
    product = product if platform == "cpu" else product.astype(x.dtype)
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


def matmul(x: Array, kernel: Array, dtype: DTypeLike, platform: str) -> Array:
    """x @ kernel in the given dtype; one row of bfloat16 on a CPU by `row_product`, whose sums are float32."""
    if platform == "cpu" and kernel.dtype == jnp.bfloat16 and _row_product_is_fastest(x):
        return row_product(x.reshape(-1), kernel).reshape(*x.shape[:-1], kernel.shape[1]).astype(dtype)
    return jnp.matmul(x, kernel, preferred_element_type=dtype)


def _row_product_is_fastest(x: Array) -> bool:
    """Whether x is a single row, on one device, and this XLA vectorises the loop of `row_product` (from jax 0.11)."""
    return x.size == x.shape[-1] and jax.__version_info__ >= (0, 11) and not sharding.is_partitioned()


ROWS_PER_STEP = 8  # rows added in one pass over the sums; XLA:CPU does not vectorise a pass of 16
MAX_SUMS = 12 * 1024  # sums for joined rows: few enough to stay in a core's cache


def row_product(x_K: Array, kernel_KN: Array) -> Array:
    """x @ kernel in float32 [N], for a bfloat16 or int8 kernel on a CPU.

    XLA:CPU multiplies a row in float32 only: it would first write a float32 copy of the whole kernel, and then read it.
    This loop widens `ROWS_PER_STEP` rows at a time, as it adds them to the sums. Adjacent rows of a narrow kernel are
    treated as one long row, each with its own sums, which are added at the end, so that memory is read in long runs."""
    K, N = kernel_KN.shape
    joined = 1
    while K % (2 * joined * ROWS_PER_STEP) == 0 and 2 * joined * N <= MAX_SUMS:
        joined *= 2
    steps = K // (joined * ROWS_PER_STEP)
    rows = kernel_KN.reshape(-1, joined, N)
    factors = x_K.astype(jnp.float32).reshape(-1, joined, 1)

    def add_rows(begin: Array | int, count: int, sums: Array) -> Array:
        widened = jax.lax.dynamic_slice_in_dim(rows, begin, count).astype(jnp.float32)
        by = jax.lax.dynamic_slice_in_dim(factors, begin, count)
        return functools.reduce(jnp.add, (by[i] * widened[i] for i in range(count)), sums)

    sums = jnp.zeros((joined, N), jnp.float32)
    if steps:
        sums = jax.lax.fori_loop(0, steps, lambda i, sums: add_rows(i * ROWS_PER_STEP, ROWS_PER_STEP, sums), sums)
    done = steps * ROWS_PER_STEP
    return add_rows(done, len(rows) - done, sums).sum(axis=0)


INT8_CHUNK_ROWS = 64  # kernel rows converted to float32 at a time
INT8_MIN_WIDENED = 64  # rows of x from which the whole kernel is converted first
INT8_MAX_UNCHUNKED = 2**21  # kernel elements; a larger kernel is converted in chunks even for a single row of x
INT8_LEVELS = 2047  # quantisation levels of an activation


def int8_product(x: Array, kernel: Array, scale: Array, platform: str) -> Array:
    """x @ (kernel * scale) in float32, for an int8 kernel [in, out] with one scale per column.

    XLA:CPU has no fast product of int8 and float. On a CPU, many rows of x are multiplied with a kernel converted to
    their dtype, which holds all int8 numbers exactly; a few rows with `INT8_CHUNK_ROWS` rows of it at a time; and one
    row by `row_product`. Before jax 0.11, which doesn't vectorise the latter, one row is rounded to multiples of 1/2047
    of its largest absolute entry and multiplied as integers (int32 holds the sums exactly), unless the kernel is large.
    On other platforms the conversion is part of the product."""
    rows, (fan_in, fan_out) = x.size // x.shape[-1], kernel.shape
    if platform != "cpu" or rows >= INT8_MIN_WIDENED:
        return jnp.matmul(x, kernel.astype(x.dtype), preferred_element_type=jnp.float32) * scale
    if _row_product_is_fastest(x):
        return (row_product(x.reshape(-1), kernel) * scale).reshape(*x.shape[:-1], fan_out)
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
