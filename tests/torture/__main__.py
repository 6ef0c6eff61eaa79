"""Try to make jaxgpt take a false file for a true one, lose work, or end in a traceback.

    python -m tests.torture                             every kind, with a seed of its own: about half an hour
    python -m tests.torture --seconds 60                the quick kinds, with the same time for each
    python -m tests.torture --kinds votes --seed 7 --cases 500

Prints a table: kind, cases, held. Ends with status 1 if any case was not held, after showing the
first of each kind.
"""

import argparse
import contextlib
import importlib
import io
import itertools
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from tests.torture.harness import Kind

MODULES = sorted(
    path.stem
    for path in Path(__file__).parent.glob("*.py")
    if path.stem not in ("__main__", "harness") and "_" not in path.stem
)


def kinds() -> dict[str, Kind]:
    """Every kind by name, those of one module together: each module has its own KINDS."""
    found: dict[str, Kind] = {}
    for name in MODULES:
        found |= importlib.import_module(f"tests.torture.{name}").KINDS
    return found


def torture(kind: Kind, seed: str, cases: int, seconds: float) -> list[str]:
    """The outcomes of a kind, until either limit is reached."""
    end = time.monotonic() + seconds
    found = []
    said = io.StringIO()  # what runs say on the terminal
    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.redirect_stdout(said),
        contextlib.redirect_stderr(said),
        contextlib.closing(kind.outcomes(random.Random(seed), Path(folder))) as outcomes,  # undoes what it has patched
    ):
        for outcome in itertools.islice(outcomes, cases):
            found.append(outcome)
            if time.monotonic() > end:
                break
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.torture", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--cases", type=int, help="of each kind; default: its own number")
    parser.add_argument("--seconds", type=float, help="in all, for the quick kinds alone")
    parser.add_argument("--kinds", nargs="+", default=[""], help="parts of their names")
    options = parser.parse_args(argv)
    chosen = {name: kind for name, kind in kinds().items() if any(part in name for part in options.kinds)}
    if options.seconds:
        chosen = {name: kind for name, kind in chosen.items() if kind.quick}
    if not chosen:
        parser.error(f"no such kind; there are: {'; '.join(kinds())}")
    print(f"seed {options.seed}\n\n| kind | cases | held |\n|---|---|---|", flush=True)
    failures = []
    for name, kind in chosen.items():
        share = options.seconds / len(chosen) if options.seconds else float("inf")
        outcomes = torture(kind, f"{options.seed} {name}", options.cases or kind.cases, share)
        wrong = [outcome for outcome in outcomes if outcome]
        print(f"| {name} | {len(outcomes):,} | {1 - len(wrong) / max(len(outcomes), 1):.1%} |", flush=True)
        failures += [f"{name}: {wrong[0]}"] if wrong else []
    print("\n" + "\n\n".join(failures) if failures else "")
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
