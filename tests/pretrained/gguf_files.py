"""Writes small GGUF files for tests, as llama.cpp's converter does."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import jax
import numpy as np

from jaxgpt.config import ModelConfig
from jaxgpt.pretrained import gguf_file, places

_NAMES = {theirs: name for name, theirs in gguf_file._NAMES.items()}


def write_gguf(path: Path, params: Any, config: ModelConfig, changes: Mapping[str, Any] | None = None) -> Path:
    """A Llama model with a tokenizer of few letters. `changes`: metadata fields, by name; None leaves one out."""
    flat = {
        jax.tree_util.keystr(place, simple=True, separator="/"): leaf
        for place, leaf in jax.tree_util.tree_flatten_with_path(params)[0]
    }
    tokens = [f"{chr(97 + i % 26)}{i // 26 or ''}" for i in range(config.vocab - 2)] + ["ab", "</s>"]
    fields = {
        "llama.block_count": config.layers,
        "llama.embedding_length": config.width,
        "llama.attention.head_count": config.heads,
        "llama.attention.head_count_kv": config.groups,
        "llama.context_length": config.block,
        "llama.feed_forward_length": config.mlp_hidden,
        "llama.attention.layer_norm_rms_epsilon": config.norm_epsilon,
        "llama.rope.freq_base": config.rope_theta,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * (len(tokens) - 1) + [3],
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.eos_token_id": len(tokens) - 1,
        **(changes or {}),
    }
    writer = gguf.GGUFWriter(path, "llama")
    adders = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    for name, value in fields.items():
        if value is not None:
            (writer.add_array if isinstance(value, list) else adders[type(value)])(name, value)
    for name, x in places.to_tensors(flat, config).items():
        found = re.fullmatch(r"(?:model\.layers\.(\d+)\.)?(.*)\.weight", name)
        assert found
        if found[2][-6:] in ("q_proj", "k_proj"):  # rotary pairs are interleaved
            heads = config.heads if "q_proj" in name else config.groups
            x = x.reshape(heads, 2, config.head_dim // 2, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)
        prefix = f"blk.{found[1]}." if found[1] else ""
        writer.add_tensor(f"{prefix}{_NAMES[found[2]]}.weight", np.ascontiguousarray(x))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
