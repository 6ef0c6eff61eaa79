"""PPO for language models: collect, score, update, and one iteration that fuses them.

One episode is one answer. The score h(x, y) arrives at its last token, and every token pays -beta (log pi - log rho):
summed over the answer this is r = h - beta log(pi(y|x) / rho(y|x)) (Ziegler et al. 2020).

    rows, sampler_logp, ended_B = collect(state, config, ppo, prompts, key, stop)
    rollout, metrics = score(state, config, ppo, rows, sampler_logp, ended_B, score_B)     h from a model or the host
    state, controller, metrics = update(state, config, ppo, tx, rollout, controller, key)

`ppo_iteration` is these three with a reward that is a JAX function, for one jit; `host_iteration` with any other.
State parameters: trainable 'policy' and 'value_head', frozen 'reference' and whatever the reward needs (usually
'reward').
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax.typing import ArrayLike

from jaxgpt import losses
from jaxgpt.config import ModelConfig
from jaxgpt.errors import UserError
from jaxgpt.losses import Mean, kl, returns
from jaxgpt.models import lora, sharding, transformer
from jaxgpt.rlhf import rollout
from jaxgpt.structs import Array, Batch, Leaf, Params, Rollout
from jaxgpt.training.step import Metrics, TrainState, init_state, make_train_step, split_rows

Controller = kl.AdaptiveKL | kl.FixedKL
RewardFn = Callable[[Params, Batch], Array]
HostReward = Callable[[Batch], ArrayLike]


@dataclasses.dataclass(frozen=True)
class PPOConfig:
    """What PPO does with a rollout. Defaults: Ziegler et al. 2020 where they apply at this size."""

    new_tokens: int = 40  # longest answer
    temperature: float = 1.0  # of the policy: sampling, training and reference alike
    epochs: int = 4  # passes over each rollout
    minibatches: int = 1  # updates a pass
    clip: float = 0.2  # of the ratio
    value_clip: float = 0.2
    value_weight: float = 0.1
    gamma: float = 1.0
    lam: float = 0.95
    whiten_rewards: bool = False
    unfinished_score: float | None = -1.0  # replaces h for answers that never ended; None: nothing does

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise UserError(f"ppo.temperature is {self.temperature}; sampling needs a temperature above 0")
        for name in ("new_tokens", "epochs", "minibatches"):
            if getattr(self, name) < 1:
                raise UserError(f"ppo.{name} is {getattr(self, name)}; it must be at least 1")


@struct.dataclass
class Prompts:
    """Prompts padded on the right, and their lengths."""

    tokens_BP: Leaf
    length_B: Leaf


@struct.dataclass
class Targets:
    """A rollout with what its rewards amount to: the batch of PPO's loss."""

    rollout: Rollout
    advantage_BT: Array
    return_BT: Array


def init(
    policy: Params,
    config: ModelConfig,
    tx: optax.GradientTransformation,
    frozen: Params,
    adapters: Params | None = None,
) -> TrainState:
    """Policy and a critic head of exactly 0 to train; a copy of the policy as the frozen reference. With `adapters`
    only they and the head are trained, and the policy's own weights are the reference."""
    head = transformer.scalar_head(None, config.width)
    if adapters:
        return init_state({"policy": adapters, "value_head": head}, tx, {"policy": policy, **frozen})
    trainable = {"policy": policy, "value_head": head}
    return init_state(trainable, tx, {"reference": jax.tree.map(jnp.copy, policy), **frozen})


def collect(
    state: TrainState, config: ModelConfig, ppo: PPOConfig, prompts: Prompts, key: Array, stop: int
) -> tuple[Batch, Array, Array]:
    """Answers of the current policy: rows, the sampler's log-probabilities on them, and which answers ended, [B]."""
    rows, sampler_logp_BT, answers = rollout.collect(
        state.params["policy"],
        config,
        prompts.tokens_BP,
        prompts.length_B,
        key,
        new_tokens=ppo.new_tokens,
        stop=stop,
        temperature=ppo.temperature,
    )
    return rows, sampler_logp_BT, answers.ended_B


