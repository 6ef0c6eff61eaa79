"""Compare every byte of saved models and checkpoints with the sha256 that was written beside them.

python -m jaxgpt.runs.verify runs/assistant         exit status 0: all whole; 1: something is damaged; 2: nothing there
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jaxgpt.errors import UserError
from jaxgpt.runs.checkpoints import read_checkpoint, steps_of
from jaxgpt.runs.saved_model import check_model


def verify(root: Path) -> list[tuple[Path, str]]:
    """(folder, what is wrong with it or "") for each model and checkpoint below `root`. UserError if there is none."""
    found = []
    for path in sorted({root, *(one.parent for one in root.rglob("model.json"))}):
        if (path / "model.json").exists():
            found.append((path, _complaint(check_model, path)))
    for folder in sorted(root.rglob("checkpoints")):
        found += [(step, _complaint(read_checkpoint, step)) for step in reversed(steps_of(folder))]
    if not found:
        raise UserError(f"no saved model and no checkpoint below {root}")
    return found


def _complaint(check: Callable[[Path], Any], folder: Path) -> str:
    try:
        check(folder)
    except UserError as error:
        return str(error)
    return ""


def main(argv: Sequence[str] | None = None) -> int:
    """Prints a line for each; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m jaxgpt.runs.verify", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path, help="anything that holds saved models or checkpoints")
    try:
        found = verify(parser.parse_args(argv).folder)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for folder, complaint in found:
        print(f"DAMAGED  {folder}: {complaint}" if complaint else f"whole    {folder}")
    return int(any(complaint for _, complaint in found))


if __name__ == "__main__":
    sys.exit(main())
