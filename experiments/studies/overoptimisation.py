"""Overoptimisation: what happens to the gold reward when a learned one is optimised too far (Gao et al. 2022).

    python -m experiments.studies.overoptimisation               after `make assistant`

Reward models of several sizes, and from several numbers of labels, are trained on the simulated annotator's noisy
choices. Each is then optimised far past its usefulness: by best-of-n, and by PPO without any KL penalty. With
d = sqrt(KL to the start), Gao et al. found for the gain R in gold reward

    best-of-n   R(d) = d (alpha - beta d)          RL   R(d) = d (alpha - beta log d)

Both are fitted here by least squares: best-of-n with 95 % intervals over prompts, which are resampled, PPO to each
seed's run, whose iterations depend on each other. beta > 0 means overoptimisation: the gold reward peaks, at
d = alpha / 2 beta and at log d = alpha / beta - 1. One more PPO run has a KL penalty, to see if that moves the frontier
or only stops on it.
"""

import dataclasses
import functools
from pathlib import Path
from typing import Annotated, Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxgpt.config import Count, Counts, ModelConfig, Nonnegative, Positive, Range, Seed, check_settings
from jaxgpt.data import pipelines, sources
from jaxgpt.data.comparisons import TokenizedPreference
from jaxgpt.data.streams import tokenize_stream
from jaxgpt.data.templates import example_ids
from jaxgpt.errors import UserError
from jaxgpt.files import cache_root
from jaxgpt.losses import kl
from jaxgpt.models import transformer
from jaxgpt.rlhf.intervals import HOW_TO_READ, best_of_n_kl_bound
from jaxgpt.rlhf.ppo import PPOConfig
from jaxgpt.rlhf.reward import HeldoutMetrics
from jaxgpt.runs import pages
from jaxgpt.runs.cli import cli
from jaxgpt.runs.progress import Bar
from jaxgpt.runs.run import Run
from jaxgpt.structs import Batch, Params
from jaxgpt.study import figures, laws, many, methods
from jaxgpt.study.cells import ResultCache, run_study, stage_fingerprints
from jaxgpt.study.task import (
    RewardModel,
    Task,
    best_of_n_sweep,
    evaluate_answers,
    make_reviews_task,
    reward_scores,
    sample_task_answers,
)
from jaxgpt.training import optim
from jaxgpt.training.step import make_nll


@dataclasses.dataclass(frozen=True)
class Settings:
    """31 minutes on one CPU core, 19 on two; poor reward models lead PPO astray, good ones do not (results.md)."""

    PLACE_FIELDS: ClassVar[tuple[str, ...]] = ("start",)

    run: Path = Path("runs/overoptimisation")
    start: Path = Path("runs/assistant")  # run folder whose sft, reward and preferences are used
    sizes: Annotated[tuple[tuple[int, int], ...], Range(1)] = ((1, 32), (2, 64))  # layers and width of smaller models
    labels: Counts = (160,)  # smaller numbers of preferences, for reward models of the policy's size
    steps: Annotated[int, Range(2)] = 400  # of pretraining a smaller model; finetuning takes half as many
    learning_rate: Positive = 5e-4  # of reward models
    label_batch: Count = 16
    best_of: Annotated[int, Range(4)] = 128  # answers per held-out prompt
    prompts: Annotated[int, Range(2)] = 100  # held out
    seeds: Count = 2  # of PPO, per reward model
    iterations: Count = 36
    batch: Count = 64
    ppo: PPOConfig = PPOConfig(new_tokens=40, temperature=0.7, epochs=2, minibatches=2)
    ppo_learning_rate: Positive = 1.1e-3
    penalty_beta: Nonnegative = 0.3  # beta of the run with a KL penalty, on the largest reward model and all labels
    how: many.RunMapping = "vmap"
    seed: Seed = 11
    cache: Path = cache_root() / "data"
    fresh: bool = False

    def __post_init__(self) -> None:
        check_settings(self)


PRESETS = {
    "laptop": Settings(),
    "toy": Settings(
        sizes=((1, 16),),
        labels=(8,),
        steps=4,
        label_batch=8,
        best_of=4,
        prompts=12,
        seeds=1,
        iterations=6,
        batch=8,
        ppo=PPOConfig(new_tokens=12, temperature=0.7, epochs=1, minibatches=1),
    ),
    "gpu": Settings(
        sizes=((1, 32), (2, 64), (3, 96)),
        labels=(50, 160, 500, 1000),
        steps=2000,
        best_of=1024,
        prompts=500,
        seeds=4,
        iterations=200,
        batch=256,
    ),
}