def score(
    state: TrainState,
    config: ModelConfig,
    ppo: PPOConfig,
    rows: Batch,
    sampler_logp_BT: Array,
    ended_B: Array,
    score_B: Array,
) -> tuple[Rollout, Metrics]:
    """Add the policy's and the reference's log-probabilities, the values, and the score of answers that never ended."""
    params = state.params
    reference = lora.reference(params)

    def look(rows: Batch) -> tuple[Array, ...]:
        outputs = rollout.policy_outputs(
            params["policy"], params["value_head"], config, rows, ppo.new_tokens, ppo.temperature
        )
        ref_logp_BT, _ = transformer.score(reference, config, rows, temperature=ppo.temperature, window=ppo.new_tokens)
        return (*outputs, ref_logp_BT)

    logp_BT, value_BT, entropy_BT, ref_logp_BT = rollout.in_minibatches(look, rows, ppo.minibatches)
    experience = Rollout(
        tokens_BT=rows.tokens_BT,
        mask_BT=rows.mask_BT,
        logp_BT=logp_BT,
        ref_logp_BT=ref_logp_BT,
        value_BT=value_BT,
        score_B=score_B if ppo.unfinished_score is None else jnp.where(ended_B, score_B, ppo.unfinished_score),
        ended_B=ended_B,
        sampler_logp_BT=sampler_logp_BT,
    )
    gap_BT = jnp.where(rows.mask_BT, jnp.abs(logp_BT - sampler_logp_BT), 0.0)
    metrics: Metrics = {
        "score": losses.reduce(experience.score_B),
        "entropy": losses.reduce(entropy_BT, rows.mask_BT),
        "length": losses.reduce(rows.mask_BT.sum(1).astype(jnp.float32)),
        "ended": losses.reduce(ended_B.astype(jnp.float32)),
        "sampler_gap_max": gap_BT.max(),
    }
    return experience, metrics


def targets(rollout: Rollout, ppo: PPOConfig, beta: Array) -> Targets:
    """Shaped rewards, advantages (whitened over the whole batch) and returns."""
    kl_BT = kl.k1(rollout.logp_BT, rollout.ref_logp_BT)
    reward_BT = returns.shaped_rewards(rollout.score_B, kl_BT, rollout.mask_BT, beta)
    if ppo.whiten_rewards:
        reward_BT = returns.whiten_keep_mean(reward_BT, rollout.mask_BT)
    advantage_BT, return_BT = returns.gae(reward_BT, rollout.value_BT, rollout.mask_BT, ppo.gamma, ppo.lam)
    return Targets(rollout, returns.whiten(advantage_BT, rollout.mask_BT), return_BT)


def make_loss(config: ModelConfig, ppo: PPOConfig) -> Callable[[Params, Targets, Array | None], tuple[Mean, Metrics]]:
    """The clipped surrogate plus `value_weight` times the clipped value error, one value an answer token."""

    def loss_fn(params: Params, batch: Targets, key: Array | None = None) -> tuple[Mean, Metrics]:
        old = batch.rollout
        logp_BT, value_BT, _ = rollout.policy_outputs(
            params["policy"],
            params["value_head"],
            config,
            Batch(old.tokens_BT, old.mask_BT),
            ppo.new_tokens,
            ppo.temperature,
        )
        log_ratio_BT = losses.log_ratio(logp_BT, old.logp_BT)
        terms = {
            "policy_loss": losses.ppo_clip(log_ratio_BT, batch.advantage_BT, ppo.clip),
            "value_loss": losses.value_clip(value_BT, old.value_BT, batch.return_BT, ppo.value_clip),
        }
        loss, metrics = losses.combine(terms, old.mask_BT, {"value_loss": ppo.value_weight})
        return loss, {**metrics, **losses.ratio_metrics(log_ratio_BT, batch.advantage_BT, old.mask_BT, ppo.clip)}

    return loss_fn


def update(
    state: TrainState,
    config: ModelConfig,
    ppo: PPOConfig,
    tx: optax.GradientTransformation,
    experience: Rollout,
    controller: Controller,
    key: Array,
) -> tuple[TrainState, Controller, Metrics]:
    """`epochs` passes of `minibatches` steps over one rollout, then the controller's move.

    The first pass keeps the rows' order, so that its first minibatch has the very shapes the old log-probabilities had;
    later passes shuffle. `ratio_error_first` is |ratio - 1| there: 0.
    """
    batch = targets(experience, ppo, controller.beta)
    rows = experience.tokens_BT.shape[0]
    step = make_train_step(make_loss(config, ppo), tx)
    shuffles = [jax.random.permutation(k, rows) for k in jax.random.split(key, ppo.epochs)]
    passes = [jnp.arange(rows), *shuffles[1:]]
    order = jnp.concatenate([split_rows(index, ppo.minibatches) for index in passes])

    def one(state: TrainState, index: Array) -> tuple[TrainState, Metrics]:
        return step(state, jax.tree.map(lambda x: sharding.constrain_rows(x[index]), batch), None)

    state, history = jax.lax.scan(one, state, order)
    policies = experience.logp_BT, experience.ref_logp_BT
    measured = kl.estimate(kl.k1(*policies), experience.mask_BT)
    by_k3 = kl.estimate(kl.k3(*policies), experience.mask_BT)
    kl_B = kl.sequence_kl(*policies, experience.mask_BT)
    _, variance = returns.masked_moments(batch.return_BT, experience.mask_BT)
    _, residual = returns.masked_moments(batch.return_BT - experience.value_BT, experience.mask_BT)
    metrics = {
        **jax.tree.map(lambda x: x[-1], history),
        "ratio_error_first": jax.tree.map(lambda x: x[0], history["ratio_error_max"]),
        "ratio_max": jax.tree.map(jnp.max, history["ratio_max"]),
        "kl": measured.nats_a_sequence,
        "kl_error": measured.nats_a_sequence_error,
        "kl_k3": by_k3.nats_a_sequence,
        "kl_k3_error": by_k3.nats_a_sequence_error,
        "beta": controller.beta,
        "score_after_kl": losses.reduce(experience.score_B - controller.beta * kl_B),
        "explained_variance": 1.0 - residual / jnp.maximum(variance, 1e-8),
    }
    return state, controller.update(measured), metrics


