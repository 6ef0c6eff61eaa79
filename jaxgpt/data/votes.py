"""Human votes on answers, in an SQLite file that survives crashes and many annotators writing at once.

    store = Store(Path("votes.sqlite"))
    store.add_task(Task("Finish: a film", (Answer("that sings ."), Answer("."))))
    task = store.next_task("ada")
    store.vote(Vote(id=..., task=task.id, annotator="ada", kind="favourite", tiers=((1,), (0,)), shown=(1, 0)))

A vote sorts the answers that were shown into tiers, best first: ((2,), (0, 1, 3)) is a favourite, ((2,), (0,), (1,)) a
ranking, ((0, 1),) a tie. Votes are only ever appended: one that is undone stays, and another row undoes it.
`vote` returns when the vote is on disk, and a vote sent twice (same id) counts once, so a client may retry until it
gets a response. Each row carries a hash of its content (`data.votes_file`), which is checked on every read.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import random
import sqlite3
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxgpt.data import votes_file
from jaxgpt.data.comparisons import LEFT_OUT, Loaded, Preference, from_tiers
from jaxgpt.data.jsonl import checked_text
from jaxgpt.data.vote_rows import CHANGED, Answer, Fault, Task, Vote, answer_of, find_faults, list_briefly, vote_of
from jaxgpt.errors import UserError
from jaxgpt.files import warn_once

HELD_OUT = 0.1  # fraction of the prompts, chosen by hash, that "votes.sqlite:heldout" selects
PARTS = ("train", "heldout")
REPEATED = "second votes by the same person"  # why a vote trains nothing, beside comparisons.LEFT_OUT
DAMAGED = "damaged"  # likewise
LEASE = 600.0  # seconds for which a task shown to one annotator isn't offered to another
_ORDER = "time, rowid"  # of tasks: as they were added; the hashes leave out rowid, which VACUUM may change
# SQL condition for votes that are not undone.
_STANDING = "kind != 'undo' AND id NOT IN (SELECT undoes FROM votes WHERE undoes IS NOT NULL)"


class Store:
    """The database of tasks, votes and ratings. Safe for several threads and processes; open it once per process.

    UserError if a row is damaged or invalid. `read_only`: the file is not changed and may be write-protected; bad rows
    are left out, with a warning, and listed in `left_out`."""

    def __init__(self, path: Path, *, read_only: bool = False) -> None:
        self._begin(path, votes_file.open_to_read(path) if read_only else votes_file.open_to_write(path))
        if read_only:
            self._leave_out_faults()
        elif faults := self._faults():
            self.close()
            raise votes_file.DamagedError(path, list_briefly([str(fault) for fault in faults]))

    @classmethod
    def rescued(cls, path: Path) -> "Store":
        """A copy in memory of all rows that can still be read and are valid; a warning names the others."""
        store = cls.__new__(cls)
        store._begin(path, votes_file.open_to_rescue(path))
        store._leave_out_faults()
        return store

    def _begin(self, path: Path, db: sqlite3.Connection) -> None:
        self.path, self._db, self._lock = path, db, threading.RLock()
        self._leases: dict[str, tuple[str, float]] = {}
        self.left_out: list[Fault] = []

    def close(self) -> None:
        """Close the database; nothing can be read or written afterwards."""
        with self._lock:
            self._db.close()

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """One transaction at a time; it is on disk when the block ends."""
        with self._lock, votes_file.named(self.path):
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:  # on a full disk, SQLite has rolled back already
                    self._db.execute("ROLLBACK")
                raise

    def _rows(self, query: str, *values: Any) -> list[tuple[Any, ...]]:
        with self._lock, votes_file.named(self.path):
            return self._db.execute(query, values).fetchall()

    def _checked(self, table: str, condition: str, *values: Any) -> list[dict[str, Any]]:
        """Rows by column. UserError if one of them was altered."""
        with self._lock, votes_file.named(self.path):
            found = list(votes_file.read(self._db, table, condition, *values))
        for rowid, row, intact in found:
            if not intact:
                raise votes_file.DamagedError(self.path, str(Fault(table, rowid, row.get("id"), CHANGED)))
        return [row for _, row, _ in found]

    # ---- damaged and invalid rows ----

    def _leave_out_faults(self) -> None:
        self.left_out = self._faults()
        for fault in self.left_out:
            self._db.execute(f"DELETE FROM {fault.table} WHERE rowid = ?", (fault.number,))
        if self.left_out:
            warn_once(f"{self.path}: left out: {list_briefly([str(fault) for fault in self.left_out])}")

    def _faults(self) -> list[Fault]:
        with self._lock, votes_file.named(self.path):
            return find_faults(self._db)

    # ---- tasks ----

    def add_task(self, task: Task) -> bool:
        """Add a task; False if it was already there."""
        with self._transaction() as db:
            row = {"id": task.id, "prompt": task.prompt, "doubt": task.doubt, "time": time.time()}
            if not votes_file.insert(db, "tasks", row):
                return False
            for position, answer in enumerate(task.answers):
                self._insert_answer(task.id, position, answer, f"{task.id}/{position}")
        return True

    def _insert_answer(self, task: str, position: int, answer: Answer, id_: str) -> None:
        row = {"task": task, "position": position, "text": answer.text, "ended": answer.ended}
        votes_file.insert(self._db, "answers", {**row, "origin": json.dumps(dict(answer.origin)), "id": id_})

    def add_answer(self, task: str, answer: Answer, id_: str) -> Task:
        """Add a candidate written by a person and return the task; the same `id_` again changes nothing."""
        checked_text(answer.text, "the answer")
        with self._transaction() as db:
            count = len(self.task(task).answers)
            if not db.execute("SELECT 1 FROM answers WHERE id = ?", (id_,)).fetchone():
                if count >= 16:
                    raise UserError("this prompt already has 16 answers, the maximum")
                self._insert_answer(task, count, answer, id_)
        return self.task(task)

    def task(self, id_: str) -> Task:
        """The task with this id. Raises UserError if there is none."""
        found = self._tasks("WHERE id = ?", "WHERE task = ? ORDER BY position", id_)
        if not found:
            raise UserError(f"no task {id_!r}")
        return found[id_]

    def tasks(self) -> dict[str, Task]:
        """All tasks by id."""
        return self._tasks(f"ORDER BY {_ORDER}", "ORDER BY task, position")

    def _tasks(self, which: str, whose: str, *values: str) -> dict[str, Task]:
        answers: dict[str, list[Answer]] = defaultdict(list)
        with self._lock:
            found = self._checked("tasks", which, *values)
            for row in self._checked("answers", whose, *values):
                answers[row["task"]].append(answer_of(row))
        return {row["id"]: Task(row["prompt"], tuple(answers[row["id"]]), row["doubt"], row["id"]) for row in found}

    def next_task(self, annotator: str, *, overlap: float = 0.0, repeat: float = 0.0) -> tuple[Task, bool] | None:
        """The next task for this annotator, and whether they have voted on it before; None if none is left.

        A fraction `overlap` of all tasks goes to every annotator, to measure agreement; the others go to whoever comes
        first. After every 1 / `repeat` votes, a task for which they gave a favourite or a ranking is repeated. Tasks
        come in order of decreasing doubt."""
        now = time.time()
        with self._lock:
            taken = {task for task, (who, until) in self._leases.items() if who != annotator and until > now}
            rows = self._rows(
                "SELECT task, count(*), max(kind IN ('favourite', 'ranking')) FROM votes "
                f"WHERE annotator = ? AND {_STANDING} GROUP BY task ORDER BY max(number)",
                annotator,
            )
            mine = {task for task, _, _ in rows}
            everyone = {task for (task,) in self._rows(f"SELECT DISTINCT task FROM votes WHERE {_STANDING}")}
            once = [task for task, count, picked in rows if count == 1 and picked]
            extra = sum(count for _, count, _ in rows) - len(mine)
            if repeat and len(mine) * repeat >= extra + 1 and len(once) > 1:
                return self.task(random.Random(f"{annotator} {len(mine)}").choice(once[:-1])), True
            for (id_,) in self._rows(f"SELECT id FROM tasks ORDER BY doubt DESC, {_ORDER}"):
                shared = hash_fraction(id_) < overlap
                if id_ not in mine and (shared or (id_ not in taken and id_ not in everyone)):
                    self._leases[id_] = (annotator, now + LEASE)
                    return self.task(id_), False
        return None

    def count_unvoted(self) -> int:
        """How many tasks nobody has voted on."""
        judged = f"SELECT task FROM votes WHERE {_STANDING}"
        return int(self._rows(f"SELECT count(*) FROM tasks WHERE id NOT IN ({judged})")[0][0])

    def count_waiting(self, annotator: str, *, overlap: float = 0.0) -> int:
        """How many tasks are left for this annotator: those without any vote, and shared ones without theirs."""
        others = self._rows(
            f"SELECT DISTINCT task FROM votes WHERE {_STANDING} EXCEPT "
            f"SELECT task FROM votes WHERE annotator = ? AND {_STANDING}",
            annotator,
        )
        return self.count_unvoted() + sum(hash_fraction(task) < overlap for (task,) in others)

    def has_voted(self, task: str, annotator: str) -> bool:
        """Whether this annotator has a vote on this task that is not undone."""
        query = f"SELECT 1 FROM votes WHERE task = ? AND annotator = ? AND {_STANDING} LIMIT 1"
        return bool(self._rows(query, task, annotator))

    def prompts(self) -> set[str]:
        """The prompts that have a task."""
        return {prompt for (prompt,) in self._rows("SELECT prompt FROM tasks")}

    # ---- votes ----

    def vote(self, vote: Vote) -> bool:
        """Append a vote; False if it was already there. Raises UserError if its task or answers don't exist."""
        with self._transaction() as db:
            if db.execute("SELECT 1 FROM votes WHERE id = ?", (vote.id,)).fetchone():
                return False
            count = len(self.task(vote.task).answers)
            if max(vote.shown) >= count or min(vote.shown) < 0:
                raise UserError(f"task {vote.task} has answers 0 to {count - 1}, but the vote names others")
            self._append(vote, again=self.has_voted(vote.task, vote.annotator))
            self._leases.pop(vote.task, None)
        return True

    def undo(self, annotator: str, id_: str, vote: str | None = None) -> Task | None:
        """Undo this annotator's newest vote, or the one with the id `vote`, and return its task; None if there is no
        such vote. The same `id_` again undoes nothing more."""
        with self._transaction() as db:
            done = db.execute("SELECT task FROM votes WHERE id = ?", (id_,)).fetchone()
            if done:
                return self.task(done[0])
            newest = db.execute(
                f"SELECT id, task FROM votes WHERE annotator = ? AND (? IS NULL OR id = ?) AND {_STANDING} "
                "ORDER BY number DESC LIMIT 1",
                (annotator, vote, vote),
            ).fetchone()
            if not newest:
                return None
            row = {"id": id_, "task": newest[1], "annotator": annotator, "kind": "undo", "tiers": "[]", "shown": "[]"}
            votes_file.insert(db, "votes", {**row, "time": time.time(), "again": 0, "undoes": newest[0]})
            self._leases[newest[1]] = (annotator, time.time() + LEASE)
            return self.task(newest[1])

    def _append(self, vote: Vote, again: bool) -> None:
        row = {name: getattr(vote, name) for name in ("id", "task", "annotator", "kind", "seconds")}
        decided = {"tiers": json.dumps(vote.tiers), "shown": json.dumps(vote.shown)}
        votes_file.insert(self._db, "votes", {**row, **decided, "time": vote.time or time.time(), "again": again})

    def votes(self, annotator: str | None = None) -> list[Vote]:
        """The votes that are not undone, in order."""
        condition = f"WHERE {_STANDING} AND (? IS NULL OR annotator = ?) ORDER BY number"
        return [vote_of(row) for row in self._checked("votes", condition, annotator, annotator)]

    def count(self, annotator: str | None = None) -> int:
        """How many votes are not undone, by one annotator or by all."""
        return int(
            self._rows(
                f"SELECT count(*) FROM votes WHERE {_STANDING} AND (? IS NULL OR annotator = ?)", annotator, annotator
            )[0][0]
        )

    def seconds(self, annotator: str, newest: int) -> list[float]:
        """How many seconds each of this annotator's newest decisions took, newest first."""
        rows = self._rows(
            f"SELECT seconds FROM votes WHERE annotator = ? AND seconds IS NOT NULL AND {_STANDING} "
            "ORDER BY number DESC LIMIT ?",
            annotator,
            newest,
        )
        return [seconds for (seconds,) in rows]

    # ---- ratings: a person as the reward ----

    def rate(self, id_: str, prompt: str, answer: str, annotator: str, stars: int, seconds: float | None) -> bool:
        """Store one to five stars for an answer; False if this id was already there."""
        if stars not in range(1, 6):
            raise UserError(f"stars is {stars}; give 1 to 5")
        with self._transaction() as db:
            row = {"id": id_, "prompt": prompt, "answer": answer, "annotator": annotator, "stars": stars}
            return votes_file.insert(db, "ratings", {**row, "seconds": seconds, "time": time.time()})

    def rating(self, id_: str) -> int | None:
        """The stars stored under this id, or None."""
        found = self._checked("ratings", "WHERE id = ?", id_)
        return found[0]["stars"] if found else None

    # ---- another database ----

    def add_all(self, other: "Store") -> int:
        """Copy the rows of another database that are not here yet, and return how many votes were new, including undone
        votes and undos. UserError if a task has other answers there."""
        with self._transaction() as db:
            before = db.execute("SELECT count(*) FROM votes").fetchone()[0]
            for table in votes_file.COLUMNS:
                for row in other._checked(table, "ORDER BY rowid"):
                    if table == "votes":
                        del row["number"]  # belongs to the other database
                        row["again"] |= row["kind"] != "undo" and self.has_voted(row["task"], row["annotator"])
                    votes_file.insert(db, table, row)
            for id_, task in other.tasks().items():
                if self.task(id_).answers[: len(task.answers)] != task.answers:
                    raise UserError(
                        f"task {id_} has other answers in {other.path} than in {self.path}; use another file"
                    )
            return int(db.execute("SELECT count(*) FROM votes").fetchone()[0]) - int(before)


