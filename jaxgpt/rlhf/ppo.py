"""PPO for language models: collect, score, update, and one iteration that combines the three.

One episode is one answer. The reward h(x, y) arrives at its last token, and every token's reward includes the penalty
-beta (log pi - log rho): the sum over the answer is r = h - beta log(pi(y|x) / rho(y|x)) (Ziegler et al. 2020).

    experience = collect(state, prompts, key, policy=policy)
    scored, metrics = score(state, experience, score_B, policy=policy, ppo=ppo)    # score_B: h of each answer
    state, controller, targets, metrics = update(state, controller, scored, key, policy=policy, ppo=ppo, tx=tx)

`ppo_iteration` runs all three under one jit, if the reward is a JAX function; `host_iteration` takes any other reward.
The `Policy` wraps the model (`jaxgpt.rlhf.policies`): our transformer, or one from another library. Parameters of the
state: trainable 'policy' and 'value_head', frozen 'reference' and whatever the reward needs (usually 'reward').
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax.sharding import Mesh
from jax.typing import ArrayLike

from jaxgpt import losses
from jaxgpt.config import Count, Fraction, ModelConfig, Nonnegative, Positive, Range, check_settings
from jaxgpt.errors import UserError
from jaxgpt.losses import Mean, kl, returns
from jaxgpt.models import lora, sharding, transformer
from jaxgpt.rlhf import rollout
from jaxgpt.rlhf.policies import Outputs, Policy, transformer_policy
from jaxgpt.structs import Array, Batch, Experience, Params, Prompts, Rollout
from jaxgpt.training.step import LossFn, Metrics, TrainState, init_state, make_train_step, split_rows

Controller = kl.AdaptiveKL | kl.FixedKL
RewardFn = Callable[[Params, Batch], Array]
HostReward = Callable[[Batch], ArrayLike]


@dataclasses.dataclass(frozen=True)
class PPOConfig:
    """How PPO samples and learns. Defaults follow Ziegler et al. 2020 where their values suit small models."""

    new_tokens: Count = 40  # maximum length of an answer
    temperature: Positive = 1.0  # of the policy: sampling, training and reference alike
    epochs: Annotated[int, Range(1, 1000)] = 4  # passes over each rollout
    minibatches: Count = 1  # updates per pass
    clip: Positive = 0.2  # the probability ratio is clipped to [1 - clip, 1 + clip]
    value_clip: Positive = 0.2  # a new value is clipped to this distance from the old one
    value_weight: Nonnegative = 0.1  # of the value loss, relative to the policy loss
    gamma: Fraction = 1.0  # discount per token
    lam: Fraction = 0.95  # lambda of generalised advantage estimation
    whiten_rewards: bool = False  # scale rewards to unit variance, keeping their mean
    unfinished_score: Annotated[
        float | None, Range()
    ] = -1.0  # replaces h for answers that never ended; None: h is kept

    def __post_init__(self) -> None:
        check_settings(self)


@struct.dataclass
class Targets:
    """A rollout with the advantages and returns computed from its rewards: the batch for PPO's loss."""

    rollout: Rollout
    advantage_BT: Array
    return_BT: Array


class Iteration(NamedTuple):
    """What an update returns: the new state and controller, the batch it was trained on, and metrics."""

    state: TrainState
    controller: Controller
    targets: Targets
    metrics: Metrics


def policy_of(config: ModelConfig, ppo: PPOConfig, stop: int, slots: int | None = None) -> Policy:
    """Our transformer as a policy with these settings; `slots`: see `transformer_policy`."""
    how = {"new_tokens": ppo.new_tokens, "temperature": ppo.temperature}
    return transformer_policy(config, stop=stop, slots=slots, **how)


def init(
    policy: Policy,
    params: Params,
    tx: optax.GradientTransformation,
    frozen: Params,
    adapters: Params | None = None,
) -> TrainState:
    """The first state: a policy and a zero-initialised critic head to train, and a copy of the policy as the frozen
    reference. With `adapters`, only they and the head are trained, and the policy's own weights are the reference."""
    head = transformer.init_scalar_head(None, policy.width)
    if adapters:
        return init_state({"policy": adapters, "value_head": head}, tx, {"policy": params, **frozen})
    trainable = {"policy": params, "value_head": head}
    return init_state(trainable, tx, {"reference": jax.tree.map(jnp.copy, params), **frozen})


@jax.named_scope("collect")
def collect(state: TrainState, prompts: Prompts, key: Array, *, policy: Policy) -> Experience:
    """Sample answers from the current policy."""
    return policy.collect(state.params["policy"], prompts, key)


