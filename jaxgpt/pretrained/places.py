"""The mapping between our parameters and the tensors of other projects' checkpoints, both ways.

Tensors go by Hugging Face's names, in three architectures: "gpt2" (its Conv1D has our [in, out] layout), "openai-gpt"
(Radford 2018) and "llama". Nothing is rounded or scaled, so a model written and read again has the same bits.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxgpt.config import ModelConfig
from jaxgpt.errors import UserError, printable

KINDS = ("gpt2", "openai-gpt", "llama")
_CONV = {
    "gpt2": ("transformer.wte.weight", "transformer.wpe.weight", "transformer.h"),
    "openai-gpt": ("transformer.tokens_embed.weight", "transformer.positions_embed.weight", "transformer.h"),
}


class TensorMapping(NamedTuple):
    """One of our parameters, the checkpoint tensors it is made of, and the conversions both ways."""

    path: str  # "block_0/qkv/kernel"
    shapes: Mapping[str, tuple[int, ...]]  # of the checkpoint's tensors, by name
    join: Callable[..., np.ndarray]
    split: Callable[[np.ndarray], Sequence[np.ndarray]]


def architecture_of(config: ModelConfig) -> str:
    """The Hugging Face architecture that computes what our model does. Raises UserError if there is none."""
    rope = config.positions == "rotary"
    gpt = config.mlp == "gelu" and config.norm == "layer" and not rope and config.groups == config.heads
    if gpt and config.biases and config.tied:
        return "gpt2" if config.norm_at == "input" else "openai-gpt"
    if rope and config.mlp == "swiglu" and config.norm == "rms" and config.norm_at == "input":
        return "llama"
    raise UserError(
        "no Hugging Face architecture has this combination of mlp, norm, norm_at, positions, biases and tied"
    )


def places(config: ModelConfig) -> list[TensorMapping]:
    """The places of all our parameters."""
    return _llama(config) if architecture_of(config) == "llama" else _gpt(config)


def to_tensors(flat: Mapping[str, Any], config: ModelConfig) -> dict[str, np.ndarray]:
    """Our parameters {"block_0/qkv/kernel": …} under Hugging Face's names and in its layout."""
    found: dict[str, np.ndarray] = {}
    for place in places(config):
        parts = place.split(np.asarray(flat[place.path]))
        found |= {name: np.ascontiguousarray(x) for name, x in zip(place.shapes, parts, strict=True)}
    return found


def to_params(read: Callable[[str], np.ndarray], config: ModelConfig, where: Path) -> dict[str, Any]:
    """Our nested float32 parameters, from read(name), which returns Hugging Face's tensor of that name. Raises
    UserError naming `where` and the tensor if it can't be read or holds a number that is not finite."""

    def finite(name: str) -> np.ndarray:
        try:
            with np.errstate(over="ignore", invalid="ignore"):
                x = read(name).astype(np.float32)
        except Exception as error:  # whatever the package that reads it raises
            raise UserError(f"{where}: {name} can't be read ({printable(str(error))})") from error
        if not np.isfinite(x).all():
            raise UserError(f"{where}: {name} holds NaN or infinite numbers; download the model again")
        return x

    params: dict[str, Any] = {}
    for place in places(config):
        *folders, last = place.path.split("/")
        inner = functools.reduce(lambda tree, folder: tree.setdefault(folder, {}), folders, params)
        inner[last] = np.ascontiguousarray(place.join(*map(finite, place.shapes)))
    return params


def tensor_errors(config: ModelConfig, found: Mapping[str, tuple[int, ...]]) -> list[str]:
    """A message for each tensor that is missing, unexpected, or of the wrong shape; at most 20."""
    wanted = {name: shape for place in places(config) for name, shape in place.shapes.items()}
    texts = [f"{name} is missing" for name in wanted if name not in found]
    texts += [f"{printable(name)} is not part of this architecture" for name in found if name not in wanted]
    both = [name for name in wanted if name in found]
    texts += [f"{name} has shape {found[name]}, not {wanted[name]}" for name in both if found[name] != wanted[name]]
    return texts if len(texts) <= 20 else [*texts[:20], f"and {len(texts) - 20} more"]


# ---- the layouts ----


def _one(x: np.ndarray) -> list[np.ndarray]:
    return [x]


def _same(path: str, name: str, *shape: int) -> TensorMapping:
    return TensorMapping(path, {name: shape}, lambda x: x, _one)


def _transposed(path: str, name: str, fan_in: int, fan_out: int) -> TensorMapping:
    return TensorMapping(path, {name: (fan_out, fan_in)}, lambda x: x.T, lambda x: [x.T])


