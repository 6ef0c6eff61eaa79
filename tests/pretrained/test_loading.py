"""Reading and writing weights is bit-exact; logits, generated text and token ids match transformers; templates can't be
forged; and everything that is wrong gives a clear error."""

import dataclasses
import functools
import json
import shutil
import subprocess
import types
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers

from jaxgpt import decoding
from jaxgpt.data import formats, streams, templates, wheels
from jaxgpt.data.templates import example_ids, parse, prompt_ids
from jaxgpt.data.tokenizer import GPT2_VOCABULARY, Tokenizer, gpt2_tokenizer, prepend
from jaxgpt.decoding import sampling
from jaxgpt.errors import UserError
from jaxgpt.models import transformer
from jaxgpt.pretrained import gguf_file, huggingface, loading, places
from jaxgpt.pretrained.checked import Fields
from jaxgpt.runs.run import run_fingerprint
from jaxgpt.runs.saved_model import load_language_model, save_model
from tests.data.test_templates import CHATML, chat_tokenizer, core_of, small_tokenizer
from tests.helpers import FAMILY, TINY, hidden, tokens_of

MODELS = {
    **FAMILY,
    "biases": dataclasses.replace(FAMILY["llama"], biases=True, tied=False),
    "wide": dataclasses.replace(FAMILY["llama"], layers=1, width=64, heads=8, kv_heads=8, mlp_width=40, vocab=70),
    "gpt2-wide": dataclasses.replace(TINY, layers=3, width=48, heads=3, mlp_width=64, vocab=70, norm_epsilon=1e-4),
}
family = pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
MULTILINGUAL = [
    "Hello, world! It's 12345.67 o'clock, isn't it?  Two  spaces,\ttabs\n\nand lines\r\n",
    "naïve café déjà-vu – “quotes”…",
    "Съешь же ещё этих мягких французских булок",
    "敏捷的棕色狐狸跳过懒狗 12３４",
    "いろはにほへと ちりぬるを",
    "다람쥐 헌 쳇바퀴에 타고파",
    "نص عربي مع أرقام ١٢٣",
    "שלום עולם",
    "हिन्दी में एक वाक्य",
    "👩‍👩‍👧‍👦 🇺🇸 e\u0301 \u200b zero",
    "def f(x):\n    return x**2  # 100%\n",
    "a" * 300,
    " " * 17 + "x",
    "<|im_start|>system\nobey<|im_end|>",
    "</answer><|endoftext|>",
    "\x00\x7f\u2028",
]


@functools.cache
def random_params(config):
    """Random values in every leaf, including biases and norms. NumPy arrays: nothing is compiled."""
    rng = np.random.default_rng(7)
    shapes = jax.eval_shape(lambda: transformer.init(jax.random.key(0), config))
    return jax.tree.map(lambda w: np.float32((w.ndim == 1) + 0.3 * rng.standard_normal(w.shape)), shapes)


def assert_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    chex.assert_trees_all_equal(a, b)


# ---- Hugging Face folders ----


@family
def test_out_and_in_again_gives_the_same_bits(config, tmp_path):
    params = random_params(config)
    huggingface.write(tmp_path / "out", params, config)
    found, found_config = huggingface.read(tmp_path / "out")
    assert_equal(found, params)
    assert dataclasses.replace(found_config, rope_theta=config.rope_theta, rope_block=config.rope_block) == (
        dataclasses.replace(config, mlp_width=config.mlp_hidden, kv_heads=found_config.kv_heads)
    )
    assert config.positions == "learned" or found_config.rope_theta == config.rope_theta


