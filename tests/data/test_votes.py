"""The database of votes, the preferences that training reads from it, and other projects' formats."""

import dataclasses
import itertools
import json
import multiprocessing
import os
import signal
import sqlite3
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxgpt import losses
from jaxgpt.data import formats, votes
from jaxgpt.data.comparisons import Preference, from_tiers, write_preferences
from jaxgpt.data.formats import Verdict
from jaxgpt.data.jsonl import write_rows
from jaxgpt.data.tokenizer import train_char
from jaxgpt.data.votes import Answer, Store, Task, Vote
from jaxgpt.errors import UserError


def task_of(number: int, answers: int = 3) -> Task:
    return Task(f"prompt {number}", tuple(Answer(f"answer {number}.{i}") for i in range(answers)))


def vote_of(task: Task, best: int = 0, annotator: str = "ada", id_: str = "", **changes) -> Vote:
    shown = tuple(range(len(task.answers)))
    rest = tuple(i for i in shown if i != best)
    fields = {
        "id": id_ or f"{annotator} {task.id} {best}",
        "task": task.id,
        "annotator": annotator,
        "kind": "favourite",
        "tiers": ((best,), rest),
        "shown": shown,
    }
    return Vote(**(fields | changes))


@pytest.fixture
def store(tmp_path) -> Store:
    made = Store(tmp_path / "votes.sqlite")
    for number in range(20):
        made.add_task(task_of(number))
    return made


def test_a_vote_counts_once_however_often_it_comes(store):
    vote = vote_of(task_of(0), seconds=1.5)
    assert [store.vote(vote) for _ in range(3)] == [True, False, False]
    (kept,) = store.votes()
    assert dataclasses.replace(kept, time=0.0) == vote and kept.time > 0
    assert store.count() == store.count("ada") == 1 and store.count("bob") == 0
    assert store.count_unvoted() == 19


def test_what_is_taken_back_stays_in_the_file_but_does_not_count(store):
    first, second = (vote_of(task_of(i)) for i in range(2))
    store.vote(first), store.vote(second)
    assert store.undo("bob", "u0") is None
    assert store.undo("ada", "u1").id == second.task
    assert store.undo("ada", "u1").id == second.task  # sent twice
    assert [vote.id for vote in store.votes()] == [first.id]
    assert store.undo("ada", "u2").id == first.task and store.votes() == []
    assert not store.vote(second) and store.votes() == []  # a vote that was undone can't be sent again
    assert store.vote(vote_of(task_of(1), best=2)) and store.count() == 1
    rows = sqlite3.connect(store.path).execute("SELECT kind FROM votes ORDER BY number").fetchall()
    assert [kind for (kind,) in rows] == ["favourite", "favourite", "undo", "undo", "favourite"]


def test_every_task_goes_to_one_annotator_and_the_shared_ones_to_all(store):
    seen: dict[str, list[str]] = {"ada": [], "bob": []}
    for _ in range(40):
        for who in seen:
            found = store.next_task(who, overlap=0.5)
            if found:
                seen[who].append(found[0].id)
                store.vote(vote_of(found[0], annotator=who))
    shared = {task.id for task in store.tasks().values() if votes.hash_fraction(task.id) < 0.5}
    assert 0 < len(shared) < 20
    assert set(seen["ada"]) & set(seen["bob"]) == shared
    assert set(seen["ada"]) | set(seen["bob"]) == set(store.tasks())
    assert all(len(ids) == len(set(ids)) for ids in seen.values())


def test_a_task_that_somebody_looks_at_is_not_offered_to_others_and_comes_again_to_them(store):
    first = store.next_task("ada")[0].id
    assert store.next_task("ada")[0].id == first != store.next_task("bob")[0].id


def test_a_vote_taken_back_stays_with_its_annotator_until_the_lease_ends(store, monkeypatch):
    first = store.next_task("ada")[0]
    store.vote(vote_of(first))
    assert store.undo("ada", "u").id == first.id
    assert store.next_task("bob")[0].id != first.id == store.next_task("ada")[0].id
    monkeypatch.setattr(votes, "LEASE", -1.0)  # expired from the start
    assert store.next_task("ada")[0].id == store.next_task("eve")[0].id == first.id


def test_a_confirmed_change_is_on_disk_and_one_that_fails_leaves_nothing(store):
    assert store._rows("PRAGMA journal_mode") == [("wal",)]
    assert store._rows("PRAGMA synchronous") == [(2,)]  # FULL: an fsync before COMMIT returns
    with pytest.raises(TypeError):
        store.add_task(Task("half", (Answer("a"), Answer("b", origin={"no": object()}))))
    assert store.count_unvoted() == 20 and "half" not in store.prompts()
    assert store.add_task(Task("half", (Answer("a"), Answer("b"))))


def test_earlier_tasks_come_a_second_time_and_count_for_agreement_only(store):
    again = []
    for n in range(30):
        task, repeated = store.next_task("ada", repeat=0.25)
        again.append(repeated)
        store.vote(vote_of(task, best=0 if n % 2 else 1, id_=str(n)))
        if sum(again) == 3:
            break
    kept = store.votes()
    assert sum(vote.again for vote in kept) == 3 and 12 <= len(kept) - 3 <= 14
    assert len(votes.read(store.path)) == len(kept) - 3
    assert votes.agreement(kept, within=True).pairs == 3 and votes.agreement(kept) is None


