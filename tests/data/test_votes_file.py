"""The database of votes as a file: damaged, read-only, of an older format, or made by a stranger."""

import contextlib
import hashlib
import os
import re
import shutil
import sqlite3
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from experiments import votes as experiment
from jaxgpt.data import formats, vote_rows, votes, votes_file
from jaxgpt.data.votes import Answer, Store, Task, Vote
from jaxgpt.errors import UserError
from tests.torture.votes import fill, rows_of


@pytest.fixture(scope="module")
def intact(tmp_path_factory) -> bytes:
    return fill(tmp_path_factory.mktemp("votes") / "votes.sqlite", tasks=4)


@pytest.fixture
def path(tmp_path, intact) -> Path:
    (tmp_path / "votes.sqlite").write_bytes(intact)
    return tmp_path / "votes.sqlite"


def change(path: Path, *statements: str) -> None:
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as db:
        for statement in statements:
            db.executescript(statement)


def seal(path: Path, table: str, rowid: int) -> None:
    """As a stranger may: hashes are no secret."""
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.text_factory = lambda text: text.decode("utf-8", "surrogateescape")
        votes_file.seal(db, table, rowid)


COLUMNS = [(table, column) for table, columns in votes_file.COLUMNS.items() for column in columns]


@pytest.mark.parametrize(("table", "column"), COLUMNS)
def test_each_row_vouches_for_every_column(path, table, column):
    """The row is named by table and number, and no other row that has nothing to do with it is lost."""
    whole = rows_of(Store(path, read_only=True))
    new = f"{column} + 70" if column in ("doubt", "time", "position", "ended", "number", "again", "stars") else "'x'"
    change(path, f"UPDATE {table} SET {column} = {new} WHERE rowid = 2")
    store = Store(path, read_only=True)
    found, number = rows_of(store), 72 if column == "number" else 2
    assert f"{table} row {number} (" in str(store.left_out[0]) and "checksum" in str(store.left_out[0])
    gone = {(fault.table, 2 if fault.number == 72 else fault.number) for fault in store.left_out}
    assert found == {place: row for place, row in whole.items() if place not in gone}
    assert len(gone) == 1 or table in ("tasks", "answers")
    with pytest.raises(UserError, match=rf"votes.sqlite is damaged \({table} row {number} .*--read"):
        Store(path)


def test_a_damaged_row_is_named_once_and_counted(path, capsys):
    change(path, "UPDATE votes SET tiers = '[[1],[0,2]]' WHERE id = 'ada 2'")
    before = votes.read_counted(path)
    assert "ada 2" not in {one.meta["vote"] for one in before.preferences} and before.left_out["damaged"] == 1
    assert before.read - before.left_out.total() == len(before.preferences) > 3
    formats.fingerprint(path)
    said = capsys.readouterr().err
    assert said.count("WARNING") == 1 and f"{path}: left out: votes row" in said and "'ada 2'" in said


def test_a_damaged_undo_does_not_bring_its_vote_back(path):
    standing = {vote.id for vote in Store(path, read_only=True).votes()}
    for column in ("undoes", "task", "annotator", "kind"):
        with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as db:
            data = path.read_bytes()
            db.execute(f"UPDATE votes SET {column} = 'x' WHERE id = 'undo 0'")
            assert {vote.id for vote in Store(path, read_only=True).votes()} <= standing
        path.write_bytes(data)
        for suffix in ("-wal", "-shm"):
            path.with_name(path.name + suffix).unlink(missing_ok=True)


def test_what_is_left_of_a_damaged_database_is_copied(path, capsys):
    """Rows that were changed, and pages that SQLite itself can't read."""
    whole = rows_of(Store(path, read_only=True))
    change(path, "UPDATE votes SET seconds = 9 WHERE id = 'ada 2'")
    experiment.main(experiment.Settings(votes=path.with_name("new.sqlite"), read=path))
    said = capsys.readouterr()
    assert "'ada 2'" in said.err and "new votes from" in said.out
    new = rows_of(Store(path.with_name("new.sqlite")))
    without_numbers = [
        {(table, row[1:] if table == "votes" else row) for (table, _), row in rows.items() if "ada 2" not in row}
        for rows in (new, whole)
    ]
    assert without_numbers[0] == without_numbers[1] and len(new) == len(whole) - 1


