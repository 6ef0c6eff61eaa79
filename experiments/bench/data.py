"""Benchmark: pretraining's data from a text larger than memory may be, and the peak memory of the process.

    python -m experiments.bench.data                                          50 MB, half a minute
    python -m experiments.bench.data --gigabytes 10 --folder /a/large/disk    needs 40 GB there: text, 2 bytes per token

The text is generated: sentences of made-up words, their frequencies by Zipf's law, in documents of 3 to 40 sentences.
Each start is a process of its own: the first tokenizes, the second verifies what the first wrote. Both then take
batches from all over the text.
"""

import dataclasses
import hashlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np

from experiments import pretrain
from experiments.bench import harness
from jaxgpt.config import Count, Range, Seed, check_settings
from jaxgpt.models.sharding import RowShard
from jaxgpt.runs.cli import cli


@dataclasses.dataclass(frozen=True)
class Settings:
    """Half a minute on one CPU core."""

    folder: Path = Path("runs/bench_data")  # for the text and its tokens
    gigabytes: Annotated[float, Range(above=0, most=1000)] = 0.05
    form: Literal["jsonl", "txt"] = "jsonl"  # a document per line, or one document
    tokenizer: Literal["char", "bpe"] = "char"  # char is by far the fastest, and has the most tokens
    batches: Count = 300  # of 16 x 256 tokens
    seed: Seed = 0

    def __post_init__(self) -> None:
        check_settings(self)


PRESETS = {"laptop": Settings()}


def sentences(rng: np.random.Generator, count: int = 2**16) -> list[str]:
    """Of 4 to 19 words out of 30,000."""
    syllables = [a + b for a in "bdfghklmnprstvz" for b in ("a", "e", "i", "o", "u", "an", "er", "é", "ou")]
    words = ["".join(rng.choice(syllables, rng.integers(1, 5))) for _ in range(30_000)]
    weights = 1 / np.arange(2, len(words) + 2)
    lengths = rng.integers(4, 20, count)
    chosen = iter(rng.choice(len(words), lengths.sum(), p=weights / weights.sum()).tolist())
    return [" ".join(words[next(chosen)] for _ in range(length)).capitalize() + "." for length in lengths]


def documents(size: float, seed: int) -> Iterator[str]:
    """Documents of about `size` bytes in all."""
    rng = np.random.default_rng(seed)
    known = sentences(rng)
    written = 0
    while written < size:
        lengths = rng.integers(3, 41, 1000)
        chosen, at = rng.integers(0, len(known), lengths.sum()).tolist(), 0
        for length in lengths.tolist():
            text = " ".join([known[i] for i in chosen[at : at + length]])
            at, written = at + length, written + len(text.encode())
            yield text


def write_text(path: Path, settings: Settings) -> None:
    """Write the text, unless the file is there already."""
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    with part.open("w", encoding="utf-8") as file:
        for text in documents(settings.gigabytes * 1e9, settings.seed):
            file.write(json.dumps({"text": text}, ensure_ascii=False) if settings.form == "jsonl" else text)
            file.write("\n")
    part.rename(path)


def start(settings: Settings, path: Path) -> dict[str, Any]:
    """One start of pretraining, up to its batches; run in a process of its own."""
    before = harness.peak_memory()
    toy = pretrain.PRESETS["toy"]
    model = dataclasses.replace(toy.model, block=256, vocab=4096)
    own = dataclasses.replace(
        toy, data=str(path), cache=settings.folder / "cache", tokenizer=settings.tokenizer, model=model, batch=16
    )
    begun = time.perf_counter()
    data = pretrain.prepare(own, RowShard(0, 1), say=lambda text: print(text, file=sys.stderr, flush=True))
    prepared = time.perf_counter()
    digest = hashlib.sha256()
    for _ in range(settings.batches):
        digest.update(next(data.batches)["tokens"].data)
    return {
        "seconds": prepared - begun,
        "per_batch": (time.perf_counter() - prepared) / settings.batches,
        "imports": before,
        "peak": harness.peak_memory(),
        "tokens": data.tokens,
        "batches": digest.hexdigest(),
    }


def run_start(settings: Settings, path: Path) -> dict[str, Any]:
    """`start` in a process of its own."""
    code = "import json, sys; from pathlib import Path; from experiments.bench import data; " + (
        f"print(json.dumps(data.start(data.Settings(folder=Path({str(settings.folder)!r}), "
        f"tokenizer={settings.tokenizer!r}, batches={settings.batches}), Path({str(path)!r}))))"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=harness.ROOT, check=True, stdout=subprocess.PIPE, text=True
    )
    result: dict[str, Any] = json.loads(found.stdout.splitlines()[-1])
    return result


def main(settings: Settings) -> dict[str, Any]:
    folder = settings.folder.absolute()
    settings = dataclasses.replace(settings, folder=folder)
    path = folder / f"{settings.gigabytes:g}-{settings.seed}.{settings.form}"
    write_text(path, settings)
    size = path.stat().st_size
    print(f"{size / 1e9:.2f} GB of text in {path.name}, tokenizer {settings.tokenizer}")
    results = {name: run_start(settings, path) for name in ("first start", "second start")}
    print(f"{'':14}{'seconds':>9}{'MB/s':>8}{'tokens':>16}{'ms/batch':>10}{'peak memory':>13}{'of it imports':>15}")
    for name, found in results.items():
        print(
            f"{name:14}{found['seconds']:9.1f}{size / found['seconds'] / 1e6:8.1f}{found['tokens']:16,}"
            f"{found['per_batch'] * 1e3:10.2f}{found['peak'] / 1e6:10.0f} MB{found['imports'] / 1e6:12.0f} MB"
        )
    first, second = results.values()
    print("the same batches" if first["batches"] == second["batches"] else "OTHER BATCHES")
    return results


if __name__ == "__main__":
    cli(main, Settings, PRESETS)
