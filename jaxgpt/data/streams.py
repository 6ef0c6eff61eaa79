"""The tokens of a text, kept on disk: made in shards that are resumed, verified and repaired (`data.token_stream` reads
them).

A stream's folder, `streams`/NAME in the cache, is named by the hash of text and tokenizer. It holds

    000000.tokens, 000001.tokens, …   `SHARD` tokens each (the last one fewer): little-endian uint16, or int32 for a
                                      vocabulary of more than 65,536
    documents.hashes                  8 bytes of every document's sha256, to find documents that are in two streams
    index.json                        the sha256 of each of these files, where in the text each shard ends, the
                                      counts of documents and bytes, and its own hash

The index is replaced after every shard, so tokenizing that was interrupted resumes behind the last whole shard. At
every start each process compares every byte with its hash, a shard at a time; a damaged shard alone is made again. The
identity of a stream is the hash of its tokens, stored in the index: shards of another size or type are the same stream.

Memory: a piece of text and its tokens, one shard, and 8 bytes for each document, while tokenizing. Later only the
tokens that are asked for: mapped pages are given back after every read.
"""

import contextlib
import fcntl
import hashlib
import os
import shutil
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxgpt.caches import warn_unwritable, writable_folder
from jaxgpt.data.documents import PIECE, Documents
from jaxgpt.data.token_stream import Part, TokenStream, give_back, map_file
from jaxgpt.data.tokenizer import Tokenizer
from jaxgpt.errors import UserError
from jaxgpt.files import (
    read_record,
    remove,
    replace_file,
    sha256_of_file,
    sha256_of_texts,
    warn_once,
    write_record,
)

SHARD = 2**25  # tokens: 64 MiB of uint16
_BATCH = 1000  # pieces, and PIECE characters: the most that is encoded at a time
_INDEX, _HASHES, _LOCK = "index.json", "documents.hashes", ".lock"
_FIELDS = ("dtype", "shard", "shards", "tokens", "digest", "documents", "blank", "bytes", "hashes")

Say = Callable[[str], None]
_Position = list[int]  # [piece, tokens]: behind so many tokens of this piece
_Encoded = tuple[int, np.ndarray]  # a piece's number and its tokens
_Filled = tuple[np.ndarray, _Position]  # a shard's tokens, and where it ends


def tokenize_stream(
    texts: Documents | Sequence[str], tok: Tokenizer, cache: Path, say: Say = lambda text: None
) -> TokenStream:
    """<bos> doc <bos> doc ... <bos>, without blank documents, cached in `cache`/streams. For a model of others: what
    its tokenizer prepends, doc, separator, and so on. `say` is told how far it is.

    Of several processes with one cache, one tokenizes and the others wait for it. UserError if the disk can't hold it;
    a text that fits one shard is then kept in memory.
    """
    docs = Documents.of(texts)
    name = sha256_of_texts([tok.fingerprint, docs.fingerprint])[:32]
    folder = cache / "streams" / name
    work = _Work(folder, docs, tok, say)
    if (found := work.open()) is not None:
        return found
    work.folder = writable_folder(folder)
    with _alone(work.folder, say):
        return work.open() or work.make()


