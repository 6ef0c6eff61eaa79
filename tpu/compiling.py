"""The experiments' steps, compiled for machines that are not here, each in a process of its own: a compiler can crash.

python -m tpu.compiling '{"do": "compile", "settings": {...}, "step": "train"}'      prints the result as JSON
"""

import dataclasses
import json
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from experiments import dpo, ppo, pretrain
from jaxgpt import decoding
from jaxgpt.data.comparisons import MaxSizes
from jaxgpt.data.tokenizer import ANSWER_END
from jaxgpt.errors import UserError
from jaxgpt.models import sharding, transformer
from jaxgpt.models.sharding import MeshConfig
from jaxgpt.runs.cli import settings_from_json
from jaxgpt.training.step import jit_on, sharded_shapes
from tpu import hardware, hlo, roofline
from tpu.settings import Settings, Sizes, Step

GIB = 2**30
GPU_SHARE = 0.75  # of a GPU's memory that JAX takes, unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise


@dataclasses.dataclass(frozen=True)
class Built:
    """A jitted step, the shapes it is compiled for, and its arrays by category of memory."""

    step: Any
    arguments: tuple[Any, ...]
    static: Mapping[str, Any]
    memory: Mapping[str, Any]


def pretrain_settings(settings: Sizes) -> pretrain.Settings:
    return pretrain.Settings(model=settings.model, batch=settings.batch, microbatches=settings.microbatches)


def ppo_settings(settings: Sizes) -> ppo.Settings:
    return ppo.Settings(batch=settings.prompts, ppo=settings.ppo)


def build(settings: Sizes, step: Step, mesh: jax.sharding.Mesh) -> Built:
    everywhere, rows = sharding.replicated_sharding(mesh), sharding.row_sharding(mesh)
    key = jax.eval_shape(lambda: jax.random.key(0))
    key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=everywhere)

    def with_sharding(tree: Any, where: Any) -> Any:
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), tree)

    if step in ("train", "dpo"):
        if step == "train":
            train: Any = pretrain.build(pretrain_settings(settings), mesh)
        else:
            answer = settings.ppo.new_tokens
            size = MaxSizes(row=settings.prompt_tokens + answer, answer=answer, candidates=2)
            train = dpo.build(dpo.Settings(batch=settings.pairs), settings.model, size, 1000, mesh)
        batch = with_sharding(train.batch, rows)
        return Built(train.step, (train.state, batch, None), {}, {**_memory_of_state(train.state), "batch": batch})
    if step == "ppo":
        rl = ppo_settings(settings)
        program = ppo.build(rl, settings.model, settings.prompt_tokens, mesh, ANSWER_END)
        prompts, state = with_sharding(program.prompts, rows), program.state
        control = with_sharding(jax.eval_shape(lambda: ppo.controller(rl)), everywhere)
        arguments = (state, control, prompts, key)
        return Built(program.iteration, arguments, {}, {**_memory_of_state(state), "batch": prompts})
    sharding.check_model(settings.model, mesh)
    sharding.check_rows(settings.prompts, mesh, "a batch of prompts")
    decoding.check_fits_block(settings.model, settings.prompt_tokens, settings.ppo.new_tokens)
    params = sharded_shapes(mesh, lambda: transformer.init(jax.random.key(0), settings.model))
    jitted = jit_on(mesh, decoding.generate, static_argnums=1, static_argnames=decoding.STATIC_ARGNAMES)
    tokens = with_sharding(jax.ShapeDtypeStruct((settings.prompts, settings.prompt_tokens), jnp.int32), rows)
    lengths = with_sharding(jax.ShapeDtypeStruct((settings.prompts,), jnp.int32), rows)
    keywords = {"new_tokens": settings.ppo.new_tokens, "stop": ANSWER_END}
    return Built(
        jitted,
        (params, settings.model, tokens, lengths, key),
        keywords,
        {"parameters": params, "batch": (tokens, lengths)},
    )


def _memory_of_state(state: Any) -> dict[str, Any]:
    return {"parameters": state.trainable, "optimizer": state.opt_state, "frozen": state.frozen}


def bytes_per_device(tree: Any) -> int:
    """Bytes that these arrays take on one device, given their shardings."""
    sizes = [
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves(tree)
        if hasattr(x, "sharding") and x.sharding is not None
    ]
    return sum(sizes)


