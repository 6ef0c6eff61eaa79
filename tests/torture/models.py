"""Strangers' model files, spoiled: the outcome is the same model or one line, in little memory."""

import copy
import dataclasses
import json
import os
import random
import resource
import shutil
import struct
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import jax
import numpy as np
from safetensors.numpy import load_file, save_file

from jaxgpt.config import ModelConfig
from jaxgpt.data import templates
from jaxgpt.data.tokenizer import Tokenizer
from jaxgpt.errors import UserError
from jaxgpt.pretrained import gguf_file, huggingface
from tests.data.test_templates import CHATML, NAMES, core_of
from tests.helpers import FAMILY, TINY
from tests.pretrained.gguf_files import write_gguf
from tests.pretrained.test_loading import random_params
from tests.torture.harness import Kind, Outcomes, flip_bit, spoil

Model = tuple[dict[str, np.ndarray], ModelConfig]
HOSTILE: list[Any] = [
    *(None, True, False, 0, -1, 1, 2, 3, 7, 2**31, 2**63, 10**9, 10**18, 10**400, 0.5, 1e-320, 1e308, -0.0, 1e30),
    *("", "a", "1", "llama", "../../etc/passwd", "/etc/passwd", "a\0b", "\ud800", "a\nb\x1b[31m", "x" * 10_000),
    *([], {}, [1], ["a"], {"a": 1}, [[[[]]]], {"type": "default"}, {"rope_type": "yarn"}, {"content": 3}),
]
RAW = ["NaN", "Infinity", "-Infinity", "1e999", "9" * 5000, "[" * 100_000, '{"a":1,"a":2}', "\ufeff{}", "\0", "01", "{"]
SOME_MEMORY = 2**29  # bytes that the cases of a kind may add to the process


def judge(call: Callable[[], Any], accept: Callable[[Any], str], names: str) -> str:
    """The outcome of a case: one line that names the file, or what `accept` says of the result."""
    most, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 + SOME_MEMORY, time.process_time()
    try:
        outcome = accept(call())
    except UserError as error:
        lines = str(error).count("\n")
        wrong = "" if names in str(error) and lines <= 21 and str(error).replace("\n", "").isprintable() else "badly "
        outcome = f"{wrong}said: {str(error)!r:.400}" if wrong else ""
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        outcome = "".join(traceback.format_exception(error, limit=-3))
    if resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 > most:
        outcome += " and it took too much memory"
    return outcome + (" and it took too long" if time.process_time() - start > 5 else "")


def flat(params: Any) -> dict[str, np.ndarray]:
    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def differences(found: Model, intact: Model, free: set[str], values_may_differ: bool = False) -> str:
    """What tells two models apart; `free`: settings that may differ, where a file's damage can't be seen."""
    for name in {field.name for field in dataclasses.fields(ModelConfig)} - free - {"mlp_width"} | {"mlp_hidden"}:
        values = [getattr(model[1], name) for model in (found, intact)]
        if values[0] != values[1]:
            return f"silently another {name}: {values}"
    ours, theirs = flat(found[0]), flat(intact[0])
    if {name: x.shape for name, x in ours.items()} != {name: x.shape for name, x in theirs.items()}:
        return "silently other tensors"
    if not all(np.isfinite(x).all() for x in ours.values()):
        return "silently numbers that are not finite"
    same = (
        values_may_differ
        or found[1].heads != intact[1].heads
        or all(np.array_equal(x, theirs[name]) for name, x in ours.items())
    )
    return "" if same else "silently other weights"


