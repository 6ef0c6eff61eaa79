"""The run doctor: finds nothing wrong with a healthy run, and each problem in a run made to have it."""

import dataclasses
import functools
import itertools
import json
import random
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxgpt import training
from jaxgpt.errors import UserError
from jaxgpt.files import write_record
from jaxgpt.losses import kl
from jaxgpt.rlhf import ppo
from jaxgpt.rlhf.intervals import interval
from jaxgpt.rlhf.ppo import PPOConfig
from jaxgpt.runs import doctor, run_record
from jaxgpt.runs.run import Run
from jaxgpt.runs.run_record import read_run_record
from jaxgpt.structs import Prompts
from jaxgpt.training import optim
from tests.helpers import TINY, params_of, prompts_of
from tests.torture import doctor as crafted

ONE = dataclasses.replace(TINY, layers=1)
CONFIG = PPOConfig(new_tokens=12, epochs=2, unfinished_score=0.0)


@dataclasses.dataclass(frozen=True)
class Settings:
    ppo: PPOConfig = CONFIG
    fixed_beta: bool = True
    target_kl: float = 6.0


def healthy_ppo(n=24):
    """The metrics of a good run."""
    return [
        {
            "score": 0.1 * i,
            "kl": min(0.5 * i, 6.0),
            "length": 26 - 0.3 * i,
            "ended": 0.9,
            "sampler_gap_max": 1e-6,
            "ratio_error_first": 0.0,
            "explained_variance": min(0.02 * i, 0.2),
            "skipped": 0.0,
        }
        for i in range(n)
    ]


DPO = {"chosen_reward": 0.1, "rejected_reward": -0.1, "skipped": 0.0}
TRAINED = [{"train_loss": 1.3, "train_nats_per_token": 5.0, "skipped": 0.0}]  # as little as a finished run logs


def write(folder: Path, stage: str, rows, results=None, settings=None) -> Path:
    with Run(folder / stage, settings or Settings(), stage) as run:
        for i, row in enumerate(rows, 1):
            run.log(i, row)
        if results is not None:
            run.finish(results)
    return folder / stage


def found(folder: Path) -> list[str]:
    return [finding.what for finding in doctor.run_checks(read_run_record(folder))]


@pytest.fixture(scope="module")
def healthy(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("healthy")
    falling = [
        {"train_nats_per_token": 6 - 0.1 * i, "skipped": 0.0, "seconds_data": 0.0, "seconds_device": 0.1}
        for i in range(20)
    ]
    write(root, "pretrain", falling, {"heldout_nats_per_token": 4.9})
    write(root, "sft", falling, {"pretraining_nats_before": 5.1, "pretraining_nats_after": 6.0})
    write(root, "reward", TRAINED, {"nll": 1.17, "chance": 0.25, "accuracy": 0.48})
    write(root, "ppo", healthy_ppo(), {"score": 2.3, "kl": 6.0})
    write(root, "dpo", [{"train_loss": 1.386, **DPO}, {"train_loss": 1.2, **DPO}], {"heldout_nll": 1.3})
    write(root, "report", [], {"policies": {"SFT": figures(0.1, -0.2), "PPO": figures(0.6, 2.1)}})
    return root


def figures(gold: float, reward: float) -> dict:
    return {
        name: {"mean": value, "low": value - 0.05, "high": value + 0.05}
        for name, value in (("gold", gold), ("judge", gold), ("reward", reward))
    }


def test_a_healthy_run_is_left_alone(healthy, capsys):
    assert doctor.main([str(healthy)]) == 0
    told = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in told] == ["pretrain", "sft", "reward", "ppo", "dpo", "report"]
    assert all("nothing wrong found" in line for line in told)


# ---- runs of the real algorithm, made to fail ----


def short(rows):
    return -rows.mask_BT.sum(1).astype(jnp.float32)


def long(rows):
    return -short(rows)


def favourite(rows):
    return jnp.where(rows.mask_BT, rows.tokens_BT == 9, 0).sum(1).astype(jnp.float32)