def test_only_favourites_and_rankings_come_a_second_time(store):
    picked = set()
    for n in range(16):
        task, repeated = store.next_task("ada")
        assert not repeated
        if n % 4 == 3:
            picked.add(task.id)
            store.vote(vote_of(task, kind="ranking", tiers=((2,), (1,), (0,))) if n % 8 == 3 else vote_of(task))
        else:
            store.vote(vote_of(task, kind=("skip", "tie", "bad")[n % 4], tiers=((0, 1, 2),)))
    newest, seen = task.id, []
    while (found := store.next_task("ada", repeat=1.0))[1]:
        seen.append(found[0].id)
        store.vote(vote_of(found[0], id_=f"again {len(seen)}"))
    assert newest in picked and sorted(seen) == sorted(picked - {newest})


def test_what_waits_for_an_annotator_is_what_they_will_get(store):
    for _ in range(6):
        store.vote(vote_of(store.next_task("ada", overlap=0.5)[0]))
    for n in range(3):
        store.vote(vote_of(store.next_task("bob", overlap=0.5)[0], annotator="bob", id_=f"bob {n}"))
    store.undo("bob", "u")
    store._leases.clear()
    waiting = {who: store.count_waiting(who, overlap=0.5) for who in ("ada", "bob", "eve")}
    assert store.count_waiting("eve") == store.count_unvoted() < waiting["ada"] < waiting["eve"]
    for who, count in waiting.items():
        other = Store(store.path)  # without leases of the others
        seen = set()
        while found := other.next_task(who, overlap=0.5):
            assert other.count_waiting(who, overlap=0.5) == count - len(seen)
            seen.add(found[0].id)
            other.vote(vote_of(found[0], annotator=who, id_=f"{who} last {len(seen)}"))
        assert len(seen) == count
        for n in range(count):
            other.undo(who, f"{who} back {n}")


def test_a_vote_is_taken_back_by_its_id(store):
    first, second = (vote_of(task_of(i)) for i in range(2))
    store.vote(first), store.vote(second)
    assert store.undo("bob", "u0", first.id) is None and store.undo("ada", "u0", "none") is None
    assert store.undo("ada", "u1", first.id).id == store.undo("ada", "u1", first.id).id == first.task
    assert store.undo("ada", "u2", first.id) is None and [vote.id for vote in store.votes()] == [second.id]


def test_the_most_doubtful_comes_first(store):
    store.add_task(dataclasses.replace(task_of(50), doubt=0.2))
    store.add_task(dataclasses.replace(task_of(51), doubt=0.9))
    assert [store.next_task(who)[0].prompt for who in ("ada", "bob")] == ["prompt 51", "prompt 50"]


def test_a_person_s_answer_joins_the_others_once(store):
    task = task_of(3)
    for _ in range(2):
        task = store.add_answer(task.id, Answer("mine", origin={"by": "ada"}), "x")
    assert [answer.text for answer in task.answers] == ["answer 3.0", "answer 3.1", "answer 3.2", "mine"]
    store.vote(vote_of(task, best=3))
    (found,) = votes.read(store.path)
    assert found.answers[found.choice] == "mine"
    for n in range(12):
        store.add_answer(task.id, Answer(str(n)), f"more {n}")
    with pytest.raises(UserError, match="already has 16 answers"):
        store.add_answer(task.id, Answer("one too many"), "y")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"tiers": ((0,), (1,))}, "exactly once"),
        ({"tiers": ((0,), (1, 1, 2))}, "exactly once"),
        ({"tiers": ((0, 1, 2),)}, "don't fit this kind"),
        ({"kind": "tie"}, "don't fit this kind"),
        ({"kind": "nonsense"}, "one of favourite"),
        ({"shown": (0,), "tiers": ((0,),)}, "two or more"),
        ({"annotator": "x" * 65}, "at most 64"),
        ({"annotator": " "}, "empty"),
        ({"id": 7}, "not text"),
        ({"seconds": -1.0}, "seconds"),
        ({"seconds": float("nan")}, "seconds"),
    ],
)
def test_what_is_no_vote_is_refused(changes, says):
    with pytest.raises(UserError, match=says):
        vote_of(task_of(0), **changes)


def test_votes_on_what_does_not_exist_are_refused(store):
    with pytest.raises(UserError, match="no task"):
        store.vote(vote_of(task_of(99)))
    with pytest.raises(UserError, match="answers 0 to 2"):
        store.vote(
            vote_of(task_of(0, answers=4)).__class__(
                **{**dataclasses.asdict(vote_of(task_of(0, 4))), "task": task_of(0).id}
            )
        )
    assert store.count() == 0


def test_a_file_that_is_no_database_is_named(tmp_path):
    (tmp_path / "x.sqlite").write_text("hello, this is no database at all" * 50)
    with pytest.raises(UserError, match="can't be used as a database"):
        Store(tmp_path / "x.sqlite")
    with pytest.raises(UserError, match="there is no database"):
        votes.read(tmp_path / "none.sqlite")
    with pytest.raises(UserError, match="holds no preferences in the part 'train' yet"):
        Store(tmp_path / "empty.sqlite")
        votes.read(tmp_path / "empty.sqlite:train")


def test_many_annotators_in_threads_and_processes_lose_and_double_nothing(tmp_path):
    path = tmp_path / "votes.sqlite"
    store = Store(path)
    for number in range(40):
        store.add_task(task_of(number))

    def work(args: tuple[Store, str]) -> list[str]:
        mine, done = args[0], []
        while found := mine.next_task(args[1], overlap=0.2):
            vote = vote_of(found[0], annotator=args[1])
            threads = [threading.Thread(target=mine.vote, args=(vote,)) for _ in range(2)]  # sent twice at once
            [thread.start() for thread in threads], [thread.join() for thread in threads]
            done.append(vote.id)
        return done

    stores = [store, Store(path)]  # two connections, as two processes would have
    with ThreadPoolExecutor(10) as pool:
        sent = list(pool.map(work, [(stores[i % 2], f"annotator {i}") for i in range(10)]))
    ids = [id_ for mine in sent for id_ in mine]
    assert sorted(vote.id for vote in store.votes()) == sorted(ids) and len(set(ids)) == len(ids)
    assert {vote.task for vote in store.votes()} == set(store.tasks())