def inspect_machine(topology: hardware.Topology) -> dict[str, Any]:
    """A machine's number and kind of devices, and the bytes a program may use on each. For a TPU they are in the
    compiler's error for a program that is too large; a GPU's compiler refuses none."""
    devices = hardware.devices(topology)
    about = {"devices": len(devices), "kind": devices[0].device_kind}
    if topology.is_gpu:
        return {**about, "capacity": GPU_SHARE * hardware.gpu_memory(topology)}
    mesh = sharding.make_mesh(MeshConfig(), devices[:1])
    huge = jax.ShapeDtypeStruct((2**20, 2**20), jnp.float32, sharding=sharding.replicated_sharding(mesh))
    try:
        jax.jit(lambda x: x @ x.T).lower(huge).compile()
        raise RuntimeError("the compiler accepted a program of several terabytes")
    except jax.errors.JaxRuntimeError as error:
        refused = refusal(str(error))
        if refused is None:
            raise
    return {**about, "capacity": refused[1]}


def refusal(message: str) -> tuple[float, float] | None:
    """(bytes needed, bytes available) from the compiler's message that a program doesn't fit; None for any other."""
    unit = {"": 1, "K": 2**10, "M": 2**20, "G": GIB, "T": 2**40}
    number = r"\(?([\d.]+)([KMGT]?)\)?"
    there = re.search(rf"exceeds available HBM {number}", message) or re.search(rf"of {number} hbm", message, re.I)
    needed = re.search(rf"required for [\w ]+ {number} exceeds", message) or re.search(rf"Used {number}", message)
    if there is None or needed is None:
        return None
    return float(needed[1]) * unit[needed[2]], float(there[1]) * unit[there[2]]


def compile_step(settings: Settings, step: Step) -> dict[str, Any]:
    """Trace and compile one step for settings.mesh: its memory, collectives, FLOPs, and what its parts cost."""
    machine = settings.machine
    devices = hardware.devices(machine)
    mesh = sharding.make_mesh(settings.mesh, devices)
    if machine.is_gpu:
        _answer_for_gpu(float(devices[0].compute_capability))
    built = build(settings, step, mesh)
    start = time.perf_counter()
    traced = built.step.trace(*built.arguments, **built.static)
    flops, exact = hlo.product_flops(traced.jaxpr)
    arguments = {name: bytes_per_device(tree) for name, tree in built.memory.items()}
    about: dict[str, Any] = {"flops": flops, "flops_exact": exact, "arguments": arguments}
    try:
        compiled = traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        refused = refusal(str(error))
        if refused is None:
            raise
        return {**about, "fits": False, "needed": refused[0], "capacity": refused[1]}
    memory = about["arguments"] = program_memory(built, compiled)
    if machine.is_gpu and sum(memory.values()) > (there := GPU_SHARE * hardware.gpu_memory(machine)):
        return {**about, "fits": False, "needed": sum(memory.values()), "capacity": there}
    took = time.perf_counter() - start
    return {**about, "fits": True, "seconds": took, "memory": memory, **analyse(settings, step, mesh, compiled, flops)}


def program_memory(built: Built, compiled: Any) -> dict[str, float]:
    """Bytes that a compiled step needs on one device, by what they hold."""
    found = compiled.memory_analysis()
    memory: dict[str, float] = {name: bytes_per_device(tree) for name, tree in built.memory.items()}
    return memory | {
        "padding": max(0.0, found.argument_size_in_bytes - sum(memory.values())),
        "results": max(0, found.output_size_in_bytes - found.alias_size_in_bytes),
        "temporary": found.temp_size_in_bytes,
        "program": found.generated_code_size_in_bytes,
    }


