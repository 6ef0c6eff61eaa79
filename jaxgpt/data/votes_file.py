"""The SQLite file of a `votes.Store`, in which each row carries the sha256 of its content.

A database is refused if it holds triggers, views, or tables or columns that this module did not create, so no foreign
code runs. Then SQLite checks its structure. Readers get a private copy in memory: they change nothing and need no
permission to write. Format 1 (jaxgpt 0.1.0, without hashes) is upgraded to format 2 in that copy, and in the file when
it is opened for writing.
"""

import contextlib
import functools
import hashlib
import json
import re
import shutil
import sqlite3
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxgpt.errors import UserError
from jaxgpt.files import warn_once

FORMAT = 2
COLUMNS: Mapping[str, tuple[str, ...]] = {  # a row's hash covers these
    "tasks": ("id", "prompt", "doubt", "time"),
    "answers": ("task", "position", "text", "ended", "origin", "id"),
    "votes": (
        "number", "id", "task", "annotator", "kind", "tiers", "shown", "seconds", "time", "again", "undoes",
    ),
    "ratings": ("id", "prompt", "answer", "annotator", "stars", "seconds", "time"),
}  # fmt: skip
_FORMAT_1 = """
CREATE TABLE IF NOT EXISTS tasks (id TEXT PRIMARY KEY, prompt TEXT NOT NULL, doubt REAL NOT NULL, time REAL NOT NULL);
CREATE TABLE IF NOT EXISTS answers (task TEXT NOT NULL, position INTEGER NOT NULL, text TEXT NOT NULL,
  ended INTEGER NOT NULL, origin TEXT NOT NULL, id TEXT NOT NULL UNIQUE, PRIMARY KEY (task, position));
CREATE TABLE IF NOT EXISTS votes (number INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, task TEXT NOT NULL,
  annotator TEXT NOT NULL, kind TEXT NOT NULL, tiers TEXT NOT NULL, shown TEXT NOT NULL, seconds REAL,
  time REAL NOT NULL, again INTEGER NOT NULL, undoes TEXT UNIQUE);
CREATE INDEX IF NOT EXISTS votes_by_task ON votes (task, annotator);
CREATE TABLE IF NOT EXISTS ratings (id TEXT PRIMARY KEY, prompt TEXT NOT NULL, answer TEXT NOT NULL,
  annotator TEXT NOT NULL, stars INTEGER NOT NULL, seconds REAL, time REAL NOT NULL);
"""
_CELL = re.compile(
    r"(NULL|NUMERIC|TEXT|REAL|INTEGER|BLOB) value in "
)  # faults of a single value: the hashes find those
_ADVICE = {  # by a word in SQLite's message
    "full": "nothing was stored; free some space",
    "readonly": "you may not write to it; copy it to a folder of yours",
    "unable to open": "check its permissions and those of its folder",
    "locked": "another program keeps it locked; end that first",
}
_NAMES_ANOTHER = bytes.fromhex("d9d505f920a163d7")  # the end of a rollback journal of several databases
_SEARCHED = 100_000  # row numbers tried one by one between damaged pages


class DamagedError(UserError):
    """A database has damaged rows or a damaged structure; the message says how to recover the rest."""

    def __init__(self, path: Path, reason: str) -> None:
        new = path.with_name(f"{path.stem}-rescued{path.suffix}")
        advice = f"copy what is left with `--read {path} --votes {new}`, and use the new file"
        self.reason = " ".join(reason.split())  # SQLite quotes whole statements
        super().__init__(f"{path} is damaged ({self.reason}); {advice}", experiment=("votes", "--help"))


# ---- opening ----


