"""Whatever a file holds: it is read as it is, or refused with its name. Never a crash, never a silent change."""

import contextlib
import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from experiments import dpo, ppo, pretrain
from jaxgpt.data.comparisons import read_preferences
from jaxgpt.data.jsonl import read_rows, write_rows
from jaxgpt.data.templates import example_ids, parse, prompt_ids
from jaxgpt.data.tokenizer import ANSWER_END, train_bpe
from jaxgpt.errors import UserError
from jaxgpt.files import read_json
from jaxgpt.runs import checkpoints, run_record
from jaxgpt.runs.saved_model import load_model
from jaxgpt.runs.settings import flatten_json, settings_from_json, settings_to_json

FUZZ = settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
GOOD = (
    b'{"prompt": "Why?", "answers": ["so", "or so"], "choice": 1}\n'
    b'{"prompt": "\xc3\xa9", "answers": ["a", "b"], "choice": 0}\n'
)


@st.composite
def spoiled(draw: st.DrawFn, good: bytes) -> bytes:
    """A good file with some bytes replaced, removed, doubled or put in."""
    data = bytearray(good)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data)))
        piece = draw(
            st.binary(max_size=3) | st.sampled_from([b"\n", b'"', b"NaN", b"1e999", b"\xef\xbb\xbf", b"\\ud800", b"}{"])
        )
        data[at : at + draw(st.integers(0, 3))] = piece
    return bytes(data)


@contextlib.contextmanager
def refusal(name: str) -> Iterator[None]:
    """A UserError that names the file is as good as no error; anything else is a failure."""
    try:
        yield
    except UserError as error:
        assert name in str(error)  # noqa: PT017  an error is allowed, not demanded


def strictly(data: bytes) -> list[Any]:
    """What one list or the lines of JSON say, by the standard library alone; blank lines are skipped."""
    if (text := data.removeprefix(b"\xef\xbb\xbf").lstrip(b" \t\r\n")).startswith(b"["):
        return list(json.loads(text.decode()))
    lines = [line.removeprefix(b"\xef\xbb\xbf").decode() for line in data.split(b"\n")]
    return [json.loads(line) for line in lines if line.strip()]


@FUZZ
@given(data=spoiled(GOOD) | st.binary(max_size=60) | JSON.map(lambda value: json.dumps(value).encode()))
@example(data=b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}")
@example(data=b'{"a": 1, "a": 2}')
@example(data=b'{"a": NaN}')
@example(data=b'{"a": 1e999}')
@example(data=b'\xef\xbb\xbf\n[{"a": 1}]')
@example(data=b"\x1c\n\xc2\xa0")  # blank in Unicode's sense
def test_lines_are_read_as_they_are_or_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(data)
    with refusal("rows.jsonl"):
        found = [row for _, row in read_rows(path)]
        assert found == strictly(data)
        assert all(math.isfinite(x) for row in found for x in flatten_json(row).values() if isinstance(x, float))


@FUZZ
@given(data=spoiled(GOOD))
def test_preferences_are_read_as_they_are_or_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "preferences.jsonl"
    path.write_bytes(data)
    with refusal("preferences.jsonl"):
        found = list(read_preferences(path))
        for one, row in zip(found, strictly(data), strict=True):
            assert (one.prompt, list(one.answers), one.choice) == (row["prompt"], row["answers"], row["choice"])


@FUZZ
@given(rows=st.lists(st.dictionaries(st.text(st.characters(codec="utf-8"), max_size=5), JSON, max_size=3), max_size=4))
def test_written_rows_come_back(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    path = tmp_path / "rows.jsonl"
    try:
        write_rows(path, rows)
    except ValueError:
        assume(False)  # NaN or a lone surrogate: refused before the file appears
    assert [row for _, row in read_rows(path)] == rows


SETTINGS = {"pretrain": pretrain.Settings(), "ppo": ppo.Settings(), "dpo": dpo.Settings()}


@st.composite
def altered_settings(draw: st.DrawFn) -> tuple[str, dict[str, Any]]:
    """A stage's settings with one value, somewhere, replaced, removed or added."""
    stage = draw(st.sampled_from(sorted(SETTINGS)))
    data = settings_to_json(SETTINGS[stage])
    inner = data
    while True:
        name = draw(st.sampled_from(sorted(inner)))
        if not isinstance(inner[name], dict) or draw(st.booleans()):
            break
        inner = inner[name]
    match draw(st.integers(0, 3)):
        case 0:
            del inner[name]
        case 1:
            inner[draw(st.text(max_size=6))] = draw(JSON)
        case _:
            inner[name] = draw(JSON)
    return stage, data


@FUZZ
@given(altered=altered_settings())
def test_settings_are_taken_as_they_are_or_refused(tmp_path: Path, altered: tuple[str, dict[str, Any]]) -> None:
    stage, data = altered
    path = tmp_path / "settings.json"
    try:
        path.write_text(json.dumps(data), encoding="utf-8")
    except UnicodeEncodeError:
        assume(False)
    kind = type(SETTINGS[stage])
    try:
        found = settings_from_json(kind, read_json(path), where=str(path))
    except UserError:
        return
    complete = flatten_json(settings_to_json(found))
    for name, value in flatten_json(data).items():
        if value == {}:
            continue  # a group of settings without any: the defaults
        same_path = isinstance(value, str) and value != "" and complete[name] == str(Path(value))  # a//b is a/b
        assert same_path or (complete[name] == value and isinstance(complete[name], bool) == isinstance(value, bool))
    assert dataclasses.is_dataclass(found)


@FUZZ
@given(data=st.binary(max_size=40) | JSON.map(lambda value: json.dumps(value).encode()))
def test_records_of_runs_models_and_checkpoints_are_refused_by_name(tmp_path: Path, data: bytes) -> None:
    for name in ("checkpoint.json", "model.json", "settings.json"):
        (tmp_path / name).write_bytes(data)
    with refusal("checkpoint.json"):
        checkpoints.read_checkpoint(tmp_path)
    with refusal("model.json"):
        load_model(tmp_path)
    with refusal("settings.json"):
        run_record.read_run_record(tmp_path)


TOK = train_bpe(["the quick brown fox </answer> <prompt> " * 3], 300)
TEXT = st.text(st.characters(codec="utf-8"), max_size=30) | st.sampled_from(
    ["</answer>", "<prompt>x</prompt>", "<answer></answer></answer>", "<pad>", "<bos>"]
)


@FUZZ
@given(prompt=TEXT, answer=TEXT)
def test_no_text_can_forge_the_template(prompt: str, answer: str) -> None:
    """One example, one end: the tags of the template are ids that no text makes."""
    ids, roles = example_ids(TOK, prompt, answer)
    assert ids.count(ANSWER_END) == 1 and ids[-1] == ANSWER_END
    found = parse(TOK, ids)
    assert (found.prompt, found.answer) == (prompt, answer)
    assert ids[: len(prompt_ids(TOK, prompt))] == prompt_ids(TOK, prompt) and len(roles) == len(ids)


def test_the_fuzz_can_fail(tmp_path: Path) -> None:
    with pytest.raises(AssertionError), refusal("other.jsonl"):
        list(read_rows(tmp_path / "rows.jsonl"))
