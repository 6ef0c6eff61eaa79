"""How backpropagation through the learned reward model fails, and when it doesn't.

    python -m experiments.studies.through_reward                 after `make assistant`

The policy follows the derivative of h with respect to its logits, through straight-through Gumbel-softmax samples
(`jaxgpt/rlhf/through_reward.py`), minus beta KL; `experiments.studies.frontier` compares that with PPO. This study
trains one policy per temperature tau of the relaxation with the tokens' own embeddings as the reward model's input, and
one with the mixtures themselves: the objective then sees inputs that no text has, and more reward than real samples
get. At the start, each derivative is also compared with the policy gradient of the same answers' rewards, which is
unbiased: by their cosine, between independent halves of the answers, next to the policy gradient's with itself.
"""

import dataclasses
import functools
from pathlib import Path
from typing import Annotated, Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

from jaxgpt import losses
from jaxgpt.config import Count, Nonnegative, Positive, Positives, Range, Seed, check_settings
from jaxgpt.errors import UserError
from jaxgpt.files import cache_root
from jaxgpt.losses import kl, returns
from jaxgpt.models import transformer
from jaxgpt.rlhf import reward, through_reward
from jaxgpt.rlhf.intervals import HOW_TO_READ
from jaxgpt.rlhf.ppo import PPOConfig
from jaxgpt.rlhf.through_reward import ThroughRewardConfig
from jaxgpt.runs import pages
from jaxgpt.runs.cli import cli
from jaxgpt.runs.progress import Bar
from jaxgpt.runs.run import Run
from jaxgpt.structs import Array, Batch, Params
from jaxgpt.study import figures, many, results
from jaxgpt.study.cells import ResultCache, run_study, stage_fingerprints
from jaxgpt.study.task import (
    RewardModel,
    Task,
    evaluate_policies,
    load_reward_model,
    make_reviews_task,
    sample_task_answers,
)
from jaxgpt.training import optim


@dataclasses.dataclass(frozen=True)
class Settings:
    """23 minutes on one CPU core: gold reward 0.51 at tau 1, 0.76 with mixtures (docs/results.md)."""

    PLACE_FIELDS: ClassVar[tuple[str, ...]] = ("start",)

    run: Path = Path("runs/through_reward")
    start: Path = Path("runs/assistant")  # run folder whose sft and reward are used
    taus: Positives = (0.3, 1.0, 3.0)  # temperatures of the relaxation
    beta: Nonnegative = 0.05  # reward units per nat
    seeds: Count = 2
    iterations: Count = 40
    batch: Count = 64
    learning_rate: Positive = 3e-4
    ppo: PPOConfig = PPOConfig(new_tokens=40, temperature=0.7)  # how answers are sampled
    compared_answers: Count = 512  # answers whose gradients are compared
    prompts: Annotated[int, Range(2)] = 300  # held out
    how: many.RunMapping = "vmap"
    seed: Seed = 61
    cache: Path = cache_root() / "data"
    fresh: bool = False

    def __post_init__(self) -> None:
        check_settings(self)
        if not self.taus:
            raise UserError("taus is empty; give at least one")
        if self.compared_answers % (2 * self.batch):
            raise UserError(
                f"compared_answers is {self.compared_answers}, not a multiple of twice the batch {self.batch}"
            )


PRESETS = {
    "laptop": Settings(),
    "toy": Settings(
        taus=(1.0,),
        seeds=1,
        iterations=3,
        batch=8,
        compared_answers=16,
        prompts=12,
        ppo=PPOConfig(new_tokens=12, temperature=0.7),
    ),
    "gpu": Settings(
        taus=(0.1, 0.3, 1.0, 3.0, 10.0), seeds=8, iterations=300, batch=256, compared_answers=8192, prompts=900
    ),
}


def variants(s: Settings) -> dict[str, ThroughRewardConfig]:
    """The variants compared: every tau, and mixtures as the input."""
    found = {f"tau {tau:g}": ThroughRewardConfig(tau=tau) for tau in s.taus}
    return {**found, "mixtures, tau 1": ThroughRewardConfig(straight_through=False)}


def train_variant(s: Settings, task: Task, proxy: RewardModel, how: ThroughRewardConfig, bar: Bar) -> dict[str, Any]:
    """Train one variant, all seeds at once: curves [seeds, iterations], and the policies' answers."""
    tx = optim.adam_tf(optim.linear_to_zero(s.learning_rate, s.iterations))
    learn = many.make_through_reward_learner(task, tx, proxy[1], how)
    policies, curves = many.OnPolicyTrainer(task, learn, tx, s.iterations, s.batch, how=s.how).train(
        [kl.FixedKL(jnp.float32(s.beta))] * s.seeds,
        [s.seed + n for n in range(s.seeds)],
        [{"reward": proxy[0]}] * s.seeds,
        many.make_progress_watch(bar, "h", "h_seen", "kl"),
    )
    kept = {name: curves[name].T for name in ("h", "h_seen", "gold", "kl")}
    return {"curves": kept, "seen": evaluate_policies(task, policies, range(s.seeds), s.seed, proxy)}


