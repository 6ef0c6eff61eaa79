"""The oracle: every method against an optimum that can be enumerated.

    python -m experiments.oracle --run runs/oracle

Answers are so short that all of them can be enumerated, and a policy is a table of logits, one row per prefix. With a
random reference rho and random scores r, the policy that maximises E[r] - beta KL(pi || rho) is known:

    pi*(y) = rho(y) exp(r(y) / beta) / Z

The library's own losses and returns must find it: PPO and RLOO from samples, DPO from exact preferences. GRPO is
analysed further: its gradient, in expectation over every group that can be drawn, shows where it converges.

- KL in the score: for one prompt, pi* remains the only stationary point, since all answers have the same h there.
  Prompts that share parameters are weighted by 1 / standard deviation, and then pi* is not stationary.
- KL as a loss: the standard deviation divides the scores but not the KL, so the scale of the scores is lost; and k3 has
  the gradient of KL(rho || pi), which moves the stationary point even without that division (Vojnovic & Yun 2025).
"""

import dataclasses
import functools
import itertools
import math
import string
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxgpt import losses
from jaxgpt.config import Count, Positive, Range, Seed, check_settings
from jaxgpt.errors import UserError
from jaxgpt.losses import kl, returns
from jaxgpt.runs.cli import cli
from jaxgpt.runs.run import Run
from jaxgpt.structs import Array, Leaf
from jaxgpt.training import optim

MOST_ANSWERS = 10**6  # are listed


@dataclasses.dataclass(frozen=True)
class Settings:
    """2 CPU cores: about 35 s; KL(pi || pi*) ends below 0.001 nats for PPO, RLOO and DPO (docs/oracle.png)."""

    run: Path = Path("runs/oracle")
    vocab: Annotated[int, Range(2)] = 3  # tokens; the last one is the stop token
    tokens: Annotated[int, Range(1, 20)] = 3  # of the longest answer; 3 make 15 answers
    beta: Positive = 0.5  # reward units per nat
    problems: Count = 5  # each with its own reference, scores and random numbers
    updates: Count = 1000
    answers: Count = 240  # sampled per update
    group: Annotated[int, Range(2)] = 3  # answers compared with each other
    learning_rate: Positive = 0.03  # decays linearly to 0
    seed: Seed = 0
    fresh: bool = False

    def __post_init__(self) -> None:
        check_settings(self)
        if self.answers % self.group:
            raise UserError(f"answers {self.answers} is not a multiple of group {self.group}; change one of them")
        if self.vocab**self.tokens > MOST_ANSWERS:
            raise UserError(
                f"vocab {self.vocab} and tokens {self.tokens} make too many answers to list: vocab ** tokens must be "
                f"at most {MOST_ANSWERS}"
            )


PRESETS = {"laptop": Settings(), "toy": Settings(problems=2, updates=4, answers=12)}


@dataclasses.dataclass(frozen=True)
class Space:
    """Every answer, [Y, T], and for each of its tokens the row of the policy's table that it is drawn from.

    S unfinished prefixes; Y answers, which end with the stop token or at the last position and are padded with 0.
    """

    tokens_YT: Leaf
    mask_YT: Leaf
    prefix_YT: Leaf

    @property
    def shape(self) -> tuple[int, int]:
        """(S, V) of a policy's table."""
        return int(self.prefix_YT.max()) + 1, int(self.tokens_YT.max()) + 1

    def log_probs(self, logits_SV: Array) -> Array:
        """log pi of each token of each answer, [Y, T]; 0 after its end."""
        return jnp.where(self.mask_YT, losses.log_prob(logits_SV[self.prefix_YT], self.tokens_YT), 0.0)

    def answer_logp(self, logits_SV: Array) -> Array:
        """log pi(y), [Y]."""
        return losses.sequence_sum(self.log_probs(logits_SV), self.mask_YT)


def enumerate_answers(vocab: int, tokens: int) -> Space:
    """All sequences over `vocab` tokens that end with the stop token (the last one) or after `tokens` tokens."""
    prefixes = {
        prefix: s
        for s, prefix in enumerate(
            prefix for length in range(tokens) for prefix in itertools.product(range(vocab - 1), repeat=length)
        )
    }
    answers = [(*prefix, v) for prefix in prefixes for v in range(vocab) if v == vocab - 1 or len(prefix) == tokens - 1]
    tokens_YT, mask_YT, prefix_YT = (np.zeros((len(answers), tokens), t) for t in (np.int32, bool, np.int32))
    for i, answer in enumerate(answers):
        for t, token in enumerate(answer):
            tokens_YT[i, t], mask_YT[i, t], prefix_YT[i, t] = token, True, prefixes[answer[:t]]
    return Space(tokens_YT, mask_YT, prefix_YT)


