"""Whatever a stranger's model files hold, loading them gives the model that they describe, or one line. Sizes that a
file claims are compared with the file, templates are rendered under limits, and nothing is read outside the folder."""

import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from safetensors.numpy import load_file, save_file

from jaxgpt.config import ModelConfig
from jaxgpt.data import jinja_process, templates
from jaxgpt.errors import UserError
from jaxgpt.pretrained import gguf_file, huggingface, loading
from jaxgpt.pretrained.checked_tokenizer import reading_tokenizer
from tests.data.test_templates import CHATML, chat_tokenizer, core_of
from tests.helpers import FAMILY, TINY
from tests.pretrained.gguf_files import write_gguf
from tests.pretrained.test_loading import assert_equal, folder_of, random_params

LLAMA = FAMILY["llama"]
WRONG = ("a", [], {}, [1], -1, 0, 1.5, True, 10**400, 2**31)


def refusal(call, *parts) -> str:
    """The message of a UserError: one line that has these parts."""
    with pytest.raises(UserError) as found:
        call()
    text = str(found.value)
    assert text.isprintable() and all(str(part) in text for part in parts), text
    return text


# ---- Hugging Face folders ----


@pytest.mark.parametrize("config", [TINY, LLAMA, FAMILY["llama3"]], ids=["gpt2", "llama", "llama3"])
def test_a_value_of_the_wrong_type_or_range_in_config_json_is_one_line_with_file_and_name(config):
    record = huggingface.config_to_json(config)
    numbers = {name for name, value in record.items() if type(value) in (int, float) and name != "rope_theta"}
    for name in numbers:
        for wrong in WRONG:
            if name in ("rms_norm_eps", "layer_norm_epsilon") and type(wrong) in (int, float) and 0 < wrong < 1e30:
                continue
            refusal(lambda: huggingface.config_from({**record, name: wrong}, Path("here")), "config.json", name)  # noqa: B023
    for name in ("tie_word_embeddings", "attention_bias", "mlp_bias", "rope_scaling", "rope_parameters", "model_type"):
        if name in record:
            for wrong in ("false", 1, [1]):
                refusal(lambda: huggingface.config_from({**record, name: wrong}, Path("here")), "here")  # noqa: B023
    rope = record.get("rope_parameters") or {}
    for name in rope.keys() - {"rope_type"}:
        for wrong in ("a", [], True, -1, 0, 10**400):
            broken = {**record, "rope_parameters": {**rope, name: wrong}}
            refusal(lambda: huggingface.config_from(broken, Path("here")), "config.json", name)  # noqa: B023


def test_a_number_of_hundreds_of_digits_is_outside_every_range():
    refusal(lambda: ModelConfig(layers=10**400, width=10**400), "layers")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"model_type": "gpt2", "n_layer": 1, "n_layer": 2}', "'n_layer' appears twice"),
        ('{"model_type": "gpt2", "n_layer": 1e999}', "1e999"),
        ('{"model_type": NaN}', "NaN"),
        ('{"n_layer": ' + "9" * 5000 + "}", "4300 digits"),
        ("[" * 100_000, "nested too deeply"),
        ('{"a": "\0"}', "not valid JSON"),
        ("[]", "not a JSON object"),
    ],
)
def test_json_that_is_not_plain_is_one_line(text, says, tmp_path):
    (tmp_path / "config.json").write_text(text)
    refusal(lambda: huggingface.read(tmp_path), tmp_path / "config.json", says)


def written(folder: Path, config=LLAMA) -> Path:
    huggingface.write(folder, random_params(config), config)
    return folder


