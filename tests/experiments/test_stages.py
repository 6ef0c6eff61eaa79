"""All seven stages at toy size on real text, in order; errors a user may make with them; and every study that starts
from them. On one device, except for one slow test."""

import dataclasses
import json
import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import align, assistant, blind, chat, dpo, label, ppo, preferences, pretrain, reward, sft
from experiments.stages import chat_command
from experiments.studies import (
    arithmetic,
    frontier,
    how_many_labels,
    imdb,
    kl_control,
    overoptimisation,
    through_reward,
)
from jaxgpt import training
from jaxgpt.config import ModelConfig
from jaxgpt.data import formats, sources, votes
from jaxgpt.data.comparisons import (
    MaxSizes,
    TokenizedPreference,
    drop_long_preferences,
    read_preferences,
    tokenize_preferences,
    write_preferences,
)
from jaxgpt.errors import UserError
from jaxgpt.files import sha256_of_file
from jaxgpt.models import sharding, transformer
from jaxgpt.models.sharding import make_mesh
from jaxgpt.rlhf import ppo as ppo_algorithm
from jaxgpt.rlhf import reward as reward_model
from jaxgpt.rlhf.annotator import gold_scores
from jaxgpt.runs import doctor
from jaxgpt.runs.run import read_done
from jaxgpt.runs.saved_model import load_model
from jaxgpt.structs import Prompts
from jaxgpt.study.frontier import FrontierSetup
from jaxgpt.training import optim
from jaxgpt.web.speaker import Speaker, TokenInspector
from tests.helpers import AS_USERS_RUN_IT, WALL_CLOCK, few_reviews, one_device


@pytest.fixture(scope="module", autouse=True)
def on_one_device():
    with one_device():
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> assistant.Settings:
    """A finished toy run of the whole pipeline, on part of the reviews and with a one-layer model."""
    cache = few_reviews(tmp_path_factory.mktemp("data"))
    toy = assistant.PRESETS["toy"]
    small = dataclasses.replace(toy.pretrain, model=dataclasses.replace(toy.pretrain.model, layers=1))
    own = {"pretrain": small, "preferences": dataclasses.replace(toy.preferences, experts=1, heldout=16)}
    stages = {name: own.get(name, getattr(toy, name)) for name in assistant.STAGES}
    stages = {name: dataclasses.replace(one, cache=cache) for name, one in stages.items() if hasattr(one, "cache")}
    settings = dataclasses.replace(toy, run=tmp_path_factory.mktemp("toy") / "run", **stages)
    assistant.main(settings)
    return settings


def results(settings: assistant.Settings, stage: str) -> dict:
    return json.loads((settings.run / stage / "done.json").read_text())["results"]


def curve(settings: assistant.Settings, stage: str, name: str) -> list[float]:
    lines = (settings.run / stage / "metrics.jsonl").read_text().splitlines()
    return [row[name] for row in map(json.loads, lines) if name in row]


def test_each_stage_leaves_finite_figures(finished):
    for stage in ("pretrain", "sft", "reward", "ppo", "dpo"):
        lines = (finished.run / stage / "metrics.jsonl").read_text().splitlines()
        assert lines and not any("nonfinite" in json.loads(line) for line in lines), stage


def test_training_lowers_the_held_out_losses(finished):
    nats = curve(finished, "pretrain", "heldout_nats_per_token")
    assert nats[-1] < np.log(512)
    assert results(finished, "sft")["pretraining_nats_before"] == pytest.approx(nats[-1], abs=0.05)


def test_preferences_name_their_annotator_and_mix_in_experts(finished):
    rows = [json.loads(line) for line in (finished.run / "preferences/train.jsonl").read_text().splitlines()]
    cache = finished.preferences.cache
    experts = set(sources.examples("movie_reviews", "train", cache) + sources.examples("movie_reviews", "valid", cache))
    assert len(rows) == 24
    for row in rows:
        assert len(row["answers"]) == 4 and 0 <= row["choice"] < 4
        assert row["meta"]["annotator"].startswith("simulated annotator (VADER")
        assert any((row["prompt"], answer) in experts for answer in row["answers"])