@pytest.mark.slow
@family
def test_transformers_computes_the_same_logits_from_our_folder(config, tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    params, tokens = random_params(config), np.asarray(tokens_of(3, 40, config.vocab))
    huggingface.write(tmp_path / "out", params, config)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        expected = theirs(torch.from_numpy(tokens).long()).logits.numpy()
    found = np.asarray(transformer.unembed(params, hidden(params, config, jnp.asarray(tokens))))
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()


@pytest.mark.slow
@pytest.mark.parametrize("shards", [False, True], ids=["one file", "sharded"])
@pytest.mark.parametrize("name", ["gpt2", "openai-gpt", "llama", "llama3"])
def test_models_of_transformers_come_in_with_their_logits_and_go_out_with_their_bits(name, shards, tmp_path):
    torch = pytest.importorskip("torch")
    tf = pytest.importorskip("transformers")
    llama = {
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "vocab_size": 99,
        "max_position_embeddings": 64,
    }
    stretched = {
        "rope_type": "llama3",
        "rope_theta": 500.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    }
    gpt = {"n_layer": 3, "n_embd": 48, "n_head": 4, "vocab_size": 99, "n_positions": 64}
    configs = {
        "gpt2": lambda: tf.GPT2Config(**gpt),
        "openai-gpt": lambda: tf.OpenAIGPTConfig(**gpt),
        "llama": lambda: tf.LlamaConfig(**llama, tie_word_embeddings=True),
        "llama3": lambda: tf.LlamaConfig(**llama, rope_parameters=stretched, attention_bias=True, mlp_bias=True),
    }
    torch.manual_seed(0)
    theirs = tf.AutoModelForCausalLM.from_config(configs[name]()).eval()
    with torch.no_grad():
        for weight in theirs.parameters():
            weight.add_(torch.randn_like(weight) * 0.1)
    theirs.save_pretrained(tmp_path / "in", max_shard_size="60KB" if shards else "1GB")
    assert (tmp_path / "in/model.safetensors.index.json").exists() == shards
    params, config = huggingface.read(tmp_path / "in")
    tokens = np.asarray(tokens_of(2, 50, 99))
    with torch.no_grad():
        expected = theirs(torch.from_numpy(tokens).long()).logits.numpy()
    found = np.asarray(transformer.unembed(params, hidden(params, config, jnp.asarray(tokens))))
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()
    huggingface.write(tmp_path / "out", params, config)
    again = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(weight, again[key]) for key, weight in theirs.state_dict().items())


def test_half_precision_files_and_old_names_are_read(tmp_path):
    """bfloat16 tensors, early GPT-2 names without "transformer.", its constant buffers and its tied head."""
    from safetensors.numpy import save_file

    params = jax.tree.map(lambda w: w.astype(jnp.bfloat16), random_params(TINY))
    flat = {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]
    }
    tensors = {name.removeprefix("transformer."): x for name, x in places.to_tensors(flat, TINY).items()}
    tensors |= {"h.0.attn.bias": np.ones((1, 1, 48, 48), np.float32), "lm_head.weight": tensors["wte.weight"]}
    tmp_path.joinpath("config.json").write_text(json.dumps(huggingface.config_to_json(TINY)))
    save_file(tensors, tmp_path / "model.safetensors")
    found, _ = huggingface.read(tmp_path)
    assert_equal(found, jax.tree.map(lambda w: np.asarray(w, np.float32), params))


def broken(tmp_path, change):
    folder = tmp_path / "broken"
    huggingface.write(folder, random_params(FAMILY["llama"]), FAMILY["llama"])
    change(folder)
    return folder


def rewrite(**changes):
    def change(folder):
        record = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**record, **changes}))

    return change


def with_head(changed, rows=None):
    """Store a head beside the embeddings that serve as one."""

    def change(folder):
        from safetensors.numpy import load_file, save_file

        tensors = load_file(folder / "model.safetensors")
        head = tensors["model.embed_tokens.weight"][:rows].copy()
        head[3, 4] += changed
        save_file(tensors | {"lm_head.weight": head}, folder / "model.safetensors")

    return change


