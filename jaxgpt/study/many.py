"""Training many runs as one program.

Runs that differ only in numbers (seed, beta, a reward model's weights) use the functions that train a single run, with
a leading axis R of runs: by `jax.vmap`, or by `jax.lax.map`, which takes them one after another in the same program.
If the number of devices divides R, each device holds its share of the runs, without any communication.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxgpt.config import ModelConfig
from jaxgpt.errors import UserError
from jaxgpt.losses import Mean, reduce
from jaxgpt.models import sharding
from jaxgpt.rlhf import ppo, reward, rollout, through_reward
from jaxgpt.rlhf.ppo import Controller, RewardFn
from jaxgpt.rlhf.through_reward import ThroughRewardConfig
from jaxgpt.runs.progress import Bar
from jaxgpt.structs import Array, Batch, Experience, Params, Prompts
from jaxgpt.study.task import Task
from jaxgpt.training import optim
from jaxgpt.training.step import LossFn, Metrics, TrainState, init_state, make_train_step

RunMapping = Literal["vmap", "map"]
MetricsCallback = Callable[[int, dict[str, np.ndarray]], None]


def map_over_runs(f: Callable[..., Any], axes: tuple[int | None, ...], how: RunMapping) -> Callable[..., Any]:
    """f for R runs at once: arguments with axis 0 have one entry per run, those with None are shared."""
    if how == "vmap":
        return jax.vmap(f, in_axes=axes)

    def mapped(*args: Any) -> Any:
        def one(own: tuple[Any, ...]) -> Any:
            rest = iter(own)
            return f(*(shared if axis is None else next(rest) for shared, axis in zip(args, axes, strict=True)))

        return jax.lax.map(one, tuple(x for x, axis in zip(args, axes, strict=True) if axis == 0))

    return mapped


def stack_trees(trees: Sequence[Any]) -> Any:
    """One tree whose leaves have a leading axis over the trees."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def unstack_trees(tree: Any) -> list[Any]:
    """The inverse of `stack_trees`."""
    count = jax.tree.leaves(tree)[0].shape[0]
    return [jax.tree.map(lambda x, r=r: x[r], tree) for r in range(count)]


def shard_runs(tree: Any, mesh: Mesh) -> Any:
    """Divide the runs evenly among the devices; if that isn't possible, put all of them on each device."""

    def place(x: Any) -> Any:
        axes = P(sharding.ROW_AXES) if x.shape[0] % sharding.count_row_shards(mesh) == 0 else P()
        return jax.device_put(x, NamedSharding(mesh, axes))

    return jax.tree.map(place, tree)


def metrics_to_host(metrics: Any) -> dict[str, np.ndarray]:
    """Metrics of R runs on the host, [R] each."""
    means = {name: x.value if isinstance(x, Mean) else x for name, x in metrics.items()}
    return {name: np.asarray(x, np.float64) for name, x in jax.device_get(means).items()}


def train_runs(
    loss_fn: LossFn,
    tx: optax.GradientTransformation,
    trainable: Sequence[Params],
    frozen: Params,
    batches: Iterable[Any],
    mesh: Mesh,
    watch: MetricsCallback = lambda i, found: None,
    how: RunMapping = "vmap",
) -> list[Params]:
    """Train R runs of one loss and return each one's trained parameters. `frozen` is shared; each batch has a leading
    axis R, and may hold a run's own numbers (such as beta). watch(step, metrics) is called after
    every step; each metric is [R]."""
    step = make_train_step(loss_fn, tx)

    def one(state: TrainState, frozen: Params, batch: Any) -> tuple[TrainState, Any]:
        state, metrics = step(state.replace(frozen=frozen), batch, None)  # type: ignore[attr-defined]
        return state.replace(frozen={}), metrics  # type: ignore[attr-defined]

    program = jax.jit(map_over_runs(one, (0, None, 0), how), donate_argnums=0)
    state = shard_runs(stack_trees([init_state(optim.copy(params), tx) for params in trainable]), mesh)
    frozen = sharding.replicate(frozen, mesh)
    for i, batch in enumerate(batches, 1):
        state, metrics = program(state, frozen, shard_runs(jax.tree.map(np.asarray, batch), mesh))
        found = metrics_to_host(metrics)
        check_updates_finite(found, i)
        watch(i, found)
    return unstack_trees(state.trainable)