class _Work:
    """Making, verifying and repairing the folder of one stream."""

    def __init__(self, folder: Path, docs: Documents, tok: Tokenizer, say: Say) -> None:
        self.folder, self.docs, self.tok, self.say = folder, docs, tok, say

    def open(self) -> TokenStream | None:
        """The stream, if it is finished. Damaged shards are made again; None if more than that is to be done."""
        index = self._read_index()
        if index is None or index["digest"] is None or not self._verify(index):
            return None
        if not _is_whole(self.folder / _HASHES, index["hashes"]):
            warn_once(f"{self.folder / _HASHES} is damaged; it is rebuilt")
            return None
        return TokenStream(self._parts(index), map_file(self.folder / _HASHES, "<u8")[0], index)

    def make(self) -> TokenStream:
        """Tokenize what is missing."""
        index = self._read_index()
        if index is None:
            for path in self.folder.iterdir():
                if path.name != _LOCK:
                    remove(path)
            dtype = "<u2" if self.tok.vocab_size <= 2**16 else "<i4"
            index = dict.fromkeys(_FIELDS) | {"dtype": dtype, "shard": SHARD, "shards": []}
        shards: list[dict[str, Any]] = index["shards"]
        behind, counts = shards[-1]["end"] if shards else [0, 0], _Counts()
        for tokens, end in _fill(_encode(self.docs, self.tok, behind[0], counts), behind, index):
            all_there_is = not shards and len(tokens) < index["shard"]
            try:
                shards.append({"sha256": self._write(self._shard(len(shards)), tokens), "end": end})
                write_record(self.folder / _INDEX, index)
            except OSError as error:
                if not all_there_is:
                    raise self._no_room(index, counts, error.strerror or str(error)) from None
                warn_unwritable(self.folder, error)
                return TokenStream([(tokens, None)], counts.numbers(), _finished(index, counts, [(tokens, None)]))
            if len(tokens) == index["shard"]:
                self._report(index, counts)
        if not shards:
            raise UserError("no text to tokenize: every document is empty; choose another source")
        return self._finish(index, counts)

    def _finish(self, index: dict[str, Any], counts: "_Counts") -> TokenStream:
        if not self._verify(index):
            raise UserError(f"{self.folder} does not hold what was written there; check the disk")
        parts, hashes = self._parts(index), counts.numbers()
        index = _finished(index, counts, parts)
        try:
            self._write(self.folder / _HASHES, hashes)
            write_record(self.folder / _INDEX, index)
            hashes, _ = map_file(self.folder / _HASHES, "<u8")
        except OSError as error:
            warn_unwritable(self.folder, error)
        return TokenStream(parts, hashes, index)

    def _verify(self, index: Mapping[str, Any]) -> bool:
        """Compare every shard with its hash, and make damaged ones again."""
        return all(
            _is_whole(self._shard(number), shard["sha256"]) or self._repair(number, index)
            for number, shard in enumerate(index["shards"])
        )

    def _parts(self, index: Mapping[str, Any]) -> list[Part]:
        return [map_file(self._shard(number), index["dtype"]) for number in range(len(index["shards"]))]

    def _shard(self, number: int) -> Path:
        return self.folder / f"{number:06}.tokens"

    def _read_index(self) -> dict[str, Any] | None:
        path = self.folder / _INDEX
        try:
            return read_record(path, _FIELDS, "")
        except UserError:
            if self.folder.is_symlink() or (self.folder.exists() and not self.folder.is_dir()):
                warn_once(f"{self.folder} is damaged; it is rebuilt")
                remove(self.folder)
            elif os.path.lexists(path):
                warn_once(f"{self.folder} is damaged or was written by another version; it is rebuilt")
            return None

    def _write(self, path: Path, array: np.ndarray) -> str:
        """Write an array's bytes; returns their sha256."""
        if path.is_dir():
            remove(path)
        with replace_file(path) as file:
            file.write(array.data)
        return hashlib.sha256(array.data).hexdigest()

    def _repair(self, number: int, index: Mapping[str, Any]) -> bool:
        """Make one shard again. False if that can't be done, or gives another one."""
        warn_once(f"{self._shard(number)} is damaged; it is rebuilt")
        behind = index["shards"][number - 1]["end"] if number else [0, 0]
        tokens, _ = next(_fill(_encode(self.docs, self.tok, behind[0]), behind, index), (np.zeros(0), []))
        if hashlib.sha256(tokens.data).hexdigest() != index["shards"][number]["sha256"]:
            remove(self.folder / _INDEX)  # the tokenizers package may have changed: begin anew
            return False
        with contextlib.suppress(OSError):
            self._write(self._shard(number), tokens)
            return True
        return False

    def _report(self, index: Mapping[str, Any], counts: "_Counts") -> None:
        """After a whole shard: say how far it is, every 5 %, and stop if the rest won't fit the disk by far: the
        text's size is an estimate where its file is compressed or escaped."""
        count, width = len(index["shards"]), np.dtype(index["dtype"]).itemsize
        part = counts.bytes / max(self.docs.size, counts.bytes)
        if part < 1 and int(20 * part) > int(20 * part * (count - 1) / count):
            size, tokens = self.docs.size / 1e9, count * index["shard"]
            self.say(f"tokenized {part:.0%} of {size:.2f} GB of text, {tokens:,} tokens")
        rest = count * index["shard"] * width * (1 / part - 1)
        if rest > 2 * shutil.disk_usage(self.folder).free:
            raise self._no_room(index, counts, "not enough space")

    def _no_room(self, index: Mapping[str, Any], counts: "_Counts", reason: str) -> UserError:
        width, size = np.dtype(index["dtype"]).itemsize, index["shard"] * max(len(index["shards"]), 1)
        needed = size * width * max(self.docs.size / max(counts.bytes, 1), 1)
        free = shutil.disk_usage(self.folder).free
        return UserError(
            f"can't write the tokens of this text to {self.folder} ({reason}): they need about {needed / 1e9:.2f} GB, "
            f"and {free / 1e9:.2f} GB are free; free some space (the same command then resumes), or set JAXGPT_CACHE "
            "to a folder on another disk"
        )


