"""Stage 4: a reward model from preferences.

    python -m experiments.reward --model runs/mine/sft --preferences runs/mine/preferences/train.jsonl \
        --heldout runs/mine/preferences/heldout.jsonl --run runs/mine/reward

A copy of the finetuned model with a scalar head h(x, y) at the answer's last token; the values of h for the C answers
are the logits of a softmax classifier:

    J(phi) = -log( exp h(x, y^b) / sum_j exp h(x, y^j) )

Afterwards h gets mean 0 and standard deviation 1 over held-out answers, as in Ziegler et al. (2020), but not over those
that were cut off: PPO replaces their scores, which lie so far below that all other differences would shrink.
"""

import dataclasses
from pathlib import Path
from typing import Annotated, Any, ClassVar

import jax
import optax

from jaxgpt.config import Count, CountOrZero, ModelConfig, Nonnegative, Positive, Range, Seed
from jaxgpt.data import formats, pipelines
from jaxgpt.data.comparisons import MaxSizes, TokenizedPreference
from jaxgpt.data.tokenizer import Tokenizer
from jaxgpt.data.training_data import PreferenceData, load_preference_data
from jaxgpt.models import lora, sharding
from jaxgpt.rlhf import reward
from jaxgpt.rlhf.annotator import simulated_ceiling
from jaxgpt.runs.checkpoints import SaveConfig
from jaxgpt.runs.cli import cli
from jaxgpt.runs.loop import Loop, LoopSettings
from jaxgpt.runs.run import Run, run_fingerprint
from jaxgpt.runs.saved_model import load_language_model, save_model
from jaxgpt.structs import Batch, Params, Preferences
from jaxgpt.training import optim
from jaxgpt.training.step import Program, TrainState, init_state, jit_on, make_program, param_shapes


@dataclasses.dataclass(frozen=True)
class Settings(LoopSettings):
    """2 CPU cores: about 45 s, reaching 53 to 55 % held-out accuracy (chance: 25 %)."""

    PLACE_FIELDS: ClassVar[tuple[str, ...]] = ("model", "preferences", "heldout")  # compared by content, not by path

    run: Path = Path("runs/assistant/reward")
    model: Path = Path("runs/assistant/sft")
    preferences: Path = Path("runs/assistant/preferences/train.jsonl")
    heldout: Path = Path("runs/assistant/preferences/heldout.jsonl")
    lora: CountOrZero = 0  # rank of the adapters to train instead of all weights; 0: none
    limit: Count = 2500  # maximum number of preferences to learn from
    epochs: Count = 1
    batch: Count = 16  # prompts, each with its C answers
    microbatches: Count = 1
    learning_rate: Positive = 2e-3  # falls linearly to 0
    warmup: CountOrZero = 10
    reference_samples: Annotated[int, Range(2)] = 512  # answers that fix the scale of h
    first_spread: Nonnegative = 1.0  # standard deviation of h before training; small when labels are few
    seed: Seed = 3
    save: SaveConfig = SaveConfig(every=50)


NAMES = {"loss": "train_loss", "accuracy": "train_accuracy"}
PRESETS = {
    "laptop": Settings(),
    "toy": Settings(batch=8, warmup=1, reference_samples=16, log_every=1),
    "gpu": Settings(limit=20_000, batch=64, learning_rate=3e-5, warmup=20, reference_samples=1024),
}


