"""Shared by the sequences of stages, experiments.assistant and experiments.align."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def chain_stages(
    settings: Any, stages: Mapping[str, Any], changes: Mapping[str, Mapping[str, Any]]
) -> list[tuple[Any, Any]]:
    """(stage, settings) pairs in order. A stage's own settings are those that `settings` has under its name; it runs in
    a folder of that name below `run`, with `seed` added to its own and `fresh` if either asks for it, and with the
    `changes` to it, which lead to the folders of the stages before it."""
    chosen = []
    for name, stage in stages.items():
        own = getattr(settings, name)
        common = {
            "run": settings.run / name,
            "seed": own.seed + settings.seed,
            "fresh": settings.fresh or own.fresh,
        }
        chosen.append((stage, dataclasses.replace(own, **common, **changes[name])))
    return chosen


def name_preference_files(root: Path) -> dict[str, Path]:
    """What the preferences stage leaves below `root`, as the settings of the stages that learn from it."""
    return {"preferences": root / "preferences/train.jsonl", "heldout": root / "preferences/heldout.jsonl"}