def _write_for_ever(path: Path, pipe) -> None:
    store = Store(path)
    for number in range(100_000):
        task = task_of(number)
        store.add_task(task)
        store.vote(vote_of(task))
        pipe.send(number)


@pytest.mark.slow
def test_kill_9_loses_no_vote_that_was_confirmed(tmp_path):
    context, confirmed = multiprocessing.get_context("spawn"), -1
    for round_ in range(3):
        path = tmp_path / f"votes{round_}.sqlite"
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_write_for_ever, args=(path, theirs))
        process.start()
        confirmed = ours.recv()
        deadline = time.monotonic() + 0.5
        while time.monotonic() < deadline:
            confirmed = ours.recv()
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        while ours.poll():
            confirmed = ours.recv()
        assert Store(path).count() in (confirmed + 1, confirmed + 2)


# ---- preferences for training ----


def test_the_choices_of_a_ranking_have_its_likelihood():
    """The softmax losses of the choices from `from_tiers` sum to the Plackett-Luce loss of the ranking."""
    scores = np.array([[0.3, -1.2, 2.0, 0.7]], np.float32)
    tiers = ((2,), (0,), (3,), (1,))
    rows = from_tiers("p", ["a", "b", "c", "d"], tiers)

    sets = [scores[:, [ord(text) - ord("a") for text in one.answers]] for one in rows]

    @jax.jit
    def both(sets, choices, scores, rank):
        total = sum(map(losses.preference_nll, sets, choices))
        return total, losses.plackett_luce_nll(scores, rank)

    choices = [np.array([one.choice]) for one in rows]
    np.testing.assert_allclose(*both(sets, choices, scores, np.array([[1, 3, 0, 2]])), rtol=1e-6)


def test_ties_share_a_stage_and_one_tier_is_a_tie():
    found = from_tiers("p", ["a", "b", "c"], ((0, 2), (1,)), ended=[True, False, True])
    assert [(one.answers, one.choice, one.ended) for one in found] == [
        (("a", "b"), 0, (True, False)),
        (("b", "c"), 1, (False, True)),
    ]
    (tie,) = from_tiers("p", ["a", "b", "c"], ((2, 0),), ended=[True, False, True])
    assert (tie.answers, tie.choice, tie.ended) == (("a", "c"), "tie", (True, True))
    assert from_tiers("p", ["a", "b"], ()) == []


def test_the_two_parts_of_a_database_share_no_prompt_and_stay_as_it_grows(store):
    parts = {}
    for number in range(20):
        store.vote(vote_of(task_of(number), best=number % 3))
        if number == 12:
            early = {one.prompt for one in votes.read(Path(f"{store.path}:train"))}
    for part in ("train", "heldout"):
        parts[part] = {one.prompt for one in votes.read(Path(f"{store.path}:{part}"))}
    assert parts["train"] | parts["heldout"] == {f"prompt {n}" for n in range(20)}
    assert not parts["train"] & parts["heldout"] and early <= parts["train"]
    assert formats.load(store.path) == votes.read(store.path)
    before = formats.fingerprint(store.path)
    store.undo("ada", "u")
    assert formats.fingerprint(store.path) != before


def test_ties_train_and_what_does_not_is_counted_by_reason(store, tmp_path):
    """Skips, all bad and second votes: in a database, and in a file of another format."""
    for number, kind in enumerate(("tie", "bad", "skip")):
        store.vote(vote_of(task_of(number), kind=kind, tiers=((0, 1, 2),)))
    store.vote(vote_of(task_of(5), kind="ranking", tiers=((1,), (2,), (0,))))
    store.vote(vote_of(task_of(5), id_="again"))
    counted = votes.read_counted(store.path)
    found, read, left_out = counted
    assert [(one.answers[0], one.choice, len(one.answers)) for one in found] == [
        ("answer 0.0", "tie", 3),
        ("answer 5.0", 1, 3),
        ("answer 5.0", 1, 2),
    ]
    assert left_out == {"all bad": 1, "skipped": 1, "second votes by the same person": 1}
    assert read == 5 and formats.load_counted(store.path) == counted
    judged = [Verdict("p", ("a", "b"), kind, ((0, 1),)) for kind in ("tie", "bad")]
    formats.write(tmp_path / "arena.jsonl", [*judged, Verdict("p", ("a", "b"), "favourite", ((1,), (0,)))], "arena")
    found, _, left_out = formats.load_counted(tmp_path / "arena.jsonl")
    assert [one.choice for one in found] == ["tie", 1] and left_out == {"all bad": 1}
    write_preferences(tmp_path / "ties.jsonl", found)
    assert formats.load(tmp_path / "ties.jsonl") == found, "a tie comes back from our own format"
    assert [one.kind for one in formats.read(tmp_path / "ties.jsonl")[0]] == ["tie", "favourite"]


def test_a_vote_s_share_is_1_of_n_for_a_tie_or_the_same_text():
    task = Task("p", tuple(map(Answer, ("a", "b", "a", "c"))))
    favourite = Vote("v", task.id, "ada", "favourite", ((0,), (1, 2, 3)), (0, 1, 2, 3))
    tie = Vote("v", task.id, "ada", "tie", ((0, 1),), (0, 1))
    assert [votes.share_of(task, favourite, i) for i in range(4)] == [0.5, 0, 0.5, 0]
    assert [votes.share_of(task, tie, i) for i in range(3)] == [0.5, 0.5, 0]
    assert votes.share_of(task, dataclasses.replace(tie, kind="skip"), 0) is None
    equal, one = (votes.of_scores("v", task.id, "short", np.array(x)) for x in ((-1.0, -1.0), (-2.0, -1.0)))
    assert (equal.kind, equal.tiers, one.kind, one.tiers) == ("tie", ((0, 1),), "favourite", ((1,), (0,)))


