"""What each part of a compiled program costs at least, from its HLO text: FLOPs, bytes of memory, kernels.

An instruction takes as long as its slowest resource: products at the chip's peak, arrays in and out at the memory's
bandwidth, or the launch of a kernel (the roofline model: Williams et al. 2009). The results rank a program's parts.
They are not run times: real kernels are slower than this, and caches and overlap make some of them faster.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from tpu import hlo
from tpu.hardware import LAUNCH, Chip

FREE = {
    *("parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all", "partition-id", "replica-id"),
    *("opt-barrier", "domain", "iota"),
}
SLICES = ("dynamic-slice", "gather", "slice")  # read as much as they give
UPDATES = {"dynamic-update-slice": 1, "scatter": 2}  # in place, and which operand says how much
ELEMENTWISE = ("convert", "add", "subtract", "multiply", "divide", "exponential")
SCOPES = ("embed", "attention", "mlp", "head", "loss", "optimiser", "sample")  # `jax.named_scope`s of the library
PHASES = ("collect", "reward", "score", "update")  # of PPO


@dataclasses.dataclass(frozen=True)
class Cost:
    """An instruction that runs on the device: where it comes from, and what it needs each time."""

    name: str
    kind: str  # of instruction; custom calls by their target
    operation: str  # JAX's name for it, which holds the named scopes
    operands: tuple[str, ...]  # shapes
    result: str
    flops: float
    bytes: float
    times: int

    def seconds(self, chip: Chip, launch: float = LAUNCH) -> float:
        """Lower bound of one run of it on one device."""
        return max(self.flops / chip.flops_per_second, self.bytes / chip.bytes_per_second, launch)

    @property
    def scope(self) -> str:
        """The innermost named scope of the library, with the direction; "other" if there is none."""
        parts = re.split(r"[/()]", self.operation)
        found = next((part for part in reversed(parts) if part in SCOPES), "other")
        return f"{found}, backward" if "transpose" in parts and found not in ("optimiser", "sample") else found

    @property
    def phase(self) -> str:
        return next((part for part in re.split(r"[/()]", self.operation) if part in PHASES), "")


def costs(program: hlo.Program) -> list[Cost]:
    """Every instruction of a program that does work, those of loops with their number of runs."""
    return list(_walk(program, program.entry, 1))


def _walk(program: hlo.Program, computation: str, times: int) -> Iterator[Cost]:
    instructions = program.computations.get(computation, {})
    for one in instructions.values():
        if one.kind in FREE or one.kind.endswith(("-done", "-update")):
            continue
        if one.kind == "while":
            trips = program.trips(computation, one)
            yield from _walk(program, one.attribute("body") or "", times * (1 if trips is None else trips))
        elif one.kind in ("call", "conditional", "async-start"):
            branches = [list(_walk(program, name, times)) for name in one.called()]
            yield from max(branches, key=lambda found: sum(cost.bytes * cost.times for cost in found), default=[])
        else:
            shapes = tuple(instructions[name].shape for name in one.operands if name in instructions)
            inner, operation = one.attribute("calls"), one.operation
            if one.kind in ("fusion", "fusion-start") and inner in program.computations:
                moved, flops = _fusion_bytes(program, inner, shapes), _fusion_flops(program, inner)
                inside = list(program.computations[inner].values())
                kind = next((x.target for x in inside if x.target), "fusion")
                operation = operation or next((x.operation for x in reversed(inside) if x.operation), "")
            else:
                moved, flops, kind = _bytes(one, shapes), _flops(one, shapes), one.target or one.kind
            yield Cost(one.name, kind, operation, shapes, one.shape, flops, moved, times)


def _bytes(one: hlo.Instruction, shapes: Sequence[str]) -> float:
    """Bytes of memory that an instruction by itself reads and writes."""
    read, kind = sum(sum(hlo.memory_bytes(shape)) for shape in shapes), one.kind.removesuffix("-start")
    if kind in hlo.KINDS:
        return 0.0  # the network's time
    if one.kind == "copy-start":  # (destination, source, …)
        return read + hlo.memory_bytes(one.shape)[0]
    if one.kind == "slice-start":  # ((source), destination, …)
        return hlo.shape_bytes(one.shape)[1] + hlo.memory_bytes(one.shape)[1]
    if one.kind in SLICES:
        return 2 * sum(hlo.memory_bytes(one.shape))
    if one.kind in UPDATES:
        return 2 * sum(hlo.memory_bytes(shapes[UPDATES[one.kind]]))
    return read + _result_bytes(one)


def _result_bytes(one: hlo.Instruction) -> float:
    """Bytes of an instruction's result, without the workspace that a library's call gets as one more result."""
    return sum(hlo.memory_bytes(re.sub(r"[su]8\[\d+\]", "", one.shape) if one.kind == "custom-call" else one.shape))


def _fusion_flops(program: hlo.Program, name: str) -> float:
    inside = program.computations[name]
    total = 0.0
    for one in inside.values():
        total += _flops(one, tuple(inside[x].shape for x in one.operands if x in inside))
        for called in one.called() if one.kind == "fusion" else ():
            total += _fusion_flops(program, called) if called in program.computations else 0.0
    return total


def _flops(one: hlo.Instruction, shapes: Sequence[str]) -> float:
    """FLOPs of a matrix product, in any of the forms that the compilers give it, or of cuDNN's attention."""
    if len(shapes) < 2:
        return 0.0
    left, right, out = dims(shapes[0]), dims(shapes[1]), dims(one.shape)
    if "fmha" in one.target:  # all pairs of tokens, as in the closed form: 2 products forwards, 4 backwards
        B, T, H, K = left[-4:]
        return (8.0 if "Backward" in one.target else 4.0) * B * H * T * right[-3] * K
    if one.kind == "dot" or "cublas" in one.target or "gemm" in one.target:
        found = re.search(r'lhs_contracting_dim(?:ension)?s"?[=:]\s*[\[{]([^\]}]*)[\]}]', one.text)
        axes = [int(n) for n in re.findall(r"\d+", found[1])] if found else [len(left) - 1]
        return 2.0 * math.prod(out) * math.prod(left[n] for n in axes)
    if one.kind == "convolution":  # a TPU's products
        return _convolution_flops(one.text, left, right, out)
    return 0.0


