"""From raw text to an assistant: all seven stages in order, each in its own folder.

    python -m experiments.assistant                      what `make assistant` runs
    python -m experiments.assistant --run runs/other --preset gpu
    python -m experiments.assistant --labels runs/label/votes.sqlite --run runs/ours      people's votes

A finished stage is not rerun; an interrupted one resumes from its newest checkpoint.
"""

import dataclasses
import time
from pathlib import Path
from typing import Any

import jax

import experiments.dpo
import experiments.ppo
import experiments.preferences
import experiments.pretrain
import experiments.report
import experiments.reward
import experiments.sft
from jaxgpt.data import votes
from jaxgpt.errors import UserError
from jaxgpt.runs.cli import cli


@dataclasses.dataclass(frozen=True)
class Settings:
    """2 CPU cores: 8 minutes and 2.3 GB; results in docs/results.md. Set a stage's field with --ppo.iterations 100."""

    run: Path = Path("runs/assistant")
    pretrain: experiments.pretrain.Settings = experiments.pretrain.PRESETS["laptop"]
    sft: experiments.sft.Settings = experiments.sft.PRESETS["laptop"]
    preferences: experiments.preferences.Settings = experiments.preferences.PRESETS["laptop"]
    reward: experiments.reward.Settings = experiments.reward.PRESETS["laptop"]
    ppo: experiments.ppo.Settings = experiments.ppo.PRESETS["laptop"]
    dpo: experiments.dpo.Settings = experiments.dpo.PRESETS["laptop"]
    report: experiments.report.Settings = experiments.report.PRESETS["laptop"]
    temperature: float = 0.7  # of the policy, in every stage that samples or trains it
    new_tokens: int = 40  # longest answer in tokens, in every stage
    labels: Path | None = None  # a database of people's votes, in place of the simulated annotator's preferences
    seed: int = 0  # added to every stage's own seed
    fresh: bool = False  # run every stage again


STAGES: dict[str, Any] = {
    "pretrain": experiments.pretrain,
    "sft": experiments.sft,
    "preferences": experiments.preferences,
    "reward": experiments.reward,
    "ppo": experiments.ppo,
    "dpo": experiments.dpo,
    "report": experiments.report,
}
PRESETS = {
    name: Settings(
        **{stage: module.PRESETS[name] for stage, module in STAGES.items()}, new_tokens=12 if name == "toy" else 40
    )
    for name in ("laptop", "toy", "gpu")
}


def stage_settings(settings: Settings) -> list[tuple[Any, Any]]:
    """(stage, settings) pairs in order; each stage's folder below `run` feeds the next. People's labels replace the
    preferences stage."""
    root = settings.run
    preferences_files = {"preferences": root / "preferences/train.jsonl", "heldout": root / "preferences/heldout.jsonl"}
    if settings.labels:
        preferences_files = {
            "preferences": votes.part_path(settings.labels, "train"),
            "heldout": votes.part_path(settings.labels, "heldout"),
        }
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
    for name, stage in STAGES.items():
        if settings.labels and name == "preferences":
            continue
        own = getattr(settings, name)
        common: dict[str, Any] = {
            "run": root / name,
            "seed": own.seed + settings.seed,
            "fresh": settings.fresh or own.fresh,
        }
        if name in ("preferences", "report"):
            common |= {"temperature": settings.temperature, "new_tokens": settings.new_tokens}
        elif name == "ppo":
            algorithm = dataclasses.replace(own.ppo, temperature=settings.temperature, new_tokens=settings.new_tokens)
            common |= {"ppo": algorithm}
        elif name == "dpo":
            common |= {"temperature": settings.temperature}
        chosen.append((stage, dataclasses.replace(own, **common, **places[name])))
    return chosen


def main(settings: Settings) -> dict[str, Any]:
    started = time.monotonic()
    if settings.preferences.annotator.wish != "cheerful":
        raise UserError(
            "the report measures sentiment only; set preferences.annotator.wish to cheerful, or use experiments.align"
        )
    experiments.report.heldout_prompts(settings.report)  # if there are too few, fail now rather than at the end
    if settings.labels:
        for part in votes.PARTS:
            votes.read(votes.part_path(settings.labels, part))  # if there are none, fail now rather than half-way
    results = {stage.__name__.rpartition(".")[2]: stage.main(own) for stage, own in stage_settings(settings)}
    minutes = (time.monotonic() - started) / 60
    if jax.process_index() == 0:
        print(
            f"done in {minutes:.1f} minutes. Read {settings.run / 'report/report.html'}, or talk to it: "
            f'make chat ARGS="--model {settings.run / "ppo"}"'
        )
    return results


if __name__ == "__main__":
    cli(main, Settings, PRESETS)
