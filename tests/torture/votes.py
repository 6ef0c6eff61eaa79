"""The database of votes: bits flipped, and what a stranger's program may have put there."""

import contextlib
import json
import random
import sqlite3
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxgpt.data.votes import Answer, Store, Task, Vote
from jaxgpt.data.votes_file import COLUMNS, seal
from jaxgpt.errors import UserError
from tests.torture.harness import Kind, Outcomes, flip_bit

Rows = Mapping[tuple[str, int], tuple[Any, ...]]


def fill(path: Path, tasks: int = 6) -> bytes:
    """A database with everything in it, as the bytes of its file."""
    store = Store(path)
    for n in range(tasks):
        task = Task(f"prompt {n} é", tuple(Answer(f"answer {n}.{i}", i > 0, {"model": "m"}) for i in range(3)), n / 7)
        store.add_task(task)
        for who in ("ada", "bob"):
            tiers = ((n % 3,), tuple(i for i in range(3) if i != n % 3))
            store.vote(Vote(f"{who} {n}", task.id, who, "favourite", tiers, (2, 0, 1), 1.5, 100.0 + n))
        if n % 3 == 0:
            store.undo("bob", f"undo {n}")
        if n % 4 == 0:
            store.vote(Vote(f"again {n}", task.id, "ada", "tie", ((0, 1, 2),), (0, 1, 2), None, 200.0 + n))
            store.add_answer(task.id, Answer("by a person", origin={"by": "ada"}), f"mine {n}")
        store.rate(f"r{n}", "p", "a", "ada", 1 + n % 5, 2.0)
    store.close()
    return path.read_bytes()


def rows_of(store: Store) -> Rows:
    return {
        (table, row[0]): row[1:]
        for table, columns in COLUMNS.items()
        for row in store._rows(f"SELECT rowid, {', '.join(columns)} FROM {table}")
    }


def compare(store: Store, whole: Rows) -> str:
    """What is neither equal nor named."""
    found = rows_of(store)
    named = {(fault.table, fault.number) for fault in store.left_out} | {
        (fault.table, fault.id) for fault in store.left_out
    }
    for place, row in found.items():
        if whole.get(place) != row and row not in whole.values():
            return f"silently other content: {place} {row!r}"
    here = set(found.values())
    for table, columns in COLUMNS.items():
        lost = {number: row for (name, number), row in whole.items() if name == table and row not in here}
        faults = [fault for fault in store.left_out if fault.table == table]
        unnamed = [n for n, row in lost.items() if not {(table, n), (table, row[columns.index("id")])} & named]
        if len(lost) > len(faults) or len(unnamed) > sum(fault.number not in lost for fault in faults):
            return f"silently lost: {table} rows {sorted(lost)}, named {faults}"
    store.tasks(), store.votes()
    return ""


def bit_flips(rng: random.Random, folder: Path) -> Outcomes:
    path, home = folder / "votes.sqlite", folder / "home.sqlite"
    data = fill(home)
    whole = rows_of(Store(home, read_only=True))
    while True:
        path.write_bytes(data)
        what = "; ".join(flip_bit(rng, path) for _ in range(rng.choice([1, 1, 1, 2, 8])))
        yield opened(path, whole, what, rng.random() < 0.1)


def opened(path: Path, whole: Rows | None, what: str, write: bool) -> str:
    """The outcome of reading a database, of taking what is left of it, and of opening it to write."""
    ways = {
        "read": lambda: Store(path, read_only=True),
        "rescued": lambda: Store.rescued(path),
        "open": lambda: Store(path),
    }
    for how in list(ways)[: 3 if write else 2]:
        try:
            with contextlib.closing(ways[how]()) as store:
                outcome = compare(store, whole) if whole and how != "rescued" else ""
                store.tasks(), store.votes(), store.next_task("eve"), store.count_waiting("ada", overlap=0.5)
        except UserError as error:
            outcome = "" if path.name in str(error) and "\n" not in str(error) else f"no clear line: {error}"
        except Exception:
            outcome = traceback.format_exc(limit=-4)
        if outcome:
            return f"{what}, {how}: {outcome}"
    return ""