def test_a_file_outside_the_folder_is_never_read(tmp_path):
    """But Hugging Face's cache works, whose files are links to blobs, and so does a link to the folder."""
    revision = tmp_path / "hub/models--a--b/snapshots/main"
    revision.parent.mkdir(parents=True)
    blobs = revision.parent.parent / "blobs"
    blobs.mkdir()
    for path in list(written(revision).iterdir()):
        path.rename(blobs / f"hash of {path.name}")
        path.symlink_to(Path("../../blobs") / f"hash of {path.name}")
    (tmp_path / "link").symlink_to(revision)
    for place in (revision, tmp_path / "link"):
        assert_equal(huggingface.read(place)[0], random_params(LLAMA))
    for name in ("config.json", "model.safetensors"):
        place = written(tmp_path / f"bad {name}")
        (place / name).rename(tmp_path / name)
        (place / name).symlink_to(f"../{name}")
        refusal(lambda: huggingface.read(place), place / name, "is a link to", "outside its folder")  # noqa: B023
    place = folder_of(tmp_path / "tok", core_of("byte-level"))
    (tmp_path / "secret").write_text(CHATML)
    (place / "chat_template.jinja").symlink_to(tmp_path / "secret")
    refusal(lambda: huggingface.read_tokenizer(place), "chat_template.jinja is a link")


@pytest.mark.parametrize(
    "name", ["../x", "/etc/passwd", "..", ".", "", "a/b", "a\0b", "a\nb", "config.json", 3, None, []]
)
def test_an_index_can_only_name_weights_beside_it(name, tmp_path):
    (written(tmp_path / "m") / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    refusal(lambda: huggingface.read(tmp_path / "m"), tmp_path / "m")


@pytest.mark.parametrize("record", [[], {"weight_map": []}, {"weight_map": "a"}, {}, None])
def test_an_index_without_a_map_is_one_line(record, tmp_path):
    (written(tmp_path / "m") / "model.safetensors.index.json").write_text(json.dumps(record))
    refusal(lambda: huggingface.read(tmp_path / "m"), tmp_path / "m")


def test_a_tensor_in_two_files_or_of_whole_numbers_is_refused(tmp_path):
    tensors = load_file(written(tmp_path / "m") / "model.safetensors")
    save_file({"model.norm.weight": tensors["model.norm.weight"]}, tmp_path / "m/more.safetensors")
    listed = {"a": "model.safetensors", "b": "more.safetensors"}
    (tmp_path / "m/model.safetensors.index.json").write_text(json.dumps({"weight_map": listed}))
    refusal(lambda: huggingface.read(tmp_path / "m"), "more.safetensors stores model.norm.weight a second time")
    (tmp_path / "m/model.safetensors.index.json").unlink()
    tensors["model.norm.weight"] = tensors["model.norm.weight"].view(np.int32)
    save_file(tensors, tmp_path / "m/model.safetensors")
    refusal(lambda: huggingface.read(tmp_path / "m"), "model.norm.weight is of type I32")


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_refused_by_name(number, tmp_path):
    params = random_params(LLAMA)
    bad = {**params, "final_norm": {"scale": params["final_norm"]["scale"] * np.float32(number)}}
    huggingface.write(tmp_path / "m", bad, LLAMA)
    for read, place in (
        (huggingface.read, tmp_path / "m"),
        (gguf_file.read, write_gguf(tmp_path / "m.gguf", bad, LLAMA)),
    ):
        refusal(lambda: read(place), place, "model.norm.weight holds NaN or infinite numbers")  # noqa: B023


def test_a_long_list_of_what_is_wrong_is_cut(tmp_path):
    place = written(tmp_path / "m")
    record = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps({**record, "num_hidden_layers": 1000}))
    with pytest.raises(UserError, match="model.layers.2.input_layernorm.weight is missing") as found:
        huggingface.read(place)
    assert str(found.value).count("\n") == 21


# ---- GGUF ----


def test_a_gguf_file_has_the_bits_that_were_written(tmp_path):
    params, config, _ = gguf_file.read(write_gguf(tmp_path / "m.gguf", random_params(LLAMA), LLAMA))
    assert_equal(params, random_params(LLAMA))
    assert (config.layers, config.groups, config.rope_theta) == (LLAMA.layers, LLAMA.groups, LLAMA.rope_theta)


def text_of(data: bytes) -> bytes:
    return struct.pack("<Q", len(data)) + data


def gguf_of(*parts: bytes, version: int = 3, tensors: int = 0, fields: int = 0) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, fields) + b"".join(parts)


