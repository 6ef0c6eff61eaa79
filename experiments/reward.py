"""Stage 4: a reward model from preferences.

    python -m experiments.reward --model runs/mine/sft --preferences runs/mine/preferences/train.jsonl \
        --heldout runs/mine/preferences/heldout.jsonl --run runs/mine/reward

A copy of the finetuned model with a scalar head h(x, y) at the answer's last token; the h of the B answers are the
logits of a softmax classifier: J(phi) = -log( exp h(x, y^b) / sum_j exp h(x, y^j) ). Afterwards h is shifted and scaled
so that the answers of the held-out preferences (in the pipeline: samples of the finetuned model) have mean 0 and
standard deviation 1 (Ziegler et al. 2020).
"""

import dataclasses
from pathlib import Path
from typing import Any, ClassVar

import jax
import numpy as np
import optax

from jaxgpt.config import ModelConfig
from jaxgpt.data import formats, pipelines
from jaxgpt.data.comparisons import Preference, fit_rankings, rank_ids, sizes
from jaxgpt.losses import Mean
from jaxgpt.models import lora, sharding
from jaxgpt.models.sharding import MeshConfig
from jaxgpt.rlhf import reward
from jaxgpt.rlhf.annotator import SimulatedAnnotator
from jaxgpt.rlhf.intervals import calibration
from jaxgpt.runs.checkpoints import SaveConfig, Saves
from jaxgpt.runs.cli import cli
from jaxgpt.runs.run import Run, run_fingerprint
from jaxgpt.runs.saved_model import load_language_model, save_model
from jaxgpt.structs import Array, Batch, Params, Preferences
from jaxgpt.training import optim
from jaxgpt.training.guard import GuardConfig
from jaxgpt.training.step import Metrics, TrainState, init_state, jit_on, jit_step, shapes_of, shapes_on, to_floats


@dataclasses.dataclass(frozen=True)
class Settings:
    """2 CPU cores: about 45 s, to 47 to 49 % held-out accuracy (chance 25 %)."""

    PLACE_FIELDS: ClassVar[tuple[str, ...]] = (
        "model",
        "preferences",
        "heldout",
    )  # what they hold counts, not where it is

    run: Path = Path("runs/assistant/reward")
    model: Path = Path("runs/assistant/sft")
    preferences: Path = Path("runs/assistant/preferences/train.jsonl")
    heldout: Path = Path("runs/assistant/preferences/heldout.jsonl")
    lora: int = 0  # rank of the adapters to train instead of all weights
    limit: int = 2500  # preferences to learn from, at most
    epochs: int = 1
    batch: int = 16  # prompts; each brings its B answers
    microbatches: int = 1
    learning_rate: float = 5e-4  # to 0, linearly
    warmup: int = 10
    reference_samples: int = 512  # answers that fix the scale of h
    first_spread: float = 1.0  # of h before training, in standard deviations: small when labels are few
    log_every: int = 10
    seed: int = 3
    mesh: MeshConfig = MeshConfig()
    guard: GuardConfig = GuardConfig()
    save: SaveConfig = SaveConfig(every=50)
    force: bool = False  # go on although settings, data or tokenizer are others than the checkpoint's
    fresh: bool = False


PRESETS = {
    "laptop": Settings(),
    "toy": Settings(batch=8, warmup=1, reference_samples=16, log_every=1),
    "gpu": Settings(limit=20_000, batch=64, learning_rate=3e-5, warmup=20, reference_samples=1024),
}


