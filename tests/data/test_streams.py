"""Raw text in pieces and tokens on disk: the same as all at once, whatever is killed, damaged or too large."""

import errno
import fcntl
import functools
import json
import math
import re
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxgpt import files
from jaxgpt.data import documents, pipelines, sources, splits, streams, tokenizer
from jaxgpt.data.documents import Documents, cut_pieces
from jaxgpt.data.streams import tokenize_stream
from jaxgpt.data.token_stream import count_shared
from jaxgpt.data.tokenizer import BOS, Tokenizer, train_bpe, train_char
from jaxgpt.errors import UserError
from tests.test_caches import empty, flip, replace_by_folder

TEXTS = ["a film", "", *(f"the plot of {i} </answer> é\n\nis  {'long ' * (i % 7)}" for i in range(12)), "字"]
SPACES = train_bpe([a + gap * n + b for a in "a.é" for b in "a." for gap in " \n" for n in range(9)], 300)
BPE, CHAR = train_bpe(TEXTS, 300), train_char(TEXTS[:20])  # which doesn't know 字


def joined(texts: list[str], tok: Tokenizer) -> np.ndarray:
    """The stream as one array, each document encoded whole."""
    ids = [i for text in texts if text for i in (BOS, *tok.encode(text))]
    return np.array([*ids, BOS], np.int32)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards of 50 tokens, pieces of 40 characters, three pieces encoded at a time."""
    monkeypatch.setattr(streams, "SHARD", 50)
    monkeypatch.setattr(streams, "_BATCH", 3)
    for module in (streams, documents):
        monkeypatch.setattr(module, "PIECE", 40)


def read(cache: Path, tok: Tokenizer = CHAR, texts: Any = TEXTS) -> list[int]:
    return tokenize_stream(texts, tok, cache)[:].tolist()  # type: ignore[no-any-return]


def folder_of(cache: Path) -> Path:
    (folder,) = (cache / "streams").iterdir()
    return folder


# --- one stream


@pytest.mark.parametrize("tok", [BPE, CHAR], ids=["bpe", "char"])
def test_a_stream_on_disk_is_the_array_of_all_documents(tmp_path: Path, small: None, tok: Tokenizer) -> None:
    """Tokens, slices, batches, their positions, and evaluation windows: the same types and bits."""
    texts = TEXTS if tok is CHAR else [text for text in TEXTS if len(text) <= 40]
    stream, whole = tokenize_stream(texts, tok, tmp_path), joined(texts, tok)
    assert len(stream) == len(whole) > 60 and stream[:].dtype == np.int32
    assert (stream.documents, stream.blank) == (len(texts), 1) and stream.bytes == len("".join(texts).encode())
    assert len(list(folder_of(tmp_path).glob("*.tokens"))) == math.ceil(len(whole) / 50)
    for begin in range(0, len(whole) + 9, 7):
        for end in (begin - 1, begin, begin + 1, begin + 60, begin + 130):
            assert np.array_equal(stream[begin:end], whole[begin:end]), (begin, end)
    for part in range(2):
        ours, theirs = (pipelines.windows(one, 8, 4, seed=3, part=part, parts=2) for one in (stream, whole))
        for _ in range(len(whole) // 8):  # more than two epochs
            assert ours.get_state() == theirs.get_state()
            a, b = next(ours), next(theirs)
            assert all(np.array_equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in b)
    for a, b in zip(*(pipelines.window_eval(one, 8, 4, 5) for one in (stream, whole)), strict=True):
        assert all(np.array_equal(a[name], b[name]) for name in b)


def test_a_stream_is_kept_and_named_by_text_and_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = read(tmp_path)
    assert read(tmp_path, BPE) != found and len(list((tmp_path / "streams").iterdir())) == 2
    with monkeypatch.context() as patch:
        patch.setattr(streams, "_encode", None)  # only the cache can supply it
        assert read(tmp_path) == found
    read(tmp_path, texts=TEXTS[1:])
    assert len(list((tmp_path / "streams").iterdir())) == 3
    with pytest.raises(UserError, match="every document is empty"):
        tokenize_stream(["", ""], CHAR, tmp_path)


def test_a_large_vocabulary_takes_four_bytes(tmp_path: Path) -> None:
    for size, kind in ((2**16, "<u2"), (2**16 + 1, "<i4")):
        last: Any = SimpleNamespace(
            vocab_size=size,
            fingerprint=str(size),
            template=CHAR.template,
            encode_arrays=lambda texts, size=size: [np.array([size - 1], np.int32) for _ in texts],
        )
        assert tokenize_stream(["a"], last, tmp_path / kind)[:].tolist() == [BOS, size - 1, BOS]
        assert json.loads((folder_of(tmp_path / kind) / "index.json").read_text())["dtype"] == kind


def test_documents_in_two_streams_are_counted_by_their_hashes(tmp_path: Path, small: None) -> None:
    held, train = (tokenize_stream(texts, CHAR, tmp_path) for texts in (["a", "b", "b", "", "x" * 90], TEXTS))
    assert count_shared(held, train) == 0
    train = tokenize_stream([*TEXTS, "b", "x" * 90, "x" * 89], CHAR, tmp_path)
    assert count_shared(held, train) == 3


# --- interrupted, damaged, shared, full


def test_tokenizing_resumes_behind_the_last_whole_shard_wherever_it_is_killed(
    tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before every write in turn. What was written is not tokenized again."""
    texts, encoded = TEXTS[:8], []
    whole = read(tmp_path / "whole", texts=texts)
    real_write, real_encode = files.replace_file, CHAR.encode_arrays

    def count(pieces: list[str]) -> list[np.ndarray]:
        encoded.extend(pieces)
        return real_encode(pieces)

    monkeypatch.setattr(CHAR, "encode_arrays", count)
    for kill in range(100):
        cache, left = tmp_path / str(kill), [kill]

        def write(path: Path, left: list[int] = left) -> Any:
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
            return real_write(path)

        with monkeypatch.context() as patch:
            patch.setattr(streams, "replace_file", write)
            patch.setattr(files, "replace_file", write)
            try:
                assert read(cache, texts=texts) == whole
                break
            except KeyboardInterrupt:
                kept = {path: path.stat().st_ino for path in folder_of(cache).glob("*.tokens")}
                encoded.clear()
        assert read(cache, texts=texts) == whole
        known = kill // 2  # shards in the index
        assert all(path.stat().st_ino == inode for path, inode in sorted(kept.items())[:known])
        assert sum(map(len, encoded)) <= max(len(whole) - 50 * known, 0) + 40
    assert kill == 2 * len(list(folder_of(tmp_path / "whole").glob("*.tokens"))) + 2


