"""All benchmarks beside their rivals, one after another, and the tables of docs/speed.md.

    python -m experiments.bench.suite --torch-python /path/to/python     which has torch, transformers, trl 1.12, gguf,
                                                                         accelerate and llama-cpp-python
    python -m experiments.bench.suite --only decode_small chat --torch-python ...

The reports (machine, versions, settings, the seconds of every turn) are kept in experiments/bench/results, in a folder
for each kind of processor. The tables are written from these files alone.
"""

import dataclasses
import re
import statistics
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

from experiments.bench import chat, decode, ppo, rollouts, train
from experiments.bench.harness import OURS, speedup, warn_of_turns
from jaxgpt.config import Count, check_settings
from jaxgpt.errors import UserError
from jaxgpt.files import read_json, write_json, write_text
from jaxgpt.runs.cli import cli

HERE = Path(__file__).parent
MARKERS = "<!-- from experiments/bench/results, by experiments.bench.suite -->\n", "<!-- end of the suite -->\n"
HEADER = (
    "| | jaxgpt | best rival | | times as fast | of the limit | limit / rival |",
    "|---|---|---|---|---|---|---|",
)


@dataclasses.dataclass(frozen=True)
class Settings:
    """2 CPU cores: about an hour, most of it the rivals'. Keep the machine otherwise idle."""

    PLACE_FIELDS: ClassVar[tuple[str, ...]] = ("torch_python",)

    torch_python: str = ""  # a Python that has the rivals' libraries; "": this one
    only: tuple[str, ...] = ()  # benchmarks to run; default: all
    repeats: Count = 7  # turns of each program
    runs: Path = Path("runs/bench")
    results: Path = HERE / "results"
    page: Path = HERE.parents[1] / "docs/speed.md"

    def __post_init__(self) -> None:
        check_settings(self)
        for name in self.only:
            if name not in BENCHMARKS:
                raise UserError(f"only has {name!r}; choose from {', '.join(BENCHMARKS)}")


GPT2 = {"models": ("gpt2",), "batches": (1,)}
FIRST_TOKEN = {**GPT2, "prompts": (16, 400), "new_tokens": (2,), "block": 512, "prepare_once": True}
BENCHMARKS: dict[str, tuple[Any, dict[str, Any]]] = {  # name -> (its module, settings)
    "train_small": (train, {}),
    "train_small_in_parts": (train, {"microbatches": 3}),
    "train_gpt2": (train, {"models": ("gpt2",), "batches": (2,), "steps": 1}),
    "decode_small": (decode, {}),
    "decode_gpt2": (decode, GPT2),
    "first_token": (decode, FIRST_TOKEN),
    "chat": (chat, {}),
    "ppo": (ppo, {}),
    "rollouts": (rollouts, {}),
}


# ---- from reports to tables ----


def folder_name(processor: str) -> str:
    """For example amd-epyc-family-25-model-17."""
    return "-".join(re.findall(r"[a-z0-9]+", processor.lower()))


def without_places(report: Mapping[str, Any]) -> dict[str, Any]:
    """The report without the paths of the machine it was made on."""
    settings = {name: x for name, x in report["settings"].items() if name not in ("run", "torch_python")}
    return {**report, "settings": settings}


def row(
    name: str, ours: str, theirs: str, rival: str, ratio: Mapping[str, Any] | None, share: float | None = None
) -> str:
    """A row of the table; `share`: the fraction of the hardware's limit that ours reaches."""
    times = f"**{ratio['median']:.2f}** ({ratio['range'][0]:.2f}–{ratio['range'][1]:.2f})" if ratio else ""
    reached = "" if share is None else f"{share:.0%}"
    limit = f"{ratio['median'] / share:.2f}" if ratio and share is not None else ""
    return f"| {name} | {ours} | {theirs} | {rival} | {times} | {reached} | {limit} |"


def rate(tokens_per_second: float) -> str:
    return f"{tokens_per_second:,.0f} tok/s" if tokens_per_second >= 100 else f"{tokens_per_second:.1f} tok/s"


def rows(name: str, report: Mapping[str, Any]) -> list[str]:
    """The rows of one report."""
    return [line for case in report.get("cases", [report]) for line in _rows_of_case(name, case)]


def warnings(name: str, report: Mapping[str, Any]) -> list[str]:
    """What the benchmark itself warns of: rivals that failed or computed something else, a disturbed machine."""
    found = []
    for case in report.get("cases", [report]):
        if name.startswith("train"):
            found += [f"{train.title_of(case)}: {line}" for line in train.complaints(case)]
        elif name.startswith("decode") or name == "first_token":
            found += [f"{decode.case_title(case)}: {line}" for line in decode.warning_lines(case)]
        elif name in ("chat", "ppo"):
            names = chat.NAMES if name == "chat" else ppo.RIVALS
            found += [f"{name}: {line}" for line in warn_of_turns(case["failed"], case["others_share"], names)]
    return found