def broken(rows):
    return jnp.full(rows.tokens_BT.shape[0], jnp.nan)


REWARDS = (short, long, favourite, broken)
PROMPTS = Prompts(*prompts_of(32, 4))
POLICY = ppo.policy_of(ONE, CONFIG, stop=5)
GREEDY = {"beta": 0.0, "rate": 1e-2, "iterations": 40}


@jax.jit
def one(state, control, key, which, rate, spoil):
    """One iteration of PPO; every answer gets the reward function's score, whether it ended or not."""
    first, second = jax.random.split(key)
    found = ppo.collect(state, PROMPTS, first, policy=POLICY)
    score_B = jax.lax.switch(which, REWARDS, found.rows)
    spoiled = found.replace(logp_BT=found.logp_BT * spoil, answers=found.answers.replace(ended_B=jnp.ones(32, bool)))
    tx = optim.adam_tf(lambda step: rate)
    done = ppo.learn(state, control, spoiled, score_B, second, policy=POLICY, ppo=CONFIG, tx=tx)
    return done.state, done.controller, {**done.metrics, "ended": found.ended_B.mean()}


@jax.jit
def answers(state, key):
    return ppo.collect(state, PROMPTS, key, policy=POLICY).rows


@jax.jit
def fresh():
    return ppo.init(POLICY, params_of(ONE, scale=1.0), optim.adam_tf(optax.constant_schedule(1.0)), {})


@functools.cache
def trained(reward, *, beta=0.02, rate=3e-3, iterations=24, spoil=1.0):
    """PPO on the tiny model with a reward function: the metrics of each iteration, and the final policy."""
    state, control, rows = fresh(), kl.FixedKL(jnp.float32(beta)), []
    for i in range(1, iterations + 1):
        state, control, metrics = one(state, control, jax.random.key(i), REWARDS.index(reward), rate, spoil)
        rows.append(training.to_floats(metrics))
    return rows, state.trainable["policy"]


def iterate(folder: Path, reward, **options) -> Path:
    """The run folder of `trained`."""
    return write(folder, "ppo", trained(reward, **options)[0])


@pytest.mark.slow
def test_collapse_to_the_end_token(tmp_path):
    assert "answers collapsed to the end token" in found(iterate(tmp_path, short, iterations=40, rate=1e-2))


def test_answers_that_never_end(tmp_path):
    assert "answers never end" in found(iterate(tmp_path, long, iterations=10))


def test_a_sampler_that_is_another_policy(tmp_path):
    assert found(iterate(tmp_path, short, iterations=2, spoil=1.1)) == ["the sampler's policy is not the trainer's"]


def test_a_value_function_that_does_not_learn(tmp_path):
    assert "the value function explains nothing" in found(iterate(tmp_path, short, rate=0.0))


def test_a_policy_that_runs_away(tmp_path):
    assert "the policy drifts too far from the reference" in found(iterate(tmp_path, favourite, **GREEDY))


def test_updates_that_were_not_finite(tmp_path):
    assert found(iterate(tmp_path, broken, iterations=2)) == ["losses or gradients were not finite"]


# ---- checks of results ----


def test_a_dead_reward_model(tmp_path):
    """tests/experiments/test_stages.py trains one."""
    folder = write(tmp_path, "reward", TRAINED, {"nll": 1.41, "chance": 0.25, "accuracy": 0.26})
    assert found(folder) == ["the reward model is guessing"]


def test_a_hacked_reward(tmp_path):
    """The proxy reward counts one token, the gold reward distinct tokens; PPO repeats that one token."""
    policies = {}
    start, (_, learnt) = fresh(), trained(favourite, **GREEDY)
    for name, policy in (("SFT", start.trainable["policy"]), ("PPO", learnt)):
        state = dataclasses.replace(start, trainable={**start.trainable, "policy": policy})
        rows = answers(state, jax.random.key(99))
        tokens = np.where(rows.mask_BT, rows.tokens_BT, -1)
        gold = np.array([len(set(row) - {-1}) for row in tokens], float)
        policies[name] = {
            "gold": dataclasses.asdict(interval(gold)),
            "judge": dataclasses.asdict(interval(gold)),
            "reward": dataclasses.asdict(interval((tokens == 9).sum(1))),
        }
    folder = write(tmp_path, "report", [], {"policies": policies})
    assert found(folder) == ["PPO games the reward model"]


