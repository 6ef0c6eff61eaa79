"""Training in one or two processes gets a signal at a random moment, while its output may be lost.

Each must end in time with the right status, its last line plain; started again, it must end with the bits of a run that
nobody touched. Uses the runs of tests/slow/soak.py."""

import contextlib
import os
import random
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

from tests.slow import soak
from tests.torture.harness import Kind, Outcomes

PATIENCE = 30.0  # seconds in which all must end, after a signal
SIGNALS = (signal.SIGHUP, signal.SIGTERM, signal.SIGINT, signal.SIGKILL)
LAST = re.compile(r"stopped: (saved after step \d+ of 40; |SIGTERM received; |process \d of 2 has )|interrupted")


def await_setup(program: soak.Program, run: Path) -> bool:
    """Until the run has its folder: it then reads, compiles and takes its first step."""
    while program.running and not (run / "settings.json").exists():
        time.sleep(0.01)
    return program.running


def expected_statuses(number: int, index: int, victim: int, processes: int) -> set[int]:
    """Of process `index`, when `victim` got the signal."""
    if number == signal.SIGKILL:
        return {-signal.SIGKILL} if index == victim else {75}
    if number == signal.SIGINT:  # at a step all stop and save, before the first one the others follow the victim
        return {130} if index == victim else {75, 130}
    return {75}


def open_output(kind: str) -> int | None:
    """A pipe whose reader has gone, a full disk, or none: the log."""
    if kind == "gone":
        reader, writer = os.pipe()
        os.close(reader)
        return writer
    return os.open("/dev/full", os.O_WRONLY) if kind == "full" else None


def end(program: soak.Program) -> list[int | None]:
    """The statuses; None for a process that did not end in time."""
    until = time.monotonic() + PATIENCE
    for process in program.processes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(until - time.monotonic(), 0.1))
    found = [process.poll() for process in program.processes]
    program.kill()
    return found


def strike(rng: random.Random, run: Path, words: list[str], processes: int) -> str:
    number, victim = rng.choice(SIGNALS), rng.randrange(processes)
    moment, kind = rng.choice(["setup", "step", "save"]), rng.choice(["log", "gone", "full"])
    what = f"{signal.Signals(number).name} to {victim} of {processes} at {moment}, output {kind}"
    for old in run.parent.glob(f"{run.name}*"):
        shutil.rmtree(old) if old.is_dir() else old.unlink()
    output = open_output(kind)
    program = soak.Program(words, processes, run.with_suffix(".log"), output)
    if output is not None:
        os.close(output)
    hit = await_setup(program, run) if moment == "setup" else soak.await_moment(program, run, moment, rng)
    if hit:
        time.sleep(rng.uniform(0, 3 if moment == "setup" else 0))
        if program.running:
            program.processes[victim].send_signal(number)
    found = end(program)
    for index, status in enumerate(found):
        said = run.with_suffix(f".{index}.txt").read_text()
        last = (said.strip().splitlines() or [""])[-1]
        if "Traceback" in said:
            return f"{what}: a traceback of process {index}: {said[-1500:]}"
        if status == 0:  # it had ended before
            continue
        if status not in expected_statuses(number, index, victim, processes):
            return f"{what}: process {index} ended with {status}: {said[-1500:]}"
        if status != -signal.SIGKILL and not LAST.match(last):
            return f"{what}: the last line of process {index} is {last!r}"
    soak.Program(words, processes, run.with_suffix(".log")).finish()
    differences = soak.differences(run.parent / "pretrain", run)
    return f"{what}: after starting again {'; '.join(differences)}" if differences else ""


def signals(processes: int, rng: random.Random, folder: Path) -> Outcomes:
    soak.prepare(folder, ("pretrain",), processes)
    run = folder / "struck"
    while True:
        yield strike(rng, run, soak.command("pretrain", folder, run), processes)


KINDS = {
    f"signals to {name}, output lost": Kind(
        lambda rng, folder, count=count: signals(count, rng, folder), cases=10, quick=False
    )
    for count, name in ((1, "one process"), (2, "one of two processes"))
}