def _convolution_flops(text: str, left: Sequence[int], right: Sequence[int], out: Sequence[int]) -> float:
    """2 FLOPs per pair of an input and a weight that meet. Rows of a batch may be written as a window that reaches far
    into the padding, which is not multiplied."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", text)
    assert labels, text[:200]
    window = dict(re.findall(r"(\w+)=([\d_x-]+)", (re.search(r"window=\{([^}]*)\}", text) or [""] * 2)[1]))
    pairs = 1
    for axis, label in enumerate(sorted(filter(str.isdigit, labels[1]))):
        size, taps, results = (
            shape[names.index(label)] for shape, names in zip((left, right, out), labels.groups(), strict=True)
        )
        stride, spread, dilation = (
            int(window[name].split("x")[axis]) if name in window else 1
            for name in ("stride", "lhs_dilate", "rhs_dilate")
        )
        before = int(window["pad"].split("x")[axis].split("_")[0]) if "pad" in window else 0
        at = np.add.outer(stride * np.arange(results), dilation * np.arange(taps)) - before
        pairs *= int(((at % spread == 0) & (at >= 0) & (at <= spread * (size - 1))).sum())
    return 2.0 * out[labels[3].index("b")] * out[labels[3].index("f")] * right[labels[2].index("i")] * pairs


def _fusion_bytes(program: hlo.Program, name: str, shapes: Sequence[str]) -> float:
    """Bytes that a fusion reads and writes. What it only slices or looks up is read in part; what it updates in place
    is written in part."""
    inside = program.computations[name].values()
    parameters = {int(one.text.split(")")[0]): one for one in inside if one.kind == "parameter"}
    whole = [sum(hlo.memory_bytes(shape)) for shape in shapes]
    read = [
        min(size, _read(program, name, parameters[i].name)) if i in parameters and size else size
        for i, size in enumerate(whole)
    ]
    root = next((one for one in inside if one.root), None)
    return sum(read) + (_written(program, name, root) if root else 0.0)


def _read(program: hlo.Program, computation: str, name: str) -> float:
    """Bytes that a computation reads of one of its values."""
    inside = program.computations[computation]
    total = 0.0
    for one in inside.values():
        for i, operand in enumerate(one.operands):
            if operand != name:
                continue
            if one.kind in SLICES and i == 0:
                total += sum(hlo.shape_bytes(one.shape))
            elif (one.kind in UPDATES and i == 0) or one.kind in (*hlo.KINDS, "tuple"):
                pass  # updated in place, sent (the network's time), or handed on as it is
            elif one.kind == "fusion" and (called := one.attribute("calls")) in program.computations:
                inner = program.computations[called]
                given = next((x for x in inner.values() if x.kind == "parameter" and x.text.startswith(f"{i})")), None)
                if given is not None:
                    through = _root_by_bitcasts(inner, given)
                    total += _read(program, *((computation, one.name) if through else (called, given.name)))
            elif one.kind == "bitcast" or (one.kind in ELEMENTWISE and _is_sliced(inside, one.name)):
                total += _read(program, computation, one.name)
            else:
                total += sum(hlo.shape_bytes(inside[name].shape))
    return total


def _root_by_bitcasts(inside: Mapping[str, hlo.Instruction], one: hlo.Instruction) -> bool:
    """Whether a computation only gives this value another shape: it is read where the result is."""
    while not one.root:
        uses = [x for x in inside.values() if one.name in x.operands]
        if len(uses) != 1 or uses[0].kind != "bitcast":
            return False
        (one,) = uses
    return True


def _is_sliced(inside: Mapping[str, hlo.Instruction], name: str) -> bool:
    """Whether only parts of a value are used."""
    uses = [one for one in inside.values() if name in one.operands]
    through = ("bitcast", *ELEMENTWISE)
    return bool(uses) and all(x.kind in SLICES or (x.kind in through and _is_sliced(inside, x.name)) for x in uses)


def _written(program: hlo.Program, computation: str, one: hlo.Instruction) -> float:
    """Bytes that a computation writes as this result."""
    inside = program.computations[computation]
    if one.kind == "tuple":
        return sum(_written(program, computation, inside[x]) for x in one.operands if x in inside)
    if one.kind == "bitcast" and one.operands and one.operands[0] in inside:
        return _written(program, computation, inside[one.operands[0]])
    if one.kind in UPDATES:
        update = inside.get(one.operands[UPDATES[one.kind]])
        return sum(hlo.shape_bytes(update.shape)) if update else 0.0
    if one.kind == "fusion" and (called := one.attribute("calls")) in program.computations:
        root = next((x for x in program.computations[called].values() if x.root), None)
        return _written(program, called, root) if root else 0.0
    return 0.0 if one.kind == "parameter" or one.kind in hlo.KINDS else _result_bytes(one)


def dims(shape: str) -> list[int]:
    """The dimensions of the first array in a shape."""
    found = hlo.SHAPE.search(shape)
    return [int(n) for n in found[2].split(",") if n] if found else []


@dataclasses.dataclass(frozen=True)
class Row:
    """The costs of one part of a program, in one run of it on one device."""

    name: str
    seconds: float
    flops: float
    bytes: float
    kernels: int


def by_scope(found: Sequence[Cost], chip: Chip, launch: float = LAUNCH) -> list[Row]:
    """The parts of a program by named scope (and PPO's phase), the most expensive first."""
    groups: dict[str, list[Cost]] = collections.defaultdict(list)
    for cost in found:
        groups[f"{cost.phase}: {cost.scope}" if cost.phase else cost.scope].append(cost)
    rows = [
        Row(
            name,
            sum(x.times * x.seconds(chip, launch) for x in part),
            sum(x.times * x.flops for x in part),
            sum(x.times * x.bytes for x in part),
            sum(x.times for x in part),
        )
        for name, part in groups.items()
    ]
    return sorted(rows, key=lambda row: -row.seconds)