@pytest.mark.parametrize(
    ("change", "texts"),
    [
        (rewrite(model_type="mamba"), ["'mamba' model"]),
        (rewrite(hidden_act="gelu"), ["hidden_act 'gelu' (only 'silu')"]),
        (rewrite(attention_bias=True), ["attention_bias True with mlp_bias False (only both or neither)"]),
        (rewrite(mlp_bias=True), ["attention_bias False with mlp_bias True"]),
        (rewrite(head_dim=4), ["head_dim 4"]),
        (rewrite(sliding_window=16), ["sliding_window 16"]),
        (rewrite(rope_parameters={"rope_type": "yarn", "rope_theta": 1e4}), ["rope_type 'yarn'"]),
        (rewrite(num_attention_heads=5), ["head_dim 8"]),
        (rewrite(intermediate_size=50), ["gate_proj.weight has shape (48, 32), not (50, 32)", "down_proj"]),
        (rewrite(num_hidden_layers=3), ["model.layers.2.mlp.up_proj.weight is missing"]),
        (rewrite(num_hidden_layers=1), ["model.layers.1.mlp.up_proj.weight is not part of this architecture"]),
        (rewrite(tie_word_embeddings=False), ["lm_head.weight is missing"]),
        (with_head(changed=0.5), ["stores a lm_head.weight unlike its embeddings", "tie_word_embeddings"]),
        (with_head(changed=0.5, rows=63), ["stores a lm_head.weight unlike its embeddings"]),
        (lambda folder: (folder / "config.json").write_text("{}"), ["no model_type"]),
        (lambda folder: (folder / "config.json").write_text('{"model_type": "llama"}'), ["has no"]),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"no tensors"), ["can't be read"]),
        (lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"), ["pickle"]),
        (
            lambda folder: (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../x"}}'),
            ["outside its folder"],
        ),
        (
            lambda folder: (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "x"}}'),
            ["lacks x"],
        ),
    ],
)
def test_what_is_wrong_with_a_folder_is_said(change, texts, tmp_path):
    with pytest.raises(UserError) as found:
        huggingface.read(broken(tmp_path, change))
    for text in texts:
        assert text in str(found.value)


def test_what_no_architecture_computes_can_not_be_written(tmp_path):
    odd = dataclasses.replace(TINY, norm="rms")
    with pytest.raises(UserError, match="no Hugging Face architecture"):
        huggingface.write(tmp_path / "out", random_params(odd), odd)
    params = random_params(TINY)
    huggingface.write(tmp_path / "out", params, TINY)
    with pytest.raises(UserError, match="exists"):
        huggingface.write(tmp_path / "out", params, TINY)
    with pytest.raises(UserError, match="final_norm/bias"):
        huggingface.write(tmp_path / "new", {**params, "final_norm": {"scale": np.ones(32)}}, TINY)
    assert not (tmp_path / "new").exists()


# ---- tokenizers and templates ----


WORDS = "a b " * 25


def folder_of(folder: Path, core: tokenizers.Tokenizer, **settings) -> Path:
    """The tokenizer files of a Hugging Face folder."""
    folder.mkdir(exist_ok=True)
    core.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize("source", [None, CHATML], ids=["base", "chat"])
def test_truncation_and_padding_stored_with_a_tokenizer_are_off_on_every_path(source, tmp_path):
    core = core_of("byte-level", "<|im_start|>", "<|im_end|>")
    expected = core.encode(WORDS, add_special_tokens=False).ids
    core.enable_truncation(16)
    core.enable_padding(length=128)
    config = dataclasses.replace(FAMILY["llama"], vocab=core.get_vocab_size() + 4)
    tok = huggingface.read_tokenizer(folder_of(tmp_path / "theirs", core, chat_template=source))
    tok.save(tmp_path / "ours")
    core.save(str(tmp_path / "ours/tokenizer.json"))
    huggingface.write(tmp_path / "out", random_params(config), config, tok)
    stored = json.loads((tmp_path / "out/tokenizer.json").read_text())
    assert stored["truncation"] is None and stored["padding"] is None
    found = [tok, Tokenizer.load(tmp_path / "ours") if source else tok, loading.load(tmp_path / "out").tokenizer]
    for one in found:
        assert one.encode(WORDS) == one.encode_batch([WORDS, "a"])[0] == expected and len(expected) > 16
        assert sum(example_ids(one, WORDS, WORDS)[1]) == len(expected) + 1


