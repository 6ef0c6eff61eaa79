"""A trained model in a folder: params/ (Orbax), model.json (config, shapes, sha256 of every file) and its tokenizer.

`save_model` replaces the folder in one step; `load_model` checks every byte and shape before it returns anything.
"""

import contextlib
import dataclasses
import errno
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxgpt.config import ModelConfig
from jaxgpt.errors import UserError, needs_extra
from jaxgpt.files import (
    check_files,
    check_watched,
    read_json,
    read_record,
    refuse_pattern,
    remove,
    sha256_of_folder,
    sync_folder,
    sync_names,
    write_record,
)
from jaxgpt.models import transformer
from jaxgpt.pretrained import loading
from jaxgpt.runs.process import barrier
from jaxgpt.runs.settings import settings_from_json, settings_to_json

with needs_extra("train"):
    from orbax.checkpoint import v1 as ocp

FORMAT = 3  # 2: each head's q, k and v are stored together in qkv; 3: model.json holds its own sha256
RECORD = ("format", "config", "params", "extra", "files")
AGAIN = "save the model again, or copy its whole folder again"


class LoadedModel(NamedTuple):
    """What `load_model` returns; `tokenizer` is None if none was saved."""

    params: Any  # nested dicts of jax arrays on the default device
    config: ModelConfig
    tokenizer: Any
    extra: dict[str, Any]


def save_model(
    folder: Path, params: Any, config: ModelConfig, tokenizer: Any = None, extra: Mapping[str, Any] | None = None
) -> None:
    """Write a model, replacing any in `folder`; whenever the process is killed, the old or the new one remains.

    `tokenizer` is anything with `save(folder)`; `extra` is any JSON. With several processes, all of them must call
    this, on a file system they share. UserError if `folder` holds anything but a model, or a parameter is not finite.
    """
    folder = Path(os.path.abspath(folder))
    refuse_pattern(folder)
    check_params_finite(params, f"{folder} is not written, because", "lower the learning rate")
    check_watched(folder)
    _recover(folder)
    if folder.exists() and not (folder / "model.json").exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists and is not a saved model; choose another folder")
    new = folder.with_name(f".{folder.name}.new")
    try:
        _write(new, folder, params, config, tokenizer, extra)
    except OSError as error:
        with contextlib.suppress(OSError):
            remove(new)
        reason = error.strerror or error
        raise UserError(f"can't write the model {folder} ({reason}); free some space, and try again") from error


def _write(new: Path, folder: Path, params: Any, config: ModelConfig, tokenizer: Any, extra: Any) -> None:
    first, old = jax.process_index() == 0, _old(folder)
    if first:
        remove(new)
        new.mkdir(parents=True)
    barrier("save: start")
    params = jax.tree.map(jnp.asarray, params)
    try:
        ocp.save(new / "params", params)
    except Exception as error:  # a full disk is a ValueError of its storage
        code = re.search(r"os_error_code='(\d+)'", str(error))
        reason = os.strerror(int(code[1])) if code else (str(error) or type(error).__name__).splitlines()[0]
        raise OSError(errno.EIO, getattr(error, "strerror", None) or reason) from error
    barrier("save: written")
    if first:
        if tokenizer is not None:
            tokenizer.save(new)
        record = {
            "format": FORMAT,
            "config": settings_to_json(config),
            "params": describe_params(params),
            "extra": dict(extra or {}),
            "files": sha256_of_folder(new),
        }
        write_record(new / "model.json", record)
        sync_folder(new)
        check_model(new)  # read back before anything older is removed
        check_watched(folder)
        remove(old)
        if folder.exists():
            os.replace(folder, old)
        os.replace(new, folder)
        sync_names(folder.parent)
        with contextlib.suppress(OSError):
            remove(old)
    barrier("save: done")


