"""Times estimated from data sheets: bounds for compiled programs, and guesses that say which meshes to compile."""

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any

from jaxgpt.errors import UserError
from jaxgpt.models.sharding import MeshConfig
from tpu.hardware import GB
from tpu.settings import Settings, Sizes, Step

# What published runs reached of the peak, in model FLOPs (MFU), to read the bounds by. All of them have larger models.
PUBLISHED = {
    "tpu": ("46 to 71 %", "MaxText's tables for v5e and v5p, 16B to 1160B parameters"),
    "gpu": (
        "35 to 46 %",
        "llm-foundry's table for the H100 in bfloat16, 0.8B to 70B parameters, rows of 512 to 4,096 tokens",
    ),
}


def closed_form_flops(settings: Sizes, step: Step) -> float:
    """FLOPs of a step over all devices: 6 N + 12 layers width T per token to train, a third of that for a forward pass.
    PPO samples (one forward pass), evaluates the rollouts (policy, reference policy and reward model: three), and
    trains for `epochs`."""
    tokens_per_row = settings.prompt_tokens + settings.ppo.new_tokens
    if step == "train":
        return settings.batch * settings.model.block * settings.model.flops_per_token
    row = dataclasses.replace(settings.model, block=tokens_per_row)
    if step == "dpo":  # two answers each, and the reference's forward pass
        return 2 * settings.pairs * tokens_per_row * row.flops_per_token * 4 / 3
    passes = 1 / 3 if step == "decode" else 4 / 3 + settings.ppo.epochs
    return settings.prompts * tokens_per_row * row.flops_per_token * passes


def rows_at_once(settings: Sizes, step: Step) -> int:
    """Rows, or pairs of them, that a step divides among the devices."""
    return {
        "train": settings.batch // settings.microbatches,
        "dpo": settings.pairs,
        "ppo": settings.prompts // settings.ppo.minibatches,
        "decode": settings.prompts,
    }[step]


def samples(step: Step) -> bool:
    return step in ("ppo", "decode")


def cache_bytes(settings: Settings, mesh: MeshConfig) -> float:
    """Bytes of a device's KV cache, in the model's dtype, when all answers are complete."""
    c, width = settings.model, 2 if settings.model.dtype == "bfloat16" else 4
    slots = settings.prompt_tokens + settings.ppo.new_tokens
    rows = settings.prompts / (mesh.data * mesh.fsdp)
    return 2 * c.layers * rows * slots * c.width * width / mesh.tensor


def lower_bounds(settings: Settings, mesh: MeshConfig, found: Mapping[str, Any]) -> dict[str, float]:
    """Lower bounds in seconds for the parts of a compiled step: FLOPs at the chip's peak, the bytes that its
    instructions read and write (activations included) at the memory's bandwidth, bytes sent in both directions of a
    ring (by NVLink in one), and those that leave the slice or host."""
    chip, count = settings.machine.chip, mesh.data * mesh.fsdp * mesh.tensor
    sent = sum(one["sent"] for one in found["collectives"].values())
    across = sum(one["across"] for one in found["collectives"].values())
    rings = 1 if settings.machine.is_gpu else 2
    return {
        "compute": found["flops"] / count / (chip.tflops / chip.devices * 1e12),
        "memory": sum(part["bytes"] for part in found["parts"]) / (chip.hbm / chip.devices * GB),
        "network": (sent - across) / (rings * chip.link / chip.devices * GB)
        + across / (chip.network / chip.devices * GB),
    }


def phase_seconds(found: Mapping[str, Any]) -> dict[str, float]:
    """The parts of a step added up, instruction by instruction, for each of PPO's phases: sampling and training follow
    one another, so that their bounds add up. "" for a step without phases."""
    phases: dict[str, float] = {}
    for part in found["parts"]:
        name = part["name"].partition(": ")[0] if ": " in part["name"] else ""
        phases[name] = phases.get(name, 0.0) + part["seconds"]
    return phases


def estimate(settings: Settings, step: Step, mesh: MeshConfig, found: Mapping[str, Any]) -> dict[str, Any]:
    """Bounds for the time of a step and its MFU. Least: the slowest resource alone. Most: every instruction at its own
    roof, one after another, and the network after them."""
    bounds = lower_bounds(settings, mesh, found)
    most = sum(phase_seconds(found).values()) + bounds["network"]
    times = max(bounds.values()), max(most, *bounds.values())
    peak = mesh.data * mesh.fsdp * mesh.tensor / settings.machine.chip.devices * settings.machine.chip.tflops * 1e12
    mfu = tuple(min(closed_form_flops(settings, step), found["flops"]) / (peak * t) for t in times)
    return {"parts": bounds, "phases": phase_seconds(found), "seconds": times, "mfu": mfu}


TILES_ALIVE = 3  # arrays of a tile's size at the peak: programs for v5e needed 3.1 more, for the H100 1.4


@dataclasses.dataclass(frozen=True)
class Tiles:
    """How a row's positions are cut for the vocabulary head."""

    count: int
    length: int  # positions
    bytes: int  # of one tile's logits on a device: the setting that gives these tiles
    seconds: float  # at most, for what a step that keeps all logits would not do