class Task(NamedTuple):
    """A problem: the reference's logits, each answer's score, and beta.

    score_Y may be [X, Y]: X prompts that the policy can't tell apart, so only their mean can be optimised.
    """

    ref_SV: Array
    score_Y: Array
    beta: Array


def optimum(space: Space, task: Task) -> Array:
    """log pi*(y) = log rho(y) + r(y) / beta - log Z, [Y]."""
    mean_Y = task.score_Y.reshape(-1, task.score_Y.shape[-1]).mean(axis=0)
    return jax.nn.log_softmax(space.answer_logp(task.ref_SV) + mean_Y / task.beta)


# The methods. Each is loss(space, task, params, old, rows_BC) -> [B]: B groups of C answers, drawn from the policy
# with parameters `old` if the method samples. Losses are summed over an answer's tokens, so no length is favoured.

Params = dict[str, Array]  # logits_SV, and the critic's value_S of each prefix
Loss = Callable[[Space, Task, Params, Params, Array], Array]


def ppo(space: Space, task: Task, params: Params, old: Params, rows_B1: Array) -> Array:
    """Clipped surrogate and clipped critic loss, -beta k1 in the reward, gamma = lambda = 1, no whitening."""
    row_B = rows_B1[:, 0]
    mask_BT = jnp.asarray(space.mask_YT)[row_B]
    prefix_BT = jnp.asarray(space.prefix_YT)[row_B]
    tables = (params["logits_SV"], old["logits_SV"], task.ref_SV)
    logp_BT, old_logp_BT, ref_logp_BT = (space.log_probs(logits_SV)[row_B] for logits_SV in tables)
    value_BT, old_value_BT = params["value_S"][prefix_BT], old["value_S"][prefix_BT]
    reward_BT = returns.shaped_rewards(task.score_Y[row_B], kl.k1(old_logp_BT, ref_logp_BT), mask_BT, task.beta)
    advantage_BT, return_BT = returns.gae(reward_BT, old_value_BT, mask_BT, gamma=1.0, lam=1.0)
    policy_loss = losses.ppo_clip(losses.log_ratio(logp_BT, old_logp_BT), advantage_BT)
    return losses.sequence_sum(policy_loss + losses.value_clip(value_BT, old_value_BT, return_BT), mask_BT)


def make_group_loss(advantage: Callable[[Array], Array], penalty: str) -> Loss:
    """REINFORCE with the advantage of `returns.rloo`, `centre_scores` or `grpo`, and one of three KL penalties.

    score  in the score: h = r - beta log(pi / rho)(y)
    k2     as a loss, k2 of the answer's log-ratio: its gradient is that of KL(pi || rho)
    k3     as a loss, k3 of each token: GRPO's usual form
    """

    def loss(space: Space, task: Task, params: Params, old: Params, rows_BC: Array) -> Array:
        mask_BCT = jnp.asarray(space.mask_YT)[rows_BC]
        tables = (params["logits_SV"], old["logits_SV"], task.ref_SV)
        logp_BCT, old_logp_BCT, ref_logp_BCT = (space.log_probs(logits_SV)[rows_BC] for logits_SV in tables)
        logp_BC = losses.sequence_sum(logp_BCT, mask_BCT)
        h_BC = task.score_Y[rows_BC]
        if penalty == "score":
            h_BC -= task.beta * kl.sequence_kl(old_logp_BCT, ref_logp_BCT, mask_BCT)
        loss_BC = losses.reinforce(logp_BC, advantage(h_BC))
        if penalty == "k2":
            loss_BC += task.beta * kl.k2(logp_BC, losses.sequence_sum(ref_logp_BCT, mask_BCT))
        if penalty == "k3":
            loss_BC += task.beta * losses.sequence_sum(kl.k3(logp_BCT, ref_logp_BCT), mask_BCT)
        return loss_BC.mean(axis=1)

    return loss


def dpo(space: Space, task: Task, params: Params, old: Params, rows_BC: Array) -> Array:
    """The expected DPO loss if each of C answers is the favourite with probability softmax(r)."""
    logp_Y, ref_logp_Y = space.answer_logp(params["logits_SV"]), space.answer_logp(task.ref_SV)
    h_BC = losses.implicit_reward(logp_Y[rows_BC], ref_logp_Y[rows_BC], task.beta)
    return losses.soft_preference_nll(h_BC, jax.nn.softmax(task.score_Y[rows_BC]))