def optimizer(settings: Settings, steps: int) -> optax.GradientTransformation:
    schedule = optim.linear_to_zero(settings.learning_rate, steps, min(settings.warmup, steps // 2))
    return optim.adamw(schedule, weight_decay=0.01, b2=0.999)


def make_loss(config: ModelConfig) -> Any:
    """The softmax classifier's loss on {'model', 'head', 'gain', 'bias'}."""

    def loss_fn(params: Params, batch: Preferences, key: Array | None = None) -> tuple[Mean, Metrics]:
        return reward.loss(params, config, batch)

    return loss_fn


def build(
    settings: Settings, config: ModelConfig, size: tuple[int, int, int], steps: int, mesh: jax.sharding.Mesh
) -> tuple[Any, Any, Any]:
    """(jitted step, shapes of its state, shapes of its batch). `size`: candidates, tokens of a row and of an answer."""
    sharding.check_model(config, mesh)
    sharding.check_batch(settings.batch, settings.microbatches, mesh)
    tx = optimizer(settings, steps)

    def start(params: Params) -> Any:
        return first_state(settings, reward.init(jax.random.key(0), params, config.width), tx)

    state = shapes_on(mesh, start, shapes_of(config))
    step = jit_step(make_loss(config), tx, mesh, state, microbatches=settings.microbatches, spike=settings.guard.spike)
    return step, state, Preferences.shapes(settings.batch, size[0], size[1])


def first_state(settings: Settings, params: Params, tx: optax.GradientTransformation) -> TrainState:
    """Model and head to train, or adapters and head; gain and bias never."""
    trainable, frozen = optim.split(params, reward.trainable_names())
    adapters, weights = lora.start(jax.random.key(settings.seed), params["model"], settings.lora)
    return init_state({**trainable, "model": adapters}, tx, {**frozen, "model": weights} if weights else frozen)


def read(path: Path, tok: Any, length: int) -> tuple[list[Preference], list[Any], int]:
    """Preferences of a file, their rankings in ids, and how many were too long for the model."""
    preferences = formats.load(path)
    rankings, dropped = fit_rankings(rank_ids(tok, preferences), length)
    return preferences, rankings, dropped


def evaluate(
    params: Params, config: ModelConfig, rankings: list[Any], length: int, batch: int, mesh: jax.sharding.Mesh
) -> dict[str, Any]:
    """Held-out accuracy, likelihood and calibration of the choice probabilities."""
    program = jit_on(mesh, lambda params, batch: reward.candidate_scores(params, config, batch))
    scores, choices, present = [], [], []
    for arrays in pipelines.preference_eval(rankings, length, batch):
        real = arrays["present"].any(1)
        scores.append(np.asarray(program(params, sharding.place_whole(Preferences.of(arrays), mesh)), np.float64)[real])
        choices.append(arrays["choice"][real])
        present.append(arrays["present"][real])
    scores_BC, choice_B, present_BC = (np.concatenate(x) for x in (scores, choices, present))
    logits_BC = np.where(present_BC, scores_BC, -np.inf)
    chosen_BC = np.arange(logits_BC.shape[1]) == choice_B[:, None]
    logp_BC = logits_BC - np.logaddexp.reduce(logits_BC, axis=1, keepdims=True)
    table, error = calibration(np.exp(logp_BC)[present_BC], chosen_BC[present_BC])
    return {
        "accuracy": float((logits_BC.argmax(1) == choice_B).mean()),
        "chance": float((1 / present_BC.sum(1)).mean()),
        "nll": float(-logp_BC[chosen_BC].mean()),
        "calibration": table,
        "calibration_error": error,
    }


def main(settings: Settings) -> dict[str, Any]:
    mesh = sharding.make_mesh(settings.mesh)
    share = sharding.share_of_rows(mesh)
    inputs = {
        "model": run_fingerprint(settings.model),
        "preferences": formats.fingerprint(settings.preferences),
        "heldout": formats.fingerprint(settings.heldout),
    }
    with Run(settings.run, settings, stage="reward", inputs=inputs, fresh=settings.fresh, force=settings.force) as run:
        if run.finished:
            run.say(f"reward: already done in {settings.run}")
            return run.results
        sft, config, tok, _ = load_language_model(settings.model)
        _, rankings, dropped = read(settings.preferences, tok, config.block)
        heldout_preferences, heldout, _ = read(settings.heldout, tok, config.block)
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
        reference = reference_rows(heldout, size[1], settings.reference_samples)
        normalised = jit_on(mesh, lambda params: reward.normalise_on(params, config, reference))
        params = normalised(sharding.replicate(reward.init(jax.random.key(settings.seed), sft, config.width), mesh))
        params = {**params, "head": jax.tree.map(lambda w: w * settings.first_spread, params["head"])}
        state = sharding.place_like(first_state(settings, params, optimizer(settings, steps)), shapes)
        run.say(f"reward: {len(rankings):,} preferences of up to {size[0]} answers ({dropped} too long, dropped)")
        saves = Saves(run, settings, steps, tok, batches)
        first, state = saves.restore(shapes, lambda: state)
        with saves, run.progress(steps, "reward", done=first - 1) as bar:
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
        results = evaluate(state.params, config, heldout, size[1], settings.batch, mesh)
        ceiling = annotator_ceiling(heldout_preferences)
        run.log(steps, {f"heldout_{name}": results[name] for name in ("accuracy", "nll", "calibration_error")})
        run.say(
            f"reward: held-out accuracy {results['accuracy']:.1%} (chance {results['chance']:.1%}"
            + (f", the annotator's own ceiling {ceiling:.1%}" if ceiling else "")
            + f"), calibration error {results['calibration_error']:.3f}"
        )
        if settings.lora:
            save_model(settings.run / "adapters", state.trainable, config)
        save_model(settings.run / "model", normalised(lora.merge(state.params)), config, tok)
        run.finish({**results, "annotator_ceiling": ceiling, "preferences": len(rankings), "dropped": dropped})
        return run.results


def reference_rows(rankings: list[Any], length: int, count: int) -> Batch:
    """The first candidate answers of the held-out preferences: what fixes the scale of h."""
    rows = [row for ranking in rankings for row in ranking.rows][:count]
    arrays = pipelines.padded_examples(rows, length, len(rows))[0]
    return Batch(arrays["tokens"], arrays["mask"])


def annotator_ceiling(preferences: list[Preference]) -> float | None:
    """The accuracy of knowing the simulated annotator's own scores; None where a person chose."""
    rows = [p.meta for p in preferences if "gold" in p.meta]
    if not rows:
        return None
    annotator = SimulatedAnnotator(float(rows[0].get("temperature", 1.0)))
    return float(np.mean([annotator.ceiling(np.array([row["gold"]])) for row in rows]))


if __name__ == "__main__":
    cli(main, Settings, PRESETS)