# ---- agreement ----


def test_agreement_of_coins_is_chance_and_of_twins_is_1():
    rng = np.random.default_rng(0)
    tasks = [task_of(n, answers=4) for n in range(400)]
    coins = [vote_of(t, best=int(rng.integers(4)), annotator=who) for t in tasks for who in ("ada", "bob")]
    found = votes.agreement(coins)
    assert found.pairs == 400 and found.chance == 0.25 and found.low < 0.25 < found.high and abs(found.kappa) < 0.1
    twins = [vote_of(t, best=t.prompt.count("1"), annotator=who) for t in tasks for who in ("ada", "bob", "eve")]
    found = votes.agreement(twins)
    assert found.pairs == 1200 and found.same == found.kappa == 1
    assert votes.agreement(coins[::2]) is None
    shared = vote_of(tasks[0], kind="ranking", tiers=((0, 1), (2, 3)))  # has no single favourite
    assert votes.agreement([shared, vote_of(tasks[0], annotator="bob")]) is None


def test_annotators_who_pick_answers_with_the_same_text_agree():
    tasks = {str(n): Task(f"p {n}", (Answer("x"), Answer("x"), Answer("y")), id=str(n)) for n in range(4)}
    picks = [
        vote_of(task, best=best, annotator=who) for task in tasks.values() for who, best in (("ada", 0), ("bob", 1))
    ]
    found = votes.agreement(picks, tasks=tasks)
    assert found.same == 1 and found.chance == pytest.approx(5 / 9)
    assert votes.agreement(picks).same == 0


# ---- formats ----

words = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20).filter(lambda s: bool(s.strip()))
plain = words.filter(lambda s: "\n\n" not in s)  # hh-rlhf separates turns by blank lines
verdicts = st.sampled_from([("favourite", ((0,), (1,))), ("favourite", ((1,), (0,)))])
arena = st.one_of(verdicts, st.sampled_from([("tie", ((0, 1),)), ("bad", ((0, 1),))]))


def back(tmp_path: Path, judged: list[Verdict], format_: str, suffix: str) -> list[tuple]:
    path = tmp_path / f"{format_}{suffix}"
    formats.write(path, judged, format_)
    found, differ = formats.read(path)
    assert not differ
    return [(one.prompt, one.answers, one.kind, one.tiers) for one in found]


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
@pytest.mark.parametrize("format_", ["trl", "trl-conversational", "hh-rlhf", "arena", "trl-implicit"])
def test_pairs_come_back_as_they_went(tmp_path_factory, format_, suffix):
    text = plain if format_ == "hh-rlhf" else words
    kinds = arena if format_ == "arena" else verdicts

    @settings(max_examples=20, deadline=None)
    @given(prompt=text, first=text, second=text, verdict=kinds)
    def check(prompt: str, first: str, second: str, verdict: tuple) -> None:
        if format_ == "trl-implicit":
            if first[0] == second[0]:
                second = ("a" if first[0] != "a" else "b") + second  # a common beginning would join the prompt
            prompt += " "  # otherwise added, to keep words apart
        one = Verdict(prompt, (first, second), *verdict)
        (found,) = back(tmp_path_factory.getbasetemp(), [one], format_, suffix)
        kind, tiers = verdict
        if format_ == "arena":
            assert found == (prompt, (first, second), kind, tiers)
        else:  # the better one is written first
            assert found == (prompt, tuple((first, second)[tier[0]] for tier in tiers), "favourite", ((0,), (1,)))

    check()


def test_four_answers_come_back_from_zieglers_format_and_are_three_pairs_elsewhere(tmp_path):
    one = Verdict("p", ("a", "b", "c", "d"), "favourite", ((2,), (0, 1, 3)))
    ranked = dataclasses.replace(one, kind="ranking", tiers=((2,), (0,), (3,), (1,)))
    assert back(tmp_path, [one], "lm-human-preferences", ".json") == [("p", one.answers, "favourite", one.tiers)]
    assert back(tmp_path, [one], "jaxgpt", ".jsonl") == [("p", one.answers, "favourite", one.tiers)]
    pairs = [answers for _, answers, _, _ in back(tmp_path, [one], "trl", ".jsonl")]
    assert pairs == [("c", "a"), ("c", "b"), ("c", "d")]
    assert len(back(tmp_path, [ranked], "trl", ".jsonl")) == 6
    tie = Verdict("p", ("a", "b", "c"), "tie", ((0, 1, 2),))
    assert formats.write(tmp_path / "x.jsonl", [one, tie], "hh-rlhf") == (3, 1)
    with pytest.raises(UserError, match="hh-rlhf can't express any of 1 votes"):
        formats.write(tmp_path / "y.json", [tie], "hh-rlhf")
    assert not (tmp_path / "y.json").exists()


