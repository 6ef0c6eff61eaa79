"""Plan a run on a Cloud TPU slice or on GPUs, on a machine that has neither.

    python -m tpu.plan --topology v5e:4x4
    python -m tpu.plan --topology v5p:8x8x8 --preset gpt2-xl --steps train --batch 1024 --mesh.fsdp 64
    python -m tpu.plan --topology h100:8                 with jax[cuda13]; h100:8x4 are 4 hosts of 8

Compiles the same steps that the experiments run (their `build`) for all chips, with Google's TPU compiler, which
`jax[tpu]` installs, or with XLA's for the GPU. Reports the memory each device needs, what it sends, the FLOPs, what
each part costs at least, and the best mesh among those that fit. Memory and collectives come from the compiled
program. Times and MFU are estimates from these and from the chips' data sheets; nothing is run.
"""

import dataclasses
import importlib.metadata
import importlib.util
import json
from collections.abc import Mapping
from typing import Any

import jax

from jaxgpt.errors import UserError
from jaxgpt.models.sharding import MeshConfig
from jaxgpt.runs.cli import cli, settings_to_json
from tpu import hardware
from tpu.compiling import GIB, run_in_child
from tpu.estimates import (
    PUBLISHED,
    cache_bytes,
    candidates,
    closed_form_flops,
    estimate,
    head_tiles,
    propose_tiles,
    samples,
)
from tpu.settings import PRESETS, Settings, Step


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
    cache = min(cache_bytes(settings, mesh), memory["temporary"]) if samples(step) else 0.0
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
    if found["attention"]:
        lines.append(f"    attention         {' and '.join(found['attention'])}")
    launches = f"    kernels           {found['kernels']:,} per step"
    if found["kernels_per_token"] is not None:
        launches += f", {found['kernels_per_token']:.0f} for each new token"
    lines += [launches, *costs_text(found), *time_lines(settings, step, mesh, found)]
    return lines if step == "decode" else [*lines, tiles_text(settings, step, mesh, found, capacity)]


def costs_text(found: Mapping[str, Any], most: int = 8) -> list[str]:
    """A table of what costs most, by named scope."""
    whole = sum(part["seconds"] for part in found["parts"])
    lines = [f"    what costs most   {time_text(whole)} in all, each instruction at its bound"]
    for part in found["parts"][:most]:
        lines.append(
            f"      {part['name']:<24} {time_text(part['seconds']):>12}   {part['flops'] / 1e12:8.2f} TFLOP "
            f"{part['bytes'] / 1e9:8.2f} GB {part['kernels']:7,} kernels"
        )
    return lines


def tiles_text(settings: Settings, step: Step, mesh: MeshConfig, found: Mapping[str, Any], capacity: float) -> str:
    """The flag for the vocabulary head's tiles, and what it would save."""
    now = head_tiles(settings, step, mesh, settings.model.logits_bytes)
    best = propose_tiles(settings, step, mesh, found, capacity)
    rows = now.bytes // (4 * now.length * (settings.model.vocab // mesh.tensor))
    size = f"{rows:,} rows x {best.length:,} positions x {settings.model.vocab // mesh.tensor:,} logits"
    tiles = f"{best.count} tile{'s' * (best.count > 1)} of {size}"
    if best == now:
        return f"    vocabulary head   {tiles}: larger ones would not fit, or save less than 1 %"
    return (
        f"    vocabulary head   --model.logits-bytes {best.bytes} ({tiles}; the present {now.count} take "
        f"{time_text(now.seconds - best.seconds)} more at most)"
    )


def time_lines(settings: Settings, step: Step, mesh: MeshConfig, found: Mapping[str, Any]) -> list[str]:
    """Bounds of the time and MFU, beside what published runs reached."""
    about = estimate(settings, step, mesh, found)
    bounds = ", ".join(f"{name} {time_text(t)}" for name, t in about["parts"].items())
    (least, most), (high, low) = about["seconds"], about["mfu"]
    lines = [
        f"    estimate          at least {time_text(least)} per step ({bounds}), {time_text(most)} without overlap"
    ]
    if any(about["phases"]):
        phases = ", ".join(f"{name or 'other'} {time_text(t)}" for name, t in about["phases"].items())
        lines.append(f"                      {phases}")
    if step == "train":
        reached, source = PUBLISHED["gpu" if settings.machine.is_gpu else "tpu"]
        lines += [
            f"                      MFU at most {high:.0%}, {low:.0%} without overlap;",
            f"                      published runs reach {reached} ({source})",
        ]
    if step == "decode":
        tokens = settings.prompts * settings.ppo.new_tokens
        lines.append(
            f"                      {tokens / most:,.0f} to {tokens / least:,.0f} tokens per second on all chips"
        )
    return lines


