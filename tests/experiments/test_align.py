"""A small model from a Hugging Face folder goes through SFT, preferences, reward model, PPO and DPO with adapters."""

import dataclasses
import functools

import chex
import jax
import numpy as np
import pytest

from experiments import align, chat, sft
from jaxgpt import training
from jaxgpt.data.jsonl import write_rows
from jaxgpt.data.templates import prompt_ids
from jaxgpt.data.tokenizer import PROMPT, Tokenizer
from jaxgpt.errors import UserError
from jaxgpt.models import lora
from jaxgpt.pretrained import huggingface
from jaxgpt.runs.cli import parse
from jaxgpt.runs.run import run_fingerprint
from jaxgpt.runs.saved_model import load_language_model, load_model
from tests.data.test_templates import CHATML, chat_tokenizer, small_tokenizer
from tests.helpers import FAMILY, params_of

LLAMA = dataclasses.replace(FAMILY["llama"], layers=1, block=256, vocab=272)
make_params = jax.jit(functools.partial(params_of, LLAMA, scale=1.0))


def folder_of(path, tok: Tokenizer | None = None, seed: int = 0):
    """A folder as transformers would write it, with a chat template."""
    huggingface.write(path, make_params(seed), LLAMA, tok or chat_tokenizer(CHATML))
    return path


def test_any_experiment_starts_from_a_pretrained_model():
    for words in (
        ["--model.pretrained", "smollm2-135m"],
        ["--model.pretrained=smollm2-135m"],
        ["--model", "smollm2-135m"],
    ):
        assert str(parse(sft.Settings, sft.PRESETS, words).model) == "smollm2-135m"


def test_the_fingerprint_is_of_what_would_be_read(tmp_path):
    one, two = folder_of(tmp_path / "one"), folder_of(tmp_path / "two")
    assert run_fingerprint(one) == run_fingerprint(two) != run_fingerprint(folder_of(tmp_path / "other", seed=1))
    (two / "chat_template.jinja").write_text("{{ 'another' }}")
    assert run_fingerprint(one) != run_fingerprint(two)
    with pytest.raises(UserError, match="not exist"):
        run_fingerprint(tmp_path / "nothing")


@pytest.mark.slow
def test_the_whole_alignment_on_a_small_model(tmp_path, capsys):
    """On eight devices."""
    folder = folder_of(tmp_path / "hf")
    settings = dataclasses.replace(align.PRESETS["toy"], run=tmp_path / "run", model=folder)
    found = align.main(settings)
    assert found["models"].keys() == {"before", "ppo", "dpo"}
    assert all(np.isfinite(row["gold"]["mean"]) for row in found["models"].values())
    assert found["models"]["before"]["kl_nats_per_sequence"]["mean"] == 0.0
    base = load_language_model(folder)
    for stage in ("ppo", "dpo"):
        adapters, whole = (
            load_model(tmp_path / "run" / stage / "adapters"),
            load_language_model(tmp_path / "run" / stage),
        )
        made = lora.merge(training.merge_params(base.params, adapters.params))
        chex.assert_trees_all_equal(made, whole.params)
        assert whole.tokenizer.template == base.tokenizer.template
    again = capsys.readouterr() and align.main(settings)
    assert again == found and "already done" in capsys.readouterr().out
    talk = chat.Chat(chat.Settings(model=tmp_path / "run/ppo", new_tokens=6))
    for _ in range(2):
        "".join(talk.reply("a few words", jax.random.key(0)))
    assert [prompt for prompt, _ in talk.history] == ["a few words"] * 2 and talk.speaker.is_multi_turn
    huggingface.write(tmp_path / "aligned", whole.params, whole.config, whole.tokenizer)
    chex.assert_trees_all_equal(load_language_model(tmp_path / "aligned").params, whole.params)


@pytest.mark.slow
def test_sft_with_our_tags_in_place_of_the_chat_template(tmp_path):
    folder = folder_of(tmp_path / "hf")
    rows = ({"prompt": f"question {i}", "answer": f"words {i}"} for i in range(60))
    write_rows(tmp_path / "pairs.jsonl", rows)
    write_rows(tmp_path / "text.jsonl", ({"text": f"some text, number {i} of many, " * 4} for i in range(60)))
    settings = dataclasses.replace(
        sft.PRESETS["toy"],
        run=tmp_path / "sft",
        model=folder,
        data=str(tmp_path / "pairs.jsonl"),
        tags=True,
        lora=2,
        pretraining_data=str(tmp_path / "text.jsonl"),
        length=64,
        cache=tmp_path / "cache",
    )
    assert np.isfinite(sft.main(settings)["heldout_answer_nats_per_token"])
    tuned = load_language_model(tmp_path / "sft")
    assert tuned.tokenizer.tag(tuned.tokenizer.template.end) == "</answer>"
    ids = prompt_ids(tuned.tokenizer, "</answer> <|im_end|>")
    assert sum(tuned.tokenizer.is_special(i) for i in ids) == 3
    assert prompt_ids(small_tokenizer(), "")[0] == PROMPT


def test_a_share_of_answers_never_has_an_interval_of_no_width():
    """All of 30 questions won is no certainty: a mean plus or minus 1.96 standard errors would say so."""
    row = {name: {"mean": 1.0, "low": 1.0, "high": 1.0} for name in ("words", "kl_nats_per_sequence")}
    for name in align.SHARES:
        found = align.interval_of(name, np.ones((30, 2)))
        assert found.low < 0.9 and found.high == 1.0
        row[name] = dataclasses.asdict(found)
    shown = align.table({"rows": {"heldout": {"used": 30}}, "models": {"dpo": {**row, "distinct_2": 0.5}}})
    assert next(shown.columns[2].cells) == "1.00 ± 0.06"