def test_pages_that_sqlite_cant_read_are_one_line_and_the_others_are_rescued(tmp_path, capsys):
    path = tmp_path / "votes.sqlite"
    fill(path, tasks=15)
    change(path, "PRAGMA journal_mode=DELETE; PRAGMA page_size=512; VACUUM")
    root = sqlite3.connect(path).execute("SELECT rootpage FROM sqlite_master WHERE name = 'votes'").fetchone()[0]
    task = next(vote.task for vote in Store(path, read_only=True).votes() if vote.id == "ada 7")
    data = bytearray(path.read_bytes())
    at = data.index(f"ada 7{task}".encode()) // 512  # a page of the table, not of an index
    data[at * 512 : at * 512 + 8] = b"\0" * 8
    path.write_bytes(data)
    assert at != root - 1
    for open_ in (lambda: Store(path), lambda: Store(path, read_only=True), lambda: votes.read(path)):
        with pytest.raises(UserError, match=r"votes.sqlite is damaged \(.*\); copy what is left with `--read") as error:
            open_()
        assert "\n" not in str(error.value)
    with contextlib.closing(Store.rescued(path)) as store:
        found = {vote.id for vote in store.votes()}
    assert {"ada 0", "ada 14", "bob 1"} <= found and "ada 7" not in found and len(found) > 15
    assert str(path) in capsys.readouterr().err


def test_a_database_that_no_longer_says_what_it_holds_is_one_line(path):
    data = path.read_bytes()
    assert data.count(b"TABLE ratings") == 1
    path.write_bytes(data.replace(b"TABLE ratings", b"TABLE ratin(s"))
    for open_, says in (
        (Store, "--read"),
        (lambda path: Store(path, read_only=True), "--read"),
        (Store.rescued, "recover"),
    ):
        with pytest.raises(UserError, match=rf"votes.sqlite is damaged .*{says}") as error:
            open_(path)
        assert "\n" not in str(error.value)


def write_format_1(path: Path) -> None:
    """A database as jaxgpt 0.1.0 wrote it: without hashes."""
    fill(path, tasks=4)
    tables = [f"ALTER TABLE {table} DROP COLUMN sha256" for table in votes_file.COLUMNS]
    change(path, *tables, "PRAGMA user_version=1")


def test_a_database_of_format_1_is_read_as_it_is_and_becomes_format_2_without_loss(tmp_path, path):
    old = tmp_path / "old.sqlite"
    write_format_1(old)
    data, now = old.read_bytes(), Store(path, read_only=True)
    seen = Store(old, read_only=True)
    assert old.read_bytes() == data and not seen.left_out, "reading changes nothing"
    without_times = [[{**vars(vote), "time": 0} for vote in store.votes()] for store in (seen, now)]
    assert without_times[0] == without_times[1] and seen.tasks() == now.tasks()
    before = rows_of(seen)
    stores = [Store(old), Store(old)]
    assert rows_of(stores[1]) == before and stores[0]._rows("PRAGMA user_version") == [(2,)]
    assert stores[1].undo("ada", "u") and not Store(old).left_out
    assert votes_file._schema(stores[0]._db) == votes_file._schema(now._db)


def test_a_format_1_database_that_was_only_half_created_is_completed(tmp_path):
    change(tmp_path / "v.sqlite", votes_file._FORMAT_1.split(";")[0])
    assert Store(tmp_path / "v.sqlite").count() == 0
    (tmp_path / "empty.sqlite").touch()
    assert Store(tmp_path / "empty.sqlite").count() == 0


@contextlib.contextmanager
def as_nobody() -> Iterator[None]:
    """Without root's right to write everywhere."""
    root = os.geteuid() == 0
    try:
        os.seteuid(65534 if root else os.geteuid())
        yield
    finally:
        os.seteuid(0 if root else os.geteuid())


@pytest.mark.parametrize("state", ["closed", "with votes in its -wal", "open", "open, folder writable"])
def test_a_database_that_cant_be_written_to_can_be_trained_from(intact, state):
    """Also when its newest votes are still in the file beside it: they are not lost."""
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as later:
        folder = Path(scratch) / "there"
        folder.mkdir()
        Path(scratch).chmod(0o755)
        path = folder / "votes.sqlite"
        path.write_bytes(intact)
        count = len(Store(path, read_only=True).votes())
        if state != "closed":
            store = Store(path)
            task = next(iter(store.tasks()))
            store.vote(Vote("newest", task, "eve", "tie", ((0, 1, 2),), (0, 1, 2)))
            if state.startswith("with"):
                for file in (path, folder / "votes.sqlite-wal"):
                    shutil.copy(file, Path(scratch) / file.name)
                store.close()
                shutil.rmtree(folder)
                folder.mkdir()
                for name in ("votes.sqlite", "votes.sqlite-wal"):
                    shutil.move(Path(scratch) / name, folder / name)
            else:
                later.callback(store.close)
        for file in folder.iterdir():
            file.chmod(0o444)
        folder.chmod(0o777 if "writable" in state else 0o555)
        names = sorted(file.name for file in folder.iterdir())
        hashes = hashlib.sha256(path.read_bytes()).digest()
        with as_nobody():
            assert len(Store(path, read_only=True).votes()) == count + (state != "closed")
            assert votes.read(path)
            if "open" not in state:  # within one process, SQLite shares what is already open
                with pytest.raises(
                    UserError, match=r"can't be used as a database of votes \(.*you may not|permissions"
                ):
                    Store(path)
        assert sorted(file.name for file in folder.iterdir()) == names
        assert hashlib.sha256(path.read_bytes()).digest() == hashes
        folder.chmod(0o777)


