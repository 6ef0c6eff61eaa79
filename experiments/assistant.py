"""From raw text to an assistant: all seven stages in order, each in its own folder.

    python -m experiments.assistant                      what `make assistant` runs
    python -m experiments.assistant --run runs/other --preset gpu
    python -m experiments.assistant --labels runs/label/votes.sqlite --run runs/ours      learns from people's votes

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
from experiments.stages import chain_stages, chat_command, check_preference_files, name_preference_files
from jaxgpt.config import Count, Positive, Seed, check_settings
from jaxgpt.errors import UserError
from jaxgpt.models.sharding import RowShard
from jaxgpt.runs.cli import cli


@dataclasses.dataclass(frozen=True)
class Settings:
    """10 minutes and 2.3 GB on 2 CPU cores (docs/results.md). Set a stage's field like this: --ppo.iterations 100."""

    run: Path = Path("runs/assistant")
    pretrain: experiments.pretrain.Settings = experiments.pretrain.PRESETS["laptop"]
    sft: experiments.sft.Settings = experiments.sft.PRESETS["laptop"]
    preferences: experiments.preferences.Settings = experiments.preferences.PRESETS["laptop"]
    reward: experiments.reward.Settings = experiments.reward.PRESETS["laptop"]
    ppo: experiments.ppo.Settings = experiments.ppo.PRESETS["laptop"]
    dpo: experiments.dpo.Settings = experiments.dpo.PRESETS["laptop"]
    report: experiments.report.Settings = experiments.report.PRESETS["laptop"]
    temperature: Positive = 0.7  # of the policy, in every stage that samples or trains it
    new_tokens: Count = 40  # maximum length of an answer in tokens, in every stage
    labels: Path | None = None  # a database of people's votes, used instead of the simulated annotator's preferences
    seed: Seed = 0  # added to every stage's own seed
    fresh: bool = False  # run every stage again

    def __post_init__(self) -> None:
        check_settings(self)


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
    """(stage, settings) pairs in order; each stage has a folder below `run`, which later stages read. With `labels`,
    people's votes replace the preferences stage."""
    root, files = settings.run, name_preference_files(settings.run, settings.labels)
    sampling: dict[str, Any] = {"temperature": settings.temperature, "new_tokens": settings.new_tokens}
    changes: dict[str, dict[str, Any]] = {
        "pretrain": {},
        "sft": {"model": root / "pretrain"},
        "preferences": {"model": root / "sft", **sampling},
        "reward": {"model": root / "sft", **files},
        "ppo": {
            "model": root / "sft",
            "reward": root / "reward",
            "ppo": dataclasses.replace(settings.ppo.ppo, **sampling),
        },
        "dpo": {"model": root / "sft", "temperature": settings.temperature, **files},
        "report": {"stages": root, **sampling},
    }
    return chain_stages(settings, STAGES, changes)


def main(settings: Settings) -> dict[str, Any]:
    started = time.monotonic()
    if settings.preferences.annotator.wish != "cheerful":
        raise UserError(
            "the report measures sentiment only; set preferences.annotator.wish to cheerful, or use experiments.align"
        )
    experiments.report.heldout_prompts(settings.report)  # if there are too few, fail now rather than at the end
    stages = stage_settings(settings)
    if settings.labels:  # the tokenizer and the text that this prepares are cached for the first stage
        tok = experiments.pretrain.prepare(settings.pretrain, RowShard(0, 1)).tok
        check_preference_files(stages, tok, settings.pretrain.model.block)
    results = {stage.__name__.rpartition(".")[2]: stage.main(own) for stage, own in stages}
    minutes = (time.monotonic() - started) / 60
    if jax.process_index() == 0:
        print(
            f"done in {minutes:.1f} minutes. Read {settings.run / 'report/report.html'}, or talk to the assistant: "
            f"{chat_command(settings.run / 'ppo')}"
        )
    return results


if __name__ == "__main__":
    cli(main, Settings, PRESETS)
