"""What experiments.assistant and experiments.align share: both run a sequence of stages."""

import dataclasses
import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from jaxgpt.data import votes
from jaxgpt.data.tokenizer import Tokenizer


def chat_command(model: Path) -> str:
    """The command to talk to a model, quoted for the shell."""
    return f'make chat ARGS="--model {shlex.quote(str(model))}"'


def chain_stages(
    settings: Any, stages: Mapping[str, Any], changes: Mapping[str, Mapping[str, Any]]
) -> list[tuple[Any, Any]]:
    """(stage, settings) pairs in order. Each stage starts from its own settings, the field of `settings` with its name.
    It gets a folder of that name below `settings.run`; `settings.seed` is added to its seed; it is rerun if either
    `fresh` is set; and `changes[name]` replaces further fields, such as the folders of earlier stages. People's votes
    (`settings.labels`) take the place of the preferences stage."""
    chosen = []
    for name, stage in stages.items():
        if name == "preferences" and settings.labels:
            continue
        own = getattr(settings, name)
        common = {
            "run": settings.run / name,
            "seed": own.seed + settings.seed,
            "fresh": settings.fresh or own.fresh,
        }
        chosen.append((stage, dataclasses.replace(own, **common, **changes[name])))
    return chosen


def name_preference_files(root: Path, labels: Path | None = None) -> dict[str, Path]:
    """The files to learn preferences from and to test them on, under the names of the settings that read them: written
    below `root` by the preferences stage, or the two parts of a database of people's votes."""
    if labels is None:
        return {"preferences": root / "preferences/train.jsonl", "heldout": root / "preferences/heldout.jsonl"}
    files = dict(zip(("preferences", "heldout"), (votes.part_path(labels, part) for part in votes.PARTS), strict=True))
    for file in files.values():
        votes.read(file)  # if there are none, fail now rather than halfway
    return files


def check_preference_files(stages: Iterable[tuple[Any, Any]], tok: Tokenizer, block: int) -> None:
    """Fail now rather than halfway if a stage could learn from none of its preferences, or be tested on none: they are
    too few, or too long for a model of `block` tokens."""
    for stage, own in stages:
        if hasattr(own, "preferences"):
            stage.load_data(own, tok, block)
