"""The reward-KL frontier: what a nat of drift buys, by PPO, DPO, best-of-n and two other ways.

    make frontier                                        the start (`make assistant`, once), then this
    python -m experiments.frontier --start runs/mine --betas 0.05 0.2 0.8 --seeds 4

All methods begin at the same finetuned model and know the same preferences. PPO maximises the learned reward minus
beta KL, for each beta and seed; so does backpropagation through the reward model, by its derivative in place of a
policy gradient (`jaxgpt/through_reward.py`); DPO takes the preferences themselves, for each beta and seed; best-of-n
picks by the learned reward; the last one finetunes on the favourites alone ("preferred-FT", Rafailov et al. 2023). A
run is a pure function of numbers, so that a whole grid is one compiled program: `jax.vmap`, divided among devices.

Measured on held-out prompts against KL(pi || start) in nats a sequence: the annotator's gold score, which nothing
but its noisy choices ever showed; the reward model; and a judge fitted on people's labels. Bands are 95 % intervals
that draw seeds and prompts anew. A study that was stopped goes on behind its last finished part.
"""

import dataclasses
import functools
from pathlib import Path
from typing import Any, ClassVar

import jax

from jaxgpt import kl, optim, sharding
from jaxgpt.checkpoint import load_model
from jaxgpt.cli import cli
from jaxgpt.config import ModelConfig, UserError
from jaxgpt.data.preferences import Ranking
from jaxgpt.ppo import PPOConfig
from jaxgpt.progress import Bar
from jaxgpt.run import Run, cache_root, run_fingerprint
from jaxgpt.structs import Params
from jaxgpt.study import methods, page, runs
from jaxgpt.study.cells import Cells
from jaxgpt.study.page import Point
from jaxgpt.study.task import Seen, Task, best_of, look, reviews
from jaxgpt.through_reward import ThroughReward


@dataclasses.dataclass(frozen=True)
class Settings:
    """41 minutes on one CPU core; best-of-n is cheapest a nat, PPO goes furthest (docs/results.md)."""

    PLACE_FIELDS: ClassVar[tuple[str, ...]] = ("start",)

    run: Path = Path("runs/frontier")
    start: Path = Path("runs/assistant")  # of which sft, reward and preferences are used
    seeds: int = 2
    betas: tuple[float, ...] = (0.05, 0.15, 0.4, 1.0)  # PPO's, reward units a nat
    iterations: int = 24
    batch: int = 64  # answers an iteration
    ppo: PPOConfig = PPOConfig(new_tokens=40, temperature=0.7, epochs=2, minibatches=2)
    learning_rate: float = 5e-4
    through_betas: tuple[float, ...] = (0.1, 0.3, 1.0)  # of backpropagation through the reward model
    through_iterations: int = 40  # one update each
    through_learning_rate: float = 3e-4
    through: ThroughReward = ThroughReward()
    dpo_betas: tuple[float, ...] = (0.03, 0.1, 0.3, 1.0)
    dpo_learning_rate: float = 2e-4
    limit: int = 640  # preferences for DPO, at most
    dpo_batch: int = 16
    favourites: int = 640  # for finetuning on them, at most
    favourites_learning_rate: float = 2e-4
    epochs: int = 2  # of finetuning: a point each
    best_of: int = 64  # largest n
    prompts: int = 300  # held out
    how: runs.How = "vmap"  # or one run after another, in the same program
    seed: int = 7
    cache: Path = cache_root() / "data"
    fresh: bool = False

    def __post_init__(self) -> None:
        if self.seeds < 1 or not self.betas or min(*self.betas, *self.dpo_betas, 1.0) <= 0:
            raise UserError("seeds must be at least 1, and betas above 0")