@jax.named_scope("score")
def score(
    state: TrainState, experience: Experience, score_B: Array, *, policy: Policy, ppo: PPOConfig
) -> tuple[Rollout, Metrics]:
    """Make a rollout from the answers and their rewards h: add the log-probabilities of policy and reference, and the
    critic's values; `ppo.unfinished_score` replaces h where an answer never ended."""
    params, rows, ended_B = state.params, experience.rows, experience.ended_B
    reference = lora.reference_params(params)

    def evaluate(rows: Batch) -> tuple[Outputs, Array]:
        return policy.outputs(params["policy"], params["value_head"], rows), policy.logp(reference, rows)

    outputs, ref_logp_BT = rollout.map_in_minibatches(evaluate, rows, ppo.minibatches)
    scored = Rollout(
        tokens_BT=rows.tokens_BT,
        mask_BT=rows.mask_BT,
        logp_BT=outputs.logp_BT,
        ref_logp_BT=ref_logp_BT,
        value_BT=outputs.value_BT,
        score_B=score_B if ppo.unfinished_score is None else jnp.where(ended_B, score_B, ppo.unfinished_score),
        ended_B=ended_B,
        sampler_logp_BT=experience.logp_BT,
    )
    gap_BT = jnp.where(rows.mask_BT, jnp.abs(outputs.logp_BT - experience.logp_BT), 0.0)
    metrics: Metrics = {
        "score": losses.reduce(scored.score_B),
        "entropy": losses.reduce(outputs.entropy_BT, rows.mask_BT),
        "length": losses.reduce(rows.mask_BT.sum(1).astype(jnp.float32)),
        "ended": losses.reduce(ended_B.astype(jnp.float32)),
        "sampler_gap_max": gap_BT.max(),
    }
    return scored, metrics


def compute_targets(rollout: Rollout, ppo: PPOConfig, beta: Array) -> Targets:
    """Shaped rewards, advantages (whitened over the whole batch) and returns."""
    kl_BT = kl.k1(rollout.logp_BT, rollout.ref_logp_BT)
    reward_BT = returns.shaped_rewards(rollout.score_B, kl_BT, rollout.mask_BT, beta)
    if ppo.whiten_rewards:
        reward_BT = returns.whiten_keep_mean(reward_BT, rollout.mask_BT)
    advantage_BT, return_BT = returns.gae(reward_BT, rollout.value_BT, rollout.mask_BT, ppo.gamma, ppo.lam)
    return Targets(rollout, returns.whiten(advantage_BT, rollout.mask_BT), return_BT)


def make_loss(policy: Policy, ppo: PPOConfig) -> LossFn[Targets]:
    """The clipped surrogate plus `value_weight` times the clipped value error, one value per answer token."""

    def loss_fn(params: Params, batch: Targets, key: Array | None = None) -> tuple[Mean, Metrics]:
        old = batch.rollout
        new = policy.outputs(params["policy"], params["value_head"], old.rows)
        log_ratio_BT = losses.log_ratio(new.logp_BT, old.logp_BT)
        terms = {
            "policy_loss": losses.ppo_clip(log_ratio_BT, batch.advantage_BT, ppo.clip),
            "value_loss": losses.value_clip(new.value_BT, old.value_BT, batch.return_BT, ppo.value_clip),
        }
        loss, metrics = losses.combine(terms, old.mask_BT, {"value_loss": ppo.value_weight})
        return loss, {**metrics, **losses.ratio_metrics(log_ratio_BT, batch.advantage_BT, old.mask_BT, ppo.clip)}

    return loss_fn


@jax.named_scope("update")
def update(
    state: TrainState,
    controller: Controller,
    scored: Rollout,
    key: Array,
    *,
    policy: Policy,
    ppo: PPOConfig,
    tx: optax.GradientTransformation,
) -> Iteration:
    """`epochs` passes of `minibatches` steps over one rollout, then the controller's update of beta.

    The first pass keeps the rows' order, so that its first minibatch repeats the computation of the old
    log-probabilities in the same shapes; later passes shuffle. `ratio_error_first`, the largest |ratio - 1| of that
    minibatch, is therefore 0.
    """
    batch = compute_targets(scored, ppo, controller.beta)
    rows = scored.tokens_BT.shape[0]
    step = make_train_step(make_loss(policy, ppo), tx)
    shuffles = [jax.random.permutation(k, rows) for k in jax.random.split(key, ppo.epochs)]
    passes = [jnp.arange(rows), *shuffles[1:]]
    order = jnp.concatenate([split_rows(index, ppo.minibatches) for index in passes])

    def take_step(state: TrainState, index: Array) -> tuple[TrainState, Metrics]:
        return step(state, jax.tree.map(lambda x: sharding.constrain_rows(x[index]), batch), None)

    state, history = jax.lax.scan(take_step, state, order)
    logps = scored.logp_BT, scored.ref_logp_BT
    kl_k1 = kl.estimate(kl.k1(*logps), scored.mask_BT)
    kl_k3 = kl.estimate(kl.k3(*logps), scored.mask_BT)
    kl_B = kl.sequence_kl(*logps, scored.mask_BT)
    _, variance = returns.masked_moments(batch.return_BT, scored.mask_BT)
    _, residual = returns.masked_moments(batch.return_BT - scored.value_BT, scored.mask_BT)
    metrics = {
        **jax.tree.map(lambda x: x[-1], history),
        "ratio_error_first": jax.tree.map(lambda x: x[0], history["ratio_error_max"]),
        "ratio_max": jax.tree.map(jnp.max, history["ratio_max"]),
        "kl": kl_k1.nats_per_sequence,
        "kl_error": kl_k1.nats_per_sequence_error,
        "kl_k3": kl_k3.nats_per_sequence,
        "kl_k3_error": kl_k3.nats_per_sequence_error,
        "beta": controller.beta,
        "score_after_kl": losses.reduce(scored.score_B - controller.beta * kl_B),
        "explained_variance": 1.0 - residual / jnp.maximum(variance, 1e-8),
    }
    return Iteration(state, controller.update(kl_k1), batch, metrics)


