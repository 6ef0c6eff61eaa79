"""Check and measure this package on the GPU or TPU of this machine, in under 8 minutes.

    python -m tpu.measure                      GPT-2's size, on all GPUs of this machine or all chips of this TPU host
    python -m tpu.measure --preset toy         the same on a CPU, to see that it works

Checks what the device computes against plain formulas (`tpu.checks`), then compiles the steps of training, decoding and
PPO as the experiments build them, and reports their time, MFU and peak memory beside what `tpu.plan` says of the same
programs. Results go to OUT/measured.json after every figure, profiler traces to OUT/trace/. A part may take its share
of the time and what earlier parts left of theirs; then it is cut off. Exit status 1 if a check failed or a part is
missing.
"""

import dataclasses
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax

from jaxgpt.config import PRESETS as MODELS
from jaxgpt.config import Count, CountOrZero, ModelConfig, Positive, check_settings
from jaxgpt.errors import UserError
from jaxgpt.files import write_json
from jaxgpt.rlhf.ppo import PPOConfig
from jaxgpt.runs.cli import cli, settings_to_json
from tpu import settings as plans
from tpu.plan import size_text, time_text
from tpu.settings import Sizes, Step

STEPS: tuple[Step, ...] = ("train", "decode", "ppo")
Part = Literal["checks", "same_bits", "train", "decode", "ppo"]
SHARES: Mapping[Part, float] = {  # of the time
    "checks": 0.22,
    "same_bits": 0.1,
    "train": 0.25,
    "decode": 0.13,
    "ppo": 0.3,
}
LARGEST_ON_CPU = 20_000_000  # weights
NO_ACCELERATOR = (
    "JAX finds no GPU or TPU here, and a model of {:,} weights is too slow on a CPU; install JAX for the device "
    "(make EXTRAS=cuda set-up, or EXTRAS=tpu), or try this on the CPU with --preset toy"
)


@dataclasses.dataclass(frozen=True)
class Settings(Sizes):
    """Under 8 minutes on a GPU. PPO is compiled with model.scan."""

    model: ModelConfig = dataclasses.replace(MODELS["gpt2"], dtype="bfloat16")
    batch: Count = 32
    parts: tuple[Part, ...] = tuple(SHARES)
    runs: Count = 10  # of each step, after one to warm up
    traced: CountOrZero = 3  # steps in a profiler trace
    minutes: Positive = 8.0
    out: Path = Path("runs/measure")

    def __post_init__(self) -> None:
        check_settings(self)
        if self.out.exists() and not self.out.is_dir():
            raise UserError(f"out is {self.out}, a file; give a folder")


TOY = plans.PRESETS["toy"]
PRESETS = {
    "gpt2": Settings(),
    "toy": Settings(
        model=dataclasses.replace(TOY.model, layers=2, vocab=1024),
        batch=8,
        prompts=8,
        prompt_tokens=TOY.prompt_tokens,
        ppo=PPOConfig(new_tokens=16, epochs=2),
        runs=3,
    ),
}


def run_part(part: Part | Literal["machine"], settings: Settings, seconds: float) -> Iterator[dict[str, Any]]:
    """What a part of `tpu.measuring` finds, as soon as it finds it; the last is {"failed": reason} if it didn't end."""
    out = settings.out.absolute()
    log, cut_off = out / f"{part}.log", threading.Event()
    settings = dataclasses.replace(settings, out=out)
    request = {"part": part, "settings": settings_to_json(settings), "seconds": 0.8 * seconds}
    with open(log, "w", encoding="utf-8") as errors:
        words = [sys.executable, "-m", "tpu.measuring", json.dumps(request)]
        process = subprocess.Popen(
            words, stdout=subprocess.PIPE, stderr=errors, text=True, cwd=Path(__file__).parents[1]
        )

    def stop() -> None:
        cut_off.set()
        process.kill()

    timer = threading.Timer(max(seconds, 0.0), stop)
    timer.start()
    try:
        assert process.stdout
        yield from map(json.loads, process.stdout)
        status = process.wait()
    finally:
        timer.cancel()
        process.kill()
        process.wait()
    if cut_off.is_set():
        yield {"failed": f"cut off after {seconds:.0f} s; more time: --minutes"}
    elif status:
        last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
        yield {"failed": f"the process ended ({status}): {''.join(last)[:200]}"}


def check_machine(machine: Mapping[str, Any], settings: Settings) -> None:
    if machine["platform"] == "cpu" and settings.model.parameters > LARGEST_ON_CPU:
        raise UserError(NO_ACCELERATOR.format(settings.model.parameters))


