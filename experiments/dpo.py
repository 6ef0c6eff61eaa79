"""Stage 6: direct preference optimisation, the supervised route through the same preferences.

    python -m experiments.dpo --model runs/mine/sft --preferences runs/mine/preferences/train.jsonl --run runs/mine/dpo

h(x, y) = beta log( pi(y|x) / rho(y|x) ) takes the reward model's place in its own loss, for any number B of answers
(Rafailov et al. 2023; B = 2 is the paper's equation 7). At the start pi = rho and the loss is log B.
"""

import dataclasses
from pathlib import Path
from typing import Any, ClassVar

import jax
import optax

from jaxgpt.config import ModelConfig
from jaxgpt.data import formats, pipelines
from jaxgpt.data.comparisons import fit_rankings, rank_ids, sizes
from jaxgpt.models import lora, sharding
from jaxgpt.models.sharding import MeshConfig
from jaxgpt.rlhf.dpo import make_loss
from jaxgpt.runs.checkpoints import SaveConfig, Saves
from jaxgpt.runs.cli import cli
from jaxgpt.runs.run import Run, run_fingerprint
from jaxgpt.runs.saved_model import load_language_model, save_model
from jaxgpt.structs import Params, Preferences
from jaxgpt.training import optim
from jaxgpt.training.guard import GuardConfig
from jaxgpt.training.step import TrainState, evaluate, init_state, jit_on, jit_step, shapes_of, shapes_on, to_floats


@dataclasses.dataclass(frozen=True)
class Settings:
    """2 CPU cores: about 45 s; the gold score rises by 0.9 to 1.5 SFT standard deviations at 4 to 9 nats."""

    PLACE_FIELDS: ClassVar[tuple[str, ...]] = (
        "model",
        "preferences",
        "heldout",
    )  # what they hold counts, not where it is

    run: Path = Path("runs/assistant/dpo")
    model: Path = Path("runs/assistant/sft")
    preferences: Path = Path("runs/assistant/preferences/train.jsonl")
    heldout: Path = Path("runs/assistant/preferences/heldout.jsonl")
    beta: float = 0.1  # reward units a nat
    temperature: float = 0.7  # of the policy and its reference, as in sampling
    lora: int = 0  # rank of the adapters to train instead of all weights
    limit: int = 1000  # preferences to learn from, at most
    epochs: int = 1
    batch: int = 16  # prompts; each brings its B answers
    microbatches: int = 1
    learning_rate: float = 2e-4  # to 0, linearly
    warmup: int = 10
    log_every: int = 10
    seed: int = 5
    mesh: MeshConfig = MeshConfig()
    guard: GuardConfig = GuardConfig()
    save: SaveConfig = SaveConfig(every=50)
    force: bool = False  # go on although settings, data or tokenizer are others than the checkpoint's
    fresh: bool = False


PRESETS = {
    "laptop": Settings(),
    "toy": Settings(batch=8, warmup=1, log_every=1),
    "gpu": Settings(limit=20_000, batch=64, learning_rate=3e-6, warmup=20),
}