class _Counts:
    """What is counted of all documents, whether they are tokenized now or were before."""

    def __init__(self) -> None:
        self.documents = self.blank = self.bytes = 0
        self.hashes = array("Q")
        self._digest = hashlib.sha256()

    def add(self, text: str, ends: bool) -> None:
        data = text.encode("utf-8", "surrogatepass")
        self.bytes += len(data)
        self._digest.update(data)
        if ends and text:
            self.hashes.append(int.from_bytes(self._digest.digest()[:8], "little"))
            self._digest = hashlib.sha256()
        self.documents += ends
        self.blank += ends and not text

    def numbers(self) -> np.ndarray:
        return np.frombuffer(self.hashes, np.uint64).astype("<u8", copy=False)


def _finished(index: dict[str, Any], counts: _Counts, parts: Sequence[Part]) -> dict[str, Any]:
    """The index of a whole stream, with the hash that `pipelines` computes of the same tokens in an int32 array."""
    length = sum(len(tokens) for tokens, _ in parts)
    digest = hashlib.sha256(str(((length,), np.dtype(np.int32))).encode())
    for tokens, mapped in parts:
        for at in range(0, len(tokens), PIECE):
            digest.update(tokens[at : at + PIECE].astype(np.int32).data)
            give_back(mapped)
    hashes = hashlib.sha256(counts.numbers().data).hexdigest()
    figures = {"documents": counts.documents, "blank": counts.blank, "bytes": counts.bytes, "hashes": hashes}
    return index | figures | {"tokens": length, "digest": digest.hexdigest()}


def _encode(docs: Documents, tok: Tokenizer, first: int, counts: _Counts | None = None) -> Iterator[_Encoded]:
    """(number, tokens) of every piece from `first` on that is not blank; what stands between documents is in them."""
    begin, separator = tok.template.begin, tok.template.separator
    before, later = begin, () if begin == (separator,) else begin
    inside, size = False, 0
    waiting: list[tuple[int, Sequence[int], str, Sequence[int]]] = []

    def encode() -> Iterator[_Encoded]:
        found = tok.encode_arrays([text for _, _, text, _ in waiting])
        for (number, left, _, right), ids in zip(waiting, found, strict=True):
            yield number, np.concatenate([np.array(left, np.int32), ids, np.array(right, np.int32)])

    for number, (text, ends) in enumerate(docs.pieces()):
        if counts is not None:
            counts.add(text, ends)
        if text:
            if number >= first:
                waiting.append((number, () if inside else before, text, (separator,) if ends else ()))
                size += len(text)
            before, inside = later, not ends
        if size >= PIECE or len(waiting) == _BATCH:
            yield from encode()
            waiting, size = [], 0
    yield from encode()


def _fill(pieces: Iterable[_Encoded], behind: _Position, index: Mapping[str, Any]) -> Iterator[_Filled]:
    """The tokens of each shard and where it ends, from the one that begins at `behind`. The array is used again."""
    room, filled = np.empty(index["shard"], index["dtype"]), 0
    number, at = behind
    for number, ids in pieces:
        at = behind[1] if number == behind[0] else 0
        while at < len(ids):
            size = min(len(ids) - at, len(room) - filled)
            room[filled : filled + size] = ids[at : at + size]
            at, filled = at + size, filled + size
            if filled == len(room):
                yield room, [number, at]
                filled = 0
    if filled:
        yield room[:filled], [number, at]


def _is_whole(path: Path, digest: str) -> bool:
    with contextlib.suppress(UserError, OSError):
        return sha256_of_file(path) == digest
    return False


@contextlib.contextmanager
def _alone(folder: Path, say: Say) -> Iterator[None]:
    """Wait until no other process works in the folder. Where files can't be locked, all work, to the same result."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            file = stack.enter_context(open(folder / _LOCK, "wb"))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                say(f"waiting for another process that tokenizes this text into {folder}")
                fcntl.flock(file, fcntl.LOCK_EX)
        yield