def average_over_prompts(loss: Loss) -> Loss:
    """The mean loss over several prompts that the policy can't tell apart: score_Y is [X, Y], one row per prompt."""

    def mean(space: Space, task: Task, params: Params, old: Params, rows_BC: Array) -> Array:
        each = [loss(space, task._replace(score_Y=score_Y), params, old, rows_BC) for score_Y in task.score_Y]
        return jnp.stack(each).mean(axis=0)

    return mean


# How rows are drawn: draw(key, log pi(y)) -> rows [B, C] and the weight of each group in the loss.

Draw = Callable[[Array, Array], tuple[Array, Array]]


def draw_groups(groups: int, size: int) -> Draw:
    """Groups of independent samples from the policy."""
    return lambda key, logp_Y: (jax.random.categorical(key, logp_Y, shape=(groups, size)), jnp.full(groups, 1 / groups))


def all_sets(space: Space, size: int) -> Draw:
    """All sets of `size` different answers, equally weighted: the candidates that preferences choose from."""
    sets = jnp.array(list(itertools.combinations(range(len(space.tokens_YT)), size)))
    return lambda key, logp_Y: (sets, jnp.full(len(sets), 1 / len(sets)))


def all_groups(space: Space, size: int) -> Draw:
    """All groups that `draw_groups` can draw, weighted by their probabilities, which gives the expected loss."""
    rows = list(itertools.combinations_with_replacement(range(len(space.tokens_YT)), size))
    orders = [math.factorial(size) / math.prod(math.factorial(row.count(y)) for y in set(row)) for row in rows]
    rows_BC, orders_B = jnp.array(rows), jnp.array(orders)
    return lambda key, logp_Y: (rows_BC, orders_B * jnp.exp(logp_Y[rows_BC].sum(axis=1)))


@dataclasses.dataclass(frozen=True)
class Method:
    """A loss, how its rows are drawn, and the number of steps on them."""

    loss: Loss
    draw: Draw
    epochs: int = 1


def learn(settings: Settings, space: Space, method: Method, tasks: Task) -> tuple[Params, np.ndarray]:
    """Train on P problems at once, from pi = rho, by Adam with a rate that decays to 0. Returns parameters with a
    leading axis P, and KL(pi || pi*) after each update, [P, U]."""
    P, S = tasks.ref_SV.shape[:2]
    tx = optax.adam(optim.linear_to_zero(settings.learning_rate, settings.updates * method.epochs))

    def update(task: Task, old: Params, moments: Any, key: Array) -> tuple[Params, Any, Array]:
        rows_BC, weight_B = method.draw(key, space.answer_logp(old["logits_SV"]))
        slope = jax.grad(lambda params: weight_B @ method.loss(space, task, params, old, rows_BC))
        params = old
        for _ in range(method.epochs):
            change, moments = tx.update(slope(params), moments)
            params = optax.apply_updates(params, change)
        logp_Y = space.answer_logp(params["logits_SV"])
        return params, moments, jnp.exp(logp_Y) @ (logp_Y - optimum(space, task))

    @jax.jit
    def program(tasks: Task, key_UP: Array) -> tuple[Params, Array]:
        def body(carry: tuple[Params, Any], key_P: Array) -> tuple[tuple[Params, Any], Array]:
            params, moments, kl_P = jax.vmap(update)(tasks, *carry, key_P)
            return (params, moments), kl_P

        start = {"logits_SV": tasks.ref_SV, "value_S": jnp.zeros((P, S))}
        (params, _), kl_UP = jax.lax.scan(body, (start, jax.vmap(tx.init)(start)), key_UP)
        return params, kl_UP.T

    params, kl_PU = program(tasks, jax.random.split(jax.random.key(settings.seed + 1), (settings.updates, P)))
    return params, np.asarray(kl_PU)


def make_tasks(settings: Settings, space: Space, spreads: Sequence[float] = ()) -> Task:
    """The run's problems, stacked. With `spreads`, each has one prompt per spread, with scores of that spread."""
    answers = len(space.tokens_YT)

    def one(key: Array) -> Task:
        ref_key, score_key = jax.random.split(key)
        scores = jax.random.normal(score_key, (len(spreads), answers) if spreads else (answers,))
        if spreads:
            scores *= jnp.array(spreads)[:, None]
        return Task(jax.random.normal(ref_key, space.shape), scores, jnp.float32(settings.beta))

    return jax.vmap(one)(jax.random.split(jax.random.key(settings.seed), settings.problems))


