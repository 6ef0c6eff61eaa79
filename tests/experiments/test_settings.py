"""Every numeric setting of every experiment has a range, and nothing outside it gets as far as the experiment."""

import dataclasses
import functools
import importlib
import math
import re
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxgpt.config import MOST_FLOAT, MOST_INT, ModelConfig, Range
from jaxgpt.errors import UserError
from jaxgpt.runs.cli import cli, parse
from jaxgpt.runs.settings import settings_from_json

ROOT = Path(__file__).parents[2]
FILES = [
    path
    for path in sorted([*ROOT.glob("experiments/**/*.py"), ROOT / "tpu/plan.py"])
    if "\nclass Settings" in path.read_text(encoding="utf-8")
]
NAMES = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in FILES]


def numbers(kind: type, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any, list[Range]]]:
    """(path, type, ranges) of every setting that is a number, or a tuple of numbers."""
    for name, hint in typing.get_type_hints(kind, include_extras=True).items():
        if typing.get_origin(hint) is typing.ClassVar:
            continue
        marks = getattr(hint, "__metadata__", ())
        plain = typing.get_args(hint)[0] if marks else hint
        if dataclasses.is_dataclass(plain):
            yield from numbers(typing.cast(type, plain), (*path, name))
        elif {int, float} & set(leaves(plain)):
            yield (*path, name), plain, [mark for mark in marks if isinstance(mark, Range)]


def leaves(hint: Any) -> list[Any]:
    """int, float and whatever else a type is made of."""
    if typing.get_origin(hint) is typing.Literal:
        return []
    inside = typing.get_args(hint)
    return [leaf for part in inside for leaf in leaves(part)] if inside else [hint]


def just_outside(allowed: Range, plain: Any) -> list[float]:
    """The numbers nearest to the range that are not in it; for a float also those that are not finite."""
    whole = float not in leaves(plain)
    ends = [
        allowed.least - 1 if whole else math.nextafter(allowed.least, -math.inf),
        allowed.most + 1 if whole else math.nextafter(allowed.most, math.inf),
        allowed.above,
        allowed.below,
    ]
    found = [int(end) if whole else float(end) for end in ends if math.isfinite(end) and end not in allowed]
    return found + ([] if whole else [math.nan, math.inf, -math.inf])


def too_large_for_arrays(allowed: Range, plain: Any) -> list[float]:
    """Numbers in the range that int32 or float32 can't hold."""
    found = [MOST_INT + 1, 10**18] if float not in leaves(plain) else [1.1 * MOST_FLOAT, 1e308, 1e-320]
    return [number for number in found if number in allowed and (isinstance(number, float) or allowed.most == math.inf)]


def shaped(plain: Any, number: float) -> Any:
    """The number as a value of this type: itself, or in a tuple."""
    if typing.get_origin(plain) is not tuple:
        return number
    inner = typing.get_args(plain)
    return tuple(shaped(one, number) for one in (inner[:1] if inner[-1] is ... else inner))


@pytest.mark.parametrize("name", NAMES)
def test_a_number_outside_its_range_is_refused_by_name(name):
    kind = importlib.import_module(name).Settings
    found = list(numbers(kind))
    assert found or name == "experiments.votes"
    for path, plain, ranges in found:
        dotted = ".".join(path)
        assert len(ranges) == 1, f"{name}: {dotted} has no Range; Range() allows any finite number"
        for number in too_large_for_arrays(ranges[0], plain):
            written = functools.reduce(lambda inner, step: {step: inner}, reversed(path), shaped(plain, number))
            limit = re.escape(str(MOST_INT)) if isinstance(number, int) else "a number that float32 can hold"
            with pytest.raises(UserError, match=f"^file: {re.escape(f'{dotted} is {number}')}; it must be .*{limit}"):
                settings_from_json(kind, written, "file")
        for number in just_outside(ranges[0], plain):
            value = shaped(plain, number)
            message = f"{path[-1]} is {number}; it must be "
            owner: Any = kind()
            for step in path[:-1]:
                owner = getattr(owner, step)
            with pytest.raises(UserError) as error:
                dataclasses.replace(owner, **{path[-1]: value})
            assert str(error.value).startswith(message) and str(error.value).endswith(str(ranges[0]))
            if math.isfinite(number):
                written = functools.reduce(lambda inner, step: {step: inner}, reversed(path), value)
                with pytest.raises(UserError) as error:
                    settings_from_json(kind, written, "file")
                assert str(error.value) == f"file: {dotted} is {number}; it must be {ranges[0]}"


