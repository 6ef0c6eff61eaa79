"""Overoptimisation: what happens to the true score when a learned reward is followed too far (Gao et al. 2022).

    python -m experiments.overoptimisation               after `make assistant`

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

from jaxgpt import kl, model, optim
from jaxgpt.cli import cli
from jaxgpt.config import ModelConfig, UserError
from jaxgpt.data import pipelines, sources
from jaxgpt.data.preferences import Ranking
from jaxgpt.evaluate import best_of_n_kl_bound
from jaxgpt.ppo import PPOConfig
from jaxgpt.progress import Bar
from jaxgpt.report import new_figure
from jaxgpt.run import Run, cache_root, run_fingerprint
from jaxgpt.structs import Batch, Params
from jaxgpt.study import methods, page, runs
from jaxgpt.study.cells import Cells
from jaxgpt.study.task import Task, best_of, reviews, reward_scores, sample, seen
from jaxgpt.tokenizer import example_ids
from jaxgpt.train import make_nll


@dataclasses.dataclass(frozen=True)
class Settings:
    """37 minutes on one CPU core; overoptimised is the reward model of 160 labels (docs/results.md)."""

    PLACE_FIELDS: ClassVar[tuple[str, ...]] = ("start",)

    run: Path = Path("runs/overoptimisation")
    start: Path = Path("runs/assistant")  # of which sft, reward and preferences are used
    sizes: tuple[tuple[int, int], ...] = ((1, 32), (2, 64))  # layers and width of smaller reward models
    labels: tuple[int, ...] = (160,)  # fewer preferences for a reward model of the policy's size
    steps: int = 500  # of pretraining a smaller model; half as many of finetuning
    learning_rate: float = 5e-4  # of reward models
    label_batch: int = 16
    best_of: int = 128  # answers to each held-out prompt
    prompts: int = 150  # held out
    seeds: int = 2  # of PPO, with each reward model
    iterations: int = 40
    batch: int = 64
    ppo: PPOConfig = PPOConfig(new_tokens=40, temperature=0.7, epochs=2, minibatches=2)
    ppo_learning_rate: float = 1e-3
    penalty: float = 0.3  # beta of the run that pays for its KL, with the largest reward model and all labels
    how: runs.How = "vmap"
    seed: int = 11
    cache: Path = cache_root() / "data"
    fresh: bool = False

    def __post_init__(self) -> None:
        if self.best_of < 4 or self.seeds < 1:
            raise UserError(f"best_of is {self.best_of} and seeds {self.seeds}; at least 4 and 1 are needed")


PRESETS = {
    "laptop": Settings(),
    "toy": Settings(
        sizes=((1, 32),), labels=(16,), steps=4, label_batch=8, best_of=8, prompts=12, seeds=1, iterations=8, batch=8,
        ppo=PPOConfig(new_tokens=12, temperature=0.7, epochs=1, minibatches=1),
    ),
    "gpu": Settings(
        sizes=((1, 32), (2, 64), (3, 96)), labels=(50, 160, 500, 1000), steps=2000, best_of=1024, prompts=500, seeds=4,
        iterations=200, batch=256,
    ),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Proxy:
    """A reward model to follow, and what it was made of."""

    name: str
    config: ModelConfig
    params: Params


def small_model(s: Settings, task: Task, config: ModelConfig, bar: Bar) -> Params:
    """A language model of another size, pretrained and finetuned as the policy was, for as long as it takes."""
    stream = pipelines.tokenize_stream(sources.documents(sources.EMBEDDED, "train", s.cache), task.tok, s.cache)
    windows = pipelines.windows(stream, config.block, 16, seed=s.seed)
    pairs = [example_ids(task.tok, *pair) for pair in sources.examples(sources.EMBEDDED, "train", s.cache)]
    packed = pipelines.packed_examples(pipelines.fit_rows(pairs, config.block)[0], config.block, 16, seed=s.seed)
    params = model.init(jax.random.key(s.seed), config)
    for batches, steps, rate in ((windows, s.steps, 3e-3), (packed, s.steps // 2, 8e-4)):
        first = (jax.tree.map(lambda x: x[None], Batch.of(next(batches))) for _ in range(steps))
        tx = optim.adamw(optim.warmup_cosine(rate, steps, steps // 10))
        watch = lambda i, found: bar.update(small_model_nats=found["loss"].mean())  # noqa: E731
        (params,) = runs.fit(make_nll(config), tx, [params], {}, first, task.mesh, watch)
    return params


def plans(s: Settings, config: ModelConfig, count: int) -> list[tuple[str, ModelConfig, int]]:
    """(name, size, labels): every size with all labels, and the policy's own with fewer."""
    small = [dataclasses.replace(config, layers=layers, width=width, heads=max(1, width // 32))
             for layers, width in s.sizes]  # fmt: skip
    sizes = [(one, count) for one in small] + [(config, labels) for labels in (*s.labels, count)]
    return [(f"{one.layers} x {one.width}, {labels} labels", one, labels) for one, labels in sizes]


def trained_proxy(
    s: Settings, task: Task, rankings: list[Ranking], config: ModelConfig, reference: Batch, bar: Bar
) -> tuple[Params, ModelConfig]:
    """A reward model of this size from these preferences."""
    start = task.start if config == task.config else small_model(s, task, config, bar)
    (params,) = methods.reward_models(
        config, start, [rankings], [s.seed], reference, task, learning_rate=s.learning_rate, batch=s.label_batch,
        first_spread=0.2, watch=lambda i, found: bar.update(reward_loss=found["loss"].mean()),
    )  # fmt: skip
    return params, config


def followed(s: Settings, task: Task, proxy: Proxy, beta: float, bar: Bar) -> dict[str, Any]:
    """PPO on one reward model, all seeds at once: curves [seeds, iterations] of the training answers."""
    program = runs.ppo_on_reward_model(task, proxy.config, learning_rate=s.ppo_learning_rate, iterations=s.iterations,
                                       batch=s.batch, how=s.how)  # fmt: skip
    seeds = [s.seed + n for n in range(s.seeds)]
    _, curves = program.train(
        [kl.FixedKL(jnp.float32(beta))] * s.seeds, seeds, [{"reward": proxy.params}] * s.seeds,
        lambda i, found: bar.update(gold=found["gold"].mean(), kl=found["kl"].mean()),
    )  # fmt: skip
    return {name: curves[name].T for name in ("gold", "judge", "score", "kl", "length", "ended")}


def fitted(d: np.ndarray, gain: np.ndarray, shape: str) -> np.ndarray:
    """(alpha, beta) by least squares; NaN from fewer than two points."""
    if len(d) < 2:
        return np.full(2, np.nan)
    basis = np.stack([d, -d * (d if shape == "best-of-n" else np.log(d))], 1)
    return np.linalg.lstsq(basis, gain, rcond=None)[0]


def with_interval(estimate: np.ndarray, resampled: list[np.ndarray]) -> dict[str, list[float]]:
    """alpha and beta with their 95 % percentile intervals, as [value, low, high]."""
    low, high = np.quantile(np.array(resampled), [0.025, 0.975], axis=0)
    return {name: [estimate[i], low[i], high[i]] for i, name in enumerate(("alpha", "beta"))}


def fit_best_of(curve: dict[str, Any], start: np.ndarray) -> dict[str, Any]:
    """The best-of-n shape through every n; prompts are drawn anew for the intervals."""
    d, gain_nP = np.sqrt(np.array(curve["kl"])), np.array(curve["gold"]) - start
    rng, count = np.random.default_rng(0), gain_nP.shape[1]
    again = [fitted(d, gain_nP[:, rng.integers(count, size=count)].mean(1), "best-of-n") for _ in range(500)]
    return with_interval(fitted(d, gain_nP.mean(1), "best-of-n"), again)


def fit_rl(curves: dict[str, Any], start: float, block: int = 5) -> dict[str, Any]:
    """The RL shape through all iterations of all seeds with KL above 0.1; blocks of iterations are drawn anew."""
    d, gain = np.sqrt(np.maximum(np.array(curves["kl"]), 0.0)), np.array(curves["gold"]) - start
    rng = np.random.default_rng(0)

    def one(index: np.ndarray) -> np.ndarray:
        x, y = d[:, index].ravel(), gain[:, index].ravel()
        return fitted(x[x**2 > 0.1], y[x**2 > 0.1], "RL")

    whole = np.arange(d.shape[1])
    blocks = whole[: len(whole) // block * block].reshape(-1, block)
    again = [one(blocks[rng.integers(len(blocks), size=len(blocks))].ravel()) for _ in range(500)]
    return with_interval(one(whole), again)


def figure(path: Path, names: list[str], found: dict[str, Any], fits: dict[str, Any]) -> None:
    """Gold score gained (lines: the fits), reward model and judge against the distance, by best-of-n and by PPO."""
    picture, axes = new_figure(2, 3, 15, 8)
    start = np.mean(found["start"])
    for n, name in enumerate(names):
        best, curves = found["best-of"][name], found[f"ppo-{n}"]
        for axis, measure in zip(axes[0], ("gold", "proxy", "judge"), strict=True):
            value = np.array(best[measure]).mean(1) - start * (measure == "gold")
            axis.plot(
                np.sqrt(best["kl"]), value, "o" if measure == "gold" else "o-", ms=4, lw=1, color=f"C{n}", label=name
            )
        d = np.sqrt(np.maximum(np.array(curves["kl"]), 0.0))
        for axis, measure in zip(axes[1], ("gold", "score", "judge"), strict=True):
            axis.plot(
                d.ravel(), np.ravel(curves[measure]) - start * (measure == "gold"), ".", ms=3, color=f"C{n}", alpha=0.5
            )
        for axis, shape, bend, far in ((axes[0, 0], "best-of-n", lambda x: x, max(best["kl"]) ** 0.5),
                                       (axes[1, 0], "RL", np.log, d.max())):  # fmt: skip
            (alpha, *_), (beta, *_) = (fits[name][shape][k] for k in ("alpha", "beta"))
            x = np.linspace(0.1, far, 60)
            axis.plot(x, x * (alpha - beta * bend(x)), color=f"C{n}", lw=1.3)
    paid = found["paid"]
    d = np.sqrt(np.maximum(np.array(paid["kl"]), 0.0)).ravel()
    axes[1, 0].plot(d, np.ravel(paid["gold"]) - start, "x", ms=3, color="k", alpha=0.6, label="pays for its KL")
    for column, title in enumerate(("gold score gained", "the reward model's own score", "judge, P(positive)")):
        for row, method in enumerate(("best-of-n", "PPO")):
            axes[row, column].set(title=f"{method}: {title}", xlabel="d = sqrt(KL to the start in nats)")
    axes[0, 0].legend(frameon=False, fontsize=8)
    axes[1, 0].legend(frameon=False, fontsize=8)
    picture.savefig(path)


def by_best_of(s: Settings, task: Task, proxies: list[Proxy], heldout: list[Ranking], bar: Bar) -> dict[str, Any]:
    """One pool of answers for all reward models; for each its KL and, a number a prompt, its scores at every n."""
    ids = [row for row in task.heldout for _ in range(s.best_of)]
    answers = sample(task, task.start, ids, jax.random.key(s.seed))
    pool = seen(task, task.start, answers, each=s.best_of)
    found: dict[str, Any] = {"gold_sd": pool.gold.std(), "best-of": {}, "accuracy": {}}
    for proxy in proxies:
        h = task.finished(reward_scores(task, proxy.params, proxy.config, answers.rows), answers.ended)
        own = dataclasses.replace(pool, proxy=h.reshape(pool.gold.shape))
        sizes = [2**k for k in range(1, s.best_of.bit_length())]
        best = [best_of(own, n) for n in sizes]
        curve = {name: [one[name] for one in best] for name in ("gold", "judge", "proxy")}
        bounds = [best_of_n_kl_bound(n) for n in sizes]
        found["best-of"][proxy.name] = {"n": sizes, "bound": bounds, **curve, "kl": [one["kl"].mean() for one in best]}
        found["accuracy"][proxy.name] = methods.accuracy(task, proxy.config, proxy.params, heldout)
    found["start"] = pool.gold.mean(1)
    bar.update()
    return found


def report(s: Settings, names: list[str], found: dict[str, Any]) -> dict[str, Any]:
    """overoptimisation.png and report.html; returns the fits."""
    start = np.array(found["start"])
    fits = {
        name: {"best-of-n": fit_best_of(found["best-of"][name], start),
               "RL": fit_rl(found[f"ppo-{n}"], start.mean())} for n, name in enumerate(names)
    }  # fmt: skip
    figure(s.run / "overoptimisation.png", names, found, fits)

    def shown(one: list[float]) -> str:
        return "{:.3f} [{:.3f}, {:.3f}]".format(*one)

    rows, facts = [], []
    for n, name in enumerate(names):
        best, curves = found["best-of"][name], found[f"ppo-{n}"]
        gold = np.array(best["gold"]).mean(1) - start.mean()
        smooth = np.array(curves["gold"]).mean(0) - start.mean()
        smooth = np.convolve(smooth, np.ones(5) / 5, "valid")
        kl = np.convolve(np.array(curves["kl"]).mean(0), np.ones(5) / 5, "valid")
        rows.append([name, f"{found['accuracy'][name]:.1%}", *(shown(fits[name][shape][k]) for shape in
                     ("best-of-n", "RL") for k in ("alpha", "beta"))])  # fmt: skip
        facts.append(
            [
                name,
                f"{gold.max():.3f} at n = {best['n'][int(gold.argmax())]}",
                f"{gold[-1]:.3f}",
                f"{best['kl'][-1]:.2f} (bound {best['bound'][-1]:.2f})",
                f"{smooth.max():.3f} at {kl[smooth.argmax()]:.1f} nats",
                f"{smooth[-1]:.3f} at {kl[-1]:.1f} nats",
            ]
        )
    page.write_page(
        s.run, "Overoptimisation",
        "Gold score gained over the finetuned model (VADER's, whose noisy choices are the labels) against the distance "
        "sqrt(KL). Best-of-n: a pool of answers to held-out prompts; its KL is measured. PPO: the answers of each "
        "iteration of training, without a KL penalty; crosses: with one.",
        [("", s.run / "overoptimisation.png"),
         ("Fits: best-of-n d (alpha - beta d), RL d (alpha - beta log d)", page.plain_table(
             ("reward model", "held-out accuracy", "BoN alpha", "BoN beta", "RL alpha", "RL beta"), rows)),
         ("Peaks", page.plain_table(("reward model", "BoN best", f"BoN at n = {s.best_of}", "its KL", "PPO best",
                                     "PPO at the end"), facts))],
    )  # fmt: skip
    return {"fits": fits, "accuracy": found["accuracy"], "peaks": facts}


def main(settings: Settings) -> dict[str, Any]:
    s = settings
    names = ("sft", "reward", "preferences")
    inputs = {name: run_fingerprint(s.start / name, name) for name in names}
    with Run(s.run, s, stage="overoptimisation", inputs=inputs, fresh=s.fresh) as run:
        if run.finished:
            run.say(f"overoptimisation: already done, see {s.run / 'report.html'}")
            return run.results
        task = reviews(s.start / "sft", s.cache, s.prompts, s.ppo)
        rankings = methods.rankings_of(task, s.start / "preferences/train.jsonl")
        heldout = methods.rankings_of(task, s.start / "preferences/heldout.jsonl")
        if len(rankings) <= max(s.labels):
            raise UserError(f"{s.start} has {len(rankings)} preferences; labels must be fewer: {s.labels}")
        reference = sample(task, task.start, task.prompts[:256], jax.random.key(s.seed)).rows
        cells, wanted = Cells(run), plans(s, task.config, len(rankings))
        steps = [labels // s.label_batch + (config != task.config) * (s.steps + s.steps // 2)
                 for _, config, labels in wanted]  # fmt: skip
        run.say(f"overoptimisation: {len(wanted)} reward models, best of {s.best_of}, {s.iterations} iterations of PPO")
        with run.progress(sum(steps) + (len(wanted) + 1) * s.iterations + 1, "overoptimisation") as bar:
            proxies = []
            for (name, config, labels), count in zip(wanted, steps, strict=True):
                make = functools.partial(trained_proxy, s, task, rankings[:labels], config, reference, bar)
                proxies.append(Proxy(name, config, cells.model(name, make, count, bar)[0]))
            found = cells("best-of", functools.partial(by_best_of, s, task, proxies, heldout, bar), 1, bar)
            for n, proxy in enumerate(proxies):
                free = functools.partial(followed, s, task, proxy, 0.0, bar)
                found[f"ppo-{n}"] = cells(f"ppo-{n}", free, s.iterations, bar)
            paying = functools.partial(followed, s, task, proxies[-1], s.penalty, bar)
            found["paid"] = cells("paid", paying, s.iterations, bar)
        results = report(s, [proxy.name for proxy in proxies], found)
        run.say(f"overoptimisation: {s.run / 'report.html'}")
        run.finish(results)
        return run.results


if __name__ == "__main__":
    cli(main, Settings, PRESETS)