def info_of(name: bytes, *shape: int, kind: int = 0, offset: int = 0, dimensions: int | None = None) -> bytes:
    count = len(shape) if dimensions is None else dimensions
    return text_of(name) + struct.pack(f"<I{len(shape)}QIQ", count, *shape, kind, offset)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        pytest.param(b"", "empty file", id="empty"),
        pytest.param(b"GGUX" + bytes(60), "begin with GGUF", id="magic"),
        pytest.param(gguf_of(version=4), "version is 4", id="version"),
        pytest.param(b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "version is", id="big-endian"),
        pytest.param(gguf_of(tensors=2**40), "claims 1099511627776 tensors", id="tensors"),
        pytest.param(gguf_of(fields=2**63), "claims", id="fields"),
        pytest.param(gguf_of(bytes(1000), fields=99_999), "twice", id="many fields"),
        pytest.param(gguf_of(struct.pack("<Q", 2**60), fields=1), "ends early", id="text"),
        pytest.param(gguf_of(struct.pack("<Q", 2**64 - 1), fields=1), "ends early", id="text wraps"),
        pytest.param(gguf_of(text_of(b"a"), struct.pack("<IIQ", 9, 0, 2**40), fields=1), "ends early", id="list"),
        pytest.param(gguf_of(text_of(b"a"), struct.pack("<IIQ", 9, 8, 2**40), fields=1), "a list of", id="texts"),
        pytest.param(gguf_of(text_of(b"a"), struct.pack("<IIQ", 9, 9, 1), fields=1), "a list of", id="list of lists"),
        pytest.param(gguf_of(text_of(b"a"), struct.pack("<IQ", 13, 1), fields=1), "unknown type 13", id="type"),
        pytest.param(gguf_of((text_of(b"a") + struct.pack("<IB", 0, 1)) * 2, fields=2), "twice", id="twice"),
        pytest.param(gguf_of(text_of(b"\xff"), struct.pack("<IB", 0, 1), fields=1), "utf-8", id="not UTF-8"),
        pytest.param(
            gguf_of(text_of(b"general.alignment"), struct.pack("<II", 4, 0), fields=1),
            "general.alignment is 0",
            id="alignment",
        ),
        pytest.param(gguf_of(info_of(b"a", 1, dimensions=2**31), bytes(99), tensors=1), "dimensions", id="dimensions"),
        pytest.param(gguf_of(info_of(b"a"), bytes(99), tensors=1), "shape ()", id="no dimension"),
        pytest.param(gguf_of(info_of(b"a", 0, 8), bytes(99), tensors=1), "shape (0, 8)", id="shape of 0"),
        pytest.param(gguf_of(info_of(b"a", 2**32, 2**32), bytes(99), tensors=1), "ends early", id="shape wraps"),
        pytest.param(gguf_of(info_of(b"a", 33, kind=2), bytes(99), tensors=1), "shape (33,)", id="half a block"),
        pytest.param(gguf_of(info_of(b"a", 1, kind=99), bytes(99), tensors=1), "99", id="kind"),
        pytest.param(gguf_of(info_of(b"a", 1, offset=2**63), bytes(99), tensors=1), "not at 0", id="offset"),
        pytest.param(
            gguf_of(info_of(b"a", 8), info_of(b"b", 8), bytes(256), tensors=2), "is at 0, not at 32", id="overlap"
        ),
        pytest.param(gguf_of(info_of(b"a", 8) * 2, bytes(256), tensors=2), "twice", id="same name"),
        pytest.param(gguf_of(bytes(5000)), "follow the last", id="more"),
    ],
)
def test_a_gguf_header_that_claims_what_its_file_does_not_hold_is_one_line(data, says, tmp_path):
    (tmp_path / "m.gguf").write_bytes(data)
    refusal(lambda: gguf_file.read(tmp_path / "m.gguf"), tmp_path / "m.gguf", "not a readable GGUF file", says)


