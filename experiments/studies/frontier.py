"""The reward-KL frontier: how much reward PPO, DPO, best-of-n and two other methods gain per nat of KL.

    make frontier                                        `make assistant` (once), then this
    python -m experiments.studies.frontier --start runs/mine --betas 0.05 0.2 0.8 --seeds 4

All methods start from the same finetuned model and use the same preferences, those of the reward model. PPO maximises
the learned reward minus beta KL, for each beta and seed; so does backpropagation through the reward model, by its
derivative instead of a policy gradient (`jaxgpt/rlhf/through_reward.py`); DPO uses the preferences themselves, for each
beta and seed; best-of-n picks by the learned reward; the last one finetunes on the favourites alone ("preferred-FT",
Rafailov et al. 2023). A run is a pure function of arrays, so a whole grid is one compiled program: `jax.vmap`, sharded
over devices.

Measured on held-out prompts against KL(pi || start) in nats per sequence: the annotator's gold reward, which training
sees only through noisy choices; the reward model; and a judge fitted on people's labels. Bands are the range of the
seeds, from 5 seeds on a t-interval over them. An interrupted study resumes after its last finished part.
"""

import dataclasses
import functools
from pathlib import Path
from typing import Annotated, Any, ClassVar

from jaxgpt.config import Count, Positive, Positives, Range, Seed, check_settings
from jaxgpt.errors import UserError
from jaxgpt.files import cache_root, read_json
from jaxgpt.rlhf.intervals import HOW_TO_READ
from jaxgpt.rlhf.ppo import PPOConfig
from jaxgpt.rlhf.through_reward import ThroughRewardConfig
from jaxgpt.runs import pages
from jaxgpt.runs.cli import cli
from jaxgpt.runs.run import Run
from jaxgpt.study import figures, frontier, many, methods, results
from jaxgpt.study.cells import ResultCache, run_study, stage_fingerprints
from jaxgpt.study.frontier import FrontierSetup
from jaxgpt.study.task import load_reward_model, make_reviews_task
from jaxgpt.training import optim


@dataclasses.dataclass(frozen=True)
class Settings:
    """Half an hour on one CPU core when DPO had 640 preferences; best-of-n gains most per nat, PPO goes furthest
    (docs/results.md)."""

    PLACE_FIELDS: ClassVar[tuple[str, ...]] = ("start",)

    run: Path = Path("runs/frontier")
    start: Path = Path("runs/assistant")  # run folder whose sft, reward and preferences are used
    seeds: Count = 2
    betas: Positives = (0.05, 0.15, 0.4, 1.0)  # of PPO, in reward units per nat
    iterations: Count = 24
    batch: Count = 64  # answers per iteration
    ppo: PPOConfig = PPOConfig(new_tokens=40, temperature=0.7, epochs=2, minibatches=2)
    learning_rate: Positive = 5e-4
    through_betas: Annotated[tuple[float, ...], Range(0)] = (0.0, 0.05, 0.3)  # of backpropagation through the reward
    through_iterations: Count = 16  # one update each
    through_learning_rate: Positive = 5e-4
    through: ThroughRewardConfig = ThroughRewardConfig()
    dpo_betas: Positives = (0.03, 0.1, 0.5)
    dpo_learning_rate: Positive = 2e-4
    preference_batch: Count = 16
    favourites_learning_rate: Positive = 2e-4
    epochs: Count = 2  # of finetuning on favourites: one point for each number of epochs up to this
    best_of: Annotated[int, Range(2)] = 64  # largest n
    prompts: Annotated[int, Range(2)] = 250  # held out
    how: many.RunMapping = "vmap"  # map: one run after another, in the same program
    seed: Seed = 7
    cache: Path = cache_root() / "data"
    fresh: bool = False

    def __post_init__(self) -> None:
        check_settings(self)
        if not self.betas:
            raise UserError("betas is empty; give at least one for PPO")


