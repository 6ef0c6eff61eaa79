"""The DPO paper's comparison: continue film reviews positively (Rafailov et al. 2023, section 6.1).

    python -m experiments.studies.imdb                           after `make assistant` (its `pretrain` writes reviews)

Prompts are the first 2 to 8 tokens of IMDb reviews. The true reward is a sentiment classifier fitted on people's labels
(the log-odds of "positive"); four continuations of each prefix give six pairs, which it labels without noise. One
frontier of true reward against KL compares PPO on the true reward, PPO on a reward model learnt from the pairs, DPO on
the pairs, finetuning on the preferred ones, and best-of-n by the learned reward. VADER, which no method learns from, is
the independent check.

What must be new is the prefix: no held-out prefix is among those trained on, and the reward model is
tested on pairs of prefixes that none of its own pairs has. Every method learns from the same pairs.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, ClassVar

import jax
import numpy as np

from jaxgpt.config import Count, Positive, Positives, Range, Seed, check_settings
from jaxgpt.data import sources
from jaxgpt.data.comparisons import TokenizedPreference
from jaxgpt.files import cache_root
from jaxgpt.models import sharding
from jaxgpt.rlhf.annotator import gold_scores
from jaxgpt.rlhf.intervals import HOW_TO_READ
from jaxgpt.rlhf.judge import Judge, fit_judge
from jaxgpt.rlhf.ppo import PPOConfig
from jaxgpt.runs import pages
from jaxgpt.runs.cli import cli
from jaxgpt.runs.progress import Bar
from jaxgpt.runs.run import Run, run_fingerprint
from jaxgpt.runs.saved_model import load_language_model
from jaxgpt.study import figures, frontier, many, methods, results
from jaxgpt.study.cells import ResultCache, run_study
from jaxgpt.study.frontier import FrontierSetup
from jaxgpt.study.task import RewardModel, Task, answer_examples, distinct_prompts, sample_task_answers


@dataclasses.dataclass(frozen=True)
class Settings:
    """Half an hour on one CPU core; PPO on the true reward is best, DPO next (docs/results.md)."""

    PLACE_FIELDS: ClassVar[tuple[str, ...]] = ("start",)

    run: Path = Path("runs/imdb")
    start: Path = Path("runs/assistant/pretrain")
    prefixes: Count = 500  # whose continuations are compared, to learn from
    heldout: Count = 100  # more such prefixes, on which the reward model is tested
    candidates: Annotated[int, Range(2)] = 4
    betas: Positives = (0.05, 0.15, 0.5)  # of PPO, in standard deviations of the reward per nat
    dpo_betas: Positives = (0.03, 0.1, 0.3, 1.0)
    seeds: Count = 2
    iterations: Count = 24
    batch: Count = 64
    ppo: PPOConfig = PPOConfig(new_tokens=32, temperature=1.0, epochs=2, minibatches=2, unfinished_score=None)
    learning_rate: Positive = 5e-4
    pair_batch: Count = 32
    reward_learning_rate: Positive = 5e-4
    dpo_learning_rate: Positive = 2e-4
    best_of: Annotated[int, Range(2)] = 32
    prompts: Annotated[int, Range(2)] = 300  # held-out prefixes, on which policies are measured
    how: many.RunMapping = "vmap"
    seed: Seed = 41
    cache: Path = cache_root() / "data"
    fresh: bool = False

    def __post_init__(self) -> None:
        check_settings(self)


PRESETS = {
    "laptop": Settings(),
    "toy": Settings(
        prefixes=12,
        betas=(0.1,),
        dpo_betas=(0.1,),
        seeds=1,
        iterations=2,
        batch=8,
        heldout=4,
        pair_batch=8,
        best_of=4,
        prompts=12,
        ppo=PPOConfig(new_tokens=8, epochs=1, minibatches=1, unfinished_score=None),
    ),
    "gpu": Settings(
        prefixes=8000,
        betas=(0.02, 0.05, 0.1, 0.2, 0.5),
        dpo_betas=(0.01, 0.03, 0.1, 0.3, 1.0),
        seeds=6,
        iterations=100,
        batch=256,
        heldout=500,
        best_of=128,
        prompts=900,
    ),
}


def log_odds(judge: Judge, texts: Any) -> np.ndarray:
    """log P(positive) / P(negative), with a spread of about one."""
    p = np.clip(judge.positive_probability(texts), 1e-6, 1 - 1e-6)
    return np.log(p / (1 - p))


def make_task(s: Settings) -> Task:
    """Prefixes of reviews; the classifier reads prefix and continuation together."""
    start, config, tok, _ = load_language_model(s.start)
    labelled = (
        sources.labelled_reviews(sources.EMBEDDED, split, s.cache, ("imdb", "rt")) for split in ("train", "test")
    )
    judge = fit_judge(*labelled)
    rng = np.random.default_rng(s.seed)

    def prefixes(split: sources.Split) -> Iterator[list[int]]:
        texts = sources.documents(sources.EMBEDDED, split, s.cache)
        for i in rng.permutation(len(texts)):
            yield [*tok.template.begin, *tok.encode(texts[i][:200])[: int(rng.integers(2, 9))]]

    mesh = sharding.data_mesh()
    train = list(itertools.islice(prefixes("train"), max(4000, 2 * (s.prefixes + s.heldout))))
    return Task(
        config,
        tok,
        sharding.replicate(start, mesh),
        train,
        distinct_prompts(prefixes("test"), s.prompts, train),
        functools.partial(log_odds, judge),
        gold_scores,
        lambda ids, mask: tok.decode(ids),
        tok.template.separator,
        s.ppo,
        mesh,
    )


def make_pairs(s: Settings, task: Task) -> dict[str, list[list[Any]]]:
    """All pairs of continuations of each prefix, the better one first: [[tokens, roles], [tokens, roles]]. Those
    "heldout" are of other prefixes than those of "train"."""
    prefixes = distinct_prompts(task.prompts, s.prefixes + s.heldout)
    ids = [row for row in prefixes for _ in range(s.candidates)]
    answers = sample_task_answers(task, task.start, ids, jax.random.key(s.seed))
    gold = task.gold(answers.texts)
    rows = answer_examples(answers)
    found: dict[str, list[list[Any]]] = {"train": [], "heldout": []}
    for n in range(len(prefixes)):
        for i, j in itertools.combinations(range(n * s.candidates, (n + 1) * s.candidates), 2):
            if gold[i] != gold[j]:
                pair = [rows[i], rows[j]] if gold[i] > gold[j] else [rows[j], rows[i]]
                found["train" if n < s.prefixes else "heldout"].append(pair)
    order = np.random.default_rng(s.seed).permutation(len(found["train"]))
    return {**found, "train": [found["train"][i] for i in order]}


def train_reward_model(s: Settings, task: Task, rankings: list[TokenizedPreference], bar: Bar) -> RewardModel:
    """Train the reward model on these pairs."""
    reference = sample_task_answers(task, task.start, task.prompts[:256], jax.random.key(s.seed)).rows
    (params,) = methods.train_reward_models(
        task.config,
        task.start,
        [rankings],
        [s.seed],
        reference,
        task,
        batch=s.pair_batch,
        learning_rate=s.reward_learning_rate,
        first_spread=0.2,
        watch=many.make_progress_watch(bar, reward_loss="loss"),
    )
    return params, task.config


def ppo_on_true_reward(s: Settings, start: FrontierSetup) -> frontier.Settings:
    """PPO on the true reward, on the reward model's scale: mean 0 and standard deviation 1 at the start."""
    gold = start.task.gold(
        sample_task_answers(start.task, start.task.start, start.task.prompts[:256], jax.random.key(s.seed)).texts
    )
    tx = many.make_ppo_optimizer(start.task, s.learning_rate, s.iterations)
    program = many.OnPolicyTrainer(
        start.task,
        many.make_ppo_learner(start.task, tx),
        tx,
        s.iterations,
        s.batch,
        how=s.how,
        host=lambda texts: (start.task.gold(texts) - gold.mean()) / gold.std(),
    )
    return start.on_policy(program, s.betas)