def test_a_gguf_field_of_the_wrong_type_or_range_is_one_line_with_file_and_name(tmp_path):
    for name in ("block_count", "embedding_length", "attention.head_count", "context_length", "feed_forward_length"):
        for wrong in ("a", 0.5, [1, 2], True, 0, None):
            path = write_gguf(tmp_path / "m.gguf", random_params(LLAMA), LLAMA, {f"llama.{name}": wrong})
            refusal(lambda: gguf_file.read(path), path, f"llama.{name}")  # noqa: B023
    for name, values in {
        "tokens": ("a", [1], ["a", "a"], None),
        "merges": ("a", [1], ["a b c"], ["abc"]),
        "token_type": ("a", [1], ["a"]),
        "eos_token_id": ("a", 10**6, [1]),
        "add_bos_token": (1, "a"),
        "model": (1, "bert", None),
    }.items():
        for wrong in values:
            changes = {f"tokenizer.ggml.{name}": wrong}
            path = write_gguf(tmp_path / "m.gguf", random_params(LLAMA), LLAMA, changes)
            refusal(lambda: gguf_file.read(path), path)  # noqa: B023
    path = write_gguf(tmp_path / "m.gguf", random_params(LLAMA), LLAMA, {"tokenizer.chat_template": 1})
    refusal(lambda: gguf_file.read(path), path, "tokenizer.chat_template is 1, not a string")


# ---- tokenizers ----


def replace(old: object, new: str) -> dict:
    return {"type": "Replace", "pattern": old, "content": new}


GROWING = {"type": "Sequence", "normalizers": [replace({"String": "a"}, "aa")] * 40}
BYTES = {"type": "Sequence", "pretokenizers": [{"type": "ByteLevel", "add_prefix_space": False}] * 40}
ADDED = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("normalizer", GROWING),
        ("normalizer", replace({"Regex": "."}, "a" * 1000)),
        ("normalizer", {"type": "Precompiled", "precompiled_charsmap": "AAAAAA=="}),
        ("pre_tokenizer", BYTES),
        ("pre_tokenizer", {"type": "FixedLength", "length": 0}),
        ("pre_tokenizer", {"type": "Split", "pattern": {"Regex": "(((("}, "behavior": "Isolated", "invert": False}),
        ("decoder", {"type": "Sequence", "decoders": GROWING["normalizers"]}),
        ("model", {"vocab": {"a": 10**9}}),
        ("model", {"vocab": {"a": -1}}),
        ("model", {"vocab": {"a": "1"}}),
        ("model", {"vocab": {"a": 0, "b": 0}, "merges": []}),
        ("model", {"vocab": []}),
        ("model", {"merges": [["nowhere", "b"]]}),
        ("model", {"continuing_subword_prefix": "1"}),  # in the package, a panic and sometimes an abort
        ("model", {"continuing_subword_prefix": "é" * 5}),
        ("model", {"continuing_subword_prefix": "é" * 99}),
        ("model", {"dropout": 0.5}),
        ("model", {"type": "Unigram", "vocab": [["a", -1.0]], "unk_id": 10}),
        ("model", {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "?"}),
        ("model", 3),
        ("added_tokens", [{"id": 2**32 - 1, "content": "x", **ADDED}]),
        ("added_tokens", 3),
    ],
)
def test_a_tokenizer_that_is_damaged_or_a_bomb_is_one_line(part, change, tmp_path, capfd):
    """Panics of the tokenizers package, too, which are no Exception."""
    record = json.loads(core_of("byte-level").to_str())
    inner = {**record[part], **change} if part == "model" and isinstance(change, dict) else change
    (tmp_path / "tokenizer.json").write_text(json.dumps({**record, part: inner}))
    refusal(lambda: huggingface.read_tokenizer(tmp_path), tmp_path)
    assert capfd.readouterr().err == ""


def test_what_is_written_to_stderr_while_a_tokenizer_is_read_is_not_lost(capfd):
    with reading_tokenizer("it is unusable"):
        os.write(2, b"first\n")
    with pytest.raises(UserError, match="it is unusable"), reading_tokenizer("it is unusable"):
        os.write(2, b"second\n")
        raise ValueError
    assert capfd.readouterr().err == "first\nsecond\n"