def gradient_cosines(s: Settings, task: Task, proxy: RewardModel, bar: Bar) -> dict[str, float]:
    """Cosines at the start between gradients from independent halves of sampled answers: each variant's derivative
    with the policy gradient, and the policy gradient with itself (the most that its noise allows)."""
    rng = np.random.default_rng(s.seed)
    ids = [task.prompts[i] for i in rng.integers(len(task.prompts), size=s.compared_answers)]
    rows = sample_task_answers(task, task.start, ids, jax.random.key(s.seed)).rows
    params, config = proxy
    whole = {"reference": task.start, "reward": params}

    def by_policy(policy: Params, rows: Batch, key: Array) -> Array:
        h_B = reward.score(params, config, rows)
        logp_B = transformer.answer_logp(policy, task.config, rows, temperature=task.algorithm.temperature)
        return losses.reduce(losses.reinforce(logp_B, returns.rloo(h_B[None])[0])).value

    def through(how: ThroughRewardConfig, policy: Params, rows: Batch, key: Array) -> Array:
        loss = through_reward.make_loss(task.config, config, 0.0, how, task.algorithm.temperature)
        return loss({**whole, "policy": policy}, rows, key)[0].value

    def halves(objective: Any) -> list[Array]:
        slope = jax.jit(jax.grad(objective))
        parts: list[list[Array]] = [[], []]
        for n, at in enumerate(range(0, s.compared_answers, s.batch)):
            part = jax.tree.map(lambda x, at=at: jnp.asarray(x[at : at + s.batch]), rows)
            gradient = slope(task.start, part, jax.random.fold_in(jax.random.key(s.seed), n))
            parts[n % 2].append(ravel_pytree(gradient)[0])
        return [jnp.stack(half).sum(0) for half in parts]

    def cosine(a: Array, b: Array) -> float:
        return float(a @ b / (optax.tree.norm(a) * optax.tree.norm(b)))

    exact = halves(by_policy)
    found = {"policy gradient": cosine(exact[0], exact[1])}
    for name, how in variants(s).items():
        own = halves(functools.partial(through, how))
        found[name] = (cosine(own[0], exact[1]) + cosine(own[1], exact[0])) / 2
    bar.update()
    return found


def study(s: Settings, run: Run, cells: ResultCache) -> dict[str, Any]:
    task = make_reviews_task(s.start / "sft", s.cache, s.prompts, s.ppo)
    proxy = load_reward_model(task, s.start / "reward")
    with run.progress(len(variants(s)) * s.iterations + 1, "through_reward") as bar:
        cosines = cells("alignment", functools.partial(gradient_cosines, s, task, proxy, bar), 1, bar)
        found = {
            name: cells(name, functools.partial(train_variant, s, task, proxy, how, bar), s.iterations, bar)
            for name, how in variants(s).items()
        }
    figures.plot_through_reward(s.run / "through_reward.png", found)
    points = results.read_points({name: {"": one["seen"]} for name, one in found.items()})
    prompts = [task.tok.show(ids) for ids in task.heldout[:6]]
    rows = [[name, f"{value:.3f}"] for name, value in cosines.items()]
    pages.write_page(
        s.run,
        "Through the reward model",
        f"{s.prompts} held-out prompts, {s.seeds} seeds, beta {s.beta:g}. The "
        "objective sees the sampled tokens' embeddings, or (mixtures) weighted means of all tokens' embeddings. "
        f"{HOW_TO_READ}",
        [
            ("", s.run / "through_reward.png"),
            ("Held-out prompts", results.points_table(points)),
            ("Cosine to the policy gradient at the start", pages.make_table(("derivative", "cosine"), rows)),
            ("Answers", results.answers_html(prompts, results.collect_first_answers(points))),
        ],
    )
    results.say_points(run.say, points)
    for name, value in cosines.items():
        run.say(f"{name}: cosine to the policy gradient {value:.3f}")
    return {"cosines": cosines, "policies": results.summarise_points(points)}


def main(settings: Settings) -> dict[str, Any]:
    return run_study("through_reward", settings, stage_fingerprints(settings.start, "sft", "reward"), study)


if __name__ == "__main__":
    cli(main, Settings, PRESETS)