def load_model(folder: Path, expected: Any = None) -> LoadedModel:
    """Load the model saved in `folder` or `folder`/model. `expected` may be a tree of arrays or `jax.ShapeDtypeStruct`s
    (such as `jax.eval_shape(init, key, config)`) that the parameters must match.

    UserError if there is no model, a file is missing or altered, shapes differ or numbers are not finite (each
    parameter is named), or the tokenizer has more ids than the model."""
    refuse_pattern(folder)
    folder = _find_model(Path(os.path.abspath(folder)))
    record = check_model(folder)
    config = settings_from_json(ModelConfig, record["config"], where=str(folder / "model.json"))
    _check_shapes(folder, config, record["params"])
    if expected is not None:
        check_params_match(folder, describe_params(expected), record["params"], "the program expects")
    params = _load_params(folder, record["params"])
    check_params_finite(params, f"{folder} can't be used:", "train that model again, with a lower learning rate")
    tokenizer = None
    if (folder / "tokenizer.json").exists():
        from jaxgpt.data.tokenizer import Tokenizer

        tokenizer = Tokenizer.load(folder)
        check_vocabulary(folder, tokenizer, config)
    return LoadedModel(params, config, tokenizer, record["extra"])


def check_model(folder: Path) -> dict[str, Any]:
    """Check every byte of a model against its model.json, and return that record. UserError names what is wrong."""
    record = read_description(folder)
    check_files(folder, record["files"], AGAIN)
    return record


def read_description(folder: Path) -> dict[str, Any]:
    """A model's model.json. UserError if it isn't one, is damaged, or is of another format."""
    path, advice = folder / "model.json", AGAIN
    record = read_record(path, RECORD, advice, older=RECORD)
    if record["format"] not in (FORMAT, 2):
        raise UserError(f"{folder} has format {record['format']}, but this version reads {FORMAT}; save it again")
    for name in RECORD[1:]:
        if not isinstance(record[name], dict):
            raise UserError(f"{path}: {name} is not an object; {advice}")
    for name in ("params", "files"):
        if not all(isinstance(value, str) for value in record[name].values()):
            raise UserError(f"{path}: {name} holds values that are not text; {advice}")
    return record


def load_language_model(folder: Path, use_tags: bool = False) -> LoadedModel:
    """Load a language model saved by `save_model`, or one trained elsewhere (`pretrained.loading.load`); for the
    latter, `use_tags` replaces its own chat template with our tags. UserError if the folder holds anything but a
    language model with its tokenizer."""
    if loading.is_pretrained(folder):
        other = loading.load(folder, use_tags=use_tags)
        check_params_finite(other.params, f"{folder} can't be used:", "copy or convert its weights again")
        check_vocabulary(folder, other.tokenizer, other.config)
        return LoadedModel(other.params, other.config, other.tokenizer, {} if other.chats else {"raw": True})
    check_language_model(folder)
    return load_model(folder)


def check_language_model(folder: Path) -> None:
    """UserError if `load_language_model` would find something else in `folder`; reads no weights."""
    if loading.is_pretrained(folder):
        return
    found = _find_model(Path(os.path.abspath(folder)))
    params = read_description(found)["params"]
    if not any(name.startswith("embed/") for name in params) or not (found / "tokenizer.json").exists():
        raise UserError(f"{folder} holds no language model with a tokenizer; give a run of pretrain, sft, dpo or ppo")


def check_params_finite(params: Any, words: str, advice: str) -> None:
    """UserError that starts with `words` and names the parameters with NaN or infinite numbers, if there are any."""
    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    names = [jax.tree_util.keystr(at, simple=True, separator="/") for at, leaf in leaves if not _is_finite(leaf)]
    if names:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise UserError(f"{words} NaN or infinite numbers are in {', '.join(names[:3])}{more}; {advice}")


def _is_finite(leaf: Any) -> bool:
    """Computed on the host, because compiling a program for the device would take longer."""
    parts = [shard.data for shard in leaf.addressable_shards] if isinstance(leaf, jax.Array) else [leaf]
    return all(bool(np.isfinite(np.asarray(part)).all()) for part in parts)


def check_vocabulary(folder: Path, tokenizer: Any, config: ModelConfig) -> None:
    """UserError if the tokenizer has ids that the model lacks: their embeddings would be wrong or NaN."""
    if tokenizer.vocab_size > config.vocab:
        raise UserError(
            f"{folder} can't be used: its tokenizer has ids up to {tokenizer.vocab_size - 1}, but its model has only "
            f"{config.vocab} tokens; restore the tokenizer that the model was trained with"
        )


def describe_params(params: Any) -> dict[str, str]:
    """{"embed/tokens_VD": "float32[512,32]", …}: name, dtype and shape of every leaf."""
    descriptions = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        descriptions[name] = f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"
    return descriptions


