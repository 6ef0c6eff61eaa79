"""Stage 5: proximal policy optimisation of the learned reward, kept near the finetuned model by a KL penalty.

    python -m experiments.ppo --model runs/mine/sft --reward runs/mine/reward --run runs/mine/ppo

r(x, y) = h(x, y) - beta log( pi(y|x) / rho(y|x) ), pi starting at rho (Ziegler et al. 2020; Schulman et al. 2017). beta
adapts to hold the measured KL at a target, in nats per sequence. docs/ppo.md lists where each detail is implemented.
"""

import dataclasses
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import optax

from jaxgpt.config import Count, CountOrZero, ModelConfig, Nonnegative, Positive, Seed
from jaxgpt.data import sources
from jaxgpt.data.pipelines import PromptBatches
from jaxgpt.data.training_data import LoadedData, load_prompts
from jaxgpt.errors import UserError
from jaxgpt.files import cache_root
from jaxgpt.losses import kl
from jaxgpt.models import lora, sharding
from jaxgpt.rlhf import ppo, reward, rollout
from jaxgpt.rlhf.policies import Policy
from jaxgpt.rlhf.ppo import PPOConfig
from jaxgpt.runs.checkpoints import SaveConfig
from jaxgpt.runs.cli import cli
from jaxgpt.runs.loop import Loop, LoopSettings
from jaxgpt.runs.rollouts import save_rollout
from jaxgpt.runs.run import Run, run_fingerprint
from jaxgpt.runs.saved_model import load_language_model, load_model, save_model
from jaxgpt.structs import Array, Batch, Params, Prompts
from jaxgpt.training import optim
from jaxgpt.training.step import TrainState, jit_on, param_shapes, sharded_shapes, to_floats


@dataclasses.dataclass(frozen=True)
class Settings(LoopSettings):
    """2 CPU cores: about 90 s; the gold score rises by 1.3 to 1.7 SFT standard deviations at 9 to 12 nats."""

    PLACE_FIELDS: ClassVar[tuple[str, ...]] = ("model", "reward")  # contents matter, not paths

    run: Path = Path("runs/assistant/ppo")
    model: Path = Path("runs/assistant/sft")
    reward: Path = Path("runs/assistant/reward")
    data: str = "movie_reviews"
    iterations: Count = 28
    batch: Count = 128  # answers per iteration
    ppo: PPOConfig = PPOConfig(new_tokens=40, temperature=0.7, epochs=2, minibatches=2)
    lora: CountOrZero = 0  # rank of the adapters to train instead of all weights
    learning_rate: Positive = 3e-4  # decays linearly to 0
    beta: Nonnegative = 0.12  # reward units per nat, where the controller starts
    target_kl: Positive = 9.0  # nats per sequence
    horizon: Positive = 2000.0  # episodes over which beta adapts: larger is slower
    fixed_beta: bool = False  # keep beta where it starts
    sample_every: Count = 14  # iterations from one rollout kept for reading to the next
    log_every: Count = 1
    seed: Seed = 4
    cache: Path = cache_root() / "data"
    save: SaveConfig = SaveConfig(every=10)


SHOWN = ("score", "kl", "beta", "ended")
KEPT = 8  # answers per kept rollout, with figures for every token
PRESETS = {
    "laptop": Settings(),
    "toy": Settings(
        iterations=3, batch=8, ppo=PPOConfig(new_tokens=12, temperature=0.7, epochs=2, minibatches=1), sample_every=2
    ),
    "gpu": Settings(iterations=300, batch=512, ppo=PPOConfig(temperature=0.7), learning_rate=1e-5, sample_every=50),
}


def optimizer(settings: Settings) -> optax.GradientTransformation:
    steps = settings.iterations * settings.ppo.epochs * settings.ppo.minibatches
    return optim.adam_tf(optim.linear_to_zero(settings.learning_rate, steps))


def controller(settings: Settings) -> ppo.Controller:
    beta = jnp.float32(settings.beta)
    return kl.FixedKL(beta) if settings.fixed_beta else kl.AdaptiveKL(beta, settings.target_kl, settings.horizon)


def start(settings: Settings, policy: Policy, params: Params, reward_params: Params) -> TrainState:
    """The first state: a policy and a frozen copy of it, or adapters and the frozen weights that they adapt."""
    adapters = lora.init(jax.random.key(settings.seed), params, settings.lora)
    return ppo.init(policy, params, optimizer(settings), {"reward": reward_params}, adapters)


