"""Human preferences: a prompt, two or more answers and the index of the chosen one, one JSON object per line.

Such a file can be written by hand; only these three fields are required:

    {"prompt": "Finish: a film", "answers": ["a film that sings .", "a film ."], "choice": 0}

"choice": "tie" says that all answers are equally good.
"""

import dataclasses
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

from jaxgpt.data.jsonl import checked_text, read_rows, write_rows
from jaxgpt.data.templates import example_ids
from jaxgpt.data.tokenizer import Row, Tokenizer
from jaxgpt.errors import UserError
from jaxgpt.losses import TIE

Kind = Literal["favourite", "ranking", "tie", "bad", "skip"]  # what an annotator can say about several answers
LEFT_OUT: Mapping[str, str] = {"bad": "all bad", "skip": "skipped"}  # kinds that train nothing, in words
Tiers = Sequence[Sequence[int]]  # indices of answers, best first; answers in one tier are tied
_FIELDS = ("prompt", "answers", "choice", "ended", "meta")


@dataclasses.dataclass(frozen=True)
class Preference:
    """`answers[choice]` was preferred, or all were found equally good. `ended[i]` is False if answer i was cut off.

    Answers may be identical or empty. Raises UserError if a field is invalid.
    """

    prompt: str
    answers: tuple[str, ...]
    choice: int | Literal["tie"]
    ended: tuple[bool, ...] = ()  # empty: all answers ended
    meta: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        checked_text(self.prompt, "prompt")
        if len(self.answers) < 2:
            raise UserError(f"answers has length {len(self.answers)}: nothing to choose from; give two or more")
        for index, answer in enumerate(self.answers):
            checked_text(answer, f"answers[{index}]", blank=True)
        if self.choice != "tie" and (type(self.choice) is not int or not 0 <= self.choice < len(self.answers)):
            raise UserError(
                f'choice is {self.choice!r}; it must be a whole number from 0 to {len(self.answers) - 1}, or "tie"'
            )
        if not self.ended:
            object.__setattr__(self, "ended", (True,) * len(self.answers))
        if len(self.ended) != len(self.answers) or any(type(flag) is not bool for flag in self.ended):
            raise UserError(f"ended must be a list of {len(self.answers)} true or false values, one per answer")


class Loaded(NamedTuple):
    """Preferences, and what became of the rows of their file (or of the votes of their database).

    A ranking is one row and several preferences. `read` - `left_out.total()` rows gave the preferences."""

    preferences: list[Preference]
    read: int  # rows or votes
    left_out: Counter[str]  # how many of them gave no preference, by reason

    @classmethod
    def of(cls, rows: Iterable[Sequence[Preference] | str]) -> Self:
        """From what each row gave: its preferences, or the reason why it gave none."""
        rows = list(rows)
        found = [preference for row in rows if not isinstance(row, str) for preference in row]
        return cls(found, len(rows), Counter(row for row in rows if isinstance(row, str)))


def write_preferences(path: Path, preferences: Iterable[Preference]) -> int:
    """Write the file atomically and return how many preferences it holds."""
    return write_rows(path, map(to_row, preferences))


def read_preferences(path: Path) -> Iterator[Preference]:
    """Yield the preferences of a file one at a time. Raises UserError naming file, line and field."""
    found = False
    for where, row in read_rows(path):
        found = True
        yield from_row(row, where)
    if not found:
        raise UserError(f"{path} holds no preferences; write one JSON object per line")


def choices_of(tiers: Tiers) -> Iterator[tuple[list[int], int | None]]:
    """Decompose a ranking into choices, (answers compared, the favourite): the best of all, the best of the rest, and
    so on (Plackett 1975), so that the softmax losses of the choices sum to the loss of the ranking.

    Each of several tied answers is chosen over all lower tiers (Breslow 1974). A single tier is a tie of its answers,
    whose favourite is None; without tiers there is nothing."""
    if len(tiers) == 1:
        yield sorted(tiers[0]), None
    for place, tier in enumerate(tiers[:-1]):
        below = [i for lower in tiers[place + 1 :] for i in lower]
        yield from ((sorted([best, *below]), best) for best in tier)