def learn(
    state: TrainState,
    controller: Controller,
    experience: Experience,
    score_B: Array,
    key: Array,
    *,
    policy: Policy,
    ppo: PPOConfig,
    tx: optax.GradientTransformation,
) -> Iteration:
    """`score` and `update`: everything that follows once the answers have their rewards."""
    scored, score_metrics = score(state, experience, score_B, policy=policy, ppo=ppo)
    iteration = update(state, controller, scored, key, policy=policy, ppo=ppo, tx=tx)
    return iteration._replace(metrics={**score_metrics, **iteration.metrics})


def ppo_iteration(
    state: TrainState,
    controller: Controller,
    prompts: Prompts,
    key: Array,
    *,
    policy: Policy,
    ppo: PPOConfig,
    tx: optax.GradientTransformation,
    reward_fn: RewardFn,
) -> Iteration:
    """`collect`, `score` and `update` in one pure function: jit it with state and controller donated.

    reward_fn(params, rows) -> h_B sees all parameters, frozen ones included.
    """
    sample_key, update_key = jax.random.split(key)
    experience = collect(state, prompts, sample_key, policy=policy)
    with jax.named_scope("reward"):
        score_B = reward_fn(state.params, experience.rows)
    return learn(state, controller, experience, score_B, update_key, policy=policy, ppo=ppo, tx=tx)


IterationFn = Callable[[TrainState, Controller, Prompts, Array], Iteration]


def jit_iteration(
    mesh: Mesh,
    state: TrainState,
    *,
    policy: Policy,
    ppo: PPOConfig,
    tx: optax.GradientTransformation,
    reward_fn: RewardFn,
) -> IterationFn:
    """`ppo_iteration`, jitted for a mesh: prompts are divided among its devices, state and controller are donated.
    `state` holds shapes with shardings (see `training.sharded_shapes`)."""
    shardings, replicated = jax.tree.map(lambda x: x.sharding, state), sharding.replicated_sharding(mesh)
    iterate = functools.partial(ppo_iteration, policy=policy, ppo=ppo, tx=tx, reward_fn=reward_fn)
    return jax.jit(
        sharding.within(mesh, iterate),
        donate_argnums=(0, 1),
        in_shardings=(shardings, replicated, sharding.row_sharding(mesh), replicated),
        out_shardings=Iteration(shardings, replicated, replicated, replicated),  # type: ignore[arg-type]
    )


def host_iteration(
    *, policy: Policy, ppo: PPOConfig, tx: optax.GradientTransformation, reward_fn: HostReward
) -> IterationFn:
    """`ppo_iteration` for a reward that runs on the host (a lexicon, a verifier, a person): two compiled programs, and
    between them reward_fn(rows) -> h_B on NumPy arrays. State and controller are donated.

    `data.tokenizer.text_reward` turns a reward function of texts into such a function of rows. Raises UserError if
    reward_fn doesn't return one finite number per row."""
    sample = jax.jit(functools.partial(collect, policy=policy))
    learn_jit = jax.jit(functools.partial(learn, policy=policy, ppo=ppo, tx=tx), donate_argnums=(0, 1))

    def iterate(state: TrainState, controller: Controller, prompts: Prompts, key: Array) -> Iteration:
        sample_key, update_key = jax.random.split(key)
        experience = sample(state, prompts, sample_key)
        scores = np.asarray(reward_fn(jax.device_get(experience.rows)), np.float32)
        if scores.shape != experience.ended_B.shape or not np.isfinite(scores).all():
            raise UserError(
                f"the reward function returned {scores!r} for {len(experience.ended_B)} answers; "
                "it must return one finite number per answer"
            )
        return learn_jit(state, controller, experience, scores, update_key)

    return iterate


def check_batch(rows: int, ppo: PPOConfig, block: int, prompt_tokens: int, *controllers: Controller) -> None:
    """Raise UserError for sizes that can't work, before anything is compiled."""
    horizons = [one.horizon for one in controllers if isinstance(one, kl.AdaptiveKL)]
    if horizons and min(horizons) <= 0.2 * rows:
        raise UserError(
            f"a horizon of {min(horizons):g} episodes is too short for batches of {rows}: one update could make beta "
            f"negative; set it above {0.2 * rows:g}"
        )
    if rows % ppo.minibatches:
        raise UserError(
            f"a batch of {rows} prompts doesn't divide into {ppo.minibatches} minibatches; change one of them"
        )
    if prompt_tokens + ppo.new_tokens > block:
        raise UserError(
            f"prompts of {prompt_tokens} tokens and answers of {ppo.new_tokens} don't fit the model's block of "
            f"{block}; lower ppo.new_tokens or shorten the prompts"
        )
