"""Kill runs at random moments, resume them with the same command, and compare every bit with an untouched run.

    python -m tests.slow.soak --kills 20            every stage, with one process and with two: about an hour on 2 cores
    python -m tests.slow.soak --kills 3 --stages ppo --processes 1

A kill is SIGKILL, in turn: in the middle of a step, in the middle of a save, and soon after resuming from the last one.
"""

import argparse
import dataclasses
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tests.helpers import WALL_CLOCK, few_reviews

STAGES = ("pretrain", "sft", "reward", "ppo", "dpo")
ROOT = Path(__file__).parents[2]
PATIENCE = 300.0  # seconds for one run


def command(stage: str, root: Path, run: Path) -> list[str]:
    """A run of some 20 to 40 steps whose inputs are the untouched runs and the data below `root`."""
    often = ["--save.every", "2" if stage == "ppo" else "5"]
    preferences = [
        "--preferences",
        str(root / "preferences/train.jsonl"),
        "--heldout",
        str(root / "preferences/heldout.jsonl"),
    ]
    steps = ["--steps", "40", "--log-every", "1"]
    flags = {
        "pretrain": [*steps, "--eval-every", "20", "--model.layers", "1", "--model.dropout", "0.1"],
        "sft": ["--model", str(root / "pretrain"), *steps],
        "preferences": ["--model", str(root / "sft"), "--prompts", "160"],
        "reward": ["--model", str(root / "sft"), "--epochs", "2", *preferences],
        "ppo": ["--model", str(root / "sft"), "--reward", str(root / "reward"), "--iterations", "16"],
        "dpo": ["--model", str(root / "sft"), "--epochs", "2", *preferences],
    }[stage]
    saving = often if stage in STAGES else []
    cache = ["--cache", str(root / "data")] if stage not in ("reward", "dpo") else []
    return [sys.executable, "-m", f"experiments.{stage}", "--preset", "toy", "--run", str(run), *flags, *saving, *cache]


class Program:
    """A command in one or several processes, with a device each. XLA_FLAGS may hold other flags.

    `output`: where stdout goes instead of the log, which then gets only what is said on stderr."""

    def __init__(self, words: Sequence[str], processes: int, log: Path, output: int | None = None) -> None:
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONUNBUFFERED": "1"}
        environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"  # starting again is most of the time
        flags = [one for one in os.environ.get("XLA_FLAGS", "").split() if "device_count" not in one]
        environment["XLA_FLAGS"] = " ".join([*flags, "--xla_force_host_platform_device_count=1"])
        with socket.create_server(("localhost", 0)) as server:
            port = server.getsockname()[1]
        self.log = log
        self.processes = []
        for index in range(processes):
            place = ["--distributed", f"localhost:{port},{processes},{index}"] if processes > 1 else []
            with log.with_suffix(f".{index}.txt").open("ab") as out:
                self.processes.append(
                    subprocess.Popen(
                        [*words, *place],
                        cwd=ROOT,
                        env=environment,
                        stdout=out if output is None else output,
                        stderr=out,
                    )
                )

    @property
    def running(self) -> bool:
        return all(process.poll() is None for process in self.processes)

    def kill(self) -> None:
        for process in self.processes:
            process.send_signal(signal.SIGKILL)
        for process in self.processes:
            process.wait()

    def finish(self) -> None:
        """AssertionError with the output unless all end well."""
        for process in self.processes:
            try:
                process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                self.kill()
        codes = [process.returncode for process in self.processes]
        assert not any(codes), f"exit {codes}:\n{self.log.with_suffix('.0.txt').read_text()[-3000:]}"


def lines_of(run: Path) -> list[str]:
    try:
        return (run / "metrics.jsonl").read_text(errors="replace").splitlines()
    except FileNotFoundError:  # not there yet, or being replaced
        return []


def half_written(run: Path) -> bool:
    try:
        return any(not (one / "checkpoint.json").exists() for one in (run / "checkpoints").iterdir())
    except FileNotFoundError:
        return False


def await_moment(program: Program, run: Path, kind: str, rng: random.Random) -> bool:
    """Until the moment for a kill of this kind; False when the run ended before."""
    begun = time.monotonic()
    seen = len(lines_of(run))
    wanted = seen + (rng.randint(1, 8) if kind == "step" else 1)
    while program.running and time.monotonic() - begun < PATIENCE:
        saving = half_written(run)
        lines = len(lines_of(run))
        seen = min(seen, lines)  # resuming has dropped what came after the checkpoint
        if (kind == "save" and saving) or (kind != "save" and lines >= min(wanted, seen + 8) and lines > seen):
            time.sleep(rng.uniform(0, 0.02 if kind == "save" else 0.1))
            return program.running
        time.sleep(0.002)
    return False


