"""`make plan-all`: what it writes, the table of docs/planning.md, and, with the TPU compiler, the command itself."""

import importlib.util
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest

from jaxgpt.errors import UserError
from jaxgpt.runs.cli import settings_to_json
from tpu import hardware, plan_all
from tpu.plan_all import MACHINES, MARKERS, Settings
from tpu.settings import PRESETS

RESULTS = Settings().results
FITS = {
    "mesh": {"data": 2, "fsdp": 8, "tensor": 1},
    "fits": True,
    "memory": {"parameters": 2**30, "temporary": 2 * 2**30},
    "collectives": {"all-gather": {"times": 3, "sent": 2**20, "across": 0.0}},
    "kernels": 1234,
    "estimate": {"seconds": [0.0123456, 0.2], "mfu": [0.5, 0.25]},
    "seconds": 61.5,
}
LARGE = {"mesh": {"data": 16, "fsdp": 1, "tensor": 1}, "fits": False, "needed": 3 * 2**34, "capacity": 2**34}
FOUND = {
    "machine": {"devices": 16, "kind": "TPU", "capacity": 2**34},
    "versions": {"jax": "0.12"},
    "settings": settings_to_json(PRESETS["gpt2"]),
    "steps": {"train": {"best": None, "meshes": [FITS]}, "ppo": {"best": None, "meshes": [LARGE]}},
}


@pytest.fixture
def results(tmp_path):
    """A folder with a plan of v5e:4x4."""
    plan_all.write_json(plan_all.file_of(tmp_path, "v5e:4x4"), plan_all.summary(["--topology", "v5e:4x4"], FOUND))
    return tmp_path


def cells(text: str, step: str) -> list[str]:
    (line,) = (line for line in text.splitlines() if line.startswith(f"| v5e:4x4 | {step}"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_page_shows_what_the_files_say():
    page = Settings().page.read_text(encoding="utf-8")
    assert f"{MARKERS[0]}\n{plan_all.table(RESULTS)}\n{MARKERS[1]}" in page


def test_the_files_are_small_and_say_nothing_about_the_machine_that_made_them():
    for path in RESULTS.glob("*.json"):
        text = path.read_text(encoding="utf-8")
        found = json.loads(text)
        assert path == plan_all.file_of(RESULTS, found["topology"]) and found["topology"] in MACHINES
        assert len(text) < 20_000 and not re.search(r'"[/~\\]', text), path


def test_a_summary_keeps_the_plan_and_drops_the_time_it_took(results):
    found = json.loads(plan_all.file_of(results, "v5e:4x4").read_text())
    assert found["command"] == "python -m tpu.plan --topology v5e:4x4" and found["versions"] == {"jax": "0.12"}
    train = found["steps"]["train"]
    assert train["size"] == "256 rows x 1024 tokens" and "seconds" not in train
    assert train["estimate"]["seconds"] == [0.01235, 0.2]
    assert train["memory"]["parameters"] == 1_074_000_000  # four digits
    assert train["kernels"] == 1234


@pytest.mark.parametrize("value", [0.0, 1.0, 123_456, 999_999, 1_234_567, 2**40, 1.2345678e-7, 9.9999e300])
def test_rounding_keeps_counts_and_four_digits(value):
    short = plan_all.rounded(value)
    assert type(short) is type(value) and math.isclose(short, value, rel_tol=5.001e-4)
    assert short == value or abs(value) >= 10**6 or isinstance(value, float)
    assert plan_all.rounded({"a": [value]}) == {"a": [short]}


def test_a_row_says_what_a_step_needs(results):
    text = plan_all.table(results)
    row = ["v5e:4x4", "train: 256 rows x 1024 tokens", "data 2 x fsdp 8", "3.00 GiB of 16.00 GiB", "1.00 MiB", "1,234"]
    assert cells(text, "train")[:6] == row
    assert cells(text, "train")[6:8] == ["12.35 ms / 200.00 ms", "50% / 25% (46 to 71 %)"]
    assert cells(text, "ppo")[2:4] == ["data 16", "does not fit: 48.00 GiB"]


def test_measured_times_stand_beside_the_plan_of_the_same_model_size_and_mesh(results):
    (results / "measured").mkdir()
    step = {"seconds": 0.15, "size": "256 rows x 1024 tokens", "mesh": FITS["mesh"]}
    measured = {"topology": "v5e:4x4", "settings": FOUND["settings"], "steps": {"train": step}}
    model = FOUND["settings"]["model"]
    others = {
        "topology": measured | {"topology": "v5e:2x2"},
        "model": measured | {"settings": {"model": model | {"layers": 3}}},
        "size": measured | {"steps": {"train": step | {"size": "32 rows x 1024 tokens"}}},
        "mesh": measured | {"steps": {"train": step | {"mesh": LARGE["mesh"]}}},
        "cut_off": measured | {"steps": {"train": {}, "ppo": {"size": "512 prompts"}}},
        "no_machine": {"steps": {}},
    }
    for name, content in others.items():
        (results / f"measured/{name}.json").write_text(json.dumps(content))
    assert cells(plan_all.table(results), "train")[-1] == ""
    scanned = measured | {"settings": {"model": model | {"scan": not model["scan"]}}}
    (results / "measured/same.json").write_text(json.dumps(scanned))
    assert cells(plan_all.table(results), "train")[-1] == "150.00 ms"


def test_only_what_is_between_the_markers_is_replaced(results, tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{MARKERS[0]}old\n{MARKERS[1]}after\n")
    for _ in range(2):  # the second time changes nothing
        plan_all.write_table(results, page)
        assert page.read_text() == f"before\n{MARKERS[0]}\n{plan_all.table(results)}\n{MARKERS[1]}after\n"
    page.write_text("no markers")
    with pytest.raises(UserError, match="once each"):
        plan_all.write_table(results, page)


def test_machines_without_a_compiler_are_skipped_by_name(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    plan_all.main(Settings(only=("v5e:4x4", "h100:8"), results=tmp_path))
    said = capsys.readouterr().out
    assert "v5e:4x4: skipped" in said and "h100:8: skipped" in said and "EXTRAS=cuda" in said
    assert not list(tmp_path.iterdir())


def test_an_unknown_machine_is_refused():
    with pytest.raises(UserError, match="v5e:4x4"):
        Settings(only=("v5e:4x5",))


def test_every_generation_that_can_be_compiled_for_is_planned():
    folder = Path(hardware.__file__).parent
    compiled = {name for name, chip in hardware.CHIPS.items() if chip.dimensions or (folder / f"{name}.txtpb").exists()}
    assert {hardware.parse(name).generation for name in MACHINES} == compiled


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="the TPU compiler is not installed")
def test_the_command_writes_a_file_and_a_row_per_step(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("".join(MARKERS))
    words = ["--toy", "--only", "v5e:4x4", "--results", str(tmp_path / "results"), "--page", str(page)]
    done = subprocess.run([sys.executable, "-m", "tpu.plan_all", *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line.split(":")[0] for line in page.read_text().splitlines() if "v5e:4x4 |" in line] == ["| v5e"] * 3
    assert (tmp_path / "results/v5e-4x4.json").stat().st_size < 20_000
