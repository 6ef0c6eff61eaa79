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
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import jax

from jaxgpt import optim
from jaxgpt.cli import cli
from jaxgpt.config import UserError
from jaxgpt.data.preferences import Ranking
from jaxgpt.ppo import PPOConfig
from jaxgpt.progress import Bar
from jaxgpt.run import Run, cache_root
from jaxgpt.study import figures, methods, page, runs
from jaxgpt.study.cells import Cells, conduct, stages
from jaxgpt.study.task import Proxy, Task, best_of_powers, learned_reward, look, looks, reviews
from jaxgpt.through_reward import ThroughReward


@dataclasses.dataclass(frozen=True)
class Settings:
    """30 minutes on one CPU core; best-of-n is cheapest a nat, PPO goes furthest (docs/results.md)."""

    PLACE_FIELDS: ClassVar[tuple[str, ...]] = ("start",)

    run: Path = Path("runs/frontier")
    start: Path = Path("runs/assistant")  # of which sft, reward and preferences are used
    seeds: int = 2
    betas: tuple[float, ...] = (0.05, 0.15, 0.4, 1.0)  # PPO's, reward units a nat
    iterations: int = 24
    batch: int = 64  # answers an iteration
    ppo: PPOConfig = PPOConfig(new_tokens=40, temperature=0.7, epochs=2, minibatches=2)
    learning_rate: float = 5e-4
    through_betas: tuple[float, ...] = (0.0, 0.05, 0.3)  # of backpropagation through the reward model
    through_iterations: int = 16  # one update each
    through_learning_rate: float = 5e-4
    through: ThroughReward = ThroughReward()
    dpo_betas: tuple[float, ...] = (0.03, 0.1, 0.5)
    dpo_learning_rate: float = 2e-4
    limit: int = 640  # preferences for DPO and for finetuning on favourites, at most
    preference_batch: int = 16
    favourites_learning_rate: float = 2e-4
    epochs: int = 2  # of finetuning on favourites: a point each
    best_of: int = 64  # largest n
    prompts: int = 250  # held out
    how: runs.How = "vmap"  # or one run after another, in the same program
    seed: int = 7
    cache: Path = cache_root() / "data"
    fresh: bool = False

    def __post_init__(self) -> None:
        if self.seeds < 1 or not self.betas or min(*self.betas, *self.dpo_betas, 1.0) <= 0:
            raise UserError("seeds must be at least 1, and PPO's and DPO's betas above 0")


