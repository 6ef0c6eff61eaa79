"""Ziegler's setting: the KL held at a target by an adaptive penalty, and what happens without one.

    python -m experiments.kl_control                     after `make assistant`

beta follows the measured KL (Ziegler et al. 2020, section 2.2): e = clip(KL / target - 1, -0.2, 0.2), beta grows by the
factor 1 + e episodes / horizon. One PPO run for each target in nats a sequence, and one without any penalty, each with
several seeds; then the same prompts answered by all. Without a penalty the learned reward keeps rising while the
answers turn into whatever it overrates: the samples show it, and so do the judge and how varied the answers are.
"""

import dataclasses
import functools
from pathlib import Path
from typing import Any, ClassVar

import jax.numpy as jnp
import jax.random
import numpy as np

from jaxgpt import kl, sharding
from jaxgpt.checkpoint import load_model
from jaxgpt.cli import cli
from jaxgpt.config import ModelConfig, UserError
from jaxgpt.evaluate import crossed_interval, distinct_2
from jaxgpt.ppo import Controller, PPOConfig
from jaxgpt.progress import Bar
from jaxgpt.report import new_figure
from jaxgpt.run import Run, cache_root, run_fingerprint
from jaxgpt.structs import Params
from jaxgpt.study import page, runs
from jaxgpt.study.cells import Cells
from jaxgpt.study.page import Point
from jaxgpt.study.task import Seen, Task, look, reviews


@dataclasses.dataclass(frozen=True)
class Settings:
    """14 minutes on one CPU core: 3.1 and 7.6 nats for targets of 3 and 8, 95 without a price (docs/results.md)."""

    PLACE_FIELDS: ClassVar[tuple[str, ...]] = ("start",)

    run: Path = Path("runs/kl_control")
    start: Path = Path("runs/assistant")  # of which sft and reward are used
    targets: tuple[float, ...] = (3.0, 8.0)  # nats a sequence
    beta: float = 0.2  # reward units a nat, where the controller starts
    horizon: float = 200.0  # episodes; Ziegler et al. had 10,000 of 2 million
    seeds: int = 2
    iterations: int = 36
    batch: int = 64
    ppo: PPOConfig = PPOConfig(new_tokens=40, temperature=0.7, epochs=2, minibatches=2)
    learning_rate: float = 5e-4
    prompts: int = 300  # held out
    how: runs.How = "vmap"
    seed: int = 21
    cache: Path = cache_root() / "data"
    fresh: bool = False

    def __post_init__(self) -> None:
        if not self.targets or min(self.targets) <= 0 or self.horizon <= 0 or self.seeds < 1:
            raise UserError("targets, horizon and seeds must all be above 0")


PRESETS = {
    "laptop": Settings(),
    "toy": Settings(targets=(4.0,), seeds=1, iterations=8, batch=8, prompts=12,
                    ppo=PPOConfig(new_tokens=12, temperature=0.7, epochs=1, minibatches=1)),
    "gpu": Settings(targets=(2.0, 4.0, 8.0, 16.0), seeds=8, iterations=300, batch=256, horizon=10_000.0, prompts=900),
}  # fmt: skip


def controlled(
    s: Settings, task: Task, judge: tuple[Params, ModelConfig], control: Controller, bar: Bar
) -> dict[str, Any]:
    """PPO under one controller, all seeds at once: its curves [seeds, iterations], and the answers of its policies."""
    program = runs.ppo_on_reward_model(task, judge[1], learning_rate=s.learning_rate, iterations=s.iterations,
                                       batch=s.batch, how=s.how)  # fmt: skip
    policies, curves = program.train(
        [control] * s.seeds, [s.seed + n for n in range(s.seeds)], [{"reward": judge[0]}] * s.seeds,
        lambda i, found: bar.update(beta=found["beta"].mean(), kl=found["kl"].mean(), score=found["score"].mean()),
    )  # fmt: skip
    keys = [jax.random.fold_in(jax.random.key(s.seed), n) for n in range(s.seeds)]
    answers = [look(task, policy, key, judge) for policy, key in zip(policies, keys, strict=True)]
    return {
        "curves": {name: curves[name].T for name in ("kl", "beta", "score", "gold", "judge", "entropy", "length")},
        "seen": [one.to_json(texts=12) for one in answers],
        "distinct_2": [distinct_2(one.texts) for one in answers],
    }


def smoothed(x: np.ndarray, width: int = 5) -> np.ndarray:
    """A running mean over the last axis, of the same length."""
    kernel = np.ones(width)
    return np.apply_along_axis(lambda y: np.convolve(y, kernel, "same") / np.convolve(np.ones_like(y), kernel, "same"),
                               -1, x)  # fmt: skip


