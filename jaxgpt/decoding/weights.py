"""Weights in the form in which decoding reads them: merged, cast, gathered, or in int8."""

import jax
import jax.numpy as jnp

from jaxgpt.config import ModelConfig
from jaxgpt.models import layers, lora, sharding, transformer
from jaxgpt.structs import Array, Params


def prepare(params: Params, config: ModelConfig) -> Params:
    """Weights in the form decoding reads, made once outside the loop: adapters merged, all but norms in the dtype they
    are used in, shards along 'fsdp' gathered, and the head as [D, V], which a product with few rows reads far faster
    than its transpose."""
    if "head_DV" in params:
        return params
    params = lora.merge(params)

    biases = jnp.float32 if sharding.target_platform(config) == "cpu" else config.dtype  # as `layers.dense` adds them

    def ready(path: tuple[jax.tree_util.DictKey, ...], w: Array) -> Array:
        if not path[-2].key.endswith("norm"):
            w = w.astype(config.dtype if w.ndim >= 2 else biases)
        return sharding.gather_fsdp(w, tuple(sharding.find_rule(path, transformer.PARTITION)))

    cast = jax.tree_util.tree_map_with_path(ready, params)
    head_DV = jax.lax.optimization_barrier(transformer.head_weights(cast).T)
    return {**{name: part for name, part in cast.items() if name != "unembed"}, "head_DV": head_DV}


def quantise_int8(params: Params) -> Params:
    """Quantise every matrix of `prepare`'s parameters to int8, with one scale per column: w ~ round(w / s) s with
    s = max|w| / 127. Norms, biases and the embedding (a token reads one row of it) stay as they are.
    For decoding only."""

    def quantise(w: Array) -> tuple[Array, Array]:
        w = w.astype(jnp.float32)
        scale = jnp.maximum(jnp.abs(w).max(axis=0), 1e-30) / 127.0
        return jnp.round(w / scale).astype(jnp.int8), scale

    def layer(part: Params) -> Params:
        if "kernel" not in part:
            return part
        kernel, scale = quantise(part["kernel"])
        return {**part, "kernel": kernel, "scale": scale}

    blocks = {
        name: {inner: layer(part) for inner, part in block.items()}
        for name, block in params.items()
        if name.startswith("block_")
    }
    head_DV, scale_V = quantise(params["head_DV"])
    return {**params, **blocks, "head_DV": head_DV, "head_scale_V": scale_V}


@jax.named_scope("head")
def unembed(params: Params, config: ModelConfig, h: Array) -> Array:
    """`transformer.unembed`, with the head made by `prepare` if there is one: float32 logits."""
    if "head_DV" not in params:
        return transformer.unembed(params, h)
    if "head_scale_V" in params:
        return layers.int8_product(h, params["head_DV"], params["head_scale_V"], sharding.target_platform(config))
    return layers.matmul(h, params["head_DV"], jnp.float32, sharding.target_platform(config))
