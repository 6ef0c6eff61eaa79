"""The random-walk task: a model that has only seen random walks on a graph learns to take the shortest path.

    python -m experiments.random_walk --run runs/random_walk

A GPT whose tokens are the nodes of a directed graph is pretrained on random walks and then aligned by PPO: from any
start, reach the goal along edges, in as few steps as possible (the example of Chen et al. 2021, scored as in trlX). A
walk that reaches the goal at step t scores 1 - (t - 1) / limit, any other 0. Two optima are known:

- the best score from each start, by breadth-first search; optimality is the policy's mean score divided by it;
- the best score given its KL to the walks, by dynamic programming over the number of steps taken, t, and the node s:
      V_t(s) = beta log sum_a rho(a | s) exp( (r_t(a) + V_{t+1}(a)) / beta ),      V = 0 at the goal and at the limit
"""

import collections
import dataclasses
import functools
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxgpt import training
from jaxgpt.config import Count, ModelConfig, Positive, Range, Seed, check_settings
from jaxgpt.errors import UserError
from jaxgpt.losses import kl
from jaxgpt.models import transformer
from jaxgpt.rlhf import ppo
from jaxgpt.rlhf.policies import Policy
from jaxgpt.rlhf.ppo import PPOConfig
from jaxgpt.runs.cli import cli
from jaxgpt.runs.run import Run
from jaxgpt.structs import Array, Batch, Params, Prompts
from jaxgpt.training import optim


@dataclasses.dataclass(frozen=True)
class Settings:
    """2 CPU cores: about 50 s; optimality rises from 0.2 to 0.98, and the KL-regularised optimum's is 0.99."""

    run: Path = Path("runs/random_walk")
    nodes: Annotated[int, Range(3, 1000)] = 21  # the last one is the goal
    edge_probability: Annotated[float, Range(above=0, most=1)] = 0.1
    max_steps: Annotated[int, Range(2)] = 10  # steps of the longest walk
    layers: Count = 2
    width: Count = 48
    pretrain_steps: Count = 300
    pretrain_batch: Count = 256  # walks
    pretrain_learning_rate: Positive = 3e-3  # decays linearly to 0
    iterations: Count = 40
    answers: Count = 16  # walks per start and iteration
    epochs: Count = 4
    learning_rate: Positive = 5e-4  # decays linearly to 0
    beta: Positive = 0.05  # score units per nat
    eval_every: Count = 2
    eval_answers: Count = 64  # walks per start
    seed: Seed = 0
    fresh: bool = False

    def __post_init__(self) -> None:
        check_settings(self)
        _ = self.model  # UserError if width and heads don't fit

    @property
    def model(self) -> ModelConfig:
        return ModelConfig(self.layers, self.width, heads=4, block=1 + self.max_steps, vocab=self.nodes)


PRESETS = {
    "laptop": Settings(),
    "toy": Settings(
        nodes=6,
        edge_probability=0.3,
        max_steps=4,
        layers=1,
        width=16,
        pretrain_steps=4,
        iterations=2,
        answers=4,
        eval_every=1,
    ),
}


def random_graph(nodes: int, edge_probability: float, limit: int, rng: np.random.Generator) -> np.ndarray:
    """edges[i, j]: i -> j, [N, N] bool; redrawn until every node reaches the goal within half the limit. No edge leaves
    the goal, the last node: walks end there. Raises UserError if 10,000 draws find no such graph."""
    for _ in range(10_000):
        edges_NN = (rng.random((nodes, nodes)) < edge_probability) & ~np.eye(nodes, dtype=bool)
        edges_NN[-1] = False
        if distances(edges_NN).max() <= limit / 2:
            return edges_NN
    raise UserError(
        f"found no graph of {nodes} nodes, all within {limit / 2} steps of the goal; raise edge_probability or limit"
    )


def distances(edges_NN: np.ndarray) -> np.ndarray:
    """Steps from each node to the goal, by breadth-first search backwards; inf where there is no path."""
    found_N = np.full(len(edges_NN), np.inf)
    found_N[-1] = 0
    queue = collections.deque([len(edges_NN) - 1])
    while queue:
        node = queue.popleft()
        for before in np.flatnonzero(edges_NN[:, node] & np.isinf(found_N)):
            found_N[before] = found_N[node] + 1
            queue.append(int(before))
    return found_N