def test_the_annotator_gives_cut_answers_the_fixed_low_score(finished):
    rows = [json.loads(line) for line in (finished.run / "preferences/train.jsonl").read_text().splitlines()]
    ended = np.array([row.get("ended", [True] * 4) for row in rows])
    texts = gold_scores([answer for row in rows for answer in row["answers"]]).reshape(ended.shape)
    np.testing.assert_array_equal([row["meta"]["gold"] for row in rows], np.where(ended, texts, -1.0))
    assert (~ended).any()


def test_the_files_of_preferences_are_in_the_results_with_their_hashes(finished):
    names = ("train.jsonl", "heldout.jsonl")
    hashes = {name: sha256_of_file(finished.run / "preferences" / name) for name in names}
    assert hashes.items() <= read_done(finished.run / "preferences")["files"].items()


def test_the_reward_is_compared_with_chance_and_ceiling(finished):
    found = results(finished, "reward")
    assert found["chance"] == pytest.approx(0.25)
    assert 0.25 < found["annotator_ceiling"] < 1
    assert 0 <= found["accuracy"] <= 1 and found["calibration"]


def test_ppo_starts_at_ratio_one_and_dpo_at_log_b(finished):
    assert max(curve(finished, "ppo", "ratio_error_first")) < 1e-6  # exactly 0 on one device: see test_ppo
    assert max(curve(finished, "ppo", "sampler_gap_max")) < 1e-5
    assert curve(finished, "ppo", "kl")[0] == pytest.approx(0, abs=1e-4)
    assert curve(finished, "dpo", "train_loss")[0] == pytest.approx(np.log(4), abs=1e-4)


def test_the_report_shows_every_policy(finished):
    page = (finished.run / "report/report.html").read_text()
    names = list(results(finished, "report")["policies"])
    assert names == ["base", "SFT", "best of 2", "DPO", "PPO"]
    assert all(name in page for name in names) and "simulated annotator" in page
    assert (finished.run / "report/frontier.png").stat().st_size > 5000
    gold = results(finished, "report")["policies"]["PPO"]["gold"]
    assert gold["low"] <= gold["mean"] <= gold["high"]


def test_ppo_keeps_rollouts_token_by_token_and_its_critic(finished):
    """At the first iteration policy and reference are the same, and after an update the ratio is not 1."""
    first, second = (json.loads((finished.run / f"ppo/rollouts/{i:06d}.json").read_text()) for i in (1, 2))
    assert first["beta"] == pytest.approx(finished.ppo.beta) and len(first["answers"]) == 8
    for one in first["answers"] + second["answers"]:
        lengths = {len(one[name]) for name in ("tokens", "logp", "ref_logp", "ratio", "value", "advantage", "return")}
        assert lengths == {len(one["tokens"])} and one["prompt"].endswith("<answer>")
        assert one["ended"] == (one["tokens"][-1] == "</answer>")
        np.testing.assert_allclose(np.exp(one["logp"]), np.clip(np.exp(one["logp"]), 0, 1))
    ratios = np.concatenate([one["ratio"] for one in first["answers"]])
    assert 0 < np.abs(ratios - 1).max() < 1
    for one in first["answers"]:
        np.testing.assert_allclose(one["logp"], one["ref_logp"], atol=1e-5)
        np.testing.assert_allclose(one["value"], 0, atol=1e-7)
    scope = TokenInspector(Speaker(finished.run / "ppo"), critic=finished.run / "ppo/critic")
    seen = scope.look(scope.speaker.prompt("Finish"), [7, 8, 9])
    assert seen.value.shape == (3,) and np.abs(seen.value).max() > 0