def ppo_iteration(
    state: TrainState,
    controller: Controller,
    prompts: Prompts,
    key: Array,
    *,
    config: ModelConfig,
    ppo: PPOConfig,
    tx: optax.GradientTransformation,
    reward_fn: RewardFn,
    stop: int,
) -> tuple[TrainState, Controller, Metrics]:
    """collect, score and update in one pure function: jit it with the state donated.

    reward_fn(params, rows) -> h_B sees all parameters, frozen ones included.
    """
    sample_key, update_key = jax.random.split(key)
    experience, seen = gather(state, prompts, sample_key, config=config, ppo=ppo, reward_fn=reward_fn, stop=stop)
    state, controller, metrics = update(state, config, ppo, tx, experience, controller, update_key)
    return state, controller, {**seen, **metrics}


def gather(
    state: TrainState,
    prompts: Prompts,
    key: Array,
    *,
    config: ModelConfig,
    ppo: PPOConfig,
    reward_fn: RewardFn,
    stop: int,
) -> tuple[Rollout, Metrics]:
    """`collect` and `score` with a reward that is a JAX function."""
    rows, sampler_logp_BT, ended_B = collect(state, config, ppo, prompts, key, stop)
    return score(state, config, ppo, rows, sampler_logp_BT, ended_B, reward_fn(state.params, rows))


def host_iteration(
    config: ModelConfig, ppo: PPOConfig, tx: optax.GradientTransformation, reward_fn: HostReward, stop: int
) -> Callable[[TrainState, Controller, Prompts, Array], tuple[TrainState, Controller, Metrics]]:
    """`ppo_iteration` for a reward that runs on the host (a lexicon, a verifier, a person): two compiled programs with
    reward_fn(rows) -> h_B, on NumPy arrays, between them. State and controller are donated.

    `data.tokenizer.on_texts` makes such a function of one of texts. UserError when it doesn't return one finite number
    a row."""
    sample = jax.jit(lambda state, prompts, key: collect(state, config, ppo, prompts, key, stop))

    def learn(
        state: TrainState, controller: Controller, seen: tuple[Batch, Array, Array], score_B: Array, key: Array
    ) -> tuple[TrainState, Controller, Metrics]:
        experience, metrics = score(state, config, ppo, *seen, score_B)
        state, controller, more = update(state, config, ppo, tx, experience, controller, key)
        return state, controller, {**metrics, **more}

    learn_jit = jax.jit(learn, donate_argnums=(0, 1))

    def one(
        state: TrainState, controller: Controller, prompts: Prompts, key: Array
    ) -> tuple[TrainState, Controller, Metrics]:
        sample_key, update_key = jax.random.split(key)
        seen = sample(state, prompts, sample_key)
        scores = np.asarray(reward_fn(jax.device_get(seen[0])), np.float32)
        if scores.shape != seen[2].shape or not np.isfinite(scores).all():
            raise UserError(
                f"the reward function returned {scores!r} for {len(seen[2])} answers; one finite number each"
            )
        return learn_jit(state, controller, seen, scores, update_key)

    return one


def check_batch(rows: int, ppo: PPOConfig, config: ModelConfig, prompt_tokens: int) -> None:
    """Refuse what can't work before anything is compiled."""
    if rows % ppo.minibatches:
        raise UserError(
            f"a batch of {rows} prompts doesn't divide into {ppo.minibatches} minibatches; change one of them"
        )
    if prompt_tokens + ppo.new_tokens > config.block:
        raise UserError(
            f"prompts of {prompt_tokens} tokens and answers of {ppo.new_tokens} don't fit the model's block of "
            f"{config.block}; lower ppo.new_tokens or shorten the prompts"
        )
