r"""Preferences in the formats of other projects, in and out.

    jaxgpt                {"prompt", "answers", "choice"}: C answers, one favourite
    trl                   {"prompt", "chosen", "rejected"}
    trl-implicit          {"chosen", "rejected"}, both starting with the prompt
    trl-conversational    the same with lists of {"role", "content"}; on reading, with or without a separate prompt
    hh-rlhf               {"chosen", "rejected"} as "\n\nHuman: …\n\nAssistant: …" (Bai et al. 2022)
    lm-human-preferences  {"query", "sample0" … "sample3", "best"} (Ziegler et al. 2020); text, or ids of GPT-2
    arena                 {"model_a", "model_b", "winner", "conversation_a", "conversation_b"}, with ties and "both bad"

`read` detects the format of each row; a file is JSON Lines or one JSON list. A conversation of more than one turn
becomes a prompt in the notation of hh-rlhf, and is written back as turns.
"""

import dataclasses
import hashlib
import itertools
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxgpt.data import votes
from jaxgpt.data.comparisons import (
    LEFT_OUT,
    Kind,
    Preference,
    from_row,
    from_tiers,
    read_preferences,
    write_preferences,
)
from jaxgpt.data.jsonl import checked_text, read_rows, text_field, write_rows
from jaxgpt.data.tokenizer import gpt2_tokenizer
from jaxgpt.errors import UserError
from jaxgpt.files import read_json, sha256_of_file, write_json

HUMAN, ASSISTANT = "\n\nHuman: ", "\n\nAssistant: "
MARKED = ("\n\nHuman:", "\n\nSystem:")  # how a prompt in that notation starts
ROLES = {"Human": "user", "Assistant": "assistant", "System": "system"}
ARENA = {"model_a": ((0,), (1,)), "model_b": ((1,), (0,))}
Row = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Verdict:
    """A verdict on the answers to a prompt; `tiers` as in `votes.Vote`."""

    prompt: str
    answers: tuple[str, ...]
    kind: Kind
    tiers: tuple[tuple[int, ...], ...]
    models: tuple[str, ...] = ()  # which models wrote the answers, if known
    meta: Row = dataclasses.field(default_factory=dict)


def load(path: Path) -> list[Preference]:
    """Preferences to train a reward model or DPO on, from a database of votes, our JSON Lines or any other format.
    Raises UserError if there are none."""
    return load_counted(path)[0]


def load_counted(path: Path) -> tuple[list[Preference], Counter[str]]:
    """What `load` returns, and how many rows (or votes) were left out, by reason."""
    if votes.is_database(path):
        return votes.read_counted(path)
    if path.suffix != ".json" and _is_own_format(path):
        return list(read_preferences(path)), Counter()
    judged, differ = read(path)
    left_out = Counter(LEFT_OUT[verdict.kind] for verdict in judged if verdict.kind in LEFT_OUT)
    left_out["earlier turns differ"] = differ
    found = [
        preference
        for verdict in judged
        for preference in from_tiers(verdict.prompt, verdict.answers, _preferred_tiers(verdict), meta=verdict.meta)
    ]
    if not found:
        raise UserError(f"{path} holds {len(judged)} verdicts but no preferences; it needs a favourite or a ranking")
    return found, +left_out


def fingerprint(path: Path) -> str:
    """A hash that identifies the preferences `load` returns, to record the inputs of a run."""
    if not votes.is_database(path):
        return sha256_of_file(path)
    return hashlib.sha256(repr(votes.read(path)).encode()).hexdigest()


def read(path: Path) -> tuple[list[Verdict], int]:
    """The verdicts in a file, and how many rows were left out because the two conversations differ before the last
    answer, so the answers are not to the same prompt. Raises UserError naming file, line and field."""
    found: list[Verdict] = []
    differ = 0
    for where, row in _rows(path):
        try:
            verdict = _read_row(row, where)
        except UserError as error:
            raise error if str(error).startswith(where) else UserError(f"{where}: {error}") from error
        if verdict is None:
            differ += 1
        else:
            found.append(verdict)
    if not found:
        raise UserError(f"{path} holds no preferences")
    return found, differ