@pytest.mark.slow
def test_people_s_labels_take_the_place_of_the_simulated_annotator_s(finished, tmp_path):
    store = votes.Store(tmp_path / "votes.sqlite")
    for name in ("train", "heldout"):
        rows = list(read_preferences(finished.run / f"preferences/{name}.jsonl"))
        judged = [  # three times, with different texts: a prompt's split depends on its hash
            formats.Verdict(
                f"{row.prompt} {k}",
                row.answers,
                "favourite",
                ((row.choice,), tuple(i for i in range(len(row.answers)) if i != row.choice)),
            )
            for row in rows
            for k in range(3)
        ]
        formats.import_verdicts(store, judged, "ada")
    settings = dataclasses.replace(finished, labels=tmp_path / "votes.sqlite", run=tmp_path / "run")
    stages = {stage.__name__.rpartition(".")[2]: own for stage, own in assistant.stage_settings(settings)}
    assert "preferences" not in stages and len(stages) == 6
    assert str(stages["reward"].preferences).endswith("votes.sqlite:train")
    assert str(stages["dpo"].heldout).endswith("votes.sqlite:heldout")
    of_chat_model = dict(align.stage_settings(align.Settings(labels=settings.labels)))
    assert preferences not in of_chat_model and of_chat_model[dpo].preferences == stages["dpo"].preferences
    own = dataclasses.replace(stages["reward"], model=finished.run / "sft")
    assert reward.main(own)["annotator_ceiling"] is None
    with pytest.raises(UserError, match="holds no preferences"):
        votes.Store(tmp_path / "empty.sqlite")
        assistant.main(dataclasses.replace(settings, labels=tmp_path / "empty.sqlite"))
    long = [formats.Verdict(f"p {n}", ("good " * 99, "bad"), "favourite", ((0,), (1,))) for n in range(99)]
    formats.import_verdicts(votes.Store(tmp_path / "long.sqlite"), long, "ada")
    short = [dataclasses.replace(one, answers=("good", "bad")) for one in long[:30]]
    formats.import_verdicts(votes.Store(tmp_path / "few.sqlite"), short, "ada")
    large = dataclasses.replace(settings, dpo=dataclasses.replace(settings.dpo, batch=64))
    for name, own, message in (("long", settings, "long.sqlite:train: none of"), ("few", large, "fill no batch of 64")):
        with pytest.raises(UserError, match=message):
            assistant.main(dataclasses.replace(own, labels=tmp_path / f"{name}.sqlite", run=tmp_path / name))
        assert not (tmp_path / name).exists(), "before any stage has been run"
    with pytest.raises(UserError, match="not a database of votes"):
        assistant.main(dataclasses.replace(settings, labels=tmp_path / "votes.jsonl"))


@pytest.mark.slow
def test_the_doctor_reports_a_reward_model_trained_on_random_labels(finished, tmp_path):
    """The same answers with a random favourite; the real reward model gets no such warning."""
    rng = np.random.default_rng(0)
    for name in ("train", "heldout"):
        rows = list(read_preferences(finished.run / f"preferences/{name}.jsonl"))
        choices = rng.integers(4, size=len(rows))
        write_preferences(
            tmp_path / f"{name}.jsonl",
            [dataclasses.replace(row, choice=int(choice)) for row, choice in zip(rows, choices, strict=True)],
        )
    own = next(own for stage, own in assistant.stage_settings(finished) if stage is reward)
    settings = dataclasses.replace(
        own,
        run=tmp_path / "reward",
        preferences=tmp_path / "train.jsonl",
        heldout=tmp_path / "heldout.jsonl",
        epochs=10,
        learning_rate=3e-3,
    )
    reward.main(settings)
    assert [one.what for one in doctor.run_checks(doctor.read_run_record(settings.run))] == [
        "too few held-out rows to compare",
        "the reward model is guessing",
    ]


@pytest.mark.slow
def test_eight_devices_find_what_one_finds(finished, tmp_path, monkeypatch):
    monkeypatch.setattr(sharding, "make_mesh", make_mesh)
    several = dataclasses.replace(finished, run=tmp_path / "run")
    assistant.main(several)
    for stage in assistant.STAGES:
        one, eight = (jax.tree.leaves_with_path(results(settings, stage)) for settings in (finished, several))
        for (path, a), (_, b) in zip(one, eight, strict=True):
            if isinstance(a, str):
                assert a == b, (stage, path)
            else:
                np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3, err_msg=f"{stage} {path}")


def test_running_twice_repeats_nothing(finished):
    before = {path: path.stat().st_mtime_ns for path in finished.run.rglob("*.json*")}
    again = assistant.main(finished)
    assert {path: path.stat().st_mtime_ns for path in finished.run.rglob("*.json*")} == before
    assert again["report"]["policies"].keys() == results(finished, "report")["policies"].keys()


def test_a_run_replayed_from_its_settings_has_the_same_numbers(finished, tmp_path):
    from jaxgpt.runs.cli import parse

    settings = parse(
        sft.Settings, sft.PRESETS, ["--settings", str(finished.run / "sft"), "--run", str(tmp_path / "again")]
    )
    sft.main(settings)
    lines = [
        (folder / "metrics.jsonl").read_text().splitlines() for folder in (finished.run / "sft", tmp_path / "again")
    ]
    a, b = ([{k: v for k, v in json.loads(line).items() if k not in WALL_CLOCK} for line in part] for part in lines)
    assert a == b


