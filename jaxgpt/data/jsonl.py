"""Rows of JSON, read strictly and written atomically. Every error names the file, the line and the field."""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from jaxgpt.errors import UserError
from jaxgpt.files import open_text, parse_json, replace_file

LONGEST_LINE = 16 * 2**20  # bytes
CONTEXT = (  # fields in which other tools store part of what the model is asked
    "system", "system_prompt", "history", "context", "instruction", "input", "question", "documents", "tools", "images",
)  # fmt: skip


def read_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield ("file:line", object) for each line, one at a time; blank lines are skipped. A file that starts with "["
    is one JSON list, whose objects are "file: row 0" and so on. Names don't matter, and gzip is decompressed.

    Raises UserError for a missing file and for a line that is not UTF-8, is not one JSON object, is longer than
    `LONGEST_LINE`, or contains NaN or Infinity.
    """
    with open_text(path) as file:
        start = file.peek(1).lstrip(b"\xef\xbb\xbf \t\r\n")
        if start.startswith(b"<"):
            raise UserError(f"{path} is a web page or XML, not rows of JSON; download the file itself")
        if start.startswith(b"["):
            rows = _parse(_decode(file.read(), str(path)), str(path), "one list of objects, or one object per line")
            yield from ((where := f"{path}: row {i}", _object(row, where)) for i, row in enumerate(rows))
            return
        for number, line in enumerate(_read_lines(file, path), start=1):
            where = f"{path}:{number}"
            text = _decode(line, where)
            if text.strip():
                yield where, _object(_parse(text, where, "one object per line"), where)


def text_field(row: Mapping[str, Any], name: str, where: str) -> str:
    """The non-blank text in field `name`. Raises UserError if there is none."""
    if name not in row:
        raise UserError(f"{where}: no field {name!r}; this line has {', '.join(map(repr, row)) or 'no fields'}")
    return checked_text(row[name], f"{where}: {name}")


def checked_text(value: Any, where: str, *, blank: bool = False) -> str:
    """`value` if it is valid text (non-blank unless `blank`). Otherwise raises a UserError that starts with `where`."""
    if not isinstance(value, str):
        advice = "put it in quotes" if isinstance(value, (int, float)) else "give a single string"
        raise UserError(f"{where} is {type(value).__name__}, not text; {advice}")
    if not blank and not value.strip():
        raise UserError(f"{where} is empty; write some text or remove the line")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise UserError(f"{where} holds a lone surrogate, which is not valid Unicode; remove it") from None
    return value


def refuse_ignored_context(row: Mapping[str, Any], prompt: str, where: str) -> None:
    """UserError if a field of `CONTEXT` holds something that is not in the prompt: it would be silently dropped."""
    for name in CONTEXT:
        value = row.get(name)
        if value and not (isinstance(value, str) and value.strip() in prompt):
            raise UserError(f"{where}: {name!r} would be ignored; write it into the prompt, or remove it")


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> int:
    """Write one object per line, atomically, and return the number of lines."""
    count = 0
    path.parent.mkdir(parents=True, exist_ok=True)
    with replace_file(path) as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False, allow_nan=False).encode() + b"\n")
            count += 1
    return count


def _read_lines(file: BinaryIO, path: Path) -> Iterator[bytes]:
    number = 0
    while line := file.readline(LONGEST_LINE + 1):
        number += 1
        if len(line) > LONGEST_LINE:
            raise UserError(f"{path}:{number} is longer than {LONGEST_LINE >> 20} MiB; split it into several lines")
        yield line


def _decode(line: bytes, where: str) -> str:
    try:
        return line.removeprefix(b"\xef\xbb\xbf").decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: byte {error.start + 1} is not UTF-8; save the file as UTF-8") from error


def _parse(text: str, where: str, shape: str) -> Any:
    try:
        return parse_json(text, where)
    except UserError:
        raise
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        raise UserError(f"{where}: not JSON at {line}character {error.colno}: {error.msg}; {shape}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not usable JSON ({str(error)[:80]}); {shape}, none deeply nested") from error


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f'{where}: a {type(value).__name__}, not an object; write {{"field": value}}')
    return value
