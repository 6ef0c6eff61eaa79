"""The contents of a votes database, and which of its rows can't be used: damaged ones, and those that jaxgpt can't have
written."""

import dataclasses
import hashlib
import itertools
import json
import math
import sqlite3
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, get_args

from jaxgpt.data import votes_file
from jaxgpt.data.comparisons import Kind
from jaxgpt.data.jsonl import checked_text
from jaxgpt.errors import UserError, first_line

LONGEST_TEXT = 16 * 2**20  # characters in a field of a row
CHANGED = "its checksum differs"


@dataclasses.dataclass(frozen=True)
class Answer:
    """One candidate and where it comes from: a model with its sampling settings and seed, a file or a person."""

    text: str
    ended: bool = True  # False: cut off before the end token
    origin: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        checked_text(self.text, "an answer", blank=True)


@dataclasses.dataclass(frozen=True)
class Task:
    """A prompt and its candidates; the id is a hash of both, so adding a task again changes nothing."""

    prompt: str
    answers: tuple[Answer, ...]
    doubt: float = 0.0  # the reward model's uncertainty: the highest comes first
    id: str = ""

    def __post_init__(self) -> None:
        checked_text(self.prompt, "prompt")
        if len(self.answers) < 2:
            raise UserError(f"answers has length {len(self.answers)}: nothing to choose from; give two or more")
        if not self.id:
            content = json.dumps([self.prompt, [answer.text for answer in self.answers]])
            object.__setattr__(self, "id", hashlib.sha256(content.encode()).hexdigest()[:24])


@dataclasses.dataclass(frozen=True)
class Vote:
    """One verdict. `shown` is the order on the screen; `tiers` hold the same answers, best first."""

    id: str
    task: str
    annotator: str
    kind: Kind
    tiers: tuple[tuple[int, ...], ...]
    shown: tuple[int, ...]
    seconds: float | None = None  # from seeing the task to deciding
    time: float = 0.0  # Unix time in seconds; 0: when it is stored
    again: bool = False  # this annotator had voted on it before: counts for agreement only

    def __post_init__(self) -> None:
        for name in ("id", "task", "annotator"):
            value = checked_text(getattr(self, name), name)
            if len(value) > 64:
                raise UserError(f"{name} has {len(value)} characters; use at most 64")
        if self.kind not in get_args(Kind):
            raise UserError(f"kind is {self.kind!r}; it must be one of {', '.join(get_args(Kind))}")
        placed = sorted(i for tier in self.tiers for i in tier)
        if len(self.shown) < 2 or placed != sorted(set(self.shown)) or len(placed) != len(self.shown):
            raise UserError("tiers must hold each of the two or more answers shown exactly once")
        sizes = [len(tier) for tier in self.tiers]
        ranked = self.kind in ("favourite", "ranking")
        if 0 in sizes or (ranked and len(sizes) < 2) or (not ranked and len(sizes) != 1):
            raise UserError("tiers don't fit this kind: a favourite or a ranking has two or more, any other kind one")
        if self.seconds is not None and not 0 <= self.seconds < 1e7:
            raise UserError(f"seconds is {self.seconds}; give how long the decision took, or leave it out")


# ---- rows ----


class Fault(NamedTuple):
    """A row that can't be used."""

    table: str
    number: int
    id: Any
    why: str

    def __str__(self) -> str:
        return f"{self.table} row {self.number} ({self.id!r:.40}): {self.why}"


def find_faults(db: sqlite3.Connection) -> list[Fault]:
    """The rows that were altered, that are invalid, or that refer to such a row."""
    faults: list[Fault] = []
    rows: dict[str, list[tuple[int, dict[str, Any]]]] = {table: [] for table in votes_file.COLUMNS}
    unsure: set[tuple[Any, Any]] = set()  # (task, annotator) of votes that a damaged row may have undone
    undone: set[Any] = set()  # the ids of such votes
    for table, found in rows.items():
        for number, row, intact in votes_file.read(db, table):
            if why := _why_invalid(table, row) if intact else CHANGED:
                faults.append(Fault(table, number, row["id"], why))
                if table == "votes" and (row["undoes"] is not None or row["kind"] not in get_args(Kind)):
                    unsure.add((row["task"], row["annotator"]))
                    undone.add(row["undoes"])
            else:
                found.append((number, row))
    places: dict[str, list[int]] = {row["id"]: [] for _, row in rows["tasks"]}
    for _, row in rows["answers"]:
        places.get(row["task"], []).append(row["position"])
    whole = {id_: len(at) for id_, at in places.items() if len(at) > 1 and sorted(at) == [*range(len(at))]}
    for number, row in rows["tasks"]:
        if row["id"] not in whole:
            faults.append(Fault("tasks", number, row["id"], "not all of its answers are there"))
    for number, row in rows["answers"]:
        if row["task"] not in whole:
            faults.append(Fault("answers", number, row["id"], "its task is missing"))
    for number, row in rows["votes"]:
        if why := _why_unusable(row, whole, undone, unsure):
            faults.append(Fault("votes", number, row["id"], why))
    return faults


