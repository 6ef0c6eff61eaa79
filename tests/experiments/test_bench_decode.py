"""The benchmark of decoding: what it counts, that both sides hold the same weights, and a whole run at toy size."""

import dataclasses
import io
import json
import math
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.bench import decode as bench_decode
from experiments.bench import harness
from experiments.bench.decode import Case, Settings
from experiments.bench.harness import OURS
from jaxgpt.config import ModelConfig
from jaxgpt.errors import UserError
from jaxgpt.files import write_record
from jaxgpt.models import transformer
from tests.helpers import hidden

SMALL = ModelConfig(layers=3, width=24, heads=4, block=20, vocab=50)


def flat_weights(config=SMALL, seed=0):
    return bench_decode.random_weights(config, np.random.default_rng(seed))


def figures(**changes):
    """A decoder's figures as `measure` gives them."""
    found = bench_decode.summarise_times(
        [2.0, 1.0, 4.0], [0.5, 0.25, 0.75], 9.0, Case("toy", "float32", 3, 4, 16), 600.0
    )
    return (
        found | {"fraction_of_roof": 0.5, "agreeing_tokens": 16, "peak_bytes": {"process": 7, "device": None}} | changes
    )


def result(**changes):
    """One point of the grid as `measure` gives it."""
    made = {
        "model": "gpt2-medium",
        "dtype": "float32",
        "batch": 64,
        "prompt": 128,
        "new_tokens": 16,
        "bytes_per_step": {"total": 6e9},
        "decoders": {OURS: figures(), "compiled": figures()},
        "failed": {},
        "speedup": {"over": "compiled", "median": 99.91, "range": [88.81, 111.11]},
        "others_share": 0.0,
    }
    return made | changes


# ---- bytes ----


def test_bytes_a_step_by_hand():
    """2 layers of width 4, MLP width 8, vocabulary 10: a layer has 4 x 12 + 4 x 4 + 4 x 8 + 8 x 4 = 128 weights, the
    head 40. After 3 prompt tokens, 4 new ones take 3 steps that see 4, 5 and 6 slots: 5 on average, each a key and a
    value of 4 numbers in both layers, 80 per row."""
    config = ModelConfig(layers=2, width=4, heads=2, block=16, vocab=10, mlp_width=8)
    for dtype, size in (("float32", 4), ("bfloat16", 2)):
        found = bench_decode.bytes_per_step(dataclasses.replace(config, dtype=dtype), batch=3, prompt=3, new_tokens=4)
        assert found == {"weights": 296 * size, "cache": 3 * 80 * size, "total": (296 + 240) * size}


def test_weights_that_are_counted_are_those_of_the_matrix_products():
    """All parameters except biases, norms and positions, for every preset (with three layers: tracing all is slow)."""
    for name, config in bench_decode.MODELS.items():
        config = dataclasses.replace(config, layers=3)
        shapes = jax.eval_shape(lambda config=config: transformer.init(jax.random.key(0), config))
        matrices = sum(leaf.size for leaf in jax.tree.leaves(shapes) if leaf.ndim == 2)
        matrices -= config.block * config.width if config.positions == "learned" else 0
        assert bench_decode.bytes_per_step(config, 1, 1, 2)["weights"] == 4 * matrices, name


# ---- figures ----


def test_figures_by_hand():
    """3 rows of 16 tokens in a median of 2 s, of which the first token takes 0.5 s: 15 steps of 0.1 s."""
    found = figures()
    assert found["tokens_per_second"] == 24 and found["tokens_per_second_range"] == [12, 48]
    assert found["first_token_seconds"] == 0.5 and found["first_token_seconds_range"] == [0.25, 0.75]
    assert found["step_seconds"] == pytest.approx(0.1) and found["bytes_per_second"] == pytest.approx(6000)
    assert found["compile_seconds"] == 5  # two warm-up calls of 9 s in all, less two of 2


def test_noise_gives_no_negative_time():
    found = bench_decode.summarise_times([1.0], [3.0], 1.5, Case("toy", "float32", 1, 4, 5), 8.0)
    assert found["step_seconds"] == 0.25 and found["compile_seconds"] == 0


def test_agreement_counts_to_the_first_difference_in_any_row():
    assert bench_decode.count_agreeing_tokens([[1, 2, 3], [4, 5, 6]], [[1, 2, 3], [4, 5, 6]]) == 3
    assert bench_decode.count_agreeing_tokens([[1, 2, 3], [4, 5, 6]], [[1, 2, 9], [4, 9, 6]]) == 1
    assert bench_decode.count_agreeing_tokens([[1, 2, 3], [4, 5, 6]], [[9, 2, 3], [4, 5, 6]]) == 0