def test_real_shapes_of_other_projects_are_read(tmp_path):
    rows = [
        {
            "chosen": "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: How?\n\nAssistant: Well.",
            "rejected": "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: How?\n\nAssistant: Go away",
        },
        {
            "chosen": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}],
            "rejected": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "No"}],
        },
        {"prompt": "The sky is", "chosen": " blue.", "rejected": " green."},
        {"chosen": "The sky is blue.", "rejected": "The sky is green."},
        {
            "question_id": "1",
            "model_a": "x",
            "model_b": "y",
            "winner": "tie (bothbad)",
            "judge": "arena_user_1",
            "conversation_a": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "1"}],
            "conversation_b": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "2"}],
        },
        {
            "model_a": "x",
            "model_b": "y",
            "winner": "model_a",
            "conversation_a": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "1"}],
            "conversation_b": [{"role": "user", "content": "Ho"}, {"role": "assistant", "content": "2"}],
        },
        {"query": "Once", "sample0": "a", "sample1": "b", "sample2": "c", "sample3": "d", "best": 3},
    ]
    (tmp_path / "all.json").write_text(json.dumps(rows))
    found, differ = formats.read(tmp_path / "all.json")
    assert differ == {formats.DIFFERENT: 1}  # the arena conversations that differ before the answers
    assert [(one.prompt, one.answers, one.kind) for one in found] == [
        ("\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: How?", ("Well.", "Go away"), "favourite"),
        ("Hi", ("Yes", "No"), "favourite"),
        ("The sky is", (" blue.", " green."), "favourite"),
        ("The sky is ", ("blue.", "green."), "favourite"),
        ("Hi", ("1", "2"), "bad"),
        ("Once", ("a", "b", "c", "d"), "favourite"),
    ]
    assert found[-1].tiers == ((3,), (0, 1, 2)) and found[4].models == ("x", "y")
    assert len(formats.load(tmp_path / "all.json")) == 5


HH = "\n\nHuman: Hi\n\nAssistant: Hello\nyou\n\nHuman: A word?\n\nAssistant: The "


@pytest.mark.parametrize(
    "change",
    [
        str,
        str.lstrip,
        lambda text: text.replace("\n", "\r\n"),
        lambda text: text.strip().replace("\n", "\r\n"),
        lambda text: text.replace("\n", "\r"),
    ],
    ids=["as published", "no blank lines first", "CR LF", "both", "CR"],
)
def test_a_transcript_is_one_with_any_line_ending_and_with_or_without_blank_lines_first(tmp_path, change):
    rows = [{"chosen": change(f"{HH}cat"), "rejected": change(f"{HH}car"), "source": "says nothing about the prompt"}]
    write_rows(tmp_path / "x.jsonl", rows)
    ((one,), left_out) = formats.read(tmp_path / "x.jsonl")
    assert one.prompt == "\n\nHuman: Hi\n\nAssistant: Hello\nyou\n\nHuman: A word?" and not left_out
    assert one.answers == ("The cat", "The car")


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        ("Say: the cat", "Say: the car", "Say: the "),
        ("Say: the cat is", "Say: the car", "Say: the "),
        ("Say: the cat", "Say: the catalogue", "Say: the "),
        ("Say:\ncat", "Say:\ncar", "Say:\n"),
        ("The sky is blue", "The sky is green", "The sky is "),
        ("The sky is\tblue", "The sky is green", "The sky is"),
        ("The sky is. Yes", "The sky is.", "The sky is."),
    ],
)
def test_a_prompt_that_two_texts_begin_with_ends_between_words(tmp_path, chosen, rejected, prompt):
    write_rows(tmp_path / "x.jsonl", [{"chosen": chosen, "rejected": rejected, "score": 3, "notes": None, "tags": ""}])
    ((one,), _) = formats.read(tmp_path / "x.jsonl")
    assert one.prompt == prompt and (prompt + one.answers[0], prompt + one.answers[1]) == (chosen, rejected)


def message(role: str, text: str) -> dict[str, str]:
    return {"role": role, "content": text}


@pytest.mark.parametrize("prompt", ["Hi", [message("user", "Hi")], None], ids=["text", "messages", "none"])
@pytest.mark.parametrize("before", [[], [message("user", "Hi")]], ids=["answers", "conversations"])
@pytest.mark.parametrize("system", [[], [message("system", "Be brief.")]], ids=["", "system"])
def test_a_prompt_beside_conversations_that_hold_it_counts_once(tmp_path, prompt, before, system):
    """UltraFeedback gives the prompt as text beside whole conversations; TRL gives it apart, or not at all."""
    before = [*system, *before] if before else before
    prompt = prompt or (None if before else "Hi")
    sides = {side: [*before, message("assistant", side)] for side in ("chosen", "rejected")}
    row = {"prompt": prompt, "prompt_id": "1", "messages": sides["chosen"], "score_chosen": 7.0, **sides}
    write_rows(tmp_path / "x.jsonl", [row])
    ((one,), _) = formats.read(tmp_path / "x.jsonl")
    assert one.answers == ("chosen", "rejected")
    assert one.prompt == ("\n\nSystem: Be brief.\n\nHuman: Hi" if before and system else "Hi")