PRESETS = {
    "laptop": Settings(),
    "toy": Settings(
        betas=(0.1, 1.0),
        dpo_betas=(0.1,),
        iterations=2,
        batch=8,
        epochs=1,
        through_betas=(0.1,),
        best_of=4,
        through_iterations=2,
        prompts=12,
        preference_batch=8,
        ppo=PPOConfig(new_tokens=12, temperature=0.7, epochs=1, minibatches=1),
    ),
    "gpu": Settings(
        seeds=8,
        betas=(0.02, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6),
        dpo_betas=(0.01, 0.03, 0.1, 0.3, 1.0),
        iterations=60,
        batch=256,
        best_of=256,
        prompts=900,
    ),
}


def through_reward(s: Settings, start: FrontierSetup) -> frontier.Settings:
    """Backpropagation through the reward model, with one update per rollout."""
    tx = optim.adam_tf(optim.linear_to_zero(s.through_learning_rate, s.through_iterations))
    learn = many.make_through_reward_learner(start.task, tx, start.judge[1], s.through)
    program = many.OnPolicyTrainer(start.task, learn, tx, s.through_iterations, s.batch, how=s.how)
    return start.on_policy(program, s.through_betas)


def study_parts(s: Settings, rankings: int) -> frontier.MethodRuns:
    """Every method with its settings, and the number of steps it takes with that many preferences."""
    epoch, epochs, batch = rankings // s.preference_batch, range(1, s.epochs + 1), s.preference_batch
    ppo: dict[str, Any] = {"learning_rate": s.learning_rate, "iterations": s.iterations, "batch": s.batch}
    return {
        "PPO": (lambda start: start.ppo(s.betas, **ppo), s.iterations),
        "through the reward model": (functools.partial(through_reward, s), s.through_iterations),
        "DPO": (lambda start: start.dpo(s.dpo_betas, learning_rate=s.dpo_learning_rate, batch=batch), epoch),
        "best of n": (lambda start: start.best_of(s.best_of), 1),
        "finetuned on favourites": (
            lambda start: start.favourites(epochs, learning_rate=s.favourites_learning_rate, batch=batch),
            epoch * sum(epochs),
        ),
        "start": (FrontierSetup.itself, 0),
    }


def study(s: Settings, run: Run, cells: ResultCache) -> dict[str, Any]:
    task = make_reviews_task(s.start / "sft", s.cache, s.prompts, s.ppo)
    limit = read_json(s.start / "reward/settings.json")["settings"]["limit"]  # DPO's preferences are the reward model's
    rankings = methods.load_rankings(task, s.start / "preferences/train.jsonl", run.say, limit)
    proxy, every = load_reward_model(task, s.start / "reward"), study_parts(s, len(rankings))
    run.say(
        f"frontier: {s.seeds} seeds, {len(s.betas)} betas of PPO, {len(s.dpo_betas)} of DPO, best of "
        f"{s.best_of}, {s.prompts} held-out prompts"
    )
    with run.progress(frontier.total_steps(every), "frontier") as bar:
        found = frontier.run_methods(every, FrontierSetup(task, proxy, rankings, s.seeds, s.seed, s.how, bar), cells)
    points = results.read_points(found)
    figures.plot_frontier(s.run / "frontier.png", points)
    prompts = [task.tok.show(ids) for ids in task.heldout[:6]]
    pages.write_page(
        s.run,
        "The reward-KL frontier",
        f"{s.prompts} held-out prompts, {s.seeds} seeds; {len(rankings):,} preferences, the same for reward model, DPO "
        "and finetuning. Gold rewards and preferences come from a simulated annotator (VADER). Best-of-n picks by the "
        f"reward model; its measured KL is close to the bound log n - (n - 1) / n. {HOW_TO_READ}",
        [
            ("", s.run / "frontier.png"),
            ("All points", results.points_table(points)),
            ("Answers", results.answers_html(prompts, results.collect_first_answers(points))),
        ],
    )
    results.say_points(run.say, points)
    return {"preferences": len(rankings), "points": results.summarise_points(points)}


def main(settings: Settings) -> dict[str, Any]:
    return run_study("frontier", settings, stage_fingerprints(settings.start, "sft", "reward", "preferences"), study)


if __name__ == "__main__":
    cli(main, Settings, PRESETS)
