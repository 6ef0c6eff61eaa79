"""Preferences of people: a prompt, two or more answers, and which one was chosen, one JSON object a line.

A person can write such a file by hand; only the first three fields are needed:

    {"prompt": "Finish: a film", "answers": ["a film that sings .", "a film ."], "choice": 0}
"""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from jaxgpt.data.jsonl import checked_text, read_rows, write_rows
from jaxgpt.data.tokenizer import Row, Tokenizer, example_ids
from jaxgpt.errors import UserError

Kind = Literal["favourite", "ranking", "tie", "bad", "skip"]  # what a verdict on several answers may be
Tiers = Sequence[Sequence[int]]  # indices of answers, best first; those of one tier are equally good
_FIELDS = ("prompt", "answers", "choice", "ended", "meta")


@dataclasses.dataclass(frozen=True)
class Preference:
    """`answers[choice]` was preferred. `ended[i]` says that answer i closed by itself (was not cut off).

    Two answers may be equal and an answer may be empty. Raises UserError for anything that is no choice among answers.
    """

    prompt: str
    answers: tuple[str, ...]
    choice: int
    ended: tuple[bool, ...] = ()  # empty: all ended
    meta: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        checked_text(self.prompt, "prompt")
        if len(self.answers) < 2:
            raise UserError(f"answers has {len(self.answers)}: nothing to choose from; give two or more")
        for index, answer in enumerate(self.answers):
            checked_text(answer, f"answers[{index}]", blank=True)
        if type(self.choice) is not int or not 0 <= self.choice < len(self.answers):
            raise UserError(f"choice is {self.choice!r}; it must be a whole number from 0 to {len(self.answers) - 1}")
        if not self.ended:
            object.__setattr__(self, "ended", (True,) * len(self.answers))
        if len(self.ended) != len(self.answers) or any(type(flag) is not bool for flag in self.ended):
            raise UserError(f"ended must be {len(self.answers)} times true or false, one for each answer")


def write_preferences(path: Path, preferences: Iterable[Preference]) -> int:
    """Writes the file, whole or not at all, and returns how many preferences it holds."""
    return write_rows(path, (_row(preference) for preference in preferences))


def read_preferences(path: Path) -> Iterator[Preference]:
    """Yields the preferences of a file one at a time. Raises UserError naming file, line and field."""
    found = False
    for where, row in read_rows(path):
        found = True
        yield from_row(row, where)
    if not found:
        raise UserError(f"{path} holds no preferences; write one JSON object a line")


def from_tiers(
    prompt: str, answers: Sequence[str], tiers: Tiers, ended: Sequence[bool] = (), meta: Mapping[str, Any] | None = None
) -> list[Preference]:
    """The choices that a ranking amounts to: a favourite of all, one of those that remain, and so on (Plackett 1975),
    so that the softmax losses of the choices sum to that of the ranking. Each of several that tie is a favourite over
    what is below them (Breslow 1974). No tiers, or a single one: nothing was preferred."""
    found = []
    for place, tier in enumerate(tiers[:-1]):
        below = [i for lower in tiers[place + 1 :] for i in lower]
        for best in tier:
            among = sorted([best, *below])
            texts, flags = tuple(answers[i] for i in among), tuple(ended[i] for i in among) if ended else ()
            found.append(Preference(prompt, texts, among.index(best), flags, dict(meta or {})))
    return found


@dataclasses.dataclass(frozen=True)
class Ranking:
    """A preference as ids: one row of prompt and answer for each candidate, and the index of the favourite."""

    rows: tuple[Row, ...]
    choice: int


def rank_ids(tok: Tokenizer, preferences: Iterable[Preference]) -> list[Ranking]:
    """The preferences in token ids. An answer that did not end has no closing </answer>."""
    rankings = []
    for preference in preferences:
        rows: list[Row] = []
        for answer, ended in zip(preference.answers, preference.ended, strict=True):
            ids, roles = example_ids(tok, preference.prompt, answer)
            cut = not ended and sum(roles) > 1  # an empty answer keeps its tag: there must be a token to score
            rows.append((ids[:-1], roles[:-1]) if cut else (ids, roles))
        rankings.append(Ranking(tuple(rows), preference.choice))
    return rankings


def sizes(rankings: Sequence[Ranking]) -> tuple[int, int, int]:
    """The most candidates of a prompt, and the tokens of the longest row and of the longest answer."""
    rows = [row for ranking in rankings for row in ranking.rows]
    candidates = max(len(ranking.rows) for ranking in rankings)
    return candidates, max(len(ids) for ids, _ in rows), max(sum(roles) for _, roles in rows)


def fit_rankings(rankings: Sequence[Ranking], length: int) -> tuple[list[Ranking], int]:
    """The rankings of which every candidate has at most `length` tokens, and how many were dropped."""
    kept = [ranking for ranking in rankings if max(len(ids) for ids, _ in ranking.rows) <= length]
    if not kept:
        raise UserError(f"none of {len(rankings)} preferences fits {length} tokens; use a longer block")
    return kept, len(rankings) - len(kept)


def _row(preference: Preference) -> dict[str, Any]:
    row = dataclasses.asdict(preference)
    if all(preference.ended):
        del row["ended"]
    if not preference.meta:
        del row["meta"]
    return row


def from_row(row: Mapping[str, Any], where: str) -> Preference:
    """The preference in one row of a file."""
    for name in ("prompt", "answers", "choice"):
        if name not in row:
            raise UserError(f"{where}: no field {name!r}; prompt, answers and choice are needed")
    if unknown := [name for name in row if name not in _FIELDS]:
        raise UserError(f"{where}: unknown field {unknown[0]!r}; fields are {', '.join(_FIELDS)} (notes go into meta)")
    for name, kind, word in (("answers", list, "a list"), ("ended", list, "a list"), ("meta", dict, "an object")):
        if not isinstance(row.get(name, kind()), kind):
            raise UserError(f"{where}: {name} is {type(row[name]).__name__}, not {word}")
    if "ended" in row and not row["ended"]:
        raise UserError(f"{where}: ended is empty; leave it out when every answer ended")
    try:
        return Preference(
            prompt=row["prompt"],
            answers=tuple(row["answers"]),
            choice=row["choice"],
            ended=tuple(row.get("ended", ())),
            meta=row.get("meta", {}),
        )
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