def random_walks(rho_NN: np.ndarray, count: int, limit: int, rng: np.random.Generator) -> Batch:
    """Walks from random starts until the goal or the limit, [count, 1 + limit], padded with 0."""
    goal = len(rho_NN) - 1
    tokens_BT, mask_BT = np.zeros((count, 1 + limit), np.int32), np.zeros((count, 1 + limit), bool)
    tokens_BT[:, 0] = rng.integers(0, goal, count)
    for t in range(1, 1 + limit):
        mask_BT[:, t] = (tokens_BT[:, t - 1] != goal) & (mask_BT[:, t - 1] | (t == 1))
        draw_B = (rho_NN[tokens_BT[:, t - 1]].cumsum(axis=1) <= rng.random((count, 1))).sum(axis=1)
        tokens_BT[:, t] = np.where(mask_BT[:, t], np.minimum(draw_B, goal), 0)
    return Batch(tokens_BT, mask_BT)


def path_score(edges_NN: Array, limit: int, rows: Batch) -> Array:
    """1 - (t - 1) / limit for a walk along edges that reaches the goal at step t, 0 for any other, [B]."""
    legal_BT = edges_NN[rows.tokens_BT[:, :-1], rows.tokens_BT[:, 1:]] | ~rows.mask_BT[:, 1:]
    arrived_B = transformer.at_last_token(rows.tokens_BT, rows.mask_BT) == len(edges_NN) - 1
    return jnp.where(legal_BT.all(axis=1) & arrived_B, 1 - (rows.mask_BT.sum(axis=1) - 1) / limit, 0.0)


def soft_optimum(rho_NN: np.ndarray, beta: float, limit: int) -> tuple[np.ndarray, np.ndarray]:
    """(E[score], KL to the walks) of the policy with the highest E[score] - beta KL, from each start, [N - 1]."""
    N = len(rho_NN)
    with np.errstate(divide="ignore"):
        log_rho_NN = np.log(rho_NN[:-1])
    value_N, score_N = np.zeros(N), np.zeros(N)
    for t in reversed(range(limit)):
        reward_N = np.append(np.zeros(N - 1), 1 - t / limit)  # of the step to each node: step t + 1
        tilted_NN = log_rho_NN + (reward_N + value_N) / beta
        log_z_N = np.logaddexp.reduce(tilted_NN, axis=1)
        score_N = np.append(np.exp(tilted_NN - log_z_N[:, None]) @ (reward_N + score_N), 0.0)
        value_N = np.append(beta * log_z_N, 0.0)
    return score_N[:-1], (score_N - value_N)[:-1] / beta


def pretrain(settings: Settings, rho_NN: np.ndarray, key: Array, rng: np.random.Generator) -> tuple[Params, np.ndarray]:
    """Train next-node prediction on fresh walks: parameters, and the loss of each step in nats per token."""
    tx = optim.adamw(optim.linear_to_zero(settings.pretrain_learning_rate, settings.pretrain_steps), weight_decay=0.0)
    step = jax.jit(training.make_train_step(training.make_nll(settings.model), tx), donate_argnums=0)
    state, nats = training.init_state(transformer.init(key, settings.model), tx), []
    for _ in range(settings.pretrain_steps):
        state, metrics = step(state, random_walks(rho_NN, settings.pretrain_batch, settings.max_steps, rng), None)
        nats.append(metrics["loss"].value)
    return state.trainable, np.array(nats)


def prompts_from_every_start(settings: Settings, answers: int) -> Prompts:
    """Each node except the goal, `answers` times in a row."""
    node_B = jnp.repeat(jnp.arange(settings.nodes - 1), answers)
    return Prompts(node_B[:, None], jnp.ones_like(node_B))


def build(settings: Settings, edges_NN: Array) -> tuple[Policy, optax.GradientTransformation, Any, Any]:
    """Policy, optimiser, and two jitted programs: the PPO iteration, and the evaluation of a policy from every
    start."""
    config, stop = settings.model, settings.nodes - 1
    ppo_config = PPOConfig(new_tokens=settings.max_steps, epochs=settings.epochs, unfinished_score=0.0)
    policy = ppo.policy_of(config, ppo_config, stop)
    tx = optim.adam_tf(optim.linear_to_zero(settings.learning_rate, settings.iterations * settings.epochs))

    def evaluate(params: Params, reference: Params, key: Array) -> tuple[Array, kl.Estimate, Batch]:
        prompts = prompts_from_every_start(settings, settings.eval_answers)
        found = policy.collect(params, prompts, key)
        ref_logp_BT, _ = transformer.token_log_probs(reference, config, found.rows)
        score_N = path_score(edges_NN, settings.max_steps, found.rows).reshape(stop, -1).mean(axis=1)
        return score_N, kl.estimate(kl.k1(found.logp_BT, ref_logp_BT), found.rows.mask_BT), found.rows

    iteration = functools.partial(
        ppo.ppo_iteration,
        policy=policy,
        ppo=ppo_config,
        tx=tx,
        reward_fn=lambda params, rows: path_score(edges_NN, settings.max_steps, rows),
    )
    return policy, tx, jax.jit(iteration, donate_argnums=(0, 1)), jax.jit(evaluate)