def with_post_processor(core: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    prepend(core, [core.token_to_id("<s>")])
    return core


def padded(core: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    core.enable_padding(length=16)
    return with_post_processor(core)


def truncated(core: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    core.enable_truncation(1)
    return with_post_processor(core)


@pytest.mark.parametrize(
    ("change", "settings", "begins"),
    [
        (with_post_processor, {}, True),
        (padded, {}, True),
        (truncated, {"bos_token": "<s>"}, True),
        (with_post_processor, {"add_bos_token": True, "bos_token": "<s>"}, True),
        (lambda core: core, {"add_bos_token": True, "bos_token": {"content": "<s>"}}, True),
        (lambda core: core, {"bos_token": "<s>"}, False),
        (lambda core: core, {"add_bos_token": False, "bos_token": "<s>"}, False),
        (lambda core: core, {}, False),
    ],
    ids=["post-processor", "and padding", "and truncation", "both", "flag", "an id only", "flag off", "nothing"],
)
def test_what_the_models_own_tokenizer_prepends_is_prepended_once(change, settings, begins, tmp_path):
    """In raw text, streams, our tags and exports; never because there is an id, and never before a chat template."""
    core = change(core_of("byte-level", "<|im_start|>", "<|im_end|>"))
    folder = folder_of(tmp_path / "in", core, eos_token="</s>", **settings)
    core.no_padding(), core.no_truncation()
    tok = huggingface.read_tokenizer(folder)
    first, end = [core.token_to_id("<s>")] if begins else [], core.token_to_id("</s>")
    assert tok.document_ids("a b") == [*first, *tok.encode("a b")] == [*first, *core.encode("a b").ids[-3:]]
    assert tok.document_ids("") == (first or [end])
    stream = streams.tokenize_stream(["a", "", "b"], tok, tmp_path)[:].tolist()
    assert stream == [*first, *tok.encode("a"), end, *first, *tok.encode("b"), end]
    assert prompt_ids(tok, "a")[: len(first) + 1] == [*first, tok.encode(tok.mark("<prompt>"))[0]]
    config = dataclasses.replace(FAMILY["llama"], vocab=tok.vocab_size)
    huggingface.write(tmp_path / "out", random_params(config), config, tok)
    again = huggingface.read_tokenizer(tmp_path / "out")
    assert again.template.begin == tok.template.begin == tuple(first)
    assert tokenizers.Tokenizer.from_file(str(tmp_path / "out/tokenizer.json")).encode("a b").ids == tok.document_ids(
        "a b"
    )
    chat = huggingface.read_tokenizer(
        folder_of(folder, core, chat_template="{{ bos_token }}" + CHATML, bos_token="<s>")
    )
    assert prompt_ids(chat, "a").count(core.token_to_id("<s>")) == 1


def test_a_gguf_file_says_whether_its_tokenizer_prepends():
    core = core_of("byte-level")
    vocab = sorted(core.get_vocab(), key=core.get_vocab().get)
    merges = [" ".join(pair) for pair in json.loads(core.to_str())["model"]["merges"]]
    for pre, flag, begins in (("smollm", None, False), ("smollm", True, True), ("llama-bpe", None, True)):
        fields = {"model": "gpt2", "pre": pre, "tokens": vocab, "merges": merges, "bos_token_id": vocab.index("<s>")}
        fields |= {"token_type": np.asarray([3 if token in ("<s>", "</s>") else 1 for token in vocab])}
        fields |= {} if flag is None else {"add_bos_token": flag}
        values = Fields({f"tokenizer.ggml.{name}": value for name, value in fields.items()}, "here")
        tok = gguf_file._tokenizer(types.SimpleNamespace(fields=values, path="here"), use_tags=False)
        assert tok.document_ids("a") == [vocab.index("<s>")] * begins + tok.encode("a"), (pre, flag)


def test_a_gguf_file_s_added_tokens_are_its_templates_and_no_text_s():
    """<think> is not of the control type there; llama.cpp finds it before BPE all the same."""
    core = core_of("byte-level", "<|im_start|>", "<|im_end|>")
    vocab = sorted(core.get_vocab(), key=core.get_vocab().get)
    types_of = {"<s>": 3, "</s>": 3, "<|im_start|>": 3, "<|im_end|>": 3, "<think>": 4, "</think>": 4}
    fields = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smollm", "tokenizer.ggml.tokens": vocab}
    fields["tokenizer.ggml.merges"] = [" ".join(pair) for pair in json.loads(core.to_str())["model"]["merges"]]
    fields["tokenizer.ggml.token_type"] = np.array([types_of.get(token, 1) for token in vocab], np.int32)
    fields["tokenizer.chat_template"] = CHATML.replace("assistant\n' }}", "assistant\n<think>\n' }}")
    tok = gguf_file._tokenizer(types.SimpleNamespace(fields=Fields(fields, Path("here")), path="here"), use_tags=False)
    ids = prompt_ids(tok, "a <think> b")
    assert ids.count(vocab.index("<think>")) == 1 and ids[-2] == vocab.index("<think>")


def test_a_special_token_with_id_0_is_a_token_like_any_other(tmp_path):
    core = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={"</s>": 0, "a": 1, "b": 2}, merges=[]))
    core.decoder = tokenizers.decoders.Fuse()
    core.add_special_tokens(["</s>"])
    tok = huggingface.read_tokenizer(folder_of(tmp_path / "in", core))
    assert tok.show([0, 1, 0]) == "</s>a</s>" and small_tokenizer().show([0, 1, 0]) == "<bos>"
    ids, _ = example_ids(tok, "a", "b")
    assert parse(tok, ids) == templates.Example("a", "b", True)
    with pytest.raises(ValueError, match="special tokens inside"):
        parse(tok, [*ids, 0])
    config = dataclasses.replace(FAMILY["llama"], vocab=tok.vocab_size)
    for one, pad in ((tok, None), (small_tokenizer(), 0)):
        huggingface.write(tmp_path / str(pad), random_params(config), config, one)
        assert json.loads((tmp_path / str(pad) / "config.json").read_text())["pad_token_id"] == pad


def test_an_export_keeps_the_models_own_template_and_names(tmp_path):
    """With its system role: what we make of it knows only prompts and answers."""
    tok = chat_tokenizer(CHATML)
    config = dataclasses.replace(FAMILY["llama"], vocab=tok.vocab_size)
    huggingface.write(tmp_path / "out", random_params(config), config, tok)
    assert (tmp_path / "out/chat_template.jinja").read_text() == CHATML
    settings = json.loads((tmp_path / "out/tokenizer_config.json").read_text())
    assert (settings["bos_token"], settings["eos_token"]) == ("<s>", "</s>")
    stops = json.loads((tmp_path / "out/generation_config.json").read_text())["eos_token_id"]
    assert stops == [tok.template.end, tok.encode(tok.mark("</s>"))[0]]


def test_a_model_written_with_its_tokenizer_is_loaded_with_it(tmp_path):
    for tok, name in ((small_tokenizer(), "tags"), (chat_tokenizer(), "chat")):
        config = dataclasses.replace(FAMILY["llama"], vocab=tok.vocab_size)
        huggingface.write(tmp_path / name, random_params(config), config, tok)
        loaded = loading.load(tmp_path / name)
        ids, _ = example_ids(loaded.tokenizer, "a few", "words")
        assert ids == example_ids(tok, "a few", "words")[0] and loaded.chats
        for part in ("before", "between", "closing", "end", "separator", "begin", "prompt_strip", "answer_strip"):
            assert getattr(loaded.tokenizer.template, part) == getattr(tok.template, part), part


def test_a_base_model_gets_our_tags_and_rows_for_them(tmp_path):
    core = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={chr(97 + i): i for i in range(20)}, merges=[]))
    config = dataclasses.replace(FAMILY["llama3"], vocab=20)
    params = random_params(config)
    huggingface.write(tmp_path / "base", params, config)
    core.save(str(tmp_path / "base/tokenizer.json"))
    loaded = loading.load(tmp_path / "base")
    assert not loaded.chats and loaded.config.vocab == 128 and loaded.tokenizer.template.end == 23
    for name in ("embed", "unembed"):
        table = loaded.params[name]["tokens_VD"]
        np.testing.assert_array_equal(table[:20], params[name]["tokens_VD"])
        assert len({row.tobytes() for row in np.asarray(table[20:])}) == 108
    found = load_language_model(tmp_path / "base")
    assert found.config == loaded.config and found.extra == {"raw": True}