def _grouped(config: ModelConfig, q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Concatenate [H K, …], [G K, …] and [G K, …] group by group: [(H + 2G) K, …]."""
    G, K, rest = config.groups, config.head_dim, q.shape[1:]
    parts = [x.reshape(G, -1, K, *rest) for x in (q, k, v)]
    return np.concatenate(parts, axis=1).reshape(-1, *rest)


def _ungrouped(x: np.ndarray, config: ModelConfig) -> list[np.ndarray]:
    G, K, rest = config.groups, config.head_dim, x.shape[1:]
    parts = np.split(x.reshape(G, -1, K, *rest), [config.heads // G, config.heads // G + 1], axis=1)
    return [part.reshape(-1, *rest) for part in parts]


def _llama(config: ModelConfig) -> list[TensorMapping]:
    D, F, HK, GK = config.width, config.mlp_hidden, config.width, config.groups * config.head_dim
    found = [_same("embed/tokens_VD", "model.embed_tokens.weight", config.vocab, D)]
    found += [_same("final_norm/scale", "model.norm.weight", D)]
    if not config.tied:
        found += [_same("unembed/tokens_VD", "lm_head.weight", config.vocab, D)]
    for n in range(config.layers):
        ours, theirs = f"block_{n}", f"model.layers.{n}"
        names = [f"{theirs}.self_attn.{x}_proj" for x in "qkv"]
        found += [
            _same(f"{ours}/attention_norm/scale", f"{theirs}.input_layernorm.weight", D),
            _same(f"{ours}/mlp_norm/scale", f"{theirs}.post_attention_layernorm.weight", D),
            TensorMapping(
                f"{ours}/qkv/kernel",
                {f"{name}.weight": (size, D) for name, size in zip(names, (HK, GK, GK), strict=True)},
                lambda *qkv: _grouped(config, *qkv).T,
                lambda x: _ungrouped(x.T, config),
            ),
            _transposed(f"{ours}/out/kernel", f"{theirs}.self_attn.o_proj.weight", HK, D),
            _transposed(f"{ours}/gate/kernel", f"{theirs}.mlp.gate_proj.weight", D, F),
            _transposed(f"{ours}/up/kernel", f"{theirs}.mlp.up_proj.weight", D, F),
            _transposed(f"{ours}/down/kernel", f"{theirs}.mlp.down_proj.weight", F, D),
        ]
        if config.biases:
            found += [
                TensorMapping(
                    f"{ours}/qkv/bias",
                    {f"{name}.bias": (size,) for name, size in zip(names, (HK, GK, GK), strict=True)},
                    lambda *qkv: _grouped(config, *qkv),
                    lambda x: _ungrouped(x, config),
                ),
                _same(f"{ours}/out/bias", f"{theirs}.self_attn.o_proj.bias", D),
                _same(f"{ours}/gate/bias", f"{theirs}.mlp.gate_proj.bias", F),
                _same(f"{ours}/up/bias", f"{theirs}.mlp.up_proj.bias", F),
                _same(f"{ours}/down/bias", f"{theirs}.mlp.down_proj.bias", D),
            ]
    return found


def _gpt(config: ModelConfig) -> list[TensorMapping]:
    D, F = config.width, config.mlp_hidden
    tokens, positions, blocks = _CONV[architecture_of(config)]
    found = [_same("embed/tokens_VD", tokens, config.vocab, D), _same("embed/positions_TD", positions, config.block, D)]

    def both(ours: str, theirs: str) -> list[TensorMapping]:
        return [_same(f"{ours}/scale", f"{theirs}.weight", D), _same(f"{ours}/bias", f"{theirs}.bias", D)]

    if config.norm_at == "input":
        found += both("final_norm", "transformer.ln_f")
    for n in range(config.layers):
        ours, theirs = f"block_{n}", f"{blocks}.{n}"
        found += both(f"{ours}/attention_norm", f"{theirs}.ln_1") + both(f"{ours}/mlp_norm", f"{theirs}.ln_2")
        found += [
            TensorMapping(
                f"{ours}/qkv/kernel",
                {f"{theirs}.attn.c_attn.weight": (D, 3 * D)},
                lambda x: _grouped(config, *np.split(x.T, 3)).T,
                lambda x: [np.concatenate(_ungrouped(x.T, config)).T],
            ),
            TensorMapping(
                f"{ours}/qkv/bias",
                {f"{theirs}.attn.c_attn.bias": (3 * D,)},
                lambda x: _grouped(config, *np.split(x, 3)),
                lambda x: [np.concatenate(_ungrouped(x, config))],
            ),
        ]
        for name, inner, fan_in, fan_out in (
            ("out", "attn.c_proj", D, D),
            ("up", "mlp.c_fc", D, F),
            ("down", "mlp.c_proj", F, D),
        ):
            found += [
                _same(f"{ours}/{name}/kernel", f"{theirs}.{inner}.weight", fan_in, fan_out),
                _same(f"{ours}/{name}/bias", f"{theirs}.{inner}.bias", fan_out),
            ]
    return found
