"""Plan a run on a Cloud TPU slice, on a machine that has no TPU.

    python -m tpu.plan --topology v5e:4x4
    python -m tpu.plan --topology v5p:8x8x8 --preset gpt2-xl --steps train --batch 1024 --mesh.fsdp 64

Compiles the same steps that the experiments run (their `build`) with Google's TPU compiler, which `jax[tpu]` installs,
for all chips of the slice. Reports the memory each device needs, what it sends, the FLOPs, and the best mesh among
those that fit. Memory and collectives come from the compiled program. Times and MFU are estimates from these and from
the chips' data sheets; nothing is run.
"""

import dataclasses
import importlib.metadata
import importlib.util
import itertools
import json
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp

from experiments import ppo, pretrain
from jaxgpt import decoding
from jaxgpt.config import PRESETS as MODELS
from jaxgpt.config import Count, ModelConfig, check_settings
from jaxgpt.data.tokenizer import ANSWER_END
from jaxgpt.errors import UserError
from jaxgpt.models import sharding, transformer
from jaxgpt.models.sharding import MeshConfig
from jaxgpt.rlhf.ppo import PPOConfig
from jaxgpt.runs.cli import cli, settings_from_json, settings_to_json
from jaxgpt.training.step import jit_on, sharded_shapes
from tpu import hlo

Step = Literal["train", "ppo", "decode"]
GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """Data sheet: bfloat16 TFLOP/s, GB/s of HBM, GB/s one way per link to a neighbour; JAX devices per chip."""

    tflops: float
    hbm: float
    link: float
    devices: int = 1


CHIPS = {
    "v4": Chip(275, 1228, 45, devices=2),
    "v5e": Chip(197, 819, 45),
    "v5p": Chip(459, 2765, 90),
    "v6e": Chip(918, 1640, 90),
    "tpu7x": Chip(2307, 7370, 100, devices=2),
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """Takes a minute or two per step for a model of GPT-2's size on two cores."""

    topology: str = "v5e:4x4"  # generation and chips along each dimension: v5p:8x8x8, v6e:16x16
    steps: tuple[Step, ...] = ("train", "ppo", "decode")
    model: ModelConfig = dataclasses.replace(MODELS["gpt2"], dtype="bfloat16", scan=True)
    batch: Count = 256  # rows of model.block tokens per training step
    microbatches: Count = 1
    prompts: Count = 512  # per PPO iteration, and for decoding
    prompt_tokens: Count = 64
    ppo: PPOConfig = PPOConfig(new_tokens=64, temperature=0.7, epochs=4)
    mesh: MeshConfig = MeshConfig()  # default: try several; otherwise only this one
    tries: Count = 3  # meshes to compile for each step, best estimates first
    patience: Count = 900  # time limit for one compilation, in seconds
    json: Path | None = None  # also write the results to this file

    def __post_init__(self) -> None:
        check_settings(self)
        if not re.fullmatch(r"[a-z0-9]+:\d+(x\d+){1,2}", self.topology):
            raise UserError(f"topology is {self.topology!r}; write it like v5e:4x4 or v5p:2x2x2")
        if self.topology.partition(":")[0] not in CHIPS:
            raise UserError(f"unknown generation in topology {self.topology!r}; known: {', '.join(CHIPS)}")
        if self.json and self.json.is_dir():
            raise UserError(f"json is {self.json}, a folder; give a file")
        if not self.steps:
            raise UserError("steps is empty, so there is nothing to compile; name at least one step")

    @property
    def chip(self) -> Chip:
        return CHIPS[self.topology.partition(":")[0]]


PRESETS = {
    "gpt2": Settings(),
    "gpt2-xl": Settings(model=dataclasses.replace(MODELS["gpt2-xl"], dtype="bfloat16", scan=True, remat="full")),
    "toy": Settings(
        model=dataclasses.replace(MODELS["tiny"], dtype="bfloat16", block=128, heads=2, scan=True),
        batch=64,
        prompts=64,
        prompt_tokens=32,
        ppo=PPOConfig(new_tokens=32, epochs=2),
        tries=1,
    ),
}


# ---- the steps, as the experiments build them ----


@dataclasses.dataclass(frozen=True)
class Built:
    """A jitted step, the shapes it is compiled for, and its arrays by category of memory."""

    step: Any
    arguments: tuple[Any, ...]
    static: Mapping[str, Any]
    memory: Mapping[str, Any]


def build(settings: Settings, step: Step, mesh: jax.sharding.Mesh) -> Built:
    everywhere, rows = sharding.replicated_sharding(mesh), sharding.row_sharding(mesh)
    key = jax.eval_shape(lambda: jax.random.key(0))
    key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=everywhere)

    def with_sharding(tree: Any, where: Any) -> Any:
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), tree)

    if step == "train":
        run = pretrain.Settings(model=settings.model, batch=settings.batch, microbatches=settings.microbatches)
        train = pretrain.build(run, mesh)
        batch = with_sharding(train.batch, rows)
        return Built(train.step, (train.state, batch, None), {}, {**_memory_of_state(train.state), "batch": batch})
    if step == "ppo":
        rl = ppo.Settings(batch=settings.prompts, ppo=settings.ppo)
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


