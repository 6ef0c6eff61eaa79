"""Files as strangers bring them: rows in the formats of other projects and plain text, each sound or with one fault."""

import gzip
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxgpt.data import formats, sources
from tests.torture.harness import Kind, Outcomes, held

Row = dict[str, Any]
NEVER = "\0what is sound"  # in no message: a sound file must not be refused
WORDS = (
    "a",
    "film",
    "that",
    "sings",
    "naïve",
    "日本",
    "2+2=4",
    "Human",
    "user",
    "[x]",
    "<b>",
    "it's",
    "ends.",
    "\n-",
    "🙂",
)
NOTES: Row = {"id": 7, "source": "web", "score_chosen": 8.5, "lang": "en", "tools": [], "system": "", "history": None}
CONTEXT = {"system": "Rhyme.", "history": [["q", "r"]], "context": "Once.", "input": "Twice.", "documents": [{"t": 1}]}
NOTATIONS = (
    ("human: ", "assistant: "),
    ("### User: ", "### Bot: "),
    ("<|user|>\n", "<|assistant|>\n"),
    ("[INST] ", "[/INST] "),
)


def text(rng: random.Random, first: str) -> str:
    """A few words, of which the first is the same in no two texts of a row."""
    return " ".join([first, *rng.choices(WORDS, k=rng.randrange(6)), "end"])


def turn(role: str, content: str) -> Row:
    return {"role": role, "content": content}


def transcript(turns: list[Row], human: str = "\n\nHuman: ", assistant: str = "\n\nAssistant: ") -> str:
    return "".join((human if one["role"] == "user" else assistant) + one["content"] for one in turns)


