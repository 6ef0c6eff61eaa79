"""Low-rank adapters (Hu et al. 2022): train a small pytree alongside frozen weights.

    y = x W + (x A) B        A [in, rank] normal(1/sqrt(in)), B [rank, out] 0: at first the model is unchanged

(In PEFT's terms lora_alpha equals the rank: a scale of 1.) Adapters are stored next to their kernel, as `lora_a` and
`lora_b`; TrainState merges the trained adapters with the frozen weights, and `layers.dense` adds their product.
Without adapters, the same weights are the reference policy of PPO and DPO: no second copy is needed.
"""

import math

import jax
import jax.numpy as jnp

from jaxgpt.errors import UserError
from jaxgpt.structs import Array, Params

ADAPTER_NAMES = ("lora_a", "lora_b")


def init(key: Array, params: Params, rank: int) -> Params:
    """Adapters for every dense layer, nested like the parameters; none for rank 0. UserError for a negative rank."""
    if rank < 0:
        raise UserError(f"lora is {rank}; a rank must be at least 1 (0 trains all weights)")
    if not rank:
        return {}

    def below(tree: Params, key: Array) -> Params:
        if "kernel" in tree:
            fan_in, fan_out = tree["kernel"].shape
            a = jax.random.normal(key, (fan_in, rank)) / math.sqrt(fan_in)
            return {"lora_a": a, "lora_b": jnp.zeros((rank, fan_out))}
        inner = {name: part for name, part in tree.items() if isinstance(part, dict)}
        found = {
            name: below(inner[name], one)
            for name, one in zip(inner, jax.random.split(key, max(len(inner), 1)), strict=False)
        }
        return {name: part for name, part in found.items() if part}

    return below(params, key)


def split_trainable(key: Array, params: Params, rank: int) -> tuple[Params, Params]:
    """(trainable, frozen): for rank 0 all parameters and nothing, otherwise adapters and all parameters."""
    return (init(key, params, rank), params) if rank else (params, {})


def without_adapters(params: Params) -> Params:
    """The weights without adapters: the model before training."""
    return {
        name: without_adapters(part) if isinstance(part, dict) else part
        for name, part in params.items()
        if name not in ADAPTER_NAMES
    }


def merge(params: Params) -> Params:
    """Replace each kernel that has adapters by W + A B: a plain model, to save, export or decode with."""
    if "lora_a" in params:
        product = params["lora_a"].astype(jnp.float32) @ params["lora_b"].astype(jnp.float32)
        kernel = params["kernel"]
        return {**without_adapters(params), "kernel": (kernel.astype(jnp.float32) + product).astype(kernel.dtype)}
    return {name: merge(part) if isinstance(part, dict) else part for name, part in params.items()}


def reference_params(params: Params) -> Params:
    """The reference policy of {'policy', maybe 'reference'}: the policy without adapters if there is no other."""
    return params["reference"] if "reference" in params else without_adapters(params["policy"])