def open_to_write(path: Path) -> sqlite3.Connection:
    """The database, created if missing and upgraded to this format. UserError if it is damaged or not jaxgpt's."""
    with named(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _journals(path)
        db = _connect(str(path))
        format_ = _check_schema(db, path)
        if faults := _structural_faults(db):
            raise DamagedError(path, faults[0])
        db.executescript("PRAGMA journal_mode=WAL; PRAGMA synchronous=FULL;")
        db.executescript("BEGIN IMMEDIATE; COMMIT")  # fails now if the file can't be written
        if format_ != FORMAT:
            _upgrade(db, path)
        return db


def open_to_read(path: Path) -> sqlite3.Connection:
    """A private copy of the database in memory, in this format. UserError if it is damaged or not jaxgpt's."""
    with named(path):
        db = _copy(path)
        format_ = _check_schema(db, path)
        if _structural_faults(db):
            with contextlib.suppress(sqlite3.Error):  # indexes can be rebuilt
                db.execute("REINDEX")
            if faults := _structural_faults(db):
                raise DamagedError(path, faults[0])
        if format_ != FORMAT:
            _upgrade(db, path)
        return db


def open_to_rescue(path: Path) -> sqlite3.Connection:
    """As `open_to_read`, but a damaged database gives every row that can still be read."""
    try:
        return open_to_read(path)
    except DamagedError as error:
        warn_once(f"{path} is damaged ({error.reason}); what can be read is copied")
    try:
        return _rescue(path)
    except DamagedError as error:
        raise UserError(
            f"the schema of {path} is damaged ({error.reason}), so its rows can't be read; use a backup, or try "
            f"SQLite's own `sqlite3 {path} .recover`"
        ) from error


def _rescue(path: Path) -> sqlite3.Connection:
    with named(path):
        damaged, db = _copy(path), _connect(":memory:")
        _create(db)
        sealed = _check_schema(damaged, path) == FORMAT
        for table, columns in COLUMNS.items():
            names = ["rowid", *columns, *(["sha256"] if sealed else [])]
            places = ", ".join("?" * len(names))
            for row in _readable_rows(damaged, table, ", ".join(names)):
                db.execute(
                    f"INSERT OR IGNORE INTO {table} ({', '.join(names)}) VALUES ({places})", [*map(_storable, row)]
                )
                if not sealed:
                    seal(db, table, row[0])
        return db


@contextlib.contextmanager
def named(path: Path) -> Iterator[None]:
    """Turn errors of SQLite and the file system into a UserError that names the file."""
    try:
        if path.is_dir():
            raise UserError(f"{path} is a folder; give a file, such as {path / 'votes.sqlite'}")
        yield
    except sqlite3.Error as error:
        text = " ".join(str(error).split())
        if "malformed" in text or isinstance(error, sqlite3.IntegrityError):
            raise DamagedError(path, text) from error
        advice = next((advice for word, advice in _ADVICE.items() if word in text), "choose another file")
        raise UserError(f"{path} can't be used as a database of votes ({text}); {advice}") from error
    except (OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path} can't be used as a database of votes ({reason}); check the path") from error


def _connect(place: str, *, uri: bool = False) -> sqlite3.Connection:
    db = sqlite3.connect(place, timeout=60, check_same_thread=False, isolation_level=None, uri=uri)
    db.text_factory = functools.partial(
        str, encoding="utf-8", errors="surrogateescape"
    )  # `vote_rows` reports invalid text
    db.executescript("PRAGMA trusted_schema=OFF; PRAGMA cell_size_check=ON;")
    return db


def _copy(path: Path) -> sqlite3.Connection:
    """A copy in memory of the whole database at one moment, even while another process writes to it."""
    if not path.is_file():
        raise UserError(f"there is no database of votes at {path}", experiment=("label",))
    place, journals = path.resolve(), _journals(path)
    files = (place, *journals)
    try:
        return _load(place, "mode=ro" if journals else "mode=ro&immutable=1", files)
    except sqlite3.OperationalError:  # SQLite can't read a journal in a folder that it can't write to
        if not journals:
            raise
    with tempfile.TemporaryDirectory(prefix="jaxgpt.") as scratch:
        for file in files:
            shutil.copy(file, scratch)
        return _load(Path(scratch) / place.name, "mode=rw", files)


def _journals(path: Path) -> list[Path]:
    """The journals that SQLite would read, which lie beside what a link points to. UserError for one that names a
    second journal, since SQLite deletes that file, whatever it is."""
    place = path.resolve()
    found = [place.with_name(place.name + suffix) for suffix in ("-wal", "-journal")]
    found = [journal for journal in found if journal.exists()]
    for journal in found:
        if journal.read_bytes().endswith(_NAMES_ANOTHER):
            raise UserError(f"{journal} was not written by jaxgpt, since it names other files; remove it")
    return found


def _load(path: Path, how: str, files: Sequence[Path]) -> sqlite3.Connection:
    """A copy in memory. `files`: what the database is made of, and what its size is compared with."""
    with contextlib.closing(_connect(f"{path.absolute().as_uri()}?{how}", uri=True)) as source:
        pages, size = (source.execute(f"PRAGMA {name}").fetchone()[0] for name in ("page_count", "page_size"))
        if pages * size > sum(file.stat().st_size for file in files if file.exists()):
            raise DamagedError(files[0], f"it claims to have {pages:,} pages, more than its files hold")
        memory = _connect(":memory:")
        source.backup(memory)
        return memory


# ---- what a database may hold ----


def _schema(db: sqlite3.Connection) -> set[tuple[str, str, str, str | None]]:
    return set(db.execute("SELECT type, name, tbl_name, sql FROM sqlite_master"))


@functools.cache
def _known_schemas() -> tuple[set[tuple[str, str, str, str | None]], ...]:
    """The schemas of format 1 and format 2."""
    with contextlib.closing(_connect(":memory:")) as db:
        db.executescript(_FORMAT_1)
        old = _schema(db)
        _add_hashes(db)
        return old, _schema(db)


def _check_schema(db: sqlite3.Connection, path: Path) -> int:
    """The database's format; 0 for an empty one. UserError if it holds anything that this module did not create."""
    found, (old, new) = _schema(db), _known_schemas()
    if found == new:
        return FORMAT
    version = db.execute("PRAGMA user_version").fetchone()[0]
    if version > FORMAT:
        raise UserError(f"{path} has format {version}, but this version of jaxgpt reads format {FORMAT}")
    if found <= old and version < FORMAT:
        return 1 if found else 0
    foreign = sorted(f"{type_!s:.20} {name!r:.60}" for type_, name, *_ in found - new)
    what = f"its {foreign[0]} was not made by jaxgpt" if foreign else "tables are missing"
    raise UserError(
        f"{path} can't be used as a database of votes ({what}); choose another file, or remove that from this one"
    )


def _structural_faults(db: sqlite3.Connection) -> list[str]:
    """What SQLite finds wrong with the pages of a database, one line each. Faults of single values are left to the
    hashes."""
    found = [str(text) for (text,) in db.execute("PRAGMA integrity_check(20)") if text != "ok"]
    return [line for text in found for line in text.splitlines() if not (_CELL.match(line) or line.startswith("***"))]


def _create(db: sqlite3.Connection) -> None:
    db.executescript(_FORMAT_1)
    _add_hashes(db)
    db.execute(f"PRAGMA user_version={FORMAT}")


def _add_hashes(db: sqlite3.Connection) -> None:
    for table in COLUMNS:
        db.execute(f"ALTER TABLE {table} ADD COLUMN sha256 TEXT NOT NULL DEFAULT ''")


def _upgrade(db: sqlite3.Connection, path: Path) -> None:
    """Upgrade an empty database, or one of format 1, to this format in one transaction."""
    db.execute("BEGIN IMMEDIATE")
    try:
        if _check_schema(db, path) != FORMAT:  # another process may just have done it
            for statement in _FORMAT_1.split(";"):
                db.execute(statement)
            _add_hashes(db)
            for table in COLUMNS:
                for (rowid,) in db.execute(f"SELECT rowid FROM {table}").fetchall():
                    seal(db, table, rowid)
            db.execute(f"PRAGMA user_version={FORMAT}")
        db.execute("COMMIT")
    except BaseException:
        db.execute("ROLLBACK")
        raise


# ---- rows ----


def insert(db: sqlite3.Connection, table: str, values: Mapping[str, Any]) -> bool:
    """Add a row with its hash; False, and nothing changes, if there is one with its id."""
    places = ", ".join("?" * len(values))
    done = db.execute(f"INSERT OR IGNORE INTO {table} ({', '.join(values)}) VALUES ({places})", tuple(values.values()))
    if done.rowcount == 1:
        seal(db, table, done.lastrowid)
    return done.rowcount == 1


def seal(db: sqlite3.Connection, table: str, rowid: int | None) -> None:
    """Store the hash of a row, as SQLite holds it (which may turn 1 into 1.0)."""
    row = db.execute(f"SELECT {', '.join(COLUMNS[table])} FROM {table} WHERE rowid = ?", (rowid,)).fetchone()
    db.execute(f"UPDATE {table} SET sha256 = ? WHERE rowid = ?", (_sha256_of_row(table, row), rowid))


def read(
    db: sqlite3.Connection, table: str, condition: str = "", *values: Any
) -> Iterator[tuple[int, dict[str, Any], bool]]:
    """For each row of a table: its number, its values by column, and whether they match the hash."""
    rows = db.execute(f"SELECT rowid, sha256, {', '.join(COLUMNS[table])} FROM {table} {condition}", values)
    for rowid, digest, *row in rows.fetchall():
        yield rowid, dict(zip(COLUMNS[table], row, strict=True)), digest == _sha256_of_row(table, row)


def _storable(value: Any) -> Any:
    """The value as SQLite can store it: text that is not UTF-8 becomes bytes, which `vote_rows` then reports."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return value.encode("utf-8", "surrogateescape")
    except AttributeError:
        pass
    return value


def _sha256_of_row(table: str, row: Any) -> str:
    text = json.dumps([table, *(value.hex() if isinstance(value, bytes) else value for value in row)])
    return hashlib.sha256(text.encode()).hexdigest()


def _readable_rows(db: sqlite3.Connection, table: str, names: str) -> Iterator[tuple[Any, ...]]:
    """The rows before the first damaged page, those after the last, and what can be found between."""
    last, first = 0, _SEARCHED
    try:
        for row in db.execute(f"SELECT {names} FROM {table} NOT INDEXED ORDER BY rowid"):
            last = row[0]
            yield row
        return
    except sqlite3.DatabaseError:
        pass
    with contextlib.suppress(sqlite3.DatabaseError):
        for row in db.execute(f"SELECT {names} FROM {table} NOT INDEXED WHERE rowid > {last} ORDER BY rowid DESC"):
            first = row[0]
            yield row
    for rowid in range(last + 1, min(first, last + _SEARCHED)):
        with contextlib.suppress(sqlite3.DatabaseError):
            yield from db.execute(f"SELECT {names} FROM {table} NOT INDEXED WHERE rowid = ?", (rowid,)).fetchall()
