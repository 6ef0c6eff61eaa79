"""The comparison of the DPO paper: continue a film review so that it is positive (Rafailov et al. 2023, section 6.1).

    python -m experiments.imdb                           after `make assistant` (its `pretrain` writes reviews)

Prompts are the first 2 to 8 tokens of IMDb reviews. The true reward is a classifier of sentiment fitted on people's
labels (the log-odds of "positive"); four continuations of each prefix give six pairs that it labels without noise. On
one frontier of true reward against KL: PPO that is given the true reward, PPO on a reward model learnt from the pairs,
DPO on the pairs, finetuning on the preferred ones, and best-of-n by the learned reward. VADER, which nobody learns
from, is the judge.
"""

import dataclasses
import functools
import itertools
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxgpt import evaluate, kl, reward, sharding
from jaxgpt.checkpoint import load_language_model
from jaxgpt.cli import cli
from jaxgpt.config import UserError
from jaxgpt.data import sources
from jaxgpt.data.preferences import Ranking
from jaxgpt.ppo import PPOConfig
from jaxgpt.progress import Bar
from jaxgpt.run import Run, cache_root, run_fingerprint
from jaxgpt.structs import Array, Batch, Params
from jaxgpt.study import methods, page, runs
from jaxgpt.study.cells import Cells
from jaxgpt.study.page import Point
from jaxgpt.study.task import Seen, Task, answered, best_of, look, sample


@dataclasses.dataclass(frozen=True)
class Settings:
    """23 minutes on one CPU core; PPO on the true reward is best, DPO next (docs/results.md)."""

    PLACE_FIELDS: ClassVar[tuple[str, ...]] = ("start",)

    run: Path = Path("runs/imdb")
    start: Path = Path("runs/assistant/pretrain")
    prefixes: int = 500  # whose continuations are compared
    candidates: int = 4
    betas: tuple[float, ...] = (0.05, 0.15, 0.5)  # PPO's, standard deviations of the reward a nat
    dpo_betas: tuple[float, ...] = (0.03, 0.1, 0.3, 1.0)
    seeds: int = 2
    iterations: int = 24
    batch: int = 64
    ppo: PPOConfig = PPOConfig(new_tokens=32, temperature=1.0, epochs=2, minibatches=2, unfinished_score=None)
    learning_rate: float = 5e-4
    pairs: int = 1600  # for DPO and for finetuning, at most
    pair_batch: int = 32
    reward_learning_rate: float = 5e-4
    dpo_learning_rate: float = 2e-4
    best_of: int = 32
    prompts: int = 300  # held out
    how: runs.How = "vmap"
    seed: int = 41
    cache: Path = cache_root() / "data"
    fresh: bool = False

    def __post_init__(self) -> None:
        if self.candidates < 2 or self.best_of < 2 or self.seeds < 1:
            raise UserError("candidates and best_of must be at least 2, seeds at least 1")


PRESETS = {
    "laptop": Settings(),
    "toy": Settings(prefixes=8, betas=(0.1,), dpo_betas=(0.1,), seeds=1, iterations=2, batch=8, pairs=16, pair_batch=8,
                    best_of=4, prompts=12,
                    ppo=PPOConfig(new_tokens=8, epochs=1, unfinished_score=None)),
    "gpu": Settings(prefixes=8000, betas=(0.02, 0.05, 0.1, 0.2, 0.5), dpo_betas=(0.01, 0.03, 0.1, 0.3, 1.0), seeds=6,
                    iterations=100, batch=256, pairs=48_000, best_of=128, prompts=1000),
}  # fmt: skip


def log_odds(judge: evaluate.Judge, texts: Any) -> np.ndarray:
    """log P(positive) / P(negative), about one unit wide."""
    p = np.clip(judge.scores(texts), 1e-6, 1 - 1e-6)
    return np.log(p / (1 - p))


