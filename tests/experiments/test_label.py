"""What the labelling page's generator says about the prompts that it is given."""

import types

from experiments import label
from jaxgpt.data import votes
from jaxgpt.data.jsonl import write_rows


def test_prompts_that_are_too_long_to_be_answered_are_counted(tmp_path, monkeypatch, capsys):
    write_rows(tmp_path / "x.jsonl", ({"prompt": f"{'long ' * (n % 3)}{n}"} for n in range(30)))
    settings = label.Settings(votes=tmp_path / "v.sqlite", models=(tmp_path,), prompts=str(tmp_path / "x.jsonl"))
    monkeypatch.setattr(label, "Model", lambda place, mesh: types.SimpleNamespace(place=place))
    maker = label.AnswerGenerator(settings, votes.Store(settings.votes))
    monkeypatch.setattr(maker, "fits", lambda prompt: "long" not in prompt)
    maker.stop.set()
    maker.run()
    read, used = len(label.load_prompts(settings, tmp_path)), len(maker.remaining)
    assert 0 < used < read
    said = (
        f"prompts: {read} read, {used} used; left out: {read - used} too long for the models together with an answer\n"
    )
    assert capsys.readouterr().out == said