# ---- in a child process: the compiler can crash ----


def slice_devices(topology: str) -> Sequence[Any]:
    from jax.experimental import topologies

    try:
        return topologies.get_topology_desc(topology, "tpu").devices
    except Exception as error:  # the compiler raises its own kinds
        lines = str(error).strip().splitlines()
        raise UserError(f"there is no slice {topology} ({lines[0] if lines else type(error).__name__})") from None


def inspect_slice(topology: str) -> dict[str, Any]:
    """A slice's number and kind of devices, and the bytes a program may use on each, from the compiler's error for one
    that is too large."""
    devices = slice_devices(topology)
    mesh = sharding.make_mesh(MeshConfig(), devices[:1])
    huge = jax.ShapeDtypeStruct((2**20, 2**20), jnp.float32, sharding=sharding.replicated_sharding(mesh))
    try:
        jax.jit(lambda x: x @ x.T).lower(huge).compile()
        raise RuntimeError("the compiler accepted a program of several terabytes")
    except jax.errors.JaxRuntimeError as error:
        refused = refusal(str(error))
        if refused is None:
            raise
    return {"devices": len(devices), "kind": devices[0].device_kind, "capacity": refused[1]}


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
    """Trace and compile one step for settings.mesh: its memory, collectives and FLOPs."""
    devices = slice_devices(settings.topology)
    mesh = sharding.make_mesh(settings.mesh, devices)
    built = build(settings, step, mesh)
    start = time.perf_counter()
    traced = built.step.trace(*built.arguments, **built.static)
    flops, exact = hlo.product_flops(traced.jaxpr)
    memory: dict[str, float] = {name: bytes_per_device(tree) for name, tree in built.memory.items()}
    about = {"flops": flops, "flops_exact": exact, "arguments": memory}
    try:
        compiled = traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        refused = refusal(str(error))
        if refused is None:
            raise
        return {**about, "fits": False, "needed": refused[0], "capacity": refused[1]}
    found = compiled.memory_analysis()
    text = compiled.as_text()
    sent, unknown = hlo.collectives(text, len(devices))
    kinds = sorted({one.kind for one in sent})
    return {
        **about,
        "fits": True,
        "seconds": time.perf_counter() - start,
        "kernels": sorted({name for name in ("splash_mha",) if name in text}),
        "memory": {
            **memory,
            "padding": max(0.0, found.argument_size_in_bytes - sum(memory.values())),
            "results": max(0, found.output_size_in_bytes - found.alias_size_in_bytes),
            "temporary": found.temp_size_in_bytes,
            "program": found.generated_code_size_in_bytes,
        },
        "aliased": found.alias_size_in_bytes,
        "collectives": {
            kind: {
                "times": sum(one.times for one in sent if one.kind == kind),
                "sent": sum(one.sent for one in sent if one.kind == kind),
            }
            for kind in kinds
        },
        "unknown_loops": sorted(unknown),
    }


def run_request(request: Mapping[str, Any]) -> dict[str, Any]:
    try:
        if request["do"] == "look":
            return inspect_slice(request["topology"])
        return compile_step(settings_from_json(Settings, request["settings"]), request["step"])
    except UserError as error:
        return {"mistake": str(error)}


