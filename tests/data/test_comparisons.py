"""Preference files round-trip, can be written by hand, and every error names file, line and field."""

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxgpt.data import jsonl
from jaxgpt.data.comparisons import (
    Preference,
    drop_long_preferences,
    read_preferences,
    tokenize_preferences,
    write_preferences,
)
from jaxgpt.data.templates import parse
from jaxgpt.data.tokenizer import ANSWER_END, train_char
from jaxgpt.errors import UserError

TEXT = st.text(st.characters(codec="utf-8"), max_size=20)


@st.composite
def preferences(draw: st.DrawFn) -> Preference:
    answers = tuple(draw(st.lists(TEXT, min_size=2, max_size=5)))
    return Preference(
        prompt=draw(TEXT.filter(lambda text: bool(text.strip()))),
        answers=answers,
        choice=draw(st.integers(0, len(answers) - 1)),
        ended=tuple(draw(st.lists(st.booleans(), min_size=len(answers), max_size=len(answers)))),
        meta=draw(st.dictionaries(TEXT, st.integers() | TEXT | st.booleans() | st.none(), max_size=2)),
    )


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(written=st.lists(preferences(), min_size=1, max_size=4))
def test_round_trip(tmp_path: Path, written: list[Preference]) -> None:
    path = tmp_path / "deep" / "preferences.jsonl"
    assert write_preferences(path, written) == len(written)
    assert list(read_preferences(path)) == written


def test_a_person_can_write_one(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "p", "answers": ["a", "a", ""], "choice": 2}\r\n\n')
    assert list(read_preferences(path)) == [Preference("p", ("a", "a", ""), 2, (True, True, True), {})]


GOOD = {"prompt": "p", "answers": ["a", "b"], "choice": 1}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({**GOOD, "answers": ["a"], "choice": 0}, "nothing to choose from"),
        ({**GOOD, "answers": []}, "nothing to choose from"),
        ({**GOOD, "answers": "ab"}, "answers is str, not a list"),
        ({**GOOD, "answers": ["a", 3]}, r"answers\[1\] is int, not text"),
        ({**GOOD, "choice": 2}, "choice is 2; .* from 0 to 1"),
        ({**GOOD, "choice": -1}, "choice is -1"),
        ({**GOOD, "choice": True}, "choice is True"),
        ({**GOOD, "choice": 1.0}, "choice is 1.0"),
        ({**GOOD, "choice": None}, "choice is None"),
        ({**GOOD, "prompt": " \n"}, "prompt is empty"),
        ({**GOOD, "prompt": 5}, "prompt is int"),
        ({**GOOD, "ended": [True]}, "ended must be a list of 2"),
        ({**GOOD, "ended": [True, 1]}, "ended must be a list of 2"),
        ({**GOOD, "ended": []}, "ended is empty"),
        ({**GOOD, "meta": []}, "meta is list, not an object"),
        ({**GOOD, "note": "x"}, "unknown field 'note'"),
        ({"prompt": "p", "answers": ["a", "b"]}, "no field 'choice'"),
        ({"answers": ["a", "b"], "choice": 0}, "no field 'prompt'"),
        ({"prompt": "p", "choice": 0}, "no field 'answers'"),
        ([1], "a list, not an object"),
        ("{'prompt': 1}", "not JSON at character 2"),
        ('{"prompt": "p", "answers": ["a", "b"], "choice": NaN}', "NaN is not JSON"),
        ('{"prompt": "p", "answers": ["a", "b"], "choice": 0, "meta": {"x": -Infinity}}', "-Infinity is not JSON"),
        ('{"prompt": "p", "answers": ["a", "b"], "choice": 0, "meta": {"x": 1e999}}', "1e999 is not JSON"),
        ('{"prompt": "\\ud800", "answers": ["a", "b"], "choice": 0}', "prompt holds a lone surrogate"),
        ('{"prompt": "p", "answers": ["a", "\\udc00"], "choice": 0}', r"answers\[1\] holds a lone surrogate"),
        ("[" * 200_000, "not usable JSON"),
        ('{"choice": ' + "9" * 5000 + "}", "not usable JSON"),
        (b'{"prompt": "\xff"}', "byte 13 is not UTF-8"),
    ],
)
def test_mistakes_name_file_line_and_field(tmp_path: Path, line: object, message: str) -> None:
    path = tmp_path / "bad.jsonl"
    raw = line if isinstance(line, bytes) else (line if isinstance(line, str) else json.dumps(line)).encode()
    path.write_bytes(json.dumps(GOOD).encode() + b"\n\n" + raw + b"\n")
    reader = read_preferences(path)
    assert next(reader).choice == 1  # it streams: the good line comes before the error
    with pytest.raises(UserError, match=message) as caught:
        next(reader)
    assert str(caught.value).startswith(f"{path}:3: ")
    assert "\n" not in str(caught.value)


def test_unusable_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="cannot read .*missing.jsonl"):
        list(read_preferences(tmp_path / "missing.jsonl"))
    with pytest.raises(UserError, match="cannot read"):
        list(read_preferences(tmp_path))
    (tmp_path / "empty.jsonl").write_text("\n \n")
    with pytest.raises(UserError, match="holds no preferences"):
        list(read_preferences(tmp_path / "empty.jsonl"))
    monkeypatch.setattr(jsonl, "LONGEST_LINE", 100)
    long = tmp_path / "long.jsonl"
    long.write_text(json.dumps(GOOD) + "\n" + json.dumps({**GOOD, "prompt": "p" * 100}))
    with pytest.raises(UserError, match="long.jsonl:2 is longer"):
        list(read_preferences(long))


def test_writing_is_all_or_nothing(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    write_preferences(path, [Preference("p", ("a", "b"), 0)])
    before = path.read_bytes()

    def breaks() -> object:
        yield Preference("q", ("a", "b"), 1)
        raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError):
        write_preferences(path, breaks())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="JSON"):
        write_preferences(path, [Preference("p", ("a", "b"), 0, meta={"score": float("nan")})])
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_rankings_in_ids() -> None:
    tok = train_char(["abcdefgh "])
    preference = Preference("ab", ("cd", "", "cdefgh"), 1, (True, True, False))
    (ranking,) = tokenize_preferences(tok, [preference])
    parsed = [parse(tok, ids) for ids, _ in ranking.rows]
    assert [(p.prompt, p.answer, p.ended) for p in parsed] == [
        ("ab", "cd", True),
        ("ab", "", True),
        ("ab", "cdefgh", False),
    ]
    assert ranking.choice == 1
    assert [sum(roles) for _, roles in ranking.rows] == [3, 1, 6]
    assert [ids[-1] == ANSWER_END for ids, _ in ranking.rows] == [True, True, False]
    short = tokenize_preferences(tok, [Preference("ab", ("c", "d"), 0)])
    longest = max(len(ids) for ids, _ in ranking.rows)
    assert drop_long_preferences([ranking, *short], longest) == ([ranking, *short], 0)
    assert drop_long_preferences([ranking, *short], longest - 1) == (short, 1)
    with pytest.raises(UserError, match="none of 1 preferences fits 3"):
        drop_long_preferences([ranking], 3)