def check_updates_finite(found: dict[str, np.ndarray], i: int) -> None:
    """UserError if a run's update was not finite: it is skipped, so the study's curves would be wrong."""
    if found["skipped"].any():
        which = np.flatnonzero(found["skipped"]).tolist()
        raise UserError(f"loss or gradient of run {which} was not finite in step {i}; lower the learning rate")


def make_progress_watch(bar: Bar, *same: str, **named: str) -> MetricsCallback:
    """A `MetricsCallback` that shows metrics on the bar as means over the runs: `same` under their own names, `named`
    as title=name."""
    shown = {**{name: name for name in same}, **named}
    return lambda i, found: bar.update(**{title: found[name].mean() for title, name in shown.items()})


def zip_batches(batches: Sequence[Iterable[Any]]) -> Iterator[Any]:
    """Zip the batches of R runs into batches with a leading axis R."""
    for parts in zip(*batches, strict=False):
        yield jax.tree.map(lambda *xs: np.stack(xs), *parts)


LearnFn = Callable[[TrainState, Controller, Experience, Array, Array], tuple[TrainState, Controller, Metrics]]


def make_ppo_learner(task: Task, tx: optax.GradientTransformation, reward_fn: RewardFn | None = None) -> LearnFn:
    """PPO's update as `OnPolicyTrainer.learn`; rewards come from `reward_fn`, or without one from the scores passed."""

    def learn(
        state: TrainState, control: Controller, experience: Experience, score_B: Array, key: Array
    ) -> tuple[TrainState, Controller, Metrics]:
        if reward_fn is not None:
            score_B = reward_fn(state.params, experience.rows)
        done = ppo.learn(state, control, experience, score_B, key, policy=task.policy, ppo=task.algorithm, tx=tx)
        return done.state, done.controller, done.metrics

    return learn


def make_through_reward_learner(
    task: Task, tx: optax.GradientTransformation, reward_config: ModelConfig, how: ThroughRewardConfig
) -> LearnFn:
    """One step of `through_reward` per rollout; beta is the controller's, the reward model is frozen['reward']."""

    def learn(
        state: TrainState, control: Controller, experience: Experience, score_B: Array, key: Array
    ) -> tuple[TrainState, Controller, Metrics]:
        rows = experience.rows
        h_B = reward.score(state.params["reward"], reward_config, rows)
        loss = through_reward.make_loss(task.config, reward_config, control.beta, how, task.algorithm.temperature)
        state, metrics = make_train_step(loss, tx)(state, rows, key)
        return (
            state,
            control,
            {
                **metrics,
                "h": reduce(h_B),
                "kl": metrics["kl_exact"],
                "beta": control.beta,
                "ended": reduce(experience.ended_B.astype(jnp.float32)),
            },
        )

    return learn


def make_ppo_optimizer(task: Task, learning_rate: float, iterations: int) -> optax.GradientTransformation:
    """Adam in TensorFlow's form, its learning rate falling linearly to 0 over all updates of the iterations."""
    steps = iterations * task.algorithm.epochs * task.algorithm.minibatches
    return optim.adam_tf(optim.linear_to_zero(learning_rate, steps))


def make_ppo_trainer(
    task: Task, config: ModelConfig, *, learning_rate: float, iterations: int, batch: int, how: RunMapping
) -> "OnPolicyTrainer":
    """PPO against a learned reward; each run has its own reward parameters, in frozen['reward']."""

    def reward_fn(params: Params, rows: Batch) -> Array:
        return reward.score(params["reward"], config, rows)

    tx = make_ppo_optimizer(task, learning_rate, iterations)
    return OnPolicyTrainer(task, make_ppo_learner(task, tx, reward_fn), tx, iterations, batch, how=how)