def nodes(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths of everything inside a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, part in inner:
        yield (*path, name)
        yield from nodes(part, (*path, name))


def spoil_json(rng: random.Random, record: Any, paths: list[tuple[Any, ...]] | None = None) -> bytes:
    """A JSON file with a value replaced or removed somewhere, or with bytes changed."""
    if rng.random() < 0.3:
        return spoil(rng, json.dumps(record).encode())
    record = copy.deepcopy(record)
    *path, last = rng.choice(paths or list(nodes(record)))
    place = record
    for name in path:
        place = place[name]
    raw = None
    match rng.randrange(8):
        case 0:
            del place[last]
        case 1 if isinstance(place, dict):
            place[f"{last}x"] = place.pop(last)
        case 2:
            place[last], raw = "@raw@", rng.choice(RAW)
        case 3 if type(place[last]) in (int, float):
            place[last] = rng.choice([place[last] * 2, place[last] + 1, -place[last], str(place[last]), [place[last]]])
        case _:
            place[last] = rng.choice(HOSTILE)
    text = json.dumps(record)
    return (text.replace('"@raw@"', raw) if raw else text).encode("utf-8", "surrogatepass")


def config_values(rng: random.Random, folder: Path) -> Outcomes:
    kinds = {"gpt2": TINY, "llama3": FAMILY["llama3"], "llama": FAMILY["llama"]}
    intact: dict[str, tuple[dict[str, Any], Model]] = {}
    for name, config in kinds.items():
        huggingface.write(folder / name, random_params(config), config)
        intact[name] = json.loads((folder / name / "config.json").read_text()), huggingface.read(folder / name)
    while True:
        name = rng.choice(list(kinds))
        record, model = intact[name]
        path = folder / name / "config.json"
        path.write_bytes(data := spoil_json(rng, record))
        # what nothing in the weights can contradict
        free = {"norm_epsilon", *(("heads", "kv_heads") if name == "gpt2" else ())}
        free |= {"block", "rope_theta", "rope_factor", "rope_block"} if name != "gpt2" else set()
        outcome = judge(
            lambda name=name: huggingface.read(folder / name),  # type: ignore[misc]
            lambda found, model=model, free=free: differences(found, model, free),  # type: ignore[misc]
            str(folder / name),
        )
        yield outcome and f"{name} {data!r}: {outcome}"


def gguf_damage(rng: random.Random, folder: Path) -> Outcomes:
    path = folder / "model.gguf"
    write_gguf(path, random_params(FAMILY["llama"]), FAMILY["llama"])
    whole, reader = path.read_bytes(), gguf.GGUFReader(path)
    infos, last = reader.tensors[0].field.offset, reader.tensors[-1].field
    data_at = last.offset + sum(part.nbytes for part in last.parts)  # padding, then data
    intact = gguf_file.read(path)
    every = {field.name for field in dataclasses.fields(ModelConfig)}
    while True:
        path.write_bytes(whole)
        before, region = bytearray(whole), rng.choice([(0, 24), (24, infos), (infos, data_at), (0, len(whole))])
        at = rng.randrange(*region)
        match rng.randrange(5):
            case 0 | 1:
                before[at] ^= 1 << rng.randrange(8)
            case 2:
                numbers = [0, 1, 7, 2**31, 2**32 - 1, 2**40, 2**60, 2**63, 2**64 - 1]
                before[at : at + 8] = struct.pack("<Q", rng.choice(numbers))
            case 3:
                before[at : at + 4] = struct.pack("<I", rng.randrange(14))
            case _:
                before[:] = spoil(rng, whole)
        path.write_bytes(bytes(before))
        changed = [i for i in range(data_at) if before[i : i + 1] != whole[i : i + 1]]
        in_fields = bool(changed) and max(changed) < infos and min(changed) >= 24
        in_data = not changed and len(before) == len(whole)

        def accept(found: Any, in_fields: bool = in_fields, in_data: bool = in_data) -> str:
            params, config, tok = found
            return differences(
                (params, config), (intact[0], intact[1]), every if in_fields else set(), in_fields or in_data
            ) or ("" if in_fields or tok.fingerprint == intact[2].fingerprint else "silently another tokenizer")

        outcome = judge(lambda: gguf_file.read(path), accept, "model.gguf")
        yield outcome and f"{len(before)} of {len(whole)} bytes, from {changed[:1]}, {before[at : at + 8]!r}: {outcome}"


def safetensors_damage(rng: random.Random, folder: Path) -> Outcomes:
    place, outside, cache = folder / "model", folder / "outside", folder / "models--a--b" / "blobs"
    huggingface.write(place, random_params(FAMILY["llama"]), FAMILY["llama"])
    tensors = load_file(place / "model.safetensors")
    (place / "model.safetensors").unlink()
    names, index = [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)], place / "model.safetensors.index.json"
    shards = [dict(list(tensors.items())[n::2]) for n in (0, 1)]
    for name, shard in zip(names, shards, strict=True):
        save_file(shard, place / name)
    listed = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
    record = {"metadata": {"total_size": 1}, "weight_map": listed}
    for other in (outside, cache):
        other.mkdir(parents=True)
        shutil.copy(place / names[0], other / "blob")
    index.write_text(json.dumps(record))
    whole, intact = (place / names[0]).read_bytes(), huggingface.read(place)
    length = struct.unpack("<Q", whole[:8])[0]
    header = json.loads(whole[8 : 8 + length])
    while True:
        index.write_text(json.dumps(record))
        shard = place / names[0]
        shard.unlink(missing_ok=True)
        shard.write_bytes(whole)
        values_may_differ, refused, what = False, False, ""
        match rng.randrange(6):
            case 0:
                index.write_bytes(data := spoil_json(rng, record))
                what = f"{data[:300]!r}"
            case 1:
                what = flip_bit(rng, shard)
                values_may_differ = shard.read_bytes()[: 8 + length] == whole[: 8 + length]
            case 2:
                data = spoil(rng, whole)
                shard.write_bytes(data)
                values_may_differ = data[: 8 + length] == whole[: 8 + length] and len(data) == len(whole)
                what = f"{data[: 8 + length]!r}"
            case 3:
                new = spoil_json(rng, header)
                size = rng.choice([len(new), len(new), 0, 2**20, 2**40, 2**63, 2**64 - 1])
                shard.write_bytes(struct.pack("<Q", size) + new + whole[8 + length :])
                what = f"{size} {new!r}"
            case 4:
                shard.unlink()
                refused = rng.random() < 0.5
                target = (outside if refused else cache) / "blob"
                shard.symlink_to(target if rng.random() < 0.5 else os.path.relpath(target, place))
                what = f"a link to {target}"
            case _:
                other = rng.choice(
                    ["../outside/blob", "/etc/passwd", "..", ".", "", "a\0b", "\ud800", "config.json", "x"]
                )
                index.write_text(json.dumps({"weight_map": {**listed, "model.norm.weight": other}}))
                refused, what = True, other
        outcome = judge(
            lambda: huggingface.read(place),
            lambda found, v=values_may_differ, r=refused: "read it" if r else differences(found, intact, set(), v),
            str(place),
        )
        yield outcome and f"{what}: {outcome}"