def test_temperature_0_is_allowed_only_where_text_is_shown():
    """Greedy answers teach nothing, and the answers to one prompt would all be the same."""
    greedy = {
        name
        for name in NAMES
        for path, _, ranges in numbers(importlib.import_module(name).Settings)
        if path[-1] == "temperature" and 0 in ranges[0]
    }
    assert greedy == {"experiments.chat"}


@pytest.mark.parametrize(
    ("name", "argv", "message"),
    [
        ("preferences", ["--temperature", "0"], "temperature is 0.0; it must be above 0"),
        ("pretrain", ["--log-every", "0"], "log_every is 0; it must be at least 1"),
        ("ppo", ["--iterations", "-5"], "iterations is -5; it must be at least 1"),
        ("dpo", ["--beta=nan"], "beta is nan; it must be finite and above 0"),
        ("align", ["--ppo.ppo.new-tokens", "0"], "ppo.ppo.new_tokens is 0; it must be at least 1"),
        ("pretrain", ["--batch", str(10**18)], f"batch is {10**18}; it must be at most {MOST_INT}"),
        ("pretrain", ["--batch", "2000000000"], "a batch of 2000000000 rows of 96 tokens is too large: at most "),
        (
            "pretrain",
            ["--model.layers", str(10**9)],
            f"model.layers is {10**9}; it must be at least 1 and at most 1000",
        ),
        ("pretrain", ["--learning-rate", "1e39"], "learning_rate is 1e+39; it must be a number that float32 can hold"),
        ("oracle", ["--vocab", "9", "--tokens", "9"], "vocab 9 and tokens 9 make too many answers to list: "),
        ("studies.frontier", ["--betas", "1", "0"], "betas is 0.0; it must be above 0"),
    ],
)
def test_a_flag_is_refused_before_anything_is_made(name, argv, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(f"experiments.{name}")
    with pytest.raises(SystemExit) as stop:
        cli(module.main, module.Settings, module.PRESETS, argv)
    output = capsys.readouterr()
    assert stop.value.code == 2 and output.err.startswith(f"error: {message}") and output.err.count("\n") == 1
    assert not list(tmp_path.iterdir())


EXTREMES = st.one_of(
    st.integers(-(2**80), 2**80),
    st.integers(0, 80).map(lambda n: 2**n),
    st.floats(),
    st.integers(-400, 308).map(lambda n: 10.0**n),
)


CHOICES = functools.cache(
    lambda name: {".".join(found[0]): found for found in numbers(importlib.import_module(name).Settings)}
)


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_an_accepted_number_is_one_that_the_arrays_hold(data):
    """Whatever number is given for any setting of any experiment: it is refused in one line, or int32 or float32 hold
    it (a setting with an upper limit of its own aside) and no size of a model overflows."""
    name = data.draw(st.sampled_from([name for name in NAMES if name != "experiments.votes"]))  # which has no numbers
    kind, choices = importlib.import_module(name).Settings, CHOICES(name)
    path, plain, (allowed,) = choices[data.draw(st.sampled_from(sorted(choices)))]
    number = data.draw(EXTREMES)
    written = functools.reduce(lambda inner, step: {step: inner}, reversed(path), shaped(plain, number))
    try:
        found = settings_from_json(kind, written, "file")
    except UserError as error:
        assert str(error).startswith("file: ") and "\n" not in str(error)  # noqa: PT017  allowed, not demanded
        return
    if float in leaves(plain):
        assert number == 0 or 0 < abs(np.float32(number)) < math.inf
    else:
        assert abs(number) <= max(MOST_INT, allowed.most if allowed.most < math.inf else 0)
    if isinstance(model := getattr(found, "model", None), ModelConfig):
        assert 0 < 4 * (model.parameters + model.block * model.width) < 2**60 and model.layers <= 1000


def test_help_shows_every_range(capsys):
    module = importlib.import_module("experiments.ppo")
    with pytest.raises(SystemExit):
        parse(module.Settings, {}, ["--help"])
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for path, _, ranges in numbers(module.Settings):
        flag = f"--{'.'.join(path).replace('_', '-')} "
        assert f"; {ranges[0]})" in shown.partition(flag)[2].partition(" --")[0], flag
