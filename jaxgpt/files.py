"""Files: written atomically, hashed, and read with errors that say what is wrong and where."""

import contextlib
import difflib
import functools
import gzip
import hashlib
import io
import json
import math
import os
import re
import shutil
import sys
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, BinaryIO, NoReturn

from jaxgpt.errors import UserError, show_value

_GZIP = b"\x1f\x8b"
TO_LINES = (
    "convert it to JSON Lines, e.g. with pandas: read_{0}(FILE).to_json('rows.jsonl', orient='records', lines=True)"
)
_NOT_TEXT = {  # how a file starts that is often given by mistake, what it is, and what to do
    b"\x28\xb5\x2f\xfd": ("compressed by zstd", "unpack it with `zstd -d`, or compress it with gzip"),
    b"\xfd7zXZ\0": ("compressed by xz", "unpack it with `xz -d`, or compress it with gzip"),
    b"BZh91AY&SY": ("compressed by bzip2", "unpack it with `bzip2 -d`, or compress it with gzip"),
    b"\x04\x22\x4d\x18": ("compressed by lz4", "unpack it with `lz4 -d`, or compress it with gzip"),
    _GZIP: ("compressed by gzip twice", "unpack it once with `gunzip`"),
    b"PK\3\4": ("a zip archive or an Office document", "unpack it, or save its text as UTF-8"),
    b"7z\xbc\xaf\x27\x1c": ("a 7z archive", "unpack it"),
    b"Rar!\x1a\7": ("a RAR archive", "unpack it"),
    b"%PDF-": ("a PDF document", "save its text as UTF-8"),
    b"version https://git-lfs.": ("a pointer of Git LFS in place of the file", "fetch the file with `git lfs pull`"),
    b"PAR1\x15": ("a Parquet file", TO_LINES.format("parquet")),
    b"ARROW1\0\0": ("an Arrow file", TO_LINES.format("feather")),
    b"SQLite format 3\0": ("an SQLite database", "if it holds votes, its name must end with .sqlite or .db"),
    b"\xff\xfe": ("UTF-16 text", "save it as UTF-8"),
    b"\xfe\xff": ("UTF-16 text", "save it as UTF-8"),
}


def cache_root() -> Path:
    """Where compiled programs and prepared data are cached: $JAXGPT_CACHE, or ~/.cache/jaxgpt."""
    return Path(os.environ.get("JAXGPT_CACHE") or Path.home() / ".cache" / "jaxgpt").expanduser()


@functools.cache
def warn_once(text: str) -> None:
    """Print a warning on stderr; the same text only once per process."""
    print(f"WARNING: {text}", file=sys.stderr, flush=True)