def from_tiers(
    prompt: str, answers: Sequence[str], tiers: Tiers, ended: Sequence[bool] = (), meta: Mapping[str, Any] | None = None
) -> list[Preference]:
    """The choices of a ranking (see `choices_of`) as preferences."""
    found = []
    for among, best in choices_of(tiers):
        texts, flags = tuple(answers[i] for i in among), tuple(ended[i] for i in among) if ended else ()
        choice: int | Literal["tie"] = "tie" if best is None else among.index(best)
        found.append(Preference(prompt, texts, choice, flags, dict(meta or {})))
    return found


@dataclasses.dataclass(frozen=True)
class TokenizedPreference:
    """A preference as token ids: one row (prompt and answer) per candidate, and the index of the favourite or `TIE`."""

    rows: tuple[Row, ...]
    choice: int

    @property
    def prompt(self) -> tuple[int, ...]:
        """The prompt's ids."""
        return prompt_of(self.rows[0])


def prompt_of(row: Row) -> tuple[int, ...]:
    """The ids of a row that come before its answer."""
    ids, roles = row
    return tuple(ids[: list(roles).index(1)])


def tokenize_preferences(tok: Tokenizer, preferences: Iterable[Preference]) -> list[TokenizedPreference]:
    """One `TokenizedPreference` each. An answer that was cut off gets no closing </answer>, unless it is empty."""
    rankings = []
    for preference in preferences:
        rows: list[Row] = []
        for answer, ended in zip(preference.answers, preference.ended, strict=True):
            ids, roles = example_ids(tok, preference.prompt, answer)
            cut = not ended and sum(roles) > 1  # an empty answer keeps its end tag: a row needs an answer token
            rows.append((ids[:-1], roles[:-1]) if cut else (ids, roles))
        choice = TIE if preference.choice == "tie" else preference.choice
        rankings.append(TokenizedPreference(tuple(rows), choice))
    return rankings


class MaxSizes(NamedTuple):
    """The largest sizes among several preferences; their batches are padded to these."""

    candidates: int  # per prompt
    row: int  # tokens of prompt and answer
    answer: int  # tokens


def max_sizes(preferences: Sequence[TokenizedPreference]) -> MaxSizes:
    """The maximum number of candidates per prompt, of tokens per row and of tokens per answer."""
    rows = [row for preference in preferences for row in preference.rows]
    candidates = max(len(preference.rows) for preference in preferences)
    return MaxSizes(candidates, max(len(ids) for ids, _ in rows), max(sum(roles) for _, roles in rows))


def tie_rate(rankings: Sequence[TokenizedPreference]) -> float:
    """How often people found all answers equally good, for `losses.preference_nll`: below 1 even if they always did."""
    ties = sum(preference.choice == TIE for preference in rankings)
    return ties / (len(rankings) + 1)


def drop_long_preferences(
    rankings: Sequence[TokenizedPreference], length: int
) -> tuple[list[TokenizedPreference], int]:
    """The preferences whose rows all have at most `length` tokens, and how many were dropped."""
    kept = [ranking for ranking in rankings if max(len(ids) for ids, _ in ranking.rows) <= length]
    if not kept:
        raise UserError(f"none of {len(rankings)} preferences fits {length} tokens; use a longer block")
    return kept, len(rankings) - len(kept)


def to_row(preference: Preference) -> dict[str, Any]:
    """The row of a preference file, which `from_row` parses."""
    row = dataclasses.asdict(preference) | {"answers": list(preference.answers), "ended": list(preference.ended)}
    if all(preference.ended):
        del row["ended"]
    if not preference.meta:
        del row["meta"]
    return row


def from_row(row: Mapping[str, Any], where: str) -> Preference:
    """Parse one row of a preference file. Raises UserError that starts with `where`."""
    for name in ("prompt", "answers", "choice"):
        if name not in row:
            raise UserError(f"{where}: no field {name!r}; prompt, answers and choice are required")
    if unknown := [name for name in row if name not in _FIELDS]:
        raise UserError(f"{where}: unknown field {unknown[0]!r}; fields are {', '.join(_FIELDS)} (notes go into meta)")
    for name, kind, word in (("answers", list, "a list"), ("ended", list, "a list"), ("meta", dict, "an object")):
        if not isinstance(row.get(name, kind()), kind):
            raise UserError(f"{where}: {name} is {type(row[name]).__name__}, not {word}")
    if "ended" in row and not row["ended"]:
        raise UserError(f"{where}: ended is empty; leave it out if every answer ended")
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