@dataclasses.dataclass(frozen=True)
class Program:
    """`ppo_iteration`, jitted, and the shapes of state and prompts that it is compiled for."""

    iteration: ppo.IterationFn
    state: TrainState
    prompts: Prompts


def build(settings: Settings, config: ModelConfig, prompt_tokens: int, mesh: jax.sharding.Mesh, stop: int) -> Program:
    sharding.check_model(config, mesh)
    sharding.check_rows(settings.batch // settings.ppo.minibatches, mesh, "a minibatch")
    ppo.check_batch(settings.batch, settings.ppo, config.block, prompt_tokens, controller(settings))
    policy, tx = ppo.policy_of(config, settings.ppo, stop), optimizer(settings)

    def init_state(params: Params) -> TrainState:
        return start(settings, policy, params, reward.init(jax.random.key(0), params, config.width))

    def reward_fn(params: Params, rows: Batch) -> Array:
        return reward.score(params["reward"], config, rows)

    state = sharded_shapes(mesh, init_state, param_shapes(config))
    iteration = ppo.jit_iteration(mesh, state, policy=policy, ppo=settings.ppo, tx=tx, reward_fn=reward_fn)
    return Program(iteration, state, Prompts.shapes(settings.batch, prompt_tokens))


def main(settings: Settings) -> dict[str, Any]:
    mesh = sharding.make_mesh(settings.mesh)
    models = {"model": run_fingerprint(settings.model), "reward": run_fingerprint(settings.reward, "reward")}
    with Run(settings.run, settings, "ppo", {**models, **sources.fingerprint(settings.data)}) as run:
        if run.finished:
            return run.results
        sft, config, tok, _ = load_language_model(settings.model)
        reward_params, reward_config, reward_tok, _ = load_model(settings.reward)
        if (reward_config, reward_tok.fingerprint) != (config, tok.fingerprint):
            raise UserError(f"{settings.reward} was trained with another model or tokenizer than {settings.model}")
        ids, counts = load_prompts(settings.data, settings.cache, tok)
        prompts = PromptBatches(*rollout.pad_prompts(ids, max(map(len, ids))), settings.batch, settings.seed)
        program = build(settings, config, prompts.width, mesh, tok.template.end)
        policy = ppo.policy_of(config, settings.ppo, tok.template.end)
        state = sharding.place_like(start(settings, policy, sft, reward_params), program.state)
        control = sharding.replicate(controller(settings), mesh)
        key = sharding.replicate(jax.random.split(jax.random.key(settings.seed))[0], mesh)
        logp_of = jit_on(mesh, policy.logp)
        read = LoadedData({"prompts": counts}, note=f" (up to {prompts.width} tokens)")
        read.announce(run.say, "ppo")
        with Loop(run, settings, tok, settings.iterations, prompts, config.vocab, shown=SHOWN) as loop:
            state, control, key = loop.restore((program.state, control, key), lambda: (state, control, key))
            for i, arrays in loop:
                batch = sharding.place_whole(Prompts(arrays["tokens"], arrays["length"]), mesh)
                done = program.iteration(state, control, batch, jax.random.fold_in(key, i))
                state, control, floats = done.state, done.controller, to_floats(done.metrics)
                if i == 1 or i % settings.sample_every == 0:
                    kept_rows = jax.tree.map(lambda x: x[:KEPT], done.targets.rollout.rows)
                    after_BT = logp_of(state.params["policy"], kept_rows)
                    text = save_rollout(run.folder, i, done.targets, after_BT, floats["beta"], tok)
                    run.say(f"iteration {i}: score {floats['score']:.2f}, KL {floats['kl']:.2f} nats · {text!r}")
                loop.record(i, (state, control, key), done.metrics, tokens=int(floats["length"] * settings.batch))
        if settings.lora:
            save_model(settings.run / "adapters", state.trainable["policy"], config)
        save_model(settings.run / "critic", {"value_head": state.params["value_head"]}, config)
        save_model(settings.run / "model", lora.merge(state.params["policy"]), config, tok)
        reported = ("score", "kl", "beta", "ended", "length", "ratio_error_first")
        return run.finish({**{name: floats[name] for name in reported}, **read.record()})


if __name__ == "__main__":
    cli(main, Settings, PRESETS)
