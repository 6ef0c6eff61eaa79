"""Taste and blind comparisons at toy size: picks become a reward, and sides are counted as they were picked."""

import dataclasses
from pathlib import Path

import jax
import pytest

from experiments import blind, taste
from jaxgpt.config import ModelConfig
from jaxgpt.data import votes
from jaxgpt.data.questions import questions
from jaxgpt.data.tokenizer import train_bpe
from jaxgpt.errors import UserError
from jaxgpt.models import transformer
from jaxgpt.runs import ask
from jaxgpt.runs.run import Run
from jaxgpt.runs.saved_model import save_model

CONFIG = ModelConfig(layers=1, width=32, heads=2, block=96, vocab=512)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> list[Path]:
    """Two untrained models: what they say is noise, which is all that these tests need."""
    tok = train_bpe([*questions(), *questions(held_out=True)], CONFIG.vocab)
    places = []
    for seed in range(2):
        places.append(tmp_path_factory.mktemp("models") / f"model{seed}")
        with Run(places[-1], taste.Settings(), "sft") as run:
            save_model(places[-1] / "model", transformer.init(jax.random.key(seed), CONFIG), CONFIG, tok)
            run.finish({})
    return places


def settings(models, run, **changes) -> taste.Settings:
    few = taste.Settings(run=run, model=models[0], prompts=4, candidates=3, best_of=3, blind=2, new_tokens=6)
    return dataclasses.replace(few, **changes)


@pytest.mark.slow
def test_a_program_picks_a_reward_is_fitted_and_the_same_command_finds_it_done(models, tmp_path, capsys):
    found = taste.main(settings(models, tmp_path, annotator="short"))
    assert found["picks"] == 4 and found["count"] == 2 and 0 <= found["predicted"]["accuracy"] <= 1
    store = votes.Store(tmp_path / "short.sqlite")
    kinds = [task.answers[0].origin["taste"] for task in store.tasks().values()]
    assert kinds == ["learn"] * 4 + ["blind"] * 2
    for task in list(store.tasks().values())[4:]:
        assert [one.origin["by"] for one in task.answers] == [taste.BEST, taste.SINGLE]
    said = capsys.readouterr().out
    assert "of 2: too few to say" in said and "4 read, all used" in said and "make label" in said
    assert taste.main(settings(models, tmp_path, annotator="short")) == found  # nothing is asked again
    assert store.count() == 6
    with pytest.raises(UserError, match="holds answers of .*model0; choose another --run"):
        taste.main(settings(models[::-1], tmp_path, annotator="short"))


@pytest.mark.slow
def test_a_person_stops_resumes_and_is_counted_as_they_picked(models, tmp_path, monkeypatch, capsys):
    typed = iter([*"11"])

    def read(prompt):
        try:
            return next(typed)
        except StopIteration:
            raise KeyboardInterrupt from None

    monkeypatch.setattr("builtins.input", read)
    monkeypatch.setattr(ask.ask, "__defaults__", (read, print))
    assert taste.main(settings(models, tmp_path)) == {"picks": 2}
    assert "2 picks are in" in capsys.readouterr().out
    store = votes.Store(tmp_path / "you.sqlite")
    others = next(iter(store.tasks().values()))
    own = votes.Task(others.prompt, (votes.Answer("mine", True, {"by": "you"}), *others.answers))
    store.add_task(own)  # as the page does when a person writes an answer
    store.vote(votes.Vote("own", own.id, "you", "favourite", ((0,), (1, 2, 3)), (0, 1, 2, 3)))
    typed = iter([*"s", *"12"])  # a skip, then both blind pairs
    found = taste.main(settings(models, tmp_path))
    assert found["picks"] == 3 and found["count"] == 2
    assert "4 read, 3 used; left out: 1 skipped" in capsys.readouterr().out
    picked = [vote for vote in store.votes("you") if vote.kind == "favourite"][-2:]
    by = [store.task(vote.task).answers[vote.tiers[0][0]].origin["by"] for vote in picked]
    equal = [len({one.text for one in store.task(vote.task).answers}) == 1 for vote in picked]
    assert found["wins"] == sum(0.5 if same else name == taste.BEST for name, same in zip(by, equal, strict=True))


@pytest.mark.slow
def test_blind_counts_the_second_models_wins(models, tmp_path, capsys):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(f'{{"prompt": "{text}", "answer": "x"}}\n' for text in questions()[:40]))
    few = blind.Settings(
        run=tmp_path / "blind",
        models=(models[0], models[1]),
        data=str(prompts),
        pairs=2,
        annotator="short",
        new_tokens=6,
        cache=tmp_path / "cache",
    )
    found = blind.main(few)
    store = votes.Store(tmp_path / "blind/votes.sqlite")
    lengths = [[len(one.text.split()) or 40 for one in task.answers] for task in store.tasks().values()]
    wins = sum(0.5 if one == two else float(two < one) for one, two in lengths)
    assert found == {"wins": wins, "count": 2, "left_out": 0}
    assert f"preferred model1 to model0 in {wins:g} of 2" in capsys.readouterr().out
    assert blind.main(few) == found
    with pytest.raises(UserError, match="choose another --run"):
        blind.main(dataclasses.replace(few, models=(models[0], models[0])))
