"""How many labels, how noisy, and among how many answers? What PPO achieves, by what the annotator was asked.

    python -m experiments.studies.how_many_labels                after `make assistant`
    python -m experiments.studies.how_many_labels --people runs/label/votes.sqlite:train --run runs/mine

The simulated annotator labels parts of one pool of the finetuned model's answers. Each condition trains a reward model
and then PPO, all else being equal: more labels; noisier labels; and 2, 4 or 8 answers to choose from, where the
annotator reads the same number of answers in total, so 8 answers per prompt leave a quarter of the prompts that 2 do.
`people` adds a condition: votes from `make label`, or preferences in any other format.
"""

import dataclasses
import functools
from pathlib import Path
from typing import Annotated, Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxgpt import losses
from jaxgpt.config import Count, Counts, Nonnegative, Positive, Positives, Range, Seed, check_settings
from jaxgpt.data import formats, pipelines
from jaxgpt.data.comparisons import TokenizedPreference
from jaxgpt.errors import UserError
from jaxgpt.files import cache_root
from jaxgpt.losses import kl
from jaxgpt.rlhf.annotator import SimulatedAnnotator
from jaxgpt.rlhf.intervals import HOW_TO_READ, summarise_seeds
from jaxgpt.rlhf.ppo import PPOConfig
from jaxgpt.runs import pages
from jaxgpt.runs.cli import cli
from jaxgpt.runs.progress import Bar
from jaxgpt.runs.run import Run, run_fingerprint
from jaxgpt.structs import Batch, Params
from jaxgpt.study import figures, many, methods, results
from jaxgpt.study.cells import ResultCache, run_study
from jaxgpt.study.results import Point
from jaxgpt.study.task import (
    Evaluation,
    Task,
    answer_examples,
    distinct_prompts,
    evaluate_policies,
    evaluate_policy,
    make_reviews_task,
    reward_scores,
    sample_task_answers,
)


