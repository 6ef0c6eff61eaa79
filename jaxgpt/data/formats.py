r"""Preferences in the formats of other projects, in and out.

    jaxgpt                {"prompt", "answers", "choice"}: B answers, a favourite
    trl                   {"prompt", "chosen", "rejected"}
    trl-implicit          {"chosen", "rejected"}, which both begin with the prompt
    trl-conversational    the same with lists of {"role", "content"}; reading: with the prompt apart or not
    hh-rlhf               {"chosen", "rejected"} as "\n\nHuman: …\n\nAssistant: …" (Bai et al. 2022)
    lm-human-preferences  {"query", "sample0" … "sample3", "best"} (Ziegler et al. 2020); text, or ids of GPT-2
    arena                 {"model_a", "model_b", "winner", "conversation_a", "conversation_b"}, ties and both bad too

`read` finds out which one a file holds, row by row; a file is JSON lines or one JSON list. A conversation of more than
one turn becomes a prompt in the notation of hh-rlhf, and is written back as turns.
"""

import dataclasses
import hashlib
import itertools
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxgpt.data import votes
from jaxgpt.data.comparisons import Kind, Preference, from_row, from_tiers, read_preferences, write_preferences
from jaxgpt.data.jsonl import checked_text, read_rows, text_field, write_rows
from jaxgpt.data.tokenizer import gpt2_tokenizer
from jaxgpt.errors import UserError
from jaxgpt.files import read_json, sha256_of_file, write_json

HUMAN, ASSISTANT = "\n\nHuman: ", "\n\nAssistant: "
MARKED = ("\n\nHuman:", "\n\nSystem:")  # how a conversation in that notation begins
ROLES = {"Human": "user", "Assistant": "assistant", "System": "system"}
ARENA = {"model_a": ((0,), (1,)), "model_b": ((1,), (0,))}
Row = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Judged:
    """A verdict on the answers to a prompt; `tiers` as in `votes.Vote`."""

    prompt: str
    answers: tuple[str, ...]
    kind: Kind
    tiers: tuple[tuple[int, ...], ...]
    models: tuple[str, ...] = ()  # who wrote the answers, if that is known
    meta: Row = dataclasses.field(default_factory=dict)


def load(path: Path) -> list[Preference]:
    """What a reward model or DPO trains on, from a database of votes, our JSON lines or any other format. UserError
    where there is none."""
    if votes.is_database(path):
        return votes.read(path)
    if path.suffix != ".json" and _is_ours(path):
        return list(read_preferences(path))
    judged, _ = read(path)
    found = [one for j in judged for one in from_tiers(j.prompt, j.answers, _ranked(j), meta=j.meta)]
    if not found:
        raise UserError(f"{path} holds {len(judged)} verdicts and no preference among them")
    return found


def fingerprint(path: Path) -> str:
    """A hash of the preferences that `load` gives, to record what a run was made from."""
    if not votes.is_database(path):
        return sha256_of_file(path)
    return hashlib.sha256(repr(votes.read(path)).encode()).hexdigest()


def read(path: Path) -> tuple[list[Judged], int]:
    """The verdicts of a file, and how many conversations were left out because their earlier turns differ, so that
    their answers are not answers to the same prompt. UserError names file, line and field."""
    found: list[Judged] = []
    differ = 0
    for where, row in _rows(path):
        try:
            one = _read_row(row, where)
        except UserError as error:
            raise error if str(error).startswith(where) else UserError(f"{where}: {error}") from error
        if one is None:
            differ += 1
        else:
            found.append(one)
    if not found:
        raise UserError(f"{path} holds no preferences")
    return found, differ


def write(path: Path, judged: Iterable[Judged], format_: str) -> tuple[int, int]:
    """Write verdicts in a format by its name: (how many rows, how many verdicts the format can't hold). A favourite of
    B answers is B - 1 pairs where a format knows only pairs."""
    if format_ not in WRITERS:
        raise UserError(f"unknown format {format_!r}; formats are {', '.join(WRITERS)}")
    rows: list[Any] = []
    left_out = 0
    for one in judged:
        made = WRITERS[format_](one)
        left_out += not made
        rows += made
    if format_ == "jaxgpt":
        return write_preferences(path, rows), left_out
    if path.suffix == ".json":
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, rows)
        return len(rows), left_out
    return write_rows(path, rows), left_out


