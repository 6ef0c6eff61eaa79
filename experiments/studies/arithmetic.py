"""Verifiable rewards: RLOO, GRPO, its unbiased form and PPO on sums that a program checks.

    python -m experiments.studies.arithmetic                     self-contained: it trains its small model from scratch

Prompts are sums such as "37+85". A demonstration is a random number of dots followed by the result: "...122". Training
on them stops while most sums still come out wrong. Then each method learns from sampled answers and a host function
that reads the number after the dots: 1 if it is right, otherwise 0. The held-out sums are never trained on, nor are
their mirrors ("85+37").

The dots mean nothing, so any change in their number is the method's doing. GRPO (Shao et al. 2024) divides an answer's
loss by its length and a group's advantages by their standard deviation. Liu et al. (2025) showed both to be biases: a
long wrong answer is penalised less per token than a short one, so wrong answers grow; and groups in which nearly all
answers are right, or wrong, weigh more than the reward alone would make them. `centre_scores` is GRPO without either;
RLOO is that times C / (C - 1), which Adam cancels except for clipping; PPO has a critic in place of a group.
"""

import collections
import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxgpt.config import Count, ModelConfig, Nonnegative, Positive, Range, Seed, check_settings
from jaxgpt.data.tokenizer import Tokenizer, train_char
from jaxgpt.errors import UserError
from jaxgpt.losses import kl
from jaxgpt.models import sharding, transformer
from jaxgpt.rlhf import group_policy
from jaxgpt.rlhf.intervals import HOW_TO_READ, SeedSummary, summarise_seeds
from jaxgpt.rlhf.ppo import Controller, PPOConfig
from jaxgpt.runs import pages
from jaxgpt.runs.cli import cli
from jaxgpt.runs.progress import Bar
from jaxgpt.runs.run import Run
from jaxgpt.structs import Array, Batch, Experience, Params
from jaxgpt.study import figures, many, sums
from jaxgpt.study.cells import ResultCache, run_study
from jaxgpt.study.task import Task, sample_task_answers
from jaxgpt.training import optim
from jaxgpt.training.step import Metrics, TrainState, make_nll


@dataclasses.dataclass(frozen=True)
class Settings:
    """Half an hour on one CPU core: from 44 % of the held-out sums to 71 % (groups) and 78 % (PPO), docs/results.md."""

    run: Path = Path("runs/arithmetic")
    model: ModelConfig = ModelConfig(layers=2, width=96, heads=4, block=32, vocab=384)
    largest_summand: Annotated[int, Range(9, 9999)] = 99  # largest summand
    max_dots: Count = 6  # per demonstration, at most
    heldout: Count = 500  # sums of pairs of numbers that are never trained on, in either order
    steps: Count = 3000  # of training on demonstrations, at most
    target_loss: Nonnegative = 0.48  # nats per token at which that training ends: about half of the sums come out right
    demonstrations: Count = 128  # per step
    learning_rate: Positive = 1e-3  # constant: if it decayed, RL's larger steps would undo what was learnt last
    iterations: Count = 300
    prompts: Count = 32  # per iteration
    group_size: Annotated[int, Range(2)] = 8  # answers per prompt, for the methods with groups
    ppo: PPOConfig = PPOConfig(new_tokens=14, temperature=1.0, epochs=1, minibatches=2, unfinished_score=0.0)
    rl_learning_rate: Positive = 3e-4
    methods: tuple[str, ...] = ()  # names from `group_policy.METHODS`, or "PPO"; none: all of them
    seeds: Count = 2
    how: many.RunMapping = "vmap"
    seed: Seed = 31
    fresh: bool = False

    def __post_init__(self) -> None:
        check_settings(self)
        pairs = (self.largest_summand + 1) * (self.largest_summand + 2) // 2
        if self.heldout >= pairs // 2:
            raise UserError(f"heldout is {self.heldout}; it must be less than half of the {pairs} pairs of numbers")
        if unknown := set(self.methods) - {*group_policy.METHODS, "PPO"}:
            raise UserError(f"unknown methods {sorted(unknown)}; choose from {[*group_policy.METHODS, 'PPO']}")


