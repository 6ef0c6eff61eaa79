"""Methods that learn from preferences, several runs at once: reward models, DPO, finetuning on the favourites.

`rankings` holds one list of preferences per run (which may all be the same list); all runs take the same number of
steps.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax
import numpy as np

from jaxgpt.config import ModelConfig
from jaxgpt.data import pipelines
from jaxgpt.data.comparisons import TokenizedPreference, max_sizes, tie_rate
from jaxgpt.data.training_data import load_tokenized
from jaxgpt.losses import TIE, Mean
from jaxgpt.models import sharding
from jaxgpt.rlhf import dpo, reward
from jaxgpt.rlhf.policies import transformer_policy
from jaxgpt.rlhf.reward import HeldoutMetrics
from jaxgpt.structs import Array, Batch, Params, Preferences
from jaxgpt.study import many
from jaxgpt.study.many import MetricsCallback, RunMapping
from jaxgpt.study.task import Task
from jaxgpt.training import optim
from jaxgpt.training.step import Metrics, make_nll


def load_rankings(
    task: Task, path: Path, say: Callable[[str], None], limit: int | None = None
) -> list[TokenizedPreference]:
    """The first `limit` preferences of a file or a database that fit the task's model, encoded with its tokenizer; says
    what is left out."""
    rankings, counts = load_tokenized(path, task.tok, task.config.block)
    if limit is not None:
        counts = counts.without(f"beyond the first {limit:,}", len(rankings) - limit)
    say(f"{path}: {counts}")
    return rankings[:limit]


def preference_batches(
    rankings: Sequence[TokenizedPreference], length: int, batch: int, seed: int
) -> Iterator[Preferences]:
    """One shuffled pass over the preferences."""
    for arrays in pipelines.preference_batches(rankings, length, batch, seed=seed, epochs=1):
        yield Preferences.of(arrays)


def max_lengths(rankings: Sequence[Sequence[TokenizedPreference]]) -> tuple[int, int]:
    """The length in tokens of the longest row and of the longest answer."""
    sizes = [max_sizes(preferences) for preferences in rankings]
    return max(length for _, length, _ in sizes), max(answer for _, _, answer in sizes)


def train_reward_models(
    config: ModelConfig,
    start: Params,
    rankings: Sequence[Sequence[TokenizedPreference]],
    seeds: Sequence[int],
    reference: Batch,
    task: Task,
    *,
    learning_rate: float,
    batch: int,
    first_spread: float = 1.0,
    watch: MetricsCallback = lambda i, found: None,
    how: RunMapping = "vmap",
) -> list[Params]:
    """Train one reward model per run, starting from a language model; its scores have mean 0 and standard deviation 1
    on the `reference` rows. `first_spread`: their standard deviation before training, small where labels are few."""
    length, _ = max_lengths(rankings)
    steps = min(map(len, rankings)) // batch
    tx = optim.adamw(optim.linear_to_zero(learning_rate, steps, steps // 10), weight_decay=0.01, b2=0.999)
    normalise = jax.jit(lambda params: reward.normalise_on(params, config, reference))
    first = []
    for seed in seeds:
        params = normalise(reward.init(jax.random.key(seed), start, config.width))
        first.append({**params, "head": jax.tree.map(lambda w: w * first_spread, params["head"])})
    splits = [optim.split(params, reward.trainable_names()) for params in first]  # trainable, frozen

    ties = tie_rate([one for preferences in rankings for one in preferences])

    def loss_fn(params: Params, data: tuple[Params, Preferences], key: Array | None) -> tuple[Mean, Metrics]:
        scale, preferences = data
        return reward.loss({**params, **scale}, config, preferences, ties)

    def batches(n: int) -> Iterator[tuple[Params, Preferences]]:
        scale = jax.tree.map(np.asarray, splits[n][1])  # gain and bias, different in each run
        for preferences in preference_batches(rankings[n], length, batch, seeds[n]):
            yield scale, preferences

    batches_of_runs = many.zip_batches([batches(n) for n in range(len(seeds))])
    trained = many.train_runs(
        loss_fn, tx, [trainable for trainable, _ in splits], {}, batches_of_runs, task.mesh, watch, how
    )
    merged = [{**frozen, **params} for params, (_, frozen) in zip(trained, splits, strict=True)]
    return [sharding.replicate(normalise(params), task.mesh) for params in merged]


def heldout_metrics(
    task: Task, config: ModelConfig, params: Params, rankings: Sequence[TokenizedPreference]
) -> HeldoutMetrics:
    """How well a reward model predicts these preferences."""
    batches = pipelines.preference_eval(rankings, max_sizes(rankings).row, min(64, len(rankings)))

    def scores(params: Params, batch: Preferences) -> Array:
        return reward.candidate_scores(params, config, batch)

    return reward.evaluate(scores, params, map(Preferences.of, batches), task.mesh)


def train_dpo_policies(
    task: Task,
    rankings: Sequence[Sequence[TokenizedPreference]],
    betas: Sequence[float],
    seeds: Sequence[int],
    *,
    learning_rate: float,
    batch: int,
    watch: MetricsCallback = lambda i, found: None,
    how: RunMapping = "vmap",
) -> list[Params]:
    """Train one policy per run with DPO, each with its own beta. Runs with the same seed and preferences see the same
    batches."""
    length, window = max_lengths(rankings)
    policy = transformer_policy(task.config, new_tokens=window, temperature=task.algorithm.temperature)
    steps = min(map(len, rankings)) // batch
    tx = optim.adamw(optim.linear_to_zero(learning_rate, steps, steps // 10), weight_decay=0.0, b2=0.999)

    def batches(n: int) -> Iterator[tuple[np.float32, Preferences]]:
        for preferences in preference_batches(rankings[n], length, batch, seeds[n]):
            yield np.float32(betas[n]), preferences

    ties = tie_rate([one for preferences in rankings for one in preferences])

    def loss_fn(params: Params, data: tuple[Array, Preferences], key: Array | None) -> tuple[Mean, Metrics]:
        beta, preferences = data
        return dpo.make_loss(policy, beta, ties)(params, preferences, key)

    batches_of_runs = many.zip_batches([batches(n) for n in range(len(seeds))])
    frozen, first = {"reference": task.start}, [{"policy": task.start}] * len(seeds)
    return [
        params["policy"]
        for params in many.train_runs(loss_fn, tx, first, frozen, batches_of_runs, task.mesh, watch, how)
    ]


def finetune_on_favourites(
    task: Task,
    rankings: Sequence[Sequence[TokenizedPreference]],
    seeds: Sequence[int],
    *,
    epochs: int,
    learning_rate: float,
    batch: int,
    watch: MetricsCallback = lambda i, found: None,
    how: RunMapping = "vmap",
) -> list[Params]:
    """Train one policy per run by next-token prediction on favourites alone (Preferred-FT, Rafailov et al. 2023).
    People's ties have none and are left out."""
    rankings = [[one for one in preferences if one.choice != TIE] for preferences in rankings]
    length, _ = max_lengths(rankings)
    steps_per_epoch = min(map(len, rankings)) // batch
    tx = optim.adamw(
        optim.linear_to_zero(learning_rate, epochs * steps_per_epoch, steps_per_epoch // 10), weight_decay=0.0
    )

    def batches(n: int) -> Iterator[Batch]:
        rng, rows = np.random.default_rng(seeds[n]), [preference.rows[preference.choice] for preference in rankings[n]]
        for _ in range(epochs):
            order = rng.permutation(len(rows))[: steps_per_epoch * batch]
            for index in order.reshape(-1, batch):
                arrays = pipelines.padded_examples([rows[i] for i in index], length, batch)[0]
                yield Batch(arrays["tokens"], arrays["mask"])

    batches_of_runs = many.zip_batches([batches(n) for n in range(len(seeds))])
    return many.train_runs(
        make_nll(task.config), tx, [task.start] * len(seeds), {}, batches_of_runs, task.mesh, watch, how
    )
