"""Read and write Hugging Face folders: config.json, safetensors (one file or several), tokenizer. Never a pickle.

params, config = read(folder)
write(folder, params, config, tok)      AutoModelForCausalLM.from_pretrained(folder) loads it
"""

import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxgpt.config import ModelConfig
from jaxgpt.data.templates import chat_tokenizer
from jaxgpt.data.tokenizer import (
    BOS,
    PROMPT,
    SPECIALS,
    Template,
    Tokenizer,
    append_tags,
    gpt2_core,
    prepend,
    prepended,
    read_merges,
)
from jaxgpt.errors import UserError, needs_extra, printable, show_value
from jaxgpt.files import write_json
from jaxgpt.pretrained import places
from jaxgpt.pretrained.checked import Fields, check_place, naming, read_object, read_text
from jaxgpt.pretrained.checked_tokenizer import check_ids, check_parts, check_tokenizer, reading_tokenizer

with needs_extra("pretrained"):
    import tokenizers

_BUFFERS = re.compile(r"(\.attn\.(masked_)?bias|\.rotary_emb\.inv_freq)$")  # constants stored in old checkpoints
_HEAD = "lm_head.weight"  # some models whose embeddings serve as the head store them under this name, too
_DTYPES = ("F32", "F16", "BF16", "F64")
MOST_LAYERS = 10_000
SUPPORTED = "gpt2, openai-gpt, llama and mistral"  # what model_type may be
_NAMED = ("bos_token", "eos_token", "pad_token")
_TANH = ("gelu_new", "gelu_pytorch_tanh", "gelu")  # "gelu" only in openai-gpt, where it means the tanh form