def suggest_name(name: str, known: Iterable[str]) -> str:
    """The text "; did you mean X?" for the known name closest to a mistyped one, or an empty string."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean {near[0]}?" if near else ""


def hub_advice(place: Path, kind: str) -> str:
    """What to do about a missing path that looks like OWNER/NAME on the Hugging Face hub, otherwise an empty string.
    `kind`: "model" or "dataset"."""
    place = Path(os.path.relpath(place))
    named = re.fullmatch(r"[\w-]+/[\w.-]+", str(place)) and not place.parent.exists() and place.parts[0] != "runs"
    if not named or place.suffix in (".txt", ".json", ".jsonl", ".gz", ".sqlite", ".db"):
        return ""
    flag = " --repo-type dataset" if kind == "dataset" else ""
    return (
        f"; if it is a {kind} of the Hugging Face hub, download it with "
        f"`hf download {place}{flag} --local-dir {place.name}` and give what that writes"
    )


# ---- writing ----


@contextlib.contextmanager
def replace_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write that atomically replaces `path` at the end: readers see either the old file or the new one, even
    if the program is killed midway. Its folder must exist: a run whose folder was deleted must not write to a new one.
    """
    check_watched(path)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with open(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
        sync_names(path.parent)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def create_folder(path: Path) -> Iterator[Path]:
    """A folder to fill that atomically becomes `path` at the end. If another process was faster, its folder stays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        os.chmod(temporary, 0o777 & ~_umask())
        yield temporary
        try:
            os.replace(temporary, path)
        except OSError:
            if not path.is_dir():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def append_only(path: Path) -> IO[bytes]:
    """A file to append to, unbuffered: closing it doesn't retry a write that failed. A link, symbolic or hard, is first
    replaced by a copy, so that whatever shares its content keeps it. UserError if `path` is no file."""
    refuse_no_file(path)
    if is_link(path):
        content = path.read_bytes()
        with replace_file(path) as copy:
            copy.write(content)
    return open(path, "ab", buffering=0)


def is_link(path: Path) -> bool:
    """Whether `path` is a link, symbolic or hard, so that writing to it would change another file too."""
    return path.is_symlink() or (path.exists() and path.stat().st_nlink > 1)


WATCHED: dict[Path, Callable[[], None]] = {}  # a folder that this process works in: raises UserError once it is lost


def check_watched(path: Path) -> None:
    """UserError if `path` lies in a folder that was taken away from this process: see `runs.claim`."""
    place = Path(os.path.abspath(path))
    for folder, check in list(WATCHED.items()):
        if place.is_relative_to(folder):
            check()


def remove(path: Path) -> None:
    """Remove a file, a folder with all that is in it, or a link (not what it points to), if there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Flush everything below `folder` to the disk, names included, and drop it from the page cache, so that the next
    read comes from the disk."""
    for path in sorted(folder.rglob("*")):
        if path.is_dir():
            sync_names(path)
            continue
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)
    sync_names(folder)


def sync_names(folder: Path) -> None:
    """Flush the names of a folder's files to the disk. File systems that can't do that for a folder don't need it."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            os.fsync(handle)
    finally:
        os.close(handle)


def refuse_pattern(path: Path) -> None:
    """UserError for a path that Orbax would take for a pattern of file names: no model can be stored there."""
    whole = os.path.abspath(path)
    found = sorted(set(whole) & set("[]*?\\"))
    if found or not whole.isprintable():
        what = " ".join(found) or "an unprintable character"
        raise UserError(
            f"the path {whole!r} contains {what}; models and checkpoints can't be stored under it; choose another"
        )


@functools.cache  # threads that ask at the same time would change it for good
def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def write_text(path: Path, text: str) -> None:
    """Replace a file with this text, atomically."""
    with replace_file(path) as file:
        file.write(text.encode())


def write_json(path: Path, value: Any) -> None:
    """Replace a file with this value as JSON, atomically: indented, without NaN (ValueError: a bug in the caller)."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_record(path: Path, record: Mapping[str, Any]) -> None:
    """`write_json`, with the sha256 of the content added: for files that decide a result."""
    if "sha256" in record:
        raise ValueError("a record's own sha256 is added by write_record")
    write_json(path, {**record, "sha256": _sha256_of_record(record)})


def _sha256_of_record(record: Mapping[str, Any]) -> str:
    text = json.dumps(record, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


# ---- reading ----


@contextlib.contextmanager
def open_text(path: Path) -> Iterator[io.BufferedReader]:
    """The bytes of a text file; gzip is decompressed, whatever the file's name. UserError if it can't be read, is
    damaged, or is not text, saying what it is. Decoding is the caller's."""
    try:
        with path.open("rb") as plain:
            packed: Any = gzip.GzipFile(fileobj=plain)
            file = io.BufferedReader(packed) if plain.peek(2).startswith(_GZIP) else plain
            head = file.peek(512)[:512]
            if head[257:262] == b"ustar":
                raise UserError(f"{path} is a tar archive, not UTF-8 text; unpack it")
            for start, (what, advice) in _NOT_TEXT.items():
                if head.startswith(start):
                    raise UserError(f"{path} is {what}, not UTF-8 text; {advice}")
            if b"\0" in head:
                raise UserError(f"{path} holds NUL bytes: it is UTF-16 or no text; if it is text, save it as UTF-8")
            yield file
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path} is a damaged gzip file ({error}); copy it again") from error
    except OSError as error:
        advice = hub_advice(path, "dataset") or "; check the path"
        raise UserError(f"cannot read {path}: {error.strerror}{advice}") from error


