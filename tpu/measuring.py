"""The parts of `tpu.measure`, each in a process of its own: a crash or too little memory ends only that part, peak
memory is that of one step, and XLA reads its flags at the start.

python -m tpu.measuring '{"part": "train", "settings": {...}, "out": "runs/measure", "seconds": 120}'

Prints what it finds, one JSON object per line.
"""

import dataclasses
import json
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np

from experiments import ppo, pretrain
from jaxgpt.config import ModelConfig
from jaxgpt.data.tokenizer import ANSWER_END
from jaxgpt.errors import UserError
from jaxgpt.models import sharding, transformer
from jaxgpt.models.sharding import MeshConfig
from jaxgpt.rlhf import reward
from jaxgpt.rlhf.ppo import PPOConfig, policy_of
from jaxgpt.runs.cli import settings_from_json
from jaxgpt.runs.process import configure_malloc, request_determinism
from jaxgpt.runs.versions import accelerator_versions
from jaxgpt.structs import Batch, Prompts
from tpu import checks, compiling, estimates, hardware, hlo
from tpu.checks import Check, first_line
from tpu.compiling import Built
from tpu.measure import STEPS, Part, Settings
from tpu.settings import Settings as PlanSettings
from tpu.settings import Sizes, Step

Emit = Callable[[Mapping[str, Any]], None]
SMALL = Sizes(
    model=ModelConfig(layers=1, width=128, heads=2, block=65, vocab=640, dtype="bfloat16"),
    batch=8,
    prompts=8,
    prompt_tokens=13,
    ppo=PPOConfig(new_tokens=24, epochs=2),
)


# ---- one step: compiled, its arrays, and what follows it ----


def compile_here(settings: Sizes, step: Step, mesh: jax.sharding.Mesh) -> tuple[Built, Any, Any]:
    """The step as the experiments build it: (its shapes, traced, compiled)."""
    built = compiling.build(settings, step, mesh)
    traced = built.step.trace(*built.arguments, **built.static)
    return built, traced, traced.lower().compile()


def make_arguments(settings: Sizes, step: Step, built: Built) -> tuple[Any, ...]:
    """Arrays to call a compiled step with: the first state, and random tokens."""
    model, rl = settings.model, compiling.ppo_settings(settings)

    def random_tokens(key: jax.Array, rows: int, tokens: int) -> jax.Array:
        return jax.random.randint(key, (rows, tokens), ANSWER_END + 1, model.vocab)

    def make(key: jax.Array) -> tuple[Any, ...]:
        init_key, reward_key, data_key, step_key = jax.random.split(key, 4)
        if step == "train":
            tokens = random_tokens(data_key, settings.batch, model.block)
            batch = Batch(tokens, jnp.ones(tokens.shape, bool).at[:, 0].set(False))
            return pretrain.start(compiling.pretrain_settings(settings), init_key), batch, None
        tokens = random_tokens(data_key, settings.prompts, settings.prompt_tokens)
        lengths = jnp.full(settings.prompts, settings.prompt_tokens)
        params = transformer.init(init_key, model)
        if step == "decode":
            return params, tokens, lengths, step_key
        policy = policy_of(model, settings.ppo, ANSWER_END)
        state = ppo.start(rl, policy, params, reward.init(reward_key, params, model.width))
        return state, ppo.controller(rl), Prompts(tokens, lengths), step_key

    shapes = tuple(shape for shape in built.arguments if not isinstance(shape, ModelConfig))
    return jax.jit(make, out_shardings=jax.tree.map(lambda x: x.sharding, shapes))(jax.random.key(0))


def next_arguments(step: Step, arguments: tuple[Any, ...], result: Any) -> tuple[Any, ...]:
    """The arguments of the next call: a step consumes its state."""
    changed = {"train": 1, "ppo": 2}.get(step, 0)
    return (*result[:changed], *arguments[changed:]) if changed else arguments


# ---- parts ----


def describe_machine() -> dict[str, Any]:
    devices = jax.devices()
    topology = hardware.recognise(devices)
    limit = (devices[0].memory_stats() or {}).get("bytes_limit")
    return {
        "device": devices[0].device_kind,
        "platform": devices[0].platform,
        "devices": len(devices),
        "memory": limit,
        "topology": topology.name if topology else None,
        "versions": {"jax": jax.__version__, "jaxlib": jaxlib.__version__, **accelerator_versions()},
    }


def first_ratio(metrics: Mapping[str, Any], name: str) -> Check:
    return Check(f"{name}: |ratio - 1| of PPO's first minibatch", float(metrics["ratio_error_first"]), 0.0)


def check_ppo() -> Check:
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    built, _, compiled = compile_here(SMALL, "ppo", mesh)
    return first_ratio(compiled(*make_arguments(SMALL, "ppo", built)).metrics, "small model")


def check_same_bits() -> Check:
    """Three training steps from the same state, by a program compiled twice. Needs --deterministic's flags."""
    mesh, found = sharding.make_mesh(MeshConfig(), jax.devices()[:1]), []
    for _ in range(2):
        built, _, compiled = compile_here(SMALL, "train", mesh)
        arguments = make_arguments(SMALL, "train", built)
        for _ in range(3):
            arguments = next_arguments("train", arguments, compiled(*arguments))
        found.append([np.asarray(x).tobytes() for x in jax.tree.leaves(arguments[0])])
    differ = sum(a != b for a, b in zip(*found, strict=True))
    return Check("two runs with --deterministic: arrays that differ", differ, 0)