def measure(space: Space, task: Task, logits_SV: Array) -> dict[str, float]:
    """Compare a policy with the optimum, in float64 on the host and without the library."""

    def answer_logp(logits_SV: Array) -> np.ndarray:
        x = np.asarray(logits_SV, np.float64)
        logp_SV = x - np.log(np.exp(x).sum(axis=1, keepdims=True))
        return np.where(space.mask_YT, logp_SV[space.prefix_YT, space.tokens_YT], 0.0).sum(axis=1)

    score_Y = np.asarray(task.score_Y, np.float64)
    logp_Y, ref_logp_Y = answer_logp(logits_SV), answer_logp(task.ref_SV)
    tilted_Y = ref_logp_Y + score_Y / float(task.beta)
    log_z = np.log(np.exp(tilted_Y).sum())
    pi_Y, best_Y = np.exp(logp_Y), np.exp(tilted_Y - log_z)
    return {
        "kl_to_optimum": float(pi_Y @ (logp_Y - tilted_Y + log_z)),
        "score": float(pi_Y @ score_Y),
        "kl": float(pi_Y @ (logp_Y - ref_logp_Y)),
        "optimal_score": float(best_Y @ score_Y),
        "optimal_kl": float(best_Y @ (tilted_Y - log_z - ref_logp_Y)),
    }


