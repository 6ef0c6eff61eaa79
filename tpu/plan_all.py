"""Every kind of machine planned once: `make plan-all`.

    python -m tpu.plan_all                              all whose compiler is installed here; others are skipped
    python -m tpu.plan_all --only v5e:4x4 h100:1

Writes a file per machine to tpu/results, and from all files the table of docs/planning.md. Its last column is what
`tpu.measure` measured (tpu/results/measured) with the same model, sizes and mesh.
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from jaxgpt.config import ModelConfig
from jaxgpt.errors import UserError
from jaxgpt.files import read_json, suggest_name, write_json, write_text
from jaxgpt.models.sharding import MeshConfig
from jaxgpt.runs.cli import cli, parse, settings_from_json
from tpu import hardware, plan
from tpu.estimates import PUBLISHED
from tpu.settings import PRESETS
from tpu.settings import Settings as PlanSettings

HERE = Path(__file__).parent
MACHINES = {  # and the flags of `tpu.plan`: what each device holds without remat; a TPU's compiler needs scanned layers
    # to finish in minutes
    "v4:2x2x2": "--batch 256",
    "v5e:4x4": "--batch 256",
    "v5p:2x2x2": "--batch 256",
    "v6e:4x4": "--batch 256",
    "tpu7x:2x2x2": "--batch 256",
    "h100:1": "--batch 32 --model.no-scan",
    "h100:8": "--batch 256 --model.no-scan",
    "2*v5e:4x4": "--batch 512 --steps train",
    "v5p:16x16x16": "--batch 8192 --preset gpt2-xl --steps train --mesh.fsdp 64",
}
COLUMNS = (
    *("machine", "step", "mesh", "memory per device", "sent per device", "kernels", "at least / without overlap"),
    *("MFU at most / without overlap (published)", "measured"),
)
PATIENCE = 2 * 3600  # seconds for one compilation; generous, since nobody waits for it
MARKERS = "<!-- from tpu/results, by make plan-all -->\n", "<!-- end of plan-all -->\n"


@dataclasses.dataclass(frozen=True)
class Settings:
    """Takes 10 to 20 minutes per machine on one core."""

    only: tuple[str, ...] = ()  # machines to plan; default: all
    toy: bool = False  # plan a toy model, to try the command itself: about a minute per machine
    results: Path = HERE / "results"
    page: Path = HERE.parent / "docs/planning.md"

    def __post_init__(self) -> None:
        for name in self.only:
            if name not in MACHINES:
                raise UserError(
                    f"only: unknown machine {name!r}{suggest_name(name, MACHINES)}; has {', '.join(MACHINES)}"
                )


def words_for(topology: str, toy: bool = False) -> list[str]:
    """The flags of `tpu.plan` for a machine."""
    words = ["--topology", topology, *MACHINES[topology].split(), "--tries", "1"]
    return [*words, "--preset", "toy", "--batch", "8192"] if toy else words


def summary(words: list[str], found: Mapping[str, Any]) -> dict[str, Any]:
    """What a plan found, without what differs from run to run."""
    settings = settings_from_json(PlanSettings, found["settings"])
    steps = {}
    for step, plans in found["steps"].items():
        (one,) = plans["meshes"]
        steps[step] = {"size": plan.sizes_text(settings, step), **one}
        steps[step].pop("seconds", None)  # the compile time
        if "parts" in one:
            steps[step]["parts"] = one["parts"][:8]  # what costs most
    return {
        "topology": settings.topology,
        "command": f"python -m tpu.plan {' '.join(words)}",
        "versions": found["versions"],
        "machine": found["machine"],
        "steps": rounded(steps),
    }


def rounded(value: Any) -> Any:
    """Numbers with 4 significant digits; integers below a million are counts and stay as they are."""
    if isinstance(value, Mapping):
        return {name: rounded(x) for name, x in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(x) for x in value]
    if isinstance(value, float):
        return float(f"{value:.4g}")
    return int(float(f"{value:.4g}")) if isinstance(value, int) and value >= 10**6 else value


def file_of(results: Path, topology: str) -> Path:
    return results / f"{topology.replace('*', 'x').replace(':', '-')}.json"


def rows(results: Path) -> Iterator[list[str]]:
    """The table's rows, from the files in `results`."""
    measured = [read_json(path) for path in sorted((results / "measured").glob("*.json"))]
    for topology in MACHINES:
        path = file_of(results, topology)
        if not path.exists():
            continue
        found = read_json(path)
        kind = "gpu" if hardware.parse(topology).is_gpu else "tpu"
        here = [one for one in measured if one.get("topology") == topology and _same_model(one, topology)]
        for step, one in found["steps"].items():
            same = [m["steps"][step] for m in here if step in m["steps"]]
            seconds = [m["seconds"] for m in same if "seconds" in m and all(m[x] == one[x] for x in ("size", "mesh"))]
            cells = step_cells(step, one, found["machine"]["capacity"], PUBLISHED[kind][0])
            yield [topology, f"{step}: {one['size']}", *cells, ", ".join(map(plan.time_text, seconds))]


def _same_model(measured: Mapping[str, Any], topology: str) -> bool:
    """Whether it is the planned model. Scanned layers may differ: `tpu.measure` scans those of PPO."""
    planned = parse(PlanSettings, PRESETS, words_for(topology)).model
    model = settings_from_json(ModelConfig, measured["settings"]["model"])
    return dataclasses.replace(model, scan=planned.scan) == planned


def step_cells(step: str, one: Mapping[str, Any], capacity: float, published: str) -> list[str]:
    mesh = plan.mesh_text(MeshConfig(**one["mesh"]))
    if not one.get("fits"):
        return [mesh, one.get("failed") or f"does not fit: {plan.size_text(one['needed'])}", *[""] * 4]
    memory = sum(one["memory"].values())
    sent = sum(kind["sent"] for kind in one["collectives"].values())
    (least, most), (high, low) = one["estimate"]["seconds"], one["estimate"]["mfu"]
    return [
        mesh,
        f"{plan.size_text(memory)} of {plan.size_text(capacity)}",
        plan.size_text(sent) if sent else "–",
        f"{one['kernels']:,}",
        f"{plan.time_text(least)} / {plan.time_text(most)}",
        f"{high:.0%} / {low:.0%} ({published})" if step == "train" else "",
    ]


def table(results: Path) -> str:
    lines = [list(COLUMNS), ["---"] * len(COLUMNS), *rows(results)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def write_table(results: Path, page: Path) -> None:
    """Replace the table between the page's markers. UserError if it has none."""
    text = page.read_text(encoding="utf-8")
    pattern = re.compile(f"({re.escape(MARKERS[0])}).*?({re.escape(MARKERS[1])})", re.DOTALL)
    if len(pattern.findall(text)) != 1:
        raise UserError(f"{page} does not have the lines {MARKERS[0].strip()} and {MARKERS[1].strip()} once each")
    write_text(page, pattern.sub(lambda found: f"{found[1]}\n{table(results)}\n{found[2]}", text))


def main(settings: Settings) -> None:
    for topology in settings.only or MACHINES:
        words = words_for(topology, settings.toy)
        chosen = dataclasses.replace(parse(PlanSettings, PRESETS, words), patience=PATIENCE)
        missing = plan.missing_compiler(chosen.machine)
        if missing:
            plan.say(f"{topology}: skipped, {missing}\n")
            continue
        settings.results.mkdir(parents=True, exist_ok=True)
        write_json(file_of(settings.results, topology), summary(words, plan.main(chosen)))
        write_table(settings.results, settings.page)
        plan.say("")


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    cli(main, Settings, {"all": Settings()})
