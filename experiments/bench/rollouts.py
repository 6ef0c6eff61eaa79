"""Benchmark: sampling a queue of answers by continuous batching, against batches that wait for their longest answer.

    python -m experiments.bench.rollouts

A random model, whose answers end with the same probability at every token: lengths are geometric, with a mean of
`mean_length` before they are cut off at `new_tokens`. Three ways take turns in one process: `generate` in batches of
`slots` ("padded"), which runs all its steps; `generate_until` ("until"), which stops with the longest answer; and
`engine.drain` for each of `refill`. Ratios of time to "padded" are computed turn by turn.
"""

import dataclasses
import functools
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench import harness
from jaxgpt import decoding
from jaxgpt.config import PRESETS as MODELS
from jaxgpt.config import Count, Counts, ModelConfig, Seed, check_settings
from jaxgpt.decoding import engine
from jaxgpt.errors import UserError
from jaxgpt.files import write_json
from jaxgpt.models import transformer
from jaxgpt.runs.cli import cli
from jaxgpt.runs.process import cpu_kind, versions
from jaxgpt.runs.run import Run
from jaxgpt.runs.settings import settings_to_json
from jaxgpt.structs import Answers, Array, Prompts


@dataclasses.dataclass(frozen=True)
class Settings:
    """Sizes of the queue and its answers."""

    run: Path = Path("runs/bench_rollouts")
    model: ModelConfig = dataclasses.replace(MODELS["tiny"], block=256)
    slots: Count = 16
    queue: Count = 8  # prompts per slot
    prompt: Count = 16  # tokens
    new_tokens: Count = 128
    mean_length: Count = 32  # tokens
    refill: Counts = (1, 2, 4)  # slots that are refilled at once
    repeats: Count = 5
    seed: Seed = 0
    fresh: bool = True

    def __post_init__(self) -> None:
        check_settings(self)
        if self.mean_length < 2:
            raise UserError(f"mean_length is {self.mean_length}; it must be at least 2")


PRESETS = {
    "laptop": Settings(),
    "toy": Settings(model=MODELS["toy"], slots=4, queue=2, new_tokens=16, mean_length=4, refill=(1,), repeats=2),
    "gpu": Settings(model=MODELS["gpt2"], slots=256, prompt=64, new_tokens=512, mean_length=128, refill=(8, 32, 64)),
}
STOP, PADDED, UNTIL = 3, "padded", "until"
Way = Callable[[Array], tuple[int, int]]  # a key -> tokens sampled, steps taken


def end_with_probability(p: float, logits: Array) -> Array:
    """Logits of which the stop token has probability p."""
    others = jnp.where(jnp.arange(logits.shape[-1]) == STOP, -jnp.inf, logits)
    stop = jax.nn.logsumexp(others, axis=-1, keepdims=True) + math.log(p / (1.0 - p))
    return jnp.where(jnp.isinf(others), stop, logits)


def make_ways(s: Settings) -> dict[str, Way]:
    """Each way of sampling the whole queue."""
    Q, end = s.slots * s.queue, functools.partial(end_with_probability, 1.0 / s.mean_length)
    params = jax.jit(decoding.prepare, static_argnums=1)(transformer.init(jax.random.key(s.seed), s.model), s.model)
    tokens_QP = np.random.default_rng(s.seed).integers(4, s.model.vocab, (Q, s.prompt)).astype(np.int32)
    prompts = Prompts(jnp.asarray(tokens_QP), jnp.full(Q, s.prompt))
    how = {"new_tokens": s.new_tokens, "stop": STOP, "filter_logits": end}
    names = ("new_tokens", "stop", "filter_logits")

    def in_batches(generate: Callable[..., Answers]) -> Way:
        program = jax.jit(generate, static_argnums=1, static_argnames=names)

        def run(key: Array) -> tuple[int, int]:
            lengths = []
            for n in range(s.queue):
                part = jax.tree.map(lambda x, n=n: x[n * s.slots : (n + 1) * s.slots], prompts)
                part_key = jax.random.fold_in(key, n)
                lengths.append(program(params, s.model, part.tokens_BP, part.length_B, part_key, **how).length_B)
            found = np.array(lengths)
            steps = s.new_tokens * s.queue if generate is decoding.generate else found.max(1).sum()
            return int(found.sum()), int(steps)

        return run

    def drained(refill: int) -> Way:
        program = jax.jit(engine.drain, static_argnums=0, static_argnames="refill")
        one = engine.Engine(s.model, s.slots, s.prompt, s.new_tokens, STOP, filter_logits=end)

        def run(key: Array) -> tuple[int, int]:
            found = program(one, params, prompts, key, refill=refill)
            return int(found.answers.length_B.sum()), int(found.steps.max())

        return run

    batches = {PADDED: in_batches(decoding.generate), UNTIL: in_batches(decoding.generate_until)}
    return batches | {f"drain, R = {refill}": drained(refill) for refill in s.refill}


def table(s: Settings, seconds: dict[str, list[float]], counts: dict[str, list[tuple[int, int]]]) -> list[str]:
    """The results as lines of text."""
    lines = [f"{'way':<15}{'steps':>8}{'answer tokens/s':>18}{'seconds':>10}   time relative to padded (range)"]
    for way, times in seconds.items():
        ratio = [a / b for a, b in zip(times, seconds[PADDED], strict=True)]
        steps = statistics.mean(steps for _, steps in counts[way])
        rate = sum(tokens for tokens, _ in counts[way]) / sum(times)
        shown = f"{statistics.median(ratio):.2f} ({min(ratio):.2f}-{max(ratio):.2f})"
        lines.append(f"{way:<15}{steps:>8,.0f}{rate:>18,.0f}{statistics.median(times):>10.2f}   {shown}")
    return lines


def main(settings: Settings) -> dict[str, Any]:
    s = settings
    with Run(s.run, s, stage="bench_rollouts", fresh=True) as run:
        ways = make_ways(s)
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        counts: dict[str, list[tuple[int, int]]] = {way: [] for way in ways}
        with run.progress(1 + s.repeats, "turns") as bar:
            for turn in range(1 + s.repeats):  # the first one compiles
                for way, sample in ways.items():
                    began = time.perf_counter()
                    counts[way].append(sample(jax.random.fold_in(jax.random.key(s.seed), turn)))
                    seconds[way].append(time.perf_counter() - began)
                bar.update()
        measured = {way: times[1:] for way, times in seconds.items()}
        after = {way: found[1:] for way, found in counts.items()}
        device = jax.devices()[0].device_kind
        cores = f", {harness.cores()} cores ({cpu_kind()})" if jax.default_backend() == "cpu" else ""
        machine = {"processor": cpu_kind(), "cores": harness.cores(), "versions": versions()}
        lines = [
            f"{device}{cores}, jax {jax.__version__}: {s.model.parameters / 1e6:.2g}M parameters, {s.slots * s.queue} "
            f"prompts of {s.prompt} tokens, {s.slots} slots, up to {s.new_tokens} new tokens, mean {s.mean_length}",
            *table(s, measured, after),
        ]
        for line in lines:
            run.say(line)
        (run.folder / "bench_rollouts.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        found = {
            "device": device,
            "machine": machine,
            "settings": settings_to_json(s),
            "seconds": measured,
            "tokens_and_steps": after,
        }
        write_json(run.folder / "bench_rollouts.json", found)
        return run.finish(found)


if __name__ == "__main__":
    cli(main, Settings, PRESETS)
