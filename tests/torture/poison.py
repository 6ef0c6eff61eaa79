"""Toy stages with one poisoned weight, rate or setting: each ends in one line, or leaves finite parameters."""

import contextlib
import dataclasses
import io
import os
import random
import shutil
import traceback
import warnings
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import numpy as np

from experiments import assistant
from jaxgpt.errors import UserError
from jaxgpt.runs import saved_model
from tests import conftest
from tests.helpers import few_reviews, one_device
from tests.torture.harness import Kind, Outcomes

BAD_WEIGHTS = (np.nan, np.inf, -np.inf, 3e38, -1e30, 1e20)
RATES = (1e3, 1e10, 1e20, 3e38, 1e39, 1e300)
SETTINGS: dict[str, dict[str, tuple[Any, ...]]] = {  # stage -> a setting and what it may hold
    "pretrain": {"weight_decay": (1e38, 1e300), "model.norm_epsilon": (1e-300, 1e300), "learning_rate": RATES},
    "sft": {"weight_decay": (1e38, 1e300), "learning_rate": RATES},
    "preferences": {"temperature": (1e-300, 1e-30, 1e38), "annotator.temperature": (1e-300, 1e300)},
    "reward": {"first_spread": (1e30, 1e300), "learning_rate": RATES},
    "ppo": {
        "learning_rate": RATES,
        "beta": (1e38, 1e300),
        "horizon": (1e-300, 1e-30, 1e300),
        "target_kl": (1e-300, 1e-30, 1e300),
        "ppo.temperature": (1e-300, 1e-30, 1e38),
        "ppo.value_weight": (1e38, 1e300),
        "ppo.clip": (1e-300, 1e38),
        "ppo.value_clip": (1e-300, 1e38),
        "ppo.unfinished_score": (-1e38, 1e300),
    },
    "dpo": {"learning_rate": RATES, "beta": (1e38, 1e-38, 1e300), "temperature": (1e-300, 1e-30, 1e38)},
    "report": {"temperature": (1e-300, 1e-30, 1e38), "unfinished_score": (1e38, -1e300)},
}
READS = {  # stage -> the stages whose models it reads, and the setting that names them
    "sft": {"pretrain": "model"},
    "preferences": {"sft": "model"},
    "reward": {"sft": "model"},
    "ppo": {"sft": "model", "reward": "reward"},
    "dpo": {"sft": "model"},
    "report": dict.fromkeys(("pretrain", "sft", "reward", "dpo", "ppo"), "stages"),
}


def whole_run(folder: Path) -> assistant.Settings:
    """A finished toy run of all stages with a one-layer model."""
    toy, cache = assistant.PRESETS["toy"], few_reviews(folder / "data")
    small = dataclasses.replace(toy.pretrain, model=dataclasses.replace(toy.pretrain.model, layers=1))
    stages = {name: getattr(toy, name) for name in assistant.STAGES} | {"pretrain": small}
    stages = {name: dataclasses.replace(one, cache=cache) for name, one in stages.items() if hasattr(one, "cache")}
    settings = dataclasses.replace(toy, run=folder / "run", **stages)
    with contextlib.redirect_stdout(io.StringIO()):
        assistant.main(settings)
    return settings


def change(settings: Any, name: str, value: Any) -> Any:
    """The settings with one of them changed; "ppo.clip" is inside another."""
    outer, _, inner = name.partition(".")
    return dataclasses.replace(settings, **{outer: change(getattr(settings, outer), inner, value) if inner else value})


def poison_weight(rng: random.Random, folder: Path) -> str:
    """Put a bad number into a saved model, hashes and all."""
    model = saved_model.load_model(folder)
    leaves, tree = jax.tree.flatten(model.params)
    names = list(saved_model.describe_params(model.params))
    n, value = rng.randrange(len(leaves)), rng.choice(BAD_WEIGHTS)
    leaf = np.array(leaves[n])
    leaf.reshape(-1)[rng.randrange(leaf.size) :][: rng.choice([1, leaf.size])] = value
    params = jax.tree.unflatten(tree, [*leaves[:n], leaf, *leaves[n + 1 :]])
    with mock.patch.object(saved_model, "check_params_finite"):
        saved_model.save_model(folder / "model", params, model.config, model.tokenizer, model.extra)
    return f"{value} in {names[n]}"


def run_stage(stage: Any, settings: Any) -> str:
    """The outcome of a stage."""
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings(record=True):
            stage.main(settings)
    except UserError as error:
        return f"several lines: {error}" if "\n" in str(error) else ""
    except BaseException:
        return traceback.format_exc(limit=-5)
    for model in settings.run.rglob("model.json"):
        try:
            saved_model.load_model(model.parent)
        except UserError as error:
            return f"finished, and left this: {error}"
    return ""


def poisoned_stages(rng: random.Random, folder: Path) -> Outcomes:
    """See the module's docstring."""
    os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *conftest.FLAGS])  # programs compile quickly
    jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
    with one_device():
        whole = whole_run(folder)
        stages = {stage.__name__.rpartition(".")[2]: (stage, own) for stage, own in assistant.stage_settings(whole)}
        for n in range(10**9):
            name = rng.choice(list(stages))
            stage, own = stages[name]
            place, what = folder / str(n), ""
            own = dataclasses.replace(own, run=place / "run")
            if name in READS and rng.random() < 0.5:
                source = rng.choice(list(READS[name]))
                shutil.copytree(whole.run if name == "report" else whole.run / source, place / "in")
                what = f"{source}: {poison_weight(rng, place / 'in' / (source if name == 'report' else ''))}"
                own = dataclasses.replace(own, **{READS[name][source]: place / "in"})
            else:
                setting = rng.choice(list(SETTINGS[name]))
                value = rng.choice(SETTINGS[name][setting])
                what = f"{setting} {value}"
                try:
                    own = change(own, setting, value)
                except UserError:
                    continue  # refused: one line
            outcome = run_stage(stage, own)
            shutil.rmtree(place, ignore_errors=True)
            yield outcome and f"{name} with {what}: {outcome}"


KINDS = {"toy stages, one poisoned weight, rate or setting": Kind(poisoned_stages, cases=30, quick=False)}
