"""Questions in the terminal: what is picked is what is stored, and nothing is stored by accident."""

import numpy as np
import pytest

from jaxgpt.data.votes import Answer, Store, Task
from jaxgpt.runs.ask import ask

TASK = Task("Which fruit?", (Answer("an apple"), Answer("a pear, which is a longer answer " * 6), Answer("")))


@pytest.fixture
def store(tmp_path):
    store = Store(tmp_path / "votes.sqlite")
    store.add_task(TASK)
    return store


def asked(store, *words, seed=0):
    """The screen, and what `ask` returned, for these words typed one after the other."""
    typed, screen = iter(words), []

    def read(prompt):
        try:
            return next(typed)
        except StopIteration:
            raise EOFError from None

    found = ask(store, "you", TASK, "[1/1]", np.random.default_rng(seed), read, screen.append)
    return "\n".join(screen), found


def test_the_number_on_the_screen_is_the_answer_that_is_stored(store):
    for seed in range(4):
        screen, found = asked(store, "2", seed=seed)
        assert found and "Which fruit?" in screen and "[1/1]" in screen
        vote = store.votes()[-1]
        assert vote.kind == "favourite" and vote.tiers[0] == (vote.shown[1],)
        second = " ".join(screen.split("  2  ")[1].split("  3  ")[0].split())
        assert second == (" ".join(TASK.answers[vote.shown[1]].text.split()) or "(nothing)")
    assert len({vote.shown for vote in store.votes()}) > 1  # shuffled anew


def test_odd_input_asks_again_and_a_skip_is_no_pick(store):
    screen, found = asked(store, "", "7", "0", "x", "-1", "²", "s")
    assert found and screen.count("type a number from 1 to 3") == 6
    (vote,) = store.votes()
    assert vote.kind == "skip" and len(vote.tiers) == 1


def test_the_last_pick_can_be_taken_back(store):
    screen, _ = asked(store, "u", "1")
    assert "no pick to take back" in screen and store.count() == 1
    assert asked(store, "u")[1] is False and store.count() == 0


def test_the_end_of_the_input_stores_nothing(store):
    with pytest.raises(EOFError):
        asked(store)
    assert store.count() == 0
