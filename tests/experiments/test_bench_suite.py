"""The benchmark suite: its page is what its reports say, and a report names no place of the machine it was made on."""

import json

import pytest

from experiments.bench import suite
from experiments.bench.suite import BENCHMARKS, MARKERS, Settings
from jaxgpt.errors import UserError

PAGE, RESULTS = Settings().page, Settings().results
REPORTS = sorted(RESULTS.glob("*/*.json"))


def test_the_page_has_the_tables_of_the_committed_reports():
    assert f"{MARKERS[0]}\n{suite.tables(RESULTS)}\n{MARKERS[1]}" in PAGE.read_text()


@pytest.mark.parametrize("path", REPORTS, ids=lambda path: path.stem)
def test_reports_are_of_known_benchmarks_lie_in_their_machines_folder_and_name_no_place(path):
    text = path.read_text()
    report = json.loads(text)
    assert path.stem in BENCHMARKS and path.parent.name == suite.folder_name(report["machine"]["processor"])
    assert "/" not in "".join(str(x) for x in report["settings"].values()) and "/tmp" not in text


def test_places_are_left_out_of_a_report():
    report = {"settings": {"run": "/a", "torch_python": "/b", "seed": 0}, "cases": []}
    assert suite.without_places(report) == {"settings": {"seed": 0}, "cases": []}
    assert "run" in report["settings"]


CASE = {
    "model": "gpt2",
    "dtype": "float32",
    "batch": 2,
    "block": 256,
    "microbatches": 1,
    "others_share": 0.0,
    "failed": {},
}
OURS = {"tokens_per_second": 150.4, "fraction_of_roof": 0.75}
RIVALS = {"hf": {"tokens_per_second": 98.6}, "module": {"tokens_per_second": 50.0}}
RATIO = {"over": "hf", "median": 1.5, "range": [1.4, 1.625]}


def test_a_row_by_hand():
    case = {**CASE, "trainers": {"jaxgpt": OURS, **RIVALS}, "speedup": RATIO}
    (line,) = suite.rows("train_gpt2", {"cases": [case]})
    assert line == (
        "| train gpt2 float32, 2 x 256 | 150 tok/s | 98.6 tok/s | transformers GPT-2 | **1.50** (1.40–1.62) "
        "| 75%, which is 2.00 |"
    )


def test_a_case_without_rivals_has_a_row_and_a_disturbed_one_says_so():
    case = {**CASE, "trainers": {"jaxgpt": OURS}, "speedup": None, "others_share": 0.2}
    (line,) = suite.rows("train_gpt2", {"cases": [case]})
    assert line.count("|") == 7 and "20% of the machine used by others" in line and "75% |" in line


def test_an_unknown_benchmark_is_refused():
    with pytest.raises(UserError, match="train_small"):
        Settings(only=("trains",))
