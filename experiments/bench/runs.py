"""Benchmark: R runs of PPO as one program (`jax.vmap`, or `jax.lax.map`), against R separate ones.

    python -m experiments.bench.runs                     one iteration of each: sampling, scoring, updates
    python -m experiments.bench.runs --preset gpu

The three ways take turns in one process, on the same work; times are whole iterations, and the speed-up over separate
runs is computed turn by turn. A small program leaves most of a GPU idle, which vmap fills; on a CPU the products are
the same work either way.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench import harness
from jaxgpt.config import PRESETS as MODELS
from jaxgpt.config import Count, Counts, ModelConfig, Seed, check_settings
from jaxgpt.data.tokenizer import train_char
from jaxgpt.errors import UserError
from jaxgpt.files import write_json
from jaxgpt.losses import kl
from jaxgpt.models import sharding, transformer
from jaxgpt.rlhf import ppo
from jaxgpt.rlhf.ppo import PPOConfig
from jaxgpt.runs.cli import cli
from jaxgpt.runs.process import cpu_kind
from jaxgpt.runs.run import Run
from jaxgpt.structs import Array, Batch, Params, Prompts
from jaxgpt.study import many
from jaxgpt.study.task import Task


@dataclasses.dataclass(frozen=True)
class Settings:
    """5 minutes on one CPU core; vmap of 4 runs is 1.24 x as fast as separate ones (docs/results.md)."""

    run: Path = Path("runs/bench_runs")
    model: ModelConfig = MODELS["tiny"]
    runs: Counts = (4,)  # at once
    batch: Count = 64  # answers per run and iteration
    prompt: Count = 16  # tokens
    ppo: PPOConfig = PPOConfig(new_tokens=40, temperature=0.7, epochs=2, minibatches=2)
    repeats: Count = 3
    seed: Seed = 0
    fresh: bool = True

    def __post_init__(self) -> None:
        check_settings(self)
        if not self.runs:
            raise UserError("runs is empty; give at least one number")


PRESETS = {
    "laptop": Settings(),
    "toy": Settings(
        model=MODELS["toy"], runs=(2,), batch=8, repeats=2, ppo=PPOConfig(new_tokens=8, epochs=1, minibatches=1)
    ),
    "gpu": Settings(runs=(1, 4, 16, 64), repeats=9),
}
SEPARATE = "separate"


def even_token_fraction(params: Params, rows: Batch) -> Array:
    """A reward that costs nothing: the fraction of even tokens."""
    return jnp.where(rows.mask_BT, rows.tokens_BT % 2 == 0, False).sum(1) / jnp.maximum(rows.mask_BT.sum(1), 1)


def iteration(s: Settings, task: Task, count: int, how: str) -> Callable[[], None]:
    """A function that runs one PPO iteration of `count` runs, continuing from its last call."""
    tx = many.make_ppo_optimizer(task, 1e-4, 1000)
    learn = many.make_ppo_learner(task, tx, even_token_fraction)
    program = many.OnPolicyTrainer(task, learn, tx, 1, s.batch, how="map" if how == "map" else "vmap")
    sample, update = program.programs
    groups, size = (count, 1) if how == SEPARATE else (1, count)
    start = ppo.init(task.policy, task.start, tx, {}).replace(frozen={})  # type: ignore[attr-defined]
    states = [many.shard_runs(many.stack_trees([start] * size), task.mesh) for _ in range(groups)]
    controls = [many.stack_trees([kl.FixedKL(jnp.float32(0.1))] * size) for _ in range(groups)]
    tokens = jnp.asarray(np.broadcast_to(task.prompts[0], (size, s.batch, s.prompt)), jnp.int32)
    prompts = Prompts(tokens, jnp.full((size, s.batch), s.prompt, jnp.int32))
    keys = jax.random.split(jax.random.key(s.seed), size)
    score = jnp.zeros((size, s.batch))

    def once() -> None:
        for n in range(groups):
            found = sample(states[n], task.start, prompts, keys)
            states[n], controls[n], _ = update(states[n], task.start, {}, controls[n], found, score, keys)
        jax.block_until_ready(states)

    return once


def main(settings: Settings) -> dict[str, Any]:
    s = settings
    with Run(s.run, s, stage="bench_runs", fresh=True) as run:
        params = transformer.init(jax.random.key(s.seed), s.model)
        prompt = [5 + i % 200 for i in range(s.prompt)]
        nothing = lambda texts: np.zeros(len(texts))  # noqa: E731
        task = Task(
            s.model,
            train_char(["ab"]),
            params,
            [prompt],
            [prompt],
            nothing,
            nothing,
            lambda ids, mask: "",
            3,
            s.ppo,
            sharding.data_mesh(),
        )
        found: dict[str, Any] = {}
        with run.progress(len(s.runs) * (s.repeats + 1), "turns") as bar:
            for count in s.runs:
                ways = {how: iteration(s, task, count, how) for how in (SEPARATE, "map", "vmap")}
                seconds: dict[str, list[float]] = {how: [] for how in ways}
                for _ in range(1 + s.repeats):  # the first one compiles
                    for how, once in ways.items():
                        began = time.perf_counter()
                        once()
                        seconds[how].append(time.perf_counter() - began)
                    bar.update()
                found[str(count)] = {how: all_[1:] for how, all_ in seconds.items()}
        device = jax.devices()[0].device_kind
        cores = f", {harness.cores()} cores ({cpu_kind()})" if jax.default_backend() == "cpu" else ""
        size = f"{s.model.parameters / 1e6:.2g}M"
        lines = [
            f"{jax.device_count()} x {device}{cores}, jax {jax.__version__}: PPO of {size} parameters, "
            f"{s.batch} answers of {s.ppo.new_tokens} tokens per run and iteration"
        ]
        lines += [f"{'runs':>5} {'way':<9} {'s per iteration of all':>24}   speed-up over separate runs (range)"]
        for runs_, ways_ in found.items():
            for how, times in ways_.items():
                gain = [a / b for a, b in zip(ways_[SEPARATE], times, strict=True)]
                shown = f"{statistics.median(gain):.2f} ({min(gain):.2f}-{max(gain):.2f})" if how != SEPARATE else ""
                lines.append(f"{runs_:>5} {how:<9} {statistics.median(times):>24.3f}   {shown}")
        for line in lines:
            run.say(line)
        (run.folder / "bench_runs.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        write_json(run.folder / "bench_runs.json", {"device": device, "seconds": found})
        run.finish({"device": device, "seconds": found})
        return run.results


if __name__ == "__main__":
    cli(main, Settings, PRESETS)