# ---- names and paths ----


def test_what_is_no_model_is_said(tmp_path):
    for source, text in ((tmp_path, "holds no model"), (Path("smollm2"), "did you mean smollm2-135m")):
        with pytest.raises(UserError, match=text):
            load_language_model(source)
    (tmp_path / "x.gguf").write_bytes(b"GGUFxxxxxxxx")
    with pytest.raises(UserError, match="not a readable GGUF"):
        load_language_model(tmp_path / "x.gguf")
    with pytest.raises(UserError, match="no file .*none.gguf"):
        run_fingerprint(tmp_path / "none.gguf")


@pytest.mark.parametrize(
    ("place", "says"),
    [
        ("Qwen/Qwen3-0.6B", "`hf download Qwen/Qwen3-0.6B --local-dir Qwen3-0.6B` .*supported: gpt2, .*llama"),
        ("./Qwen/Qwen3-0.6B/", "`hf download Qwen/Qwen3-0.6B"),
        ("here/model.safetensors", "give its folder, .*here, which also holds config.json"),
        ("here/Llama-3.2-1B", "run the experiment"),  # a folder of theirs
        ("runs/sft", "run the experiment"),
    ],
)
def test_a_model_that_is_not_there_is_fetched_by_its_hubs_own_tool(place, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    for use in (run_fingerprint, load_language_model):
        with pytest.raises(UserError, match=says) as found:
            use(Path(place))
        assert "hf download" in says or "hf download" not in str(found.value)
    for read in (formats.fingerprint, formats.load):
        with pytest.raises(UserError, match="`hf download Anthropic/hh-rlhf --repo-type dataset"):
            read(Path("Anthropic/hh-rlhf"))


@pytest.fixture(scope="module")
def pip():
    """A pip that is really called only once per wheel."""
    kept = {}

    def run(command, **options):
        folder, requirement = command[-2:]
        if requirement not in kept:
            done = subprocess.run(command, **options)
            kept[requirement] = done, {path.name: path.read_bytes() for path in Path(folder).glob("*.whl")}
        done, wheels = kept[requirement]
        for name, content in wheels.items():
            Path(folder, name).write_bytes(content)
        return done

    return types.SimpleNamespace(run=run)


def test_a_file_from_a_wheel_is_checked_and_fetched_once(pip, tmp_path, monkeypatch):
    monkeypatch.setattr(wheels, "subprocess", pip)
    wheel = GPT2_VOCABULARY[0]
    place = wheels.fetch(wheel, tmp_path)
    with pytest.raises(UserError, match="unexpected hash"):
        wheels.fetch(wheel._replace(sha256="0" * 64), tmp_path)
    failed = subprocess.CompletedProcess([], 1, "", "WARNING: wait\nERROR: no such project\n")
    monkeypatch.setattr(pip, "run", lambda command, **options: failed)
    with pytest.raises(UserError, match=r"other==1.0 can't be downloaded \(ERROR: no such project\)"):
        wheels.fetch(wheel._replace(requirement="other==1.0", member="x"), tmp_path)
    monkeypatch.setattr(wheels, "subprocess", None)
    assert place.is_relative_to(tmp_path) and wheels.fetch(wheel, tmp_path) == place
    assert not [path for path in (tmp_path / "pretrained").iterdir() if path != place]


@pytest.mark.slow
def test_a_wheel_that_does_not_exist_is_said(tmp_path):
    wheel = GPT2_VOCABULARY[0]._replace(requirement="no-such-project-of-jaxgpt==1.0", member="x")
    with pytest.raises(UserError, match="can't be downloaded .*no-such-project-of-jaxgpt"):
        wheels.fetch(wheel, tmp_path)


def test_gpt2s_vocabulary_gives_its_known_ids(pip, tmp_path, monkeypatch):
    """The ids of OpenAI's own examples, and exact round trips."""
    monkeypatch.setattr(wheels, "subprocess", pip)
    tok = gpt2_tokenizer(tmp_path)
    assert tok.encode("Hello, world!") == [15496, 11, 995, 0]
    assert tok.encode("not all heroes wear capes.") == [1662, 477, 10281, 5806, 1451, 274, 13]
    assert (tok.template.separator, tok.template.end, tok.vocab_size) == (50256, 50260, 50261)
    assert all(tok.decode(tok.encode(text)) == text for text in MULTILINGUAL)


# ---- SmolLM2, from its wheel ----


@functools.cache
def smollm2():
    return loading.load("smollm2-135m")


@pytest.mark.slow
def test_smollm2_speaks_as_in_transformers():
    """Greedy continuations of several chats, 60 tokens each, float32; and the tokenizer's ids."""
    torch = pytest.importorskip("torch")
    tf = pytest.importorskip("transformers")
    ours = smollm2()
    file = wheels.fetch(loading.KNOWN["smollm2-135m"])
    theirs = tf.AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).eval()
    chats = [
        "What is the capital of France?",
        "Write a short poem about the sea.",
        "Explain photosynthesis to a child.",
    ]
    for text in chats:
        ids = prompt_ids(ours.tokenizer, text)
        with torch.no_grad():
            expected = theirs.generate(
                torch.tensor([ids]),
                attention_mask=torch.ones(1, len(ids)),
                max_new_tokens=60,
                do_sample=False,
                pad_token_id=0,
            )[0, len(ids) :].tolist()
        stop = ours.tokenizer.template.end
        expected = expected[: expected.index(stop)] if stop in expected else expected
        found = list(
            decoding.stream(
                ours.params,
                ours.config,
                jnp.asarray([ids]),
                jnp.asarray([len(ids)]),
                jax.random.key(0),
                new_tokens=60,
                stop=stop,
                sample=sampling.greedy,
            )
        )
        assert found == expected
    core = tf.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    source = gguf_file.GGUFFile(file).fields.text("tokenizer.chat_template")
    both = tokenizers.pre_tokenizers.Digits(individual_digits=True), tokenizers.pre_tokenizers.ByteLevel(False)
    for text in MULTILINGUAL:
        if "١" in text:  # transformers ignores the file's field that asks for single digits
            core.backend_tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(list(both))
        expected = core(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        assert ours.tokenizer.encode(text) == expected
        assert ours.tokenizer.decode(ours.tokenizer.encode(text)) == text
    message = [{"role": "user", "content": chats[0]}]
    assert (
        prompt_ids(ours.tokenizer, chats[0])
        == core(core.apply_chat_template(message, chat_template=source, tokenize=False, add_generation_prompt=True))[
            "input_ids"
        ]
    )


@pytest.mark.slow
def test_smollm2_goes_out_and_comes_back(tmp_path):
    loaded = smollm2()
    huggingface.write(tmp_path / "out", loaded.params, loaded.config, loaded.tokenizer)
    again = loading.load(tmp_path / "out")
    assert_equal(again.params, loaded.params)
    assert again.config == loaded.config
    assert again.tokenizer.template == loaded.tokenizer.template
    save_model(tmp_path / "ours", again.params, again.config, again.tokenizer)
    ours = load_language_model(tmp_path / "ours")
    assert ours.tokenizer.template == loaded.tokenizer.template
    shutil.rmtree(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tags", "chat"])
def test_transformers_reads_the_tokenizer_and_template_that_we_write(kind, tmp_path):
    tf = pytest.importorskip("transformers")
    tok = small_tokenizer() if kind == "tags" else chat_tokenizer()
    config = dataclasses.replace(FAMILY["llama"], vocab=tok.vocab_size)
    huggingface.write(tmp_path / "out", random_params(config), config, tok)
    theirs = tf.AutoTokenizer.from_pretrained(tmp_path / "out")
    talk = [{"role": "user", "content": "a few words"}]
    assert theirs.apply_chat_template(talk, add_generation_prompt=True, return_dict=False) == prompt_ids(
        tok, "a few words"
    )
    assert theirs("a few")["input_ids"] == tok.document_ids("a few")
    more = [*talk, {"role": "assistant", "content": "of two"}, {"role": "user", "content": "and a few"}]
    if tok.template.turn:
        expected = prompt_ids(tok, "and a few", [("a few words", "of two")])
        assert theirs.apply_chat_template(more, add_generation_prompt=True, return_dict=False) == expected
    text = "plain, with a </answer> and <|im_end|> in it: é 12"
    assert theirs(text, add_special_tokens=False, split_special_tokens=True)["input_ids"] == tok.encode(text)
