"""A tiny model and rows of tokens that several tests use."""

import contextlib
import dataclasses
import functools
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from jaxgpt import decoding
from jaxgpt.config import ModelConfig
from jaxgpt.data import builders
from jaxgpt.files import write_record
from jaxgpt.models import sharding, transformer
from jaxgpt.structs import Array, Batch, Params

generate, generate_until = (
    jax.jit(f, static_argnums=1, static_argnames=decoding.STATIC_ARGNAMES)
    for f in (decoding.generate, decoding.generate_until)
)
hidden = jax.jit(transformer.hidden, static_argnums=1)
score = jax.jit(transformer.token_log_probs, static_argnums=1, static_argnames=("temperature", "window"))
AS_USERS_RUN_IT = {"xla_backend_optimization_level": 3}  # for what holds to the last bit: see conftest.py
if "fusion_emitters" in os.environ.get("XLA_FLAGS", ""):
    AS_USERS_RUN_IT["xla_cpu_use_fusion_emitters"] = True


def edit_record(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change a file that `write_record` wrote, and give it the right checksum again: what a stranger could write."""
    record = json.loads(path.read_text())
    record.pop("sha256", None)
    change(record)
    write_record(path, record)


WALL_CLOCK = ("time", "seconds_data", "seconds_device")  # metrics that differ between two equal runs
TINY = ModelConfig(layers=2, width=32, heads=2, block=48, vocab=64)
FAMILY = {
    "gpt": dataclasses.replace(TINY, norm_at="output"),
    "gpt2": TINY,
    "llama": dataclasses.replace(
        TINY,
        heads=4,
        kv_heads=2,
        mlp="swiglu",
        mlp_width=48,
        norm="rms",
        positions="rotary",
        rope_theta=50.0,
        biases=False,
    ),
    "llama3": dataclasses.replace(
        TINY,
        heads=4,
        kv_heads=1,
        mlp="swiglu",
        norm="rms",
        positions="rotary",
        rope_theta=50.0,
        rope_factor=8.0,
        rope_block=24,
        tied=False,
    ),
}


def params_of(config: ModelConfig = TINY, seed: int = 0, scale: float = 4.0) -> Params:
    """Parameters large enough that every input matters (GPT-2's initialisation is nearly flat)."""
    params = transformer.init(jax.random.key(seed), config)
    return jax.tree.map(lambda w: w * scale if w.ndim >= 2 else w, params)


@functools.cache
def _shapes(config: ModelConfig) -> Params:
    return jax.eval_shape(lambda: transformer.init(jax.random.key(0), config))


def random_params(config: ModelConfig = TINY, seed: int = 0, scale: float = 4.0) -> Params:
    """As large as those of `params_of`, biases and norms random too. NumPy draws them: nothing is compiled."""
    rng = np.random.default_rng(seed)

    def draw(path: tuple, like: jax.ShapeDtypeStruct) -> Array:
        size = 0.02 * scale if like.ndim >= 2 else 0.1
        return jax.device_put((size * rng.standard_normal(like.shape) + (path[-1].key == "scale")).astype(like.dtype))

    return jax.tree_util.tree_map_with_path(draw, _shapes(config))


def tokens_of(rows: int, length: int, vocab: int = 64, seed: int = 0) -> Array:
    return jnp.asarray(np.random.default_rng(seed).integers(6, vocab, (rows, length)), jnp.int32)


def batch_of(rows: int = 4, length: int = 20, seed: int = 0) -> Batch:
    tokens = tokens_of(rows, length, seed=seed)
    return Batch(tokens, jnp.ones(tokens.shape, bool).at[:, 0].set(False))


def prompts_of(rows: int, width: int, vocab: int = 64, seed: int = 0) -> tuple[Array, Array]:
    """Ragged prompts, padded on the right, and their lengths (the longest fills the width)."""
    lengths = np.random.default_rng(seed + 1).integers(2, width + 1, rows)
    lengths[0] = width
    tokens = np.where(np.arange(width) < lengths[:, None], tokens_of(rows, width, vocab, seed), 0)
    return jnp.asarray(tokens, jnp.int32), jnp.asarray(lengths, jnp.int32)


def few_reviews(folder: Path) -> Path:
    """A data folder with every 40th of the embedded reviews: quick to read and to tokenise."""
    rows = list(builders._csv_rows(builders._csv_path()))[::40]
    with mock.patch.object(builders, "_csv_rows", return_value=rows):
        builders.prepare(folder / "tfds")
    return folder


@contextlib.contextmanager
def one_device() -> Iterator[None]:
    """Whole stages on one of the eight devices, for which programs compile in half the time."""
    devices = jax.devices()[:1]
    with mock.patch.object(sharding, "make_mesh", functools.partial(sharding.make_mesh, devices=devices)):
        yield