VALUES: tuple[Any, ...] = (
    None, 0, -1, 3, 2**62, 1.5, float("inf"), "", " ", "x" * 70, "\0", "é", b"\xff\xfe", b"", "[]", "{}", "null", "NaN",
    "[[0],[1]]", "[[0],[1,2]]", "[[true],[false]]", "[0,1]", "[0,0]", "[0,99]", "[-1,0]", '["a"]', "[" * 5000,
    "9" * 5000, "[[0.5],[1]]", "undo", "favourite", "tie", '{"a": 1e999}', "\U0001f600", "[[],[0,1]]", "{\"0\": 1}",
)  # fmt: skip
SCHEMAS = (
    "CREATE TRIGGER t AFTER INSERT ON votes BEGIN DELETE FROM votes; END",
    "CREATE TRIGGER t BEFORE UPDATE ON tasks BEGIN SELECT RAISE(ABORT, 'no'); END",
    "CREATE VIEW v AS SELECT * FROM votes",
    "CREATE TABLE other (a)",
    "CREATE INDEX i ON votes (length(tiers))",
    "CREATE UNIQUE INDEX i ON votes (annotator, task, kind) WHERE number > 5",
    "ALTER TABLE votes ADD COLUMN more TEXT",
    "ALTER TABLE votes ADD COLUMN twice INTEGER GENERATED ALWAYS AS (number * 2) VIRTUAL",
    "ALTER TABLE answers RENAME TO old",
    "ALTER TABLE tasks RENAME COLUMN prompt TO words",
    "DROP TABLE ratings",
    "DROP INDEX votes_by_task",
    "DROP TABLE votes; CREATE VIEW votes AS SELECT * FROM tasks",
    "DROP TABLE tasks; CREATE VIRTUAL TABLE tasks USING fts5(id, prompt)",
    "PRAGMA user_version=0",
    "PRAGMA user_version=7",
    "PRAGMA user_version=-1",
    "PRAGMA encoding='UTF-16le'; VACUUM",
    "PRAGMA journal_mode=DELETE; PRAGMA page_size=512; VACUUM",
    "ANALYZE",
    "DELETE FROM answers",
    "DELETE FROM tasks",
    "UPDATE votes SET number = -number",
)


def hostile(rng: random.Random, folder: Path) -> Outcomes:
    """Values of any type anywhere, with right hashes: a stranger can compute them, too."""
    path = folder / "votes.sqlite"
    data = fill(path)
    while True:
        path.write_bytes(data)
        done = []
        with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as db:
            for _ in range(rng.randint(1, 3)):
                if rng.random() < 0.15:
                    statement: tuple[Any, ...] = (rng.choice(SCHEMAS),)
                    with contextlib.suppress(sqlite3.Error):
                        db.executescript(statement[0])
                else:
                    table = rng.choice(list(COLUMNS))
                    column, row = rng.choice(COLUMNS[table]), rng.randrange(1, 10)
                    value = (
                        f"CAST(x'{rng.choice(['ff', 'c328', 'eda080', '00'])}' AS TEXT)" if rng.random() < 0.1 else "?"
                    )
                    values = (rng.choice(VALUES),) if value == "?" else ()
                    statement = (f"UPDATE {table} SET {column} = {value} WHERE rowid = {row}", *values)
                    with contextlib.suppress(sqlite3.Error, TypeError):  # TypeError: that row is gone
                        db.execute(statement[0], values)
                        db.text_factory = lambda text: text.decode("utf-8", "surrogateescape")
                        seal(db, table, row)
                done.append(statement)
        yield opened(path, None, f"{json.dumps(done, default=repr):.400}", rng.random() < 0.1)


KINDS = {
    "votes.sqlite, bits flipped": Kind(bit_flips),
    "votes.sqlite, hostile schemas and values": Kind(hostile),
}