def figure(
    settings: Settings, edges_NN: np.ndarray, rho_NN: np.ndarray, best_N: np.ndarray, curve: list, rows: Batch
) -> None:
    """Scores over iterations; score against KL with the frontier over beta; the graph and the policy's steps on it."""
    from matplotlib.figure import Figure

    picture = Figure(figsize=(15, 4.4), dpi=110, layout="constrained")
    way, frontier, graph = picture.subplots(1, 3, width_ratios=(1, 1, 1.3))
    step, nats = [i for i, _, _ in curve], [x for _, _, x in curve]
    score = np.array([score_N for _, score_N, _ in curve])
    soft_N, soft_kl_N = soft_optimum(rho_NN, settings.beta, settings.max_steps)
    named = (("optimality", score / best_N, soft_N / best_N, 1.0, "C2"), ("score", score, soft_N, best_N.mean(), "C0"))
    for name, y_IN, soft, best, color in named:
        way.plot(step, y_IN.mean(axis=1), color=color, label=name)
        way.axhline(best, color=color, ls=":", lw=1.2, label="shortest paths")
        way.axhline(soft.mean(), color=color, ls="--", lw=1.2, label=f"optimum for β = {settings.beta:g}")
    way.set(xlabel="PPO iterations", ylim=(0, 1.05), title="mean over starts")
    ways = [soft_optimum(rho_NN, beta, settings.max_steps) for beta in np.geomspace(3e-3, 30, 60)]
    frontier.plot([x.mean() for _, x in ways], [y.mean() for y, _ in ways], color="0.6", label="best possible, every β")
    frontier.plot(nats, score.mean(axis=1), ".-", color="C0", lw=0.8, label="PPO, in training")
    frontier.plot(soft_kl_N.mean(), soft_N.mean(), "k*", ms=11, label=f"optimum for β = {settings.beta:g}")
    frontier.set(xlabel="KL to the pretrained walks, nats per walk", ylabel="score", title="score against KL")

    steps_N = distances(edges_NN)
    x_N, y_N = -steps_N, np.zeros(len(steps_N))
    for d in np.unique(steps_N):
        (layer,) = np.nonzero(steps_N == d)
        y_N[layer] = np.arange(len(layer)) - (len(layer) - 1) / 2 + 0.22 * (d % 2)
    tokens_BT, mask_BT = np.asarray(rows.tokens_BT), np.asarray(rows.mask_BT)[:, 1:]
    traffic_NN = np.zeros(edges_NN.shape)
    np.add.at(traffic_NN, (tokens_BT[:, :-1][mask_BT], tokens_BT[:, 1:][mask_BT]), 1)
    share_NN = traffic_NN / np.maximum(traffic_NN.sum(axis=1, keepdims=True), 1)
    for i, j in zip(*np.nonzero(edges_NN | (share_NN > 0.02)), strict=True):
        color = "C2" if edges_NN[i, j] and steps_N[j] == steps_N[i] - 1 else "C3"
        used = share_NN[i, j] > 0.02
        style = (
            {"color": color, "lw": 0.5 + 2.5 * share_NN[i, j], "zorder": 2} if used else {"color": "0.85", "lw": 0.7}
        )
        style |= {"arrowstyle": "-|>", "shrinkA": 8, "shrinkB": 8, "connectionstyle": "arc3,rad=0.12"}
        graph.annotate("", (x_N[j], y_N[j]), (x_N[i], y_N[i]), arrowprops=style)
    graph.scatter(x_N, y_N, s=210, color="white", edgecolor="0.3", zorder=3)
    for i, (x, y) in enumerate(zip(x_N, y_N, strict=True)):
        graph.text(x, y, "goal" if i == len(x_N) - 1 else str(i), ha="center", va="center", fontsize=6.5, zorder=4)
    graph.set(yticks=[], xlabel="steps to the goal", title="after PPO: steps on a shortest path (green), others (red)")
    graph.set_xticks(np.unique(x_N), [f"{-x:.0f}" for x in np.unique(x_N)])
    for axis in (way, frontier, graph):
        axis.spines[["top", "right"]].set_visible(False)
    for axis in (way, frontier):
        axis.legend(frameon=False, fontsize=8, loc="lower right")
    picture.savefig(settings.run / "random_walk.png")


