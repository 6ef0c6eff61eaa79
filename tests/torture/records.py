"""Bits flipped in what a run and a model write about themselves, and folders that are renamed or swapped."""

import dataclasses
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxgpt.config import ModelConfig
from jaxgpt.data import pipelines
from jaxgpt.data.tokenizer import Tokenizer, train_char
from jaxgpt.errors import UserError
from jaxgpt.files import read_record, write_record
from jaxgpt.runs.checkpoints import Checkpoints, SaveConfig, read_checkpoint
from jaxgpt.runs.run import Run, run_fingerprint
from jaxgpt.runs.saved_model import load_model, save_model
from tests.torture.harness import Kind, Outcomes, flip_bit, held, spoil

RECORD: dict[str, Any] = {"step": 9, "rate": 1e-3, "names": ["a", "é\n"], "inner": {"x": None, "y": True}}
CONFIG = ModelConfig(layers=1, width=8, heads=2, block=16, vocab=32)
STATE = {"w": jnp.arange(6.0), "step": jnp.int32(0)}
STEPS = (3, 6, 9)
LR = 0.1  # of the run; other rates are other runs'


@dataclasses.dataclass(frozen=True)
class Settings:
    run: Path
    lr: float = LR
    fresh: bool = False
    force: bool = False


def damage(rng: random.Random, path: Path) -> str:
    """Flip a bit, or spoil some bytes; returns what was done."""
    if rng.random() < 0.7:
        return flip_bit(rng, path)
    data = spoil(rng, path.read_bytes())
    path.write_bytes(data)
    return f"{path.name} is {data!r:.2000}"


def damaged_again_and_again(rng: random.Random, path: Path, call: Callable[[], Any], names: str = "") -> Outcomes:
    """Outcomes of `call` with `path` damaged, which is whole again afterwards. `names`: what an error must name."""
    whole, expected = path.read_bytes(), call()
    while True:
        what = damage(rng, path)
        outcome = held(call, expected, names)
        path.write_bytes(whole)
        yield outcome and f"{what}: {outcome}"


def any_record(rng: random.Random, folder: Path) -> Outcomes:
    path = folder / "record.json"
    write_record(path, RECORD)
    yield from damaged_again_and_again(rng, path, lambda: read_record(path, RECORD, "write it again"), "record.json")


# ---- checkpoints ----


def tokenizer() -> Tokenizer:
    return train_char(["abc"])


def batches() -> pipelines.Batches:
    return pipelines.windows(np.arange(400, dtype=np.int32) % 30, 16, 4, seed=0)


def stopped_run(folder: Path, lr: float = LR) -> Path:
    """A run with checkpoints of three steps, whose state says which."""
    with Run(folder, Settings(folder, lr), "sft") as run:
        saves = Checkpoints(run, SaveConfig(keep=9), tokenizer(), batches())
        for step in STEPS:
            run.log(step, {"loss": float(step)})
            saves.save(step, {**STATE, "step": jnp.int32(step if lr == LR else 100 + step)})
        saves.wait()
    return folder


def resumed(folder: Path, lr: float = LR) -> tuple[int, int] | None:
    """The step of the checkpoint that a run would go on from, and the step that its state says."""
    with Run(folder, Settings(folder, lr), "sft") as run:
        run.console.quiet = True
        run.say = lambda text: None  # type: ignore[method-assign]
        saves = Checkpoints(run, SaveConfig(keep=9), tokenizer(), batches())
        shapes = jax.tree.map(jnp.asarray, STATE)
        record = saves.newest(shapes)
        return record and (record["step"], int(saves.load(record, shapes, 12)["step"]))


def checkpoint_records(rng: random.Random, folder: Path) -> Outcomes:
    step = stopped_run(folder / "run") / "checkpoints/9"
    yield from damaged_again_and_again(rng, step / "checkpoint.json", lambda: read_checkpoint(step), "checkpoints/9")