def hash_fraction(text: str) -> float:
    """A hash of the text as a number in [0, 1)."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big") / 2**48


# ---- preferences for training ----


def is_database(path: Path) -> bool:
    """Whether this names a database of votes, by its suffix."""
    return _split(path)[0].suffix in (".sqlite", ".db")


def read(path: Path) -> list[Preference]:
    """The preferences in a database; "votes.sqlite:train" and "votes.sqlite:heldout" are 90 % and 10 % of the prompts,
    split by hash, so that a prompt stays in its part as votes are added. Skips, "all bad" and repeat votes are left
    out. Raises UserError if nothing is left."""
    return read_counted(path).preferences


def read_counted(path: Path) -> Loaded:
    """As `read`, with how many votes the part has, and how many of them were left out, by reason."""
    file, part = _split(path)
    store = Store(file, read_only=True)
    tasks, votes = store.tasks(), store.votes()
    store.close()
    damaged = sum(fault.table == "votes" for fault in store.left_out)  # in both parts: a damaged vote may not say which
    found = Loaded.of(
        REPEATED if vote.again else preferences_of(tasks[vote.task], vote) or LEFT_OUT.get(vote.kind, "no preference")
        for vote in votes
        if part in ("", PARTS[hash_fraction(tasks[vote.task].prompt) < HELD_OUT])
    )
    if damaged:
        found = Loaded(found.preferences, found.read + damaged, found.left_out + Counter({DAMAGED: damaged}))
    if not found.preferences:
        kind = f" in the part {part!r}" if part else ""
        raise UserError(
            f"{file} holds no preferences{kind} yet ({len(votes)} votes); label more", experiment=("label",)
        )
    return found


def preferences_of(task: Task, vote: Vote) -> list[Preference]:
    """The preferences that a vote expresses (see `comparisons.from_tiers`)."""
    meta = {"annotator": vote.annotator, "vote": vote.id}
    tiers = () if vote.kind in LEFT_OUT else vote.tiers
    answers, ended = [a.text for a in task.answers], [a.ended for a in task.answers]
    return from_tiers(task.prompt, answers, tiers, ended, meta)


def of_scores(id_: str, task: str, annotator: str, score_C: np.ndarray) -> Vote:
    """A program's vote: the answer with the highest score (the first of several), or a tie if all scores are equal."""
    every = tuple(range(len(score_C)))
    if (score_C == score_C[0]).all():
        return Vote(id_, task, annotator, "tie", (every,), every)
    best = int(score_C.argmax())
    return Vote(id_, task, annotator, "favourite", ((best,), tuple(i for i in every if i != best)), every)


