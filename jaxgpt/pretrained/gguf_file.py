"""GGUF files of Llama models: weights (dequantised to float32), tokenizer and chat template, all in one file."""

from pathlib import Path
from typing import Any

import numpy as np

from jaxgpt.config import ModelConfig
from jaxgpt.data.tokenizer import Tokenizer, prepend
from jaxgpt.errors import UserError, needs_extra, show_value
from jaxgpt.pretrained import places
from jaxgpt.pretrained.checked import Fields, naming
from jaxgpt.pretrained.checked_tokenizer import reading_tokenizer
from jaxgpt.pretrained.gguf_reader import read_header
from jaxgpt.pretrained.huggingface import MOST_LAYERS, make_tokenizer

with needs_extra("pretrained"):
    import tokenizers
    from tokenizers import Regex, decoders, models, pre_tokenizers

_NAMES = {  # GGUF's names -> Hugging Face's
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_CONTROL, _ADDED = (
    3,
    4,
)  # in tokenizer.ggml.token_type: special tokens, and other tokens matched before BPE, such as <think>
_LLAMA3_PATTERN = (  # how Llama 3 splits text before BPE
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class GGUFFile:
    """An open GGUF file: its metadata fields, and its tensors by Hugging Face's names."""

    def __init__(self, path: Path) -> None:
        metadata, stored = read_header(path)
        self.path, self.fields = path, Fields(metadata, path)
        self.tensors = {_huggingface_name(name): tensor for name, tensor in stored.items()}
        if len(self.tensors) < len(stored):
            raise UserError(f"{path} stores a tensor under two names; download it again")


def _huggingface_name(name: str) -> str:
    *block, module, kind = ("", *name.split(".")) if "." not in name else name.split(".")
    if block[:1] != ["blk"] or len(block) != 2:
        return name if block else f"{_NAMES.get(module, module)}.{kind}"
    return f"model.layers.{block[1]}.{_NAMES.get(module, module)}.{kind}"


def read(path: Path, use_tags: bool = False) -> tuple[dict[str, Any], ModelConfig, Tokenizer]:
    """Parameters (float32 NumPy arrays), configuration, and tokenizer. The tokenizer uses the file's chat template, or
    our tags if there is none or with `use_tags`. Raises UserError listing every missing, unknown or misshapen tensor.
    """
    file = GGUFFile(path)
    config = _config(file)
    errors = places.tensor_errors(config, {name: tensor.shape for name, tensor in file.tensors.items()})
    if errors:
        raise UserError("\n  ".join([f"{path} does not hold the tensors of its architecture:", *errors]))

    def tensor(name: str) -> np.ndarray:
        x = file.tensors[name].values()
        if "q_proj" in name or "k_proj" in name:  # undo GGUF's interleaving of rotary pairs
            heads = config.heads if "q_proj" in name else config.groups
            x = x.reshape(heads, config.head_dim // 2, 2, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)
        return x

    return places.to_params(tensor, config, path), config, _tokenizer(file, use_tags)


def _config(file: GGUFFile) -> ModelConfig:
    fields = file.fields
    architecture = fields.text("general.architecture")
    if architecture != "llama":
        raise UserError(
            f"{file.path} is a {show_value(architecture)} model; only GGUF files of llama models are supported"
        )
    if "model.rope_freqs.weight" in file.tensors or "rope_freqs.weight" in file.tensors:
        raise UserError(
            f"{file.path} has scaled rotary frequencies (rope_freqs); use the model's Hugging Face folder instead"
        )
    width, heads = fields.count("llama.embedding_length"), fields.count("llama.attention.head_count")
    scaled = fields.values.get("llama.rope.scaling.type") not in (None, "", "none")
    if fields.count("llama.rope.dimension_count", width // heads) != width // heads or scaled:
        raise UserError(f"{file.path} has partial or scaled rotary positions, which are not supported")
    if "model.embed_tokens.weight" not in file.tensors:
        raise UserError(f"{file.path} has no tensor token_embd.weight; download it again")
    rows = file.tensors["model.embed_tokens.weight"].shape[0]
    if fields.count("llama.vocab_size", rows) != rows:
        raise UserError(f"{file.path}: llama.vocab_size differs from the {rows} rows of token_embd.weight")
    with naming(file.path):
        return ModelConfig(
            layers=fields.count("llama.block_count", most=MOST_LAYERS),
            width=width,
            heads=heads,
            kv_heads=fields.count("llama.attention.head_count_kv", 0),
            block=fields.count("llama.context_length"),
            vocab=rows,
            mlp="swiglu",
            mlp_width=fields.count("llama.feed_forward_length"),
            norm="rms",
            positions="rotary",
            rope_theta=fields.number("llama.rope.freq_base", 1e4, above=1),
            biases=False,
            tied="lm_head.weight" not in file.tensors,
            norm_epsilon=float(f"{fields.number('llama.attention.layer_norm_rms_epsilon'):.6g}"),  # not 9.99999975e-06
        )


def _tokenizer(file: GGUFFile, use_tags: bool) -> Tokenizer:
    fields = file.fields
    kind, pre = fields.text("tokenizer.ggml.model"), fields.text("tokenizer.ggml.pre", "gpt-2")
    digits, plain = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    supported = {
        "gpt-2": plain,
        "default": plain,
        "smollm": pre_tokenizers.Sequence([digits, plain]),
        "llama-bpe": pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(_LLAMA3_PATTERN), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        ),
    }
    if kind != "gpt2" or pre not in supported:
        raise UserError(
            f"{file.path} has an unsupported tokenizer, {show_value(kind)} ({show_value(pre)}); "
            f"supported: gpt2 ({', '.join(supported)}); use the model's Hugging Face folder instead"
        )
    tokens, merges = (fields.texts(f"tokenizer.ggml.{name}") for name in ("tokens", "merges"))
    vocab = {token: i for i, token in enumerate(tokens)}
    if len(vocab) < len(tokens):
        twice = next(token for i, token in enumerate(tokens) if vocab[token] != i)
        raise UserError(f"{file.path}: tokenizer.ggml.tokens lists {show_value(twice)} twice")
    types = fields.numbers("tokenizer.ggml.token_type", len(tokens))
    names = {}
    for name in ("bos", "eos", "unknown", "padding"):
        field = f"tokenizer.ggml.{name}_token_id"
        if (i := fields.values.get(field)) is not None:
            if type(i) is not int or not 0 <= i < len(tokens):
                raise UserError(f"{file.path}: {field} is {show_value(i)}, but there are {len(tokens)} tokens")
            names[f"{ {'unknown': 'unk', 'padding': 'pad'}.get(name, name) }_token"] = tokens[i]
    with reading_tokenizer(f"{file.path}: its tokenizer is unusable"):
        pairs = [(left, right) for left, right in (pair.split(" ") for pair in merges)]
        core = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=pairs, ignore_merges=pre == "llama-bpe"))
        core.pre_tokenizer, core.decoder = supported[pre], decoders.ByteLevel()
        for token, type_ in zip(tokens, types, strict=False):
            if type_ in (_CONTROL, _ADDED):
                core.add_tokens([tokenizers.AddedToken(token, special=type_ == _CONTROL, normalized=False)])
        # as llama.cpp decides
        if fields.flag("tokenizer.ggml.add_bos_token", pre == "llama-bpe") and "bos_token" in names:
            prepend(core, [vocab[names["bos_token"]]])
    source = None if use_tags else fields.text("tokenizer.chat_template", None)
    return make_tokenizer(core, source, names, str(file.path))
