"""Runs killed with SIGKILL resume to the bits of untouched runs: see tests/slow/soak.py."""

import json
import random

import numpy as np
import pytest

from jaxgpt.runs.saved_model import save_model
from tests.helpers import TINY, few_reviews
from tests.slow import soak
from tests.torture.processes import await_setup


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "stages"), [(1, ("pretrain", "ppo")), (2, ("pretrain",))])
def test_killed_runs_go_on_to_the_last_bit(tmp_path, processes, stages):
    """A kill in the first stage and in PPO, and one of two processes; `make soak` kills every stage twenty times."""
    soak.prepare(tmp_path, stages=stages, processes=processes)
    outcomes = list(soak.soak(tmp_path, stages, processes, kills=1, seed=processes))
    assert [one.stage for one in outcomes] == list(stages)
    for one in outcomes:
        assert not one.differences, one
        assert len(one.hits) == 1, one


@pytest.mark.slow
@pytest.mark.parametrize(("victim", "moment"), [(0, "step"), (1, "step"), (0, "save"), (1, "setup")])
def test_when_one_of_two_is_killed_the_other_ends_soon_to_be_started_again(tmp_path, victim, moment):
    few_reviews(tmp_path / "data")
    run = tmp_path / "run"
    both = soak.Program(soak.command("pretrain", tmp_path, run), 2, tmp_path / "log")
    hit = await_setup(both, run) if moment == "setup" else soak.await_moment(both, run, moment, random.Random(victim))
    assert hit
    both.processes[victim].kill()
    assert both.processes[1 - victim].wait(30) == 75
    last = (tmp_path / f"log.{1 - victim}.txt").read_text().splitlines()[-1]
    assert last.startswith(f"stopped: process {victim} of 2 has died; start all processes again: they resume")


def test_the_comparison_sees_one_bit(tmp_path):
    table = np.random.default_rng(0).normal(size=(64, 32)).astype(np.float32)
    for name, spoil in (("a", 0), ("b", 0), ("c", 1)):
        folder = tmp_path / name
        folder.mkdir()
        own = table.copy()
        own.view(np.uint32)[3, 4] ^= spoil
        save_model(folder / "model", {"table": {"tokens": own}, "scale": np.ones(3, np.float32)}, TINY)
        (folder / "done.json").write_text(json.dumps({"results": {}}))
        (folder / "metrics.jsonl").write_text(
            json.dumps({"step": 1, "time": spoil, "loss": 1.0 + (name == "c")}) + "\n"
        )
    assert soak.differences(tmp_path / "a", tmp_path / "b") == []
    assert soak.differences(tmp_path / "a", tmp_path / "c") == [
        "metrics from line 1 on (1 and 1 lines)",
        "table/tokens",
    ]
