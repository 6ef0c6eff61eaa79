"""Where arrays live: a mesh of devices, and which axes of each array are sharded over which axes of the mesh.

    data    rows of a batch; parameters are replicated
    fsdp    rows too; parameters and optimiser state are sharded, and gathered layer by layer where they are used
    tensor  heads, hidden units and vocabulary

A step is traced `within` a mesh and jitted with these shardings on its inputs and outputs; XLA adds the collectives.
The functions it calls request a layout by axis names (`constrain`), which has no effect outside a mesh.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextvars import ContextVar
from typing import ParamSpec, TypeVar

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxgpt.config import Count, CountOrZero, ModelConfig, check_settings
from jaxgpt.errors import UserError
from jaxgpt.structs import Array

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")
Rows = TypeVar("Rows")  # a pytree of arrays whose first axis is rows
Tree = TypeVar("Tree")  # any pytree; the result has the same structure
Axes = str | tuple[str, ...] | None
ROW_AXES = ("data", "fsdp")  # the mesh axes that shard the rows of a batch
_DEVICE: ContextVar[jax.Device | None] = ContextVar("device", default=None)  # of the mesh being traced for


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis of the mesh. Their product is the number of devices."""

    data: CountOrZero = 0  # copies of the model; 0: all devices that the other axes leave
    fsdp: Count = 1  # shards of parameters and optimiser state, gathered where they are used
    tensor: Count = 1  # shards of every layer: heads, hidden units, vocabulary

    def __post_init__(self) -> None:
        check_settings(self)