def sound_row(rng: random.Random) -> tuple[str, Row, Any]:
    """(format, row, (prompt, the favourite, the other))."""
    before = [turn(role, text(rng, role[0])) for role in ("user", "assistant") * rng.randrange(2)] + [
        turn("user", text(rng, "p"))
    ]
    best, other = text(rng, "x"), text(rng, "y")
    asked = before[0]["content"] if len(before) == 1 else transcript(before)
    sides = {name: [*before, turn("assistant", words)] for name, words in (("chosen", best), ("rejected", other))}
    match kind := rng.choice(("trl", "implicit", "lists", "apart", "hh", "arena", "ziegler", "ours")):
        case "trl":
            row: Row = {"prompt": asked, "chosen": best, "rejected": other}
        case "implicit":
            asked = text(rng, "p") + " "
            row = {"chosen": asked + best, "rejected": asked + other}
        case "lists":
            row = sides
        case "apart":
            row = {"prompt": before, "chosen": sides["chosen"][-1:], "rejected": sides["rejected"][-1:]}
        case "hh":
            ends = rng.choice(("\n", "\n", "\r\n", "\r"))
            change: Callable[[str], str] = rng.choice((str, str.lstrip))
            row = {name: change(transcript(turns)).replace("\n", ends) for name, turns in sides.items()}
        case "arena":
            winner, loser = rng.choice((("a", "b"), ("b", "a")))
            row = {"winner": f"model_{winner}", "judge": rng.choice((0, "j", None)), "turn": len(sides["chosen"]) // 2}
            row |= {f"conversation_{winner}": sides["chosen"], f"conversation_{loser}": sides["rejected"]}
        case "ziegler":
            row = {"query": asked, "sample0": other, "sample1": best, "best": 1}
        case _:
            row = {"prompt": asked, "answers": [other, best], "choice": 1}
    if kind not in ("ours", "implicit"):
        row |= dict(rng.sample(sorted(NOTES.items()), rng.randrange(4)))
    return kind, row, (asked, best, other)


def spoil_row(rng: random.Random, kind: str, row: Row) -> Row:
    """The row with one fault, which must not be passed over."""
    faults: list[Row] = []
    if kind in ("trl", "lists", "apart", "hh", "implicit", "ours"):
        faults += [{**row, name: value} for name, value in CONTEXT.items()]
    if kind in ("trl", "implicit", "hh"):
        faults += [{**row, "rejected": rng.choice((None, 3, ["a"], {"a": 1}))}]
    if kind in ("lists", "hh"):
        more = transcript([turn("user", "Thanks")]) if kind == "hh" else [turn("user", "Thanks")]
        faults += [{**row, side: row[side] + more} for side in ("chosen", "rejected")]
    if kind == "hh":
        faults += [
            {
                name: f"Be kind.\n\n{words.lstrip()}" if name in ("chosen", "rejected") else words
                for name, words in row.items()
            }
        ]
    if kind == "implicit":
        human, assistant = rng.choice(NOTATIONS)
        faults += [{name: f"{human}Hi\n{assistant}{words}" for name, words in row.items()}]
        faults += [{name: f"Human: Hi\nAssistant: {words}" for name, words in row.items()}]
    if kind == "arena":
        faults += [{**row, "winner": "nobody"}, {**row, "turn": row["turn"] + 1}, {**row, "turn": 0}]
    if kind == "ziegler":
        faults += [{**row, "best": best} for best in (2, -1, "1", True)] + [{**row, "sample3": "c"}]
    if kind == "ours":
        faults += [{**row, "choice": choice} for choice in (2, -1, "1", 1.0, True, None)] + [{**row, "label": 1}]
    return rng.choice(faults)


def pack(rng: random.Random, data: bytes) -> bytes:
    """With or without a byte order mark and gzip."""
    data = rng.choice((b"", b"\xef\xbb\xbf")) + data
    return gzip.compress(data, 1) if rng.random() < 0.2 else data


def stranger_rows(rng: random.Random, folder: Path) -> Outcomes:
    """Read as they are meant, or refused; never with another prompt or another favourite."""
    path = folder / "rows.jsonl"

    def read() -> Any:
        ((one,), left_out) = formats.read(path)
        (best,), (other,) = one.tiers
        return one.prompt, one.answers[best], one.answers[other], dict(left_out)

    while True:
        kind, row, meant = sound_row(rng)
        wrong = rng.random() < 0.5
        written = json.dumps(spoil_row(rng, kind, row) if wrong else row, ensure_ascii=rng.random() < 0.5)
        if wrong and rng.random() < 0.1:
            written = json.dumps(row)[:-1] + ', "prompt": "q", "prompt": "r"}'
        path.write_bytes(pack(rng, rng.choice(("{}\n", "[{}]", "\n{}\r\n\n")).replace("{}", written).encode()))
        outcome = held(read, None, "rows.jsonl") if wrong else held(read, (*meant, {}), NEVER)
        yield outcome and f"{kind}: {written}: {outcome}"


STARTS = (
    b"%PDF-1.5\n",
    b"7z\xbc\xaf\x27\x1c",
    b"PAR1\x15",
    b"\xff\xfe",
    b"\x28\xb5\x2f\xfd",
    b"PK\3\4",
    b"a\0b\0",
    b"\xe9t\xe9 ",
)


def stranger_texts(rng: random.Random, folder: Path) -> Outcomes:
    """Plain text: all of it is in one of the two parts, 90 to 95 % in the first; what is no text is refused."""
    path = folder / "text.txt"

    def read() -> tuple[str, str]:
        (train,), (test,) = (sources.documents(str(path), split, folder) for split in ("train", "test"))
        return train, test

    while True:
        gap = rng.choice((" ", "\n", "\r", "\r\n", "\u2028", "", "\n\n"))
        words = gap.join(rng.choices(WORDS, k=rng.randint(20, 200))) + gap * rng.randrange(30)
        plain = words.replace("\r\n", "\n").replace("\r", "\n").lstrip("\n")
        if rng.random() < 0.3:
            start = rng.choice(STARTS)
            data = start + words.encode()
            path.write_bytes(gzip.compress(data, 1) if rng.random() < 0.2 else data)
            outcome = held(read, None, "text.txt")
            yield outcome and f"{start!r}: {outcome}"
            continue
        path.write_bytes(pack(rng, words.encode()))
        train, test = read()
        size = len(plain.rstrip())
        whole = train + test == plain and int(0.9 * size) <= len(train) <= 0.95 * size
        yield "" if whole else f"{words!r}: {len(train)} and {len(test)} characters"


KINDS = {
    "preference rows of other projects": Kind(stranger_rows, cases=4000),
    "plain text of any kind": Kind(stranger_texts, cases=2000),
}