def parts(s: Settings, rankings: int) -> frontier.MethodRuns:
    """Every method with its settings, and the number of steps it takes with that many pairs."""
    steps = rankings // s.pair_batch
    fit: dict[str, Any] = {"learning_rate": s.dpo_learning_rate, "batch": s.pair_batch}
    ppo: dict[str, Any] = {"learning_rate": s.learning_rate, "iterations": s.iterations, "batch": s.batch}
    return {
        "PPO, true reward": (functools.partial(ppo_on_true_reward, s), s.iterations),
        "PPO, learned reward": (lambda start: start.ppo(s.betas, **ppo), s.iterations),
        "DPO": (lambda start: start.dpo(s.dpo_betas, **fit), steps),
        "finetuned on preferred": (lambda start: start.favourites([1], **fit), steps),
        "best of n, learned reward": (lambda start: start.best_of(s.best_of), 1),
        "start": (FrontierSetup.itself, 0),
    }


def study(s: Settings, run: Run, cells: ResultCache) -> dict[str, Any]:
    task = make_task(s)
    with run.progress(1, "imdb, pairs") as bar:
        made = cells("pairs", functools.partial(make_pairs, s, task), 1, bar)
    rankings, held = (
        [TokenizedPreference(tuple((ids, roles) for ids, roles in pair), 0) for pair in made[split]]
        for split in ("train", "heldout")
    )
    every, steps = parts(s, len(rankings)), len(rankings) // s.pair_batch
    with run.progress(steps + frontier.total_steps(every), "imdb") as bar:
        params, config = cells.model(
            "reward", functools.partial(train_reward_model, s, task, rankings, bar), steps, bar
        )
        proxy = sharding.replicate(params, task.mesh), config
        agreement = methods.heldout_metrics(task, config, proxy[0], held)
        run.say(
            f"imdb: {len(rankings):,} pairs of {s.prefixes} prefixes; of those of {s.heldout} others the reward model "
            f"predicts {agreement}"
        )
        found = frontier.run_methods(every, FrontierSetup(task, proxy, rankings, s.seeds, s.seed, s.how, bar), cells)
    points = results.read_points(found)
    measures = {"gold": "true reward, log-odds of positive", "judge": "VADER, which no method learnt from"}
    figures.plot_frontier(s.run / "imdb.png", points, measures)
    prompts = [task.tok.show(ids) for ids in task.heldout[:6]]
    pages.write_page(
        s.run,
        "Positive reviews",
        f"{s.prompts} held-out prefixes of 2 to 8 tokens, none of them trained on, {s.seeds} seeds; "
        f"{len(rankings):,} pairs, the same for every method. On pairs of {s.heldout} other prefixes the reward model "
        f"predicts {agreement}. The true reward is a classifier fitted on people's labels. {HOW_TO_READ}",
        [
            ("", s.run / "imdb.png"),
            ("All points", results.points_table(points)),
            ("Continuations", results.answers_html(prompts, results.collect_first_answers(points))),
        ],
    )
    results.say_points(run.say, points)
    return {
        "split": "prefixes",
        "pairs": len(rankings),
        "accuracy": agreement.accuracy,
        "accuracy_interval": agreement.accuracy_interval,
        "heldout_pairs": agreement.choices,
        "heldout_prefixes": agreement.prompts,
        "points": results.summarise_points(points),
    }


def main(settings: Settings) -> dict[str, Any]:
    return run_study("imdb", settings, {"start": run_fingerprint(settings.start, "pretrain")}, study)


if __name__ == "__main__":
    cli(main, Settings, PRESETS)