@pytest.mark.parametrize("damage", [flip, empty, Path.unlink, replace_by_folder])
@pytest.mark.parametrize("name", ["000000.tokens", "000003.tokens", "last", "documents.hashes", "index.json"])
def test_what_is_damaged_is_named_and_made_again(
    tmp_path: Path,
    small: None,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    damage: Callable[[Path], None],
    name: str,
) -> None:
    whole, folder, repaired = read(tmp_path), folder_of(tmp_path), []
    path = max(folder.glob("*.tokens")) if name == "last" else folder / name
    real = streams._fill

    def fill(*arguments: Any) -> Iterator[Any]:
        for found in real(*arguments):
            repaired.append(found)
            yield found

    monkeypatch.setattr(streams, "_fill", fill)
    files.warn_once.cache_clear()
    damage(path)
    assert [read(tmp_path) for _ in range(2)] == [whole] * 2
    said = capfd.readouterr().err
    if path.suffix == ".tokens":
        assert said == f"WARNING: {path} is damaged; it is rebuilt\n" and len(repaired) == 1
    else:
        assert said.count("\n") == (0 if damage is Path.unlink and name == "index.json" else 1)
        assert name != "documents.hashes" or not repaired


def test_a_shard_that_comes_out_otherwise_means_a_new_stream(
    tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tokenizers package may have changed: no stream of two versions."""
    read(tmp_path)
    flip(folder_of(tmp_path) / "000002.tokens")
    monkeypatch.setattr(CHAR, "encode_arrays", lambda texts: [np.full(len(text), 9, np.int32) for text in texts])
    assert set(read(tmp_path)) == {BOS, 9}


def test_of_several_processes_one_tokenizes(tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = read(tmp_path / "whole")
    folder = tmp_path / "streams" / folder_of(tmp_path / "whole").name
    folder.mkdir(parents=True)
    said = []
    with open(folder / ".lock", "wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)

        def wait(text: str) -> None:  # the other process finishes
            said.append(text)
            for path in folder_of(tmp_path / "whole").iterdir():
                (folder / path.name).write_bytes(path.read_bytes()) if path.name != ".lock" else lock.close()

        monkeypatch.setattr(streams, "_encode", None)
        assert tokenize_stream(TEXTS, CHAR, tmp_path, wait)[:].tolist() == whole
    assert len(said) == 1 and "waiting for another process" in said[0]


def full(*_: Any, **__: Any) -> Any:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_is_one_line_with_place_and_size(
    tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While it is written, and before most of it is. The same command then resumes."""
    free = SimpleNamespace(free=100)
    with monkeypatch.context() as patch, pytest.raises(UserError) as caught:
        patch.setattr(streams, "replace_file", full)
        read(tmp_path)
    assert str(folder_of(tmp_path)) in str(caught.value) and "\n" not in str(caught.value)
    assert "No space left" in str(caught.value) and "GB are free" in str(caught.value)
    with monkeypatch.context() as patch, pytest.raises(UserError, match=r"they need about 0.00 GB, and 0.00 GB"):
        patch.setattr(streams.shutil, "disk_usage", lambda folder: free)
        read(tmp_path)
    assert len(list(folder_of(tmp_path).glob("*.tokens"))) == 1
    assert read(tmp_path) == read(tmp_path / "other")


def test_a_short_text_needs_no_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    """As before there were shards: there is a warning, and it is rebuilt at each start."""
    files.warn_once.cache_clear()
    monkeypatch.setattr(streams, "replace_file", full)
    assert read(tmp_path) == joined(TEXTS, CHAR).tolist()
    said = capfd.readouterr().err
    assert said.count("\n") == 1 and "can't write to" in said and "JAXGPT_CACHE" in said


# --- memory


def write_lines(path: Path, count: int) -> None:
    texts = (f"document {i} " + "of words " * 300 + "é" for i in range(count))
    with path.open("w", encoding="utf-8") as file:
        file.writelines(f"{text}\n" if path.suffix == ".txt" else json.dumps({"text": text}) + "\n" for text in texts)


@pytest.mark.parametrize("form", ["txt", "jsonl", "held"])
def test_memory_does_not_grow_with_the_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    """From the file to batches, with the tokenizer that is learned from it: 240 kB of text or 1 MB, the same peak.
    "held", all documents in a list, shows that the test would see it."""
    monkeypatch.setattr(streams, "SHARD", 2**15)
    monkeypatch.setattr(documents, "_BYTES", 2**13)
    for module in (streams, documents):
        monkeypatch.setattr(module, "PIECE", 2**13)
    peaks = []
    for count in (10, 80, 380):  # the first only imports and fills caches
        path = tmp_path / f"{count}.{'txt' if form == 'txt' else 'jsonl'}"
        write_lines(path, count)
        tracemalloc.start()
        train, test = sources.open_both(str(path), tmp_path)
        if form == "held":
            train = Documents.of([text for text, _ in train.pieces()])
        tok = train_char(train)
        stream, _ = (tokenize_stream(docs, tok, tmp_path / str(len(peaks))) for docs in (train, test))
        batches = pipelines.windows(stream, 64, 4, seed=0)
        next(batches)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert (peaks[2] - peaks[1] < 100_000) == (form != "held"), peaks


# --- text in pieces


@settings(max_examples=30, deadline=None)
@given(
    st.lists(
        st.one_of(st.sampled_from([" ", "   ", "\n\n", *"\n\t.s1éa字\u2003"]), st.text(max_size=4)), max_size=12
    ).map("".join)
)
def test_where_documents_are_cut_bpe_begins_a_token_anyway(text: str) -> None:
    """Even one that has tokens of several spaces."""
    for at in range(1, len(text)):
        if documents._BREAK.match(text, at - 1, at + 1):
            assert SPACES.encode(text[:at]) + SPACES.encode(text[at:]) == SPACES.encode(text)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.text(" ab\n", max_size=200), max_size=6), st.integers(16, 90))
