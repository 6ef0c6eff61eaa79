"""Human votes on answers, in an SQLite file that survives crashes and many annotators writing at once.

    store = Store(Path("votes.sqlite"))
    store.add_task(Task("Finish: a film", (Answer("that sings ."), Answer("."))))
    task = store.next_task("ada")
    store.vote(Vote(id=..., task=task.id, annotator="ada", kind="favourite", tiers=((1,), (0,)), shown=(1, 0)))

A vote sorts the answers that were shown into tiers, best first: ((2,), (0, 1, 3)) is a favourite, ((2,), (0,), (1,)) a
ranking, ((0, 1),) a tie. Votes are only ever appended: one that is undone stays, and another row undoes it.
`vote` returns when the vote is on disk, and a vote sent twice (same id) counts once, so a client may retry until it
gets a response.
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
from typing import Any, get_args

import numpy as np

from jaxgpt.data.comparisons import LEFT_OUT, Kind, Loaded, Preference, from_tiers
from jaxgpt.data.jsonl import checked_text
from jaxgpt.errors import UserError

FORMAT = 1
HELD_OUT = 0.1  # fraction of the prompts, chosen by hash, that "votes.sqlite:heldout" selects
PARTS = ("train", "heldout")
REPEATED = "second votes by the same person"  # why a vote trains nothing, beside comparisons.LEFT_OUT
LEASE = 600.0  # seconds for which a task shown to one annotator isn't offered to another
_TABLES = """
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
# SQL condition for votes that are not undone.
_STANDING = "kind != 'undo' AND id NOT IN (SELECT undoes FROM votes WHERE undoes IS NOT NULL)"


@dataclasses.dataclass(frozen=True)
class Answer:
    """One candidate and where it comes from: a model with its sampling settings and seed, a file or a person."""

    text: str
    ended: bool = True  # False: cut off before the end token
    origin: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        checked_text(self.text, "an answer", blank=True)


@dataclasses.dataclass(frozen=True)
class Task:
    """A prompt and its candidates; the id is a hash of both, so adding a task again changes nothing."""

    prompt: str
    answers: tuple[Answer, ...]
    doubt: float = 0.0  # the reward model's uncertainty: the highest comes first
    id: str = ""

    def __post_init__(self) -> None:
        checked_text(self.prompt, "prompt")
        if len(self.answers) < 2:
            raise UserError(f"answers has length {len(self.answers)}: nothing to choose from; give two or more")
        if not self.id:
            content = json.dumps([self.prompt, [answer.text for answer in self.answers]])
            object.__setattr__(self, "id", hashlib.sha256(content.encode()).hexdigest()[:24])


@dataclasses.dataclass(frozen=True)
class Vote:
    """One verdict. `shown` is the order on the screen; `tiers` hold the same answers, best first."""

    id: str
    task: str
    annotator: str
    kind: Kind
    tiers: tuple[tuple[int, ...], ...]
    shown: tuple[int, ...]
    seconds: float | None = None  # from seeing the task to deciding
    time: float = 0.0  # Unix time in seconds; 0: when it is stored
    again: bool = False  # this annotator had voted on it before: counts for agreement only

    def __post_init__(self) -> None:
        for name in ("id", "task", "annotator"):
            value = checked_text(getattr(self, name), name)
            if len(value) > 64:
                raise UserError(f"{name} has {len(value)} characters; use at most 64")
        if self.kind not in get_args(Kind):
            raise UserError(f"kind is {self.kind!r}; it must be one of {', '.join(get_args(Kind))}")
        placed = sorted(i for tier in self.tiers for i in tier)
        if len(self.shown) < 2 or placed != sorted(set(self.shown)) or len(placed) != len(self.shown):
            raise UserError("tiers must hold each of the two or more answers shown exactly once")
        sizes = [len(tier) for tier in self.tiers]
        ranked = self.kind in ("favourite", "ranking")
        if 0 in sizes or (ranked and len(sizes) < 2) or (not ranked and len(sizes) != 1):
            raise UserError("tiers don't fit this kind: a favourite or a ranking has two or more, any other kind one")
        if self.seconds is not None and not 0 <= self.seconds < 1e7:
            raise UserError(f"seconds is {self.seconds}; give how long the decision took, or leave it out")


