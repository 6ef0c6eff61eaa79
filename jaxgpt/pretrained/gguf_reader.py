"""Reads the header of a GGUF file: metadata values and where each tensor lies.

Every size is compared with the file before anything of that size is allocated. The gguf package's own reader doesn't
do this, and takes several times as long because it makes an array of every string.
"""

import math
import struct
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxgpt.errors import UserError, needs_extra, printable

# struct's letters by GGUF's types
_SCALARS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))
_STRING, _ARRAY = 8, 9
_MOST = 100_000  # metadata fields, or tensors
_MOST_TEXTS = 4_000_000  # in one list; the largest vocabularies have 300,000 tokens


class StoredTensor(NamedTuple):
    """A tensor in a GGUF file; `data` holds its bytes, row by row."""

    shape: tuple[int, ...]  # slowest dimension first, as in NumPy
    kind: Any  # gguf.GGMLQuantizationType
    data: np.ndarray

    def values(self) -> np.ndarray:
        """Its numbers as float32. Raises UserError for kinds that the gguf package can't unpack."""
        import gguf

        try:
            return np.asarray(gguf.dequantize(self.data, self.kind), np.float32).reshape(self.shape)
        except NotImplementedError:
            raise UserError(f"numbers of type {self.kind.name} are not supported") from None


def read_header(path: Path) -> tuple[dict[str, Any], dict[str, StoredTensor]]:
    """Metadata and tensors, by name. Raises UserError if the file is damaged or not a GGUF file of version 2 or 3."""
    with needs_extra("pretrained"):
        import gguf  # noqa: F401
    try:
        return _Reader(path).read()
    except (OSError, ValueError, struct.error, OverflowError) as error:
        why = printable(str(error))
        raise UserError(f"{path} is not a readable GGUF file ({why}); copy it again") from error


class _Reader:
    def __init__(self, path: Path) -> None:
        self.bytes: np.ndarray = np.asarray(np.memmap(path, mode="r"))
        self.size, self.at = len(self.bytes), 0

    def read(self) -> tuple[dict[str, Any], dict[str, StoredTensor]]:
        if bytes(self.bytes[:4]) != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        self.at = 4
        if (version := self.scalar("I")) not in (2, 3):
            raise ValueError(f"its version is {version}, not 2 or 3")
        tensors, fields = self.scalar("Q"), self.scalar("Q")
        if max(tensors, fields) > _MOST:
            raise ValueError(f"its header claims {tensors} tensors and {fields} fields")
        metadata: dict[str, Any] = {}
        for _ in range(fields):
            name = self.text()
            if name in metadata:
                raise ValueError(f"field {name} appears twice")
            metadata[name] = self.value(self.scalar("I"))
        return metadata, self.tensors(tensors, metadata.get("general.alignment", 32))

    def take(self, size: int) -> int:
        """Move past the next `size` bytes and return where they begin. ValueError if the file ends before."""
        if size > self.size - self.at:
            raise ValueError(f"it ends early: {size} bytes are missing after byte {self.at}")
        at, self.at = self.at, self.at + size
        return at

    def scalar(self, letter: str) -> Any:
        size = struct.calcsize(f"<{letter}")
        at = self.take(size)
        return struct.unpack(f"<{letter}", self.bytes[at : at + size].tobytes())[0]

    def text(self) -> str:
        size = self.scalar("Q")
        at = self.take(size)
        return self.bytes[at : at + size].tobytes().decode()

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.text()
        if kind == _ARRAY:
            return self.list_of(self.scalar("I"), self.scalar("Q"))
        if kind not in _SCALARS:
            raise ValueError(f"a field before byte {self.at} has the unknown type {kind}")
        return self.scalar(_SCALARS[kind])

    def list_of(self, kind: int, length: int) -> Any:
        """A list of texts, or an array of numbers."""
        if kind == _STRING and length <= _MOST_TEXTS:
            return [self.text() for _ in range(length)]
        if kind not in _SCALARS:
            raise ValueError(f"a field before byte {self.at} is a list of {length} values of type {kind}")
        form = np.dtype(_SCALARS[kind]).newbyteorder("<")
        at = self.take(length * form.itemsize)
        return np.frombuffer(self.bytes, form, length, at)

    def tensors(self, count: int, alignment: Any) -> dict[str, StoredTensor]:
        import gguf

        if type(alignment) is not int or not 1 <= alignment <= 2**20 or alignment & (alignment - 1):
            raise ValueError(f"general.alignment is {alignment}")
        listed: dict[str, tuple[tuple[int, ...], int, int]] = {}
        for _ in range(count):
            name, dimensions = self.text(), self.scalar("I")
            if name in listed:
                raise ValueError(f"tensor {name} appears twice")
            if dimensions > 4:
                raise ValueError(f"tensor {name} has {dimensions} dimensions")
            shape = tuple(self.scalar("Q") for _ in range(dimensions))
            listed[name] = shape, self.scalar("I"), self.scalar("Q")
        self.take(-self.at % alignment)
        start, found, end = self.at, {}, 0
        for name, (shape, number, offset) in listed.items():
            kind = gguf.GGMLQuantizationType(number)  # ValueError names the number
            block, size = gguf.GGML_QUANT_SIZES[kind]
            if not shape or min(shape) < 1 or shape[0] % block:
                raise ValueError(f"tensor {name} has shape {shape}, of type {kind.name}")
            if offset != end:
                raise ValueError(f"tensor {name} is at {offset}, not at {end}, right after the one before it")
            row, rows = shape[0] // block * size, math.prod(shape[1:])
            self.at = start + offset
            at = self.take(row * rows)
            data = self.bytes[at : self.at].reshape(rows, row)
            found[name] = StoredTensor(shape[::-1], kind, data)
            end = self.at - start + (-(self.at - start) % alignment)
        if self.size not in (self.at, start + end):  # the last tensor may be padded
            raise ValueError(f"{self.size - self.at} bytes follow the last tensor")
        return found
