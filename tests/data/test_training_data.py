"""What a stage reads, uses and leaves out, and prompts that are trained on and measured on."""

import json
from pathlib import Path

import pytest

from jaxgpt.data.comparisons import Preference, write_preferences
from jaxgpt.data.tokenizer import train_char
from jaxgpt.data.training_data import LoadedData, RowCounts, load_preference_data, load_tokenized
from jaxgpt.errors import UserError

TOK = train_char(["prompt answer 0123456789 "])


def write(path: Path, count: int, start: int = 0, long: int = 0, ties: int = 0) -> Path:
    """`count` preferences about prompts of their own; the first `long` have a long answer, the last `ties` tie."""
    rows = [
        Preference(f"prompt {start + n}", ("answer" + "r" * 60 * (n < long), "an"), "tie" if count - n <= ties else 0)
        for n in range(count)
    ]
    write_preferences(path, rows)
    return path


def load(train: Path, heldout: Path, limit: int = 100, batch: int = 4, epochs: int = 1):
    return load_preference_data(train, heldout, TOK, length=32, limit=limit, batch=batch, epochs=epochs)


def test_every_row_is_used_or_left_out_for_a_reason(tmp_path):
    train, heldout = write(tmp_path / "t.jsonl", 20, long=2, ties=5), write(tmp_path / "h.jsonl", 20, 50, long=19)
    data, lines = load(train, heldout, limit=15), []
    data.announce(lines.append, "reward")
    assert lines == [
        "reward: preferences (up to 2 answers, 2 ties): 20 read, 12 used; left out: 2 longer than 32 tokens, "
        "3 beyond --limit 15, 3 in an incomplete last batch",
        "reward: held out: 20 read, 1 used; left out: 19 longer than 32 tokens",
    ]
    assert (len(data.train), len(data.heldout), data.steps) == (15, 1, 3)
    record = json.loads(json.dumps(data.record()))
    assert record["rows"]["heldout"] == {"read": 20, "used": 1, "left_out": {"longer than 32 tokens": 19}}
    for counts in record["rows"].values():
        assert counts["read"] == counts["used"] + sum(counts["left_out"].values())
    assert "incomplete" not in str(load(train, heldout, epochs=3).counts["preferences"]), "the next epoch has them"
    assert str(RowCounts(1000)) == "1,000 read, all used"


def test_prompts_that_are_trained_on_and_measured_on_are_said_and_stored(tmp_path):
    train, other = write(tmp_path / "t.jsonl", 8), write(tmp_path / "h.jsonl", 8, start=6)
    lines = []
    data = load(train, other)
    data.announce(lines.append, "dpo")
    assert lines[2] == "dpo: WARNING: 2 of 8 held-out rows have prompts that are trained on: the figures are too good"
    assert data.record()["heldout_trained_on"] == 2
    load(train, train).announce(lines.append, "dpo")
    assert "8 of 8" in lines[-1] and "the same file" in lines[-1]
    assert load(train, write(tmp_path / "n.jsonl", 8, start=8)).trained_on == 0
    assert load(train, other, limit=4).trained_on == 0, "what --limit cuts isn't trained on"


def test_a_file_of_which_nothing_can_be_used_is_named(tmp_path):
    long, few = write(tmp_path / "long.jsonl", 3, long=3), write(tmp_path / "few.jsonl", 3)
    with pytest.raises(UserError, match=r"long.jsonl: none of 3 preferences fits 32 tokens"):
        load_tokenized(long, TOK, 32)
    with pytest.raises(UserError, match=r"long.jsonl: none of 3"):
        load(write(tmp_path / "t.jsonl", 8), long)
    with pytest.raises(UserError, match=r"ties.jsonl: all 4 preferences are ties"):
        load(tmp_path / "t.jsonl", write(tmp_path / "ties.jsonl", 4, ties=4))
    with pytest.raises(UserError, match=r"few.jsonl: 3 preferences x 1 epochs fill no batch of 4"):
        load(few, few)


def test_preferences_between_equal_answers_are_counted(tmp_path):
    rows = [Preference(f"prompt {n}", ("an", "an" if n < 3 else "answer"), 0) for n in range(8)]
    write_preferences(tmp_path / "t.jsonl", rows)
    data = load(tmp_path / "t.jsonl", write(tmp_path / "h.jsonl", 4, start=8))
    assert data.record()["equal_answers"] == 3


def test_raw_text_that_is_trained_on_and_measured_on_is_said_and_stored():
    lines = []
    data = LoadedData({"documents": RowCounts(9), "held-out windows": RowCounts(4)}, trained_on=2)
    data.announce(lines.append, "pretrain")
    assert lines[2] == "pretrain: WARNING: 2 held-out documents are also trained on: the figures are too good"
    assert data.record()["heldout_trained_on"] == 2
    assert "heldout_trained_on" not in LoadedData({"prompts": RowCounts(9)}).record(), "PPO holds nothing out"