@dataclasses.dataclass(frozen=True)
class OnPolicyTrainer:
    """Training on the policy's own answers, R runs at once.

    learn(state, control, experience, score_B, key) -> (state, control, metrics) is the method's update. `experience` is
    what `ppo.collect` returns; score_B is what `host` (a lexicon, a verifier) returns for the texts, or 0 without one.
    """

    task: Task
    learn: LearnFn
    tx: optax.GradientTransformation
    iterations: int
    batch: int  # answers per iteration
    each: int = 1  # answers per prompt, adjacent in the batch
    host: Callable[[Sequence[str]], np.ndarray] | None = None
    how: RunMapping = "vmap"

    @functools.cached_property
    def programs(self) -> tuple[Callable[..., Any], Callable[..., Any]]:
        """Sampling and learning, each one program for all runs. `start`, the reference policy, is shared by all runs;
        `frozen` holds each run's own frozen parameters."""
        task = self.task

        def collect(state: TrainState, start: Params, prompts: Prompts, key: Array) -> Experience:
            return ppo.collect(add_frozen(state, start, {}), prompts, key, policy=task.policy)

        def learn(
            state: TrainState,
            start: Params,
            frozen: Params,
            control: Controller,
            experience: Experience,
            score_B: Array,
            key: Array,
        ) -> tuple[TrainState, Controller, Metrics]:
            state, control, metrics = self.learn(add_frozen(state, start, frozen), control, experience, score_B, key)
            return state.replace(frozen={}), control, metrics  # type: ignore[attr-defined]

        return (
            jax.jit(map_over_runs(collect, (0, None, 0, 0), self.how)),
            jax.jit(map_over_runs(learn, (0, None, 0, 0, 0, 0, 0), self.how), donate_argnums=(0, 3)),
        )

    def train(
        self,
        controls: Sequence[Controller],
        seeds: Sequence[int],
        frozen: Sequence[Params] | None = None,
        watch: MetricsCallback = lambda i, found: None,
    ) -> tuple[list[Params], dict[str, np.ndarray]]:
        """Train; returns the policies and curves [iterations, R]: the method's metrics, and the gold reward and judge
        of each iteration's answers. `controls` and `frozen` (what the reward needs) have one entry per run. Runs with
        the same seed see the same prompts and random numbers."""
        task, R = self.task, len(seeds)
        frozen = [{}] * R if frozen is None else frozen
        ppo.check_batch(self.batch, task.algorithm, task.config.block, task.prompt_tokens, *controls)
        if not R == len(controls) == len(frozen) or self.batch % self.each:
            raise ValueError(
                f"{len(controls)} controllers, {R} seeds and {len(frozen)} frozen trees must be equal in number, "
                f"and the batch of {self.batch} must be a multiple of each = {self.each}"
            )
        collect, learn = self.programs
        whole = ppo.init(task.policy, task.start, self.tx, {})
        state = shard_runs(stack_trees([whole.replace(frozen={})] * R), task.mesh)  # type: ignore[attr-defined]
        control, own = (
            shard_runs(stack_trees(list(controls)), task.mesh),
            shard_runs(stack_trees(list(frozen)), task.mesh),
        )
        tokens_NP, lengths_N = rollout.pad_prompts(task.prompts, task.prompt_tokens)
        order_RN = np.stack([self._prompt_order(seed) for seed in seeds])
        key_R = jnp.stack([jax.random.key(seed) for seed in seeds])
        curves: list[dict[str, np.ndarray]] = []
        for i in range(self.iterations):
            index_RB = order_RN[:, i * self.batch : (i + 1) * self.batch]
            prompts = shard_runs(Prompts(tokens_NP[index_RB], lengths_N[index_RB]), task.mesh)
            keys = jax.vmap(lambda key, i=i: jax.random.split(jax.random.fold_in(key, i)))(key_R)
            experience = collect(state, task.start, prompts, keys[:, 0])
            score_RB = np.zeros((R, self.batch), np.float32)
            if self.host is not None:
                score_RB = np.asarray(self.host(task.texts(experience.rows)), np.float32).reshape(R, -1)
            state, control, metrics = learn(state, task.start, own, control, experience, score_RB, keys[:, 1])
            texts = task.texts(experience.rows)  # while the devices learn
            gold_RB, judge_RB = (look(texts).reshape(R, -1) for look in (task.gold, task.judge))
            found = metrics_to_host(metrics) | {"gold": gold_RB.mean(1), "judge": judge_RB.mean(1)}
            check_updates_finite(found, i + 1)
            curves.append(found)
            watch(i + 1, found)
        return unstack_trees(state.trainable["policy"]), {
            name: np.stack([c[name] for c in curves]) for name in curves[0]
        }

    def _prompt_order(self, seed: int) -> np.ndarray:
        """Prompt indices in the order a run sees them: pass after pass, each shuffled, each prompt `each` times."""
        rng, count = np.random.default_rng(seed), len(self.task.prompts)
        passes = 1 + self.iterations * self.batch // self.each // count
        return np.repeat(np.concatenate([rng.permutation(count) for _ in range(passes)]), self.each)


def add_frozen(state: TrainState, start: Params, frozen: Params) -> TrainState:
    """A run's state together with what it doesn't train: the reference, and what the reward needs."""
    return state.replace(frozen={"reference": start, **frozen})  # type: ignore[attr-defined]