def optimizer(settings: Settings, steps: int) -> optax.GradientTransformation:
    schedule = optim.linear_to_zero(settings.learning_rate, steps, min(settings.warmup, steps // 2))
    return optim.adamw(schedule, weight_decay=0.01, b2=0.999)


def first_state(settings: Settings, params: Params, tx: optax.GradientTransformation) -> TrainState:
    """The state of step 0: the model (or its adapters) and the head are trained; gain and bias never are."""
    trainable, frozen = optim.split(params, reward.trainable_names())
    adapters, weights = lora.split_trainable(jax.random.key(settings.seed), params["model"], settings.lora)
    return init_state({**trainable, "model": adapters}, tx, {**frozen, "model": weights} if weights else frozen)


def build(
    settings: Settings,
    config: ModelConfig,
    size: MaxSizes,
    steps: int,
    mesh: jax.sharding.Mesh,
    tie_rate: float = 0.0,
) -> Program[Preferences]:
    """The training step that `main` runs."""
    tx, params, loss = optimizer(settings, steps), param_shapes(config), reward.make_loss(config, tie_rate)
    batch = Preferences.shapes(settings.batch, size.candidates, size.row)
    parts, spike = settings.microbatches, settings.guard.spike

    def begin(params: Params) -> TrainState:
        return first_state(settings, reward.init(jax.random.key(0), params, config.width), tx)

    return make_program(loss, tx, config, mesh, begin, params, batch, microbatches=parts, spike=spike)


def load_data(settings: Settings, tok: Tokenizer, length: int) -> PreferenceData:
    sizes = {"length": length, "limit": settings.limit, "batch": settings.batch, "epochs": settings.epochs}
    return load_preference_data(settings.preferences, settings.heldout, tok, **sizes)


def main(settings: Settings) -> dict[str, Any]:
    mesh = sharding.make_mesh(settings.mesh)
    share = sharding.process_row_shard(mesh)
    files = {name: formats.fingerprint(getattr(settings, name)) for name in ("preferences", "heldout")}
    with Run(settings.run, settings, "reward", {"model": run_fingerprint(settings.model), **files}) as run:
        if run.finished:
            return run.results
        start, config, tok, _ = load_language_model(settings.model)
        data = load_data(settings, tok, config.block)
        order = {"seed": settings.seed, "epochs": settings.epochs, "part": share.index, "parts": share.count}
        batches = pipelines.preference_batches(data.train, data.size.row, settings.batch, **order)
        program = build(settings, config, data.size, data.steps, mesh, data.tie_rate)
        reference = reference_rows(data.heldout, data.size.row, settings.reference_samples, tok.template.end)
        normalise = jit_on(mesh, lambda params: reward.normalise_on(params, config, reference))
        params = normalise(sharding.replicate(reward.init(jax.random.key(settings.seed), start, config.width), mesh))
        params = {**params, "head": jax.tree.map(lambda w: w * settings.first_spread, params["head"])}
        state = sharding.place_like(first_state(settings, params, optimizer(settings, data.steps)), program.state)
        data.announce(run.say, "reward")
        tokens = settings.batch * data.size.candidates * data.size.row
        with Loop(run, settings, tok, data.steps, batches, config.vocab, tokens, NAMES) as loop:
            state = loop.restore(program.state, lambda: state)
            for i, arrays in loop:
                state, metrics = program.step(state, sharding.place_local_rows(Preferences.of(arrays), mesh), None)
                loop.record(i, state, metrics)
        evaluation = pipelines.preference_eval(data.heldout, data.size.row, settings.batch)
        figures = reward.evaluate(
            lambda params, batch: reward.candidate_scores(params, config, batch),
            state.params,
            map(Preferences.of, evaluation),
            mesh,
        )
        ceiling = simulated_ceiling(preference.meta for preference in formats.load(settings.heldout))
        run.log(
            data.steps, {f"heldout_{name}": getattr(figures, name) for name in ("accuracy", "nll", "calibration_error")}
        )
        ceiling_text = f", the annotator's own ceiling {ceiling:.1%}" if ceiling else ""
        run.say(f"reward: held-out accuracy {figures}{ceiling_text}; {figures.loss_text}")
        if settings.lora:
            save_model(settings.run / "adapters", state.trainable, config)
        save_model(settings.run / "model", normalise(lora.merge(state.params)), config, tok)
        return run.finish({**figures._asdict(), "annotator_ceiling": ceiling, **data.record()})


def reference_rows(rankings: list[TokenizedPreference], length: int, count: int, end: int) -> Batch:
    """The first held-out answers that end with the tag `end`, or of all if hardly any do: they fix the scale of h."""
    every = [row for ranking in rankings for row in ranking.rows]
    ended = [row for row in every if row[0][-1] == end]
    rows = (ended if len(ended) > 1 else every)[:count]
    arrays = pipelines.padded_examples(rows, length, len(rows))[0]
    return Batch(arrays["tokens"], arrays["mask"])


if __name__ == "__main__":
    cli(main, Settings, PRESETS)