def checkpoint_files(rng: random.Random, folder: Path) -> Outcomes:
    """Any file of a checkpoint: it is passed over for the one before."""
    run = stopped_run(folder / "run")
    files = sorted(path for path in (run / "checkpoints/9").rglob("*") if path.is_file() and path.stat().st_size)
    while True:
        path = rng.choice(files)
        whole = path.read_bytes()
        what = damage(rng, path)
        found = outcome_of(lambda: resumed(run))
        path.write_bytes(whole)
        yield "" if found in ((9, 9), (6, 6)) else f"{path}, {what}: resumed after {found}"


def outcome_of(call: Callable[[], Any]) -> Any:
    try:
        return call()
    except UserError as error:
        return f"refused: {error}"
    except Exception as error:
        return repr(error)


def moved_checkpoints(rng: random.Random, folder: Path) -> Outcomes:
    """Folders renamed, records and states exchanged, another run's checkpoints put in: none is taken for another."""
    own, other = stopped_run(folder / "own"), stopped_run(folder / "other", lr=0.2)
    while True:
        run = folder / "run"
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(own, run)
        done = []
        for _ in range(rng.randint(1, 3)):
            a, b = rng.sample(STEPS, 2)
            part = rng.choice(["", "checkpoint.json", "state"])
            source = rng.choice([own, other])
            target = run / "checkpoints" / str(a) / part
            shutil.rmtree(target) if target.is_dir() else target.unlink()
            step = rng.choice([a, b])
            place = source / "checkpoints" / str(step) / part
            shutil.copytree(place, target) if place.is_dir() else shutil.copy(place, target)
            done.append(f"{part or 'all'} of {source.name}'s {step} as {a}")
        found = outcome_of(lambda run=run: resumed(run))
        own_state = isinstance(found, tuple) and found[0] == found[1]
        good = found is None or own_state or str(found).startswith("refused")
        yield "" if good else f"{'; '.join(done)}: resumed after {found}"


# ---- models and finished runs ----


def model_records(rng: random.Random, folder: Path) -> Outcomes:
    from jaxgpt.models import transformer

    tok = tokenizer()
    config = dataclasses.replace(CONFIG, vocab=tok.vocab_size)
    save_model(folder / "model", transformer.init(jax.random.key(0), config), config, tok, {"loss": 1.5})

    def read() -> Any:
        found = load_model(folder / "model")
        return jax.tree.map(lambda x: np.asarray(x).tobytes(), found.params), found.config, found.extra

    yield from damaged_again_and_again(rng, folder / "model/model.json", read, "model")


def finished_runs(rng: random.Random, folder: Path) -> Outcomes:
    """settings.json, done.json, metrics.jsonl and what the run wrote: a second start, and a later stage."""
    run = folder / "sft"

    def start() -> Any:
        with Run(run, Settings(run), "sft") as found:
            if not found.finished:
                raise AssertionError("a finished run began anew")
            return found.results

    with Run(run, Settings(run), "sft") as made:
        made.log(1, {"loss": 2.0})
        save_model(run / "model", {"w": np.arange(3.0)}, CONFIG)
        (run / "train.jsonl").write_text('{"prompt": "a", "answers": ["b", "c"], "choice": 0}\n')
        made.finish({"loss": 1.5, "rows": [1, 2]})
    kinds = [
        damaged_again_and_again(rng, run / "settings.json", start, "settings.json"),
        damaged_again_and_again(rng, run / "done.json", start, "done.json"),
        damaged_again_and_again(rng, run / "done.json", lambda: run_fingerprint(run, "sft"), "done.json"),
        damaged_again_and_again(rng, run / "train.jsonl", lambda: run_fingerprint(run, "sft"), "train.jsonl"),
    ]
    while True:
        yield next(kinds[rng.randrange(len(kinds))])


KINDS = {
    "any record, damaged anywhere": Kind(any_record),
    "checkpoint.json, damaged anywhere": Kind(checkpoint_records),
    "any file of a checkpoint, damaged": Kind(checkpoint_files),
    "checkpoints renamed, exchanged, or of another run": Kind(moved_checkpoints),
    "model.json, damaged anywhere": Kind(model_records),
    "settings.json, done.json and outputs of a finished run, damaged": Kind(finished_runs),
}