COMPILER_ENVIRONMENT = {  # use the compiler without a TPU
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_LOG_DIR": "disabled",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def run_in_child(request: Mapping[str, Any], patience: int) -> dict[str, Any]:
    """Run `run_request` in its own process; {"failed": reason} if it crashes, raises or takes too long."""
    try:
        done = subprocess.run(
            [sys.executable, "-m", "tpu.plan", "--child", json.dumps(request)],
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


# ---- estimates ----


def closed_form_flops(settings: Settings, step: Step) -> float:
    """FLOPs of a step over all devices: 6 N + 12 layers width T per token to train, a third of that for a forward pass.
    PPO samples (one forward pass), evaluates the rollouts (policy, reference policy and reward model: three), and
    trains for `epochs`."""
    tokens_per_row = settings.prompt_tokens + settings.ppo.new_tokens
    if step == "train":
        return settings.batch * settings.model.block * settings.model.flops_per_token
    row = dataclasses.replace(settings.model, block=tokens_per_row)
    passes = 1 / 3 if step == "decode" else 4 / 3 + settings.ppo.epochs
    return settings.prompts * tokens_per_row * row.flops_per_token * passes


def cache_bytes(settings: Settings, mesh: MeshConfig) -> float:
    """Bytes of a device's KV cache, in the model's dtype, when all answers are complete."""
    c, width = settings.model, 2 if settings.model.dtype == "bfloat16" else 4
    slots = settings.prompt_tokens + settings.ppo.new_tokens
    rows = settings.prompts / (mesh.data * mesh.fsdp)
    return 2 * c.layers * rows * slots * c.width * width / mesh.tensor


def lower_bound_seconds(
    settings: Settings, step: Step, mesh: MeshConfig, sent: float, flops: float
) -> dict[str, float]:
    """Lower bounds in seconds for the parts of a step: FLOPs at the chip's peak, bytes that must be read from HBM, and
    bytes sent in both directions of one ring."""
    chip, count = settings.chip, mesh.data * mesh.fsdp * mesh.tensor
    c = settings.model
    width = 2 if c.dtype == "bfloat16" else 4
    weights = c.parameters * width / mesh.tensor
    read = 0.0
    if step in ("ppo", "decode"):  # every new token reads the weights, and half of the final cache on average
        read += settings.ppo.new_tokens * (weights + cache_bytes(settings, mesh) / 2)
    if step in ("train", "ppo"):
        steps = settings.microbatches if step == "train" else settings.ppo.epochs * settings.ppo.minibatches
        updates = 1 if step == "train" else steps
        read += steps * 3 * weights + updates * 7 * 4 * c.parameters / (mesh.fsdp * mesh.tensor)
    return {
        "compute": flops / count / (chip.tflops / chip.devices * 1e12),
        "memory": read / (chip.hbm / chip.devices * 1e9),
        "network": sent / (2 * chip.link / chip.devices * 1e9),
    }


def estimate_mesh(settings: Settings, step: Step, mesh: MeshConfig) -> tuple[float, float]:
    """Estimated (bytes per device, seconds), to choose which meshes to compile."""
    c, width = settings.model, 2 if settings.model.dtype == "bfloat16" else 4
    parts = mesh.fsdp * mesh.tensor
    copies = {"train": 4, "ppo": 6, "decode": 1}[step]  # float32: weights, two moments, gradients; two frozen models
    tokens_per_row = c.block if step == "train" else settings.prompt_tokens + settings.ppo.new_tokens
    rows = settings.batch / settings.microbatches if step == "train" else settings.prompts / settings.ppo.minibatches
    tokens = rows * tokens_per_row / (mesh.data * mesh.fsdp)
    a_layer = {"none": 17, "dots": 9, "full": 1}[c.remat] * c.width * width
    kept = 0.0 if step == "decode" else tokens * (c.layers * a_layer + 6 * c.vocab) / mesh.tensor
    memory = copies * 4 * c.parameters / parts + kept + cache_bytes(settings, mesh)
    passes = {"train": settings.microbatches, "ppo": 3 + settings.ppo.epochs * settings.ppo.minibatches, "decode": 1}[
        step
    ]
    weights = c.parameters * width / mesh.tensor
    sent = 0.0
    if mesh.fsdp > 1:
        sent += passes * 3 * weights
    if mesh.data > 1 and step != "decode":
        sent += 2 * passes * 4 * c.parameters / parts
    if mesh.tensor > 1:
        new = settings.ppo.new_tokens if step != "train" else 0
        sent += passes * 8 * c.layers * tokens * c.width * width + new * 4 * c.layers * rows * c.width * width
    return memory, sum(lower_bound_seconds(settings, step, mesh, sent, closed_form_flops(settings, step)).values())


def candidates(settings: Settings, step: Step, devices: int, capacity: float) -> list[MeshConfig]:
    """Meshes that divide the model, the batch and the devices: those estimated to fit first, then the fastest first."""
    requested = settings.mesh
    if requested != MeshConfig():
        inner = requested.fsdp * requested.tensor
        return [dataclasses.replace(requested, data=requested.data or devices // inner)]
    c = settings.model
    rows = (
        settings.batch // settings.microbatches
        if step == "train"
        else settings.prompts // (settings.ppo.minibatches if step == "ppo" else 1)
    )
    divisors = [n for n in range(1, devices + 1) if devices % n == 0]
    found = []
    for fsdp, tensor in itertools.product(divisors, divisors):
        if devices % (fsdp * tensor) == 0 and tensor <= 8:
            mesh = MeshConfig(devices // (fsdp * tensor), fsdp, tensor)
            divides = c.groups % tensor == 0 and c.vocab % tensor == 0 and c.width % fsdp == 0
            if divides and rows % (mesh.data * fsdp) == 0:
                found.append(mesh)
    if not found:
        raise UserError(
            f"{step}: no mesh of {devices} devices divides {rows} rows and a model of width {c.width} and {c.heads} "
            "heads; use a batch that is a multiple of the devices, or a smaller slice"
        )
    guesses = {mesh: estimate_mesh(settings, step, mesh) for mesh in found}

    def order(mesh: MeshConfig) -> tuple[bool, float]:
        memory, duration = guesses[mesh]
        return memory > capacity, duration if memory <= capacity else memory

    return sorted(found, key=order)


# ---- the report ----


def mesh_text(mesh: MeshConfig) -> str:
    parts = [f"{name} {size}" for name, size in dataclasses.asdict(mesh).items() if size > 1]
    return " x ".join(parts) or "one device"


def size_text(size: float) -> str:
    for unit, scale in (("GiB", GIB), ("MiB", 2**20), ("KiB", 2**10)):
        if size >= scale:
            return f"{size / scale:.2f} {unit}"
    return f"{size:.0f} B"


def time_text(duration: float) -> str:
    return f"{duration:.2f} s" if duration >= 1 else f"{duration * 1e3:.2f} ms"


def estimate(settings: Settings, step: Step, mesh: MeshConfig, found: Mapping[str, Any]) -> dict[str, Any]:
    """Bounds for step time and MFU: all three parts overlapped, and one after another."""
    sent = sum(one["sent"] for one in found["collectives"].values())
    parts = lower_bound_seconds(settings, step, mesh, sent, found["flops"])
    times = max(parts.values()), sum(parts.values())
    chips = mesh.data * mesh.fsdp * mesh.tensor / settings.chip.devices
    peak = chips * settings.chip.tflops * 1e12
    mfu = tuple(min(closed_form_flops(settings, step), found["flops"]) / (peak * t) for t in times)
    return {"parts": parts, "seconds": times, "mfu": mfu}


def report(settings: Settings, step: Step, mesh: MeshConfig, found: Mapping[str, Any], capacity: float) -> list[str]:
    lines = [f"  {mesh_text(mesh)}"]
    if "failed" in found:
        return [*lines, f"    unknown: {found['failed']}"]
    if not found["fits"]:
        held = ", ".join(f"{name} {size_text(size)}" for name, size in found["arguments"].items() if size)
        return [
            *lines,
            f"    does not fit: needs {size_text(found['needed'])} of {size_text(found['capacity'])} per device "
            f"({held})",
        ]
    memory = dict(found["memory"])
    cache = min(cache_bytes(settings, mesh), memory["temporary"]) if step != "train" else 0.0
    names = {"temporary": "activations, gradients", "padding": "layout padding"}
    if cache:
        memory["temporary"] -= cache
        memory["KV cache (estimate)"] = cache
        names["temporary"] = "other temporaries"
    total = sum(memory.values())
    lines.append(f"    memory per device {size_text(total)} of {size_text(capacity)} ({total / capacity:.0%})")
    shown = sorted(((size, names.get(name, name)) for name, size in memory.items()), reverse=True)
    lines += [f"      {name:<24} {size_text(size):>12}" for size, name in shown if size >= 0.0005 * total]
    sent = found["collectives"]
    lines.append(f"    sent per device   {size_text(sum(one['sent'] for one in sent.values()))} per step")
    lines += [
        f"      {kind:<24} {size_text(one['sent']):>12}   {one['times']:,} times"
        for kind, one in sorted(sent.items(), key=lambda item: -item[1]["sent"])
    ]
    if found["unknown_loops"]:
        lines.append(f"      (plus loops of unknown length, counted once: {', '.join(found['unknown_loops'])})")
    closed = closed_form_flops(settings, step)
    note = "" if found["flops_exact"] else ", loops of unknown length counted once"
    lines.append(
        f"    matrix products   {found['flops']:.3g} FLOPs, {found['flops'] / closed:.2f} x the closed form{note}"
    )
    about = estimate(settings, step, mesh, found)
    bounds = ", ".join(f"{name} {time_text(t)}" for name, t in about["parts"].items())
    (least, most), (high, low) = about["seconds"], about["mfu"]
    lines.append(
        f"    estimate          {time_text(least)} to {time_text(most)} per step ({bounds}); "
        f"MFU {low:.0%} to {high:.0%}"
    )
    if step == "decode":
        tokens = settings.prompts * settings.ppo.new_tokens
        lines.append(
            f"    estimate          {tokens / most:,.0f} to {tokens / least:,.0f} tokens per second on all chips"
        )
    return lines


def main(settings: Settings) -> dict[str, Any]:
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            "the TPU compiler is not installed; run make VENV=.venv-tpu EXTRAS=tpu set-up, "
            "then .venv-tpu/bin/python -m tpu.plan"
        )
    slice_ = run_in_child({"do": "look", "topology": settings.topology}, settings.patience)
    if "mistake" in slice_ or "failed" in slice_:
        raise UserError(slice_.get("mistake") or slice_["failed"])
    devices, capacity, chip = slice_["devices"], slice_["capacity"], settings.chip
    each = "" if chip.devices == 1 else f" ({devices} devices)"
    print(
        f"{settings.topology}: {devices // chip.devices:,} chips{each}, {size_text(capacity)} of memory per device, "
        f"{chip.tflops:,.0f} TFLOP/s and {chip.hbm:,.0f} GB/s per chip · jax {jax.__version__}, "
        f"libtpu {importlib.metadata.version('libtpu')}\n"
        f"model: {settings.model.parameters:,} weights, {settings.model.dtype}, scan {settings.model.scan}, "
        f"remat {settings.model.remat}",
        flush=True,
    )
    results: dict[str, Any] = {"slice": slice_, "settings": settings_to_json(settings), "steps": {}}
    sizes = {
        "train": f"{settings.batch:,} rows x {settings.model.block} tokens",
        "ppo": f"{settings.prompts:,} prompts of {settings.prompt_tokens} + {settings.ppo.new_tokens} tokens, "
        f"{settings.ppo.epochs} epochs",
        "decode": f"{settings.prompts:,} prompts of {settings.prompt_tokens} + {settings.ppo.new_tokens} tokens",
    }
    for step in settings.steps:
        meshes = candidates(settings, step, devices, capacity)
        chosen = meshes[: settings.tries]
        rest = f"; {len(meshes) - len(chosen)} more estimated but not compiled" if len(meshes) > len(chosen) else ""
        print(f"\n{step}: {sizes[step]} ({len(chosen)} of {len(meshes)} meshes compiled{rest})", flush=True)
        compiled: dict[MeshConfig, dict[str, Any]] = {}
        for mesh in chosen:
            trial = dataclasses.replace(settings, mesh=mesh)
            found = run_in_child(
                {"do": "compile", "settings": settings_to_json(trial), "step": step}, settings.patience
            )
            if "mistake" in found:
                raise UserError(f"{step}, {mesh_text(mesh)}: {found['mistake']}")
            compiled[mesh] = found
            print("\n".join(report(settings, step, mesh, found, capacity)), flush=True)
        fitting = [mesh for mesh, found in compiled.items() if found.get("fits")]
        speed = {mesh: sum(estimate(settings, step, mesh, compiled[mesh])["seconds"]) for mesh in fitting}
        best = min(fitting, key=lambda mesh: speed[mesh], default=None)
        if best is None:
            print(
                "  none of these fits; try more chips, --model.remat full, --microbatches or a smaller batch",
                flush=True,
            )
        elif len(chosen) > 1:
            flags = " ".join(f"--mesh.{name} {size}" for name, size in dataclasses.asdict(best).items())
            print(f"  best of these: {mesh_text(best)} ({flags})", flush=True)
        results["steps"][step] = {
            "best": dataclasses.asdict(best) if best else None,
            "meshes": [
                {
                    "mesh": dataclasses.asdict(mesh),
                    **found,
                    **({"estimate": estimate(settings, step, mesh, found)} if found.get("fits") else {}),
                }
                for mesh, found in compiled.items()
            ],
        }
    if settings.json:
        settings.json.parent.mkdir(parents=True, exist_ok=True)
        settings.json.write_text(json.dumps(results, indent=1))
    return results


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        print(json.dumps(run_request(json.loads(sys.argv[2]))))
    else:
        jax.config.update("jax_platforms", "cpu")  # with the TPU compiler installed, jax would look for a TPU
        cli(main, Settings, PRESETS)