def analyse(settings: Settings, step: Step, mesh: jax.sharding.Mesh, compiled: Any, flops: float) -> dict[str, Any]:
    """What a compiled step for settings.machine sends and computes, and what its parts cost; `flops`: of its trace."""
    machine, count, text = settings.machine, mesh.size, compiled.as_text()
    part_of = [_part(device, machine) for device in mesh.devices.flat] if machine.parts > 1 else []
    sent, unknown = hlo.collectives(text, count, part_of)
    costs = roofline.costs(hlo.Program(text))
    if machine.is_gpu:  # cuDNN's products are not in the traced program
        flops += count * sum(cost.times * cost.flops for cost in costs if "fmha" in cost.kind)
    launch = hardware.LAUNCH if machine.is_gpu else 0.0
    return {
        "flops": flops,
        "attention": attention_kernels(text),
        "aliased": compiled.memory_analysis().alias_size_in_bytes,
        "collectives": {
            kind: {
                "times": sum(one.times for one in sent if one.kind == kind),
                "sent": sum(one.sent for one in sent if one.kind == kind),
                "across": sum(one.across for one in sent if one.kind == kind),
                "largest": max(one.size for one in sent if one.kind == kind),
            }
            for kind in sorted({one.kind for one in sent})
        },
        "unknown_loops": sorted(unknown),
        "parts": [dataclasses.asdict(row) for row in roofline.by_scope(costs, machine.chip, launch)],
        "float32_products": sorted(
            {cost.operation for cost in costs if cost.flops and _has_float32(cost.operands[:2])}
        ),
        "copied_in_loops": sum(cost.times * cost.bytes for cost in costs if cost.kind == "copy" and cost.times > 1),
        "sorts": sum(cost.times for cost in costs if "sort" in cost.kind.lower()),
        "kernels": sum(cost.times for cost in costs),
        "kernels_per_token": _kernels_per_token(costs, settings.ppo.new_tokens) if step == "decode" else None,
    }


ATTENTION = {"splash": "splash_mha", "cuDNN": "__cudnn$fmha"}  # kernels, and what shows them in a program's text


def attention_kernels(text: str) -> list[str]:
    """Names of the attention kernels that a compiled program calls."""
    return [name for name, mark in ATTENTION.items() if mark in text]


def _kernels_per_token(costs: Sequence[roofline.Cost], new_tokens: int) -> float:
    """Kernels that the loop over new tokens runs for each of them: whatever runs about as often as there are tokens."""
    return sum(cost.times for cost in costs if cost.times >= new_tokens / 2) / max(new_tokens - 1, 1)


def _has_float32(shapes: Sequence[str]) -> bool:
    return any(shape.startswith(("f32", "f64")) for shape in shapes)


def _part(device: Any, machine: hardware.Topology) -> int:
    """The host or slice of a device."""
    return int(device.process_index if machine.is_gpu else device.slice_index)


def _answer_for_gpu(capability: float) -> None:
    """JAX asks the local GPU what cuDNN supports. In this process the GPU being compiled for answers."""
    from jax._src.cudnn import fused_attention_stablehlo as fused

    fused.check_compute_capability = lambda wanted: capability >= float(wanted)


def run_request(request: Mapping[str, Any]) -> dict[str, Any]:
    """What a child process is asked to do: inspect the machine, or compile a step for it."""
    try:
        settings = settings_from_json(Settings, request["settings"])
        return (
            inspect_machine(settings.machine) if request["do"] == "inspect" else compile_step(settings, request["step"])
        )
    except UserError as error:
        return {"mistake": str(error)}


COMPILER_ENVIRONMENT = {  # use the compiler without a TPU
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_LOG_DIR": "disabled",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    # Without a GPU nothing is autotuned, and Triton's products would get tiny tiles.
    "XLA_FLAGS": "--xla_gpu_enable_triton_gemm=false",
}


def run_in_child(request: Mapping[str, Any], patience: int) -> dict[str, Any]:
    """Run `run_request` in its own process; {"failed": reason} if it crashes, raises or takes too long."""
    try:
        done = subprocess.run(
            [sys.executable, "-m", "tpu.compiling", json.dumps(request)],
            capture_output=True,
            text=True,
            timeout=patience,
            cwd=Path(__file__).parents[1],
            env=os.environ | COMPILER_ENVIRONMENT,
        )
    except subprocess.TimeoutExpired:
        return {"failed": f"not compiled within {patience} s (--patience)"}
    if done.returncode < 0:
        return {"failed": f"the compiler crashed (signal {-done.returncode})"}
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        return {"failed": lines[-1][:300]}
    return json.loads(done.stdout.strip().splitlines()[-1])


if __name__ == "__main__":
    print(json.dumps(run_request(json.loads(sys.argv[1]))))
