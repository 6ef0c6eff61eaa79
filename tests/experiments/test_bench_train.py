"""The training and PPO benchmarks: what they count, that both sides compute the same, and whole runs without torch."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from experiments.bench import decode as bench_decode
from experiments.bench import harness
from experiments.bench import ppo as bench_ppo
from experiments.bench import train as bench_train
from experiments.bench.train import OURS, Case, Settings
from jaxgpt.config import ModelConfig
from jaxgpt.errors import UserError
from jaxgpt.models import transformer
from jaxgpt.structs import Batch
from tests.helpers import score

SMALL = ModelConfig(layers=2, width=32, heads=4, block=12, vocab=96)


def weights_of(config: ModelConfig, path) -> str:
    np.savez(path, **harness.initial_weights(config, np.random.default_rng(0)))
    return str(path)


def load(worker, tmp_path, config=SMALL, parts=1):
    worker.load(dataclasses.asdict(config), weights_of(config, tmp_path / "weights.npz"), 3, 0, parts)
    return worker


# ---- what is counted ----


@pytest.mark.parametrize("config", [SMALL, *(bench_train.MODELS[name] for name in ("toy", "small", "gpt2"))])
def test_the_flops_are_six_a_parameter_and_the_attention(config):
    shapes = jax.eval_shape(lambda key: transformer.init(key, config), jax.random.key(0))
    parameters = transformer.count_parameters(shapes) - shapes["embed"]["positions_TD"].size
    expected = 6 * parameters + 12 * config.layers * config.width * config.block
    assert config.flops_per_token == expected


def test_the_weights_are_gpt2s_and_all_of_them():
    ours = jax.device_get(jax.jit(transformer.init, static_argnums=1)(jax.random.key(0), SMALL))
    theirs = harness.unflatten_names(harness.initial_weights(SMALL, np.random.default_rng(0)))
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert a.shape == b.shape and b.dtype == np.float32
        assert b.std() == pytest.approx(a.std(), rel=0.2) and b.mean() == pytest.approx(a.mean(), abs=0.02)


def test_a_case_may_change_layers_and_width():
    config = Case("gpt2", "bfloat16", 2, 128, 3, 256).config(vocab=0)
    assert (config.layers, config.width, config.heads, config.block) == (3, 256, 4, 128)
    assert Case("gpt2", "float32", 2, 128, 0, 0).config(vocab=65).heads == 12
    grid = bench_train.cases(Settings(batches=(1, 2), layers=(2, 4, 8)))
    assert len(grid) == 12 and len(set(grid)) == 12


# ---- both sides ----


def test_our_worker_trains_as_the_formula(tmp_path):
    """Its first loss is that of the weights, and the loss falls when a batch is repeated."""
    config = dataclasses.replace(SMALL, layers=1)
    worker = load(bench_train.JaxTrainer(), tmp_path, config)
    assert worker.batches.shape == (4, 3, SMALL.block)
    params = harness.unflatten_names(dict(np.load(tmp_path / "weights.npz")))
    tokens = worker.batches[0]
    logp_BT, _ = score(params, config, Batch(tokens, np.ones(tokens.shape, bool)))
    first = worker.timed(1)
    assert first["loss"] == pytest.approx(-np.asarray(logp_BT)[:, 1:].mean(), rel=1e-5) and first["seconds"] > 0
    worker.timed(3)
    assert worker.timed(1)["loss"] < first["loss"]  # the first batch again
    assert worker.taken == 5


@pytest.mark.parametrize("kind", ["module", "hf"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_pytorch_trains_to_our_loss(kind, dtype, tmp_path):
    pytest.importorskip("torch")
    if kind == "hf":
        pytest.importorskip("transformers")
    """Also where it runs a batch in three parts, one after another, and ours doesn't."""
    config = dataclasses.replace(SMALL, dtype=dtype)
    ours = load(bench_train.JaxTrainer(), tmp_path, config)
    theirs = load(bench_train.TorchTrainer(kind), tmp_path, config, parts=3 if kind == "module" else 1)
    for _ in range(3):
        expected = ours.timed(3)["loss"]
        assert theirs.timed(3)["loss"] == pytest.approx(expected, rel=1e-5 if dtype == "float32" else 5e-3)


# ---- measuring ----