def test_a_reward_is_hacked_only_where_the_intervals_part(tmp_path):
    """A gold reward whose mean and upper end fall, by less than its interval is wide, is not worse."""
    for n, (gold, expected) in enumerate(((0.05, []), (-0.2, ["PPO games the reward model"]))):
        policies = {"SFT": figures(0.1, -0.2), "PPO": figures(gold, 2.1)}
        assert found(write(tmp_path / str(n), "report", [], {"policies": policies})) == expected


def test_dpo_s_falling_likelihoods_are_reported_only_where_answers_run_on(tmp_path):
    """Both chosen and rejected fall in every row; the end tag, length, end-of-answer rate or variety decides."""

    def run(end: float = 0.0, chosen: float = -1.0, **after: float) -> list[str]:
        folder = tmp_path / f"{end} {chosen} {after}"
        rows = [{"chosen_reward": chosen, "rejected_reward": -3.0, "end_log_ratio": end} for _ in range(8)]
        policies = {}
        for name, row in {"SFT": {}, "DPO": after}.items():
            row = {"length": 20.0, "ended": 0.9, "distinct_2": 0.6} | row
            means = {key: {"mean": x, "low": 0.98 * x, "high": 1.02 * x} for key, x in row.items()}
            policies[name] = {**means, "distinct_2": row["distinct_2"]}
        write(folder, "report", [], {"policies": policies})
        return found(write(folder, "dpo", rows))

    assert run() == run(length=22.0) == run(end=-2.0, chosen=0.1) == []
    for signs in ({"end": -2.0}, {"length": 30.0}, {"ended": 0.5}, {"distinct_2": 0.2}):
        assert run(**signs) == ["DPO makes all answers less likely, and answers run on"], signs


@pytest.mark.parametrize("stage", [stage for stage in crafted.STAGES if stage != "ppo"])  # which measures nothing
def test_held_out_prompts_that_were_trained_on(tmp_path, stage):
    rows = {"heldout": {"read": 9, "used": 8, "left_out": {"longer than 64 tokens": 1}}}
    own: dict = crafted.STAGES[stage][1] | {"rows": rows}
    lines = [{"train_nats_per_token": 5.0, **DPO, **line} for line in TRAINED]
    assert found(write(tmp_path / "a", stage, lines, {**own, "heldout_trained_on": 0})) == []
    assert found(write(tmp_path / "b", stage, lines, {**own, "heldout_trained_on": 3})) == [
        "what is measured on was trained on"
    ]


def test_overfitted_preferences_and_forgotten_text(tmp_path):
    assert found(write(tmp_path, "dpo", [{"train_loss": 1.386, **DPO}], {"heldout_nll": 2.0})) == [
        "the policy overfits the preferences"
    ]
    lost = {"pretraining_nats_before": 3.0, "pretraining_nats_after": 6.5}
    assert found(write(tmp_path, "sft", TRAINED, lost)) == ["finetuning wiped out what pretraining learned"]


def test_a_loss_that_does_not_fall(tmp_path):
    folder = write(tmp_path, "pretrain", [{"train_nats_per_token": 6.0 + 0.01 * i} for i in range(12)])
    assert found(folder) == ["the training loss does not fall"]


def test_starvation(tmp_path):
    """The same waits for data, with an idle device and with a busy one."""
    lines = [{"step": i, "time": 1.0 * i, "seconds_data": 0.8, "seconds_device": 0.0} for i in range(1, 9)]
    folder = write(tmp_path, "pretrain", [])
    for device, expected in ((0.0, ["the device waits for data"]), (0.5, [])):
        text = "\n".join(json.dumps({**line, "seconds_device": device}) for line in lines)
        (folder / "metrics.jsonl").write_text(text + "\n")
        assert found(folder) == expected