def measure_step(settings: Sizes, step: Step, runs: int, traced: int, out: Path, seconds: float, emit: Emit) -> None:
    """Compile a step for all devices, time it, and write a profiler trace of it. No run starts after `seconds`."""
    began = time.perf_counter()
    mesh = sharding.make_mesh(settings.mesh)
    built, trace, compiled = compile_here(settings, step, mesh)
    emit({"step": {"compile_seconds": time.perf_counter() - began}})
    emit({"step": plan_of(settings, step, mesh, built, trace, compiled)})
    arguments, times = make_arguments(settings, step, built), []
    result: Any = None
    for turn in range(1 + runs):  # the first warms up
        if turn > 1 and time.perf_counter() - began > seconds:
            break
        jax.block_until_ready(arguments)
        start = time.perf_counter()
        result = jax.block_until_ready(compiled(*arguments))
        times += [time.perf_counter() - start] if turn else []
        arguments = next_arguments(step, arguments, result)
    emit({"step": speeds(settings, step, times)})
    if step == "ppo":
        emit({"check": first_ratio(result.metrics, "this model").to_json()})
    if traced:
        emit({"step": {"trace": write_trace(step, compiled, arguments, traced, out / "trace" / step)}})


def plan_of(settings: Sizes, step: Step, mesh: Any, built: Built, trace: Any, compiled: Any) -> dict[str, Any]:
    """What the compiled program needs, and, where there is a data sheet, the bounds of its time."""
    memory = compiling.program_memory(built, compiled)
    found: dict[str, Any] = {"plan": {"bytes": sum(memory.values()), "memory": memory}}
    text = compiled.as_text()
    topology = hardware.recognise(list(mesh.devices.flat))
    if topology is None:
        return found | {"attention": compiling.attention_kernels(text)}
    names = {field.name: getattr(settings, field.name) for field in dataclasses.fields(Sizes)}
    planned = PlanSettings(**names, topology=topology.name)
    flops, _ = hlo.product_flops(trace.jaxpr)
    about = compiling.analyse(planned, step, mesh, compiled, flops)
    bounds = estimates.estimate(planned, step, MeshConfig(*mesh.devices.shape), about)
    found["plan"] |= {"seconds": bounds["seconds"], "mfu": bounds["mfu"], "kernels": about["kernels"]}
    return found | {"attention": about["attention"]}


def speeds(settings: Sizes, step: Step, times: list[float]) -> dict[str, Any]:
    """Median and range of a step's seconds, tokens per second, MFU, and peak memory per device."""
    tokens = settings.batch * settings.model.block if step == "train" else settings.prompts * settings.ppo.new_tokens
    median, devices = statistics.median(times), jax.devices()
    topology, peaks = hardware.recognise(devices), [one.memory_stats() or {} for one in jax.local_devices()]
    found = {
        "seconds": median,
        "seconds_range": [min(times), max(times)],
        "runs": len(times),
        "tokens_per_second": tokens / median,
        "peak_bytes": max((one["peak_bytes_in_use"] for one in peaks if "peak_bytes_in_use" in one), default=None),
    }
    if topology is not None:
        peak = topology.count / topology.chip.devices * topology.chip.tflops * 1e12
        found["mfu"] = estimates.closed_form_flops(settings, step) / median / peak
    return found


def write_trace(step: Step, compiled: Any, arguments: tuple[Any, ...], count: int, folder: Path) -> str:
    """Trace `count` steps with JAX's profiler; returns the folder, or why there is no trace."""
    try:
        with jax.profiler.trace(folder):
            for _ in range(count):
                result = jax.block_until_ready(compiled(*arguments))
                arguments = next_arguments(step, arguments, result)
    except (OSError, RuntimeError) as error:
        return f"none: {error}"
    return "/".join(folder.parts[-2:])


def run_part(part: Part | Literal["machine"], settings: Settings, seconds: float, emit: Emit) -> None:
    if part == "machine":
        emit({"machine": describe_machine()})
        for step in STEPS:
            if step in settings.parts:  # sizes that can't work are refused before anything is compiled
                compiling.build(settings, step, sharding.make_mesh(settings.mesh))
    elif part == "checks":
        for check in checks.run(jax.devices()[0]):
            emit({"check": check.to_json()})
        emit({"check": check_ppo().to_json()})
    elif part == "same_bits":
        emit({"check": check_same_bits().to_json()})
    else:
        if part == "ppo":  # compiles in a fraction of the time
            settings = dataclasses.replace(settings, model=dataclasses.replace(settings.model, scan=True))
        measure_step(settings, part, settings.runs, settings.traced, settings.out, seconds, emit)


def main(request: Mapping[str, Any]) -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print goes to stderr

    def emit(found: Mapping[str, Any]) -> None:
        answers.write(json.dumps(found, allow_nan=False) + "\n")

    configure_malloc()
    jax.config.update("jax_enable_compilation_cache", False)  # how long compiling takes is measured
    given = os.environ.get("JAX_PLATFORMS", "")
    if given and "cpu" not in given.split(","):
        jax.config.update("jax_platforms", f"{given},cpu")  # the checks compare with the CPU
    if request["part"] == "same_bits":
        request_determinism()
    try:
        run_part(request["part"], settings_from_json(Settings, request["settings"]), request["seconds"], emit)
    except UserError as error:
        emit({"mistake": str(error)})
    except Exception as error:
        traceback.print_exc()
        emit({"failed": f"{type(error).__name__}: {first_line(error)}"})


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