def test_chat_streams_an_answer_from_any_stage(finished):
    for stage in ("pretrain", "sft", "ppo", "dpo"):
        talk = chat.Chat(chat.Settings(model=finished.run / stage, new_tokens=8))
        text = "".join(talk.reply("Say </answer> & <prompt>", jax.random.key(0)))
        assert isinstance(text, str) and "tokens/s" in talk.stats
        assert talk.speaker.raw == (stage == "pretrain") and not talk.history


def fails(capsys, main, *argv: str) -> str:
    from jaxgpt.runs.cli import cli

    module, settings, presets = main
    with pytest.raises(SystemExit) as stop:
        cli(module, settings, presets, argv)
    assert stop.value.code == 2
    error = capsys.readouterr().err.strip()
    assert "\n" not in error and error.startswith("error: ")
    return error


def command(module) -> tuple:
    return module.main, module.Settings, module.PRESETS


def test_mistakes_are_one_line_and_come_before_training(finished, tmp_path, capsys, monkeypatch):
    run = ("--run", str(tmp_path / "run"))
    assert "did you mean" in fails(capsys, command(pretrain), "--learning-rat", "1")
    assert "missing.txt" in fails(capsys, command(pretrain), "--preset", "toy", *run, "--data", "missing.txt")
    (tmp_path / "empty.txt").touch()
    assert "empty.txt" in fails(
        capsys, command(pretrain), "--preset", "toy", *run, "--data", str(tmp_path / "empty.txt")
    )
    (tmp_path / "bad.txt").write_bytes(b"fine\n\xff\xfe\n")
    assert "UTF-8" in fails(capsys, command(pretrain), "--preset", "toy", *run, "--data", str(tmp_path / "bad.txt"))
    with monkeypatch.context() as eight_devices:
        eight_devices.setattr(sharding, "make_mesh", make_mesh)
        assert "devices" in fails(capsys, command(pretrain), "--preset", "toy", *run, "--batch", "9")
    assert "nowhere" in fails(capsys, command(sft), *run, "--model", str(tmp_path / "nowhere"))
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign/thesis.doc").touch()
    model = ("--model", str(finished.run / "sft"))
    foreign = ("--run", str(tmp_path / "foreign"))
    assert "not a run folder" in fails(capsys, command(preferences), *foreign, *model)
    run = ("--run", str(tmp_path / "second"))
    assert "candidates is 1; it must be at least 2" in fails(
        capsys, command(preferences), *run, *model, "--candidates", "1"
    )
    wrong = ("--model", str(finished.run / "reward"))
    assert "no language model" in fails(capsys, command(preferences), *run, *wrong)
    assert "block" in fails(capsys, command(preferences), *run, *model, "--new-tokens", "60")
    place = ("--votes", str(tmp_path / "votes.sqlite"), "--serve.port", "0", "--models", wrong[1])
    assert "no language model" in fails(capsys, command(label), *place)  # not behind a page that waits for answers
    assert "no language model" in fails(capsys, command(blind), *run, "--models", model[1], wrong[1])
    assert not list(tmp_path.rglob("*.sqlite"))
    (tmp_path / "one.jsonl").write_text('{"prompt": "a", "answers": ["b"], "choice": 0}\n')
    one = str(tmp_path / "one.jsonl")
    run = ("--run", str(tmp_path / "third"))
    assert "one.jsonl:1" in fails(capsys, command(reward), *run, *model, "--preferences", one, "--heldout", one)
    assert not list(tmp_path.glob("*/model"))