def test_a_loss_that_rose_after_it_had_fallen(tmp_path):
    """Noise alone, a plateau and a rise that is small beside the fall before are no divergence."""
    noise = np.random.default_rng(0).normal(0, 0.05, 64)
    falls = np.linspace(6, 4, 64)
    curves = {
        "falls": (falls, False),
        "plateau": (np.maximum(falls, 5), False),
        "rises a little": (np.concatenate([falls[::2], np.linspace(4, 4.3, 32)]), False),
        "diverges": (np.concatenate([falls[::2], np.linspace(4, 5.5, 32)]), True),
    }
    for name, (curve, bad) in curves.items():
        rows = [{"train_nats_per_token": x} for x in curve + noise]
        expected = ["the training loss rose after it had fallen"] if bad else []
        assert found(write(tmp_path / name, "pretrain", rows)) == expected, name


def test_answers_that_are_all_the_same(tmp_path):
    rows = {"preferences": {"read": 40, "used": 40, "left_out": {}}}
    part = {"preferences": 40, "equal_answers": 0}
    cases = {
        "preferences": ({"train": part, "heldout": {**part, "equal_answers": 40}}, "preferences between equal answers"),
        "reward": ({"rows": rows, "equal_answers": 9}, "preferences between equal answers"),
        "dpo": ({"rows": rows, "equal_answers": 9}, "preferences between equal answers"),
        "report": ({"policies": {"PPO": {"distinct_texts": 1}}, "prompts": 9}, "all answers are the same"),
        "align": ({"models": {"dpo": {"answers": ["", ""]}}}, "all answers are the same"),
    }
    for stage, (results, what) in cases.items():
        lines = [{**DPO, **line} for line in TRAINED] if stage in ("reward", "dpo") else []
        folder = write(tmp_path, stage, lines, crafted.STAGES[stage][1] | results)
        assert found(folder) == [what], stage
    folder = write(tmp_path, "ppo", healthy_ppo())
    (folder / "rollouts").mkdir()
    for texts, expected in ((["a", "b"], []), (["a", "a"], ["all answers are the same"])):
        kept = {"iteration": 1, "beta": 0.1, "answers": [{"tokens": [text, "</answer>"]} for text in texts]}
        write_record(folder / "rollouts/000001.json", kept)
        assert found(folder) == expected


def test_preferences_between_answers_that_never_end(tmp_path):
    """As of a model whose weights are all 0: each token ends an answer with probability 1 / V."""
    for ended, expected in ((0.01, ["answers never end"]), (0.9, [])):
        part = {"preferences": 40, "equal_answers": 0, "ended": ended}
        results = crafted.STAGES["preferences"][1] | {"train": part, "heldout": part}
        assert found(write(tmp_path, "preferences", [], results)) == expected


def test_held_out_rows_that_are_too_few_to_say(tmp_path):
    wide = {"mean": 0.6, "low": 0.45, "high": 0.72}
    policies = {"SFT": {}, "PPO": {"win_rate_gold": wide}}
    cases = {
        "reward": {"accuracy_interval": wide},
        "dpo": {"heldout_accuracy_interval": wide},
        "report": {"policies": policies},
    }
    for stage, results in cases.items():
        lines = [{**DPO, **line} for line in TRAINED] if stage != "report" else []
        folder = write(tmp_path, stage, lines, crafted.STAGES[stage][1] | results)
        assert found(folder) == ["too few held-out rows to compare"], stage


def test_a_result_that_was_not_finite(tmp_path):
    results = {"nll": np.nan, "chance": 0.25, "accuracy": 0.3}
    assert found(write(tmp_path, "reward", TRAINED, results)) == ["results are not finite"]


# ---- reading ----