def _why_unusable(
    row: Mapping[str, Any], whole: Mapping[Any, int], undone: set[Any], unsure: set[tuple[Any, Any]]
) -> str:
    """Why a valid vote can't be used because of other rows, or an empty string. `whole`: how many answers each complete
    task has."""
    if row["task"] not in whole:
        return "its task is missing"
    if row["kind"] == "undo":
        return ""
    shown = json.loads(row["shown"])
    if not 0 <= min(shown) <= max(shown) < whole[row["task"]]:
        return "it names answers that its task doesn't have"
    if row["id"] in undone or (row["task"], row["annotator"]) in unsure:
        return "it may have been undone by a row that is damaged"
    return ""


def _why_invalid(table: str, row: Mapping[str, Any]) -> str:
    """Why a row by itself can't have been written by jaxgpt, or an empty string."""
    try:
        for name, value in row.items():
            if isinstance(value, str) and len(value) > LONGEST_TEXT:
                return f"{name} is longer than {LONGEST_TEXT >> 20} million characters"
            if isinstance(value, str):
                checked_text(value, name, blank=True)
        if not (isinstance(row.get("time", 0.0), float | int) and math.isfinite(row.get("time", 0.0))):
            return "time is not a number"
        _CHECKS[table](row)
        return ""
    except (ValueError, TypeError, LookupError, RecursionError) as error:
        return first_line(error, 120)


def _check_task(row: Mapping[str, Any]) -> None:
    for name in ("id", "prompt"):
        checked_text(row[name], name)
    if not (isinstance(row["doubt"], float) and math.isfinite(row["doubt"])):
        raise UserError("doubt is not a number")


def answer_of(row: Mapping[str, Any]) -> Answer:
    """The answer in a row."""
    for name in ("task", "id", "origin"):
        checked_text(row[name], name)
    origin = json.loads(row["origin"])
    if type(row["position"]) is not int or row["ended"] not in (0, 1) or not isinstance(origin, dict):
        raise UserError("position, ended or origin is of the wrong type")
    return Answer(row["text"], bool(row["ended"]), origin)


def vote_of(row: Mapping[str, Any]) -> Vote:
    """The vote in a row. UserError if the row is invalid or undoes a vote."""
    tiers, shown = json.loads(row["tiers"]), json.loads(row["shown"])
    if not all(type(i) is int for i in [*shown, *itertools.chain(*tiers)]) or row["again"] not in (0, 1):
        raise UserError("tiers, shown or again is of the wrong type")
    if row["undoes"] is not None or not isinstance(row["seconds"], float | None):
        raise UserError("undoes or seconds does not fit a vote")
    return Vote(
        id=row["id"],
        task=row["task"],
        annotator=row["annotator"],
        kind=row["kind"],
        tiers=tuple(map(tuple, tiers)),
        shown=tuple(shown),
        seconds=row["seconds"],
        time=row["time"],
        again=bool(row["again"]),
    )


def _check_vote(row: Mapping[str, Any]) -> None:
    if row["kind"] != "undo":
        vote_of(row)
        return
    for name in ("id", "task", "annotator", "undoes"):
        checked_text(row[name], name)


def _check_rating(row: Mapping[str, Any]) -> None:
    for name in ("id", "prompt"):
        checked_text(row[name], name)
    checked_text(row["answer"], "answer", blank=True)
    if row["stars"] not in range(1, 6):
        raise UserError("stars must be 1 to 5")


_CHECKS: Mapping[str, Callable[[Mapping[str, Any]], Any]] = {
    "tasks": _check_task,
    "answers": answer_of,
    "votes": _check_vote,
    "ratings": _check_rating,
}


def list_briefly(texts: Sequence[str]) -> str:
    """The first few of several texts, and how many more there are."""
    return "; ".join(texts[:5]) + (f"; and {len(texts) - 5:,} more" if len(texts) > 5 else "")