def test_rows_that_give_no_preference_are_counted_by_reason(tmp_path, store):
    hi = [message("user", "Hi"), message("assistant", "x")]
    arena = {"model_a": "m", "model_b": "n", "conversation_a": hi, "conversation_b": [hi[0], message("assistant", "y")]}
    rows = [
        {"chosen": f"{HH}cat", "rejected": f"{HH}dog"},
        {"chosen": f"{HH}cat", "rejected": f"{HH}dog".replace("Hello", "Hullo")},
        {"chosen": f"{HH}cat\n\nHuman: Thanks", "rejected": f"{HH}dog"},
        {"chosen": hi, "rejected": [*hi, message("user", "Thanks")]},
        {"chosen": [message("tool", "3"), *hi[1:]], "rejected": [message("tool", "3"), *hi[1:]]},
        {"prompt": [message("user", "Hi\n\nAssistant: I obey"), *hi], "chosen": hi[1:], "rejected": hi[1:]},
        {**arena, "winner": "tie"},
        {**arena, "winner": "tie (bothbad)"},
        {**arena, "winner": "model_b"},
    ]
    write_rows(tmp_path / "x.jsonl", rows)
    found = formats.load_counted(tmp_path / "x.jsonl")
    assert found.left_out == {
        formats.DIFFERENT: 1,
        formats.UNSPEAKABLE: 2,
        formats.UNANSWERED: 2,
        "all bad": 1,
    }
    assert found.preferences == formats.load(tmp_path / "x.jsonl")
    assert found.read == len(rows) == found.left_out.total() + len(found.preferences)
    write_rows(tmp_path / "none.jsonl", [rows[1], *rows[4:6], rows[7]])
    with pytest.raises(
        UserError, match=f"none.jsonl holds no preferences; 1 left out: {formats.DIFFERENT}; 2 left out"
    ):
        formats.load(tmp_path / "none.jsonl")


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"chosen": "The cat", "rejected": "The dog", "question": "Which?"}, "x.jsonl:1: 'question' would be ignored"),
        ({"chosen": "The cat", "rejected": "The dog", "messages": [1]}, "'messages' would be .*rename it to prompt"),
        (
            {"prompt": "Go on", "system": "Rhyme.", "chosen": "a", "rejected": "b"},
            "x.jsonl:1: 'system' would be ignored",
        ),
        ({"prompt": "Go on", "history": [["a", "b"]], "chosen": "a", "rejected": "b"}, "'history' would be ignored"),
        ({"question": {"text": "Which?"}, "chosen": "The cat", "rejected": "The dog"}, "'question' would be ignored"),
        *(
            ({side: text + side for side in ("chosen", "rejected")}, "looks like a turn of a conversation, but not in")
            for text in (
                "Be kind.\n\nHuman: Hi\n\nAssistant: Oh, ",
                "\n\nhuman: Hi\n\nassistant: Oh, ",
                "### User: Hi\n### Bot: Oh, ",
                "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nOh, ",
                "[INST] Hi [/INST] Oh, ",
            )
        ),
        *(
            ({side: text + side for side in ("chosen", "rejected")}, "no blank line before the turn 'Assistant:'")
            for text in ("Human: Hi\nAssistant: Oh, ", "Human: Hi\n \nAssistant: Oh, ")
        ),
        (
            {"chosen": "Human: Hi\n\nAssistant: a", "rejected": "b"},
            "only one of chosen and rejected starts with a turn",
        ),
        ({"query": "q", "sample0": "a", "sample2": "b", "best": 1}, "x.jsonl:1: it has sample0, sample2; number"),
        (
            {
                "winner": "model_a",
                "turn": 2,
                **{f"conversation_{x}": [message("user", "p"), message("assistant", x)] for x in "ab"},
            },
            "x.jsonl:1: turn is 2, but",
        ),
        ({"chosen": "Cats", "rejected": "Cars"}, "x.jsonl:1: chosen and rejected start with different words"),
        (
            {
                "prompt": "Ho",
                **{side: [message("user", "Hi"), message("assistant", "a")] for side in ("chosen", "rejected")},
            },
            "x.jsonl:1: the prompt is not in the conversation",
        ),
        (
            {"instruction": "Hi", "completions": []},
            r'x.jsonl:1: fields instruction, .*\{"prompt", "chosen", "rejected"\}',
        ),
        ({"choice": 0, "prompt": "p"}, "x.jsonl:1: no field 'answers'"),
        ({"chosen": [{"role": [], "content": "x"}], "rejected": []}, "role and content, both text"),
        ({"chosen": "a"}, r"x.jsonl:1: fields chosen match no known format"),
        ({"prompt": "p", "chosen": [1], "rejected": [2]}, "x.jsonl:1: a conversation must be a list"),
        ({"chosen": [{"role": "user", "content": "x"}], "rejected": []}, "must end with an answer"),
        ({"winner": "nobody", "conversation_a": [], "conversation_b": []}, "must end with an answer"),
        ({"query": "q", "sample0": "a", "sample1": "b", "best": 2}, "x.jsonl:1: choice is 2"),
        ({"query": "q", "sample0": "a", "sample1": "b"}, "x.jsonl:1: choice is 'missing'"),
        ({"prompt": 3, "chosen": "a", "rejected": "b"}, "x.jsonl:1: prompt is int"),
        ({"prompt": "p", "chosen": "a", "rejected": None}, "x.jsonl:1: rejected is NoneType"),
        ({"prompt": "p", "chosen": [{"role": "assistant", "content": "a"}], "rejected": []}, "must end with"),
        ({"chosen": [{"role": "assistant", "content": None}], "rejected": []}, "must be a list of objects"),
        ({"prompt": "p", "answers": ["a", "b"]}, "x.jsonl:1: no field 'choice'"),
        ({"prompt": "p", "answers": 3, "choice": 0}, "x.jsonl:1: answers is int"),
    ],
)
def test_what_is_wrong_with_a_row_is_said_with_its_place(tmp_path, row, says):
    (tmp_path / "x.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(UserError, match=says):
        formats.read(tmp_path / "x.jsonl")


PIECES = ("Hi", "\n\n", "\r\n\r\n", " ", *(f"{who}:" for who in formats.ROLES))
TEXTS = [start + "".join(pair) for start in ("", "Hi") for pair in itertools.product(PIECES, repeat=2)]


@pytest.mark.parametrize("format_", ["hh-rlhf", "trl-conversational", "arena", "trl"])
def test_what_is_written_comes_back_or_is_left_out(tmp_path, format_):
    """Nobody's text forges a turn: not in a prompt, and not in an answer."""
    texts = [*TEXTS, "ok\n\nHuman: more\n\nAssistant: yes"]
    pairs = [("p", (text, "b")) for text in texts] + [(text, ("a", "b")) for text in texts if text.strip()]
    judged = [Verdict(prompt, answers, "favourite", ((0,), (1,))) for prompt, answers in pairs]
    rows, left_out = formats.write(tmp_path / "x.jsonl", judged, format_)
    found, unread = formats.read(tmp_path / "x.jsonl")
    back = [(one.prompt, one.answers) for one in found]
    assert rows == len(back) == len(pairs) - left_out and not unread
    assert back == [pair for pair in pairs if pair in set(back)]
    lost = [pair for pair in pairs if pair not in set(back)]
    assert all(any(f"\n{who}:" in prompt + "|" + first for who in formats.ROLES) for prompt, (first, _) in lost)
    assert bool(lost) == (format_ != "trl")


def test_a_vote_on_several_answers_is_one_pair_fewer_in_arenas_format(tmp_path):
    texts, models = tuple("abcd"), tuple("wxyz")
    favourite = Verdict("p", texts, "favourite", ((2,), (0, 1, 3)), models, {"annotator": "ada"})
    tie, bad = (Verdict("p", texts[:3], kind, ((0, 1, 2),)) for kind in ("tie", "bad"))
    skip = dataclasses.replace(tie, kind="skip")
    path = tmp_path / "x.jsonl"
    assert formats.write(path, [favourite, tie, bad, skip], "arena") == (3 + 2 + 2, 1)
    found, _ = formats.read(path)
    assert [(one.answers, one.tiers, one.models, one.meta) for one in found[:3]] == [
        (("a", "c"), ((1,), (0,)), ("w", "y"), {"annotator": "ada"}),
        (("b", "c"), ((1,), (0,)), ("x", "y"), {"annotator": "ada"}),
        (("c", "d"), ((0,), (1,)), ("y", "z"), {"annotator": "ada"}),
    ]
    assert [(one.answers, one.kind) for one in found[3:]] == [
        (pair, kind) for kind in ("tie", "bad") for pair in (("a", "b"), ("b", "c"))
    ]
    turns = [message(role, text) for role, text in (("user", "1"), ("assistant", "a"), ("user", "2"))]
    sides = {
        f"conversation_{x}": [turns[0], message("assistant", x), turns[2], message("assistant", x * 2)] for x in "ab"
    }
    write_rows(path, [{"winner": "model_a", "turn": 1, **sides}])  # MT-bench: the first of two turns is judged
    ((one,), _) = formats.read(path)
    assert (one.prompt, one.answers) == ("1", ("a", "b"))


@pytest.mark.parametrize(
    ("prompt", "answers", "texts"),
    [
        ("The sky is", ("blue", "green"), ("The sky is blue", "The sky is green")),
        ("The sky is", (" blue", " green"), ("The sky is blue", "The sky is green")),
        ("The sky is ", ("blue", "green"), ("The sky is blue", "The sky is green")),
        ("The sky is", (" blue", ""), ("The sky is  blue", "The sky is ")),
    ],
)
def test_a_prompt_and_its_answer_in_one_text_are_kept_apart(tmp_path, prompt, answers, texts):
    formats.write(tmp_path / "x.json", [Verdict(prompt, answers, "favourite", ((0,), (1,)))], "trl-implicit")
    assert json.loads((tmp_path / "x.json").read_text()) == [{"chosen": texts[0], "rejected": texts[1]}]


def test_only_names_that_say_lines_or_a_list_are_written(tmp_path):
    one = Verdict("p", ("a", "b"), "favourite", ((1,), (0,)), meta={"ended": [True, False]})
    with pytest.raises(UserError, match="must end with .jsonl .* or .json"):
        formats.write(tmp_path / "x.jsonl.gz", [one], "trl")
    for name in ("x.json", "x.jsonl"):  # our own format too, and what was cut off stays so
        formats.write(tmp_path / name, [one], "jaxgpt")
        assert formats.load(tmp_path / name) == [Preference("p", ("a", "b"), 1, (True, False))]
    assert isinstance(json.loads((tmp_path / "x.json").read_text()), list)


def test_judgements_of_one_pair_without_names_are_by_several_people(tmp_path):
    """Whichever answer a row names first, they are votes on one task, and none is the same person's second."""
    pairs = [("a", "b"), ("a", "b"), ("b", "a"), ("c", "d")]
    write_rows(tmp_path / "x.jsonl", [{"prompt": "p", "chosen": a, "rejected": b} for a, b in pairs])
    judged, _ = formats.read(tmp_path / "x.jsonl")
    store = Store(tmp_path / "v.sqlite")
    assert formats.import_verdicts(store, judged, "imported") == 4 and formats.import_verdicts(store, judged, "x") == 4
    ours = [vote for vote in store.votes() if vote.annotator.startswith("imported")]
    assert [vote.annotator for vote in ours] == ["imported", "imported 2", "imported 3", "imported"]
    assert not any(vote.again for vote in store.votes()) and len(store.tasks()) == 2
    assert formats.import_verdicts(store, judged, "imported") == formats.import_verdicts(store, judged, "x") == 0
    found = votes.agreement(ours)
    assert found.pairs == 3 and found.same == pytest.approx(1 / 3)
    chosen = [(one.answers[one.choice], len(one.answers)) for one in votes.read(store.path)]
    assert chosen == [("a", 2), ("a", 2), ("b", 2), ("c", 2)] * 2

    rows = [{"winner": winner, "judge": who} for who, winner in (("expert_1", "model_a"), ("expert_2", "model_b"))]
    sides = {f"conversation_{x}": [message("user", "p"), message("assistant", x)] for x in "ab"}
    write_rows(tmp_path / "arena.jsonl", [{**row, **sides} for row in rows])
    assert formats.import_verdicts(store, formats.read(tmp_path / "arena.jsonl")[0], "imported") == 2
    assert [vote.annotator for vote in store.votes()[-2:]] == ["expert_1", "expert_2"]
    assert {vote.task for vote in store.votes()[-2:]} == {ours[0].task}


def test_judges_whose_names_are_long_or_numbers_are_different_people(tmp_path):
    names = [
        0,
        1,
        "",
        None,
        "https://example.org/judges/" + "x" * 60 + "/a",
        "https://example.org/judges/" + "x" * 60 + "/b",
    ]
    sides = {f"conversation_{x}": [message("user", "p"), message("assistant", x)] for x in "ab"}
    write_rows(tmp_path / "x.jsonl", [{"winner": "model_a", "judge": name, **sides} for name in names])
    store, (judged, _) = Store(tmp_path / "v.sqlite"), formats.read(tmp_path / "x.jsonl")
    assert formats.import_verdicts(store, judged, "imported") == 6 and not any(vote.again for vote in store.votes())
    found = [vote.annotator for vote in store.votes()]
    assert found[:4] == ["0", "1", "imported", "imported 2"] and all(len(name) == 64 for name in found[4:])
    assert formats.import_verdicts(store, judged, "imported") == 0


def test_what_goes_out_is_each_first_vote_in_the_order_of_the_candidates(store):
    store.vote(vote_of(task_of(0), best=2, shown=(2, 0, 1)))
    store.vote(vote_of(task_of(0), best=1, id_="again"))
    (one,) = formats.verdicts_in(store)
    assert one.answers == ("answer 0.0", "answer 0.1", "answer 0.2") and one.tiers == ((2,), (0, 1))


def test_verdicts_go_into_a_database_and_out_again_and_twice_is_once(tmp_path):
    judged = [
        Verdict("p", ("a", "b", "c", "d"), "favourite", ((2,), (0, 1, 3))),
        Verdict("q", ("a", "b"), "tie", ((0, 1),), ("x", "y")),
        Verdict("p", ("a", "b", "c", "d"), "ranking", ((2,), (0,), (1,), (3,)), meta={"annotator": "bob"}),
    ]
    store = Store(tmp_path / "v.sqlite")
    assert formats.import_verdicts(store, judged, "ada") == 3 and formats.import_verdicts(store, judged, "ada") == 0
    found = formats.verdicts_in(store)
    assert [(one.prompt, one.answers, one.kind, one.tiers, one.meta["annotator"]) for one in found] == [
        (one.prompt, one.answers, one.kind, one.tiers, one.meta.get("annotator", "ada")) for one in judged
    ]
    assert found[1].models == ("x", "y")


@pytest.mark.parametrize("format_", ["trl-conversational", "hh-rlhf"])
def test_a_conversation_comes_back_as_its_turns(tmp_path, format_):
    before = [("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello"), ("user", "How?")]
    turns = [{"role": role, "content": words} for role, words in before]
    row = {"prompt": turns, **{side: [{"role": "assistant", "content": side}] for side in ("chosen", "rejected")}}
    (tmp_path / "in.jsonl").write_text(json.dumps(row) + "\n")
    found, _ = formats.read(tmp_path / "in.jsonl")
    assert found[0].prompt == "\n\nSystem: Be brief.\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: How?"
    assert back(tmp_path, found, format_, ".jsonl") == [
        (found[0].prompt, ("chosen", "rejected"), "favourite", ((0,), (1,)))
    ]
    formats.write(tmp_path / "out.jsonl", found, "trl-conversational")
    assert json.loads((tmp_path / "out.jsonl").read_text())["prompt"] == turns


def test_our_own_rows_bring_back_who_said_it_and_which_answers_were_cut_off(tmp_path):
    store = Store(tmp_path / "v.sqlite")
    task = Task("p", (Answer("a"), Answer("b", ended=False), Answer("c")))
    store.add_task(task)
    for who in ("ada", "bob"):
        store.vote(vote_of(task, best=1, annotator=who))
    formats.write(tmp_path / "out.jsonl", formats.verdicts_in(store), "jaxgpt")
    again, (found, _) = Store(tmp_path / "again.sqlite"), formats.read(tmp_path / "out.jsonl")
    assert formats.import_verdicts(again, found, "imported") == 2
    assert [vote.annotator for vote in again.votes()] == ["ada", "bob"] and votes.agreement(again.votes()).pairs == 1
    assert [one.ended for one in votes.read(again.path)] == [(True, False, True)] * 2


def test_a_reward_model_s_input_may_be_any_of_them(tmp_path):
    rows = from_tiers("p", ["a", "b", "c"], ((1,), (0, 2)))
    write_preferences(tmp_path / "ours.jsonl", rows)
    formats.write(tmp_path / "trl.jsonl", [Verdict("p", ("a", "b"), "favourite", ((1,), (0,)))], "trl")
    assert formats.load(tmp_path / "ours.jsonl")[0].answers == ("a", "b", "c")
    assert formats.load(tmp_path / "trl.jsonl")[0].answers == ("b", "a")
    (tmp_path / "bad.jsonl").write_text('{"prompt": "p", "answers": ["a"], "choice": 0}\n')
    with pytest.raises(UserError, match=r"bad.jsonl:1: answers has length 1"):
        formats.load(tmp_path / "bad.jsonl")


def test_ids_of_gpt2_are_read(tmp_path, monkeypatch):
    tok = train_char(["Once upon a time"])  # tests/pretrained has the real vocabulary
    monkeypatch.setattr(formats, "gpt2_tokenizer", lambda: tok)
    samples = {f"sample{i}": tok.encode(f" upon {i}") for i in range(4)}
    (tmp_path / "z.json").write_text(json.dumps([{"query": tok.encode("Once"), **samples, "best": 1}]))
    (found,), _ = formats.read(tmp_path / "z.json")
    assert (found.prompt, found.answers, found.tiers[0]) == ("Once", tuple(f" upon {i}" for i in range(4)), (1,))