class Store:
    """The database of tasks, votes and ratings. Safe for several threads and processes; open it once per process."""

    def __init__(self, path: Path, *, create: bool = True) -> None:
        if path.is_dir():
            raise UserError(f"{path} is a folder; give a file, such as {path / 'votes.sqlite'}")
        if not create and not path.is_file():
            raise UserError(f"there is no database of votes at {path}", experiment=("label",))
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self._lock = path, threading.RLock()
        self._leases: dict[str, tuple[str, float]] = {}
        try:
            self._db = sqlite3.connect(path, timeout=60, check_same_thread=False, isolation_level=None)
            self._db.executescript("PRAGMA journal_mode=WAL; PRAGMA synchronous=FULL;" + _TABLES)
            version = self._db.execute("PRAGMA user_version").fetchone()[0]
            if version not in (0, FORMAT):
                raise UserError(f"{path} has format {version}, but this version of jaxgpt reads format {FORMAT}")
            self._db.execute(f"PRAGMA user_version={FORMAT}")
        except sqlite3.DatabaseError as error:
            raise UserError(f"{path} can't be used as a database of votes ({error}); choose another file") from error

    def close(self) -> None:
        """Close the database; nothing can be read or written afterwards."""
        with self._lock:
            self._db.close()

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """One transaction at a time; it is on disk when the block ends."""
        with self._lock:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
                self._db.execute("COMMIT")
            except BaseException:
                self._db.execute("ROLLBACK")
                raise

    def _rows(self, query: str, *values: Any) -> list[tuple[Any, ...]]:
        with self._lock:
            return self._db.execute(query, values).fetchall()

    # ---- tasks ----

    def add_task(self, task: Task) -> bool:
        """Add a task; False if it was already there."""
        with self._transaction() as db:
            found = db.execute(
                "INSERT OR IGNORE INTO tasks VALUES (?, ?, ?, ?)", (task.id, task.prompt, task.doubt, time.time())
            )
            if not found.rowcount:
                return False
            for position, answer in enumerate(task.answers):
                self._insert_answer(task.id, position, answer, f"{task.id}/{position}")
        return True

    def _insert_answer(self, task: str, position: int, answer: Answer, id_: str) -> None:
        self._db.execute(
            "INSERT INTO answers VALUES (?, ?, ?, ?, ?, ?)",
            (task, position, answer.text, answer.ended, json.dumps(dict(answer.origin)), id_),
        )

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
        found = self._rows("SELECT prompt, doubt FROM tasks WHERE id = ?", id_)
        if not found:
            raise UserError(f"no task {id_!r}")
        rows = self._rows("SELECT text, ended, origin FROM answers WHERE task = ? ORDER BY position", id_)
        answers = tuple(Answer(text, bool(ended), json.loads(origin)) for text, ended, origin in rows)
        return Task(found[0][0], answers, found[0][1], id_)

    def tasks(self) -> dict[str, Task]:
        """All tasks by id."""
        return {id_: self.task(id_) for (id_,) in self._rows("SELECT id FROM tasks ORDER BY rowid")}

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
            for (id_,) in self._rows("SELECT id FROM tasks ORDER BY doubt DESC, rowid"):
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
            db.execute(
                "INSERT INTO votes (id, task, annotator, kind, tiers, shown, time, again, undoes) "
                "VALUES (?, ?, ?, 'undo', '[]', '[]', ?, 0, ?)",
                (id_, newest[1], annotator, time.time(), newest[0]),
            )
            self._leases[newest[1]] = (annotator, time.time() + LEASE)
            return self.task(newest[1])

    def _append(self, vote: Vote, again: bool) -> None:
        self._db.execute(
            "INSERT INTO votes (id, task, annotator, kind, tiers, shown, seconds, time, again) "
            "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                vote.id,
                vote.task,
                vote.annotator,
                vote.kind,
                json.dumps(vote.tiers),
                json.dumps(vote.shown),
                vote.seconds,
                vote.time or time.time(),
                again,
            ),
        )

    def votes(self, annotator: str | None = None) -> list[Vote]:
        """The votes that are not undone, in order."""
        rows = self._rows(
            "SELECT id, task, annotator, kind, tiers, shown, seconds, time, again FROM votes "
            f"WHERE {_STANDING} AND (? IS NULL OR annotator = ?) ORDER BY number",
            annotator,
            annotator,
        )
        found = []
        for id_, task, who, kind, tiers, shown, seconds, when, again in rows:
            places = tuple(map(tuple, json.loads(tiers)))
            found.append(Vote(id_, task, who, kind, places, tuple(json.loads(shown)), seconds, when, bool(again)))
        return found

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
            return (
                db.execute(
                    "INSERT OR IGNORE INTO ratings VALUES (?, ?, ?, ?, ?, ?, ?)",
                    (id_, prompt, answer, annotator, stars, seconds, time.time()),
                ).rowcount
                == 1
            )

    def rating(self, id_: str) -> int | None:
        """The stars stored under this id, or None."""
        found = self._rows("SELECT stars FROM ratings WHERE id = ?", id_)
        return found[0][0] if found else None


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
    store = Store(file, create=False)
    try:
        tasks, votes = store.tasks(), store.votes()
    finally:
        store.close()
    found = Loaded.of(
        REPEATED if vote.again else preferences_of(tasks[vote.task], vote) or LEFT_OUT.get(vote.kind, "no preference")
        for vote in votes
        if part in ("", PARTS[hash_fraction(tasks[vote.task].prompt) < HELD_OUT])
    )
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
    same text are one answer."""
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
