"""Rows and documents of any TFDS dataset, prepared in $TFDS_DATA_DIR or TFDS's default folder."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxgpt.data.documents import Documents, Piece, cut_pieces
from jaxgpt.data.splits import READER, TFDS, Fields, Split, nothing_found, split_by_hash
from jaxgpt.errors import UserError, first_line, needs_extra
from jaxgpt.files import sha256_of_file, sha256_of_texts, suggest_name


def documents(name: str, split: Split) -> Documents:
    """The text feature, read in pieces at every pass. The fingerprint is of the files that hold the split."""
    builder = _builder(name)
    part = builder.info.splits[_split_of(builder, name, split)]
    column = _feature(builder, name, "text")
    digests = [sha256_of_file(Path(path)) for path in sorted(map(os.fspath, part.filepaths))]

    def pieces() -> Iterator[Piece]:
        found = False
        for row in rows(name, split, ("text",)):
            found = found or bool(row)
            yield from cut_pieces(row or ("",))
        if not found:
            raise nothing_found(f"{TFDS}{name}", split, ("text",))

    return Documents(sha256_of_texts([READER, "tfds", split, column, *digests]), int(part.num_bytes), pieces)


def _split_of(builder: Any, name: str, split: Split) -> str:
    """The split of a dataset that holds ours: without a test split, both are in "train"."""
    splits = builder.info.splits
    wanted = split if "test" in splits else "train"
    if wanted not in splits:
        raise UserError(f"tfds:{name} has no split {wanted!r}, only {', '.join(splits)}; choose another dataset")
    return wanted


def rows(name: str, split: Split, fields: tuple[str, ...]) -> Iterator[Fields]:
    """The fields' texts, row by row; () for a row with a blank one."""
    builder = _builder(name)
    columns = [_feature(builder, name, field) for field in fields]
    wanted = _split_of(builder, name, split)

    def read() -> Iterator[Fields]:
        try:
            source = builder.as_data_source(split=wanted)
            for at in range(0, len(source), 1000):
                found = source.__getitems__(range(at, min(at + 1000, len(source))))
                yield from (tuple(row[column].decode("utf-8") for column in columns) for row in found)
        except Exception as error:  # formats, decoders and a missing TensorFlow raise different types
            advice = "prepare it with file_format='array_record'"
            raise UserError(f"cannot read tfds:{name} ({first_line(error)}); {advice}") from error

    chosen = read() if "test" in builder.info.splits else split_by_hash(read, split, f"{TFDS}{name}")
    for row in chosen:
        yield row if all(value.strip() for value in row) else ()


def _builder(name: str) -> Any:
    """The builder of a TFDS dataset in $TFDS_DATA_DIR or TFDS's default folder, prepared now if necessary."""
    tfds, folder = _package(), os.environ.get("TFDS_DATA_DIR")
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
    texts = [key for key, feature in builder.info.features.items() if isinstance(feature, _package().features.Text)]
    if field in texts:
        return field
    if field == "text" and len(texts) == 1:
        return texts[0]
    found = ", ".join(texts) or "none"
    raise UserError(f"tfds:{name} has no text feature {field!r} (it has {found}); choose another dataset")


def _package() -> Any:
    with needs_extra("data"):
        import tensorflow_datasets
    return tensorflow_datasets