def make_task(s: Settings) -> Task:
    """Prefixes of reviews, whose continuations the classifier reads whole."""
    start, config, tok, _ = load_language_model(s.start)
    labelled = (sources.labelled(sources.EMBEDDED, split, s.cache, ("imdb", "rt")) for split in ("train", "test"))
    judge = evaluate.fit_judge(*labelled)
    rng = np.random.default_rng(s.seed)

    def prefixes(split: sources.Split, count: int) -> list[list[int]]:
        texts = sources.documents(sources.EMBEDDED, split, s.cache)
        chosen = rng.permutation(len(texts))[:count]
        begun = [tok.encode(texts[i][:200])[: int(rng.integers(2, 9))] for i in chosen]
        return [[tok.template.separator, *ids] for ids in begun]

    mesh = sharding.data_mesh()
    return Task(
        config, tok, sharding.replicate(start, mesh), prefixes("train", 4000), prefixes("test", s.prompts),
        functools.partial(log_odds, judge), evaluate.gold_scores, lambda ids, mask: tok.decode(ids),
        tok.template.separator, s.ppo, mesh,
    )  # fmt: skip


def pairs(s: Settings, task: Task) -> list[list[Any]]:
    """All pairs of the continuations of each prefix, the better one first: [[tokens, roles], [tokens, roles]]."""
    ids = [row for row in task.prompts[: s.prefixes] for _ in range(s.candidates)]
    answers = sample(task, task.start, ids, jax.random.key(s.seed))
    gold = task.gold(answers.texts)
    rows = answered(answers)
    found = []
    for first in range(0, len(rows), s.candidates):
        for i, j in itertools.combinations(range(first, first + s.candidates), 2):
            if gold[i] != gold[j]:
                found.append([rows[i], rows[j]] if gold[i] > gold[j] else [rows[j], rows[i]])
    return [found[i] for i in np.random.default_rng(s.seed).permutation(len(found))]


def by_ppo(s: Settings, task: Task, model: Params | None, scale: tuple[float, float], bar: Bar) -> dict[str, Any]:
    """PPO at every beta and seed: on the reward model, or (None) on the true reward, brought to the same scale."""

    def learned(params: Params, rows: Batch) -> Array:
        return reward.score(params["reward"], task.config, rows)

    tx = runs.ppo_optimizer(task, s.learning_rate, s.iterations)
    learn = runs.learn_by_ppo(task, tx, None if model is None else learned)
    host = None if model is not None else lambda texts: (task.gold(texts) - scale[0]) / scale[1]
    program = runs.OnPolicy(task, learn, tx, s.iterations, s.batch, host=host, how=s.how)
    grid = [(beta, seed) for beta in s.betas for seed in range(s.seeds)]
    policies, _ = program.train(
        [kl.FixedKL(jnp.float32(beta)) for beta, _ in grid], [s.seed + seed for _, seed in grid],
        None if model is None else [{"reward": model}] * len(grid),
        lambda i, found: bar.update(gold=found["gold"].mean(), kl=found["kl"].mean()),
    )  # fmt: skip
    return in_grid(s, task, grid, policies, model)


def by_dpo(s: Settings, task: Task, rankings: list[Ranking], model: Params, bar: Bar) -> dict[str, Any]:
    """DPO at every beta and seed."""
    grid = [(beta, seed) for beta in s.dpo_betas for seed in range(s.seeds)]
    policies = methods.dpo_policies(
        task, [rankings] * len(grid), [beta for beta, _ in grid], [s.seed + seed for _, seed in grid],
        learning_rate=s.dpo_learning_rate, batch=s.pair_batch, how=s.how,
        watch=lambda i, found: bar.update(dpo_loss=found["loss"].mean()),
    )  # fmt: skip
    return in_grid(s, task, grid, policies, model)


def by_finetuning(s: Settings, task: Task, rankings: list[Ranking], model: Params, bar: Bar) -> dict[str, Any]:
    """Finetuning on the preferred continuations."""
    grid = [(1, seed) for seed in range(s.seeds)]
    policies = methods.finetuned_on_favourites(
        task, [rankings] * s.seeds, [s.seed + seed for _, seed in grid], epochs=1, learning_rate=s.dpo_learning_rate,
        batch=s.pair_batch, how=s.how, watch=lambda i, found: bar.update(nats=found["loss"].mean()),
    )  # fmt: skip
    return in_grid(s, task, grid, policies, model)


def in_grid(s: Settings, task: Task, grid: list[Any], policies: list[Params], model: Params | None) -> dict[str, Any]:
    """{setting: what its policies' answers are like}, a list with an entry a seed."""
    found: dict[str, Any] = {}
    for (setting, seed), policy in zip(grid, policies, strict=True):
        proxy = None if model is None else (model, task.config)
        key = jax.random.fold_in(jax.random.key(s.seed), seed)
        found.setdefault(f"{setting:g}", []).append(look(task, policy, key, proxy).to_json())
    return found


