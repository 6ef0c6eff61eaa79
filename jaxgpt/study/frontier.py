"""The methods of a reward-KL frontier, each at all of its settings and seeds: one point per setting.

Every method here returns {setting: [measures of a policy's answers to the held-out prompts, one per seed]} as JSON,
which a cell stores and `page.points` reads.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxgpt.data.comparisons import Ranking
from jaxgpt.losses import kl
from jaxgpt.runs.progress import Bar
from jaxgpt.structs import Params
from jaxgpt.study import many, methods
from jaxgpt.study.cells import Cells
from jaxgpt.study.task import Proxy, Task, best_of_powers, look, looks

Settings = dict[str, list[dict[str, Any]]]


@dataclasses.dataclass(frozen=True)
class Start:
    """What every method starts from and learns from. Seeds count up from `seed`."""

    task: Task
    judge: Proxy  # the learned reward
    rankings: list[Ranking]
    seeds: int
    seed: int
    how: many.How
    bar: Bar

    def itself(self) -> Settings:
        """The starting model itself, which has one setting."""
        return {"": looks(self.task, [self.task.start] * self.seeds, range(self.seeds), self.seed, self.judge)}

    def on_policy(self, program: many.OnPolicy, betas: Sequence[float]) -> Settings:
        """Every beta and seed of an on-policy method, in one program."""
        grid = [(beta, n) for beta in betas for n in range(self.seeds)]
        policies, _ = program.train(
            [kl.FixedKL(jnp.float32(beta)) for beta, _ in grid],
            [self.seed + n for _, n in grid],
            [{"reward": self.judge[0]}] * len(grid),
            many.show(self.bar, "gold", "kl"),
        )
        return self._by_beta(betas, policies)

    def ppo(self, betas: Sequence[float], *, learning_rate: float, iterations: int, batch: int) -> Settings:
        """PPO on the learned reward."""
        program = many.ppo_on_reward_model(
            self.task, self.judge[1], learning_rate=learning_rate, iterations=iterations, batch=batch, how=self.how
        )
        return self.on_policy(program, betas)

    def dpo(self, betas: Sequence[float], *, learning_rate: float, batch: int) -> Settings:
        """DPO on the preferences, every beta and seed in one program."""
        grid = [(beta, n) for beta in betas for n in range(self.seeds)]
        policies = methods.dpo_policies(
            self.task,
            [self.rankings] * len(grid),
            [beta for beta, _ in grid],
            [self.seed + n for _, n in grid],
            learning_rate=learning_rate,
            batch=batch,
            how=self.how,
            watch=many.show(self.bar, dpo_loss="loss"),
        )
        return self._by_beta(betas, policies)

    def favourites(self, epochs: Sequence[int], *, learning_rate: float, batch: int) -> Settings:
        """Finetuning on the favourites alone, from the start for each number of epochs."""
        found, seeds = {}, range(self.seeds)
        for count in epochs:
            policies = methods.finetuned_on_favourites(
                self.task,
                [self.rankings] * self.seeds,
                [self.seed + n for n in seeds],
                epochs=count,
                learning_rate=learning_rate,
                batch=batch,
                how=self.how,
                watch=many.show(self.bar, nats="loss"),
            )
            found[f"{count} epoch{'s' * (count > 1)}"] = looks(self.task, policies, seeds, self.seed, self.judge)
        return found

    def best_of(self, most: int) -> Settings:
        """Best-of-n by the learned reward for n = 2, 4, ..., from one pool of `most` answers per prompt."""
        pool = look(self.task, self.task.start, jax.random.key(self.seed), self.judge, most)
        self.bar.update()
        return {name: [one] for name, one in best_of_powers(pool).items()}

    def _by_beta(self, betas: Sequence[float], policies: Sequence[Params]) -> Settings:
        found = looks(self.task, policies, [*range(self.seeds)] * len(betas), self.seed, self.judge)
        return {f"beta {beta:g}": found[n * self.seeds : (n + 1) * self.seeds] for n, beta in enumerate(betas)}


Parts = Mapping[str, tuple[Callable[[Start], Settings], int]]  # by method: how to run it, and its steps on the bar


def steps(parts: Parts) -> int:
    """The steps of all parts together."""
    return sum(count for _, count in parts.values())


def run(parts: Parts, start: Start, cells: Cells) -> dict[str, Settings]:
    """Run all parts one after another, each cached as a cell."""
    return {
        name: cells(name, functools.partial(make, start), count, start.bar) for name, (make, count) in parts.items()
    }