def write(path: Path, judged: Iterable[Verdict], format_: str) -> tuple[int, int]:
    """Write verdicts in the named format: (rows written, verdicts that the format can't represent). Where a format has
    only pairs, a favourite of C answers becomes C - 1 pairs. Raises UserError for an unknown format."""
    if format_ not in WRITERS:
        raise UserError(f"unknown format {format_!r}; formats are {', '.join(WRITERS)}")
    rows: list[Any] = []
    left_out = 0
    for verdict in judged:
        made = WRITERS[format_](verdict)
        left_out += not made
        rows += made
    if format_ == "jaxgpt":
        return write_preferences(path, rows), left_out
    if path.suffix == ".json":
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, rows)
        return len(rows), left_out
    return write_rows(path, rows), left_out


def verdicts_in(store: votes.Store) -> list[Verdict]:
    """The first votes in a database, without undone ones; answers that weren't shown are left out."""
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
        found.append(Verdict(task.prompt, tuple(a.text for a in answers), vote.kind, tiers, models, meta))
    return found


def import_verdicts(store: votes.Store, judged: Sequence[Verdict], annotator: str) -> int:
    """Add verdicts as tasks and votes, and return how many were new: importing a file again adds nothing."""
    new = 0
    for verdict in judged:
        origins = verdict.models or ("file",) * len(verdict.answers)
        ended = verdict.meta.get("ended") or (True,) * len(verdict.answers)
        candidates = tuple(
            votes.Answer(text, flag, {"model": name})
            for text, flag, name in zip(verdict.answers, ended, origins, strict=True)
        )
        task = votes.Task(verdict.prompt, candidates)
        store.add_task(task)
        who = str(verdict.meta.get("annotator", annotator))[:64]
        id_ = f"{task.id}-{votes.hash_fraction(repr((who, verdict.kind, verdict.tiers))):.12f}"
        new += store.vote(
            votes.Vote(id_, task.id, who, verdict.kind, verdict.tiers, tuple(range(len(verdict.answers))))
        )
    return new


# ---- reading ----


def _is_own_format(path: Path) -> bool:
    try:
        _, row = next(read_rows(path), ("", {}))
    except UserError:
        return True  # the strict reader reports what is wrong
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