@pytest.mark.slow
def test_gpu_presets_fit_together():
    """Every stage of the GPU preset traces at its full size: shapes, settings and batch sizes agree."""
    gpu, mesh = assistant.PRESETS["gpu"], jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    config: ModelConfig = gpu.pretrain.model
    key = jax.random.key(0)
    steps = (
        pretrain.build(gpu.pretrain, mesh),
        sft.build(gpu.sft, config, mesh),
        reward.build(gpu.reward, config, MaxSizes(4, 88, 41), 100, mesh),
        dpo.build(gpu.dpo, config, MaxSizes(4, 88, 41), 100, mesh),
    )
    for program in steps:
        new_state, _ = jax.eval_shape(program.step, program.state, program.batch, None)
        assert jax.tree.structure(new_state) == jax.tree.structure(program.state)
    rl, control = ppo.build(gpu.ppo, config, 40, mesh, 3), ppo.controller(gpu.ppo)
    assert jax.eval_shape(rl.iteration, rl.state, control, rl.prompts, key).state.step.shape == ()
    count = sum(leaf.size for leaf in jax.tree.leaves(training.param_shapes(config)))
    assert 120e6 < count < 130e6


@pytest.mark.slow
def test_the_gpu_preset_steps():
    """One real step of every stage, in bfloat16, with one layer of the GPU preset's model, two rows and a small
    vocabulary."""
    gpu = assistant.PRESETS["gpu"]
    config = dataclasses.replace(gpu.pretrain.model, layers=1, vocab=8192)
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def two(settings, **more):
        return dataclasses.replace(settings, batch=2, **more)

    def some(shapes):  # random parameters, a batch of ones
        return jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), shapes)

    params = transformer.init(jax.random.key(0), config)
    losses = {}
    for name, program in {
        "pretrain": pretrain.build(two(gpu.pretrain, model=config), mesh),
        "sft": sft.build(two(gpu.sft), config, mesh),
        "reward": reward.build(two(gpu.reward), config, MaxSizes(2, 16, 16), 10, mesh),
        "dpo": dpo.build(two(gpu.dpo), config, MaxSizes(2, 16, 16), 10, mesh),
    }.items():
        state, batch = some(program.state), some(program.batch)
        trainable = {"policy": params} if name == "dpo" else {"model": params} if name == "reward" else params
        state = dataclasses.replace(state, trainable={**state.trainable, **optim.copy(trainable)})
        if name in ("reward", "dpo"):
            batch = batch.replace(choice_B=jnp.zeros(2, jnp.int32))
        losses[name] = training.to_floats(program.step(state, batch, None)[1])["loss"]
        del state
    assert losses["pretrain"] == pytest.approx(np.log(config.vocab), rel=0.1)
    assert losses["reward"] == pytest.approx(np.log(2), rel=1e-3)
    assert all(np.isfinite(loss) for loss in losses.values())
    settings = two(gpu.ppo, ppo=dataclasses.replace(gpu.ppo.ppo, new_tokens=4, epochs=1))
    iteration = ppo.build(settings, config, 6, mesh, 3).iteration
    reward_params = reward_model.init(jax.random.key(1), optim.copy(params), config.width)
    state = ppo.start(settings, ppo_algorithm.policy_of(config, settings.ppo, 3), params, reward_params)
    prompts = Prompts(jnp.full((2, 6), 7), jnp.array([6, 3]))
    inputs = (state, ppo.controller(settings), prompts, jax.random.key(2))
    metrics = training.to_floats(iteration.lower(*inputs).compile(AS_USERS_RUN_IT)(*inputs).metrics)
    assert metrics["ratio_error_first"] == 0.0 and np.isfinite(metrics["loss"])


def test_settings_files_and_folders_are_as_the_readme_says(finished):
    for stage in ("pretrain", "sft", "preferences", "reward", "ppo", "dpo", "report"):
        assert {"settings.json", "metrics.jsonl", "log.txt", "done.json"} <= {
            p.name for p in (finished.run / stage).iterdir()
        }
    assert (
        Path(finished.run / "ppo/model/tokenizer.json").exists()
        and Path(finished.run / "ppo/model/template.json").exists()
    )


def test_the_scale_of_the_reward_comes_from_answers_that_ended():
    """PPO replaces the scores of the others. Where hardly any ended, all are used."""
    cut, ended = ([2, 7, 4, 9], [0, 0, 1, 1]), ([2, 7, 4, 5], [0, 0, 1, 1])
    found = reward.reference_rows([TokenizedPreference((cut, ended), 1)] * 3, 8, 2, end=5)
    assert found.tokens_BT[:, 3].tolist() == [5, 5]
    found = reward.reference_rows([TokenizedPreference((cut, cut), 1)] * 3, 8, 4, end=5)
    assert found.tokens_BT[:, 3].tolist() == [9] * 4