def param_differences(expected: Mapping[str, str], found: Mapping[str, str]) -> list[str]:
    """One line per parameter that is missing, unknown, or of a different shape or dtype (arguments from
    `describe_params`)."""
    texts = [f"{name} is missing" for name in expected if name not in found]
    texts += [f"{name} is unknown" for name in found if name not in expected]
    common = [name for name in expected if name in found]
    return texts + [
        f"{name} is {found[name]}, not {expected[name]}" for name in common if found[name] != expected[name]
    ]


def check_params_match(folder: Path, expected: Mapping[str, str], found: Mapping[str, str], which: str) -> None:
    """Raise a UserError naming each parameter whose shape or dtype is unexpected, or that is missing on one side.

    `which` completes "does not hold the parameters …"."""
    texts = param_differences(expected, found)
    if texts:
        raise UserError("\n  ".join([f"{folder} does not hold the parameters {which}:", *texts]))


def _check_shapes(folder: Path, config: ModelConfig, params: Mapping[str, str]) -> None:
    """UserError unless the transformer in `params` has the shapes of the configuration. Each layer is compared with the
    shapes of a one-layer model, so that an absurd number of layers takes no time."""
    inside = [name.removesuffix("embed/tokens_VD") for name in params if name.endswith("embed/tokens_VD")]
    if not inside:
        return  # adapters, or a head alone
    one = jax.eval_shape(lambda: transformer.init(jax.random.key(0), dataclasses.replace(config, layers=1)))
    one_layer = {name: text.partition("[")[2] for name, text in describe_params(one).items()}
    layers = {name.removeprefix(inside[0]).split("/")[0] for name in params if name.startswith(inside[0] + "block_")}
    if layers != {f"block_{n}" for n in range(min(config.layers, len(layers) + 1))}:
        raise UserError(f"{folder} holds {len(layers)} layers, but its model.json says {config.layers}; save it again")
    for name, text in params.items():
        own = re.sub(r"^block_\d+/", "block_0/", name.removeprefix(inside[0]))
        if name.startswith(inside[0]) and own in one_layer and text.partition("[")[2] != one_layer[own]:
            expected = f"[{one_layer[own]}"
            raise UserError(f"{folder}: {name} is {text}, but the configuration in model.json needs {expected}")
    missing = sorted(name for name in one_layer if inside[0] + name not in params)
    if missing:
        raise UserError(f"{folder} has no {missing[0]}, which the configuration in model.json needs; save it again")


def _load_params(folder: Path, described: Mapping[str, str]) -> Any:
    """Orbax's arrays on the default device, whatever mesh they were saved from."""
    device = jax.sharding.SingleDeviceSharding(jnp.zeros(()).devices().pop())
    try:
        stored = ocp.metadata(folder / "params").metadata
        check_params_match(folder, described, describe_params(stored), "its model.json names")
        target = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device), stored)
        return ocp.load(folder / "params", target)
    except UserError:
        raise
    except Exception as error:  # whatever Orbax or its storage raises, the file is unusable
        raise UserError(f"{folder / 'params'} can't be read ({type(error).__name__}); save the model again") from error


def _find_model(folder: Path) -> Path:
    """`folder`, or the model inside a run folder."""
    for place in (folder, folder / "model"):
        for found in (place, _old(place)):  # the latter after a kill between the two renames of `save_model`
            if (found / "model.json").exists() and (found == place or not place.exists()):
                return found
    experiment: tuple[str, ...] = ()
    for place in (folder, folder.parent):
        if (place / "settings.json").is_file():
            settings = read_json(place / "settings.json")
            if isinstance(settings, dict) and isinstance(stage := settings.get("stage"), str):
                experiment = (stage, "--run", str(place))
    advice = loading.missing_advice(folder) or "; run the experiment that trains it first"
    raise UserError(f"{folder} holds no model{advice}", experiment=experiment)


def _old(folder: Path) -> Path:
    return folder.parent / f".{folder.name}.old"


def _recover(folder: Path) -> None:
    """Restore the old model after a kill between the two renames of `save_model`. Readers must not: they would come in
    between the renames of another process."""
    old = _old(folder)
    if jax.process_index() == 0 and not folder.exists() and (old / "model.json").exists():
        os.replace(old, folder)
