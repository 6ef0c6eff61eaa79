"""What the README shows works as shown."""

import re
from pathlib import Path

import jax
import pytest

from jaxgpt import config
from jaxgpt.config import ModelConfig
from jaxgpt.data import votes
from jaxgpt.models import transformer

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_python_block_runs(capsys, monkeypatch):
    gradient = jax.value_and_grad
    monkeypatch.setattr(jax, "value_and_grad", lambda f: jax.jit(gradient(f)))  # one program instead of seventy
    (block,) = re.findall(r"```python\n(.*?)```", README, flags=re.S)
    exec(block, {})
    # by hand: the mean of log(e^0.05 + e^-0.1 + 1) - 0.05 and log(1 + e^-0.05 + e^-0.1) + 0.05
    assert capsys.readouterr().out.startswith("(Array(1.0666")


def test_the_blocks_on_decoding_run(capsys, monkeypatch):
    monkeypatch.setitem(config.PRESETS, "toy", ModelConfig(layers=1, width=16, heads=1, block=32, vocab=32))
    monkeypatch.setattr(transformer, "init", jax.jit(transformer.init, static_argnums=1))
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/decoding.md").read_text(encoding="utf-8"), flags=re.S)
    exec("".join(blocks), {})
    batch, queue = re.findall(r"^\((\d+), 8\) ", capsys.readouterr().out, flags=re.M)
    assert (batch, queue) == ("4", "40")


def test_models_of_other_libraries_train(capsys):
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/training.md").read_text(encoding="utf-8"), flags=re.S)
    exec(block, {})
    found = dict(line.split() for line in capsys.readouterr().out.splitlines())
    assert found.keys() == {"Linen", "NNX", "Equinox"}
    assert all(float(loss) < 4.0 for loss in found.values())  # they start at 4.2 or more


def test_the_block_on_votes_runs(capsys, tmp_path, monkeypatch):
    store = votes.Store(tmp_path / "runs/label/votes.sqlite")
    for n in range(3):
        task = votes.Task(f"prompt {n}", (votes.Answer("a"), votes.Answer("b")))
        store.add_task(task)
        store.vote(votes.Vote(str(n), task.id, "ada", "favourite", ((1,), (0,)), (0, 1)))
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/people.md").read_text(encoding="utf-8"), flags=re.S)
    found: dict = {}
    exec(block, found)
    assert capsys.readouterr().out == "3 None\n" and len(found["preferences"]) == 3


@pytest.mark.parametrize(
    "page", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda page: page.name
)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target


def test_every_file_of_the_tree_exists():
    tree = README.split("## What is where")[1].split("```")[1]
    for name in re.findall(r"\b(\w+\.py)\b", tree):
        assert list(ROOT.rglob(name)), name


def test_every_command_names_an_experiment():
    for name in re.findall(r"-m experiments\.([\w.]+)", README):
        assert (ROOT / f"experiments/{name.replace('.', '/')}.py").exists()