def machine_text(machine: Mapping[str, Any]) -> str:
    memory = f", {size_text(machine['memory'])} of memory each" if machine["memory"] else ""
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    sheet = machine["topology"] or "no data sheet, so no bounds and no MFU"
    return f"{machine['devices']} x {machine['device']}{memory} ({sheet}) · {versions}"


def check_text(check: Mapping[str, Any]) -> str:
    error = "no number" if check["error"] is None else f"{check['error']:.1e}"
    return f"  {'ok' if check['ok'] else 'FAILED':<7}{check['name']:<66}{error:>10}  limit {check['limit']:.0e}"


def step_lines(found: Mapping[str, Any]) -> list[str]:
    """A step's figures: plan beside measured."""
    plan, rows = found.get("plan", {}), []
    if "seconds" in found:
        least, most = found["seconds_range"]
        bounds = " to ".join(map(time_text, plan["seconds"])) if "seconds" in plan else "-"
        spread = f"{time_text(found['seconds'])} (median of {found['runs']}, {time_text(least)} to {time_text(most)})"
        rows.append(("time", bounds, spread))
        if "mfu" in found:
            high, low = plan["mfu"]
            rows.append(("MFU", f"{low:.0%} to {high:.0%}", f"{found['mfu']:.1%}"))
        rows.append(("tokens per second", "-", f"{found['tokens_per_second']:,.0f}"))
        peak = found["peak_bytes"]
        rows.append(("memory per device", size_text(plan["bytes"]), size_text(peak) if peak else "not reported"))
    if "compile_seconds" in found:
        rows.append(("compiling", "-", time_text(found["compile_seconds"])))
    if "attention" in found:
        rows.append(("attention", "-", " and ".join(found["attention"]) or "plain formula"))
    if "trace" in found:
        rows.append(("profiler trace", "-", found["trace"]))
    table = [("", "plan", "measured"), *rows] if rows else []
    return [f"  {name:<20}{planned:<28}{measured}" for name, planned, measured in table]


class Measurement:
    """The results, on disk after every change."""

    def __init__(self, settings: Settings) -> None:
        self.file, self.problems = settings.out / "measured.json", 0
        shown = settings_to_json(settings)
        del shown["out"]
        self.results: dict[str, Any] = {"settings": shown, "checks": [], "steps": {}, "failed": {}}

    def take(self, part: str, found: Mapping[str, Any]) -> None:
        """Add what a part found, and print it unless it belongs to a step's table."""
        if "mistake" in found:
            raise UserError(found["mistake"])
        if "machine" in found:
            self.results = {**found["machine"], **self.results}
            say(machine_text(found["machine"]))
        if "check" in found:
            self.results["checks"].append(found["check"])
            self.problems += not found["check"]["ok"]
            say(check_text(found["check"]))
        if "step" in found:
            self.results["steps"].setdefault(part, {}).update(found["step"])
        if "failed" in found:
            self.results["failed"][part] = found["failed"]
            self.problems += 1
            say(f"  FAILED {part}: {found['failed']}")
        write_json(self.file, self.results)


def say(text: str) -> None:
    print(text, flush=True)


def time_for(parts: Sequence[Part], left: float, whole: float) -> float:
    """Seconds for the first of these parts: all that are left, without the shares of the others."""
    return left - sum(SHARES[part] * whole for part in parts[1:])


def main(settings: Settings) -> dict[str, Any]:
    began, whole = time.monotonic(), 60 * settings.minutes
    settings.out.mkdir(parents=True, exist_ok=True)
    measurement = Measurement(settings)
    for found in run_part("machine", settings, whole):
        measurement.take("machine", found)
        if "machine" in found:
            check_machine(found["machine"], settings)
    if "machine" in measurement.results["failed"]:
        raise SystemExit(1)
    for i, part in enumerate(settings.parts):
        say(f"\n{part}")
        seconds = time_for(settings.parts[i:], whole - (time.monotonic() - began), whole)
        for found in run_part(part, settings, seconds):
            measurement.take(part, found)
        for line in step_lines(measurement.results["steps"].get(part, {})):
            say(line)
    took, problems = time.monotonic() - began, measurement.problems
    say(f"\n{'everything passed' if not problems else f'FAILED: {problems}'} in {took:.0f} s; {measurement.file}")
    if problems:
        raise SystemExit(1)
    return measurement.results


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")  # the device is left to the parts
    cli(main, Settings, PRESETS, announce=lambda: None)