def share_of(task: Task, vote: Vote, answer: int) -> float | None:
    """How much of a vote one answer gets: 1 for the favourite, 1 / n where n are tied or have the same text as the
    favourite, else 0; None for a vote that compares nothing (a skip, or all bad)."""
    if vote.kind in LEFT_OUT:
        return None
    texts = [task.answers[i].text for i in vote.tiers[0]]
    top = [i for i in vote.shown if task.answers[i].text in texts]
    return (answer in top) / len(top)


def part_path(file: Path, name: str) -> Path:
    """The path that selects one part of a database in `read`. Raises UserError for any other file."""
    if not is_database(file):
        raise UserError(f"{file} is not a database of votes", experiment=("votes", "--read", str(file)))
    return file.with_name(f"{file.name}:{name}")


def _split(path: Path) -> tuple[Path, str]:
    """("votes.sqlite", "train") of "votes.sqlite:train"."""
    head, _, part = str(path).rpartition(":")
    return (Path(head), part) if head and part in PARTS else (path, "")


# ---- agreement ----


@dataclasses.dataclass(frozen=True)
class Agreement:
    """How often two votes on the same task have the same favourite, and how often they would by chance."""

    pairs: int  # pairs of votes on the same task
    same: float  # fraction of the pairs with the same favourite
    low: float  # 95 % bootstrap interval of `same`, over tasks
    high: float
    chance: float  # expected `same` of random votes: the mean of 1 / C over pairs, if all C answers differ

    @property
    def kappa(self) -> float:
        """Agreement beyond chance: (same - chance) / (1 - chance), with uniform chance (Brennan & Prediger 1981)."""
        return (self.same - self.chance) / max(1 - self.chance, 1e-9)

    def __str__(self) -> str:
        return (
            f"{self.same:.0%} [{self.low:.0%}, {self.high:.0%}] of {self.pairs} pairs, chance {self.chance:.0%}, "
            f"kappa {self.kappa:.2f}"
        )