# ---- output ----


def test_other_tokens_are_called_out_in_float32_and_failures_always():
    other = {OURS: figures(), "compiled": figures(agreeing_tokens=15)}
    (line,) = bench_decode.warning_lines(result(decoders=other))
    assert line.startswith("NOT COMPARABLE: HF static + compile") and line.endswith("first 15")
    assert line in bench_decode.table([result(decoders=other)], 1e9)
    assert bench_decode.warning_lines(result(decoders=other, dtype="bfloat16")) == []
    assert bench_decode.warning_lines(result()) == []
    long = {OURS: figures(agreeing_tokens=200), "dynamic": figures(agreeing_tokens=20)}
    assert bench_decode.warning_lines(result(decoders=long, new_tokens=200)) == []
    (line,) = bench_decode.warning_lines(result(others_share=0.31))
    assert line == "DISTURBED: other programs used 31% of the machine meanwhile"
    failed = result(failed={"dynamic": "ImportError: no torch"})
    assert bench_decode.warning_lines(failed) == ["HF dynamic cache left out: ImportError: no torch"]


def test_the_table_fits_120_columns():
    large = figures(
        tokens_per_second=123_456.7,
        tokens_per_second_range=[100_000.0, 234_567.0],
        first_token_seconds=12.3456,
        step_seconds=1.23456,
        compile_seconds=1234.5,
        peak_bytes={"process": 1, "device": 79_999e6},
    )
    assert "= 99.91 x HF static + compile (88.81-111.11 turn by turn)" in bench_decode.table([result()], 1e9)
    lines = bench_decode.table([result(decoders={OURS: large, "dynamic": large, "compiled": large})], 3e12)
    assert max(map(len, lines)) <= 120
    rows = [line for line in lines if line.startswith(("decoder", OURS, "HF"))]
    assert len({line.rstrip().rfind("123,456.7") for line in rows[1:]}) == 1
    assert all("79,999" in row for row in rows[1:])  # the device's memory, if there is one


def test_a_figure_with_a_decoder_missing_at_one_point(tmp_path):
    bench_decode.figure([result(), result(decoders={OURS: figures()})], tmp_path / "a.png", "title")
    assert (tmp_path / "a.png").stat().st_size > 5000


# ---- weights ----


def test_weights_have_the_models_shapes_and_all_matter():
    flat = flat_weights()
    shapes = jax.eval_shape(lambda: transformer.init(jax.random.key(0), SMALL))
    params = harness.unflatten_names(flat)
    assert jax.tree.structure(params) == jax.tree.structure(shapes)
    jax.tree.map(lambda w, shape: np.testing.assert_array_equal(w.shape, shape.shape), params, shapes)
    assert all(w.dtype == np.float32 and w.std() > 0.02 for w in flat.values())
    logits = np.asarray(hidden(params, SMALL, np.arange(20)[None])) @ transformer.head_weights(params).T
    assert 2 < logits.std() < 5


def test_hugging_face_computes_the_same_logits():
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    flat = flat_weights()
    theirs = harness.hf_model(SMALL, flat)
    tokens = np.random.default_rng(1).integers(0, SMALL.vocab, (3, 20))
    with torch.no_grad():
        expected = theirs(torch.from_numpy(tokens)).logits.numpy()
    params = harness.unflatten_names(flat)
    np.testing.assert_allclose(
        transformer.unembed(params, hidden(params, SMALL, jnp.asarray(tokens))), expected, atol=2e-5
    )


