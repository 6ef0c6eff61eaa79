"""Overoptimisation: what happens to the true score when a learned reward is followed too far (Gao et al. 2022).

    python -m experiments.studies.overoptimisation               after `make assistant`

The simulated annotator's noisy choices train reward models of several sizes and from several numbers of labels. Each is
then followed far past its usefulness: by best-of-n, and by PPO without any KL penalty. With d = sqrt(KL to the start),
Gao et al. found, for the gold score R gained,

    best-of-n   R(d) = d (alpha - beta d)          RL   R(d) = d (alpha - beta log d)

Both are fitted here by least squares, with 95 % intervals (best-of-n: prompts drawn anew; PPO: blocks of iterations
drawn anew, each seed by itself). beta > 0 is overoptimisation: the gold score has a peak, at d = alpha / 2 beta and at
log d = alpha / beta - 1. One more PPO run pays for its KL, to see whether that moves the frontier or only stops on it.
"""

import dataclasses
import functools
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxgpt.config import ModelConfig
from jaxgpt.data import pipelines, sources
from jaxgpt.data.comparisons import Ranking
from jaxgpt.data.tokenizer import example_ids
from jaxgpt.errors import UserError
from jaxgpt.files import cache_root
from jaxgpt.losses import kl
from jaxgpt.models import transformer
from jaxgpt.rlhf.intervals import best_of_n_kl_bound
from jaxgpt.rlhf.ppo import PPOConfig
from jaxgpt.runs.cli import cli
from jaxgpt.runs.progress import Bar
from jaxgpt.runs.run import Run
from jaxgpt.structs import Batch, Params
from jaxgpt.study import figures, laws, many, methods, page
from jaxgpt.study.cells import Cells, conduct, stages
from jaxgpt.study.task import Proxy, Task, best_of_powers, reviews, reward_scores, sample, seen
from jaxgpt.training import optim
from jaxgpt.training.step import make_nll


@dataclasses.dataclass(frozen=True)
class Settings:
    """31 minutes on one CPU core, 19 on two; poor reward models lead PPO anywhere, good ones do not (results.md)."""

    PLACE_FIELDS: ClassVar[tuple[str, ...]] = ("start",)

    run: Path = Path("runs/overoptimisation")
    start: Path = Path("runs/assistant")  # of which sft, reward and preferences are used
    sizes: tuple[tuple[int, int], ...] = ((1, 32), (2, 64))  # layers and width of smaller reward models
    labels: tuple[int, ...] = (160,)  # fewer preferences for a reward model of the policy's size
    steps: int = 400  # of pretraining a smaller model; half as many of finetuning
    learning_rate: float = 5e-4  # of reward models
    label_batch: int = 16
    best_of: int = 128  # answers to each held-out prompt
    prompts: int = 100  # held out
    seeds: int = 2  # of PPO, with each reward model
    iterations: int = 36
    batch: int = 64
    ppo: PPOConfig = PPOConfig(new_tokens=40, temperature=0.7, epochs=2, minibatches=2)
    ppo_learning_rate: float = 1.1e-3
    penalty: float = 0.3  # beta of the run that pays for its KL, with the largest reward model and all labels
    how: many.How = "vmap"
    seed: int = 11
    cache: Path = cache_root() / "data"
    fresh: bool = False

    def __post_init__(self) -> None:
        if self.best_of < 4 or self.seeds < 1:
            raise UserError(f"best_of is {self.best_of} and seeds {self.seeds}; at least 4 and 1 are needed")


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


