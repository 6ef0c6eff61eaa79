"""GGUF files of Llama models: weights (dequantised to float32), tokenizer and chat template, all in one file."""

from pathlib import Path
from typing import Any

import numpy as np

from jaxgpt.config import ModelConfig
from jaxgpt.data.tokenizer import Tokenizer, prepend
from jaxgpt.errors import UserError, needs_extra
from jaxgpt.pretrained import places
from jaxgpt.pretrained.huggingface import make_tokenizer

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
_CONTROL, _ADDED = 3, 4  # in tokenizer.ggml.token_type: special tokens, and others found before BPE, such as <think>
_LLAMA3_PATTERN = (  # how Llama 3 splits text before BPE
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class GGUFFile:
    """An open GGUF file: its metadata fields and tensors, by name."""

    def __init__(self, path: Path) -> None:
        with needs_extra("pretrained"):
            import gguf

        class Reader(gguf.GGUFReader):
            """Reads through a plain array: slicing the np.memmap, a million times, costs three times as much."""

            @property
            def data(self) -> Any:
                return self._bytes

            @data.setter
            def data(self, value: np.ndarray) -> None:
                self._bytes = np.asarray(value)

        try:
            reader = Reader(path)
        except Exception as error:  # whatever the reader or the file system raises
            raise UserError(f"{path} is not a readable GGUF file ({error}); copy it again") from error
        self.path, self._fields = path, reader.fields
        self.tensors = {_huggingface_name(tensor.name): tensor for tensor in reader.tensors}

    def get(self, name: str, default: Any = None) -> Any:
        """A metadata value, or the default."""
        return self._fields[name].contents() if name in self._fields else default

    def need(self, name: str) -> Any:
        """A metadata value. Raises UserError if it is missing."""
        if name not in self._fields:
            raise UserError(f"{self.path} has no metadata field {name}")
        return self.get(name)


def _huggingface_name(name: str) -> str:
    *block, module, kind = name.split(".")
    prefix = f"model.layers.{block[1]}." if block[:1] == ["blk"] else ""
    return f"{prefix}{_NAMES.get(module, module)}.{kind}"


def read(path: Path, use_tags: bool = False) -> tuple[dict[str, Any], ModelConfig, Tokenizer]:
    """Parameters (float32 NumPy arrays), configuration, and tokenizer. The tokenizer uses the file's chat template, or
    our tags if there is none or with `use_tags`. Raises UserError listing every missing, unknown or misshapen tensor.
    """
    with needs_extra("pretrained"):
        import gguf

    file = GGUFFile(path)
    config = _config(file)
    shapes = {name: tuple(int(n) for n in reversed(tensor.shape)) for name, tensor in file.tensors.items()}
    errors = places.tensor_errors(config, shapes)
    if errors:
        raise UserError("\n  ".join([f"{path} does not hold the tensors of its architecture:", *errors]))

    def tensor(name: str) -> np.ndarray:
        stored = file.tensors[name]
        x = np.asarray(gguf.dequantize(stored.data, stored.tensor_type), np.float32).reshape(shapes[name])
        if "q_proj" in name or "k_proj" in name:  # undo GGUF's interleaving of rotary pairs
            heads = config.heads if "q_proj" in name else config.groups
            x = x.reshape(heads, config.head_dim // 2, 2, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)
        return x

    return places.to_params(tensor, config), config, _tokenizer(file, use_tags)


def _config(file: GGUFFile) -> ModelConfig:
    architecture = file.need("general.architecture")
    if architecture != "llama":
        raise UserError(f"{file.path} is a {architecture!r} model; only GGUF files of llama models are supported")
    if "model.rope_freqs.weight" in file.tensors or "rope_freqs.weight" in file.tensors:
        raise UserError(
            f"{file.path} has scaled rotary frequencies (rope_freqs); use the model's Hugging Face folder instead"
        )
    width, heads = file.need("llama.embedding_length"), file.need("llama.attention.head_count")
    if file.get("llama.rope.dimension_count", width // heads) != width // heads or file.get("llama.rope.scaling.type"):
        raise UserError(f"{file.path} has partial or scaled rotary positions, which are not supported")
    return ModelConfig(
        layers=file.need("llama.block_count"),
        width=width,
        heads=heads,
        kv_heads=file.get("llama.attention.head_count_kv", 0),
        block=file.need("llama.context_length"),
        vocab=int(file.tensors["model.embed_tokens.weight"].shape[1]),
        mlp="swiglu",
        mlp_width=file.need("llama.feed_forward_length"),
        norm="rms",
        positions="rotary",
        rope_theta=float(file.get("llama.rope.freq_base", 1e4)),
        biases=False,
        tied="lm_head.weight" not in file.tensors,
        norm_epsilon=float(f"{file.need('llama.attention.layer_norm_rms_epsilon'):.6g}"),  # 1e-5, not 9.99999975e-06
    )


def _tokenizer(file: GGUFFile, use_tags: bool) -> Tokenizer:
    kind, pre = file.need("tokenizer.ggml.model"), file.get("tokenizer.ggml.pre", "gpt-2")
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
            f"{file.path} has an unsupported tokenizer, {kind!r} ({pre!r}); supported: gpt2 ({', '.join(supported)}); "
            "use the model's Hugging Face folder instead"
        )
    tokens = file.need("tokenizer.ggml.tokens")
    merges = [tuple(pair.split(" ")) for pair in file.need("tokenizer.ggml.merges")]
    vocab = {token: i for i, token in enumerate(tokens)}
    core = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=pre == "llama-bpe"))
    core.pre_tokenizer, core.decoder = supported[pre], decoders.ByteLevel()
    types = file.get("tokenizer.ggml.token_type", [])
    for token, type_ in zip(tokens, types, strict=False):
        if type_ in (_CONTROL, _ADDED):
            core.add_tokens([tokenizers.AddedToken(token, special=type_ == _CONTROL, normalized=False)])
    names = {}
    for name in ("bos", "eos", "unknown", "padding"):
        if (i := file.get(f"tokenizer.ggml.{name}_token_id")) is not None:
            names[f"{ {'unknown': 'unk', 'padding': 'pad'}.get(name, name) }_token"] = tokens[i]
    if file.get("tokenizer.ggml.add_bos_token", pre == "llama-bpe") and "bos_token" in names:  # as llama.cpp decides
        prepend(core, [vocab[names["bos_token"]]])
    source = None if use_tags else file.get("tokenizer.chat_template")
    return make_tokenizer(core, source, names, str(file.path))
