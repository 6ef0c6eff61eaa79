"""The splits of a source, and which rows are held out where it has no test split of its own."""

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Literal

from jaxgpt.data.documents import HELD_OUT
from jaxgpt.errors import UserError

Split = Literal["train", "valid", "test"]
Fields = tuple[str, ...]  # a row's texts, those that are asked for; () for a row that has a blank one
TFDS = "tfds:"  # how the names of its datasets begin
READER = "1"  # part of the fingerprint of what is read: change it with what is made of the same files
_HELD_BELOW = math.ceil(HELD_OUT * 2**32).to_bytes(4, "big")  # hashes below it are held out


def check_split(source: str, split: str, known: Sequence[str]) -> None:
    """UserError if a source has no such split."""
    if split not in known:
        raise UserError(f"{source} has no split {split!r}; splits are {', '.join(known)}")


def nothing_found(source: str, split: Split, fields: Sequence[str]) -> UserError:
    """The error for a source without a row for this split."""
    advice = "choose another dataset" if source.startswith(TFDS) else "give more of it"
    return UserError(f"{source} holds no {' and '.join(fields)} for the {split} split; {advice}")


def split_by_hash(rows: Callable[[], Iterable[Fields]], split: Split, source: str) -> Iterator[Fields]:
    """Rows whose first field hashes into the lowest 5 % are 'test'. Each split gets at least one distinct text: if no
    text hashes so low, the lowest is held out; if all do, all but the highest are. Two passes over the rows; the first
    ends as soon as it has found a text of each split."""
    lowest, highest = b"\xff" * 33, b""
    for row in rows():
        digest = _sha256(row[0])
        lowest, highest = min(lowest, digest), max(highest, digest)
        if lowest < _HELD_BELOW <= highest:
            break
    if not highest:
        return
    if lowest == highest:
        raise UserError(f"{source} holds 1 distinct text(s), too few to hold one out; give two or more")
    below = _HELD_BELOW if lowest < _HELD_BELOW <= highest else highest if highest < _HELD_BELOW else lowest + b"\0"
    for row in rows():
        if (_sha256(row[0]) < below) == (split == "test"):
            yield row


def _sha256(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()