PRESETS = {
    "laptop": Settings(),
    "toy": Settings(
        betas=(0.1, 1.0), dpo_betas=(0.1,), iterations=2, batch=8, epochs=1, through_betas=(0.1,), best_of=4,
        through_iterations=2, prompts=12, limit=16, preference_batch=8,
        ppo=PPOConfig(new_tokens=12, temperature=0.7, epochs=1, minibatches=1),
    ),
    "gpu": Settings(
        seeds=8, betas=(0.02, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6), dpo_betas=(0.01, 0.03, 0.1, 0.3, 1.0), iterations=60,
        batch=256, limit=2200, best_of=256, prompts=900,
    ),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Start:
    """What every method starts from and learns from, and where it shows how far it is."""

    task: Task
    judge: Proxy  # the learned reward
    rankings: list[Ranking]
    bar: Bar


def by_ppo(s: Settings, start: Start) -> methods.Settings:
    """PPO on the learned reward, at every beta and seed."""
    program = runs.ppo_on_reward_model(start.task, start.judge[1], learning_rate=s.learning_rate,
                                       iterations=s.iterations, batch=s.batch, how=s.how)  # fmt: skip
    show = runs.show(start.bar, "gold", "kl")
    return methods.on_policy_by_beta(program, s.betas, s.seeds, s.seed, start.judge, show)


def through_reward(s: Settings, start: Start) -> methods.Settings:
    """Backpropagation through the reward model, at every beta and seed; one update for PPO's rollout."""
    tx = optim.adam_tf(optim.linear_to_zero(s.through_learning_rate, s.through_iterations))
    learn = runs.learn_through_reward(start.task, tx, start.judge[1], s.through)
    program = runs.OnPolicy(start.task, learn, tx, s.through_iterations, s.batch, how=s.how)
    show = runs.show(start.bar, "gold", "kl")
    return methods.on_policy_by_beta(program, s.through_betas, s.seeds, s.seed, start.judge, show)


def by_dpo(s: Settings, start: Start) -> methods.Settings:
    """DPO on the preferences, at every beta and seed."""
    return methods.dpo_by_beta(
        start.task, start.rankings, s.dpo_betas, s.seeds, s.seed, start.judge, learning_rate=s.dpo_learning_rate,
        batch=s.preference_batch, how=s.how, watch=runs.show(start.bar, dpo_loss="loss"),
    )  # fmt: skip


def by_finetuning(s: Settings, start: Start) -> methods.Settings:
    """Finetuning on the favourites alone, one epoch, two epochs, ..., with every seed."""
    found, seeds = {}, range(s.seeds)
    for epochs in range(1, s.epochs + 1):
        policies = methods.finetuned_on_favourites(
            start.task, [start.rankings] * s.seeds, [s.seed + n for n in seeds], epochs=epochs, how=s.how,
            learning_rate=s.favourites_learning_rate, batch=s.preference_batch,
            watch=runs.show(start.bar, nats="loss"),
        )  # fmt: skip
        found[f"{epochs} epoch{'s' * (epochs > 1)}"] = looks(start.task, policies, seeds, s.seed, start.judge)
    return found


def by_best_of(s: Settings, start: Start) -> methods.Settings:
    """Best-of-n by the learned reward, from one pool of answers to each prompt."""
    pool = look(start.task, start.task.start, jax.random.key(s.seed), start.judge, s.best_of)
    start.bar.update()
    return {name: [one] for name, one in best_of_powers(pool).items()}


def not_at_all(s: Settings, start: Start) -> methods.Settings:
    """The start itself."""
    return {"finetuned model": looks(start.task, [start.task.start] * s.seeds, range(s.seeds), s.seed, start.judge)}


def study(s: Settings, run: Run, cells: Cells) -> dict[str, Any]:
    task = reviews(s.start / "sft", s.cache, s.prompts, s.ppo)
    rankings = methods.rankings_of(task, s.start / "preferences/train.jsonl")[: s.limit]
    judge, epoch = learned_reward(task, s.start / "reward"), len(rankings) // s.preference_batch
    parts: dict[str, tuple[Callable[[Settings, Start], methods.Settings], int]] = {
        "PPO": (by_ppo, s.iterations),
        "through the reward model": (through_reward, s.through_iterations),
        "DPO": (by_dpo, epoch),
        "best of n": (by_best_of, 1),
        "finetuned on favourites": (by_finetuning, epoch * sum(range(s.epochs + 1))),
        "start": (not_at_all, 0),
    }
    run.say(f"frontier: {s.seeds} seeds, {len(s.betas)} betas of PPO, {len(s.dpo_betas)} of DPO, best of "
            f"{s.best_of}, {s.prompts} held-out prompts")  # fmt: skip
    with run.progress(sum(steps for _, steps in parts.values()), "frontier") as bar:
        start = Start(task, judge, rankings, bar)
        found = {name: cells(name, functools.partial(make, s, start), steps, bar)
                 for name, (make, steps) in parts.items()}  # fmt: skip
    points = page.points(found)
    figures.frontier(s.run / "frontier.png", points)
    prompts = [task.tok.show(ids) for ids in task.heldout[:6]]
    page.write_page(
        s.run, "The reward-KL frontier",
        f"{s.prompts} held-out prompts, {s.seeds} seeds; 95 % intervals draw seeds and prompts anew. Gold score and "
        "preferences are a simulated annotator's (VADER). Best-of-n picks by the reward model; its KL is measured, "
        "and nearly the bound log n - (n - 1) / n.",
        [("", s.run / "frontier.png"), ("All points", page.table(points)),
         ("Answers", page.samples(prompts, page.first_answers(points)))],
    )  # fmt: skip
    return page.summary(points)


def main(settings: Settings) -> dict[str, Any]:
    return conduct("frontier", settings, stages(settings.start, "sft", "reward", "preferences"), study)


if __name__ == "__main__":
    cli(main, Settings, PRESETS)