def make_mesh(config: MeshConfig = MeshConfig(), devices: Sequence[jax.Device] | None = None) -> Mesh:
    """All devices of all processes (or those given) as a mesh. UserError if the sizes don't fit the device count."""
    count = len(devices) if devices is not None else jax.device_count()
    inner = config.fsdp * config.tensor
    data = config.data or count // inner
    if data * inner != count:
        product = f"mesh.fsdp {config.fsdp} x mesh.tensor {config.tensor}"
        if config.data:
            product = f"mesh.data {config.data} x {product}"
        wrong = "is not" if config.data else "does not divide"
        raise UserError(f"{product} {wrong} the number of devices, {count}; change one of them")
    names, shape = ("data", "fsdp", "tensor"), (data, config.fsdp, config.tensor)
    devices = jax.devices() if devices is None else devices
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if data % slices:
        raise UserError(f"mesh.data {data} doesn't divide among {slices} slices, which only it may span; change it")
    arrange = functools.partial(mesh_utils.create_device_mesh, shape, devices)
    if slices > 1:
        within_slice = (data // slices, config.fsdp, config.tensor)
        arrange = functools.partial(mesh_utils.create_hybrid_device_mesh, within_slice, (slices, 1, 1), devices)
    try:
        arranged = arrange()
    except NotImplementedError:  # no axis of the mesh is a product of the slice's dimensions
        arranged = arrange(allow_split_physical_axes=True)
    return Mesh(arranged, names, axis_types=(AxisType.Auto,) * 3)


def data_mesh() -> Mesh:
    """All devices of all processes along 'data'."""
    return make_mesh()


# ---- inside a step ----


def within(mesh: Mesh, f: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """f, traced for this mesh: `constrain` and `platform` refer to it."""

    @functools.wraps(f)
    def traced(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        token = _DEVICE.set(mesh.devices.flat[0])
        try:
            with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
                return f(*args, **kwargs)
        finally:
            _DEVICE.reset(token)

    return traced


def _active_mesh() -> AbstractMesh | None:
    """The mesh being traced for, if XLA partitions the work and there is more than one device; otherwise None."""
    mesh = jax.sharding.get_abstract_mesh()
    automatic = not mesh.empty and all(kind == AxisType.Auto for kind in mesh.axis_types)
    return mesh if automatic and mesh.size > 1 else None


def is_partitioned() -> bool:
    """Whether XLA partitions the program being traced among several devices."""
    return _active_mesh() is not None


def platform() -> str:
    """The platform being compiled for: "cpu", "gpu" or "tpu". Not just `jax.default_backend()`, which is the compiling
    machine's: a program for a TPU slice may be compiled on a laptop."""
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    name = device.platform if device is not None else jax.default_backend()
    return "gpu" if name in ("cuda", "rocm") else name


def target_device() -> jax.Device:
    """The device being compiled for: the first of the mesh; outside a mesh, of this machine."""
    return _DEVICE.get() or jax.local_devices()[0]


def target_platform(config: ModelConfig) -> str:
    """The platform that a model's programs are written for: the config's, or the one being compiled for."""
    return platform() if config.platform == "auto" else config.platform


def constrain(x: Array, *axes: Axes) -> Array:
    """x with its dimensions sharded over these mesh axes (None: not sharded). The identity outside a mesh; an axis that
    the mesh doesn't have, or that doesn't divide its dimension, is ignored."""
    mesh = _active_mesh()
    return x if mesh is None else jax.lax.with_sharding_constraint(x, _fitting_spec(axes, x.shape, mesh))


def constrain_rows(x: Array) -> Array:
    """x with its first dimension sharded as rows are."""
    return constrain(x, ROW_AXES, *[None] * (x.ndim - 1))


def gather_fsdp(w: Array, axes: Sequence[Axes], lookup: bool = False) -> Array:
    """A parameter sharded over `axes`, gathered along 'fsdp' for use; its gradient is scattered again. `lookup`: it is
    used to look up rows, not in a product. The identity outside a mesh."""
    mesh = _active_mesh()
    return w if mesh is None or mesh.shape.get("fsdp", 1) == 1 else _gather(w, tuple(axes), lookup)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gather(w: Array, axes: tuple[Axes, ...], lookup: bool) -> Array:
    return constrain(w, *(None if axis == "fsdp" else axis for axis in axes))


def _scatter(axes: tuple[Axes, ...], lookup: bool, _: None, g: Array) -> tuple[Array]:
    # A product's gradient is reduced straight into its shards. A lookup's is gathered first: otherwise XLA would shard
    # it by sending activations around.
    return (constrain(_gather(g, axes, lookup) if lookup else g, *axes),)


_gather.defvjp(lambda w, axes, lookup: (_gather(w, axes, lookup), None), _scatter)


def copy_for_rows(w: Array, axes: Sequence[Axes], parts: int) -> Array:
    """One gathered copy of a parameter for each of `parts` shards of rows, [parts, ...]. Each device sums the gradient
    of its own copy; the copies' gradients are then added up once, straight into the parameter's shards."""
    return _copy(w, tuple(axes), parts)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _copy(w: Array, axes: tuple[Axes, ...], parts: int) -> Array:
    kept = [None if axis == "fsdp" else axis for axis in axes]
    return constrain(jax.numpy.broadcast_to(constrain(w, *kept), (parts, *w.shape)), ROW_AXES, *kept)


def _add_copies(axes: tuple[Axes, ...], parts: int, _: None, g: Array) -> tuple[Array]:
    mesh = _active_mesh()
    if mesh is None or parts == 1:
        return (constrain(g.sum(axis=0), *axes),)
    rows, result = tuple(name for name in ROW_AXES if name in mesh.shape), _fitting_spec(axes, g.shape[1:], mesh)
    scattered = next((i for i, axis in enumerate(result) if axis == "fsdp"), None)

    def add(g: Array) -> Array:
        if scattered is None:
            return jax.lax.psum(g[0], rows)
        # Parts along a new first axis: TPUs then add and scatter at once, whatever the layout of the rest.
        size = g.shape[1 + scattered] // jax.lax.axis_size("fsdp")
        parts_first = jax.numpy.moveaxis(
            g[0].reshape(*g.shape[1 : 1 + scattered], -1, size, *g.shape[2 + scattered :]), scattered, 0
        )
        part = jax.lax.psum_scatter(parts_first, "fsdp")
        others = tuple(name for name in rows if name != "fsdp")
        return jax.lax.psum(part, others) if others else part

    copies = P(rows, *(None if axis == "fsdp" else axis for axis in result))
    # Left to XLA, this may become an all-reduce of which each device takes its part: twice what has to be sent.
    return (jax.shard_map(add, mesh=mesh, in_specs=copies, out_specs=result, check_vma=False)(g),)


_copy.defvjp(lambda w, axes, parts: (_copy(w, axes, parts), None), _add_copies)


def count_shards(size: int, axes: Axes) -> int:
    """Number of shards into which `constrain` splits a dimension of this size; 1 outside a mesh."""
    mesh = _active_mesh()
    fitting = None if mesh is None else _fitting_spec((axes,), (size,), mesh)[0]
    names = (fitting,) if isinstance(fitting, str) else fitting or ()
    return 1 if mesh is None else int(np.prod([mesh.shape[name] for name in names], dtype=int))


def count_independent_shards() -> int:
    """Into how many parts `run_independently` divides rows."""
    mesh = _active_mesh()
    return 1 if mesh is None or mesh.shape.get("tensor", 1) > 1 else count_row_shards(mesh)


def run_independently(f: Callable[[Tree, Rows], Result], shared: Tree, rows: Rows) -> Result:
    """f(shared, rows) by each shard of the rows on its own part, for loops whose lengths differ between them; what f
    returns is joined along axis 0. Outside a mesh, and with a tensor axis, f itself: devices that share a layer's work
    exchange its results in every step, and XLA may have all of them wait for each other there."""
    mesh = _active_mesh()
    if mesh is None or count_independent_shards() == 1:
        return f(shared, rows)
    names = tuple(name for name in ROW_AXES if name in mesh.shape)
    return jax.shard_map(f, mesh=mesh, in_specs=(P(), P(names)), out_specs=P(names), check_vma=False)(shared, rows)


def find_rule(path: Sequence[object], rules: Mapping[str, P]) -> P:
    """The rule for a leaf, by the last two names of its path ("qkv/kernel") or the last one; P() if there is none."""
    names = [str(key.key) for key in path if isinstance(key, jax.tree_util.DictKey)]
    return rules.get("/".join(names[-2:]), rules.get("".join(names[-1:]), P()))


def _fitting_spec(axes: Iterable[Axes], shape: Sequence[int], mesh: Mesh | AbstractMesh) -> P:
    """The axes that exist in the mesh and divide their dimension."""

    def fit(axis: Axes, size: int) -> Axes:
        names = (axis,) if isinstance(axis, str) else axis or ()
        names = tuple(name for name in names if name in mesh.shape)
        parts = int(np.prod([mesh.shape[name] for name in names], dtype=int))
        return None if size % parts or not names else names

    return P(*(fit(axis, size) for axis, size in zip(axes, shape, strict=False)))


# ---- inputs and outputs of a step ----


def replicated_sharding(mesh: Mesh) -> NamedSharding:
    """The same array on every device."""
    return NamedSharding(mesh, P())


def row_sharding(mesh: Mesh) -> NamedSharding:
    """Axis 0 sharded among the devices (those of one tensor group share their rows)."""
    return NamedSharding(mesh, P(tuple(name for name in ROW_AXES if name in mesh.shape)))


def count_row_shards(mesh: Mesh | AbstractMesh) -> int:
    """Number of parts into which a batch's rows are split."""
    return int(np.prod([mesh.shape[name] for name in ROW_AXES if name in mesh.shape], dtype=int))


def shardings_by_path(tree: Tree, rules: Mapping[str, P], mesh: Mesh) -> Tree:
    """A NamedSharding for each leaf (an array or its shape) by the end of its path, however deeply nested: an
    optimiser's moments are sharded like their parameters. Leaves without a rule are replicated."""

    def place(path: tuple[object, ...], leaf: Array) -> NamedSharding:
        return NamedSharding(mesh, _fitting_spec(find_rule(path, rules), leaf.shape, mesh))

    return jax.tree_util.tree_map_with_path(place, tree)


def with_shardings(shapes: Tree, shardings: Tree) -> Tree:
    """Shapes annotated with shardings, to compile a step for."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)


def place(tree: Tree, shardings: Tree | NamedSharding) -> Tree:
    """Copy each leaf to its sharding in `shardings` (a tree, or one for all), in new buffers, which a step may donate.
    With several processes, each passes the same leaves."""

    def one(x: Array | np.ndarray, where: NamedSharding) -> Array:
        if where.is_fully_addressable:
            return jax.numpy.copy(jax.device_put(x, where))
        if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):  # key data has one more axis, unsharded
            return jax.random.wrap_key_data(one(jax.random.key_data(x), where), impl=jax.random.key_impl(x))
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, where, lambda index: x[index])

    if isinstance(shardings, NamedSharding):
        shardings = jax.tree.map(lambda x: shardings, tree)
    return jax.tree.map(one, tree, shardings)


def place_like(tree: Tree, shapes: Tree) -> Tree:
    """`place`, with the shardings of shapes made by `with_shardings`."""
    return place(tree, jax.tree.map(lambda x: x.sharding, shapes))


def place_local_rows(tree: Tree, mesh: Mesh) -> Tree:
    """Host arrays, of which each process holds its share of rows, as global arrays sharded over all devices."""
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(row_sharding(mesh), np.asarray(x)), tree)


def place_whole(tree: Tree, mesh: Mesh) -> Tree:
    """Host arrays, of which every process holds all rows, as global arrays: sharded by rows over all devices, or
    replicated if they don't divide evenly."""

    def one(x: Array | np.ndarray) -> Array:
        x = np.asarray(x)
        divided = NamedSharding(mesh, _fitting_spec((ROW_AXES,), x.shape, mesh))
        return jax.make_array_from_callback(x.shape, divided, lambda index: x[index])

    return jax.tree.map(one, tree)


@dataclasses.dataclass(frozen=True)
class RowShard:
    """Which part of a batch's rows a process supplies: part `index` of `count`."""

    index: int
    count: int


def process_row_shard(mesh: Mesh) -> RowShard:
    """The share of this process. Processes whose devices hold the same rows (a tensor axis across them) supply the same
    part. UserError if the rows of two processes overlap only partly."""
    held: dict[int, frozenset[int]] = {}
    parts = count_row_shards(mesh)
    for part, devices in enumerate(mesh.devices.reshape(parts, -1)):
        for device in devices:
            held[device.process_index] = held.get(device.process_index, frozenset()) | {part}
    shares = sorted(set(held.values()), key=min)
    if sum(map(len, shares)) != parts or len(set(map(len, shares))) > 1:
        sizes = " x ".join(f"{name} {size}" for name, size in mesh.shape.items())
        raise UserError(
            f"a mesh of {sizes} doesn't divide rows evenly among {len(held)} processes; "
            "make mesh.tensor a divisor or a multiple of the devices per process"
        )
    return RowShard(shares.index(held[jax.process_index()]), len(shares))


def replicate(tree: Tree, mesh: Mesh) -> Tree:
    """A copy of each leaf on every device, in new buffers."""
    return place(tree, replicated_sharding(mesh))


# ---- checks ----


def check_model(config: ModelConfig, mesh: Mesh) -> None:
    """Reject a mesh whose tensor axis doesn't divide the model's heads, hidden units and vocabulary, or whose fsdp axis
    doesn't divide its width: they would silently be replicated."""
    sizes = {
        "heads": ("tensor", config.heads),
        "kv_heads": ("tensor", config.groups),
        "mlp_width": ("tensor", config.mlp_hidden),
        "vocab": ("tensor", config.vocab),
        "width": ("fsdp", config.width),
    }
    for name, (axis, size) in sizes.items():
        parts = mesh.shape.get(axis, 1)
        if size % parts:
            raise UserError(f"mesh.{axis} {parts} doesn't divide model.{name} {size}; change one of them")


def check_batch(batch: int, parts: int, mesh: Mesh) -> None:
    """Reject a batch that doesn't split into `parts` equal parts, each divided equally among the devices."""
    if parts < 1 or batch % parts:
        raise UserError(f"a batch of {batch} rows doesn't divide into {parts} microbatches; change one of them")
    check_rows(batch // parts, mesh, "a batch" if parts == 1 else "a microbatch")


def check_rows(count: int, mesh: Mesh, name: str) -> None:
    """Reject a batch that can't be divided equally among the devices, or supplied equally by the processes."""
    parts = count_row_shards(mesh)
    if count % parts:
        raise UserError(f"{name} of {count} rows doesn't divide among {parts} devices; use a multiple of {parts}")