PIECES = [
    "{% for a in range(99999) %}",
    "{% for a in messages recursive %}",
    "{% set ns.a = ns.a ~ ns.a %}",
    "{% set ns.b = [ns.b, ns.b] %}",
    "{% macro m(n) %}{{ m(n) }}{{ m(n) }}{% endmacro %}",
    "{{ 'a' * 10**N }}",
    "{{ 'a' | center(10**N) }}",
    "{{ '%0Nd' % 1 }}",
    "{{ '{:>N0000000}'.format(1) }}",
    "{{ range(99999) | join('a' * 10**N) }}",
    "{{ 7 ** 7 ** N }}",
    "{{ ns.b }}{{ ns.a | length }}",
    "{{ ns.b | tojson }}",
    "{{ m(N) }}",
    "{{ messages[0].content.__class__.__mro__ }}",
    "{% include '/etc/passwd' %}",
    "{{ raise_exception('a\n\x1b[31m' * N) }}",
    "{{ (1).to_bytes(10**N, 'big') }}",
    "{{ [1] | batch(10**N, 1) | list }}",
    "{{ ('a' * 10**N) | replace('a', 'b' * 10**N) | length }}",
    "{{ " + "(" * 500,
    "{{ '\ud800' }}",
    "{% endfor %}",
    "{% if messages | length > N %}",
    "{% endif %}",
    "\0",
    CHATML,
]


def tokenizers_and_templates(rng: random.Random, folder: Path) -> Outcomes:
    controls = ("<|im_start|>", "<|im_end|>")
    cores = [core_of(kind, *controls) for kind in ("byte-level", "metaspace first", "prepend")]
    for core in cores:
        core.enable_padding(length=8)
        core.enable_truncation(9)
    records = [json.loads(core.to_str()) for core in cores]
    paths = []
    for record in records:  # few of the many nodes are tokens
        every = list(nodes(record))
        tokens = [path for path in every if path[:2] in (("model", "vocab"), ("model", "merges")) and len(path) > 2]
        paths.append([path for path in every if path not in set(tokens)] + rng.sample(tokens, 40))
    settings = {"tokenizer_config.json": {**NAMES, "add_bos_token": True, "chat_template": None, "pad_token": None}}
    place = folder / "model"
    place.mkdir()
    text = "Hello é 中\n 12 <|im_end|>"

    def accept(tok: Tokenizer) -> str:
        ids = tok.encode(text)
        tok.decode(ids)
        return "" if max(ids, default=0) < tok.vocab_size else f"ids {ids} of {tok.vocab_size}"

    limit, templates.SECONDS = templates.SECONDS, 0.4
    try:
        while True:
            i = rng.randrange(len(records))
            (place / "tokenizer.json").write_text(json.dumps(records[i]))
            (place / "tokenizer_config.json").write_text(json.dumps(settings["tokenizer_config.json"]))
            if rng.random() < 0.04:
                pieces = [piece.replace("N", str(rng.choice([1, 3, 9, 10]))) for piece in rng.choices(PIECES, k=4)]
                data = json.dumps(
                    {**NAMES, "chat_template": "{% set ns = namespace(a='ha', b=[1]) %}" + "".join(pieces)}
                )
                (place / "tokenizer_config.json").write_text(data)
            elif rng.random() < 0.3:
                data = spoil_json(rng, settings["tokenizer_config.json"]).decode("utf-8", "surrogateescape")
                (place / "tokenizer_config.json").write_bytes(data.encode("utf-8", "surrogateescape"))
            else:
                raw = spoil_json(rng, records[i], paths[i])
                (place / "tokenizer.json").write_bytes(raw)
                intact = json.dumps(records[i]).encode()
                at = next((n for n, byte in enumerate(raw) if intact[n : n + 1] != bytes([byte])), 0)
                data = f"kind {i}, from byte {at}: {raw[max(at - 60, 0) : at + 100]!r}"
            outcome = judge(lambda: huggingface.read_tokenizer(place), accept, str(place))
            if resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss > 2**20:
                outcome += " and a template took more than 1 GB"
            yield outcome and f"{data[:600]}: {outcome}"
    finally:
        templates.SECONDS = limit


KINDS = {
    "config.json, wrong values": Kind(config_values),
    "GGUF, damaged anywhere": Kind(gguf_damage),
    "safetensors and index, damaged anywhere": Kind(safetensors_damage),
    "tokenizer.json and chat templates, hostile": Kind(tokenizers_and_templates),
}
