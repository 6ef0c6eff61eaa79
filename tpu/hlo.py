"""Count what a compiled XLA program sends between devices, from its HLO text, and the FLOPs of a traced program.

Loop bodies count once per iteration: the text gives the counter's start, step and limit. A collective that the compiler
has split into a start, pieces overlapped with other work, and an end keeps its channel and counts once.
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

BYTES = {
    "pred": 1,
    "s4": 0.5,
    "u4": 0.5,
    "s8": 1,
    "u8": 1,
    "s16": 2,
    "u16": 2,
    "s32": 4,
    "u32": 4,
    "s64": 8,
    "u64": 8,
    "bf16": 2,
    "f16": 2,
    "f32": 4,
    "f64": 8,
    "c64": 8,
    "f8e4m3fn": 1,
    "f8e5m2": 1,
}
KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all")
SHAPE = re.compile(r"\b([a-z]+[0-9a-z]*)\[([0-9,]*)\]")
INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.-]+) = (\(.*?\)|\S+) ([a-z][\w-]*)\((.*)$")


@dataclasses.dataclass(frozen=True)
class Collective:
    """A collective: its kind, bytes of its result on a device, devices in a group, runs per step, and how many slices
    or hosts a group spans."""

    kind: str
    size: float
    group: int
    times: int
    parts: int = 1

    @property
    def sent(self) -> float:
        """Bytes that a device sends per step, in a ring: (n - 1) / n of the whole, twice that for an all-reduce."""
        return self._in_a_ring(self.group, self.size)

    @property
    def across(self) -> float:
        """Those of them that must leave the slice or host: each device first joins its share with its neighbours'."""
        inner = self.group / self.parts
        scattered = self.kind in ("all-reduce", "all-gather")  # the result is whole on every device
        return self._in_a_ring(self.parts, self.size / inner if scattered else self.size) if self.parts > 1 else 0.0

    def _in_a_ring(self, n: int, size: float) -> float:
        share = {"all-reduce": 2 * (n - 1) / n, "reduce-scatter": n - 1.0, "collective-permute": 1.0}
        return self.times * size * share.get(self.kind, (n - 1) / n)


@dataclasses.dataclass
class Instruction:
    name: str
    shape: str
    kind: str
    operands: list[str]
    text: str  # the line from the operands on
    root: bool

    @property
    def target(self) -> str:
        """What a custom call runs; "" for other instructions."""
        found = re.search(r'custom_call_target="([^"]+)"', self.text) if self.kind == "custom-call" else None
        return found[1] if found else ""

    @property
    def operation(self) -> str:
        """JAX's name for it, with its named scopes."""
        found = re.search(r'op_name="([^"]*)"', self.text)
        return found[1] if found else ""

    def attribute(self, name: str) -> str | None:
        found = re.search(rf"\b{name}=%?([\w.-]+)", self.text)
        return found[1] if found else None

    def called(self) -> list[str]:
        """Computations that this instruction runs, except those of loops and the scalar functions of reductions."""
        names = [self.attribute(name) for name in ("calls", "true_computation", "false_computation")]
        branches = re.search(r"branch_computations=\{([^}]*)\}", self.text)
        names += re.findall(r"%?([\w.-]+)", branches[1]) if branches else []
        if self.kind in ("call", "map"):
            names.append(self.attribute("to_apply"))
        return [name for name in names if name]


