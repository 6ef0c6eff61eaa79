"""`tpu.measure`: its arithmetic and its reports; as slow tests, its parts, and the whole on a CPU at toy size."""

import dataclasses
import functools
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest

from jaxgpt.errors import UserError
from jaxgpt.models import transformer
from tpu import checks, hardware, measure, measuring
from tpu.checks import Check
from tpu.measure import PRESETS, SHARES, Settings

ROOT = Path(__file__).parents[2]


def devices(kind: str, *coordinates: tuple[int, ...]) -> list[SimpleNamespace]:
    return [SimpleNamespace(device_kind=kind, coords=list(one)) for one in coordinates]


@pytest.mark.parametrize(
    ("found", "name"),
    [
        (devices("NVIDIA H100 80GB HBM3", (), ()), "h100:2"),
        (devices("TPU v5 lite", (0, 0, 0)), "v5e:1x1"),
        (devices("TPU v6 lite", *((x, y, 0) for x in range(2) for y in range(4))), "v6e:2x4"),
        (devices("TPU v5", *((x, y, z) for x in range(2) for y in range(2) for z in range(1))), "v5p:2x2x1"),
        (devices("TPU v6 lite", (0, 0, 0), (1, 3, 0)), None),  # a part of a slice
        (devices("NVIDIA A100-SXM4-80GB", ()), None),
        (devices("cpu", ()), None),
    ],
)
def test_a_machine_with_a_data_sheet_is_recognised(found, name):
    topology = hardware.recognise(found)
    assert (topology and topology.name) == name


def test_a_part_may_use_what_earlier_ones_left_and_all_end_in_time():
    whole, left, parts = 480.0, 480.0, tuple(SHARES)
    assert sum(SHARES.values()) == pytest.approx(1)
    for i, part in enumerate(parts):
        allowed = measure.time_for(parts[i:], left, whole)
        assert allowed >= SHARES[part] * whole - 1e-9
        left -= allowed if i % 2 else 0.0  # every other part takes no time
    assert left >= -1e-9
    assert measure.time_for(("ppo",), 480.0, whole) == 480.0


@pytest.mark.parametrize(("error", "ok"), [(1e-5, True), (2e-5, False), (math.nan, False), (math.inf, False)])
def test_only_a_number_within_the_limit_passes(error, ok):
    found = Check("x", error, 1e-5).to_json()
    assert found["ok"] is ok and ("FAILED" in measure.check_text(found)) is not ok
    json.dumps(found, allow_nan=False)


def test_a_large_model_on_a_cpu_is_refused_before_anything_is_spent():
    with pytest.raises(UserError, match="no GPU or TPU.*--preset toy"):
        measure.check_machine({"platform": "cpu"}, Settings())
    measure.check_machine({"platform": "cpu"}, PRESETS["toy"])
    measure.check_machine({"platform": "gpu"}, Settings())


def test_a_part_that_is_cut_off_is_reported_and_ends_with_status_1(tmp_path, capsys, monkeypatch):
    machine = {"device": "cpu", "platform": "cpu", "devices": 1, "memory": None, "topology": None, "versions": {}}
    run_part = measure.run_part

    def start(part, settings, seconds):
        return iter([{"machine": machine}]) if part == "machine" else run_part(part, settings, 0.0)

    monkeypatch.setattr(measure, "run_part", start)
    with pytest.raises(SystemExit) as stop:
        measure.main(dataclasses.replace(PRESETS["toy"], parts=("same_bits",), out=tmp_path))
    assert stop.value.code == 1 and "FAILED same_bits: cut off after 0 s" in capsys.readouterr().out
    assert "cut off" in json.loads((tmp_path / "measured.json").read_text())["failed"]["same_bits"]


def test_a_folder_is_wanted(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="a file; give a folder"):
        Settings(out=tmp_path / "file")


# ---- slow ----


@pytest.fixture
def broken_attention(monkeypatch):
    """A kernel whose scores are not scaled, and which fails for shared heads."""
    layers = transformer.select_layers(checks.GPT2)

    def attend(q, k, v, segments):
        if q.shape[2] > k.shape[2]:
            raise RuntimeError("no such kernel\nand more")
        return layers.attend(q * q.shape[-1] ** 0.5, k, v, segments)

    monkeypatch.setattr(transformer, "select_layers", lambda config: layers._replace(attend=attend))


@pytest.mark.slow
def test_a_broken_kernel_fails_and_the_next_checks_are_made(broken_attention, monkeypatch):
    for name in ("check_models", "check_sampling", "check_greedy"):
        monkeypatch.setattr(checks, name, functools.partial(lambda *_: iter(())))
    found = [check.to_json() for check in checks.run(jax.devices()[0])]
    attention, head = found[:3], found[3:]
    assert [one["ok"] for one in attention] == [False] * 3
    assert "no such kernel" in attention[2]["name"] and "more" not in attention[2]["name"]
    assert head and all(one["ok"] for one in head)


@pytest.mark.slow
def test_where_there_is_a_data_sheet_the_plan_stands_beside_what_is_measured(monkeypatch, tmp_path):
    monkeypatch.setattr(hardware, "recognise", lambda _: hardware.parse("h100:8"))
    step = {}
    measuring.measure_step(measuring.SMALL, "train", 1, 0, tmp_path, 60.0, lambda found: step.update(found["step"]))
    least, most = step["plan"]["seconds"]
    assert 0 < least <= most and step["plan"]["bytes"] > 0
    assert step["seconds"] > least and 0 < step["mfu"] < step["plan"]["mfu"][0]
    assert [line.split()[0] for line in measure.step_lines(step)[1:4]] == ["time", "MFU", "tokens"]


@pytest.mark.slow
def test_the_whole_on_a_cpu(tmp_path):
    """Every part at toy size, in processes of their own."""
    small = {"preset": "toy", "model.layers": 1, "batch": 2, "prompts": 2, "runs": 1, "traced": 1, "minutes": 60}
    words = [word for name, value in (small | {"out": tmp_path}).items() for word in (f"--{name}", str(value))]
    done = subprocess.run(
        [sys.executable, "-m", "tpu.measure", *words],
        cwd=ROOT,
        env=os.environ | {"XLA_FLAGS": os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "measured.json").read_text())
    assert found["device"] == "cpu" and found["topology"] is None and found["versions"]["jax"] == jax.__version__
    assert len(found["checks"]) >= 25 and all(one["ok"] for one in found["checks"]) and not found["failed"]
    assert found["steps"].keys() == {"train", "decode", "ppo"}
    for name, step in found["steps"].items():
        assert step["seconds"] > 0 and step["runs"] == 1 and step["plan"]["bytes"] > 0 and "mfu" not in step
        assert step["trace"] == f"trace/{name}" and list((tmp_path / step["trace"]).rglob("*.xplane.pb"))
    assert str(tmp_path) not in json.dumps(found)