def main(settings: Settings) -> dict[str, Any]:
    with Run(settings.run, settings, stage="random_walk") as run:
        if run.finished:
            return run.results
        rng = np.random.default_rng(settings.seed)
        edges_NN = random_graph(settings.nodes, settings.edge_probability, settings.max_steps, rng)
        steps_N = distances(edges_NN)[:-1]
        best_N = 1 - (steps_N - 1) / settings.max_steps
        rho_NN = edges_NN / np.maximum(edges_NN.sum(axis=1, keepdims=True), 1)
        soft_N, soft_kl_N = soft_optimum(rho_NN, settings.beta, settings.max_steps)

        init_key, eval_key, ppo_key = jax.random.split(jax.random.key(settings.seed), 3)
        walked, nats = pretrain(settings, rho_NN, init_key, rng)
        run.say(
            f"random_walk: {settings.nodes} nodes, {edges_NN.sum()} edges; loss {nats[-20:].mean():.3f} nats per step"
        )

        policy, tx, iteration, evaluate = build(settings, jnp.asarray(edges_NN))
        state, control = ppo.init(policy, walked, tx, {}), kl.FixedKL(jnp.float32(settings.beta))
        prompts = prompts_from_every_start(settings, settings.answers)
        curve = []
        with run.progress(settings.iterations, "ppo") as bar:
            for i in range(1 + settings.iterations):
                if i:
                    state, control, _, metrics = iteration(state, control, prompts, jax.random.fold_in(ppo_key, i))
                    run.log(i, {f"train_{name}": x for name, x in training.to_floats(metrics).items()})
                    bar.update()
                if i % settings.eval_every == 0 or i == settings.iterations:
                    score_N, measured, rows = evaluate(
                        state.trainable["policy"], state.frozen["reference"], jax.random.fold_in(eval_key, i)
                    )
                    walk_kl = round(float(measured.nats_per_sequence), 6) + 0.0
                    curve.append((i, np.asarray(score_N), walk_kl))
                    shown = {"score": score_N.mean(), "optimality": (score_N / best_N).mean(), "kl": walk_kl}
                    run.log(i, shown)
                    bar.update(0, **shown)

        before_N, after_N = curve[0][1], curve[-1][1]
        found = {
            "pretrained": (before_N, 0.0),
            "after PPO": (after_N, walk_kl),
            f"optimum for beta {settings.beta:g}": (soft_N, soft_kl_N.mean()),
            "shortest paths": (best_N, None),
        }
        run.say(f"{'mean over starts':<24} {'score':>6} {'optimality':>11} {'KL, nats per walk':>18}")
        for name, (score_N, nats) in found.items():
            shown_kl = "" if nats is None else f"{nats:.2f}"
            run.say(f"{name:<24} {score_N.mean():6.3f} {(score_N / best_N).mean():11.3f} {shown_kl:>18}")
        for d in np.unique(steps_N):
            ratio = [(score_N / best_N)[steps_N == d].mean() for score_N, _ in found.values()]
            run.say(
                f"  {(steps_N == d).sum():2} starts at distance {d:.0f}: optimality {ratio[0]:.3f} -> {ratio[1]:.3f}"
            )
        figure(settings, edges_NN, rho_NN, best_N, curve, rows)
        columns = {"steps": steps_N, "best": best_N, "optimum": soft_N, "before": before_N, "after": after_N}
        run.finish(
            {
                "starts": columns,
                "optimality_before": (before_N / best_N).mean(),
                "kl": walk_kl,
                "optimality": (after_N / best_N).mean(),
                "optimality_for_beta": (soft_N / best_N).mean(),
                "kl_for_beta": soft_kl_N.mean(),
            }
        )
        return run.results


if __name__ == "__main__":
    cli(main, Settings, PRESETS)