def test_padding_to_any_length_is_off_before_the_first_text(tmp_path):
    record = json.loads(core_of("byte-level").to_str())
    record["padding"] = {"strategy": {"Fixed": 10**12}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0}
    record["padding"] |= {"pad_type_id": 0, "pad_token": "x"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(record))
    assert len(huggingface.read_tokenizer(tmp_path).encode("a")) == 1


def test_a_text_that_a_tokenizer_panics_at_is_one_line(capfd):
    core = core_of("byte-level")
    core.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex("(?:a|aa)+$b"), "isolated")
    tok = huggingface.make_tokenizer(core, None, {}, "here")
    refusal(lambda: tok.encode("a" * 1000 + "!"), "the model's tokenizer can't encode a text", "retry-limit")


@pytest.mark.parametrize("wrong", [3, [], {"content": 3}, "\ud800", True])
def test_a_setting_of_a_tokenizer_of_the_wrong_type_is_one_line(wrong, tmp_path):
    for name in ("eos_token", "chat_template", "add_bos_token"):
        if (name, wrong) not in (("chat_template", []), ("add_bos_token", True), ("eos_token", [])):
            place = folder_of(tmp_path, core_of("byte-level"), **{name: wrong})
            refusal(lambda: huggingface.read_tokenizer(place), name)  # noqa: B023


def test_every_token_that_a_tokenizer_came_with_needs_a_row(tmp_path):
    """Our own tags get new rows; a stranger's token would get a row that was never trained."""
    core = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={chr(97 + i): i for i in range(21)}, merges=[]))
    huggingface.write(tmp_path / "m", random_params(MODEL := FAMILY["llama3"]), MODEL)
    core.save(str(tmp_path / "m/tokenizer.json"))
    assert loading.load(tmp_path / "m").tokenizer.vocab_size == 25
    core.add_special_tokens([f"<{i}>" for i in range(50)])
    core.save(str(tmp_path / "m/tokenizer.json"))
    refusal(lambda: loading.load(tmp_path / "m"), "the id ", f"only {MODEL.vocab} rows")


# ---- chat templates ----


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("{{ 'a' * 10**10 }}", "512 MB"),
        ("{{ '%099999999999d' % 1 }}", "512 MB"),
        ("{{ range(99999) | join('a' * 10**6) }}", "512 MB"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "RecursionError"),
        ("{% include '/etc/passwd' %}", "no loader"),
        ("{{ '\\ud800' }}", "surrogates not allowed"),
        ("{{ [1, 2] | random }}", "No filter named 'random'"),
        ("{{ raise_exception('a\n\x1b[31m' * 1000) }}", "TemplateError: a\\n\\x1b"),
        ("{{ 'a' * 200000 }}", "100,000 characters"),
    ],
)
def test_a_template_that_breaks_a_limit_or_the_sandbox_is_one_line(source, says):
    assert len(refusal(lambda: chat_tokenizer(source + CHATML), "template of here can't be used: ", says)) < 400


def test_a_template_that_loops_for_ever_is_stopped(monkeypatch):
    monkeypatch.setattr(templates, "SECONDS", 0.2)
    loops = "{% for a in range(99999) %}" * 3 + "{% endfor %}" * 3
    refusal(lambda: chat_tokenizer(loops + CHATML), "it takes more than 0.2 s to render a few short conversations")


def test_the_process_that_renders_can_open_nothing():
    """No file, connection or program: what a hole in Jinja's sandbox could be used for."""
    attempts = "lambda: open(sys.executable)", "socket.socket", "lambda: subprocess.run([sys.executable])"
    program = (
        "import socket, subprocess, sys; from jaxgpt.data import jinja_process as p; p._limit(9, 2**29)\n"
        f"for attempt in ({', '.join(attempts)}):\n"
        "    try: attempt()\n"
        "    except OSError as error: print(error.errno)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=Path(__file__).parents[2]
    )
    assert done.stdout.split() == ["24"] * 3, done.stderr
    assert "jaxgpt" not in Path(jinja_process.__file__).read_text().split('"""', 2)[2]