def figure(path: Path, found: dict[str, dict[str, Any]], targets: dict[str, float | None]) -> None:
    """KL with its targets, beta, the learned reward, and the gold score, over the iterations."""
    picture, axes = new_figure(1, 4, 17, 3.8)
    panels = {"kl": "KL, nats a sequence", "beta": "beta, reward units a nat", "score": "reward model h",
              "gold": "gold score"}  # fmt: skip
    for n, (name, one) in enumerate(found.items()):
        for axis, (measure, label) in zip(axes[0], panels.items(), strict=True):
            if measure == "beta" and targets[name] is None:
                continue
            curves = smoothed(np.array(one["curves"][measure]))
            axis.plot(np.arange(1, curves.shape[1] + 1), curves.T, color=f"C{n}", lw=1, alpha=0.7)
            axis.plot([], [], color=f"C{n}", label=name)
            axis.set(xlabel="iterations", ylabel=label)
        if targets[name] is not None:
            axes[0, 0].axhline(targets[name], color=f"C{n}", ls=":", lw=1)
    axes[0, 0].set_ylim(0, 3 * max(target for target in targets.values() if target))
    axes[0, 1].set_yscale("log")
    axes[0, 3].legend(frameon=False, fontsize=8)
    picture.savefig(path)


def report(s: Settings, task: Task, found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """kl_control.png and report.html; returns what was held, and what the policies are like."""
    targets = dict(zip(found, (*s.targets, None), strict=True))
    figure(s.run / "kl_control.png", found, targets)
    last = {name: np.array(one["curves"]["kl"])[:, -max(s.iterations // 4, 2) :] for name, one in found.items()}
    held: dict[str, Any] = {
        name: {"target": targets[name], "last_quarter": dataclasses.asdict(crossed_interval(kl))}
        for name, kl in last.items()
    }
    methods = {name: [Point("", [Seen.from_json(seen) for seen in one["seen"]])] for name, one in found.items()}
    prompts = [task.tok.show(ids) for ids in task.heldout[:12]]
    variety = [[name, f"{held[name]['last_quarter']['mean']:.2f}", *(f"{x:.2f}" for x in one["distinct_2"])]
               for name, one in found.items()]  # fmt: skip
    page.write_page(
        s.run, "KL under control",
        "PPO whose price of a nat follows the measured KL towards a target (dotted), and PPO without a price. "
        f"{s.seeds} seeds each; curves are running means over 5 iterations.",
        [("", s.run / "kl_control.png"), ("Held-out prompts", page.table(methods)),
         ("KL of the last quarter's iterations, and distinct pairs of words, a column a seed",
          page.plain_table(("run", "KL", *(f"distinct-2, seed {n}" for n in range(s.seeds))), variety)),
         ("Answers", page.samples(prompts, {name: row[0].runs[0].texts for name, row in methods.items()}))],
    )  # fmt: skip
    variety_of = {name: one["distinct_2"] for name, one in found.items()}
    return {"held": held, "policies": page.summary(methods), "distinct_2": variety_of}


def main(settings: Settings) -> dict[str, Any]:
    s = settings
    inputs = {name: run_fingerprint(s.start / name, name) for name in ("sft", "reward")}
    with Run(s.run, s, stage="kl_control", inputs=inputs, fresh=s.fresh) as run:
        if run.finished:
            run.say(f"kl_control: already done, see {s.run / 'report.html'}")
            return run.results
        task = reviews(s.start / "sft", s.cache, s.prompts, s.ppo)
        params, config, _, _ = load_model(s.start / "reward")
        judge = sharding.replicate(params, task.mesh), config
        beta = jnp.float32(s.beta)
        controls: dict[str, Controller] = {
            f"target {target:g} nats": kl.AdaptiveKL(beta, target, s.horizon) for target in s.targets
        }
        controls["no penalty"] = kl.FixedKL(jnp.float32(0.0))
        cells = Cells(run)
        with run.progress(len(controls) * s.iterations, "kl_control") as bar:
            found = {
                name: cells(name.replace(" ", "-"), functools.partial(controlled, s, task, judge, control, bar),
                            s.iterations, bar)
                for name, control in controls.items()
            }  # fmt: skip
        results = report(s, task, found)
        for name, one in results["held"].items():
            run.say(f"{name}: KL {one['last_quarter']['mean']:.2f} in the last quarter")
        run.finish(results)
        return run.results


if __name__ == "__main__":
    cli(main, Settings, PRESETS)