def head_tiles(settings: Settings, step: Step, mesh: MeshConfig, logits_bytes: int) -> Tiles:
    """The tiles of `transformer.predict` for this setting. Each reads the table, V D weights in the model's dtype: once
    forwards, and twice backwards, where it also adds to their float32 gradient. With more than one, the backward pass
    computes the logits again, 2 V D FLOPs per token. On a TPU that takes no longer than reading those of a single one,
    since what follows is fused with the product."""
    c, ppo, chip = settings.model, settings.ppo, settings.machine.chip
    read = 2 if c.dtype == "bfloat16" else 4
    learn = 3 * read + 8
    if step == "train":
        rows, parts, positions, moved, passes = settings.batch, settings.microbatches, c.block - 1, learn, 1
    elif step == "dpo":  # the reference scores two answers each, and the policy learns from them
        rows, parts, positions, moved, passes = 2 * settings.pairs, 1, ppo.new_tokens, read + learn, 1
    else:  # the policy and the reference score, then the policy learns
        rows, parts, positions, passes = settings.prompts, ppo.minibatches, ppo.new_tokens, ppo.epochs
        moved = 2 * read + passes * learn
    vocab, rows = c.vocab // mesh.tensor, rows // (mesh.data * mesh.fsdp)
    position = 4 * (rows // parts) * vocab  # bytes
    count = -(-positions // max(1, logits_bytes // position))
    length = -(-positions // count)
    reading = count * parts * moved * vocab * c.width / (chip.hbm / chip.devices * GB)
    again = passes * 2 * rows * positions * vocab * c.width / (chip.tflops / chip.devices * 1e12)
    return Tiles(count, length, position * length, reading + (again if count > 1 and settings.machine.is_gpu else 0.0))


def propose_tiles(settings: Settings, step: Step, mesh: MeshConfig, found: Mapping[str, Any], capacity: float) -> Tiles:
    """The smallest of those tiles that fit and cost at most 1 % of the step more than the best; none is smaller than
    those compiled. They fit if `TILES_ALIVE` arrays of a tile's size do at the step's peak."""
    now = head_tiles(settings, step, mesh, settings.model.logits_bytes)
    spare = 0.95 * capacity - sum(found["memory"].values()) + TILES_ALIVE * now.bytes
    sizes = {now.bytes // now.length * -(-now.count * now.length // count) for count in range(1, now.count)}
    larger = [head_tiles(settings, step, mesh, size) for size in sizes]
    fitting = [now, *(tiles for tiles in larger if TILES_ALIVE * tiles.bytes <= spare)]
    allowed = min(tiles.seconds for tiles in fitting) + 0.01 * max(estimate(settings, step, mesh, found)["seconds"])
    return min((tiles for tiles in fitting if tiles.seconds <= allowed), key=lambda tiles: tiles.bytes)


def estimate_mesh(settings: Settings, step: Step, mesh: MeshConfig) -> tuple[float, float]:
    """Estimated (bytes per device, seconds), to choose which meshes to compile."""
    c, width = settings.model, 2 if settings.model.dtype == "bfloat16" else 4
    parts = mesh.fsdp * mesh.tensor
    # float32: weights, two moments, gradients; one frozen model, or two
    copies = {"train": 4, "dpo": 5, "ppo": 6, "decode": 1}[step]
    tokens_per_row = c.block if step == "train" else settings.prompt_tokens + settings.ppo.new_tokens
    rows = rows_at_once(settings, step) * (2 if step == "dpo" else 1)
    tokens = rows * tokens_per_row / (mesh.data * mesh.fsdp)
    a_layer = {"none": 17, "dots": 9, "full": 1}[c.remat] * c.width * width
    kept = 0.0 if step == "decode" else tokens * (c.layers * a_layer + 6 * c.vocab) / mesh.tensor
    cache = cache_bytes(settings, mesh) if samples(step) else 0.0
    memory = copies * 4 * c.parameters / parts + kept + cache
    updates = settings.ppo.epochs * settings.ppo.minibatches
    passes = {"train": settings.microbatches, "dpo": 2, "ppo": 3 + updates, "decode": 1}[step]
    weights = c.parameters * width / mesh.tensor
    sent = 0.0
    if mesh.fsdp > 1:
        sent += passes * 3 * weights
    if mesh.data > 1 and step != "decode":
        sent += 2 * passes * 4 * c.parameters / parts
    if mesh.tensor > 1:
        new = settings.ppo.new_tokens if samples(step) else 0
        sent += passes * 8 * c.layers * tokens * c.width * width + new * 4 * c.layers * rows * c.width * width
    read = kept * (2 if step == "train" else 1) + passes * 3 * weights + copies * 4 * c.parameters / parts
    if samples(step):  # every new token reads the weights, and half of the final cache on average
        read += settings.ppo.new_tokens * (weights + cache / 2)
    chip, count = settings.machine.chip, mesh.data * mesh.fsdp * mesh.tensor
    slow = settings.machine.parts > 1 and mesh.fsdp * mesh.tensor > count // settings.machine.parts
    link = chip.network if slow else chip.link
    seconds = (
        closed_form_flops(settings, step) / count / (chip.tflops / chip.devices * 1e12)
        + read / (chip.hbm / chip.devices * GB)
        + sent / (2 * link / chip.devices * GB)
    )
    return memory, seconds


def candidates(settings: Settings, step: Step, devices: int, capacity: float) -> list[MeshConfig]:
    """Meshes that divide the model, the batch and the devices: those estimated to fit first, then the fastest first."""
    requested = settings.mesh
    if requested != MeshConfig():
        inner = requested.fsdp * requested.tensor
        return [dataclasses.replace(requested, data=requested.data or devices // inner)]
    c, rows = settings.model, rows_at_once(settings, step)
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
