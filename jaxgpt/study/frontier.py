"""The methods of a reward-KL frontier, each at all of its settings and seeds: one point per setting.

Every method here returns {setting: [measures of a policy's answers to the held-out prompts, one per seed]} as JSON,
which a cell stores and `page.read_points` reads.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxgpt.data.comparisons import TokenizedPreference
from jaxgpt.losses import kl
from jaxgpt.runs.progress import Bar
from jaxgpt.structs import Params
from jaxgpt.study import many, methods
from jaxgpt.study.cells import ResultCache
from jaxgpt.study.task import RewardModel, Task, best_of_n_sweep, evaluate_policies, evaluate_policy

Settings = dict[str, list[dict[str, Any]]]


@dataclasses.dataclass(frozen=True)
class FrontierSetup:
    """What every method starts from and learns from. Seeds count up from `seed`."""

    task: Task
    judge: RewardModel  # the learned reward
    rankings: list[TokenizedPreference]
    seeds: int
    seed: int
    how: many.RunMapping
    bar: Bar

    def itself(self) -> Settings:
        """The starting model itself, which has one setting."""
        return {
            "": evaluate_policies(self.task, [self.task.start] * self.seeds, range(self.seeds), self.seed, self.judge)
        }

    def on_policy(self, program: many.OnPolicyTrainer, betas: Sequence[float]) -> Settings:
        """Every beta and seed of an on-policy method, in one program."""
        grid = [(beta, n) for beta in betas for n in range(self.seeds)]
        policies, _ = program.train(
            [kl.FixedKL(jnp.float32(beta)) for beta, _ in grid],
            [self.seed + n for _, n in grid],
            [{"reward": self.judge[0]}] * len(grid),
            many.make_progress_watch(self.bar, "gold", "kl"),
        )
        return self._by_beta(betas, policies)

    def ppo(self, betas: Sequence[float], *, learning_rate: float, iterations: int, batch: int) -> Settings:
        """PPO on the learned reward."""
        program = many.make_ppo_trainer(
            self.task, self.judge[1], learning_rate=learning_rate, iterations=iterations, batch=batch, how=self.how
        )
        return self.on_policy(program, betas)

    def dpo(self, betas: Sequence[float], *, learning_rate: float, batch: int) -> Settings:
        """DPO on the preferences, every beta and seed in one program."""
        grid = [(beta, n) for beta in betas for n in range(self.seeds)]
        policies = methods.train_dpo_policies(
            self.task,
            [self.rankings] * len(grid),
            [beta for beta, _ in grid],
            [self.seed + n for _, n in grid],
            learning_rate=learning_rate,
            batch=batch,
            how=self.how,
            watch=many.make_progress_watch(self.bar, dpo_loss="loss"),
        )
        return self._by_beta(betas, policies)

    def favourites(self, epochs: Sequence[int], *, learning_rate: float, batch: int) -> Settings:
        """Finetuning on the favourites alone, from the start for each number of epochs."""
        found, seeds = {}, range(self.seeds)
        for count in epochs:
            policies = methods.finetune_on_favourites(
                self.task,
                [self.rankings] * self.seeds,
                [self.seed + n for n in seeds],
                epochs=count,
                learning_rate=learning_rate,
                batch=batch,
                how=self.how,
                watch=many.make_progress_watch(self.bar, nats="loss"),
            )
            found[f"{count} epoch{'s' * (count > 1)}"] = evaluate_policies(
                self.task, policies, seeds, self.seed, self.judge
            )
        return found

    def best_of(self, most: int) -> Settings:
        """Best-of-n by the learned reward for n = 2, 4, ..., from one pool of `most` answers per prompt."""
        pool = evaluate_policy(self.task, self.task.start, jax.random.key(self.seed), self.judge, most)
        self.bar.update()
        return {name: [one] for name, one in best_of_n_sweep(pool).items()}

    def _by_beta(self, betas: Sequence[float], policies: Sequence[Params]) -> Settings:
        found = evaluate_policies(self.task, policies, [*range(self.seeds)] * len(betas), self.seed, self.judge)
        return {f"beta {beta:g}": found[n * self.seeds : (n + 1) * self.seeds] for n, beta in enumerate(betas)}


MethodRuns = Mapping[
    str, tuple[Callable[[FrontierSetup], Settings], int]
]  # by method: how to run it, and its steps on the bar


def total_steps(parts: MethodRuns) -> int:
    """The steps of all parts together."""
    return sum(count for _, count in parts.values())


def run_methods(parts: MethodRuns, start: FrontierSetup, cells: ResultCache) -> dict[str, Settings]:
    """Run all parts one after another, each cached as a cell."""
    return {
        name: cells(name, functools.partial(make, start), count, start.bar) for name, (make, count) in parts.items()
    }
