"""Check every byte of runs, saved models and checkpoints against their stored sha256.

python -m jaxgpt.runs.verify runs/assistant       exit status 0: all intact; 1: something is damaged; 2: nothing found
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jaxgpt.errors import UserError
from jaxgpt.runs.checkpoints import list_checkpoints, read_checkpoint
from jaxgpt.runs.endings import plain_endings
from jaxgpt.runs.run import check_metrics, check_outputs, read_done, read_settings
from jaxgpt.runs.saved_model import check_model


def verify(root: Path) -> list[tuple[Path, str]]:
    """(folder, what is wrong with it or "") for each run, model and checkpoint below `root`, and each folder that can't
    be read. UserError if there is none."""
    unread: list[OSError] = []
    for _ in os.walk(root, onerror=unread.append):
        pass
    closed = {Path(error.filename): f"it can't be read ({error.strerror})" for error in unread if root.exists()}
    found = list(closed.items())
    found += [(path.parent, _problem(_check_run, path.parent)) for path in sorted(root.rglob("settings.json"))]
    for path in sorted({root, *(one.parent for one in root.rglob("model.json"))}):
        if (path / "model.json").exists():
            found.append((path, _problem(check_model, path)))
    for folder in sorted(set(root.rglob("checkpoints")) - closed.keys()):
        if not (folder.parent / "done.json").exists():  # a finished run needs none; some may be half removed
            found += _check_checkpoints(folder)
    if not found:
        raise UserError(f"no run, saved model or checkpoint below {root}; give a folder that holds one")
    return found


def _check_run(folder: Path) -> None:
    read_settings(folder)
    if (folder / "done.json").exists():
        check_outputs(folder, read_done(folder), measured=True)


def _check_checkpoints(folder: Path) -> list[tuple[Path, str]]:
    """Each checkpoint of an unfinished run, and its metrics if they differ from those at the newest good one."""
    good: list[dict[str, Any]] = []

    def read(step: Path) -> None:
        good.append(read_checkpoint(step))

    found = [(step, _problem(read, step)) for step in reversed(list_checkpoints(folder))]
    metrics = folder.parent / "metrics.jsonl"
    changed = _problem(lambda path: check_metrics(path, good[-1]["position"]), metrics) if good else ""
    return [*found, (metrics, changed)] if changed else found


def _problem(check: Callable[[Path], Any], folder: Path) -> str:
    try:
        check(folder)
    except UserError as error:
        return str(error)
    except OSError as error:
        return f"{error.filename or folder} can't be read ({error.strerror})"
    return ""


def main(argv: Sequence[str] | None = None) -> int:
    """Print one line for each run, model or checkpoint and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m jaxgpt.runs.verify", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path, help="anything that holds runs, saved models or checkpoints")
    with plain_endings():
        found = verify(parser.parse_args(argv).folder)
        for folder, problem in found:
            print(f"DAMAGED  {folder}: {problem}" if problem else f"intact   {folder}")
    return int(any(problem for _, problem in found))


if __name__ == "__main__":
    sys.exit(main())