def methods(settings: Settings, space: Space) -> dict[str, Method]:
    """The methods as one would run them: from samples, or from exact preferences."""
    groups = draw_groups(settings.answers // settings.group, settings.group)
    return {
        "PPO": Method(ppo, draw_groups(settings.answers, 1), epochs=2),
        "RLOO": Method(make_group_loss(returns.rloo, "score"), groups),
        "centred": Method(make_group_loss(returns.centre_scores, "score"), groups),
        "DPO, pairs": Method(dpo, all_sets(space, 2)),
        "DPO, sets of 3": Method(dpo, all_sets(space, 3)),
        "GRPO, KL in the score": Method(make_group_loss(returns.grpo, "score"), groups),
        "GRPO, k3 as a loss": Method(make_group_loss(returns.grpo, "k3"), groups),
    }


PENALTIES = {
    "score": "KL in the score",
    "k2": "k2 of the answer\nas a loss",
    "k3": "k3 of each token\nas a loss",
    "shared": "KL in the score,\n3 prompts, 1 table",
}
# Standard deviations of the scores of prompts that share one table. With only two prompts, pi* would happen to be
# stationary for GRPO too: h differs between them only in sign there, so both have the same standard deviation.
SCORE_STDS = (0.5, 1.0, 2.0)


def stationary_points(settings: Settings, space: Space) -> dict[str, dict[str, np.ndarray]]:
    """KL(pi || pi*) at the stationary point of the expected update, [problems], by advantage and penalty."""
    tasks, triple = make_tasks(settings, space), make_tasks(settings, space, SCORE_STDS)
    groups = all_groups(space, settings.group)
    found: dict[str, dict[str, np.ndarray]] = {}
    for name, advantage in {"rloo": returns.rloo, "grpo": returns.grpo}.items():
        loss = {penalty: make_group_loss(advantage, penalty) for penalty in ("score", "k2", "k3")}
        runs = {key: learn(settings, space, Method(f, groups), tasks) for key, f in loss.items()}
        runs["shared"] = learn(settings, space, Method(average_over_prompts(loss["score"]), groups), triple)
        found[name] = {key: np.maximum(kl_PU[:, -1], 0.0) for key, (_, kl_PU) in runs.items()}
    return found


def figure(path: Path, space: Space, tasks: Task, learned: dict[str, Any], rest: dict[str, dict[str, Any]]) -> None:
    """Convergence to pi*, stationary points of the expected group update, and the answers of one problem."""
    from matplotlib.figure import Figure

    floor = 1e-6
    colors = dict(zip(learned, ("C0", "C1", "k", "C2", "C9", "C5", "C3"), strict=True))
    picture = Figure(figsize=(15.5, 4.4), dpi=110, layout="constrained")
    way, places, answers = picture.subplots(1, 3, width_ratios=(1.15, 1.1, 1.1))
    for name, (_, kl_PU) in learned.items():
        x, y = np.arange(1, kl_PU.shape[1] + 1), np.maximum(kl_PU, floor)
        dots = ":" if name == "centred" else "-"  # it coincides with RLOO: Adam ignores a constant factor
        way.plot(x, np.median(y, axis=0), color=colors[name], lw=1.6, ls=dots, label=name)
        way.fill_between(x, y.min(axis=0), y.max(axis=0), color=colors[name], alpha=0.07, lw=0)
    way.set(xlabel="updates", ylabel="KL(π‖π*), nats", title="convergence to the optimum: median and range of problems")
    way.legend(frameon=False, fontsize=8, ncols=2, loc="center right", bbox_to_anchor=(1.0, 0.67))

    for name, color, shift in (("rloo", "C1", -0.12), ("grpo", "C3", 0.12)):
        for at, penalty in enumerate(PENALTIES):
            y = np.maximum(rest[name][penalty], floor)
            label = None if at else f"returns.{name}"
            places.plot(np.full(len(y), at + shift), y, "o", color=color, alpha=0.7, ms=5, label=label)
    places.set(xlim=(-0.5, len(PENALTIES) - 0.5), title="stationary points of the expected update, by problem")
    places.set_xticks(range(len(PENALTIES)), list(PENALTIES.values()), fontsize=8)
    places.legend(frameon=False, fontsize=8, loc="center left")
    for axis in (way, places):
        axis.axhline(0.01, color="0.5", ls=":", lw=1)
        axis.set(yscale="log", ylim=(floor / 1.5, 10))

    best_PY = np.exp(jax.vmap(functools.partial(optimum, space))(tasks))
    broad = int(np.argmin(np.square(best_PY).sum(axis=1)))
    order = np.argsort(-best_PY[broad])
    letters = [*string.ascii_letters[: space.shape[1] - 1], "."]
    words = ["".join(letters[v] for v in space.tokens_YT[y][space.mask_YT[y]]) for y in order]
    x = np.arange(len(order))
    answers.bar(x, best_PY[broad, order], color="0.85", width=0.8, label="π*")
    answers.plot(x, np.exp(space.answer_logp(tasks.ref_SV[broad]))[order], "_", color="0.4", ms=9, mew=2, label="ρ")
    for name, marker in (("PPO", "o"), ("DPO, pairs", "x"), ("GRPO, k3 as a loss", "D")):
        pi_Y = np.exp(space.answer_logp(learned[name][0]["logits_SV"][broad]))
        answers.plot(x, pi_Y[order], marker, color=colors[name], ms=5, label=name)
    answers.set_xticks(x, words, fontsize=8, rotation=60)
    answers.set(ylabel="probability", title="all answers of the problem with the broadest π*  (. stops)")
    answers.legend(frameon=False, fontsize=8)
    for axis in (way, places, answers):
        axis.spines[["top", "right"]].set_visible(False)
        axis.title.set_fontsize(10)
    picture.savefig(path)


def table_row(name: str, kl_to_optimum: Sequence[float], score: float, kl: float) -> str:
    """One row of the table."""
    return f"{name:<22} {' '.join(f'{x:8.5f}' for x in kl_to_optimum)}  {score:6.3f}  {kl:8.3f}"


def main(settings: Settings) -> dict[str, Any]:
    with Run(settings.run, settings, stage="oracle") as run:
        if run.finished:
            return run.results
        space = enumerate_answers(settings.vocab, settings.tokens)
        tasks = make_tasks(settings, space)
        count = settings.problems
        run.say(f"oracle: {len(space.tokens_YT)} answers, beta {settings.beta}, {count} problems; nats throughout")
        run.say(f"{'':<22} {'KL(pi||pi*) of each problem':<{9 * count}} {'E[r]':>6}  {'KL(pi||rho)':>8}")
        learned: dict[str, Any] = {}
        results: dict[str, Any] = {}
        for name, method in methods(settings, space).items():
            learned[name] = params, _ = learn(settings, space, method, tasks)
            each = [
                measure(space, *jax.tree.map(lambda x, i=i: x[i], (tasks, params["logits_SV"]))) for i in range(count)
            ]
            mean = {key: float(np.mean([found[key] for found in each])) for key in each[0]}
            if not results:
                run.say(table_row("pi*", [0.0] * count, mean["optimal_score"], mean["optimal_kl"]))
            results[name] = {**mean, "kl_to_optimum": [found["kl_to_optimum"] for found in each]}
            run.say(table_row(name, results[name]["kl_to_optimum"], mean["score"], mean["kl"]))
        for i in range(0, settings.updates, 10):
            run.log(i + 1, {name: np.median(kl_PU[:, i]) for name, (_, kl_PU) in learned.items()})
        rest = stationary_points(settings, space)
        run.say("stationary points of the expected group update: KL(pi||pi*), median and range of the problems")
        for name, found in rest.items():
            cells = (f"{key} {np.median(x):.4f} ({x.min():.4f}-{x.max():.4f})" for key, x in found.items())
            run.say(f"  {name}  {'  '.join(cells)}")
        figure(settings.run / "oracle.png", space, tasks, learned, rest)
        run.finish({**results, "rest": rest})
        return run.results


if __name__ == "__main__":
    cli(main, Settings, PRESETS)