def by_best_of(s: Settings, task: Task, model: Params) -> dict[str, Any]:
    """Best-of-n by the learned reward, from one pool of continuations."""
    pool = look(task, task.start, jax.random.key(s.seed), (model, task.config), s.best_of)
    return {str(2**k): [{**best_of(pool, 2**k), "texts": []}] for k in range(s.best_of.bit_length())}


def main(settings: Settings) -> dict[str, Any]:
    s = settings
    with Run(s.run, s, stage="imdb", inputs={"start": run_fingerprint(s.start, "pretrain")}, fresh=s.fresh) as run:
        if run.finished:
            run.say(f"imdb: already done, see {s.run / 'report.html'}")
            return run.results
        task, cells = make_task(s), Cells(run)
        most = s.prefixes * s.candidates * (s.candidates - 1) // 2
        steps, all_steps = min(s.pairs, most) // s.pair_batch, most // s.pair_batch
        with run.progress(all_steps + 2 * s.iterations + 2 * steps + 2, "imdb") as bar:
            made = cells("pairs", functools.partial(pairs, s, task), 1, bar)
            rankings = [Ranking(tuple((ids, roles) for ids, roles in pair), 0) for pair in made]
            few, held = rankings[: s.pairs], rankings[-min(64, len(rankings) // 4) :]
            others = rankings[: -len(held)]
            reference = sample(task, task.start, task.prompts[:256], jax.random.key(s.seed))
            gold = task.gold(reference.texts)
            scale = float(gold.mean()), float(gold.std())

            def reward_model() -> Any:
                (params,) = methods.reward_models(
                    task.config, task.start, [others], [s.seed], reference.rows, task, batch=s.pair_batch,
                    learning_rate=s.reward_learning_rate, first_spread=0.2,
                    watch=lambda i, found: bar.update(reward_loss=found["loss"].mean()),
                )  # fmt: skip
                return params, task.config

            model, _ = cells.model("reward", reward_model, all_steps, bar)
            model = sharding.replicate(model, task.mesh)
            accuracy = methods.accuracy(task, task.config, model, held)
            run.say(f"imdb: {len(rankings):,} pairs; the reward model agrees with {accuracy:.1%} of {len(held)} others")
            parts: dict[str, tuple[Any, int]] = {
                "PPO, true reward": (functools.partial(by_ppo, s, task, None, scale, bar), s.iterations),
                "PPO, learned reward": (functools.partial(by_ppo, s, task, model, scale, bar), s.iterations),
                "DPO": (functools.partial(by_dpo, s, task, few, model, bar), steps),
                "finetuned on preferred": (functools.partial(by_finetuning, s, task, few, model, bar), steps),
                "best of n, learned reward": (functools.partial(by_best_of, s, task, model), 1),
            }
            found = {name: cells(name, make, count, bar) for name, (make, count) in parts.items()}
        points = {name: [Point(setting, [Seen.from_json(one) for one in row]) for setting, row in one.items()]
                  for name, one in found.items()}  # fmt: skip
        measures = {"gold": "true reward, log-odds of positive", "judge": "VADER, which nobody learnt from"}
        page.frontier_figure(s.run / "imdb.png", points, measures)
        prompts = [task.tok.show(ids) for ids in task.heldout[:6]]
        shown = {f"{name}, {point.name}": point.runs[0].texts for name, row in points.items() for point in row}
        page.write_page(
            s.run, "Positive reviews", f"{s.prompts} held-out prefixes of 2 to 8 tokens, {s.seeds} seeds; 95 % "
            "intervals draw seeds and prompts anew. The true reward is a classifier fitted on people's labels.",
            [("", s.run / "imdb.png"), ("All points", page.table(points)),
             ("Continuations", page.samples(prompts, {name: texts for name, texts in shown.items() if texts}))],
        )  # fmt: skip
        run.say(f"imdb: {s.run / 'report.html'}")
        run.finish({"accuracy": accuracy, "points": page.summary(points)})
        return run.results


if __name__ == "__main__":
    cli(main, Settings, PRESETS)