def test_pieces_are_the_document_in_parts_of_a_bounded_length(chunks: list[str], length: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "PIECE", length)
        pieces = list(cut_pieces(chunks))
        assert pieces == list(cut_pieces(["".join(chunks)]))
    assert "".join(text for text, _ in pieces) == "".join(chunks) and max(len(text) for text, _ in pieces) <= length
    assert [ends for _, ends in pieces] == [False] * (len(pieces) - 1) + [True]
    assert all(text for text, _ in pieces) or len(pieces) == 1


def whole_file(data: bytes) -> tuple[list[str], list[str]]:
    """The two parts of a text file, from all of it at once."""
    text = data.decode("utf-8").removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n").lstrip("\n")
    if not text.strip():
        raise UserError("is empty")
    size = len(text.rstrip())
    least, aim = int(size * 0.9), int(size * 0.95)
    cut = text.rfind("\n", least, aim) + 1 or text.rfind(" ", least, aim) + 1 or aim
    return tuple([part] if part.strip() else [] for part in (text[:cut], text[cut:]))  # type: ignore[return-value]


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.sampled_from([b"\r", b"\n", b"\r\n", b" ", "é".encode(), "字🙂".encode(), b"word", b"\xef\xbb\xbf"])),
    st.integers(1, 9),
    st.sampled_from([b"", b"\xc3", b"\xff", "🙂".encode()[:3]]),
)
def test_a_text_file_read_in_chunks_is_the_file(
    tmp_path_factory: Any, parts: list[bytes], size: int, bad: bytes
) -> None:
    """Any line ends, marks and characters across the chunks; the first bad byte is named with its line."""
    path = tmp_path_factory.getbasetemp() / "chunks.txt"
    data = b"".join(parts) + bad
    path.write_bytes(data)
    documents._find_cut.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "_BYTES", size)
        read = functools.partial(documents.text_file_pieces, path)
        if bad:
            at = len(data) - len(bad)
            with pytest.raises(UserError, match=rf":{data.count(bytes([10]), 0, at) + 1}: byte {at} of the file"):
                list(read("train"))
            return
        try:
            expected = whole_file(data)
        except UserError:
            with pytest.raises(UserError, match="is empty"):
                list(read("train"))
            return
        for split, texts in zip(("train", "test"), expected, strict=True):
            assert "".join(text for text, _ in read(split)) == "".join(texts) and len(texts) == len(list(read(split)))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 30), max_size=12), st.sampled_from([0.0, 0.05, 0.5, 1.0]))
