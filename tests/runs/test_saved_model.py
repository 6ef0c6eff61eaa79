"""Saved models load back exactly, or are refused with the reason."""

import dataclasses
import errno
import json
import os
import shutil
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers

from jaxgpt.config import ModelConfig
from jaxgpt.data.tokenizer import Tokenizer, train_char
from jaxgpt.errors import UserError
from jaxgpt.files import write_json
from jaxgpt.models import transformer
from jaxgpt.runs import saved_model
from jaxgpt.runs.saved_model import describe_params, load_model, param_differences, save_model
from tests.helpers import edit_record

CONFIG = ModelConfig(layers=2, width=8, heads=2, block=16, vocab=512, dtype="bfloat16")


def make_params(seed: int = 0):
    """Random parameters (from NumPy) of a model and a head, in two dtypes."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: transformer.init(jax.random.key(0), CONFIG))
    params = jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape), x.dtype), shapes)
    params["final_norm"] = jax.tree.map(lambda x: jnp.asarray(np.asarray(x, jnp.bfloat16)), params["final_norm"])
    return {"policy": params, "head": {"w": jnp.asarray(rng.standard_normal(8), jnp.float32), "bias": jnp.float32(0.5)}}


def small(seed: int = 0):
    return {"head": {"w": np.full(8, seed, np.float32), "bias": np.float32(0.5)}}


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    save_model(folder / "m", make_params(), CONFIG, train_char(["a film"]))
    return folder


@pytest.fixture
def copy(saved, tmp_path) -> Path:
    """A saved model that a test may damage."""
    return Path(shutil.copytree(saved / "m", tmp_path / "m"))


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    assert describe_params(a) == describe_params(b)
    chex.assert_trees_all_equal(a, b)


def test_a_model_comes_back_exactly(tmp_path):
    params, tokenizer = make_params(), train_char(["a film", "the film"])
    save_model(tmp_path / "run" / "model", params, CONFIG, tokenizer, extra={"loss": 2.5, "head": None})
    loaded = load_model(tmp_path / "run" / "model")
    assert_same(loaded.params, params)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(loaded.params))
    assert {leaf.sharding.device_set.__len__() for leaf in jax.tree.leaves(loaded.params)} == {1}
    assert loaded.config == CONFIG and loaded.extra == {"loss": 2.5, "head": None}
    assert loaded.tokenizer.fingerprint == tokenizer.fingerprint
    assert sorted(os.listdir(tmp_path / "run")) == ["model"]  # nothing left beside it
    assert_same(load_model(tmp_path / "run").params, params)  # the run folder works too


def test_numpy_arrays_lists_and_no_tokenizer(tmp_path):
    save_model(tmp_path / "m", {"layers": [np.arange(3, dtype=np.int32), np.ones(2, np.float32)]}, CONFIG)
    loaded = load_model(tmp_path / "m")
    assert_same(loaded.params, {"layers": [jnp.arange(3), jnp.ones(2)]})
    assert loaded.tokenizer is None and loaded.extra == {}


def test_a_sharded_model_loads_on_one_device(tmp_path):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    w = jax.device_put(jnp.arange(16.0), jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data")))
    save_model(tmp_path / "m", {"w": w}, CONFIG)
    loaded = load_model(tmp_path / "m").params["w"]
    assert len(loaded.sharding.device_set) == 1
    np.testing.assert_array_equal(loaded, np.arange(16.0))


def test_saving_again_replaces(tmp_path):
    save_model(tmp_path / "m", small(0), CONFIG, train_char(["a"]))
    save_model(tmp_path / "m", small(1), CONFIG)
    loaded = load_model(tmp_path / "m")
    assert_same(loaded.params, small(1))
    assert loaded.tokenizer is None


@pytest.mark.parametrize("moment", ["before the save", "while writing", "between the renames"])
def test_an_interrupted_save_keeps_the_old_model(tmp_path, monkeypatch, moment):
    save_model(tmp_path / "m", small(0), CONFIG)

    class Killed(BaseException):
        pass

    def killed(*arguments, **options):
        raise Killed

    real = os.replace
    if moment == "before the save":
        monkeypatch.setattr(saved_model.ocp, "save", killed)
    elif moment == "while writing":
        monkeypatch.setattr(saved_model, "write_record", killed)
    else:
        monkeypatch.setattr(saved_model.os, "replace", lambda a, b: killed() if str(a).endswith(".new") else real(a, b))
    with pytest.raises(Killed):
        save_model(tmp_path / "m", small(1), CONFIG)
    monkeypatch.undo()
    assert_same(load_model(tmp_path / "m").params, small(0))
    save_model(tmp_path / "m", small(2), CONFIG)
    assert_same(load_model(tmp_path / "m").params, small(2))
    assert os.listdir(tmp_path) == ["m"]


def test_a_reader_does_not_come_in_between_the_renames_of_a_save(tmp_path, monkeypatch):
    save_model(tmp_path / "m", small(0), CONFIG)
    real, read = os.replace, []

    def replace(source: Path, target: Path) -> None:
        if Path(source).name == ".m.new":
            read.append(load_model(tmp_path / "m").params)
            assert sorted(os.listdir(tmp_path)) == [".m.new", ".m.old"]
        real(source, target)

    monkeypatch.setattr(saved_model.os, "replace", replace)
    save_model(tmp_path / "m", small(1), CONFIG)
    assert_same(read[0], small(0))
    assert_same(load_model(tmp_path / "m").params, small(1))


FULL = OSError(errno.ENOSPC, "No space left on device")
OF_ORBAX = ValueError("RESOURCE_EXHAUSTED: Error writing local file: Failed [os_error_code='28']\nmore")


@pytest.mark.parametrize(("where", "error"), [("save", FULL), ("save", OF_ORBAX), ("write_record", FULL)])
def test_a_full_disk_is_one_line_and_the_old_model_stays(tmp_path, monkeypatch, error, where):
    save_model(tmp_path / "m", small(0), CONFIG)

    def full(*words: object) -> None:
        raise error

    monkeypatch.setattr(saved_model.ocp if where == "save" else saved_model, where, full)
    with pytest.raises(UserError, match=r"^can't write the model .*/m \(No space left on device\); free some space"):
        save_model(tmp_path / "m", small(1), CONFIG)
    assert_same(load_model(tmp_path / "m").params, small(0))
    assert os.listdir(tmp_path) == ["m"]


def test_a_model_that_is_a_link_is_replaced_again_and_again(tmp_path):
    save_model(tmp_path / "elsewhere", small(0), CONFIG)
    (tmp_path / "m").symlink_to("elsewhere")
    for seed in (1, 2):
        save_model(tmp_path / "m", small(seed), CONFIG)
        assert_same(load_model(tmp_path / "m").params, small(seed))
    assert_same(load_model(tmp_path / "elsewhere").params, small(0))
    assert sorted(os.listdir(tmp_path)) == ["elsewhere", "m"]


def test_other_folders_are_not_replaced(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "a.tex").write_text("years")
    with pytest.raises(UserError, match="exists and is not a saved model"):
        save_model(tmp_path / "thesis", small(), CONFIG)
    assert (tmp_path / "thesis" / "a.tex").read_text() == "years"


def test_a_missing_model_says_what_to_run(tmp_path):
    with pytest.raises(UserError, match="holds no model; run the experiment that trains it first"):
        load_model(tmp_path / "none")
    for foreign in ("[]", '{"stage": 3}'):
        (tmp_path / "settings.json").write_text(foreign)
        with pytest.raises(UserError, match="holds no model"):
            load_model(tmp_path)
    (tmp_path / "settings.json").write_text(json.dumps({"stage": "sft"}))
    for folder in (tmp_path, tmp_path / "model"):
        with pytest.raises(UserError) as failed:
            load_model(folder)
        assert failed.value.experiment == ("sft", "--run", str(tmp_path))


def test_one_flipped_bit_is_found(copy):
    for path in sorted(path for path in copy.rglob("*") if path.is_file() and path.stat().st_size):
        if path.name == "model.json":
            continue  # tests/torture flips each of its bits
        content = path.read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(UserError) as error:
            load_model(copy)
        assert str(path) in str(error.value) and "checksum" in str(error.value)
        path.unlink()
        with pytest.raises(UserError, match="is missing"):
            load_model(copy)
        path.write_bytes(content)
    load_model(copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.update(format=99), "has format 99, but this version reads 3"),
        (lambda r: r.pop("files"), "was written by another version of jaxgpt"),
        (lambda r: r["config"].update(widht=8), "unknown setting widht; did you mean width"),
        (lambda r: r["config"].update(width=7), "model.json: width 7 is not a multiple"),
        (lambda r: r["params"].update({"head/w": "float32[9]"}), r"head/w is float32\[8\], not float32\[9\]"),
        (lambda r: r["params"].pop("head/w"), "head/w is unknown"),
    ],
)
def test_a_model_json_that_does_not_fit_is_refused(copy, change, message):
    edit_record(copy / "model.json", change)
    with pytest.raises(UserError, match=message):
        load_model(copy)


def test_a_new_model_is_read_back_before_the_old_one_goes(tmp_path, monkeypatch):
    save_model(tmp_path / "m", small(0), CONFIG)
    sync = saved_model.sync_folder

    def spoiled_on_its_way_to_the_disk(folder: Path) -> None:
        sync(folder)
        path = max(
            (path for path in (folder / "params").rglob("*") if path.is_file()), key=lambda path: path.stat().st_size
        )
        path.write_bytes(path.read_bytes()[:-1])

    monkeypatch.setattr(saved_model, "sync_folder", spoiled_on_its_way_to_the_disk)
    with pytest.raises(UserError, match="is damaged"):
        save_model(tmp_path / "m", small(1), CONFIG)
    assert_same(load_model(tmp_path / "m").params, small(0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab": 4096}, r"tokens_VD is float32\[512,8\], but the configuration in model.json needs \[4096,8\]"),
        ({"layers": 1000}, "holds 2 layers, but its model.json says 1000"),
        ({"layers": 1}, "holds 2 layers, but its model.json says 1"),
        ({"mlp": "swiglu"}, "has no block_0/gate/"),
    ],
)
def test_shapes_are_compared_with_the_configuration_before_a_byte_is_loaded(copy, monkeypatch, change, message):
    edit_record(copy / "model.json", lambda record: record["config"].update(change))
    monkeypatch.setattr(saved_model, "_load_params", lambda *_: pytest.fail("loaded"))
    with pytest.raises(UserError, match=message):
        load_model(copy)


def test_a_model_of_version_0_1_0_is_read(copy):
    record = json.loads((copy / "model.json").read_text())
    del record["sha256"]
    write_json(copy / "model.json", {**record, "format": 2})
    assert_same(load_model(copy).params, make_params())
    write_json(copy / "model.json", record)  # of this version, which always writes a checksum
    with pytest.raises(UserError, match="it holds no checksum"):
        load_model(copy)


@pytest.mark.parametrize(("bad", "dtype"), [(np.nan, np.float32), (np.inf, jnp.bfloat16), (-np.inf, np.float16)])
def test_a_parameter_that_is_not_finite_is_named_and_neither_saved_nor_loaded(tmp_path, monkeypatch, bad, dtype):
    params = {"head": {"w": np.array([1, bad, 1], dtype), "bias": np.float32(0.5)}, "steps": np.int32(3)}
    with pytest.raises(UserError, match="m is not written, because NaN or infinite numbers are in head/w; lower"):
        save_model(tmp_path / "m", params, CONFIG)
    assert not list(tmp_path.iterdir())
    with monkeypatch.context() as unchecked:
        unchecked.setattr(saved_model, "check_params_finite", lambda *words: None)
        save_model(tmp_path / "m", params, CONFIG)
    with pytest.raises(
        UserError, match="m can't be used: NaN or infinite numbers are in head/w; train that model again"
    ):
        load_model(tmp_path / "m")


def test_many_parameters_that_are_not_finite_are_counted():
    with pytest.raises(UserError, match="are in 0, 1, 2 and 6 more; advice"):
        saved_model.check_params_finite([np.float32(np.nan)] * 9, "words", "advice")


def test_a_tokenizer_with_more_ids_than_the_model_is_refused(tmp_path):
    """One id too many is enough, whether it is counted or behind a gap."""
    tokenizer = train_char(["a film"])
    for vocab in (tokenizer.vocab_size, tokenizer.vocab_size - 1):
        save_model(tmp_path / "m", small(), dataclasses.replace(CONFIG, vocab=vocab), tokenizer)
        if vocab == tokenizer.vocab_size:
            load_model(tmp_path / "m")
    with pytest.raises(UserError, match=f"ids up to {vocab}, but its model has only {vocab} tokens"):
        load_model(tmp_path / "m")
    record = json.loads(tokenizer.to_json())
    last = max(record["model"]["vocab"], key=record["model"]["vocab"].__getitem__)
    record["model"]["vocab"][last] = 900
    assert Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(record))).vocab_size == 901


def test_unreadable_parameters(copy):
    shutil.rmtree(copy / "params")
    edit_record(copy / "model.json", lambda record: record.update(files={}))
    with pytest.raises(UserError, match="params can't be read"):
        load_model(copy)


def test_expected_shapes_name_each_parameter_that_differs(copy):
    expected = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), make_params())
    assert_same(load_model(copy, expected).params, make_params())
    expected["head"] = {"w": jax.ShapeDtypeStruct((9,), jnp.float32), "scale": jax.ShapeDtypeStruct((), jnp.float32)}
    with pytest.raises(UserError) as error:
        load_model(copy, expected)
    for text in ("head/scale is missing", "head/bias is unknown", "head/w is float32[8], not float32[9]"):
        assert text in str(error.value)
    assert "policy" not in str(error.value)


def test_describe_and_differences():
    a = describe_params({"x": jnp.zeros((2, 3), jnp.bfloat16), "y": {"z": np.zeros((), np.int32)}})
    assert a == {"x": "bfloat16[2,3]", "y/z": "int32[]"}
    assert param_differences(a, a) == []
    assert param_differences(a, {"x": "float32[2,3]", "w": "int32[]"}) == [
        "y/z is missing",
        "w is unknown",
        "x is float32[2,3], not bfloat16[2,3]",
    ]
