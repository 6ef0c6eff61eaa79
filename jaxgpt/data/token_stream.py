"""Reading the tokens of a text that `data.streams` keeps on disk: they are mapped, and given back after every read."""

import mmap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

Part = tuple[np.ndarray, mmap.mmap | None]  # tokens, and the mapping that they are in


class TokenStream:
    """int32 [N]. `stream[a:b]` is an array; the tokens themselves stay on disk."""

    def __init__(self, parts: Sequence[Part], hashes: np.ndarray, index: Mapping[str, Any]) -> None:
        self.digest: str = index["digest"]  # sha256 of shape, type and tokens, as `pipelines` computes it of an array
        self.documents: int = index["documents"]  # those read, blank ones included
        self.blank: int = index["blank"]
        self.bytes: int = index["bytes"]  # of the text in UTF-8
        self.document_hashes = hashes  # uint64, of those that are not blank
        self._parts, self._length, self._shard = parts, index["tokens"], index["shard"]

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, wanted: slice) -> np.ndarray:
        begin, end, step = wanted.indices(self._length)
        if step != 1:
            raise ValueError(f"a stream is read in steps of 1, not {step}")
        found = []
        for number in range(begin // self._shard, -(-end // self._shard)):
            start, (tokens, mapped) = number * self._shard, self._parts[number]
            found.append(tokens[max(begin - start, 0) : end - start].astype(np.int32))
            give_back(mapped)
        return np.concatenate(found) if found else np.zeros(0, np.int32)


def count_shared(heldout: TokenStream, train: TokenStream) -> int:
    """How many documents of the first are also in the second, by 8 bytes of their hashes: of 10 million documents and
    500,000 others, two have the same ones with a probability of 3e-7."""
    wanted, counts = np.unique(heldout.document_hashes, return_counts=True)
    found = np.zeros(len(wanted), np.bool_)
    for at in range(0, len(train.document_hashes), 2**20):
        found |= np.isin(wanted, train.document_hashes[at : at + 2**20])
    return int(counts[found].sum())


def map_file(path: Path, dtype: str) -> Part:
    """The numbers in a file."""
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    return np.frombuffer(mapped, dtype), mapped


def give_back(mapped: mmap.mmap | None) -> None:
    """Take mapped pages out of this process's memory; the system keeps them while it has room."""
    if mapped is not None and hasattr(mmap, "MADV_DONTNEED"):
        mapped.madvise(mmap.MADV_DONTNEED)