KINDS = ("step", "save", "soon")


def killed_run(words: Sequence[str], run: Path, kills: int, processes: int, seed: int) -> list[str]:
    """Start a command again and again, killing it, then let it end. The kinds of the kills that hit."""
    rng = random.Random(seed)
    hits = []
    for n in range(kills):
        program = Program(words, processes, run.with_suffix(".log"))
        kind = KINDS[(seed + n) % len(KINDS)]
        if await_moment(program, run, kind, rng):
            program.kill()
            hits.append(kind)
        else:
            program.finish()
            break
    Program(words, processes, run.with_suffix(".log")).finish()
    return hits


def figures(run: Path) -> list[dict[str, Any]]:
    """The metrics without the wall clock."""
    rows = [json.loads(line) for line in lines_of(run)]
    return [{name: value for name, value in row.items() if name not in WALL_CLOCK} for row in rows]


def arrays(run: Path) -> dict[str, np.ndarray]:
    import jax

    from jaxgpt.runs.saved_model import load_model

    leaves = jax.tree_util.tree_flatten_with_path(load_model(run).params)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf) for path, leaf in leaves}


def differences(untouched: Path, killed: Path) -> list[str]:
    """Where two runs differ in any bit of their metrics, results or parameters."""
    texts = []
    a, b = figures(untouched), figures(killed)
    if a != b:
        first = next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
        texts.append(f"metrics from line {first + 1} on ({len(a)} and {len(b)} lines)")
    done = [json.loads((run / "done.json").read_text())["results"] for run in (untouched, killed)]
    if done[0] != done[1]:
        texts.append("results")
    x, y = arrays(untouched), arrays(killed)
    return texts + [name for name in x if x[name].tobytes() != y[name].tobytes()]


def prepare(root: Path, stages: Sequence[str] = STAGES, processes: int = 1) -> None:
    """The untouched runs of these stages and of what they start from."""
    few_reviews(root / "data")
    order = ("pretrain", "sft", "preferences", "reward", "ppo", "dpo")
    for stage in order[: 1 + max(map(order.index, stages))]:
        if stage in stages or stage not in ("ppo", "dpo"):
            several = processes if stage in STAGES else 1
            Program(command(stage, root, root / stage), several, root / f"{stage}.log").finish()


@dataclasses.dataclass(frozen=True)
class Outcome:
    stage: str
    processes: int
    hits: list[str]
    differences: list[str]


def soak(root: Path, stages: Sequence[str], processes: int, kills: int, seed: int) -> Iterator[Outcome]:
    """After `prepare`: each stage killed, and compared."""
    for stage in stages:
        run = root / f"killed_{stage}"
        hits: list[str] = []
        attempt = 0
        while len(hits) < kills:  # a run is short: after some kills it has ended, and another one begins
            attempt += 1
            subprocess.run(["rm", "-rf", str(run)], check=True)
            hits += killed_run(command(stage, root, run), run, kills - len(hits), processes, seed + attempt)
            found = differences(root / stage, run)
            if found or attempt > kills:
                break
        yield Outcome(stage, processes, hits, found)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.slow.soak", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--kills", type=int, default=20, help="of each stage")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
    parser.add_argument("--processes", nargs="+", type=int, choices=(1, 2), default=(1, 2))
    parser.add_argument("--seed", type=int, default=int(time.time()))
    options = parser.parse_args(argv)
    print(f"seed {options.seed}")
    bad = False
    for processes in options.processes:
        with tempfile.TemporaryDirectory() as folder:
            prepare(Path(folder), options.stages, processes)
            for found in soak(Path(folder), options.stages, processes, options.kills, options.seed):
                kinds = ", ".join(f"{found.hits.count(kind)} {kind}" for kind in KINDS)
                verdict = f"DIFFERS in {'; '.join(found.differences)}" if found.differences else "equal to the last bit"
                print(
                    f"{found.stage:9} {processes} process(es), {len(found.hits)} kills ({kinds}): {verdict}", flush=True
                )
                bad = bad or bool(found.differences)
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
