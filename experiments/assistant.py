"""From language model to assistant: all seven stages in order, each in its own folder.

    python -m experiments.assistant                      what `make assistant` runs
    python -m experiments.assistant --run runs/other --preset gpu

A stage that is done is not run again; a stage that was interrupted starts again.
"""

import dataclasses
import time
from pathlib import Path
from typing import Any

from experiments import dpo, ppo, preferences, pretrain, report, reward, sft
from jaxgpt.cli import cli
from jaxgpt.process import print_device


@dataclasses.dataclass(frozen=True)
class Settings:
    """2 CPU cores: see docs/results.md for time and scores. Fields of a stage: --ppo.iterations 100."""

    run: Path = Path("runs/assistant")
    pretrain: pretrain.Settings = pretrain.PRESETS["laptop"]
    sft: sft.Settings = sft.PRESETS["laptop"]
    preferences: preferences.Settings = preferences.PRESETS["laptop"]
    reward: reward.Settings = reward.PRESETS["laptop"]
    ppo: ppo.Settings = ppo.PRESETS["laptop"]
    dpo: dpo.Settings = dpo.PRESETS["laptop"]
    report: report.Settings = report.PRESETS["laptop"]
    seed: int = 0  # added to every stage's own seed
    fresh: bool = False  # run every stage again


STAGES = (pretrain, sft, preferences, reward, ppo, dpo, report)
PRESETS = {
    name: Settings(**{stage.__name__.split(".")[-1]: stage.PRESETS[name] for stage in STAGES})
    for name in ("laptop", "toy", "gpu")
}


def stage_settings(settings: Settings) -> list[tuple[Any, Any]]:
    """(stage, its settings) in order, with folders below `run` that lead from one stage to the next."""
    root = settings.run
    preferences_files = {"preferences": root / "preferences/train.jsonl", "heldout": root / "preferences/heldout.jsonl"}
    places: dict[str, dict[str, Any]] = {
        "pretrain": {},
        "sft": {"model": root / "pretrain"},
        "preferences": {"model": root / "sft"},
        "reward": {"model": root / "sft", **preferences_files},
        "ppo": {"model": root / "sft", "reward": root / "reward"},
        "dpo": {"model": root / "sft", **preferences_files},
        "report": {"stages": root},
    }
    chosen = []
    for stage in STAGES:
        name = stage.__name__.split(".")[-1]
        own = getattr(settings, name)
        common = {"run": root / name, "seed": own.seed + settings.seed, "fresh": settings.fresh or own.fresh}
        chosen.append((stage, dataclasses.replace(own, **common, **places[name])))
    return chosen


def main(settings: Settings) -> dict[str, Any]:
    print_device()
    started = time.monotonic()
    results = {stage.__name__.split(".")[-1]: stage.main(own) for stage, own in stage_settings(settings)}
    minutes = (time.monotonic() - started) / 60
    print(f"done in {minutes:.1f} minutes. Read {settings.run / 'report/report.html'}, or talk to it: make chat")
    return results


if __name__ == "__main__":
    cli(main, Settings, PRESETS)