def test_rows_are_split_as_if_all_hashes_were_ranked(numbers: list[int], share: float) -> None:
    rows = [(str(number),) for number in numbers]
    order = sorted({row[0] for row in rows}, key=splits._sha256)
    limit = math.ceil(share * (2**32 - 1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(splits, "_HELD_BELOW", limit.to_bytes(4, "big"))
        if len(order) == 1:
            with pytest.raises(UserError, match="1 distinct text"):
                list(splits.split_by_hash(lambda: rows, "train", "x"))
            return
        below = sum(int.from_bytes(splits._sha256(text)[:4], "big") < limit for text in order)
        held = set(order[: min(max(below, 1), max(len(order) - 1, 0))])
        for split in ("train", "test"):
            found = list(splits.split_by_hash(lambda: rows, split, "x"))  # type: ignore[arg-type]
            assert found == [row for row in rows if (row[0] in held) == (split == "test")]


def test_a_source_in_pieces_has_the_documents_of_its_lists(tmp_path: Path, small: None) -> None:
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(f"{name} and some words\n" * 40)
    rows = [json.dumps({"text": text}) for text in {text for text in TEXTS if text}]
    (tmp_path / "c.jsonl").write_text("\n".join(rows))
    source = f"{tmp_path}/c.jsonl,{tmp_path}/*.txt"
    for split, docs in zip(("train", "test"), sources.open_both(source, tmp_path), strict=True):
        texts = [""]
        for text, ends in docs.pieces():
            texts[-1] += text
            texts += [""] * ends
        assert texts[:-1] == sources.documents(source, split, tmp_path)  # type: ignore[arg-type]
    before = sources.open_documents(source, "train", tmp_path)
    (tmp_path / "a.txt").write_text("other words than before\n" * 41)
    assert sources.open_documents(source, "train", tmp_path).fingerprint != before.fingerprint
    with pytest.raises(UserError, match=r"a.txt was changed while it was read"):
        list(before.pieces())


def test_bpe_learns_from_the_same_sample_as_from_a_list(monkeypatch: pytest.MonkeyPatch, small: None) -> None:
    """Sections in the order in which a shuffle puts them."""
    monkeypatch.setattr(tokenizer, "TRAINING_CHARACTERS", 500)
    monkeypatch.setattr(tokenizer, "_SECTION", 16)
    sections = [text[at : at + 16] for text in TEXTS for at in range(0, len(text), 16)]
    tokenizer.random.Random(0).shuffle(sections)
    found = tokenizer._training_sample(Documents.of(TEXTS))
    assert found == sections[: len(found)] and 500 <= sum(map(len, found)) < 516
    assert tokenizer._training_sample(Documents.of(TEXTS[:5])) == TEXTS[:5]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.text(st.one_of(st.sampled_from("a filmé字"), st.characters(codec="utf-8")))))
def test_a_character_tokenizers_table_gives_what_it_encodes(texts: list[str]) -> None:
    assert CHAR._characters is not None and BPE._characters is None
    for tok in (CHAR, BPE):
        assert [ids.tolist() for ids in tok.encode_arrays(texts)] == tok.encode_batch(texts)


def test_text_that_is_not_unicode_is_refused_in_every_tokenizer() -> None:
    for tok in (CHAR, BPE):
        with pytest.raises(UserError, match="lone surrogates"):
            tok.encode_arrays(["good", "bad \ud800"])


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="the system doesn't say")
def test_mapped_pages_are_given_back_after_every_read(tmp_path: Path) -> None:
    """Otherwise the process would seem to hold all that it ever read."""
    stream = tokenize_stream(["word " * 100_000], CHAR, tmp_path)
    assert len(stream[:]) == len(stream) == 500_002
    ours = rf"{re.escape(str(tmp_path))}\S*/000000\.tokens\n(?:.*\n)*?Rss: +(\d+) kB"
    (mapped,) = re.findall(ours, Path("/proc/self/smaps").read_text())
    assert int(mapped) == 0