def smaller_model(s: Settings, task: Task, config: ModelConfig, bar: Bar) -> Params:
    """A language model of another size, pretrained and finetuned as the policy was, for as long as it takes."""
    stream = pipelines.tokenize_stream(sources.documents(sources.EMBEDDED, "train", s.cache), task.tok, s.cache)
    windows = pipelines.windows(stream, config.block, 16, seed=s.seed)
    pairs = [example_ids(task.tok, *pair) for pair in sources.examples(sources.EMBEDDED, "train", s.cache)]
    packed = pipelines.packed_examples(pipelines.fit_rows(pairs, config.block)[0], config.block, 16, seed=s.seed)
    params = transformer.init(jax.random.key(s.seed), config)
    for batches, steps, rate in ((windows, s.steps, 3e-3), (packed, s.steps // 2, 8e-4)):
        first = (jax.tree.map(lambda x: x[None], Batch.of(next(batches))) for _ in range(steps))
        tx = optim.adamw(optim.warmup_cosine(rate, steps, steps // 10))
        show = many.show(bar, smaller_model_nats="loss")
        (params,) = many.fit(make_nll(config), tx, [params], {}, first, task.mesh, show)
    return params


def plans(s: Settings, config: ModelConfig, count: int) -> dict[str, tuple[ModelConfig, int]]:
    """{name: (size, labels)} of reward models: every size with all labels, and the policy's own with fewer."""
    small = [
        dataclasses.replace(config, layers=layers, width=width, heads=max(1, width // 32)) for layers, width in s.sizes
    ]
    sizes = [(one, count) for one in small] + [(config, labels) for labels in (*s.labels, count)]
    return {f"{one.layers} x {one.width}, {labels} labels": (one, labels) for one, labels in sizes}


def reward_model(
    s: Settings, task: Task, rankings: list[Ranking], config: ModelConfig, reference: Batch, bar: Bar
) -> Proxy:
    """A reward model of this size from these preferences."""
    start = task.start if config == task.config else smaller_model(s, task, config, bar)
    (params,) = methods.reward_models(
        config,
        start,
        [rankings],
        [s.seed],
        reference,
        task,
        learning_rate=s.learning_rate,
        batch=s.label_batch,
        first_spread=0.2,
        watch=many.show(bar, reward_loss="loss"),
    )
    return params, config


def by_ppo(s: Settings, program: many.OnPolicy, reward_params: Params, beta: float, bar: Bar) -> dict[str, Any]:
    """PPO on one reward model, all seeds at once: curves [seeds, iterations] of the training answers."""
    _, curves = program.train(
        [kl.FixedKL(jnp.float32(beta))] * s.seeds,
        [s.seed + n for n in range(s.seeds)],
        [{"reward": reward_params}] * s.seeds,
        many.show(bar, "gold", "kl"),
    )
    return {name: curves[name].T for name in ("gold", "judge", "score", "kl", "length", "ended")}


def by_best_of(s: Settings, task: Task, proxies: dict[str, Proxy], bar: Bar) -> dict[str, Any]:
    """One pool of answers for all reward models: "start", each prompt's mean gold score, and for each reward model its
    KL with the bound and, a number a prompt, its scores at every n."""
    ids = [row for row in task.heldout for _ in range(s.best_of)]
    answers = sample(task, task.start, ids, jax.random.key(s.seed))
    pool = seen(task, task.start, answers, each=s.best_of)
    found: dict[str, Any] = {"start": pool.gold.mean(1)}
    for name, proxy in proxies.items():
        h = task.finished(reward_scores(task, *proxy, answers.rows), answers.ended)
        best = best_of_powers(dataclasses.replace(pool, proxy=h.reshape(pool.gold.shape)))
        sizes = [2 ** (k + 1) for k in range(len(best))]
        found[name] = {measure: [one[measure] for one in best.values()] for measure in ("gold", "judge", "proxy")}
        found[name] |= {"n": sizes, "kl": [one["kl"].mean() for one in best.values()]}
    bar.update()
    return found


def report(s: Settings, best: dict[str, Any], free: dict[str, Any], paid: Any, accuracy: dict[str, float]) -> Any:
    """overoptimisation.png and report.html; returns the fits."""
    start = np.array(best.pop("start"))
    fits: dict[str, dict[laws.Law, laws.Fit]] = {
        name: {
            "best-of-n": laws.fit_best_of(np.array(best[name]["kl"]), np.array(best[name]["gold"]) - start),
            "RL": laws.fit_rl(np.array(free[name]["kl"]), np.array(free[name]["gold"]) - start.mean()),
        }
        for name in best
    }
    figures.overoptimisation(s.run / "overoptimisation.png", best, free, paid, start.mean(), fits)
    rows, peaks = [], []
    for name, law in fits.items():
        numbers = ["{:.3f} [{:.3f}, {:.3f}]".format(*law[of][k]) for of in law for k in ("alpha", "beta")]
        rows.append([name, f"{accuracy[name]:.1%}", *numbers])
        by_n, n, nats = np.array(best[name]["gold"]).mean(1) - start.mean(), best[name]["n"], best[name]["kl"][-1]
        gold, kls = (np.convolve(np.mean(free[name][x], axis=0), np.ones(5) / 5, "valid") for x in ("gold", "kl"))
        gold = gold - start.mean()
        ends = ", ".join(f"{np.mean(own[-5:]) - start.mean():.3f}" for own in free[name]["gold"])
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
    page.write_page(
        s.run,
        "Overoptimisation",
        "Gold score gained over the finetuned model (VADER's, whose noisy choices are the labels) against the distance "
        "sqrt(KL). Best-of-n: a pool of answers to held-out prompts; its KL is measured. PPO: the answers of each "
        "iteration of training, without a KL penalty; crosses: with one.",
        [
            ("", s.run / "overoptimisation.png"),
            (
                "Fits: best-of-n d (alpha - beta d), RL d (alpha - beta log d)",
                page.plain_table(
                    ("reward model", "held-out accuracy", "BoN alpha", "BoN beta", "RL alpha", "RL beta"), rows
                ),
            ),
            (
                "Peaks",
                page.plain_table(
                    (
                        "reward model",
                        "BoN best",
                        f"BoN at n = {s.best_of}",
                        "its KL",
                        "PPO best, mean",
                        "PPO at the end, each seed",
                    ),
                    peaks,
                ),
            ),
        ],
    )
    return {"fits": fits, "accuracy": accuracy, "peaks": peaks}


def study(s: Settings, run: Run, cells: Cells) -> dict[str, Any]:
    task = reviews(s.start / "sft", s.cache, s.prompts, s.ppo)
    rankings, heldout = (
        methods.rankings_of(task, s.start / f"preferences/{split}.jsonl") for split in ("train", "heldout")
    )
    if len(rankings) <= max(s.labels):
        raise UserError(f"{s.start} has {len(rankings)} preferences; labels must be fewer: {s.labels}")
    reference = sample(task, task.start, task.prompts[:256], jax.random.key(s.seed)).rows
    plan = plans(s, task.config, len(rankings))
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
        best = cells("best-of", functools.partial(by_best_of, s, task, proxies, bar), 1, bar)
        programs = {  # one for each size of reward model
            config: many.ppo_on_reward_model(
                task, config, learning_rate=s.ppo_learning_rate, iterations=s.iterations, batch=s.batch, how=s.how
            )
            for _, config in proxies.values()
        }
        ppo = {
            name: functools.partial(by_ppo, s, programs[config], params) for name, (params, config) in proxies.items()
        }
        free = {
            name: cells(f"ppo {name}", functools.partial(one, 0.0, bar), s.iterations, bar) for name, one in ppo.items()
        }
        largest = list(ppo.values())[-1]
        paid = cells("paid", functools.partial(largest, s.penalty, bar), s.iterations, bar)
    accuracy = {name: methods.accuracy(task, config, params, heldout) for name, (params, config) in proxies.items()}
    return report(s, best, free, paid, accuracy)


def main(settings: Settings) -> dict[str, Any]:
    return conduct("overoptimisation", settings, stages(settings.start, "sft", "reward", "preferences"), study)


if __name__ == "__main__":
    cli(main, Settings, PRESETS)