def judged_of(store: votes.Store) -> list[Judged]:
    """The standing first votes of a database; answers that weren't shown are left out."""
    tasks, found = store.tasks(), []
    for vote in store.votes():
        if vote.again:
            continue
        task, seen = tasks[vote.task], sorted(vote.shown)
        place = {index: i for i, index in enumerate(seen)}
        answers = [task.answers[i] for i in seen]
        tiers = tuple(tuple(sorted(place[i] for i in tier)) for tier in vote.tiers)
        models = tuple(str(answer.origin.get("model", "unknown")) for answer in answers)
        meta = {"annotator": vote.annotator, "ended": [answer.ended for answer in answers]}
        found.append(Judged(task.prompt, tuple(a.text for a in answers), vote.kind, tiers, models, meta))
    return found


def into_store(store: votes.Store, judged: Sequence[Judged], annotator: str) -> int:
    """Add verdicts as tasks and votes; how many were new: the same file again adds nothing."""
    new = 0
    for one in judged:
        origins = one.models or ("file",) * len(one.answers)
        ended = one.meta.get("ended") or (True,) * len(one.answers)
        candidates = tuple(
            votes.Answer(text, flag, {"model": name})
            for text, flag, name in zip(one.answers, ended, origins, strict=True)
        )
        task = votes.Task(one.prompt, candidates)
        store.add_task(task)
        who = str(one.meta.get("annotator", annotator))[:64]
        id_ = f"{task.id}-{votes.share(repr((who, one.kind, one.tiers))):.12f}"
        new += store.vote(votes.Vote(id_, task.id, who, one.kind, one.tiers, tuple(range(len(one.answers)))))
    return new


# ---- reading ----


def _is_ours(path: Path) -> bool:
    try:
        _, row = next(read_rows(path), ("", {}))
    except UserError:
        return True  # the strict reader says what is wrong
    return not {"chosen", "sample0", "winner"} & row.keys()


def _rows(path: Path) -> Iterator[tuple[str, Row]]:
    if path.suffix != ".json":
        yield from read_rows(path)
        return
    rows = read_json(path)
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{path} is not a JSON list of objects; give one, or a .jsonl file")
    for i, row in enumerate(rows):
        yield f"{path}: row {i}", row


def _read_row(row: Row, where: str) -> Judged | None:
    if "sample0" in row:
        return _ziegler(row, where)
    if "winner" in row:
        return _arena(row, where)
    if "answers" in row:
        one = from_row(row, where)
        meta = {**one.meta, "ended": list(one.ended)}
        return Judged(one.prompt, one.answers, "favourite", _first(one.choice, len(one.answers)), meta=meta)
    if not {"chosen", "rejected"} <= row.keys():
        raise UserError(
            f"{where}: fields {', '.join(row)} are of no known format; known are {', '.join(WRITERS)}",
            experiment=("votes", "--help"),
        )
    chosen, rejected = row["chosen"], row["rejected"]
    if isinstance(chosen, list):
        before = _messages(row.get("prompt", []), where)
        sides = [_turns([*before, *_messages(side, where)], where) for side in (chosen, rejected)]
    elif "prompt" in row:
        prompt = text_field(row, "prompt", where)
        sides = [(prompt, checked_text(row[name], f"{where}: {name}", blank=True)) for name in ("chosen", "rejected")]
    else:
        text_field(row, "chosen", where), text_field(row, "rejected", where)
        if chosen.startswith(MARKED):
            sides = [_turns(_dialogue(side), where) for side in (chosen, rejected)]
        else:
            same = len(os.path.commonprefix([chosen, rejected]))  # noqa: RUF071  of two texts
            sides = [(side[:same], side[same:]) for side in (chosen, rejected)]
    return _pair(sides, ((0,), (1,)), "favourite")


def _pair(sides: list[tuple[str, str]], tiers: Any, kind: Kind, models: tuple[str, ...] = ()) -> Judged | None:
    (prompt, first), (other, second) = sides
    if prompt != other:
        return None
    Preference(prompt, (first, second), 0)  # checks the texts
    return Judged(prompt, (first, second), kind, tiers, models)


def _first(best: int, count: int) -> tuple[tuple[int, ...], ...]:
    return ((best,), tuple(i for i in range(count) if i != best))


def _ziegler(row: Row, where: str) -> Judged:
    names = sorted((name for name in row if re.fullmatch(r"sample\d+", name)), key=lambda name: int(name[6:]))
    texts = [row.get("query"), *(row[name] for name in names)]
    if all(isinstance(text, list) for text in texts):
        tok = gpt2_tokenizer()
        texts = [tok.decode(ids) for ids in texts]
    one = Preference(texts[0], tuple(texts[1:]), row.get("best", "missing"))
    return Judged(one.prompt, one.answers, "favourite", _first(one.choice, len(one.answers)))