@pytest.mark.parametrize(
    ("statement", "what"),
    [
        ("CREATE TRIGGER t AFTER INSERT ON votes BEGIN DELETE FROM votes; END", "trigger 't'"),
        ("CREATE VIEW v AS SELECT * FROM votes", "view 'v'"),
        ("DROP TABLE votes; CREATE VIEW votes AS SELECT * FROM tasks", "view 'votes'"),
        ("CREATE TABLE other (a)", "table 'other'"),
        ("CREATE INDEX i ON votes (length(tiers))", "index 'i'"),
        ("ALTER TABLE votes ADD COLUMN more TEXT", "table 'votes'"),
        ("ALTER TABLE votes ADD COLUMN two INTEGER AS (number * 2)", "table 'votes'"),
        ("ALTER TABLE tasks RENAME COLUMN prompt TO words", "table 'tasks'"),
        ("DROP TABLE ratings", "tables are missing"),
    ],
)
def test_a_database_with_anything_but_our_tables_is_refused(path, statement, what):
    change(path, statement)
    data = path.read_bytes()
    for open_ in (lambda: Store(path), lambda: Store(path, read_only=True), lambda: Store.rescued(path)):
        with pytest.raises(UserError, match="votes.sqlite can't be used as a database of votes") as error:
            open_()
        assert what in str(error.value) and "\n" not in str(error.value)
    assert path.read_bytes() == data