def test_both_workers_choose_the_same_tokens():
    """Through the functions that are timed; the greedy answers vary, so that equality means something."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    flat, prompts = flat_weights(), np.random.default_rng(2).integers(0, SMALL.vocab, (4, 5)).astype(np.int32)
    answers = []
    for worker in (bench_decode.TorchDecoder("dynamic"), bench_decode.JaxDecoder()):
        worker.prepare(SMALL, flat, prompts, prepared=False)
        answers.append(worker.generate(15))
    assert answers[0].shape == (4, 15) and len(np.unique(answers[0])) > 10
    assert bench_decode.count_agreeing_tokens(*answers) == 15


# ---- workers ----


class Fake:
    def about(self):
        raise RuntimeError("first line\nsecond line")

    def timed(self, new_tokens):
        return {"tokens": list(range(new_tokens))}


def test_a_worker_answers_every_request_and_reports_errors():
    requests = [
        {"do": "about"},
        {"do": "timed", "new_tokens": 3},
        {"do": "nonsense"},
        {"do": "timed", "tokens": 3},
        {"do": "cpu"},
    ]
    answers: list[dict] = []
    harness.serve(Fake(), io.StringIO("".join(json.dumps(r) + "\n" for r in requests)), answers.append)
    assert answers[0] == {"error": "RuntimeError: first line"}
    assert answers[1] == {"tokens": [0, 1, 2]} and answers[4]["seconds"] > 0
    assert "nonsense" in answers[2]["error"] and answers[3]["error"].startswith("TypeError")


@pytest.mark.parametrize(
    ("python", "complaint"),
    [("/no/such/python", "can't start /no/such/python"), ("/bin/false", "the process ended")],
)
def test_a_worker_that_cannot_start_is_one_line(tmp_path, python, complaint):
    (tmp_path / "log").write_text("")
    with (
        pytest.raises(harness.WorkerError, match=complaint),
        harness.Worker(bench_decode.MODULE, "dynamic", python, tmp_path / "log") as worker,
    ):
        worker.ask("about")


class Scripted:
    """A worker that fails at the n-th request."""

    def __init__(self, fails_at=None, tokens=(1, 2)):
        self.asked, self.fails_at, self.tokens = [], fails_at, [list(tokens)]

    def ask(self, do, **request):
        self.asked.append((do, request.get("new_tokens")))
        if len(self.asked) == self.fails_at:
            raise harness.WorkerError("no compiler")
        return {"seconds": 1.0, "tokens": self.tokens, "process": 5, "device": None}


def test_decoders_take_turns(monkeypatch):
    """Ours, theirs, ours, theirs: after the warm-ups, no decoder has two whole calls in a row."""
    order = []

    class Recorded(Scripted):
        def ask(self, do, **request):
            order.append((self.kind, do, request.get("new_tokens")))
            return super().ask(do, **request)

    workers = {OURS: Recorded(), "dynamic": Recorded()}
    for kind, worker in workers.items():
        worker.kind = kind
    monkeypatch.setattr(harness.time, "sleep", lambda _: None)
    settings = Settings(models=("toy",), block=0, batches=(1,), prompts=(3,), new_tokens=(2,), repeats=3)
    found = bench_decode.measure(Case("toy", "float32", 1, 3, 2), settings, workers, None)
    whole = [kind for kind, do, new_tokens in order if do == "timed" and new_tokens == 2]
    assert whole == [OURS] * 2 + ["dynamic"] * 2 + [OURS, "dynamic"] * 3
    assert (
        found["speedup"] == {"over": "dynamic", "median": 1, "range": [1, 1]}
        and found["decoders"]["dynamic"]["agreeing_tokens"] == 2
    )
    assert len(found["decoders"]["dynamic"]["seconds"]) == 3


@pytest.mark.parametrize(("theirs", "share"), [(0.0, 0.75), (2.0, 0.5), (9.0, 0.0)])
def test_time_of_other_programs_is_what_is_busy_less_ours(monkeypatch, theirs, share):
    """Two cores, 4 s of wall-clock time, 6 s busy: 6 of 8 s if none of them were ours."""
    busy, clock = iter([100.0, 106.0]), iter([0.0, 4.0])
    cpu = iter([1.0, 1.0 + theirs])

    class Counted(Scripted):
        def ask(self, do, **request):
            return {"seconds": next(cpu)} if do == "cpu" else super().ask(do, **request)

    monkeypatch.setattr(harness, "busy_seconds", lambda: next(busy))
    monkeypatch.setattr(harness, "cores", lambda: 2)
    monkeypatch.setattr(harness.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(harness.time, "process_time", lambda: 0.0)
    monkeypatch.setattr(harness.time, "sleep", lambda _: None)
    settings = Settings(models=("toy",), block=0, batches=(1,), prompts=(3,), new_tokens=(2,), repeats=1)
    found = bench_decode.measure(Case("toy", "float32", 1, 3, 2), settings, {OURS: Counted()}, None)
    assert found["others_share"] == share


def test_a_rival_that_fails_is_left_out_and_named(monkeypatch):
    monkeypatch.setattr(harness.time, "sleep", lambda _: None)
    settings = Settings(models=("toy",), block=0, batches=(1,), prompts=(3,), new_tokens=(2,), repeats=2)
    case = Case("toy", "float32", 1, 3, 2)
    workers = {OURS: Scripted(), "dynamic": Scripted(), "compiled": Scripted(fails_at=2)}
    found = bench_decode.measure(case, settings, workers, None)
    assert found["failed"] == {"compiled": "no compiler"} and list(found["decoders"]) == [OURS, "dynamic"]
    with pytest.raises(UserError, match="no compiler"):
        bench_decode.measure(case, settings, {OURS: Scripted(fails_at=2)}, None)


# ---- settings, and a whole run ----


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"models": ("gpt3",)}, "models has 'gpt3'; choose from toy"),
        ({"dtypes": ("float16",)}, "dtypes has 'float16'"),
        ({"rivals": ("vllm",)}, "rivals has 'vllm'"),
        ({"batches": ()}, "batches is"),
        ({"new_tokens": (1,)}, "new_tokens is"),
        ({"repeats": 0}, "repeats is 0"),
        ({"prompts": (16, 57)}, r"257 tokens don't fit the block of 256 \(small\)"),
    ],
)
def test_settings_are_checked_before_any_work(changes, complaint):
    with pytest.raises(UserError, match=complaint):
        Settings(**changes)


def test_presets_and_grid():
    assert set(bench_decode.PRESETS) == {"laptop", "toy", "gpt2", "gpu"}
    assert bench_decode.PRESETS["gpt2"].config("gpt2").block == 256
    assert Settings(block=0).config("gpt2").block == 1024 and Settings(block=2000).config("gpt2").block == 1024
    grid = bench_decode.cases(Settings(batches=(1, 16)))
    assert [(case.dtype, case.batch) for case in grid] == [
        ("float32", 1),
        ("float32", 16),
        ("bfloat16", 1),
        ("bfloat16", 16),
    ]


def finite_and_positive(value):
    return isinstance(value, float) and math.isfinite(value) and value > 0


@pytest.mark.slow
def test_a_whole_run_without_torch(tmp_path, capsys):
    """Table, JSON and figure; a Python without torch is reported in one line, and ours is measured all the same."""
    empty = tmp_path / "python"
    empty.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')  # no site-packages: no torch
    empty.chmod(0o755)
    settings = dataclasses.replace(
        bench_decode.PRESETS["toy"],
        run=tmp_path / "run",
        rivals=("dynamic",),
        torch_python=str(empty),
        dtypes=("float32", "bfloat16"),
        batches=(2,),
        repeats=2,
        roof_mb=16,
    )
    (settings.run / "weights-of-a-killed-run").mkdir(parents=True)
    killed: dict[str, Any] = {"stage": "bench_decode", "settings": {}, "inputs": {}, "versions": {}}
    write_record(settings.run / "settings.json", killed)
    bench_decode.main(settings)
    report = json.loads((settings.run / "bench_decode.json").read_text())
    said = capsys.readouterr().out
    assert (settings.run / "bench_decode.png").read_bytes().startswith(b"\x89PNG")
    lines = (settings.run / "bench_decode.txt").read_text().splitlines()
    assert all(line in said for line in lines)
    assert report["note"].startswith(f"without Hugging Face: {empty}: ") and report["note"] in said
    assert not list(settings.run.glob("weights-*"))
    assert report["machine"]["versions"]["jax"] == jax.__version__ and report["machine"]["cores"] >= 1
    assert report["settings"]["batches"] == [2]
    rates = [*report["roofs_before"].values(), *report["roofs_after"].values()]
    assert len(rates) == 4 and all(map(finite_and_positive, rates))
    assert report["roof_bytes_per_second"] == max(rates) and report["roof"] in report["roofs_before"]
    assert [case["dtype"] for case in report["cases"]] == ["float32", "bfloat16"]
    for case in report["cases"]:
        (found,) = case["decoders"].values()
        names = ("tokens_per_second", "first_token_seconds", "step_seconds", "bytes_per_second", "fraction_of_roof")
        assert all(finite_and_positive(found[name]) for name in names), found
        assert found["compile_seconds"] >= 0 and found["peak_bytes"]["process"] > 1e7
        low, high = found["tokens_per_second_range"]
        assert low <= found["tokens_per_second"] <= high and len(found["seconds"]) == 2
        expected = found["bytes_per_second"] / max(rates)
        assert found["fraction_of_roof"] == pytest.approx(expected)
        assert found["bytes_per_second"] == pytest.approx(case["bytes_per_step"]["total"] / found["step_seconds"])
        assert case["speedup"] is None and case["others_share"] >= 0