class Program:
    """The computations of an HLO text."""

    def __init__(self, text: str) -> None:
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.entry = ""
        current: dict[str, Instruction] = {}
        for line in text.splitlines():
            if line[:1] not in (" ", "}", "") and line.rstrip().endswith("{"):
                head = re.match(r"(ENTRY )?%?([\w.-]+)", line)
                if head and head[2] != "HloModule":
                    current = self.computations.setdefault(head[2], {})
                    self.entry = head[2] if head[1] else self.entry
            elif found := INSTRUCTION.match(line):
                root, name, shape, kind, rest = found.groups()
                operands = re.findall(r"%([\w.-]+)", rest.split("), ")[0])
                current[name] = Instruction(name, shape, kind, operands, rest, bool(root))

    def times(self) -> tuple[dict[str, int], set[str]]:
        """How often each computation runs per step, and the loops of unknown length (counted once)."""
        counts: dict[str, int] = {}
        unknown: set[str] = set()

        def visit(name: str, times: int, inside: tuple[str, ...]) -> None:
            if name in inside or name not in self.computations:
                return
            counts[name] = counts.get(name, 0) + times
            for one in self.computations[name].values():
                if one.kind == "while":
                    body = one.attribute("body") or ""
                    trips = self.trips(name, one)
                    if trips is None:
                        unknown.add(body)
                    for part in (body, one.attribute("condition") or ""):
                        visit(part, times * (1 if trips is None else trips), (*inside, name))
                for called in one.called():
                    visit(called, times, (*inside, name))

        visit(self.entry, 1, ())
        return counts, unknown

    def trips(self, caller: str, loop: Instruction) -> int | None:
        """How often a loop runs: ceil((limit - start) / step); None unless all three are constants."""
        known = re.search(r'known_trip_count":?\s*\{"n":"(\d+)"', loop.text)
        if known:
            return int(known[1])
        body, condition = loop.attribute("body") or "", loop.attribute("condition") or ""
        if body not in self.computations or condition not in self.computations or not loop.operands:
            return None
        compare = next((one for one in self.computations[condition].values() if one.root), None)
        if compare is None or compare.kind != "compare" or "direction=LT" not in compare.text:
            return None

        def initial(index: int) -> int | None:  # the initial value of element `index` of the loop's state
            state = self.computations[caller].get(loop.operands[0])
            if state is None or state.kind != "tuple" or index >= len(state.operands):
                return None
            return self.constant(caller, state.operands[index])

        def value(name: str) -> int | None:
            index = self.element(condition, name)
            return self.constant(condition, name) if index is None else initial(index)

        counter = self.element(condition, compare.operands[0])
        limit = value(compare.operands[1])
        root = next((one for one in self.computations[body].values() if one.root), None)
        if counter is None or limit is None or root is None or root.kind != "tuple" or counter >= len(root.operands):
            return None
        step = self.step(body, root.operands[counter], counter, initial)
        start = initial(counter)
        return None if not step or start is None else max(0, -(-(limit - start) // step))

    def _resolve(self, computation: str, name: str) -> Instruction | None:
        """The instruction behind a name, looking through copies and conversions."""
        one = self.computations[computation].get(name)
        while one is not None and one.kind in ("copy", "bitcast", "convert", "reshape") and one.operands:
            one = self.computations[computation].get(one.operands[0])
        return one

    def constant(self, computation: str, name: str) -> int | None:
        one = self._resolve(computation, name)
        found = re.match(r"(-?\d+)\)", one.text) if one is not None and one.kind == "constant" else None
        return int(found[1]) if found else None

    def element(self, computation: str, name: str) -> int | None:
        """The index of the element of the computation's parameter that a name refers to, or None."""
        one = self._resolve(computation, name)
        if one is None or one.kind != "get-tuple-element":
            return None
        source = self.computations[computation].get(one.operands[0])
        index = re.search(r"index=(\d+)", one.text)
        return int(index[1]) if source is not None and source.kind == "parameter" and index else None

    def step(self, body: str, name: str, counter: int, initial: Any) -> int | None:
        """The increment of the loop counter in a body; None if it is not constant."""
        one = self._resolve(body, name)
        if one is None or one.kind != "add" or len(one.operands) != 2:
            return None
        for this, other in (one.operands, one.operands[::-1]):
            if self.element(body, this) == counter:
                index = self.element(body, other)
                return self.constant(body, other) if index is None else initial(index)
        return None


def shape_bytes(text: str) -> list[float]:
    """The size in bytes of each array in a shape, which may be a tuple."""
    return [
        BYTES.get(dtype, 0) * int(np.prod([int(n) for n in dims.split(",") if n], dtype=np.int64))
        for dtype, dims in SHAPE.findall(text)
    ]


def memory_bytes(text: str) -> list[float]:
    """`shape_bytes`, with 0 for arrays that a TPU keeps on the chip: their layout names another space than HBM, as in
    `bf16[8,128]{1,0:T(8,128)S(1)}`."""
    layouts = re.findall(r"\b[a-z]+[0-9a-z]*\[[0-9,]*\](\{(?:[^{}]|\{[^}]*\})*\})?", text)
    sizes = shape_bytes(text)
    return [0.0 if re.search(r"S\([1-9]", layout) else size for size, layout in zip(sizes, layouts, strict=True)]


def first_group(text: str, devices: int) -> list[int]:
    """The devices of one group of a collective, from `{{0,1},{2,3}}`, `[2,4]<=[4,2]T(1,0)`, or a mesh and the axes it
    runs along. All devices for a permutation, which lists pairs."""
    if found := re.search(r"replica_groups=\{\{([0-9,]*)\}", text):
        return [int(n) for n in found[1].split(",")]
    if found := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([0-9,]+)\](?:T\(([0-9,]+)\))?", text):
        shape, order = ([int(n) for n in (part or "").split(",") if n] for part in found.groups()[2:])
        ids = np.arange(np.prod(shape)).reshape(shape)
        return ids.transpose(order or range(ids.ndim)).reshape(int(found[1]), -1)[0].tolist()
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", text):
        sizes = {name: int(n) for name, n in re.findall(r"'([^']*)'=(\d+)", found[1])}
        along = re.findall(r"'([^']*)'", found[2])
        ids = np.arange(np.prod([*sizes.values()])).reshape([*sizes.values()])
        return ids[tuple(slice(None) if name in along else 0 for name in sizes)].ravel().tolist()
    return list(range(devices))


def collectives(text: str, devices: int, part_of: Sequence[int] = ()) -> tuple[list[Collective], set[str]]:
    """The collectives of an HLO text, and the loops of unknown length that contain any (counted once).

    part_of: for each device, in the mesh's order, its slice or host; without it there is only one.
    """
    program = Program(text)
    times, unknown = program.times()
    found: dict[str, Collective] = {}
    starts = {
        called
        for parts in program.computations.values()
        for one in parts.values()
        if one.name.startswith("async-collective-start")
        for called in one.called()
    }
    # A TPU's compiler fuses an all-reduce whose result is cut into shards: it sends what a reduce-scatter sends.
    scattered = {
        called: one.shape
        for parts in program.computations.values()
        for one in parts.values()
        if one.kind == "fusion" and "all-reduce-scatter" in one.text + one.name
        for called in one.called()
    }
    started: set[str] = set()  # channels whose start was seen: it gives the count, not the overlapped pieces
    for computation, count in sorted(times.items(), key=lambda item: item[0] not in starts):
        for one in program.computations[computation].values():
            kind = one.kind.removesuffix("-start")
            if kind not in KINDS:
                continue
            sizes = shape_bytes(one.shape)
            if one.kind.endswith("-start") and kind != "all-reduce":  # (inputs, outputs, ...)
                sizes = sizes[1:2] if kind == "collective-permute" else sizes[len(sizes) // 2 :]
            if kind == "all-reduce" and computation in scattered:
                kind, sizes = "reduce-scatter", shape_bytes(scattered[computation])
            channel = re.search(r"channel_id=(\d+)", one.text)
            group = first_group(one.text, devices)
            parts = len({part_of[i] for i in group}) if part_of else 1
            this = Collective(kind, sum(sizes), len(group), count, parts)
            key = f"{kind} {channel[1]}" if channel else f"{computation} {one.name}"
            if computation in starts and channel:
                started.add(key)
            elif key in started or (key in found and this.sent <= found[key].sent):
                continue
            found[key] = this
    silent = {name for name in unknown if not _has_collective(program, name)}
    return [one for one in found.values() if one.group > 1], unknown - silent


def _has_collective(program: Program, name: str) -> bool:
    """Whether a computation, or one that it runs, contains a collective."""
    for one in program.computations.get(name, {}).values():
        inner = [*one.called(), *filter(None, (one.attribute("body"), one.attribute("condition")))]
        if one.kind.removesuffix("-start") in KINDS or any(_has_collective(program, part) for part in inner):
            return True
    return False


# ---- FLOPs of a traced program ----


def product_flops(jaxpr: Any) -> tuple[float, bool]:
    """FLOPs of all matrix products of a (closed) jaxpr, over all devices, including loops and recomputation; and
    whether this is exact: False if there is a loop of unknown length, whose body counts once."""
    flops, exact = 0.0, True
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        name, p = equation.primitive.name, equation.params
        if name == "dot_general":
            (contracted, _), _ = p["dimension_numbers"]
            left = equation.invars[0].aval.shape
            out = np.prod(equation.outvars[0].aval.shape, dtype=float)
            flops += 2 * out * np.prod([left[i] for i in contracted], dtype=float)
            continue
        times = 1.0
        if name == "scan":
            times = p["length"]
        elif name == "shard_map":
            manual = p.get("manual_axes") or p.get("axis_names") or p["mesh"].axis_names
            times = float(np.prod([p["mesh"].shape[axis] for axis in manual], dtype=float))
        elif name == "pallas_call":
            times = float(np.prod(p["grid_mapping"].grid, dtype=float))
        parts = [product_flops(inner) for inner in _inner_jaxprs(p)]
        if name == "cond":
            parts = [max(parts)] if parts else []
        exact = exact and name != "while" and all(known for _, known in parts)
        flops += times * sum(part for part, _ in parts)
    return flops, exact


def _inner_jaxprs(params: Mapping[str, Any]) -> Iterator[Any]:
    for value in params.values():
        for one in value if isinstance(value, (tuple, list)) else (value,):
            if hasattr(one, "eqns") or hasattr(getattr(one, "jaxpr", None), "eqns"):
                yield one