@dataclasses.dataclass(frozen=True)
class Settings:
    """24 minutes on one CPU core: gold reward 0.20 from 40 labels, 0.41 from 640 (docs/results.md)."""

    PLACE_FIELDS: ClassVar[tuple[str, ...]] = ("start",)

    run: Path = Path("runs/how_many_labels")
    start: Path = Path("runs/assistant/sft")
    pool: Count = 640  # prompts, with 8 answers each
    heldout: Count = 100  # more such prompts, on which reward models are tested
    labels: Counts = (40, 160, 640)  # choices among 4 answers, at the annotator's usual noise
    noise_temperatures: Positives = (0.03, 0.6)  # temperatures of the annotator, besides the usual one
    noise_labels: Count = 640
    answers_read: Count = 1280  # answers the annotator reads in total where the number per prompt varies
    people: str = ""  # a file or database of people's preferences on these prompts
    annotator: SimulatedAnnotator = SimulatedAnnotator()
    learning_rate: Positive = 5e-4
    label_batch: Count = 8
    beta: Nonnegative = 0.15
    iterations: Count = 16
    batch: Count = 64
    ppo: PPOConfig = PPOConfig(new_tokens=40, temperature=0.7, epochs=2, minibatches=2)
    ppo_learning_rate: Positive = 5e-4
    seeds: Count = 2
    prompts: Annotated[int, Range(2)] = 300  # held out, on which policies are measured
    how: many.RunMapping = "vmap"
    seed: Seed = 51
    cache: Path = cache_root() / "data"
    fresh: bool = False

    def __post_init__(self) -> None:
        check_settings(self)
        if not self.labels:
            raise UserError("labels is empty; give at least one number")
        if max(*self.labels, self.noise_labels, self.answers_read) > 2 * self.pool or self.answers_read % 8:
            raise UserError(
                f"labels, noise_labels and answers_read must be at most twice the pool of {self.pool} prompts, and "
                "answers_read a multiple of 8"
            )
        if min(*self.labels, self.noise_labels, self.answers_read // 8) < self.label_batch:
            raise UserError(f"each condition needs at least label_batch = {self.label_batch} labels")


PRESETS = {
    "laptop": Settings(),
    "toy": Settings(
        pool=16,
        heldout=8,
        labels=(8,),
        noise_temperatures=(0.6,),
        noise_labels=8,
        answers_read=32,
        iterations=2,
        batch=8,
        label_batch=4,
        seeds=1,
        prompts=12,
        ppo=PPOConfig(new_tokens=12, temperature=0.7, epochs=1, minibatches=1),
    ),
    "gpu": Settings(
        pool=2500,
        labels=(40, 160, 640, 2500, 5000),
        noise_temperatures=(0.03, 0.3, 0.6, 1.2),
        noise_labels=2500,
        answers_read=4800,
        iterations=60,
        batch=256,
        seeds=6,
        prompts=900,
    ),
}


@dataclasses.dataclass(frozen=True)
class Condition:
    """What the annotator is asked: how many choices, among how many answers, with how much noise."""

    group: str
    label: str
    choices: int
    candidates: int
    temperature: float


def make_conditions(s: Settings) -> list[Condition]:
    usual = s.annotator.temperature
    found = [Condition("labels", f"{n}", n, 4, usual) for n in s.labels]
    temperatures = sorted({*s.noise_temperatures, usual})
    found += [Condition("noise", f"{t:g}", s.noise_labels, 4, t) for t in temperatures]
    return found + [Condition("answers to choose from", f"{b}", s.answers_read // b, b, usual) for b in (2, 4, 8)]


def pool_prompts(s: Settings, task: Task) -> list[list[int]]:
    """The distinct prompts of the pool, then those held out."""
    order = np.random.default_rng(s.seed).permutation(len(task.prompts))
    return distinct_prompts((task.prompts[i] for i in order), s.pool + s.heldout)


def leave_out_measured(s: Settings, task: Task, people: list[TokenizedPreference]) -> list[TokenizedPreference]:
    """People's preferences, without those about prompts on which reward models or policies are measured."""
    measured = set(map(tuple, pool_prompts(s, task)[s.pool :] + task.heldout))
    return [one for one in people if one.prompt not in measured]


def make_pool(s: Settings, task: Task) -> dict[str, Any]:
    """Sample 8 answers per prompt, in the pool and held out: rows of ids, and gold rewards [prompts, 8]."""
    ids = [prompt for prompt in pool_prompts(s, task) for _ in range(8)]
    answers = sample_task_answers(task, task.start, ids, jax.random.key(s.seed))
    return {"rows": answer_examples(answers), "gold": task.gold(answers.texts).reshape(-1, 8)}


def label_pool(s: Settings, pool: dict[str, Any], condition: Condition, seed: int) -> list[TokenizedPreference]:
    """The simulated annotator's choices under a condition: the first answers of every prompt, then (for more choices
    than prompts) the next ones."""
    rng, gold, b = np.random.default_rng([s.seed, seed]), np.array(pool["gold"]), condition.candidates
    annotator = dataclasses.replace(s.annotator, temperature=condition.temperature)
    places = [(prompt, part) for part in range(8 // b) for prompt in rng.permutation(s.pool)][: condition.choices]
    found = []
    for prompt, part in places:
        index = range(part * b, (part + 1) * b)
        choice = int(annotator.choose(gold[prompt, index][None], rng)[0])
        found.append(TokenizedPreference(tuple(tuple(pool["rows"][prompt * 8 + i]) for i in index), choice))
    return found


def agreement(s: Settings, task: Task, model: Params, pool: dict[str, Any]) -> float:
    """How often the reward model's favourite of 4 held-out answers is the one with the highest gold reward; where n
    have it, each counts 1 / n."""
    gold = np.array(pool["gold"])[s.pool :, :4]
    rows = [pool["rows"][(s.pool + n) * 8 + i] for n in range(len(gold)) for i in range(4)]
    longest = max(len(ids) for ids, _ in rows)
    arrays = pipelines.padded_examples(rows, longest, len(rows))[0]
    h = reward_scores(task, model, task.config, Batch(arrays["tokens"], arrays["mask"])).reshape(-1, 4)
    best = gold == gold.max(axis=1, keepdims=True)
    hits = losses.favourite_hits(jnp.asarray(h), jnp.asarray(best))
    return float((np.asarray(hits) / best.sum(axis=1)).mean())


def train_condition(
    s: Settings,
    task: Task,
    program: many.OnPolicyTrainer,
    rankings: list[list[TokenizedPreference]],
    pool: dict[str, Any],
    reference: Batch,
    bar: Bar,
) -> dict[str, Any]:
    """Train a reward model and then PPO from each seed's preferences."""
    seeds = [s.seed + n for n in range(s.seeds)]
    models = methods.train_reward_models(
        task.config,
        task.start,
        rankings,
        seeds,
        reference,
        task,
        learning_rate=s.learning_rate,
        batch=s.label_batch,
        first_spread=0.2,
        how=s.how,
        watch=many.make_progress_watch(bar, reward_loss="loss"),
    )
    policies, _ = program.train(
        [kl.FixedKL(jnp.float32(s.beta))] * s.seeds,
        seeds,
        [{"reward": model} for model in models],
        many.make_progress_watch(bar, "gold", "kl"),
    )
    each = zip(policies, models, strict=True)
    seen = [
        evaluate_policies(task, [policy], [n], s.seed, (model, task.config))[0]
        for n, (policy, model) in enumerate(each)
    ]
    return {"agreement": [agreement(s, task, model, pool) for model in models], "seen": seen}


def study(s: Settings, run: Run, cells: ResultCache) -> dict[str, Any]:
    task, plan = make_reviews_task(s.start, s.cache, s.prompts, s.ppo), make_conditions(s)
    people: list[TokenizedPreference] = []
    if s.people:
        read = methods.load_rankings(task, Path(s.people), run.say)
        people = leave_out_measured(s, task, read)
        run.say(f"{s.people}: {len(read) - len(people)} left out, about prompts that are held out")
        plan.append(Condition("people", f"{len(people)} votes", len(people), 0, 0.0))
    reference = sample_task_answers(task, task.start, task.prompts[:256], jax.random.key(s.seed)).rows
    program = many.make_ppo_trainer(
        task, task.config, learning_rate=s.ppo_learning_rate, iterations=s.iterations, batch=s.batch, how=s.how
    )
    run.say(f"how_many_labels: {len(plan)} conditions, {s.seeds} seeds each")
    steps = {one: one.choices // s.label_batch + s.iterations for one in plan}
    groups: dict[str, list[Point]] = {}
    agreements: dict[str, list[list[float]]] = {}
    with run.progress(sum(steps.values()) + 1, "how_many_labels") as bar:
        pool = cells("pool", functools.partial(make_pool, s, task), 1, bar)
        start = Point("start", [evaluate_policy(task, task.start, jax.random.key(s.seed))])
        for one in plan:
            rankings = [people if one.group == "people" else label_pool(s, pool, one, n) for n in range(s.seeds)]
            make = functools.partial(train_condition, s, task, program, rankings, pool, reference, bar)
            name = f"{one.choices} of {one.candidates} at {one.temperature:g}"  # shared by several groups
            found = cells(name if one.group != "people" else "people", make, steps[one], bar)
            point = Point(one.label, [Evaluation.from_json(seen) for seen in found["seen"]])
            groups.setdefault(one.group, []).append(point)
            agreements.setdefault(one.group, []).append(found["agreement"])
            run.say(
                f"{one.group} {one.label}: gold {point['gold']}, KL {point['kl'].mean:.2f} nats, "
                f"picks the best {summarise_seeds(np.array(found['agreement']))}"
            )
    figures.plot_label_counts(s.run / "how_many_labels.png", groups, agreements, start)
    pages.write_page(
        s.run,
        "How many labels?",
        f"Gold reward of PPO on {s.prompts} held-out prompts, {s.seeds} seeds, "
        f"beta {s.beta:g}. {HOW_TO_READ} Labels come from a simulated annotator (VADER), at "
        f"temperature {s.annotator.temperature:g} unless stated otherwise.",
        [("", s.run / "how_many_labels.png"), ("All conditions", results.points_table(groups))],
    )
    return {"conditions": results.summarise_points(groups), "agreement": agreements}


def main(settings: Settings) -> dict[str, Any]:
    inputs = {"start": run_fingerprint(settings.start, "sft")}
    if settings.people:
        inputs["people"] = formats.fingerprint(Path(settings.people))
    return run_study("how_many_labels", settings, inputs, study)


if __name__ == "__main__":
    cli(main, Settings, PRESETS)
