"""Ziegler's setup: an adaptive penalty that holds the KL at a target, and what happens without one.

    python -m experiments.studies.kl_control                     after `make assistant`

beta follows the measured KL (Ziegler et al. 2020, section 2.2): with e = clip(KL / target - 1, -0.2, 0.2), beta is
multiplied by 1 + e episodes / horizon. There is one PPO run per target, in nats per sequence, and one without any
penalty, each with several seeds; then all answer the same prompts. Without a penalty the learned reward keeps rising
while the answers turn into whatever it overrates: the samples, the judge and the variety of the answers all show it.
"""

import dataclasses
import functools
from pathlib import Path
from typing import Annotated, Any, ClassVar

import jax.numpy as jnp
import numpy as np

from jaxgpt.config import Count, Positive, Positives, Range, Seed, check_settings
from jaxgpt.errors import UserError
from jaxgpt.files import cache_root
from jaxgpt.losses import kl
from jaxgpt.rlhf.intervals import HOW_TO_READ, distinct_2, summarise_seeds
from jaxgpt.rlhf.ppo import Controller, PPOConfig
from jaxgpt.runs import pages
from jaxgpt.runs.cli import cli
from jaxgpt.runs.progress import Bar
from jaxgpt.runs.run import Run
from jaxgpt.study import figures, many, results
from jaxgpt.study.cells import ResultCache, run_study, stage_fingerprints
from jaxgpt.study.task import RewardModel, Task, evaluate_policies, load_reward_model, make_reviews_task


@dataclasses.dataclass(frozen=True)
class Settings:
    """14 minutes on one CPU core: 3.1 and 7.6 nats for targets of 3 and 8, 95 without a penalty (docs/results.md)."""

    PLACE_FIELDS: ClassVar[tuple[str, ...]] = ("start",)

    run: Path = Path("runs/kl_control")
    start: Path = Path("runs/assistant")  # run folder whose sft and reward are used
    targets: Positives = (3.0, 8.0)  # nats per sequence
    beta: Positive = 0.2  # initial value, in reward units per nat
    horizon: Positive = 200.0  # episodes; Ziegler et al. used 10,000, of 2 million in all
    seeds: Count = 2
    iterations: Count = 36
    batch: Count = 64
    ppo: PPOConfig = PPOConfig(new_tokens=40, temperature=0.7, epochs=2, minibatches=2)
    learning_rate: Positive = 5e-4
    prompts: Annotated[int, Range(2)] = 300  # held out
    how: many.RunMapping = "vmap"
    seed: Seed = 21
    cache: Path = cache_root() / "data"
    fresh: bool = False

    def __post_init__(self) -> None:
        check_settings(self)
        if not self.targets:
            raise UserError("targets is empty; give at least one")


PRESETS = {
    "laptop": Settings(),
    "toy": Settings(
        targets=(4.0,),
        seeds=1,
        iterations=8,
        batch=8,
        prompts=12,
        ppo=PPOConfig(new_tokens=12, temperature=0.7, epochs=1, minibatches=1),
    ),
    "gpu": Settings(targets=(2.0, 4.0, 8.0, 16.0), seeds=8, iterations=300, batch=256, horizon=10_000.0, prompts=900),
}


def train_controlled(s: Settings, task: Task, proxy: RewardModel, control: Controller, bar: Bar) -> dict[str, Any]:
    """Run PPO under one controller, all seeds at once: curves [seeds, iterations], and the policies' answers."""
    program = many.make_ppo_trainer(
        task, proxy[1], learning_rate=s.learning_rate, iterations=s.iterations, batch=s.batch, how=s.how
    )
    policies, curves = program.train(
        [control] * s.seeds,
        [s.seed + n for n in range(s.seeds)],
        [{"reward": proxy[0]}] * s.seeds,
        many.make_progress_watch(bar, "beta", "kl", "score"),
    )
    kept = {name: curves[name].T for name in ("kl", "beta", "score", "gold", "judge", "entropy", "length")}
    return {"curves": kept, "seen": evaluate_policies(task, policies, range(s.seeds), s.seed, proxy, texts=s.prompts)}


def study(s: Settings, run: Run, cells: ResultCache) -> dict[str, Any]:
    task = make_reviews_task(s.start / "sft", s.cache, s.prompts, s.ppo)
    proxy, beta = load_reward_model(task, s.start / "reward"), jnp.float32(s.beta)
    controls: dict[str, tuple[Controller, float | None]] = {
        f"target {target:g} nats": (kl.AdaptiveKL(beta, target, s.horizon), target) for target in s.targets
    }
    controls["no penalty"] = kl.FixedKL(jnp.float32(0.0)), None
    with run.progress(len(controls) * s.iterations, "kl_control") as bar:
        found = {
            name: cells(name, functools.partial(train_controlled, s, task, proxy, control, bar), s.iterations, bar)
            for name, (control, _) in controls.items()
        }
    figures.plot_kl_control(s.run / "kl_control.png", found, {name: target for name, (_, target) in controls.items()})
    points = results.read_points({name: {"": one["seen"]} for name, one in found.items()})
    last = {name: np.array(one["curves"]["kl"])[:, -max(s.iterations // 4, 2) :] for name, one in found.items()}
    held = {name: summarise_seeds(kl.mean(1)) for name, kl in last.items()}  # one number per run: iterations depend
    variety = {name: [distinct_2(one["texts"]) for one in found[name]["seen"]] for name in found}
    rows = [[name, held[name].text(2), *(f"{x:.2f}" for x in own)] for name, own in variety.items()]
    prompts = [task.tok.show(ids) for ids in task.heldout[:12]]
    pages.write_page(
        s.run,
        "KL under control",
        "PPO whose KL penalty follows the measured KL towards a target (dotted), and PPO without a penalty. "
        f"{s.prompts} held-out prompts, {s.seeds} seeds each; curves are running means over 5 iterations. "
        f"{HOW_TO_READ}",
        [
            ("", s.run / "kl_control.png"),
            ("Held-out prompts", results.points_table(points)),
            (
                "KL over the last quarter of the iterations, and distinct pairs of words, by seed",
                pages.make_table(("run", "KL", *(f"distinct-2, seed {n}" for n in range(s.seeds))), rows),
            ),
            ("Answers", results.answers_html(prompts, results.collect_first_answers(points))),
        ],
    )
    results.say_points(run.say, points)
    for name, one in held.items():
        run.say(f"{name}: KL {one.text(2)} in the last quarter")
    kept = {name: {"target": controls[name][1], "last_quarter": dataclasses.asdict(one)} for name, one in held.items()}
    return {"held": kept, "policies": results.summarise_points(points), "distinct_2": variety}


def main(settings: Settings) -> dict[str, Any]:
    return run_study("kl_control", settings, stage_fingerprints(settings.start, "sft", "reward"), study)


if __name__ == "__main__":
    cli(main, Settings, PRESETS)
