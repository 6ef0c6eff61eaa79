"""Raw text in pieces, read anew from its source at every pass, so that memory never holds all of it.

A piece is (text, ends): at most `PIECE` characters of a document, and whether the document ends with them. A blank row
is the piece ("", True). Most documents are one piece. A longer one is cut before a space or a line break that follows
something else, where byte-level BPE (ours and GPT-2's) starts a new token anyway: the pieces have the tokens of the
whole. Where a piece holds no such place, or with another tokenizer, a cut may change the tokens beside it.
"""

import codecs
import functools
import io
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from jaxgpt.errors import UserError
from jaxgpt.files import open_text, sha256_of_texts

PIECE = 2**20  # characters
HELD_OUT = 0.05
_BYTES = 2**20  # read at a time
_BREAK = re.compile(r".*\S(?=[ \n])", re.DOTALL)  # ends at the last place to cut

Piece = tuple[str, bool]


@dataclass(frozen=True)
class Documents:
    """The documents of a source, in the same order at every pass."""

    fingerprint: str  # sha256 of what they are read from
    size: int  # bytes of text, roughly
    pieces: Callable[[], Iterator[Piece]]  # begins a new pass

    @classmethod
    def of(cls, texts: "Sequence[str] | Documents") -> "Documents":
        """The documents of a list. Those of a source are returned as they are."""
        if isinstance(texts, Documents):
            return texts
        size = sum(map(len, texts))
        return cls(sha256_of_texts(texts), size, lambda: (piece for text in texts for piece in cut_pieces([text])))

    def sections(self, length: int) -> Iterator[str]:
        """Every document in parts of exactly `length` characters; its last part may be shorter."""
        held = ""
        for text, ends in self.pieces():
            held += text
            whole = len(held) if ends else len(held) // length * length
            yield from (held[at : at + length] for at in range(0, whole, length))
            held = held[whole:]


def cut_pieces(chunks: Iterable[str]) -> Iterator[Piece]:
    """The pieces of one document, which comes in chunks of any size."""
    held = ""
    for chunk in chunks:
        held += chunk
        while len(held) > PIECE:
            found = _BREAK.match(held, PIECE - PIECE // 16, PIECE + 1)
            cut = found.end() if found else PIECE
            yield held[:cut], False
            held = held[cut:]
    yield held, True


# ---- plain text ----


def text_file_pieces(path: Path, split: str) -> Iterator[Piece]:
    """The pieces of a file's part: about 95 % of it for "train", the rest for "test"; none if that part is blank."""
    stat = path.stat()
    cut, first, last = _find_cut(path, stat.st_size, stat.st_mtime_ns)
    if split == "train" and first < cut:
        yield from cut_pieces(_between(_chunks(path), 0, cut))
    if split == "test" and cut <= last:
        yield from cut_pieces(_between(_chunks(path), cut, None))


@functools.lru_cache(maxsize=1024)
def _find_cut(path: Path, size: int, modified: int) -> tuple[int, int, int]:
    """In characters: where the held-out part begins, and the first and last that are not blank. The cut is after the
    last line break among the 5 % before 95 %; without one after the last space there, without that anywhere.
    Size and time of change make an edited file another one."""
    first, last, at = -1, -1, 0
    for chunk in _chunks(path):
        if end := len(chunk.rstrip()):
            first, last = first if first >= 0 else at + len(chunk) - len(chunk.lstrip()), at + end - 1
        at += len(chunk)
    if last < 0:
        raise UserError(f"{path} is empty; give a file with text")
    least, aim = int((last + 1) * (1 - 2 * HELD_OUT)), int((last + 1) * (1 - HELD_OUT))
    newline, space, at = 0, 0, least  # one behind the last of each
    for text in _between(_chunks(path), least, aim):
        newline = at + found + 1 if (found := text.rfind("\n")) >= 0 else newline
        space = at + found + 1 if (found := text.rfind(" ")) >= 0 else space
        at += len(text)
    return newline or space or aim, first, last


def _between(chunks: Iterable[str], begin: int, end: int | None) -> Iterator[str]:
    """The characters from `begin` to `end` of a text that comes in chunks."""
    at = 0
    for chunk in chunks:
        yield chunk[max(begin - at, 0) : None if end is None else max(end - at, 0)]
        at += len(chunk)
        if end is not None and at >= end:
            return


def _chunks(path: Path) -> Iterator[str]:
    """A file's text without a byte order mark or line breaks at its start, with line ends of one form. UserError with
    the line of a byte that is not UTF-8."""
    decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder("utf-8")(), translate=True)
    size, lines, begun, marked = 0, 1, False, False
    with open_text(path) as file:
        while True:
            data, waiting = file.read(_BYTES), len(decoder.getstate()[0])
            try:
                text = decoder.decode(data, final=not data)
            except UnicodeDecodeError as error:
                line, at = lines + data.count(b"\n", 0, max(error.start - waiting, 0)), size - waiting + error.start
                raise UserError(f"{path}:{line}: byte {at} of the file is not UTF-8; save it as UTF-8") from error
            size, lines = size + len(data), lines + data.count(b"\n")
            if text and not marked:
                text, marked = text.removeprefix("\ufeff"), True
            if text and not begun:
                text = text.lstrip("\n")
                begun = bool(text)
            if text:
                yield text
            if not data:
                return
