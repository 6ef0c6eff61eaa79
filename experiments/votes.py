"""Import and export votes, and measure how far annotators agree.

    python -m experiments.votes                                          summarise runs/label/votes.sqlite
    python -m experiments.votes --read hh.jsonl                          add the verdicts of a file, in any format below
    python -m experiments.votes --read a.sqlite --votes b.sqlite         add the votes of a database, even a damaged one
    python -m experiments.votes --write out.jsonl --format trl           export all votes

Formats: jaxgpt, trl, trl-implicit, trl-conversational, hh-rlhf, lm-human-preferences, arena (jaxgpt/data/formats.py).
"""

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

from jaxgpt.data import formats, votes
from jaxgpt.errors import UserError
from jaxgpt.runs.cli import cli


@dataclasses.dataclass(frozen=True)
class Settings:
    """Takes seconds."""

    votes: Path = Path("runs/label/votes.sqlite")
    read: Path | None = None  # verdicts to add: a file or a database; adding it again changes nothing
    write: Path | None = None  # a file to write
    format: str = "jaxgpt"  # of the file to write
    annotator: str = "imported"  # for verdicts that name none

    def __post_init__(self) -> None:
        if self.format not in formats.WRITERS:
            raise UserError(f"unknown format {self.format!r}; formats are {', '.join(formats.WRITERS)}")


PRESETS: dict[str, Settings] = {}


def add(source: Path, settings: Settings) -> votes.Store:
    """Add the verdicts of a file or database. They are read before a database is created."""
    if votes.is_database(source):
        other = votes.Store.rescued(source)
        store = votes.Store(settings.votes)
        print(f"{store.add_all(other)} new votes from {source}")
        return store
    verdicts, left_out = formats.read(source)
    store = votes.Store(settings.votes)
    new = formats.import_verdicts(store, verdicts, settings.annotator)
    print(f"{new} new verdicts of {len(verdicts)} from {source}")
    for reason, count in left_out.items():
        print(f"{count} left out: {reason}")
    return store


def main(settings: Settings) -> dict[str, Any]:
    store = add(settings.read, settings) if settings.read else votes.Store(settings.votes, read_only=True)
    everything, tasks = store.votes(), store.tasks()
    kinds = Counter(vote.kind for vote in everything)
    print(
        f"{settings.votes}: {len(everything)} votes on {len(tasks)} prompts ("
        + ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
        + ")"
    )
    for annotator, count in Counter(vote.annotator for vote in everything).most_common():
        theirs = [vote for vote in everything if vote.annotator == annotator]
        steady = votes.agreement(theirs, within=True, tasks=tasks)
        print(f"  {annotator}: {count}" + (f", same favourite when asked again {steady}" if steady else ""))
    between = votes.agreement(everything, tasks=tasks)
    print(f"agreement between annotators: {between or 'no prompt has votes by two annotators yet'}")
    if settings.write:
        rows, lost = formats.write(settings.write, formats.verdicts_in(store), settings.format)
        print(f"{rows} rows in {settings.write}; votes left out, because {settings.format} can't express them: {lost}")
    return {"votes": len(everything), "agreement": between}


if __name__ == "__main__":
    cli(main, Settings, PRESETS)