def _read_row(row: Row, where: str) -> Verdict | None:
    if "sample0" in row:
        return _ziegler(row, where)
    if "winner" in row:
        return _arena(row, where)
    if "answers" in row:
        given = from_row(row, where)
        return _verdict_of(given, {**given.meta, "ended": list(given.ended)})
    if not {"chosen", "rejected"} <= row.keys():
        raise UserError(
            f"{where}: fields {', '.join(row)} match no known format; formats are {', '.join(WRITERS)}",
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
            same = len(os.path.commonprefix([chosen, rejected]))  # noqa: RUF071  texts, not paths
            sides = [(side[:same], side[same:]) for side in (chosen, rejected)]
    return _pair(sides, ((0,), (1,)), "favourite")


def _pair(sides: list[tuple[str, str]], tiers: Any, kind: Kind, models: tuple[str, ...] = ()) -> Verdict | None:
    (prompt, first), (other, second) = sides
    if prompt != other:
        return None
    Preference(prompt, (first, second), 0)  # validates the texts
    return Verdict(prompt, (first, second), kind, tiers, models)


def _verdict_of(given: Preference, meta: Row) -> Verdict:
    every, best = range(len(given.answers)), given.choice
    if best == "tie":
        return Verdict(given.prompt, given.answers, "tie", (tuple(every),), meta=meta)
    return Verdict(given.prompt, given.answers, "favourite", ((best,), tuple(i for i in every if i != best)), meta=meta)


def _ziegler(row: Row, where: str) -> Verdict:
    names = sorted((name for name in row if re.fullmatch(r"sample\d+", name)), key=lambda name: int(name[6:]))
    texts = [row.get("query"), *(row[name] for name in names)]
    if all(isinstance(text, list) for text in texts):
        tok = gpt2_tokenizer()
        texts = [tok.decode(ids) for ids in texts]
    return _verdict_of(Preference(texts[0], tuple(texts[1:]), row.get("best", "missing")), {})


def _arena(row: Row, where: str) -> Verdict | None:
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
    """(prompt, last answer). The prompt is the text of a single turn, or several turns in hh-rlhf's notation."""
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        raise UserError(f"{where}: a conversation must end with an answer by the assistant")
    *before, last = messages
    if len(before) == 1 and before[0]["role"] == "user":
        return str(before[0]["content"]), str(last["content"])
    names = {"user": HUMAN, "assistant": ASSISTANT, "system": "\n\nSystem: "}
    return "".join(names.get(str(m["role"]), HUMAN) + str(m["content"]) for m in before), str(last["content"])


# ---- writing ----


def _preferred_tiers(verdict: Verdict) -> tuple[tuple[int, ...], ...]:
    return () if verdict.kind in LEFT_OUT else verdict.tiers


def _pairs(verdict: Verdict) -> Iterator[tuple[str, str]]:
    for higher, lower in itertools.combinations(_preferred_tiers(verdict), 2):
        yield from ((verdict.answers[i], verdict.answers[j]) for i in higher for j in lower)


def _prompt_messages(prompt: str) -> list[Row]:
    return _dialogue(prompt) if prompt.startswith(MARKED) else [{"role": "user", "content": prompt}]


def _assistant_message(text: str) -> list[Row]:
    return [{"role": "assistant", "content": text}]


def _hh_prompt(prompt: str) -> str:
    return (prompt if prompt.startswith(MARKED) else HUMAN + prompt) + ASSISTANT


def _write_ziegler(verdict: Verdict) -> list[Row]:
    if len(verdict.answers) != 4 or verdict.kind not in ("favourite", "ranking") or len(verdict.tiers[0]) != 1:
        return []
    samples = {f"sample{i}": text for i, text in enumerate(verdict.answers)}
    return [{"query": verdict.prompt, **samples, "best": verdict.tiers[0][0]}]


def _write_arena(verdict: Verdict) -> list[Row]:
    if len(verdict.answers) != 2 or verdict.kind == "skip":
        return []
    winner = {"bad": "tie (bothbad)", "tie": "tie"}.get(verdict.kind) or (
        "model_a" if verdict.tiers[0] == (0,) else "model_b"
    )
    models = verdict.models or ("unknown", "unknown")
    sides = {
        f"conversation_{name}": [*_prompt_messages(verdict.prompt), *_assistant_message(text)]
        for name, text in zip("ab", verdict.answers, strict=True)
    }
    return [{"model_a": models[0], "model_b": models[1], "winner": winner, **sides}]


def _pair_writer(make: Callable[[str, str], Any]) -> Callable[[Verdict], list[Row]]:
    """A writer of {"chosen", "rejected"} rows, whose values are make(prompt, answer)."""
    return lambda verdict: [
        {"chosen": make(verdict.prompt, a), "rejected": make(verdict.prompt, b)} for a, b in _pairs(verdict)
    ]


WRITERS: Mapping[str, Callable[[Verdict], list[Any]]] = {
    "jaxgpt": lambda verdict: from_tiers(
        verdict.prompt,
        verdict.answers,
        _preferred_tiers(verdict),
        verdict.meta.get("ended", ()),
        {name: value for name, value in verdict.meta.items() if name != "ended"},
    ),
    "trl": lambda verdict: [{"prompt": verdict.prompt, "chosen": a, "rejected": b} for a, b in _pairs(verdict)],
    "trl-implicit": _pair_writer(lambda prompt, answer: prompt + answer),
    "trl-conversational": lambda verdict: [
        {"prompt": _prompt_messages(verdict.prompt), "chosen": _assistant_message(a), "rejected": _assistant_message(b)}
        for a, b in _pairs(verdict)
    ],
    "hh-rlhf": _pair_writer(lambda prompt, answer: _hh_prompt(prompt) + answer),
    "lm-human-preferences": _write_ziegler,
    "arena": _write_arena,
}