def sizes_text(settings: Settings, step: Step) -> str:
    answers = f"{settings.prompts:,} prompts of {settings.prompt_tokens} + {settings.ppo.new_tokens} tokens"
    return {
        "train": f"{settings.batch:,} rows x {settings.model.block} tokens",
        "dpo": f"{settings.pairs:,} pairs of {settings.prompt_tokens} + {settings.ppo.new_tokens} tokens",
        "ppo": f"{answers}, {settings.ppo.epochs} epochs",
        "decode": answers,
    }[step]


def plan_step(settings: Settings, step: Step, devices: int, capacity: float) -> dict[str, Any]:
    """Compile a step for the most promising meshes, and print what each of them needs and which is the best."""
    meshes = candidates(settings, step, devices, capacity)
    chosen = meshes[: settings.tries]
    rest = f"; {len(meshes) - len(chosen)} more estimated but not compiled" if len(meshes) > len(chosen) else ""
    say(f"\n{step}: {sizes_text(settings, step)} ({len(chosen)} of {len(meshes)} meshes compiled{rest})")
    compiled: dict[MeshConfig, dict[str, Any]] = {}
    for mesh in chosen:
        trial = settings_to_json(dataclasses.replace(settings, mesh=mesh))
        found = run_in_child({"do": "compile", "settings": trial, "step": step}, settings.patience)
        if "mistake" in found:
            raise UserError(f"{step}, {mesh_text(mesh)}: {found['mistake']}")
        compiled[mesh] = found
        say("\n".join(report(settings, step, mesh, found, capacity)))
    estimates = {mesh: estimate(settings, step, mesh, found) for mesh, found in compiled.items() if found.get("fits")}
    best = min(estimates, key=lambda mesh: sum(estimates[mesh]["seconds"]), default=None)
    if best is None:
        say("  none of these fits; try more chips, --model.remat full, --microbatches or a smaller batch")
    elif len(chosen) > 1:
        flags = " ".join(f"--mesh.{name} {size}" for name, size in dataclasses.asdict(best).items())
        say(f"  best of these: {mesh_text(best)} ({flags})")

    def tiles(mesh: MeshConfig, found: Mapping[str, Any]) -> dict[str, Any]:
        return dataclasses.asdict(propose_tiles(settings, step, mesh, found, capacity))

    return {
        "best": dataclasses.asdict(best) if best else None,
        "meshes": [
            {
                "mesh": dataclasses.asdict(mesh),
                **found,
                **({"estimate": estimates[mesh]} if mesh in estimates else {}),
                **({"tiles": tiles(mesh, found)} if mesh in estimates and step != "decode" else {}),
            }
            for mesh, found in compiled.items()
        ],
    }


def missing_compiler(machine: hardware.Topology) -> str | None:
    """What to do if the compiler for the machine is not installed; None if it is."""
    package, extra, place = (
        ("jax_cuda13_plugin", "cuda", ".venv-gpu") if machine.is_gpu else ("libtpu", "tpu", ".venv-tpu")
    )
    if importlib.util.find_spec(package) is not None:
        return None
    return (
        f"the compiler for {machine.name} is not installed; run make VENV={place} EXTRAS={extra} set-up, "
        f"and use {place}/bin/python"
    )


def say(text: str) -> None:
    print(text, flush=True)


def main(settings: Settings) -> dict[str, Any]:
    machine = settings.machine
    missing = missing_compiler(machine)
    if missing:
        raise UserError(missing)
    found = run_in_child({"do": "inspect", "settings": settings_to_json(settings)}, settings.patience)
    if "mistake" in found or "failed" in found:
        raise UserError(found.get("mistake") or found["failed"])
    devices, capacity, chip = found["devices"], found["capacity"], machine.chip
    each = "" if chip.devices == 1 else f" ({devices} devices)"
    compiler = "jax-cuda13-plugin" if machine.is_gpu else "libtpu"
    versions = {"jax": jax.__version__, compiler: importlib.metadata.version(compiler)}
    say(
        f"{machine.name}: {devices // chip.devices:,} chips{each}, {size_text(capacity)} of memory per device, "
        f"{chip.tflops:,.0f} TFLOP/s and {chip.hbm:,.0f} GB/s per chip · "
        f"{', '.join(f'{name} {version}' for name, version in versions.items())}\n"
        f"model: {settings.model.parameters:,} weights, {settings.model.dtype}, scan {settings.model.scan}, "
        f"remat {settings.model.remat}"
    )
    steps = {step: plan_step(settings, step, devices, capacity) for step in settings.steps}
    results = {"machine": found, "versions": versions, "settings": settings_to_json(settings), "steps": steps}
    if settings.json:
        settings.json.parent.mkdir(parents=True, exist_ok=True)
        settings.json.write_text(json.dumps(results, indent=1))
    return results


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")  # with a TPU's or GPU's compiler installed, jax would look for one
    cli(main, Settings, PRESETS)