def _rows_of_case(name: str, case: Mapping[str, Any]) -> Iterator[str]:
    if name.startswith("train"):
        found, ratio = case["trainers"], case["speedup"]
        title = f"train {case['model']} {case['dtype']}, {case['batch']} x {case['block']}"
        title += f", in {case['microbatches']} parts" * (case["microbatches"] > 1)
        yield compare(title, found, ratio, train.RIVALS, lambda x: rate(x["tokens_per_second"]))
    elif name.startswith("decode"):
        found, ratio = case["decoders"], case["speedup"]
        title = f"decode {case['model']} {case['dtype']}, {case['batch']} row{'s' * (case['batch'] > 1)}"
        yield compare(title, found, ratio, decode.RIVALS, lambda x: rate(x["tokens_per_second"]))
    elif name == "first_token":
        found = {kind: {**x, "fraction_of_roof": None} for kind, x in case["decoders"].items()}
        title = f"first token of {case['model']} {case['dtype']} after {case['prompt']}"
        show = lambda x: f"{x['first_token_seconds'] * 1e3:.0f} ms"  # noqa: E731
        yield compare(title, found, case["first_speedup"], decode.RIVALS, show)
    elif name == "ppo":
        found, ratio = case["trainers"], case["speedup"]
        yield compare("an iteration of PPO, float32", found, ratio, ppo.RIVALS, lambda x: f"{x['seconds']:.2f} s")
    elif name == "chat":
        speeds = {kind: {"rate": statistics.median(x)} for kind, x in case["tokens_per_second"].items()}
        for kind, ratio in case["speedups"].items():
            one = {**speeds, OURS: speeds[kind]}
            title = f"chat with SmolLM2-135M, {'float32' if kind == OURS else kind}"
            yield compare(title, one, ratio, chat.NAMES, lambda x: rate(x["rate"]))
            if kind == "int8" and "llama.cpp" in speeds:
                ratio = speedup({k: [1 / x for x in case["tokens_per_second"][k]] for k in (kind, "llama.cpp")}, kind)
                yield compare(f"{title}, llama.cpp's 4 bits", one, ratio, chat.NAMES, lambda x: rate(x["rate"]))
    elif name == "rollouts":
        seconds, settings = case["seconds"], case["settings"]
        padded = seconds[rollouts.PADDED]
        for way in (x for x in seconds if x != rollouts.PADDED):
            ratio = speedup({OURS: seconds[way], rollouts.PADDED: padded})
            title = f"{settings['slots'] * settings['queue']} answers through {settings['slots']} slots, `{way}`"
            ours, theirs = (f"{statistics.median(x):.1f} s" for x in (seconds[way], padded))
            yield row(title, ours, theirs, "batches of `generate`", ratio)


def compare(
    title: str,
    found: Mapping[str, Mapping[str, Any]],
    ratio: Mapping[str, Any] | None,
    names: Mapping[str, str],
    show: Callable[[Mapping[str, Any]], str],
) -> str:
    """The row of ours and the rival it is compared with."""
    over = ratio["over"] if ratio else None
    share = found[OURS].get("fraction_of_roof")
    return row(title, show(found[OURS]), show(found[over]) if over else "", names[over] if over else "", ratio, share)


def tables(results: Path) -> str:
    """A table for each kind of machine."""
    parts = []
    for folder in sorted(path for path in results.iterdir() if path.is_dir()):
        reports = {
            name: read_json(folder / f"{name}.json") for name in BENCHMARKS if (folder / f"{name}.json").exists()
        }
        if reports:
            lines = [line for name, report in reports.items() for line in rows(name, report)]
            notes = [f"- {line}" for name, report in reports.items() for line in warnings(name, report)]
            parts.append("\n".join([f"### {machine_text(reports)}", "", *HEADER, *lines, "", *notes]))
    return "\n".join(parts)


def machine_text(reports: Mapping[str, Mapping[str, Any]]) -> str:
    """The processor, its cores and the versions of all reports."""
    machines = [report["machine"] for report in reports.values()]
    versions: dict[str, dict[str, None]] = {}
    for machine in machines:
        for name in ("jax", "torch", "transformers", "trl", "llama-cpp-python"):
            if name in machine["versions"]:
                versions.setdefault(name, {})[machine["versions"][name]] = None
    named = [f"{name} {' and '.join(found)}" for name, found in versions.items()]
    return ", ".join([f"{machines[0]['processor']}: {machines[0]['cores']} cores", *named])


def write_page(page: Path, results: Path) -> None:
    """Replace the tables between the page's markers."""
    before, rest = page.read_text(encoding="utf-8").split(MARKERS[0])
    after = rest.split(MARKERS[1])[1]
    write_text(page, f"{before}{MARKERS[0]}\n{tables(results)}\n{MARKERS[1]}{after}")


def main(settings: Settings) -> None:
    for name in settings.only or BENCHMARKS:
        module, own = BENCHMARKS[name]
        changes = {**own, "run": settings.runs / name, "repeats": settings.repeats}
        if module is not rollouts:  # which has no rivals
            changes["torch_python"] = settings.torch_python
        report = module.main(module.Settings(**changes))
        folder = settings.results / folder_name(report["machine"]["processor"])
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / f"{name}.json", without_places(report))
        write_page(settings.page, settings.results)


if __name__ == "__main__":
    cli(main, Settings, {})