PRESETS = {
    "laptop": Settings(),
    "toy": Settings(
        model=ModelConfig(layers=1, width=32, heads=2, block=32, vocab=384),
        largest_summand=9,
        heldout=20,
        steps=8,
        demonstrations=16,
        iterations=3,
        prompts=4,
        group_size=2,
        seeds=1,
        methods=("GRPO", "PPO"),
    ),
    "gpu": Settings(
        model=ModelConfig(layers=4, width=256, heads=8, block=32, vocab=384),
        largest_summand=999,
        max_dots=6,
        heldout=2000,
        steps=3000,
        iterations=400,
        prompts=128,
        seeds=8,
    ),
}


def train_on_demonstrations(s: Settings, tok: Tokenizer, prompts: list[str], bar: Bar) -> Params:
    """Train a model from scratch on demonstrations, until its loss is `target_loss`. How many steps that takes varies:
    sums are learnt all of a sudden."""
    nats: collections.deque[float] = collections.deque(maxlen=20)

    def watch(i: int, found: dict[str, np.ndarray]) -> None:
        nats.append(float(found["loss"].mean()))
        bar.update(nats=nats[-1])

    def batches() -> Iterator[Batch]:
        endless = sums.demonstration_batches(prompts, tok, s.max_dots, s.demonstrations, s.seed)
        for left in range(s.steps, 0, -1):
            if len(nats) == nats.maxlen and np.mean(nats) < s.target_loss:
                return bar.update(left)
            yield jax.tree.map(lambda x: x[None], next(endless))

    params = transformer.init(jax.random.key(s.seed), s.model)
    tx = optim.adamw(optim.warmup_cosine(s.learning_rate, s.steps, s.steps // 10, final=1.0), weight_decay=0.0)
    (params,) = many.train_runs(make_nll(s.model), tx, [params], {}, batches(), sharding.data_mesh(), watch)
    return params


def learn_by_ppo(task: Task, tx: Any) -> many.LearnFn:
    """PPO with its critic, plus the lengths among its metrics."""
    inner = many.make_ppo_learner(task, tx)

    def learn(
        state: TrainState, control: Controller, experience: Experience, score_B: Array, key: Array
    ) -> tuple[TrainState, Controller, Metrics]:
        state, control, metrics = inner(state, control, experience, score_B, key)
        return state, control, {**metrics, **group_policy.length_metrics(experience.rows, score_B)}

    return learn


def train_method(s: Settings, task: Task, name: str, bar: Bar) -> dict[str, Any]:
    """Train one method, all seeds at once: curves [seeds, iterations], and which held-out sums each policy solves."""
    critic = name == "PPO"
    steps = s.iterations * (s.ppo.epochs * s.ppo.minibatches if critic else 1)
    tx = optim.adam_tf(optim.linear_to_zero(s.rl_learning_rate, steps, steps // 25))
    method = group_policy.METHODS.get(name)
    learn = learn_by_ppo(task, tx) if method is None else group_policy.learn(task.policy, tx, method, s.group_size)
    program = many.OnPolicyTrainer(
        task,
        learn,
        tx,
        s.iterations,
        s.prompts * s.group_size,
        1 if critic else s.group_size,
        sums.correctness_rewards,
        s.how,
    )
    policies, curves = program.train(
        [kl.FixedKL(jnp.float32(0.0))] * s.seeds,
        [s.seed + n for n in range(s.seeds)],
        watch=many.make_progress_watch(bar, solved="gold", tokens_="length"),
    )
    heldout = [sample_task_answers(task, policy, task.heldout, jax.random.key(s.seed)) for policy in policies]
    kept = (
        "gold",
        "entropy",
        "length",
        "length_right",
        "length_wrong",
        *(f"weight_{n}" for n in range(1, s.group_size)),
    )
    return {
        "curves": {name: curves[name].T for name in kept if name in curves},
        "solved": [sums.correctness_rewards(one.texts) for one in heldout],
        "texts": heldout[0].texts[:8],
    }


ENDS = ("length_right", "length_wrong", "entropy")  # curves whose last iterations are reported


def measure_end(one: dict[str, Any], first: dict[str, Any]) -> dict[str, SeedSummary]:
    """What a method solves and how that differs from the first method's, paired by seed and sum; and each seed's mean
    over its last 5 iterations of the lengths and the entropy."""
    solved_SN = np.array(one["solved"])
    curves = {name: [figures.running_mean([own], 9)[-1] for own in one["curves"][name]] for name in ENDS}
    return {
        "solved": summarise_seeds(solved_SN),
        "difference": summarise_seeds(solved_SN - np.array(first["solved"])),
        **{name: summarise_seeds(np.array(values)) for name, values in curves.items()},
    }


def study(s: Settings, run: Run, cells: ResultCache) -> dict[str, Any]:
    tok, prompts = train_char([sums.CHARACTERS]), sums.split_sums(s.largest_summand, s.heldout, s.seed)
    if tok.vocab_size > s.model.vocab:
        raise UserError(f"model.vocab is {s.model.vocab}; set at least {tok.vocab_size}, which the characters need")
    methods = s.methods or (*group_policy.METHODS, "PPO")
    with run.progress(s.steps + len(methods) * s.iterations, "arithmetic") as bar:
        start, _ = cells.model(
            "start", lambda: (train_on_demonstrations(s, tok, prompts[0], bar), s.model), s.steps, bar
        )
        task = sums.make_sums_task(s.model, start, tok, prompts, s.ppo)
        answers = sample_task_answers(task, task.start, task.heldout, jax.random.key(s.seed))
        before = summarise_seeds(sums.correctness_rewards(answers.texts)[None])
        run.say(f"arithmetic: {before} of the {s.heldout} held-out sums solved after demonstrations")
        found = {
            name: cells(name, functools.partial(train_method, s, task, name, bar), s.iterations, bar)
            for name in methods
        }
    figures.plot_arithmetic(s.run / "arithmetic.png", found, s.group_size)
    ends = {name: measure_end(one, next(iter(found.values()))) for name, one in found.items()}
    first = methods[0]
    rows = [["demonstrations alone", str(before), "", "", "", ""]]
    for name, end in ends.items():
        values = [end["solved"].text(), "" if name == first else end["difference"].text()]
        rows.append([name, *values, *(f"{end[k].mean:.2f}" for k in ENDS)])
        run.say(
            f"{name}: solved {values[0]}; minus {first}'s, paired: {values[1] or '-'}; "
            + ", ".join(f"{k} {end[k].text(2)}" for k in ENDS)
        )
    texts = zip(*(one["texts"] for one in found.values()), strict=True)
    pages.write_page(
        s.run,
        "Sums that a program checks",
        f"{s.heldout} held-out sums, whose mirrors are not trained on either, {s.seeds} seeds; every method learns "
        f"from {s.prompts * s.group_size} answers at a time. {HOW_TO_READ}",
        [
            ("", s.run / "arithmetic.png"),
            (
                "At the end",
                pages.make_table(
                    (
                        "method",
                        "held-out sums solved",
                        f"minus {first}'s, paired by seed and sum",
                        "tokens, right",
                        "tokens, wrong",
                        "entropy, nats",
                    ),
                    rows,
                ),
            ),
            ("Answers", pages.make_table(tuple(found), list(texts))),
        ],
    )
    return {"before": before, "split": "pairs of numbers", "methods": ends}


def main(settings: Settings) -> dict[str, Any]:
    return run_study("arithmetic", settings, {}, study)


if __name__ == "__main__":
    cli(main, Settings, PRESETS)