def test_the_tables_of_the_docs_are_made_from_runs(finished, capsys):
    runpy.run_path(str(Path(__file__).parents[2] / "docs/results.py"))["main"]([finished.run])
    shown = capsys.readouterr().out
    figures = results(finished, "report")["policies"]["PPO"]
    assert f"| PPO | {figures['gold']['mean']:.2f} ± " in shown and f"| PPO | {figures['distinct_2']:.2f} |" in shown
    assert f"| {results(finished, 'reward')['accuracy']:.1%} |" in shown


def test_the_saved_reward_model_is_normalised(finished):
    saved = load_model(finished.run / "reward")
    preferences = formats.load(finished.run / "preferences/heldout.jsonl")
    rankings, _ = drop_long_preferences(tokenize_preferences(saved.tokenizer, preferences), saved.config.block)
    rows = reward.reference_rows(
        rankings, saved.config.block, finished.reward.reference_samples, saved.tokenizer.template.end
    )
    score = np.asarray(jax.jit(reward_model.score, static_argnums=1)(saved.params, saved.config, rows))
    assert score.mean() == pytest.approx(0, abs=1e-3) and score.std() == pytest.approx(1, abs=1e-2)
    assert optim.split(saved.params, reward_model.trainable_names())[1].keys() == {"gain", "bias"}


# ---- each study, from start to figure ----

STUDIES = {
    overoptimisation: "",
    kl_control: "",
    through_reward: "",
    imdb: "pretrain",
    how_many_labels: "sft",
    arithmetic: None,  # trains its own model
}


@pytest.fixture
def start_of(finished, tmp_path):
    """The toy preset of a study, on the finished run and the same part of the reviews."""

    def settings_of(study, place: str | None = "", **more):
        if place is not None:
            more |= {"start": finished.run / place, "cache": finished.preferences.cache}
        return dataclasses.replace(study.PRESETS["toy"], run=tmp_path / "run", **more)

    with jax.debug_key_reuse(False):  # the check mistakes a scan's vmapped keys for reused ones
        yield settings_of


def assert_runs_once(study, settings, capsys) -> dict:
    """It writes its figure and page, and a second start repeats nothing. Returns the results."""
    found = study.main(settings)
    figure = settings.run / f"{study.__name__.rpartition('.')[2]}.png"
    assert figure.stat().st_size > 10_000
    page = (settings.run / "report.html").read_text(encoding="utf-8")
    assert "<table>" in page and "data:image/png;base64," in page and "<script" not in page
    capsys.readouterr()
    assert study.main(settings) == found and "already done" in capsys.readouterr().out
    return found


@pytest.mark.slow
@pytest.mark.parametrize("study", STUDIES, ids=lambda study: study.__name__.rpartition(".")[2])
def test_a_study_runs_and_is_not_repeated(study, start_of, finished, capsys):
    people = {"people": str(finished.run / "preferences/heldout.jsonl")} if study is how_many_labels else {}
    found = assert_runs_once(study, start_of(study, STUDIES[study], **people), capsys)
    if study is how_many_labels:
        assert len(found["conditions"]["people"]) == 1
    if study is arithmetic:  # demonstrations, groups, a critic, a verifier on the host
        assert found["methods"].keys() == {"GRPO", "PPO"} and 0 <= found["before"]["mean"] <= 1


@pytest.mark.slow
def test_an_interrupted_study_resumes_after_its_last_part(start_of, monkeypatch, capsys):
    settings = start_of(frontier)
    with monkeypatch.context() as patched:
        patched.setattr(FrontierSetup, "dpo", lambda *args, **settings: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            frontier.main(settings)
    cells = settings.run / "cells"
    kept = {path.name: path.stat().st_mtime_ns for path in cells.iterdir()}
    assert kept.keys() == {"PPO.json", "through-the-reward-model.json"}
    assert_runs_once(frontier, settings, capsys)
    for name, time in kept.items():
        assert (cells / name).stat().st_mtime_ns == time


def test_the_command_to_chat_with_a_model_is_quoted_for_the_shell():
    assert chat_command(Path("runs/assistant/ppo")) == 'make chat ARGS="--model runs/assistant/ppo"'
    assert chat_command(Path("my runs (2)/ppo")) == """make chat ARGS="--model 'my runs (2)/ppo'\""""