def test_a_run_that_can_not_be_read_is_named_and_the_others_are_still_checked(tmp_path, capsys):
    """Each in one line, with status 1; and of none of them is nothing wrong."""
    shapes = {"link": "loop", "folder": "folder", "binary": b"\x00\xff", "deep": b"[" * 100_000, "list": b"[]"}
    for name in ("settings.json", "metrics.jsonl", "done.json"):
        for kind, content in shapes.items():
            root = tmp_path / f"{name} {kind}"
            root.mkdir()
            for stage in ("sft", "reward"):
                crafted.write(root / stage, crafted.records(stage))
            path = root / "sft" / name
            path.unlink()
            if isinstance(content, bytes):
                path.write_bytes(content)
            else:
                path.mkdir() if kind == "folder" else path.symlink_to(path)
            assert doctor.main([str(root)]) == 1
            first, second = capsys.readouterr().out.splitlines()
            assert first.startswith("sft: could not be read: ") and str(path) in first
            assert second.startswith("reward: nothing wrong found")


def test_a_finished_run_without_its_figures_was_damaged(tmp_path):
    for stage, (line, results) in crafted.STAGES.items():
        for name in run_record.FINISHED[stage][1]:
            content = crafted.records(stage)
            content["done.json"]["results"] = {k: v for k, v in results.items() if k != name}
            crafted.write(tmp_path / f"{stage} {name}", content)
            with pytest.raises(UserError, match=f"done.json holds no results.{name}"):
                read_run_record(tmp_path / f"{stage} {name}")
        if line:
            crafted.write(tmp_path / f"{stage} metrics", {**crafted.records(stage), "metrics.jsonl": []})
            with pytest.raises(UserError, match=r"metrics.jsonl holds no"):
                read_run_record(tmp_path / f"{stage} metrics")


def test_a_value_of_the_wrong_type_is_told_in_plain_words(tmp_path):
    content = crafted.records("dpo")
    content["done.json"]["results"]["heldout_nll"] = "1.3"
    crafted.write(tmp_path / "dpo", content)
    with pytest.raises(UserError, match=r"done.json is damaged: heldout_nll must be a number, not text"):
        read_run_record(tmp_path / "dpo")


def test_a_stage_without_checks_is_not_called_well(tmp_path, capsys):
    assert doctor.main([str(write(tmp_path, "frontier", [], {"anything": [1]}))]) == 0
    assert "nothing wrong" not in capsys.readouterr().out


@pytest.mark.parametrize("stage", ["preferences", "ppo"])
def test_a_run_that_measured_nothing_is_not_called_well(tmp_path, capsys, stage):
    """It ended in an error, perhaps."""
    write(tmp_path, stage, [])
    assert doctor.main([str(tmp_path)]) == 0
    assert f"{stage}: nothing measured yet ({tmp_path / stage}, not finished)" in capsys.readouterr().out


def test_crafted_records_end_in_one_line(tmp_path):
    outcomes = crafted.crafted_records(random.Random(0), tmp_path)
    assert [outcome for outcome in itertools.islice(outcomes, 100) if outcome] == []


def test_the_torn_line_of_a_killed_run_is_left_out_and_another_is_refused(tmp_path):
    folder = write(tmp_path, "ppo", healthy_ppo())
    text = (folder / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").write_text(text + '{"step": 25, "sco')
    assert found(folder) == []
    (folder / "metrics.jsonl").write_text('{"step": 1, "sco\n' + text)
    with pytest.raises(UserError, match=r"metrics.jsonl:1 is not a line of metrics"):
        read_run_record(folder)


def test_the_command(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        doctor.main([str(tmp_path)])
    folder = write(tmp_path, "reward", TRAINED, {"nll": 1.41, "chance": 0.25, "accuracy": 0.26})
    assert doctor.main([str(folder)]) == 1
    told = capsys.readouterr().out
    assert "! the reward model is guessing" in told and "held-out loss 1.410 nats, guessing 1.386" in told