def read(folder: Path) -> tuple[dict[str, Any], ModelConfig]:
    """Parameters (float32 NumPy arrays) and configuration. Names and shapes are checked before any tensor is read.
    Raises UserError listing all that is wrong."""
    with needs_extra("pretrained"):
        from safetensors import safe_open

    config = config_from(read_object(folder / "config.json"), folder)
    files = {}
    for path in _weight_files(folder):
        try:
            files[path] = safe_open(check_place(path), framework="numpy")
        except UserError:
            raise
        except Exception as error:  # errors of safetensors or the system
            raise UserError(f"{path} can't be read ({printable(str(error))}); copy it again") from error
    where: dict[str, tuple[Any, str]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for path, file in files.items():
        for own in file.keys():  # noqa: SIM118
            name, stored = _full_name(own), file.get_slice(own)
            if _BUFFERS.search(name):
                continue
            if name in where:
                raise UserError(f"{path} stores {printable(name)} a second time; download the whole model again")
            if stored.get_dtype() not in _DTYPES:
                raise UserError(
                    f"{path}: {printable(name)} is of type {stored.get_dtype()}, not {' or '.join(_DTYPES)}"
                )
            where[name], shapes[name] = (file, own), tuple(stored.get_shape())
    head = where.pop(_HEAD, None) if config.tied else None
    texts = places.tensor_errors(config, {name: shapes[name] for name in where})
    if texts:
        raise UserError("\n  ".join([f"{folder} does not hold the tensors that its config.json implies:", *texts]))
    params = places.to_params(lambda name: where[name][0].get_tensor(where[name][1]), config, folder)
    if head and not np.array_equal(head[0].get_tensor(head[1]).astype(np.float32), params["embed"]["tokens_VD"]):
        raise UserError(
            f"{folder} stores a {_HEAD} unlike its embeddings, but its config.json says that they are the same "
            "(tie_word_embeddings); correct config.json, or download the whole model again"
        )
    return params, config


def _full_name(name: str) -> str:
    """Add the prefix "transformer.", which early GPT-2 checkpoints lack."""
    return f"transformer.{name}" if re.match(r"(wte|wpe|h\.\d+|ln_f|tokens_embed|positions_embed)\.", name) else name


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        listed = Fields(read_object(index), index).inner("weight_map").values()
        if not all(isinstance(name, str) for name in listed):
            raise UserError(f"{index}: weight_map does not map tensors to files; download the whole model again")
        names = sorted(set(listed))
        if any(Path(name).name != name or printable(name) != name for name in names):
            raise UserError(f"{index} names files outside its folder; don't use this checkpoint")
        missing = [name for name in names if not (folder / name).is_file()]
        if missing or not names:
            raise UserError(f"{folder} lacks {', '.join(missing) or 'weights'}; download the whole model again")
        return [folder / name for name in names]
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    pickled = [path.name for path in folder.glob("*.bin")]
    hint = f"; {pickled[0]} is a pickle, which can run code: convert it to safetensors" if pickled else ""
    raise UserError(f"{folder} has no model.safetensors{hint}")


# ---- config.json ----


def config_from(record: Any, folder: Path) -> ModelConfig:
    """Our settings for a config.json. Raises UserError for unsupported architectures and options."""
    file = folder / "config.json"
    if not isinstance(record, dict) or "model_type" not in record:
        raise UserError(f"{file} is not a model's config.json: it has no model_type")
    fields = Fields(record, file)
    named = fields.text("model_type")
    kind = {"mistral": "llama"}.get(named, named)
    if kind not in places.KINDS:
        raise UserError(f"{folder} is a {show_value(kind)} model; supported are {SUPPORTED}")
    with naming(file):
        return _llama(fields) if kind == "llama" else _gpt(fields, kind)


def _refuse(record: Mapping[str, Any], allowed: Mapping[str, tuple[Any, ...]]) -> None:
    def same(value: Any, known: Any) -> bool:  # in Python, True == 1
        return value == known and isinstance(value, bool) == isinstance(known, bool)

    texts = [
        f"{name} {show_value(record[name])} (only {' or '.join(map(repr, known))})"
        for name, known in allowed.items()
        if not any(same(record.get(name, known[0]), value) for value in known)
    ]
    if texts:
        raise UserError(f"not supported: {', '.join(texts)}")


def _gpt(fields: Fields, kind: str) -> ModelConfig:
    activation = "activation_function" if kind == "gpt2" else "afn"
    _refuse(
        fields.values,
        {
            activation: _TANH[: 2 if kind == "gpt2" else 3],
            "tie_word_embeddings": (True,),
            "scale_attn_weights": (True,),
            "scale_attn_by_inverse_layer_idx": (False,),
            "add_cross_attention": (False,),
        },
    )
    return ModelConfig(
        layers=fields.count("n_layer", most=MOST_LAYERS),
        width=fields.count("n_embd"),
        heads=fields.count("n_head"),
        block=fields.count("n_positions"),
        vocab=fields.count("vocab_size"),
        mlp_width=fields.count("n_inner", 0),
        norm_at="input" if kind == "gpt2" else "output",
        norm_epsilon=fields.number("layer_norm_epsilon", 1e-5),
    )


def _llama(fields: Fields) -> ModelConfig:
    rope_values = {"rope_theta": fields.values.get("rope_theta", 1e4), **fields.inner("rope_scaling")}
    rope = Fields(rope_values | fields.inner("rope_parameters"), fields.where)
    stretched = rope.values.get("rope_type", rope.values.get("type", "default")) == "llama3"
    biases = fields.flag("attention_bias")
    if biases != fields.flag("mlp_bias"):
        raise UserError(f"not supported: attention_bias {biases} with mlp_bias {not biases} (only both or neither)")
    width, heads = fields.count("hidden_size"), fields.count("num_attention_heads")
    _refuse(
        fields.values,
        {
            "hidden_act": ("silu",),
            "sliding_window": (None,),
            "head_dim": (width // heads, None),
        },
    )
    _refuse(rope.values, {"rope_type": ("default", "llama3"), "type": ("default", "llama3")})
    if stretched:
        _refuse(rope.values, {"low_freq_factor": (1.0,), "high_freq_factor": (4.0,)})
    return ModelConfig(
        layers=fields.count("num_hidden_layers", most=MOST_LAYERS),
        width=width,
        heads=heads,
        kv_heads=fields.count("num_key_value_heads", 0),
        block=fields.count("max_position_embeddings"),
        vocab=fields.count("vocab_size"),
        mlp="swiglu",
        mlp_width=fields.count("intermediate_size"),
        norm="rms",
        positions="rotary",
        rope_theta=rope.number("rope_theta", above=1),
        biases=biases,
        rope_factor=rope.number("factor") if stretched else 1.0,
        rope_block=rope.count("original_max_position_embeddings") if stretched else 8192,
        tied=fields.flag("tie_word_embeddings"),
        norm_epsilon=fields.number("rms_norm_eps", 1e-6),
    )


def config_to_json(config: ModelConfig) -> dict[str, Any]:
    """The config.json for our settings. Raises UserError if no Hugging Face architecture fits."""
    kind = places.architecture_of(config)
    common = {"model_type": kind, "vocab_size": config.vocab, "tie_word_embeddings": config.tied, "dtype": "float32"}
    if kind != "llama":
        architecture, activation = ("GPT2", "activation_function") if kind == "gpt2" else ("OpenAIGPT", "afn")
        return {
            "architectures": [f"{architecture}LMHeadModel"],
            **common,
            activation: "gelu_new" if kind == "gpt2" else "gelu",
            "n_layer": config.layers,
            "n_embd": config.width,
            "n_head": config.heads,
            "n_positions": config.block,
            "n_inner": config.mlp_hidden,
            "layer_norm_epsilon": config.norm_epsilon,
        }
    rope: dict[str, Any] = {"rope_theta": config.rope_theta, "rope_type": "default"}
    if config.rope_factor > 1.0:
        rope |= {
            "rope_type": "llama3",
            "factor": config.rope_factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": config.rope_block,
        }
    return {
        "architectures": ["LlamaForCausalLM"],
        **common,
        "hidden_act": "silu",
        "num_hidden_layers": config.layers,
        "hidden_size": config.width,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.groups,
        "head_dim": config.head_dim,
        "intermediate_size": config.mlp_hidden,
        "max_position_embeddings": config.block,
        "rms_norm_eps": config.norm_epsilon,
        "attention_bias": config.biases,
        "mlp_bias": config.biases,
        "rope_theta": config.rope_theta,
        "rope_parameters": rope,
        "rope_scaling": rope if config.rope_factor > 1.0 else None,
    }


# ---- tokenizers ----


def read_tokenizer(folder: Path, use_tags: bool = False) -> Tokenizer:
    """A folder's tokenizer.json (or GPT-2's vocab.json and merges.txt) with its chat template or,
    without one or with `use_tags`, with our tags. Raises UserError if there is no readable tokenizer."""
    core = _read_core(folder)
    settings: dict[str, Any] = {}
    for file in ("special_tokens_map.json", "tokenizer_config.json"):
        settings |= read_object(folder / file) if (folder / file).is_file() else {}
    fields = Fields(settings, folder / "tokenizer_config.json")
    names: dict[str, str] = {}
    for name in (*_NAMED, "unk_token"):
        token = settings.get(name)
        token = token.get("content") if isinstance(token, dict) else token
        names |= {} if token is None else {name: Fields({name: token}, fields.where).text(name)}
    first = core.token_to_id(names.get("bos_token", ""))
    if fields.flag("add_bos_token") and first is not None and not prepended(core):
        prepend(core, [first])
    source = None if use_tags else _chat_template(folder, fields)
    return make_tokenizer(core, source, names, str(folder))


def make_tokenizer(core: tokenizers.Tokenizer, source: str | None, names: Mapping[str, str], where: str) -> Tokenizer:
    """The tokenizer with a chat template, or with our tags if `source` is None. UserError if it is unusable."""
    check_tokenizer(core, where)
    separator = separator_of(core, names.get("eos_token"))
    with reading_tokenizer(f"the tokenizer of {where} is unusable"):
        if source is None:
            return Tokenizer(core, append_tags(core, separator, names))
        return chat_tokenizer(core, source, names, separator, where)


def _chat_template(folder: Path, fields: Fields) -> str | None:
    if (folder / "chat_template.jinja").is_file():
        return read_text(folder / "chat_template.jinja")
    found = fields.values.get("chat_template")
    if isinstance(found, list):  # several named templates
        named = [entry for entry in found if isinstance(entry, dict) and entry.get("name") == "default"]
        found = named[0].get("template") if named else None
    return Fields({"chat_template": found}, fields.where).text("chat_template", None)


def separator_of(core: tokenizers.Tokenizer, eos: str | None) -> int | None:
    """The id of the token that separated documents in pretraining, None if unknown."""
    if core.token_to_id(SPECIALS[PROMPT]) == PROMPT:  # a model trained here
        return BOS
    for name in ("<|endoftext|>", "<|end_of_text|>", eos or "", "</s>"):
        if (found := core.token_to_id(name)) is not None:
            return int(found)
    return None


def _read_core(folder: Path) -> tokenizers.Tokenizer:
    file = folder / "tokenizer.json"
    if file.is_file():
        with reading_tokenizer(f"{file} is unreadable"):
            check_parts(read_object(file), str(file))
            core = tokenizers.Tokenizer.from_file(str(file))
            core.no_padding()  # before the first text: padding may be to any length
            core.no_truncation()
            return core
    with reading_tokenizer(
        f"{folder} has neither a readable tokenizer.json nor vocab.json and merges.txt; copy them there"
    ):
        merges = read_merges(read_text(folder / "merges.txt"))
        vocab = read_object(folder / "vocab.json")
        check_ids(list(vocab.values()), 0, str(folder / "vocab.json"))
        return gpt2_core(vocab, merges)


# ---- writing ----


def write(folder: Path, params: Any, config: ModelConfig, tok: Tokenizer | None = None) -> None:
    """Write a new folder that `transformers` loads. The template becomes a Jinja chat template. Raises UserError if the
    folder exists or no Hugging Face architecture fits the model."""
    with needs_extra("pretrained"):
        from safetensors.numpy import save_file

    record = config_to_json(config)
    if folder.exists():
        raise UserError(f"{folder} exists; choose another folder")
    flat = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]
    }
    texts = sorted(flat.keys() ^ {place.path for place in places.places(config)})
    if texts:
        raise UserError(f"only whole models can be written; missing or unexpected: {', '.join(texts)}")
    new = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    save_file(places.to_tensors(flat, config), new / "model.safetensors", metadata={"format": "pt"})
    if tok is not None:
        core = tokenizers.Tokenizer.from_str(tok.to_json())
        if prepended(core) != tok.template.begin:
            prepend(core, tok.template.begin)
        (new / "tokenizer.json").write_text(core.to_str(pretty=True), encoding="utf-8")
        names = special_names(tok)
        ids: dict[str, Any] = {f"{name}_id": core.token_to_id(names.get(name, "")) for name in _NAMED}
        ends = [i for i in (tok.template.end, ids["eos_token_id"]) if i is not None]
        ids["eos_token_id"] = ends if len(set(ends)) > 1 else ends[0]
        record |= ids
        write_json(new / "generation_config.json", {name: i for name, i in ids.items() if i is not None})
        write_json(
            new / "tokenizer_config.json",
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                **names,
                "clean_up_tokenization_spaces": False,
                "model_max_length": config.block,
            },
        )
        (new / "chat_template.jinja").write_text(tok.template.jinja or jinja_template(tok), encoding="utf-8")
    write_json(new / "config.json", record)
    os.replace(new, folder)


def special_names(tok: Tokenizer) -> dict[str, str]:
    """bos_token, eos_token and pad_token: the model's own where it has them; no token is made one for its id."""
    template = tok.template
    begin = {"bos_token": tok.tag(template.begin[0])} if template.begin else {}
    return {**begin, "eos_token": tok.tag(template.end), **template.names}


def jinja_template(tok: Tokenizer) -> str:
    """Our tags as a Jinja chat template, for other programs."""
    template: Template = tok.template
    before, between, end, turn = (
        json.dumps(text, ensure_ascii=False)
        for text in (template.before, template.between, template.closing, template.turn or template.before)
    )
    text = "message['content'] | trim" if template.prompt_strip[0] else "message['content']"
    return (
        "{%- for message in messages -%}{%- if message['role'] == 'user' -%}"
        "{{- (" + before + " if loop.first else " + turn + ") + (" + text + ") + " + between + " -}}"
        "{%- elif message['role'] == 'assistant' -%}{{- message['content'] + " + end + " -}}"
        "{%- else -%}{{- raise_exception('this template has no role ' + message['role']) -}}{%- endif -%}{%- endfor -%}"
    )
