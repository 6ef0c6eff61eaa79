"""Strict conversion of settings (nested frozen dataclasses) to JSON and back: msgspec converts, and this module reports
in plain words which setting does not fit. Ranges (`config.Range`) are checked by the settings themselves."""

import dataclasses
import math
import re
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from jaxgpt.errors import UserError, needs_extra
from jaxgpt.files import suggest_name

with needs_extra("train"):
    import msgspec

T = TypeVar("T")
TYPE_NAMES = {
    "bool": "true or false",
    "int": "a whole number",
    "float": "a number",
    "str": "text",
    "array": "a list",
    "object": "an object",
}


def settings_to_json(settings: Any) -> Any:
    """Dataclasses become objects, tuples become lists, and paths strings. UserError for a NaN or infinite float."""
    plain = msgspec.to_builtins(settings, enc_hook=_path_to_text)
    for name, value in leaves(plain):
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"a setting is {value}; settings must be finite numbers")
        if isinstance(value, str) and not _is_unicode(value):
            raise UserError(f"{name} is {value!r}, which is not valid Unicode text; choose another name")
    if dataclasses.is_dataclass(settings) and not isinstance(settings, type):
        typed = msgspec.convert(plain, type(settings), dec_hook=_text_to_path)  # `lr: float = 1` becomes 1.0
        plain = msgspec.to_builtins(typed, enc_hook=_path_to_text)
    return msgspec.json.decode(msgspec.json.encode(plain))


def settings_from_json(kind: type[T], data: Any, where: str = "settings") -> T:
    """The inverse of `settings_to_json`. Omitted fields keep their defaults; anything else that does not fit (unknown
    name, wrong type, missing value) is a UserError that names the field, prefixed by `where`."""
    _refuse_unknown(kind, data, "", where)
    for name, value in leaves(data):
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{where}: {name} must be a number, not {value}")
    try:
        return msgspec.convert(data, kind, dec_hook=_text_to_path)
    except msgspec.ValidationError as error:
        if isinstance(error.__cause__, UserError):  # from the settings' own __post_init__
            place = str(error).partition(" - at `$.")[2].rstrip("`")
            raise UserError(f"{where}: {place and place + '.'}{error.__cause__}") from None
        raise UserError(f"{where}: {_explain(kind, data, str(error))}") from None


def flatten_json(value: Any, prefix: str = "") -> dict[str, Any]:
    """{"model": {"width": 8}} -> {"model.width": 8}: one entry per setting, to compare settings and to name them."""
    if not isinstance(value, Mapping):
        return {prefix: value}
    flat = {}
    for key, inner in value.items():
        flat.update(flatten_json(inner, f"{prefix}.{key}" if prefix else str(key)))
    return flat


def _path_to_text(value: object) -> str:
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"no JSON form for a setting of type {type(value).__name__}")


def _text_to_path(kind: type, value: object) -> Path:
    if kind is not Path:
        raise NotImplementedError(f"settings may not hold a {kind}")
    if not isinstance(value, str) or not value or "\0" in value or not _is_unicode(value):
        raise ValueError("Expected `a path`")
    return Path(value)


def _is_unicode(text: str) -> bool:
    """False for a text with lone surrogates: JSON allows them, and Python has them in names that are not UTF-8."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Every value that is neither an object nor a list, with its dotted name."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from leaves(inner, f"{name}.{key}" if name else str(key))
    elif isinstance(value, (list, tuple)):
        for i, inner in enumerate(value):
            yield from leaves(inner, f"{name}[{i}]")
    else:
        yield name, value


def _refuse_unknown(kind: Any, data: Any, prefix: str, where: str) -> None:
    """UserError for a name that the dataclass doesn't have: msgspec would ignore it."""
    if not (dataclasses.is_dataclass(kind) and isinstance(data, Mapping)):
        return
    hints = typing.get_type_hints(kind)
    fields = {field.name: hints[field.name] for field in dataclasses.fields(kind) if field.init}
    for key, value in data.items():
        if key not in fields:
            raise UserError(f"{where}: unknown setting {prefix}{key}{suggest_name(key, fields)}")
        _refuse_unknown(fields[key], value, f"{prefix}{key}.", where)


def _explain(kind: Any, data: Any, message: str) -> str:
    """msgspec's "Expected `int`, got `str` - at `$.model.layers`" in plain words, with the value given."""
    what, _, place = message.partition(" - at `$")
    name = place.rstrip("`").removeprefix(".")
    missing = re.search(r"missing required field `(\w+)`", what)
    if missing:
        return f"the setting {name}{'.' if name else ''}{missing[1]} is missing"
    for key in re.findall(r"\w+", name):
        kind = typing.get_type_hints(kind)[key] if dataclasses.is_dataclass(kind) else None
        data = data[int(key) if key.isdecimal() else key]
    if typing.get_origin(kind) is typing.Literal:
        choices = [str(choice) for choice in typing.get_args(kind)]
        return f"{name} is {data!r}; choose one of {', '.join(choices)}{suggest_name(str(data), choices)}"
    wanted = re.search(r"Expected `([^`|]+)[^`]*`(?: of length (\d+))?", what)
    shown = repr(data) if len(repr(data)) <= 60 else f"{repr(data)[:57]}..."
    words = what if wanted is None else TYPE_NAMES.get(wanted[1].strip(), wanted[1].strip())
    length = f" of {wanted[2]}" if wanted and wanted[2] else ""
    return f"{name or 'the top level'} must be {words}{length}, not {shown}"
