"""The machines that `tpu.plan` knows: their data sheets, how they are named, and devices to compile for.

v5e:4x4       a slice of TPUs: the generation, and chips along each dimension
2*v5e:4x4     two slices, joined by the data-centre network
h100:8        GPUs of one host; h100:8x4 are 4 hosts of 8
"""

import dataclasses
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxgpt.errors import UserError
from jaxgpt.files import suggest_name

GB = 10**9
LAUNCH = 2e-6  # seconds that a GPU needs for the smallest kernel


@dataclasses.dataclass(frozen=True)
class Chip:
    """Data sheet of a chip, all for bfloat16."""

    tflops: float  # 10^12 FLOPs a second
    hbm: float  # GB/s of memory
    link: float  # GB/s in one direction: of a link to a neighbour (TPU), of NVLink in all (GPU)
    network: float  # GB/s in one direction and for each chip, between slices or hosts
    devices: int = 1  # JAX devices in a chip
    dimensions: int = 2  # of a slice; 0: a GPU
    largest: int = 256  # chips in a slice


# Google Cloud's pages on each TPU generation, and NVIDIA's on the H100 and H200 SXM. Between hosts of GPUs: one 400
# Gbit/s network card for each GPU; between TPU slices: 100 Gbit/s (v4: 50) for each host of four chips.
CHIPS = {
    "v4": Chip(275, 1228, 45, 1.56, dimensions=3, largest=4096),
    "v5e": Chip(197, 819, 45, 3.1),
    "v5p": Chip(459, 2765, 90, 6.25, dimensions=3, largest=6144),
    "v6e": Chip(918, 1640, 90, 6.25),
    "tpu7x": Chip(2307, 7370, 100, 12.5, devices=2, dimensions=3, largest=9216),
    "h100": Chip(989, 3350, 450, 50, dimensions=0),
    "h200": Chip(989, 4800, 450, 50, dimensions=0),
}
KINDS = {  # JAX's names for their devices
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5": "v5p",
    "TPU v6 lite": "v6e",
    "TPU7x": "tpu7x",
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H200": "h200",
}
FLAT = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))  # slices that can be had, two-dimensional
SMALL = ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4))  # three-dimensional; larger ones are multiples of 4


@dataclasses.dataclass(frozen=True)
class Topology:
    """`slices` slices of `shape` chips; for GPUs, (GPUs of a host, hosts)."""

    name: str
    generation: str
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def chip(self) -> Chip:
        return CHIPS[self.generation]

    @property
    def is_gpu(self) -> bool:
        return self.chip.dimensions == 0

    @property
    def count(self) -> int:
        """JAX devices in all."""
        return self.slices * math.prod(self.shape) * self.chip.devices

    @property
    def parts(self) -> int:
        """Slices or hosts: what the slow network joins."""
        return self.shape[1] if self.is_gpu else self.slices


def parse(name: str) -> Topology:
    """The topology of this name. UserError if there is none, with those that exist."""
    found = re.fullmatch(r"(?:(\d+)\*)?([a-z0-9]+):(\d+(?:x\d+)*)", name)
    if found is None:
        raise UserError(f"topology is {name!r}; write it like v5e:4x4, 2*v5e:4x4, v5p:2x2x2, h100:8 or h100:8x4")
    generation, slices, shape = found[2], int(found[1] or 1), tuple(map(int, found[3].split("x")))
    if generation not in CHIPS:
        raise UserError(
            f"unknown generation in topology {name!r}{suggest_name(generation, CHIPS)}; known: {', '.join(CHIPS)}"
        )
    chip = CHIPS[generation]
    if chip.dimensions == 0:
        if len(shape) > 2 or not 1 <= shape[0] <= 8 or min(shape) < 1 or found[1]:
            raise UserError(
                f"there is no machine {name}; write the GPUs of a host (1 to 8) and hosts: h100:8, h100:8x4"
            )
        return Topology(name, generation, (shape[0], shape[1] if len(shape) > 1 else 1))
    if not _exists(shape, chip) or slices < 1:
        small = FLAT if chip.dimensions == 2 else SMALL
        known = ", ".join("x".join(map(str, one)) for one in small)
        more = "" if chip.dimensions == 2 else f", and multiples of 4 along each dimension up to {chip.largest} chips"
        raise UserError(f"there is no slice {name.split('*')[-1]}; {generation} has {known}{more}")
    return Topology(name, generation, shape, slices)


def _exists(shape: Sequence[int], chip: Chip) -> bool:
    if chip.dimensions == 2:
        return tuple(sorted(shape)) in FLAT
    if len(shape) != 3:
        return False
    by_fours = all(n % 4 == 0 and n > 0 for n in shape) and math.prod(shape) <= chip.largest
    return by_fours or tuple(sorted(shape)) in {tuple(sorted(one)) for one in SMALL}


def recognise(devices: Sequence[Any]) -> Topology | None:
    """The topology that these devices of a host or slice are; None if we have no data sheet for them."""
    generation = KINDS.get(devices[0].device_kind)
    if generation is None:
        return None
    axes = range(CHIPS[generation].dimensions)
    shape = [1 + max(one.coords[axis] for one in devices) for axis in axes] or [len(devices)]
    try:
        found = parse(f"{generation}:{'x'.join(map(str, shape))}")
    except UserError:
        return None
    return found if found.count == len(devices) else None


def devices(topology: Topology) -> Sequence[Any]:
    """Devices to compile for; none of them has to be here. UserError if the compiler knows no such machine."""
    from jax.experimental import topologies

    try:
        if topology.is_gpu:
            here, hosts = topology.shape
            target = _target(topology)
            return topologies.get_topology_desc(
                platform="cuda", target_config=target, topology=f"1x{hosts}x{here}"
            ).devices
        more: dict[str, Any] = {"num_slices": topology.slices} if topology.slices > 1 else {}
        more |= {"chip_config_name": "megacore"} if topology.generation == "v4" else {}  # its two cores as one device
        return topologies.get_topology_desc(topology.name.split("*")[-1], "tpu", **more).devices
    except UserError:
        raise
    except Exception as error:  # the compiler raises its own kinds
        lines = str(error).strip().splitlines()
        raise UserError(f"there is no {topology.name} ({lines[0] if lines else type(error).__name__})") from None


def gpu_memory(topology: Topology) -> int:
    """Bytes of a GPU's memory."""
    found = re.search(r"device_memory_size: (\d+)", _target(topology))
    assert found, topology.generation
    return int(found[1])


def _target(topology: Topology) -> str:
    """The description of a GPU that XLA compiles for (GpuTargetConfigProto)."""
    file = Path(__file__).parent / f"{topology.generation}.txtpb"
    if not file.exists():
        raise UserError(f"nothing can be compiled for {topology.name} without the GPU; plan for h100 instead")
    return file.read_text()