def figures(speed=100.0, loss=5.0):
    return {
        "tokens_per_second": speed,
        "tokens_per_second_range": [0.9 * speed, 1.1 * speed],
        "step_seconds": 1 / speed,
        "fraction_of_roof": speed / 1000,
        "compile_seconds": 2.0,
        "loss": loss,
        "seconds": [1 / speed],
        "peak_bytes": {"process": 10**9, "device": None},
    }


def result(**changes):
    case = dataclasses.asdict(Case("small", "float32", 12, 256, 0, 0))
    trainers = {OURS: figures(), "module": figures(50.0)}
    speedup = {"over": "module", "median": 2.0, "range": [1.5, 2.5]}
    return (
        case
        | {
            "flops_per_token": 1e6,
            "microbatches": 1,
            "others_share": 0.0,
            "failed": {},
            "trainers": trainers,
            "speedup": speedup,
        }
        | changes
    )


def test_a_loss_that_differs_is_called_not_comparable():
    assert bench_train.complaints(result()) == []
    other = {OURS: figures(), "hf": figures(loss=5.01)}
    (line,) = bench_train.complaints(result(trainers=other))
    assert line.startswith("NOT COMPARABLE: transformers GPT-2") and "5.0100" in line
    assert bench_train.complaints(result(trainers=other, dtype="bfloat16")) == []
    broken = {OURS: figures(), "hf": figures(loss=float("nan"))}
    assert len(bench_train.complaints(result(trainers=broken))) == 1


def test_the_table_and_the_picture(tmp_path):
    lines = bench_train.table(
        [result(), result(dtype="bfloat16", layers=3, width=512)], dict.fromkeys(("float32", "bfloat16"), 1e9)
    )
    assert "= 2.00 x PyTorch module (1.50-2.50 turn by turn)" in lines
    assert any("small bfloat16, 3 layers, 512 wide, batch 12 x 256 tokens" in line for line in lines)
    assert max(map(len, lines)) <= 120
    bench_train.figure([result(), result(dtype="bfloat16"), result(width=512)], tmp_path / "a.png", "title")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("settings", "changes", "complaint"),
    [
        (Settings, {"models": ("gpt3",)}, "models has 'gpt3'; choose from toy"),
        (Settings, {"rivals": ("jax",)}, "rivals has 'jax'; choose from module"),
        (Settings, {"blocks": (1,)}, "blocks is"),
        (Settings, {"batches": ()}, "batches is"),
        (Settings, {"steps": 0}, "steps is 0"),
        (Settings, {"microbatches": 5}, "5 microbatches don't divide a batch of 12 rows"),
        (bench_ppo.Settings, {"model": "gpt3"}, "model is 'gpt3'"),
        (bench_ppo.Settings, {"epochs": 0}, "epochs is 0"),
    ],
)
def test_settings_are_checked_before_any_work(settings, changes, complaint):
    with pytest.raises(UserError, match=complaint):
        settings(**changes)


@pytest.mark.slow
def test_whole_runs_without_torch(tmp_path):
    """Only ours is measured, and the report says why the others are missing."""
    empty = tmp_path / "python"
    empty.write_text("#!/bin/sh\necho no torch here >&2\nexit 3\n")
    empty.chmod(0o755)
    train = dataclasses.replace(
        bench_train.PRESETS["toy"],
        run=tmp_path / "train",
        dtypes=("float32",),
        rivals=("module",),
        torch_python=str(empty),
    )
    bench_train.main(train)
    report = json.loads((train.run / "bench_train.json").read_text())
    assert "no torch here" in report["note"] and list(report["cases"][0]["trainers"]) == [OURS]
    assert 0 < report["cases"][0]["trainers"][OURS]["fraction_of_roof"] < 1
    assert (train.run / "bench_train.png").exists() and not list(train.run.glob("weights-*"))
    ppo = dataclasses.replace(bench_ppo.PRESETS["toy"], run=tmp_path / "ppo", torch_python=str(empty))
    bench_ppo.main(ppo)
    report = json.loads((ppo.run / "bench_ppo.json").read_text())
    assert report["trainers"][OURS]["seconds"] > 0 and "no torch here" in report["note"]


def test_the_presets_are_of_known_models():
    assert bench_decode.MODELS is bench_train.MODELS
    for settings in bench_train.PRESETS.values():
        assert bench_train.cases(settings)