PRESETS = {
    "laptop": Settings(),
    "toy": Settings(
        seeds=2, betas=(0.1, 1.0), dpo_betas=(0.1,), iterations=2, batch=8, epochs=1, through_betas=(0.1,),
        through_iterations=2, best_of=4, prompts=12, limit=16,
        favourites=16, dpo_batch=8,
        ppo=PPOConfig(new_tokens=12, temperature=0.7, epochs=1, minibatches=1),
    ),
    "gpu": Settings(
        seeds=8, betas=(0.02, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6), dpo_betas=(0.01, 0.03, 0.1, 0.3, 1.0), iterations=60,
        batch=256, limit=2200, favourites=2200, best_of=256, prompts=900,
    ),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Study:
    """What every method starts from."""

    settings: Settings
    task: Task
    reward: Params
    reward_config: ModelConfig
    rankings: list[Ranking]
    bar: Bar

    def look(self, params: Params, seed: int, answers: int = 1) -> Seen:
        key = jax.random.fold_in(jax.random.key(self.settings.seed), seed)
        return look(self.task, params, key, (self.reward, self.reward_config), answers)

    def through_reward(self) -> runs.OnPolicy:
        s = self.settings
        tx = optim.adam_tf(optim.linear_to_zero(s.through_learning_rate, s.through_iterations))
        learn = runs.learn_through_reward(self.task, tx, self.reward_config, s.through)
        return runs.OnPolicy(self.task, learn, tx, s.through_iterations, s.batch, how=s.how)

    def ppo(self) -> runs.OnPolicy:
        s = self.settings
        return runs.ppo_on_reward_model(self.task, self.reward_config, learning_rate=s.learning_rate,
                                        iterations=s.iterations, batch=s.batch, how=s.how)  # fmt: skip


def on_policy(study: Study, program: runs.OnPolicy, betas: tuple[float, ...], seed: int) -> dict[str, Any]:
    """PPO, or backpropagation through the reward model, at every beta, one seed."""
    bar = study.bar
    policies, curves = program.train(
        [kl.FixedKL(jax.numpy.float32(beta)) for beta in betas], [study.settings.seed + seed] * len(betas),
        [{"reward": study.reward}] * len(betas),
        lambda i, found: bar.update(gold=found["gold"].mean(), kl=found["kl"].mean()),
    )  # fmt: skip
    kept = {name: curves[name].T for name in ("gold", "judge", "kl")}
    return {"seen": [study.look(policy, seed).to_json() for policy in policies], "curves": kept}


def by_dpo(study: Study) -> list[list[dict[str, Any]]]:
    """DPO at every beta and seed, in one program: [beta][seed]."""
    s = study.settings
    grid = [(beta, seed) for beta in s.dpo_betas for seed in range(s.seeds)]
    policies = methods.dpo_policies(
        study.task, [study.rankings[: s.limit]] * len(grid), [beta for beta, _ in grid],
        [s.seed + seed for _, seed in grid], learning_rate=s.dpo_learning_rate, batch=s.dpo_batch, how=s.how,
        watch=lambda i, found: study.bar.update(dpo_loss=found["loss"].mean()),
    )  # fmt: skip
    seen = [study.look(params, seed).to_json() for params, (_, seed) in zip(policies, grid, strict=True)]
    return [seen[n : n + s.seeds] for n in range(0, len(seen), s.seeds)]


def by_finetuning(study: Study, epochs: int) -> list[dict[str, Any]]:
    """Finetuning on the favourites alone, for so many epochs: one entry a seed."""
    s = study.settings
    policies = methods.finetuned_on_favourites(
        study.task, [study.rankings[: s.favourites]] * s.seeds, [s.seed + seed for seed in range(s.seeds)],
        epochs=epochs, learning_rate=s.favourites_learning_rate, batch=s.dpo_batch, how=s.how,
        watch=lambda i, found: study.bar.update(nats=found["loss"].mean()),
    )  # fmt: skip
    return [study.look(params, seed).to_json() for seed, params in enumerate(policies)]


def by_best_of(study: Study) -> dict[str, Any]:
    """Best-of-n from one pool of answers to each prompt; its KL measured, and its bound."""
    s = study.settings
    pool = study.look(study.task.start, s.seeds, s.best_of)
    study.bar.update()
    return {str(2**k): {**best_of(pool, 2**k), "texts": []} for k in range(1, s.best_of.bit_length())}


def points(study: Study, found: dict[str, Any]) -> dict[str, list[Point]]:
    """What each method reached, a point a setting."""
    s, seeds = study.settings, range(study.settings.seeds)

    def by_beta(name: str, betas: tuple[float, ...]) -> list[Point]:
        rows = [[Seen.from_json(found[f"{name}-{seed}"]["seen"][n]) for seed in seeds] for n in range(len(betas))]
        return [Point(f"beta {beta:g}", row) for beta, row in zip(betas, rows, strict=True)]

    tuned = {n: [Seen.from_json(one) for one in found[f"favourites-{n}"]] for n in range(1, s.epochs + 1)}
    best = {n: Seen.from_json(one) for n, one in found["best-of"].items()}
    return {
        "PPO": by_beta("ppo", s.betas),
        "through the reward model": by_beta("through", s.through_betas),
        "DPO": [Point(f"beta {beta:g}", [Seen.from_json(one) for one in row])
                for beta, row in zip(s.dpo_betas, found["dpo"], strict=True)],
        "best of n": [Point(f"n = {n}", [one]) for n, one in best.items()],
        "finetuned on favourites": [Point(f"{n} epoch{'s' * (n > 1)}", row) for n, row in tuned.items()],
        "start": [Point("finetuned model", [Seen.from_json(one) for one in found["start"]])],
    }  # fmt: skip


def report(study: Study, found: dict[str, Any]) -> dict[str, Any]:
    """frontier.png and report.html; returns all points."""
    found_points, folder = points(study, found), study.settings.run
    page.frontier_figure(folder / "frontier.png", found_points)
    prompts = [study.task.tok.show(ids) for ids in study.task.heldout[:6]]
    shown = {f"{name}, {point.name}": point.runs[0].texts for name, row in found_points.items() for point in row}
    page.write_page(
        folder, "The reward-KL frontier",
        f"{study.settings.prompts} held-out prompts, {study.settings.seeds} seeds; 95 % intervals draw seeds and "
        "prompts anew. Gold score and preferences are a simulated annotator's (VADER). Best-of-n picks by the reward "
        "model; its KL is measured, and nearly the bound log n - (n - 1) / n.",
        [("", folder / "frontier.png"), ("All points", page.table(found_points)),
         ("Answers", page.samples(prompts, {name: texts for name, texts in shown.items() if texts}))],
    )  # fmt: skip
    return page.summary(found_points)


def main(settings: Settings) -> dict[str, Any]:
    s = settings
    names = ("sft", "reward", "preferences")
    inputs = {name: run_fingerprint(s.start / name, name) for name in names}
    with Run(s.run, s, stage="frontier", inputs=inputs, fresh=s.fresh) as run:
        if run.finished:
            run.say(f"frontier: already done, see {s.run / 'report.html'}")
            return run.results
        task = reviews(s.start / "sft", s.cache, s.prompts, s.ppo)
        judge, config, _, _ = load_model(s.start / "reward")
        rankings = methods.rankings_of(task, s.start / "preferences/train.jsonl")
        cells = Cells(run)
        found: dict[str, Any] = {}
        dpo_steps = min(s.limit, len(rankings)) // s.dpo_batch
        favourite_steps = min(s.favourites, len(rankings)) // s.dpo_batch
        run.say(f"frontier: {s.seeds} seeds, {len(s.betas)} betas of PPO, {len(s.dpo_betas)} of DPO, best of "
                f"{s.best_of}, {s.prompts} held-out prompts")  # fmt: skip
        total = (
            s.seeds * (s.iterations + s.through_iterations) + dpo_steps + favourite_steps * sum(range(s.epochs + 1)) + 1
        )
        with run.progress(total, "frontier") as bar:
            study = Study(s, task, sharding.replicate(judge, task.mesh), config, rankings, bar)
            program = study.ppo()

            def part(name: str, steps: int, make: Any) -> None:
                found[name] = cells(name, make, steps, bar)

            part("start", 0, lambda: [study.look(task.start, seed).to_json() for seed in range(s.seeds)])
            for seed in range(s.seeds):
                part(f"ppo-{seed}", s.iterations, functools.partial(on_policy, study, program, s.betas, seed))
            program = study.through_reward()
            for seed in range(s.seeds):
                part(f"through-{seed}", s.through_iterations,
                     functools.partial(on_policy, study, program, s.through_betas, seed))  # fmt: skip
            part("dpo", dpo_steps, functools.partial(by_dpo, study))
            for n in range(1, s.epochs + 1):
                part(f"favourites-{n}", n * favourite_steps, functools.partial(by_finetuning, study, n))
            part("best-of", 1, functools.partial(by_best_of, study))
        results = report(study, found)
        run.say(f"frontier: {s.run / 'report.html'}")
        run.finish(results)
        return run.results


if __name__ == "__main__":
    cli(main, Settings, PRESETS)