def _arena(row: Row, where: str) -> Judged | None:
    sides = [_turns(_messages(row.get(name), where), where) for name in ("conversation_a", "conversation_b")]
    models = (str(row.get("model_a", "unknown")), str(row.get("model_b", "unknown")))
    winner = str(row["winner"])
    if winner in ARENA:
        return _pair(sides, ARENA[winner], "favourite", models)
    if not winner.startswith(("tie", "both")):
        raise UserError(f"{where}: winner is {winner!r}; it must be model_a, model_b, tie or tie (bothbad)")
    return _pair(sides, ((0, 1),), "bad" if "bad" in winner else "tie", models)


def _messages(value: Any, where: str) -> list[Row]:
    fits = isinstance(value, list) and all(
        isinstance(m, dict) and "role" in m and isinstance(m.get("content"), str) for m in value
    )
    if not fits:
        raise UserError(f"{where}: a conversation must be a list of objects with role and content, both text")
    return list(value)


def _dialogue(text: str) -> list[Row]:
    parts = re.split(r"\n\n(Human|Assistant|System): ?", text)
    return [{"role": ROLES[who], "content": words} for who, words in zip(parts[1::2], parts[2::2], strict=True)]


def _turns(messages: Sequence[Row], where: str) -> tuple[str, str]:
    """(prompt, last answer). One turn: its words; several: all in hh-rlhf's notation."""
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        raise UserError(f"{where}: a conversation must end with an answer of the assistant")
    *before, last = messages
    if len(before) == 1 and before[0]["role"] == "user":
        return str(before[0]["content"]), str(last["content"])
    names = {"user": HUMAN, "assistant": ASSISTANT, "system": "\n\nSystem: "}
    return "".join(names.get(str(m["role"]), HUMAN) + str(m["content"]) for m in before), str(last["content"])


# ---- writing ----


def _ranked(one: Judged) -> tuple[tuple[int, ...], ...]:
    return one.tiers if one.kind in ("favourite", "ranking") else ()


def _pairs(one: Judged) -> Iterator[tuple[str, str]]:
    for higher, lower in itertools.combinations(_ranked(one), 2):
        yield from ((one.answers[i], one.answers[j]) for i in higher for j in lower)


def _prompt_messages(prompt: str) -> list[Row]:
    return _dialogue(prompt) if prompt.startswith(MARKED) else [{"role": "user", "content": prompt}]


def _said(text: str) -> list[Row]:
    return [{"role": "assistant", "content": text}]


def _human(prompt: str) -> str:
    return (prompt if prompt.startswith(MARKED) else HUMAN + prompt) + ASSISTANT


def _write_ziegler(one: Judged) -> list[Row]:
    if len(one.answers) != 4 or one.kind not in ("favourite", "ranking") or len(one.tiers[0]) != 1:
        return []
    samples = {f"sample{i}": text for i, text in enumerate(one.answers)}
    return [{"query": one.prompt, **samples, "best": one.tiers[0][0]}]


def _write_arena(one: Judged) -> list[Row]:
    if len(one.answers) != 2 or one.kind == "skip":
        return []
    winner = {"bad": "tie (bothbad)", "tie": "tie"}.get(one.kind) or ("model_a" if one.tiers[0] == (0,) else "model_b")
    models = one.models or ("unknown", "unknown")
    sides = {
        f"conversation_{name}": [*_prompt_messages(one.prompt), *_said(text)]
        for name, text in zip("ab", one.answers, strict=True)
    }
    return [{"model_a": models[0], "model_b": models[1], "winner": winner, **sides}]


def _both(make: Callable[[str, str], Any]) -> Callable[[Judged], list[Row]]:
    """A writer of {"chosen", "rejected"}, each made of prompt and answer."""
    return lambda one: [{"chosen": make(one.prompt, a), "rejected": make(one.prompt, b)} for a, b in _pairs(one)]


WRITERS: Mapping[str, Callable[[Judged], list[Any]]] = {
    "jaxgpt": lambda one: from_tiers(
        one.prompt,
        one.answers,
        _ranked(one),
        one.meta.get("ended", ()),
        {name: value for name, value in one.meta.items() if name != "ended"},
    ),
    "trl": lambda one: [{"prompt": one.prompt, "chosen": a, "rejected": b} for a, b in _pairs(one)],
    "trl-implicit": _both(lambda prompt, answer: prompt + answer),
    "trl-conversational": lambda one: [
        {"prompt": _prompt_messages(one.prompt), "chosen": _said(a), "rejected": _said(b)} for a, b in _pairs(one)
    ],
    "hh-rlhf": _both(lambda prompt, answer: _human(prompt) + answer),
    "lm-human-preferences": _write_ziegler,
    "arena": _write_arena,
}