def test_a_journal_that_names_other_files_is_refused(tmp_path, path):
    """SQLite deletes the file that the journal of a transaction over several databases names, whatever it is."""
    change(path, "PRAGMA journal_mode=DELETE")
    other = tmp_path / "other.txt"
    other.write_text("precious")
    page = path.read_bytes()[:4096]
    sum_ = 1 + sum(page[i] for i in range(4096 - 200, 0, -200))
    end = bytes.fromhex("d9d505f920a163d7")
    name = str(other).encode()
    journal = (end + struct.pack(">5I", 1, 1, len(path.read_bytes()) // 4096, 512, 4096)).ljust(512, b"\0")
    journal += struct.pack(">I", 1) + page + struct.pack(">I", sum_)
    journal += struct.pack(">I", 2**30 // 4096 + 1) + name + struct.pack(">2I", len(name), sum(name)) + end
    (tmp_path / "votes.sqlite-journal").write_bytes(journal)
    for open_ in (lambda: Store(path), lambda: Store(path, read_only=True), lambda: Store.rescued(path)):
        with pytest.raises(UserError, match=r"votes.sqlite-journal was not written by jaxgpt.*; remove it"):
            open_()
    assert other.read_text() == "precious"


def test_a_database_takes_no_more_memory_than_its_size(tmp_path, path):
    """A write-ahead log of one page may claim that there are thousands (or 2**31) of them."""
    change(path, "PRAGMA journal_mode=WAL")
    page = bytearray(path.read_bytes()[:4096])
    page[28:32], page[92:96] = struct.pack(">I", 20_000), page[24:28]
    log, sums = b"", (0, 0)

    def add(data: bytes) -> bytes:
        nonlocal sums
        for a, b in struct.iter_unpack("<2I", data):
            first = (sums[0] + a + sums[1]) % 2**32
            sums = first, (sums[1] + b + first) % 2**32
        return data

    log = add(struct.pack(">6I", 0x377F0682, 3007000, 4096, 0, 7, 9)) + struct.pack(">2I", *sums)
    frame = add(struct.pack(">2I", 1, 20_000))
    add(bytes(page))
    log += frame + struct.pack(">4I", 7, 9, *sums) + page
    (tmp_path / "votes.sqlite-wal").write_bytes(log)
    with pytest.raises(UserError, match="it claims to have 20,000 pages, more than its files hold"):
        Store(path, read_only=True)


def test_the_newest_votes_are_found_through_a_link(tmp_path, path):
    """SQLite keeps its journal beside the file itself, not beside the link."""
    (tmp_path / "links").mkdir()
    link = tmp_path / "links/votes.sqlite"
    link.symlink_to(path)
    with contextlib.closing(Store(path)) as store:
        task = next(iter(store.tasks()))
        store.vote(Vote("newest", task, "eve", "tie", ((0, 1, 2),), (0, 1, 2)))
        assert Store(link, read_only=True).votes()[-1].id == "newest"


def test_a_newer_format_is_refused(path):
    change(path, "ALTER TABLE votes ADD COLUMN more TEXT; PRAGMA user_version=3")
    with pytest.raises(UserError, match="has format 3, but this version of jaxgpt reads format 2"):
        Store(path)


@pytest.mark.parametrize(
    ("table", "column", "value", "why"),
    [
        ("votes", "task", "'none'", "its task is missing"),
        ("votes", "tiers", "'[[1],[0,9]]'", "exactly once"),
        ("votes", "tiers", "'[[true],[0,2]]'", "wrong type"),
        ("votes", "tiers", "CAST(x'5b5d' AS BLOB)", "don't fit|exactly once|not text|JSON"),
        ("votes", "kind", "'nonsense'", "kind is"),
        ("votes", "seconds", "'long'", "seconds"),
        ("votes", "time", "9e999", "time is not a number"),
        ("votes", "annotator", "CAST(x'c328' AS TEXT)", "surrogate"),
        ("votes", "id", "printf('%.100c', 'x')", "at most 64"),
        ("tasks", "prompt", "x'00'", "not text"),
        ("tasks", "id", "NULL", "is NoneType"),
        ("tasks", "doubt", "'high'", "doubt is not a number"),
        ("answers", "origin", f"'{'[' * 5000}'", "recursion|JSON|nested|Expecting"),
        ("answers", "position", "7", "not all of its answers are there"),
        ("answers", "text", "printf('%.1001c', 'x')", "text is longer than"),
        ("ratings", "stars", "9", "1 to 5"),
    ],
)
def test_a_row_that_makes_no_sense_is_named_and_left_out(path, monkeypatch, table, column, value, why):
    """Though its hash is right."""
    monkeypatch.setattr(vote_rows, "LONGEST_TEXT", 1000 if column == "text" else vote_rows.LONGEST_TEXT)
    change(path, f"UPDATE {table} SET {column} = {value} WHERE rowid = 2")
    seal(path, table, 2)
    store = Store(path, read_only=True)
    assert {fault.table for fault in store.left_out} >= {table if column != "position" else "tasks"}
    assert re.search(why, " ".join(map(str, store.left_out)))
    assert store.votes() and store.tasks() and "\n" not in " ".join(map(str, store.left_out))


def test_a_vote_on_answers_that_the_task_does_not_have_is_left_out(path):
    change(path, "UPDATE votes SET tiers = '[[3],[0]]', shown = '[0,3]' WHERE id = 'ada 1'")
    with contextlib.closing(sqlite3.connect(path)) as db:
        number = db.execute("SELECT number FROM votes WHERE id = 'ada 1'").fetchone()[0]
    seal(path, "votes", number)
    (fault,) = Store(path, read_only=True).left_out
    assert (fault.id, fault.why) == ("ada 1", "it names answers that its task doesn't have")


def test_two_databases_become_one_and_twice_is_once(tmp_path, path):
    other = Store(tmp_path / "other.sqlite")
    task = next(iter(Store(path, read_only=True).tasks().values()))
    other.add_task(Task(task.prompt, task.answers[:3]))
    other.vote(Vote("of eve", task.id, "eve", "tie", ((0, 1, 2),), (0, 1, 2)))
    other.vote(Vote("of ada", task.id, "ada", "tie", ((0, 1, 2),), (0, 1, 2)))
    store = Store(path)
    count = store.count()
    assert store.add_all(other) == 2 and store.add_all(other) == 0 and store.count() == count + 2
    assert {vote.id: vote.again for vote in store.votes() if vote.id.startswith("of")} == {
        "of eve": False,
        "of ada": True,
    }
    other.add_answer(task.id, Answer("another"), "x")
    with pytest.raises(UserError, match=rf"task {task.id} has other answers"):
        store.add_all(other)
    assert store.count() == count + 2 and not Store(path).left_out


def test_a_full_disk_is_one_line_and_loses_nothing(path):
    store = Store(path)
    store._db.execute(f"PRAGMA max_page_count={store._rows('PRAGMA page_count')[0][0]}")
    with pytest.raises(UserError, match=r"votes.sqlite can't be used .*\(database or disk is full\)"):
        store.add_task(Task("long " * 9000, (Answer("a"), Answer("b"))))
    assert not Store(path).left_out and store.tasks() == Store(path).tasks()


def test_values_that_sqlite_changes_are_still_vouched_for(tmp_path):
    """-0.0 becomes 0.0, and whole numbers become floats."""
    store: Any = Store(tmp_path / "v.sqlite")
    store.add_task(Task("p", (Answer("a\0b"), Answer("\U0001f600")), doubt=-0.0))
    store.add_task(Task("q", (Answer(""), Answer("b")), doubt=1))
    store.vote(Vote("v", next(iter(store.tasks())), "ada", "tie", ((0, 1),), (0, 1), seconds=3))
    assert not Store(store.path).left_out and Store(store.path).tasks() == store.tasks()
