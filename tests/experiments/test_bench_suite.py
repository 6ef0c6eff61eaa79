"""The benchmark suite: its page is what its reports say, and a report names no place of the machine it was made on."""

import json

import pytest

from experiments.bench import harness, suite
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


MEASURED = {"first_token_seconds": 0.1004, "agreeing_tokens": 200, **OURS}
SLOWER = {"first_token_seconds": 0.2006, "agreeing_tokens": 200, "tokens_per_second": 98.6}
DECODED = {
    "model": "gpt2",
    "dtype": "float32",
    "batch": 1,
    "prompt": 16,
    "new_tokens": 200,
    "others_share": 0.0,
    "failed": {},
    "decoders": {"jaxgpt": MEASURED, "dynamic": SLOWER},
    "speedup": {**RATIO, "over": "dynamic"},
    "first_speedup": {**RATIO, "over": "dynamic", "median": 2.0},
}
TIMES = "**1.50** (1.40–1.62)"
REPORTED = {  # name -> (report, its rows)
    "train_gpt2": (
        {"cases": [{**CASE, "trainers": {"jaxgpt": OURS, **RIVALS}, "speedup": RATIO}]},
        [f"| train gpt2 float32, 2 x 256 | 150 tok/s | 98.6 tok/s | transformers GPT-2 | {TIMES} | 75% | 2.00 |"],
    ),
    "train_small_in_parts": (  # without rivals
        {"cases": [{**CASE, "microbatches": 3, "trainers": {"jaxgpt": OURS}, "speedup": None}]},
        ["| train gpt2 float32, 2 x 256, in 3 parts | 150 tok/s |  |  |  | 75% |  |"],
    ),
    "decode_gpt2": (
        {"cases": [DECODED]},
        [f"| decode gpt2 float32, 1 row | 150 tok/s | 98.6 tok/s | HF dynamic cache | {TIMES} | 75% | 2.00 |"],
    ),
    "first_token": (
        {"cases": [DECODED]},
        [
            "| first token of gpt2 float32 after 16 | 100 ms | 201 ms | HF dynamic cache "
            "| **2.00** (1.40–1.62) |  |  |",
        ],
    ),
    "ppo": (
        {
            "trainers": {"jaxgpt": {"seconds": 10.0}, "trl": {"seconds": 15.0}},
            "speedup": {**RATIO, "over": "trl"},
        },
        [f"| an iteration of PPO, float32 | 10.00 s | 15.00 s | TRL PPOTrainer | {TIMES} |  |  |"],
    ),
    "chat": (
        {
            "tokens_per_second": {
                "jaxgpt": [20.0] * 3,
                "int8": [30.0] * 3,
                "float32": [20.0] * 3,
                "llama.cpp": [40.0] * 3,
            },
            "speedups": {"int8": {**RATIO, "over": "float32"}, "jaxgpt": None},
        },
        [
            f"| chat with SmolLM2-135M, int8 | 30.0 tok/s | 20.0 tok/s | HF float32 | {TIMES} |  |  |",
            "| chat with SmolLM2-135M, int8, llama.cpp's 4 bits | 30.0 tok/s | 40.0 tok/s | llama.cpp "
            "| **0.75** (0.75–0.75) |  |  |",
            "| chat with SmolLM2-135M, float32 | 20.0 tok/s |  |  |  |  |  |",
        ],
    ),
    "rollouts": (
        {"seconds": {"padded": [8.0, 12.0, 10.0], "drain 1": [4.0, 4.0, 5.0]}, "settings": {"slots": 16, "queue": 8}},
        [
            "| 128 answers through 16 slots, `drain 1` | 4.0 s | 10.0 s | batches of `generate` "
            "| **2.50** (2.00–3.00) |  |  |"
        ],
    ),
}


@pytest.mark.parametrize("name", REPORTED)
def test_rows_by_hand(name):
    report, expected = REPORTED[name]
    assert suite.rows(name, report) == expected


def test_what_a_benchmark_warns_of_is_passed_on():
    assert suite.warnings("decode_gpt2", {"cases": [DECODED]}) == []
    other = {
        **DECODED,
        "others_share": 0.2,
        "decoders": {"jaxgpt": MEASURED, "dynamic": {**SLOWER, "agreeing_tokens": 3}},
    }
    disturbed, differs = suite.warnings("decode_gpt2", {"cases": [other]})
    assert "20%" in disturbed and "NOT COMPARABLE: HF dynamic cache" in differs
    (failed,) = suite.warnings("ppo", {"failed": {"trl": "no memory"}, "others_share": 0.0})
    assert failed == "ppo: TRL PPOTrainer left out: no memory"


def test_a_run_writes_its_report_and_the_page(tmp_path, monkeypatch):
    report = {"machine": {"processor": "A, model 1", "cores": 2, "versions": {"jax": "1"}}, **REPORTED["rollouts"][0]}
    monkeypatch.setattr(suite.rollouts, "main", lambda settings: {**report, "run_was": str(settings.run)})
    page = tmp_path / "page.md"
    page.write_text(f"before\n{MARKERS[0]}old\n{MARKERS[1]}after\n")
    suite.main(Settings(only=("rollouts",), runs=tmp_path / "runs", results=tmp_path, page=page))
    assert json.loads((tmp_path / "a-model-1/rollouts.json").read_text())["run_was"].endswith("runs/rollouts")
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert "### A, model 1: 2 cores, jax 1" in text and REPORTED["rollouts"][1][0] in text


def test_the_fastest_rival_with_all_turns_is_compared():
    seconds = {"jaxgpt": [1.0, 2.0, 1.0], "slow": [4.0, 4.0, 4.0], "fast": [3.0, 3.0, 2.0], "failed": [0.1]}
    assert harness.speedup(seconds) == {"over": "fast", "median": 3.0, "range": [1.5, 3.0]}
    assert harness.speedup(seconds, rivals=("slow",))["over"] == "slow"
    assert harness.speedup({"jaxgpt": [1.0]}) is None


@pytest.mark.parametrize(
    ("flags", "lacks"), [("flags\t\t: fpu avx2", True), ("flags : avx2 avx512bw", False), ("Features : bf16", False)]
)
def test_a_cpu_is_asked_whether_pytorch_has_bfloat16(flags, lacks, tmp_path):
    (tmp_path / "cpuinfo").write_text(f"model name : X\n{flags}\n")
    assert harness.torch_lacks_bfloat16(tmp_path / "cpuinfo") == lacks
    assert not harness.torch_lacks_bfloat16(tmp_path / "missing")


def test_an_unknown_benchmark_is_refused():
    with pytest.raises(UserError, match="train_small"):
        Settings(only=("trains",))
