"""What experiments.assistant and experiments.align share: both run a sequence of stages."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def chain_stages(
    settings: Any, stages: Mapping[str, Any], changes: Mapping[str, Mapping[str, Any]]
) -> list[tuple[Any, Any]]:
    """(stage, settings) pairs in order. Each stage starts from its own settings, the field of `settings` with its name.
    It gets a folder of that name below `settings.run`; `settings.seed` is added to its seed; it is rerun if either
    `fresh` is set; and `changes[name]` replaces further fields, such as the folders of earlier stages."""
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
    """The files that the preferences stage writes below `root`, under the names of the settings that read them."""
    return {"preferences": root / "preferences/train.jsonl", "heldout": root / "preferences/heldout.jsonl"}