def text_suffix(path: Path) -> str:
    """The suffix that says what a file holds: ".jsonl" of both rows.jsonl and rows.jsonl.gz."""
    return path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix


def parse_json(text: str, where: str) -> Any:
    """`json.loads`, with a UserError that starts with `where` for NaN, an infinite number, or a repeated name."""

    def refuse(number: str) -> NoReturn:
        raise UserError(f"{where}: {number[:20]} is not JSON; use null or a number")

    def finite(digits: str) -> float:
        number = float(digits)
        return number if math.isfinite(number) else refuse(digits)

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            name = Counter(name for name, _ in pairs).most_common(1)[0][0]
            raise UserError(f"{where}: {show_value(name)} appears twice in one object; keep one")
        return found

    return json.loads(text, parse_constant=refuse, parse_float=finite, object_pairs_hook=unique)


def read_json(path: Path) -> Any:
    """`parse_json` of a file. UserError naming the file (and the line) also if it is missing, not UTF-8 or not JSON."""
    try:
        return parse_json(path.read_text(encoding="utf-8-sig"), str(path))
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start})") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not valid JSON ({error.msg})") from None
    except RecursionError:
        raise UserError(f"{path}: nested too deeply") from None
    except ValueError as error:  # an integer with thousands of digits, or a path with a NUL
        raise UserError(f"{path}: can't be read ({error})") from None


def refuse_no_file(path: Path) -> None:
    """UserError if a folder is at `path`, or a pipe, which would keep a reader waiting forever."""
    if path.exists() and not path.is_file():
        raise UserError(f"{path} is not a file; remove it, or restore it from a copy")


def read_record(path: Path, names: Iterable[str], advice: str, *, older: Iterable[str] = ()) -> dict[str, Any]:
    """Read what `write_record` wrote, without its hash: a JSON object with exactly these names. UserError that ends
    with `advice` if the content is not what was written.

    `older`: the names in a record of jaxgpt 0.1.0, which has no hash; empty: such records are refused. One that names
    its format must say 2, the last format without a hash."""
    refuse_no_file(path)
    try:
        record = read_json(path)
    except UserError as error:
        raise UserError(f"{error}; {advice}") from None
    if isinstance(record, dict) and older and set(record) == set(older) and record.get("format", 2) == 2:
        return record
    digest = record.pop("sha256", None) if isinstance(record, dict) else None
    try:
        whole = digest is None or digest == _sha256_of_record(record)
    except ValueError:  # 1e999 is infinite
        whole = False
    if digest is None:
        raise UserError(f"{path} was not written by jaxgpt, or is damaged (it holds no checksum); {advice}")
    if not whole:
        raise UserError(f"{path} is damaged or was edited (its checksum differs); {advice}")
    if record.keys() != set(names):
        raise UserError(f"{path} was written by another version of jaxgpt, or is another kind of file; {advice}")
    return record


# ---- hashing ----


def sha256_of_file(path: Path) -> str:
    """sha256 (hex) of a file's bytes. UserError if there is no such file."""
    if not path.is_file():
        advice = hub_advice(path, "dataset") or "; check the path, or run the stage that writes it first"
        raise UserError(f"no file {path}{advice}")
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of_folder(folder: Path) -> dict[str, str]:
    """sha256 (hex) of every file under `folder`, by relative path."""
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): sha256_of_file(path) for path in paths}


def sha256_of_texts(texts: Iterable[str]) -> str:
    """sha256 (hex) of a list of texts; their lengths keep ["ab"] and ["a", "b"] apart."""
    digest = hashlib.sha256()
    for text in texts:
        data = text.encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "big") + data)
    return digest.hexdigest()


def check_files(folder: Path, expected: Mapping[str, str], advice: str) -> None:
    """UserError, ending with `advice`, unless `folder` holds these files with these hashes."""
    found = sha256_of_folder(folder)
    for name, digest in expected.items():
        if found.get(name) != digest:
            state = "is damaged (its checksum differs)" if name in found else "is missing"
            raise UserError(f"{folder / name} {state}; {advice}")