def optimizer(settings: Settings, steps: int) -> optax.GradientTransformation:
    schedule = optim.linear_to_zero(settings.learning_rate, steps, min(settings.warmup, steps // 2))
    return optim.adamw(schedule, weight_decay=0.0, b2=0.999)


def build(
    settings: Settings, config: ModelConfig, size: tuple[int, int, int], steps: int, mesh: jax.sharding.Mesh
) -> tuple[Any, Any, Any]:
    """(jitted step, shapes of its state, shapes of its batch). `size`: candidates, tokens of a row and of an answer."""
    sharding.check_model(config, mesh)
    sharding.check_batch(settings.batch, settings.microbatches, mesh)
    tx = optimizer(settings, steps)
    state = shapes_on(mesh, lambda params: start(settings, params, tx), shapes_of(config))
    loss = make_loss(config, settings.beta, settings.temperature, size[2])
    step = jit_step(loss, tx, mesh, state, microbatches=settings.microbatches, spike=settings.guard.spike)
    return step, state, Preferences.shapes(settings.batch, size[0], size[1])


def start(settings: Settings, params: Params, tx: optax.GradientTransformation) -> TrainState:
    """The first state: a policy and a frozen copy of it, or adapters and the weights they belong to."""
    if settings.lora:
        adapters = lora.init(jax.random.key(settings.seed), params, settings.lora)
        return init_state({"policy": adapters}, tx, {"policy": params})
    return init_state({"policy": params}, tx, {"reference": optim.copy(params)})


def main(settings: Settings) -> dict[str, Any]:
    mesh = sharding.make_mesh(settings.mesh)
    share = sharding.share_of_rows(mesh)
    inputs = {
        "model": run_fingerprint(settings.model),
        "preferences": formats.fingerprint(settings.preferences),
        "heldout": formats.fingerprint(settings.heldout),
    }
    with Run(settings.run, settings, stage="dpo", inputs=inputs, fresh=settings.fresh, force=settings.force) as run:
        if run.finished:
            run.say(f"dpo: already done in {settings.run}")
            return run.results
        sft, config, tok, _ = load_language_model(settings.model)
        rankings, dropped = fit_rankings(rank_ids(tok, formats.load(settings.preferences)), config.block)
        heldout, _ = fit_rankings(rank_ids(tok, formats.load(settings.heldout)), config.block)
        rankings = rankings[: settings.limit]
        size = sizes(rankings + heldout)
        steps = len(rankings) * settings.epochs // settings.batch
        batches = pipelines.preference_batches(
            rankings,
            size[1],
            settings.batch,
            seed=settings.seed,
            epochs=settings.epochs,
            part=share.index,
            parts=share.count,
        )
        step, shapes, _ = build(settings, config, size, steps, mesh)
        state = sharding.place_like(start(settings, sft, optimizer(settings, steps)), shapes)
        loss = jit_on(mesh, make_loss(config, settings.beta, settings.temperature, size[2]))
        evaluation = [Preferences.of(arrays) for arrays in pipelines.preference_eval(heldout, size[1], settings.batch)]
        run.say(f"dpo: {len(rankings):,} preferences of up to {size[0]} answers ({dropped} too long, dropped)")
        saves = Saves(run, settings, steps, tok, batches)
        first, state = saves.restore(shapes, lambda: state)
        with saves, run.progress(steps, "dpo", done=first - 1) as bar:
            for i in range(first, steps + 1):
                arrays = saves.next_batch()
                pipelines.check_tokens(arrays, config.vocab)
                state, metrics = step(state, sharding.place_rows(Preferences.of(arrays), mesh), None)
                shown: dict[str, Any] = {}
                if i % settings.log_every == 0 or i == steps:
                    floats = to_floats(metrics)
                    shown = {"loss": floats["loss"], "accuracy": floats["accuracy"]}
                    run.log(i, {**{f"train_{k}": v for k, v in shown.items()}, **saves.figures(floats)})
                bar.update(tokens=arrays["tokens"].size * share.count, **shown)
                saves.after(i, state, metrics, arrays)
        found = evaluate(loss, state.params, evaluation, mesh)
        nll, accuracy = found["loss"], found["accuracy"]
        run.log(steps, {"heldout_nll": nll, "heldout_accuracy": accuracy})
        run.say(f"dpo: held-out loss {nll:.3f} (log B at the start), accuracy of the implicit reward {accuracy:.1%}")
        if settings.lora:
            save_model(settings.run / "adapters", state.trainable["policy"], config)
        save_model(settings.run / "model", lora.merge(state.params["policy"]), config, tok)
        run.finish({"heldout_nll": nll, "heldout_accuracy": accuracy, "preferences": len(rankings), "dropped": dropped})
        return run.results


if __name__ == "__main__":
    cli(main, Settings, PRESETS)
