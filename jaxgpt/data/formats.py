r"""Preferences in the formats of other projects, in and out.

    jaxgpt                {"prompt", "answers", "choice"}: C answers, one favourite
    trl                   {"prompt", "chosen", "rejected"}
    trl-implicit          {"chosen", "rejected"}, both starting with the prompt
    trl-conversational    the same with lists of {"role", "content"}; on reading, the prompt may be text, stand before
                          the answer in both lists, or both (UltraFeedback)
    hh-rlhf               {"chosen", "rejected"} as "\n\nHuman: …\n\nAssistant: …" (Bai et al. 2022)
    lm-human-preferences  {"query", "sample0" … "sample3", "best"} (Ziegler et al. 2020); text, or ids of GPT-2
    arena                 {"model_a", "model_b", "winner", "conversation_a", "conversation_b"}, with ties and "both bad"

`read` detects the format of each row; a file is JSON Lines or one JSON list. A conversation of more than one turn
becomes a prompt in the notation of hh-rlhf, and is written back as turns. What a format or this notation can't say is
left out, and counted.
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
    Loaded,
    Preference,
    from_row,
    from_tiers,
    to_row,
)
from jaxgpt.data.jsonl import checked_text, read_rows, refuse_ignored_context, text_field, write_rows
from jaxgpt.data.tokenizer import gpt2_tokenizer
from jaxgpt.errors import UserError
from jaxgpt.files import read_json, sha256_of_file, write_json

ROLES = {"Human": "user", "Assistant": "assistant", "System": "system"}
DIFFERENT = "answers to different conversations"
UNANSWERED = "conversations whose last turn is not an answer"
UNSPEAKABLE = "turns of other roles than user, assistant and system, or with a turn marker in their text"
MARKED = tuple(f"\n\n{who}:" for who in ROLES)  # how a prompt in that notation starts
_MARKER = rf"({'|'.join(ROLES)}):"
_OTHER_TURN = re.compile(  # a turn in another notation: "User:", "### assistant:", "<|im_start|>user", "[INST]"
    r"^[^\w\n]*(human|user|assistant|system|bot)[^\w\n]{0,3}[:|>]|<\|\w+\|>\s*(user|assistant|system)\b|<start_of_turn>|\[INST\]",
    re.I | re.M,
)
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


class _RowError(Exception):
    """A row is left out; the text says why."""


def load(path: Path) -> list[Preference]:
    """Preferences to train a reward model or DPO on, from a database of votes, our JSON Lines or any other format.
    Raises UserError if there are none."""
    return load_counted(path).preferences


def load_counted(path: Path) -> Loaded:
    """As `load`, with how many rows (or votes) were read, and how many of them were left out, by reason."""
    if votes.is_database(path):
        return votes.read_counted(path)
    found = Loaded.of(
        verdict if isinstance(verdict, str) else _preferences_of(verdict) or LEFT_OUT.get(verdict.kind, "no preference")
        for verdict in _verdicts(path)
    )
    if not found.preferences:
        raise UserError(f"{path} holds no preferences{_explain(found.left_out)}; it needs a favourite or a ranking")
    return found


def fingerprint(path: Path) -> str:
    """A hash that identifies the preferences `load` returns, to record the inputs of a run."""
    if not votes.is_database(path):
        check_as_written(path)
        return sha256_of_file(path)
    return hashlib.sha256(repr(votes.read(path)).encode()).hexdigest()


def check_as_written(path: Path) -> None:
    """UserError if the file lies in a run's folder and differs from the hash in that run's done.json."""
    done = path.with_name("done.json")
    record = read_json(done) if done.is_file() else None
    written = record.get("files") if isinstance(record, dict) else None
    if isinstance(written, dict) and path.name in written and written[path.name] != sha256_of_file(path):
        raise UserError(
            f"{path} is not what its run wrote (done.json holds another checksum): it is damaged or was edited; to use "
            f"it as it is, copy it to another folder; to restore it, rerun the stage that made {path.parent}"
        )


def read(path: Path) -> tuple[list[Verdict], Counter[str]]:
    """The verdicts in a file, and how many rows were left out, by reason: the two conversations differ before the last
    answer, so the answers are not to the same prompt; one ends without an answer; or a turn can't be told apart in the
    notation of hh-rlhf. Raises UserError naming file, line and field."""
    rows = list(_verdicts(path))
    found = [row for row in rows if not isinstance(row, str)]
    left_out = Counter(row for row in rows if isinstance(row, str))
    if not found:
        raise UserError(f"{path} holds no preferences{_explain(left_out)}")
    return found, left_out


def write(path: Path, judged: Iterable[Verdict], format_: str) -> tuple[int, int]:
    """Write verdicts in the named format: (rows written, verdicts that the format can't represent). Where a format has
    only pairs, a favourite of C answers becomes C - 1 pairs. All but trl-implicit read back as they were written; what
    wouldn't, because a text holds a turn marker, is left out. Raises UserError for an unknown format or suffix, and if
    there is nothing to write."""
    if format_ not in WRITERS:
        raise UserError(f"unknown format {format_!r}; formats are {', '.join(WRITERS)}")
    if path.suffix not in (".jsonl", ".json"):
        raise UserError(f"{path} must end with .jsonl (an object per line) or .json (one list)")
    rows: list[Row] = []
    left_out = 0
    for verdict in judged:
        made = WRITERS[format_](verdict)
        if format_ != "trl-implicit" and not all(_says(row, verdict) for row in made):
            made = []
        left_out += not made
        rows += made
    if not rows:
        raise UserError(f"nothing to write to {path}: {format_} can't express any of {left_out} votes")
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
        meta: Row = {"annotator": vote.annotator, "ended": [answer.ended for answer in answers]}
        found.append(Verdict(task.prompt, tuple(a.text for a in answers), vote.kind, tiers, models, meta))
    return found


def import_verdicts(store: votes.Store, judged: Sequence[Verdict], annotator: str) -> int:
    """Add verdicts as tasks and votes, and return how many were new: importing a file again adds nothing.

    Verdicts on the same answers to a prompt, in whatever order, are votes on one task. Those that name no annotator
    are each by another person: `annotator`, "`annotator` 2", and so on. Long names are shortened but stay distinct."""
    new = 0
    tasks = {_content(task.prompt, [a.text for a in task.answers]): task for task in store.tasks().values()}
    unnamed: Counter[str] = Counter()  # verdicts so far, by task
    for verdict in judged:
        content = _content(verdict.prompt, verdict.answers)
        if content not in tasks:
            tasks[content] = _task_of(verdict)
            store.add_task(tasks[content])
        task = tasks[content]
        theirs = sorted(range(len(task.answers)), key=lambda i: task.answers[i].text)
        ours = sorted(range(len(verdict.answers)), key=verdict.answers.__getitem__)
        place = dict(zip(ours, theirs, strict=True))
        tiers = tuple(tuple(sorted(place[i] for i in tier)) for tier in verdict.tiers)
        who = str(verdict.meta.get("annotator", "")).strip()
        if not who or verdict.meta["annotator"] is None:
            unnamed[task.id] += 1
            who = annotator if unnamed[task.id] == 1 else f"{annotator} {unnamed[task.id]}"
        if len(who) > 64:
            who = f"{who[:51]} {hashlib.sha256(who.encode()).hexdigest()[:12]}"
        id_ = f"{task.id}-{votes.hash_fraction(repr((who, verdict.kind, tiers))):.12f}"
        shown = tuple(place[i] for i in range(len(place)))
        new += store.vote(votes.Vote(id_, task.id, who, verdict.kind, tiers, shown))
    return new


def join_turns(messages: Sequence[Row]) -> str | None:
    """A conversation before its next answer, as one prompt: the text of a single turn by the user, or several turns in
    the notation of hh-rlhf. None if that notation can't say it: a turn by another role, or a turn marker in a text."""
    alone = len(messages) == 1 and messages[0]["role"] == "user"
    names = {role: f"\n\n{who}: " for who, role in ROLES.items()}
    prompt = "".join(("" if alone else names.get(m["role"], "")) + m["content"] for m in messages)
    return prompt if _prompt_messages(prompt) == list(messages) else None


def _content(prompt: str, answers: Sequence[str]) -> tuple[str, ...]:
    return (prompt, *sorted(answers))


def _task_of(verdict: Verdict) -> votes.Task:
    count = len(verdict.answers)
    origins, ended = verdict.models or ("file",) * count, verdict.meta.get("ended") or (True,) * count
    columns = zip(verdict.answers, ended, origins, strict=True)
    return votes.Task(verdict.prompt, tuple(votes.Answer(text, flag, {"model": name}) for text, flag, name in columns))


# ---- reading ----


def _verdicts(path: Path) -> Iterator[Verdict | str]:
    """Each row's verdict, or the reason why it is left out."""
    check_as_written(path)
    for where, row in read_rows(path):
        try:
            yield _read_row(row, where)
        except _RowError as reason:
            yield str(reason)
        except UserError as error:
            raise error if str(error).startswith(where) else UserError(f"{where}: {error}") from error


def _explain(left_out: Counter[str]) -> str:
    return "".join(f"; {count} left out: {reason}" for reason, count in left_out.items())


def _read_row(row: Row, where: str) -> Verdict:
    """The verdict of a row in any format. Raises _RowError if it is left out, UserError if it is wrong."""
    if "sample0" in row:
        return _ziegler(row, where)
    if "winner" in row:
        return _arena(row, where)
    if "answers" in row or "choice" in row:
        given = from_row(row, where)
        return _verdict_of(given, {**given.meta, "ended": list(given.ended)})
    if not {"chosen", "rejected"} <= row.keys():
        raise UserError(
            f"{where}: fields {', '.join(row)} match no known format; make each row "
            f'{{"prompt", "chosen", "rejected"}}, or one of {", ".join(WRITERS)}',
            experiment=("votes", "--help"),
        )
    chosen, rejected = row["chosen"], row["rejected"]
    if isinstance(chosen, list):
        prompt = row.get("prompt") or []
        before = _messages([{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt, where)
        sides = [_turns(_whole(before, _messages(side, where), where), where) for side in (chosen, rejected)]
    elif "prompt" in row:
        prompt = text_field(row, "prompt", where)
        sides = [(prompt, checked_text(row[name], f"{where}: {name}", blank=True)) for name in ("chosen", "rejected")]
    else:
        text_field(row, "chosen", where), text_field(row, "rejected", where)
        if re.match(rf"\s*{_MARKER}", chosen):
            sides = [_transcript(side, where) for side in (chosen, rejected)]
        else:
            sides = _split_at_difference(row, where)
    refuse_ignored_context(row, sides[0][0], where)
    return _pair(sides, ((0,), (1,)), "favourite")


def _whole(before: Sequence[Row], side: Sequence[Row], where: str) -> list[Row]:
    """The prompt and a side, which may hold it already, after a system's turn of its own."""
    turns = list(side[1:] if side and before and side[0]["role"] == "system" != before[0]["role"] else side)
    if before and turns[: len(before)] == list(before):
        return list(side)
    if before and turns and before[-1]["role"] == turns[0]["role"] == "user":
        raise UserError(f"{where}: the prompt is not in the conversation, which has a first turn of its own; drop one")
    return [*before, *side]


def _split_at_difference(row: Row, where: str) -> list[tuple[str, str]]:
    """(prompt, answer) of two texts that start with the same prompt: their common beginning, of whole words."""
    others = row.keys() - {"chosen", "rejected"}
    other = next((name for name in sorted(others) if isinstance(row[name], (str, list, dict)) and row[name]), "")
    if other:
        raise UserError(
            f"{where}: {other!r} would be ignored, and the words that chosen and rejected start with be taken for the "
            "prompt; rename it to prompt if it is the prompt, otherwise remove it"
        )
    if found := _OTHER_TURN.search(row["chosen"]):
        raise UserError(
            f"{where}: {found[0].strip()!r} looks like a turn of a conversation, but not in hh-rlhf's notation; give "
            'lists of {"role", "content"}, or put what comes before the answers into a field "prompt"'
        )
    pair = (row["chosen"], row["rejected"])
    prompt = os.path.commonprefix(pair)  # noqa: RUF071  texts, not paths
    if any(side[len(prompt) :][:1].strip() for side in pair):  # the difference may be inside a word
        prompt = prompt.removesuffix(re.split(r"\s", prompt)[-1])
    if not prompt.strip():
        raise UserError(f"{where}: chosen and rejected start with different words: no prompt; give it as prompt")
    return [(prompt, side[len(prompt) :]) for side in pair]


def _pair(
    sides: list[tuple[str, str]], tiers: Any, kind: Kind, models: tuple[str, ...] = (), meta: Row | None = None
) -> Verdict:
    (prompt, first), (other, second) = sides
    if prompt != other:
        raise _RowError(DIFFERENT)
    Preference(prompt, (first, second), 0)  # validates the texts
    return Verdict(prompt, (first, second), kind, tiers, models, meta or {})


def _verdict_of(given: Preference, meta: Row) -> Verdict:
    every, best = range(len(given.answers)), given.choice
    if best == "tie":
        return Verdict(given.prompt, given.answers, "tie", (tuple(every),), meta=meta)
    return Verdict(given.prompt, given.answers, "favourite", ((best,), tuple(i for i in every if i != best)), meta=meta)


def _ziegler(row: Row, where: str) -> Verdict:
    names = sorted((name for name in row if re.fullmatch(r"sample\d+", name)), key=lambda name: int(name[6:]))
    if names != [f"sample{i}" for i in range(len(names))]:
        raise UserError(f"{where}: it has {', '.join(names)}; number the samples from 0, without gaps")
    texts = [row.get("query"), *(row[name] for name in names)]
    if all(isinstance(text, list) for text in texts):
        tok = gpt2_tokenizer()
        texts = [tok.decode(ids) for ids in texts]
    return _verdict_of(Preference(texts[0], tuple(texts[1:]), row.get("best", "missing")), {})


def _arena(row: Row, where: str) -> Verdict:
    last = 2 * row["turn"] if type(row.get("turn")) is int else None  # MT-bench judges one of two turns
    both = [_messages(row.get(name), where) for name in ("conversation_a", "conversation_b")]
    if last is not None and not 2 <= last <= min(map(len, both)):
        raise UserError(f"{where}: turn is {row['turn']}, but the conversations don't have that many turns; correct it")
    sides = [_turns(messages[:last], where) for messages in both]
    models = (str(row.get("model_a", "unknown")), str(row.get("model_b", "unknown")))
    meta = {} if row.get("judge") in (None, "") else {"annotator": str(row["judge"])}
    winner = str(row["winner"])
    if winner in ARENA:
        return _pair(sides, ARENA[winner], "favourite", models, meta)
    if not winner.startswith(("tie", "both")):
        raise UserError(f"{where}: winner is {winner!r}; it must be model_a, model_b, tie or tie (bothbad)")
    return _pair(sides, ((0, 1),), "bad" if "bad" in winner else "tie", models, meta)


def _messages(value: Any, where: str) -> list[Row]:
    fits = isinstance(value, list) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in value
    )
    if not fits:
        raise UserError(f"{where}: a conversation must be a list of objects with role and content, both text")
    return [{"role": m["role"], "content": m["content"]} for m in value]


def _dialogue(text: str) -> list[Row]:
    """The turns of a transcript, which may start without its blank lines and have other systems' line breaks."""
    if re.search(rf"(\r\n?)\1{_MARKER}", text):
        text = re.sub(r"\r\n?", "\n", text)
    before, *parts = re.split(rf"\n\n{_MARKER} ?", f"\n\n{text.lstrip()}")
    if before:
        return []
    return [{"role": ROLES[who], "content": words} for who, words in zip(parts[::2], parts[1::2], strict=True)]


def _transcript(text: str, where: str) -> tuple[str, str]:
    """`_turns` of a transcript. UserError if there is no blank line before a turn."""
    turns = _dialogue(text)
    if not turns:
        raise UserError(f"{where}: only one of chosen and rejected starts with a turn; write both as conversations")
    inside = re.search(rf"^\s*{_MARKER}", turns[-1]["content"], re.M)
    if inside and turns[-1]["role"] != "assistant":
        raise UserError(f"{where}: there is no blank line before the turn {inside[0].strip()!r}; write one")
    return _turns(turns, where)


def _turns(messages: Sequence[Row], where: str) -> tuple[str, str]:
    """(prompt, last answer); the prompt is that of `join_turns`."""
    if messages and messages[-1]["role"] != "assistant" and any(m["role"] == "assistant" for m in messages):
        raise _RowError(UNANSWERED)
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        raise UserError(f"{where}: a conversation must end with an answer by the assistant, after what it answers")
    *before, last = messages
    prompt = join_turns(before)
    if prompt is None:
        raise _RowError(UNSPEAKABLE)
    return prompt, str(last["content"])


# ---- writing ----


def _preferred_tiers(verdict: Verdict) -> tuple[tuple[int, ...], ...]:
    return () if verdict.kind in LEFT_OUT else verdict.tiers


def _preferences_of(verdict: Verdict) -> list[Preference]:
    meta = {name: value for name, value in verdict.meta.items() if name != "ended"}
    tiers, ended = _preferred_tiers(verdict), verdict.meta.get("ended", ())
    return from_tiers(verdict.prompt, verdict.answers, tiers, ended, meta)


def _says(row: Row, verdict: Verdict) -> bool:
    """Whether `row` would be read as (a part of) this verdict."""
    try:
        found = _read_row(row, "")
    except (UserError, _RowError):
        return False
    return found.prompt == verdict.prompt and set(found.answers) <= set(verdict.answers)


def _pairs(verdict: Verdict) -> list[tuple[int, int]]:
    """(preferred, other) answers, by their indices."""
    tiers = itertools.combinations(_preferred_tiers(verdict), 2)
    return [(i, j) for higher, lower in tiers for i in higher for j in lower]


def _prompt_messages(prompt: str) -> list[Row]:
    """The turns of a prompt from `join_turns`."""
    return _dialogue(prompt) if prompt.startswith(MARKED) else [{"role": "user", "content": prompt}]


def _message(text: str) -> list[Row]:
    return [{"role": "assistant", "content": text}]


def _hh_prompt(prompt: str) -> str:
    return ("" if prompt.startswith(MARKED) else "\n\nHuman: ") + prompt + "\n\nAssistant: "


def _joint(prompt: str, *answers: str) -> str:
    """What keeps words apart where a prompt and its answers meet: a space, unless there is one."""
    return "" if prompt[-1:].isspace() or all(answer[:1].isspace() for answer in answers) else " "


def _write_ziegler(verdict: Verdict) -> list[Row]:
    if len(verdict.answers) != 4 or verdict.kind not in ("favourite", "ranking") or len(verdict.tiers[0]) != 1:
        return []
    samples = {f"sample{i}": text for i, text in enumerate(verdict.answers)}
    return [{"query": verdict.prompt, **samples, "best": verdict.tiers[0][0]}]


def _write_arena(verdict: Verdict) -> list[Row]:
    models = verdict.models or ("unknown",) * len(verdict.answers)
    judge = {"judge": verdict.meta["annotator"]} if "annotator" in verdict.meta else {}
    prompt = _prompt_messages(verdict.prompt)

    def row(a: int, b: int, winner: str) -> Row:
        sides = {f"conversation_{name}": [*prompt, *_message(verdict.answers[i])] for name, i in (("a", a), ("b", b))}
        return {"model_a": models[a], "model_b": models[b], "winner": winner, **judge, **sides}

    if verdict.kind in ("tie", "bad"):
        winner = "tie" if verdict.kind == "tie" else "tie (bothbad)"
        return [row(a, b, winner) for a, b in itertools.pairwise(range(len(verdict.answers)))]
    return [row(min(i, j), max(i, j), "model_a" if i < j else "model_b") for i, j in _pairs(verdict)]


def _pair_writer(make: Callable[[str, str, str], Row]) -> Callable[[Verdict], list[Row]]:
    """A writer of the rows make(prompt, preferred answer, other answer)."""
    return lambda verdict: [make(verdict.prompt, verdict.answers[i], verdict.answers[j]) for i, j in _pairs(verdict)]


WRITERS: Mapping[str, Callable[[Verdict], list[Row]]] = {
    "jaxgpt": lambda verdict: [to_row(one) for one in _preferences_of(verdict)],
    "trl": _pair_writer(lambda prompt, a, b: {"prompt": prompt, "chosen": a, "rejected": b}),
    "trl-implicit": _pair_writer(
        lambda prompt, a, b: {
            "chosen": prompt + _joint(prompt, a, b) + a,
            "rejected": prompt + _joint(prompt, a, b) + b,
        }
    ),
    "trl-conversational": _pair_writer(
        lambda prompt, a, b: {"prompt": _prompt_messages(prompt), "chosen": _message(a), "rejected": _message(b)}
    ),
    "hh-rlhf": _pair_writer(
        lambda prompt, a, b: {"chosen": _hh_prompt(prompt) + a, "rejected": _hh_prompt(prompt) + b}
    ),
    "lm-human-preferences": _write_ziegler,
    "arena": _write_arena,
}