def train_smaller_model(s: Settings, task: Task, config: ModelConfig, bar: Bar) -> Params:
    """Train a language model of another size: pretrained and finetuned as the policy was, for `steps` and half that."""
    stream = tokenize_stream(sources.open_documents(sources.EMBEDDED, "train", s.cache), task.tok, s.cache)
    windows = pipelines.windows(stream, config.block, 16, seed=s.seed)
    pairs = [example_ids(task.tok, *pair) for pair in sources.examples(sources.EMBEDDED, "train", s.cache)]
    packed = pipelines.packed_examples(pipelines.fit_rows(pairs, config.block)[0], config.block, 16, seed=s.seed)
    params = transformer.init(jax.random.key(s.seed), config)
    for batches, steps, rate in ((windows, s.steps, 3e-3), (packed, s.steps // 2, 8e-4)):
        first = (jax.tree.map(lambda x: x[None], Batch.of(next(batches))) for _ in range(steps))
        tx = optim.adamw(optim.warmup_cosine(rate, steps, steps // 10))
        show = many.make_progress_watch(bar, smaller_model_nats="loss")
        (params,) = many.train_runs(make_nll(config), tx, [params], {}, first, task.mesh, show)
    return params


def plan_reward_models(s: Settings, config: ModelConfig, count: int) -> dict[str, tuple[ModelConfig, int]]:
    """{name: (size, labels)} of the reward models: every size with all labels, and the policy's size with fewer."""
    small = [
        dataclasses.replace(config, layers=layers, width=width, heads=max(1, width // 32)) for layers, width in s.sizes
    ]
    sizes = [(one, count) for one in small] + [(config, labels) for labels in (*s.labels, count)]
    return {f"{one.layers} x {one.width}, {labels} labels": (one, labels) for one, labels in sizes}


def reward_model(
    s: Settings, task: Task, rankings: list[TokenizedPreference], config: ModelConfig, reference: Batch, bar: Bar
) -> RewardModel:
    """Train a reward model of this size on these preferences."""
    start = task.start if config == task.config else train_smaller_model(s, task, config, bar)
    (params,) = methods.train_reward_models(
        config,
        start,
        [rankings],
        [s.seed],
        reference,
        task,
        learning_rate=s.learning_rate,
        batch=s.label_batch,
        first_spread=0.2,
        watch=many.make_progress_watch(bar, reward_loss="loss"),
    )
    return params, config


def train_by_ppo(
    s: Settings, program: many.OnPolicyTrainer, reward_params: Params, beta: float, bar: Bar
) -> dict[str, Any]:
    """Run PPO on one reward model, all seeds at once: curves [seeds, iterations] of the training answers."""
    _, curves = program.train(
        [kl.FixedKL(jnp.float32(beta))] * s.seeds,
        [s.seed + n for n in range(s.seeds)],
        [{"reward": reward_params}] * s.seeds,
        many.make_progress_watch(bar, "gold", "kl"),
    )
    return {name: curves[name].T for name in ("gold", "judge", "score", "kl", "length", "ended")}


def measure_best_of(s: Settings, task: Task, proxies: dict[str, RewardModel], bar: Bar) -> dict[str, Any]:
    """Best-of-n from one pool of answers for all reward models. "start" is each prompt's mean gold reward; each reward
    model has every n, its KL, and its measures, one number per prompt."""
    ids = [row for row in task.heldout for _ in range(s.best_of)]
    answers = sample_task_answers(task, task.start, ids, jax.random.key(s.seed))
    pool = evaluate_answers(task, task.start, answers, each=s.best_of)
    found: dict[str, Any] = {"start": pool.gold.mean(1)}
    for name, proxy in proxies.items():
        h = task.replace_unfinished(reward_scores(task, *proxy, answers.rows), answers.ended)
        best = best_of_n_sweep(dataclasses.replace(pool, proxy=h.reshape(pool.gold.shape)))
        sizes = [2 ** (k + 1) for k in range(len(best))]
        found[name] = {measure: [one[measure] for one in best.values()] for measure in ("gold", "judge", "proxy")}
        found[name] |= {"n": sizes, "kl": [one["kl"].mean() for one in best.values()]}
    bar.update()
    return found


def report(
    s: Settings, best: dict[str, Any], unpenalised: dict[str, Any], penalised: Any, accuracy: dict[str, HeldoutMetrics]
) -> Any:
    """Write overoptimisation.png and report.html; returns fits, accuracies and peaks."""
    start = np.array(best.pop("start"))
    fits: dict[str, dict[laws.Law, laws.LawFit]] = {
        name: {
            "best-of-n": laws.fit_best_of_n_law(np.array(best[name]["kl"]), np.array(best[name]["gold"]) - start),
            "RL": laws.fit_rl_law(
                np.array(unpenalised[name]["kl"]), np.array(unpenalised[name]["gold"]) - start.mean()
            ),
        }
        for name in best
    }
    figures.plot_overoptimisation(s.run / "overoptimisation.png", best, unpenalised, penalised, start.mean(), fits)
    rows, peaks = [], []
    for name, law in fits.items():
        numbers = [law[of][k].text() for of in law for k in ("alpha", "beta")]
        rows.append([name, str(accuracy[name]), *numbers])
        by_n, n, nats = np.array(best[name]["gold"]).mean(1) - start.mean(), best[name]["n"], best[name]["kl"][-1]
        gold, kls = (
            np.convolve(np.mean(unpenalised[name][x], axis=0), np.ones(5) / 5, "valid") for x in ("gold", "kl")
        )
        gold = gold - start.mean()
        ends = ", ".join(f"{np.mean(own[-5:]) - start.mean():.3f}" for own in unpenalised[name]["gold"])
        peaks.append(
            [
                name,
                f"{by_n.max():.3f} at n = {n[by_n.argmax()]}",
                f"{by_n[-1]:.3f}",
                f"{nats:.2f} (bound {best_of_n_kl_bound(n[-1]):.2f})",
                f"{gold.max():.3f} at {kls[gold.argmax()]:.1f} nats",
                f"{ends} at {kls[-1]:.1f} nats",
            ]
        )
    pages.write_page(
        s.run,
        "Overoptimisation",
        "Gold reward gained over the finetuned model (from VADER, whose noisy choices are the labels) against the "
        "distance sqrt(KL). Best-of-n: a pool of answers to held-out prompts; its KL is measured. PPO: the answers of "
        f"each training iteration, without a KL penalty, one fit per seed; crosses: with one. {HOW_TO_READ}",
        [
            ("", s.run / "overoptimisation.png"),
            (
                "Fits: best-of-n d (alpha - beta d), RL d (alpha - beta log d)",
                pages.make_table(
                    ("reward model", "held-out accuracy", "BoN alpha", "BoN beta", "RL alpha", "RL beta"), rows
                ),
            ),
            (
                "Peaks",
                pages.make_table(
                    (
                        "reward model",
                        "BoN best",
                        f"BoN at n = {s.best_of}",
                        "its KL",
                        "PPO best, mean",
                        "PPO at the end, by seed",
                    ),
                    peaks,
                ),
            ),
        ],
    )
    return {"fits": fits, "accuracy": {name: one.accuracy for name, one in accuracy.items()}, "peaks": peaks}


def study(s: Settings, run: Run, cells: ResultCache) -> dict[str, Any]:
    task = make_reviews_task(s.start / "sft", s.cache, s.prompts, s.ppo)
    rankings, heldout = (
        methods.load_rankings(task, s.start / f"preferences/{split}.jsonl", run.say) for split in ("train", "heldout")
    )
    if len(rankings) <= max(s.labels, default=0):
        raise UserError(f"{s.start} has {len(rankings)} preferences and labels is {s.labels}; set fewer labels")
    reference = sample_task_answers(task, task.start, task.prompts[:256], jax.random.key(s.seed)).rows
    plan = plan_reward_models(s, task.config, len(rankings))
    steps = {
        name: labels // s.label_batch + (config != task.config) * (s.steps + s.steps // 2)
        for name, (config, labels) in plan.items()
    }
    run.say(f"overoptimisation: {len(plan)} reward models, best of {s.best_of}, {s.iterations} iterations of PPO")
    with run.progress(sum(steps.values()) + (len(plan) + 1) * s.iterations + 1, "overoptimisation") as bar:
        proxies = {
            name: cells.model(
                name,
                functools.partial(reward_model, s, task, rankings[:labels], config, reference, bar),
                steps[name],
                bar,
            )
            for name, (config, labels) in plan.items()
        }
        best = cells("best-of", functools.partial(measure_best_of, s, task, proxies, bar), 1, bar)
        programs = {  # one for each size of reward model
            config: many.make_ppo_trainer(
                task, config, learning_rate=s.ppo_learning_rate, iterations=s.iterations, batch=s.batch, how=s.how
            )
            for _, config in proxies.values()
        }
        ppo = {
            name: functools.partial(train_by_ppo, s, programs[config], params)
            for name, (params, config) in proxies.items()
        }
        unpenalised = {
            name: cells(f"ppo {name}", functools.partial(one, 0.0, bar), s.iterations, bar) for name, one in ppo.items()
        }
        largest = list(ppo.values())[-1]
        penalised = cells("paid", functools.partial(largest, s.penalty_beta, bar), s.iterations, bar)
    accuracy = {
        name: methods.heldout_metrics(task, config, params, heldout) for name, (params, config) in proxies.items()
    }
    return report(s, best, unpenalised, penalised, accuracy)


def main(settings: Settings) -> dict[str, Any]:
    return run_study(
        "overoptimisation", settings, stage_fingerprints(settings.start, "sft", "reward", "preferences"), study
    )


if __name__ == "__main__":
    cli(main, Settings, PRESETS)
