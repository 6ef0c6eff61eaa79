"""Checks for untrusted model files: where a file lies, how large it is, and the type and range of every value."""

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxgpt.errors import UserError, show_value
from jaxgpt.files import read_json

LARGEST_TEXT = 200_000_000  # bytes of a JSON file or a chat template; the largest tokenizers have 40 million
LARGEST_COUNT = 2**31 - 1


def check_place(path: Path) -> Path:
    """The path itself. UserError if it is a link out of its folder, except to where Hugging Face's cache keeps the
    contents of files: models--OWNER--NAME/blobs."""
    target = Path(os.path.realpath(path))
    cached = target.parent.name == "blobs" and target.parent.parent.name.startswith("models--")
    if not cached and not target.is_relative_to(os.path.realpath(path.parent)):
        raise UserError(f"{path} is a link to {target}, outside its folder; if you trust it, put the file itself there")
    return path


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Put a file's path in front of a UserError that doesn't mention it."""
    try:
        yield
    except UserError as error:
        if str(path) in str(error):
            raise
        raise UserError(f"{path}: {error}") from error


def read_text(path: Path) -> str:
    """The text of a file. UserError if it is a link out of its folder, too large, or not UTF-8."""
    try:
        if check_place(path).stat().st_size > LARGEST_TEXT:
            raise UserError(f"{path} has more than {LARGEST_TEXT:,} bytes; download it again")
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start}); download it again") from None


def read_object(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object. UserError if it doesn't, or in the cases of `read_text`."""
    read_text(path)  # checks the link and the size
    record = read_json(path)
    if not isinstance(record, dict):
        raise UserError(f"{path} is not a JSON object; download it again")
    return record


class Fields:
    """Values by name, each checked for the type asked for; null counts as missing. A UserError names file and field.

    A default of `...` means that the value is required."""

    def __init__(self, values: Mapping[str, Any], where: Path | str) -> None:
        self.values, self.where = values, where

    def _has(self, name: str, default: Any) -> bool:
        """Whether there is a value. UserError if there is none and it is required."""
        found = self.values.get(name) is not None
        if not found and default is ...:
            raise UserError(f"{self.where} has no {name}; download it again")
        return found

    def _wrong(self, name: str, value: Any, what: str) -> UserError:
        return UserError(f"{self.where}: {name} is {show_value(value)}, not {what}")

    def count(self, name: str, default: Any = ..., most: int = LARGEST_COUNT) -> int:
        """A whole number from 1 to `most`, or the default."""
        if not self._has(name, default):
            return int(default)
        value = self.values[name]
        if type(value) is not int or not 1 <= value <= most:
            raise self._wrong(name, value, f"a whole number from 1 to {most}")
        return value

    def number(self, name: str, default: Any = ..., above: float = 0.0) -> float:
        """A number above a bound and below 1e30, or the default."""
        if not self._has(name, default):
            return float(default)
        value = self.values[name]
        if type(value) not in (int, float) or not above < value < 1e30:
            raise self._wrong(name, value, f"a number above {above:g}")
        return float(value)

    def flag(self, name: str, default: bool = False) -> bool:
        """True or false, or the default."""
        if not self._has(name, default):
            return default
        value = self.values[name]
        if type(value) is not bool:
            raise self._wrong(name, value, "true or false")
        return value

    def text(self, name: str, default: Any = ...) -> Any:
        """A string of valid Unicode, or the default."""
        if not self._has(name, default):
            return default
        value = self.values[name]
        if not isinstance(value, str):
            raise self._wrong(name, value, "a string")
        try:
            value.encode()
        except UnicodeEncodeError as error:  # JSON allows escaped lone surrogates
            raise self._wrong(name, value, f"valid Unicode text: character {error.start} is a lone surrogate") from None
        return value

    def texts(self, name: str) -> list[str]:
        """A list of strings; required."""
        value = self.values[name] if self._has(name, ...) else []
        if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
            raise self._wrong(name, value, "a list of strings")
        return value

    def numbers(self, name: str, length: int) -> np.ndarray:
        """An array of `length` whole numbers, or an empty one if it is missing."""
        value = self.values[name] if self._has(name, None) else np.zeros(0, int)
        if not isinstance(value, np.ndarray) or value.dtype.kind not in "iu" or len(value) not in (0, length):
            raise self._wrong(name, value, f"a list of {length} whole numbers")
        return value

    def inner(self, name: str) -> dict[str, Any]:
        """An object, or {} if it is missing."""
        value = self.values[name] if self._has(name, {}) else {}
        if not isinstance(value, dict):
            raise self._wrong(name, value, "an object")
        return value
