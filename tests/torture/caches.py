"""What one program writes and the next one trusts: the caches, parts of studies, rollouts, preferences of a stage."""

import contextlib
import io
import itertools
import random
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from jaxgpt.data import builders, formats, streams, tokenizer
from jaxgpt.data.comparisons import Preference, write_preferences
from jaxgpt.files import sha256_of_file, write_record
from jaxgpt.runs.rollouts import load_rollout
from jaxgpt.runs.run import Run
from jaxgpt.study.cells import ResultCache
from tests.runs.test_run import Settings
from tests.torture.harness import Kind, Outcomes, flip_bit, held, spoil

TEXTS = [f"a film about {n} é" for n in range(20)]


def damage(rng: random.Random, folder: Path) -> str:
    """Something happens to a file or folder below `folder`; returns what."""
    path = rng.choice(sorted(folder.rglob("*")))
    if path.is_file() and rng.random() < 0.85:
        if rng.random() < 0.5 and path.stat().st_size:
            return flip_bit(rng, path)
        path.write_bytes(spoil(rng, path.read_bytes()))
        return f"{path.name} spoiled"
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    what = rng.choice(["gone", "empty", "a folder", "a link to nothing"])
    if what == "empty":
        path.touch()
    elif what == "a folder":
        path.mkdir()
    elif what == "a link to nothing":
        path.symlink_to("nowhere")
    return f"{path.name} is {what}"


def write_stage(folder: Path) -> None:
    """What the stage `preferences` leaves."""
    write_preferences(folder / "train.jsonl", [Preference(text, ("a", "b"), n % 2) for n, text in enumerate(TEXTS)])
    files = {"train.jsonl": sha256_of_file(folder / "train.jsonl")}
    write_record(folder / "done.json", {"stage": "preferences", "fingerprint": "0", "results": {}, "files": files})


def cell(folder: Path) -> Any:
    bar: Any = SimpleNamespace(update=lambda steps: None)
    with contextlib.redirect_stdout(io.StringIO()), Run(folder / "run", Settings(), "sft") as run:
        return ResultCache(run)("a part", lambda: {"x": [1.5, None], "y": "é"}, 1, bar)


def first_reviews(path: Path, real: Any = builders._csv_rows) -> Any:
    return itertools.islice(real(path), 0, None, 40)


def readers() -> Mapping[str, tuple[Callable[[Path], Any], Callable[[Path], Any]]]:
    """How each is written, and how it is read."""
    tok = tokenizer.train_char(TEXTS)
    stream = lambda folder: streams.tokenize_stream(TEXTS, tok, folder)[:].tolist()  # noqa: E731
    cached = lambda folder: tokenizer.cached_tokenizer("char", TEXTS, 0, folder).to_json()  # noqa: E731
    reviews = lambda folder: [builders.load(folder, split) for split in builders.SPLITS]  # noqa: E731
    rollout: dict[str, Any] = {"iteration": 3, "beta": 0.1, "answers": [{"prompt": "p", "logp": [-1.0, -2.5]}]}
    path = "rollouts/000003.json"
    return {
        "stream": (stream, stream),
        "tokenizer": (cached, cached),
        "cell": (cell, cell),
        "preferences": (write_stage, lambda folder: formats.load(folder / "train.jsonl")),
        "rollout": (
            lambda folder: ((folder / "rollouts").mkdir(), write_record(folder / path, rollout)),
            lambda folder: load_rollout(folder / path),
        ),
        "reviews": (reviews, reviews),
    }


def cache_damage(rng: random.Random, folder: Path) -> Outcomes:
    ways, home = readers(), folder / "home"
    builders._csv_rows = first_reviews
    whole = {}
    for name, (write, read) in ways.items():
        (home / name).mkdir(parents=True)
        write(home / name)
        whole[name] = read(home / name)
    for case in itertools.count():
        name = rng.choice(list(ways)[:-1]) if case % 200 else "reviews"  # those take longest
        shutil.rmtree(folder / "work", ignore_errors=True)
        shutil.copytree(home / name, folder / "work")
        below = folder / "work" / ("run/cells" if name == "cell" else "")
        what = damage(rng, below)
        outcome = held(lambda name=name: ways[name][1](folder / "work"), whole[name], str(folder))  # type: ignore[misc]
        yield outcome and f"{name}, {what}: {outcome}"


KINDS = {"caches, damaged anywhere": Kind(cache_damage)}
