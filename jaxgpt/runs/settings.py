"""Settings (nested frozen dataclasses) as JSON and back, strictly; and the atomic JSON files that hold them."""

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from jaxgpt.errors import UserError
from jaxgpt.files import did_you_mean

T = TypeVar("T")


def settings_to_json(settings: Any) -> Any:
    """Dataclasses become objects, tuples lists, paths strings. UserError for a float JSON has no number for."""
    if dataclasses.is_dataclass(settings) and not isinstance(settings, type):
        hints = typing.get_type_hints(type(settings))
        return {f.name: _field_to_json(hints[f.name], getattr(settings, f.name)) for f in dataclasses.fields(settings)}
    if isinstance(settings, Mapping):
        return {str(key): settings_to_json(value) for key, value in settings.items()}
    if isinstance(settings, (list, tuple)):
        return [settings_to_json(value) for value in settings]
    if isinstance(settings, Path):
        return str(settings)
    if isinstance(settings, float) and not math.isfinite(settings):
        raise UserError(f"a setting is {settings}; settings must be finite numbers")
    if settings is None or isinstance(settings, (bool, int, float, str)):
        return settings
    raise TypeError(f"no JSON form for a setting of type {type(settings).__name__}")


def _field_to_json(kind: Any, value: Any) -> Any:
    whole = kind is float and isinstance(value, int)  # `lr: float = 1` is 1.0, as it is after a round trip
    return settings_to_json(float(value) if whole else value)


def settings_from_json(kind: type[T], data: Any, where: str = "settings") -> T:
    """The inverse of `settings_to_json`. Fields left out keep their default; anything else that does not fit is a
    UserError that names the field (unknown name, wrong type, missing value), prefixed by `where`."""
    return _value(kind, data, "", where)


def _value(kind: Any, data: Any, name: str, where: str) -> Any:
    """`data` as an instance of the annotation `kind`; `name` is the dotted field, '' at the top."""
    if dataclasses.is_dataclass(kind):
        return _dataclass(kind, data, name, where)
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Annotated:
        return _value(args[0], data, name, where)
    if origin in (typing.Union, types.UnionType):
        return _union(args, data, name, where)
    if origin is typing.Literal:
        if data in args and type(data) in {type(arg) for arg in args}:
            return data
        choices = [str(arg) for arg in args]
        hint = did_you_mean(str(data), choices)
        raise UserError(f"{where}: {name} is {data!r}; choose one of {', '.join(choices)}{hint}")
    if kind is tuple or origin is tuple:
        return _tuple(args, data, name, where)
    if kind is dict or origin in (dict, Mapping):
        _expect(isinstance(data, dict), "an object", data, name, where)
        inner = args[1] if args else Any
        return {key: _value(inner, value, f"{name}.{key}", where) for key, value in data.items()}
    return _scalar(kind, data, name, where)


def _scalar(kind: Any, data: Any, name: str, where: str) -> Any:
    if kind is Path:
        _expect(isinstance(data, str) and data != "", "a path", data, name, where)
        return Path(data)
    if kind is float:
        number = isinstance(data, (int, float)) and not isinstance(data, bool) and math.isfinite(data)
        _expect(number, "a number", data, name, where)
        return float(data)
    if kind in (bool, int, str, type(None)):
        _expect(type(data) is kind, _KINDS[kind], data, name, where)
        return data
    if kind is Any:
        return data
    raise TypeError(f"settings may not hold a {kind} ({name})")


_KINDS = {bool: "true or false", int: "a whole number", str: "text", type(None): "null"}


def _expect(fits: bool, wanted: str, data: Any, name: str, where: str) -> None:
    if not fits:
        shown = repr(data) if len(repr(data)) <= 60 else f"{repr(data)[:57]}..."
        raise UserError(f"{where}: {name or 'the top level'} must be {wanted}, not {shown}")


def _dataclass(kind: Any, data: Any, name: str, where: str) -> Any:
    _expect(isinstance(data, dict), "an object", data, name, where)
    hints = typing.get_type_hints(kind, include_extras=True)
    fields = {f.name: f for f in dataclasses.fields(kind) if f.init}
    prefix = f"{name}." if name else ""
    for key in data:
        if key not in fields:
            raise UserError(f"{where}: unknown setting {prefix}{key}{did_you_mean(key, fields)}")
    for key, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and key not in data:
            raise UserError(f"{where}: the setting {prefix}{key} is missing")
    return kind(**{key: _value(hints[key], value, prefix + key, where) for key, value in data.items()})


def _tuple(args: tuple[Any, ...], data: Any, name: str, where: str) -> tuple[Any, ...]:
    _expect(isinstance(data, list), "a list", data, name, where)
    if not args or (len(args) == 2 and args[1] is Ellipsis):
        kinds: tuple[Any, ...] = (args[0] if args else Any,) * len(data)
    else:
        _expect(len(data) == len(args), f"a list of {len(args)}", data, name, where)
        kinds = args
    items = enumerate(zip(kinds, data, strict=True))
    return tuple(_value(kind, item, f"{name}[{i}]", where) for i, (kind, item) in items)


def _union(args: tuple[Any, ...], data: Any, name: str, where: str) -> Any:
    if data is None and type(None) in args:
        return None
    errors = []
    for kind in (arg for arg in args if arg is not type(None)):
        try:
            return _value(kind, data, name, where)
        except UserError as error:
            errors.append(error)
    raise errors[0]


def flat_json(value: Any, prefix: str = "") -> dict[str, Any]:
    """{"model": {"width": 8}} -> {"model.width": 8}: one entry a setting, for comparing and naming them."""
    if not isinstance(value, Mapping):
        return {prefix: value}
    flat = {}
    for key, inner in value.items():
        flat.update(flat_json(inner, f"{prefix}.{key}" if prefix else str(key)))
    return flat