def agreement(
    votes: Sequence[Vote], *, within: bool = False, tasks: Mapping[str, Task] | None = None
) -> Agreement | None:
    """Agreement between annotators or, if `within`, of each with their own earlier votes. None if no task has a pair
    of votes. Votes without a favourite (skips, ties at the top, all bad) are left out. With `tasks`, answers with the
    same text count as one."""
    by_task: dict[str, list[tuple[str, int | str, float]]] = defaultdict(list)
    for vote in votes:
        if vote.kind in ("favourite", "ranking") and len(vote.tiers[0]) == 1:
            names = {i: tasks[vote.task].answers[i].text if tasks else i for i in vote.shown}
            chance = sum((count / len(names)) ** 2 for count in Counter(names.values()).values())
            by_task[vote.task].append((vote.annotator, names[vote.tiers[0][0]], chance))
    rows = []  # per task: pairs, pairs that agree, and how many would by chance
    for marks in by_task.values():
        pairs = [(a, b) for a, b in itertools.combinations(marks, 2) if (a[0] == b[0]) == within]
        if pairs:
            rows.append((len(pairs), sum(a[1] == b[1] for a, b in pairs), sum(min(a[2], b[2]) for a, b in pairs)))
    if not rows:
        return None
    table = np.array(rows, float)
    count, same, chance = table.sum(0)
    drawn = np.random.default_rng(0).integers(len(table), size=(1000, len(table)))
    rates = table[drawn, 1].sum(1) / table[drawn, 0].sum(1)
    low, high = np.quantile(rates, [0.025, 0.975])
    return Agreement(int(count), same / count, float(low), float(high), chance / count)
