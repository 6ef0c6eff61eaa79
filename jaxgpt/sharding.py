"""Where arrays live: a mesh of devices, parameters on all of them, the rows of a batch divided among them.

The model knows nothing of this. A step is jitted with these shardings on its inputs and outputs, and XLA adds the
collectives (data parallelism: one all-reduce of the gradients).
"""

from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxgpt.config import UserError


def data_mesh() -> Mesh:
    """All devices of all processes on one axis, 'data'."""
    return jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))


def replicated(mesh: Mesh) -> NamedSharding:
    """The same array on every device."""
    return NamedSharding(mesh, P())


def rows(mesh: Mesh) -> NamedSharding:
    """Axis 0 divided among the devices."""
    return NamedSharding(mesh, P("data"))


def place_rows(tree: Any, mesh: Mesh) -> Any:
    """Host arrays, of which each process holds its own rows, as one global array divided among all devices."""
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(rows(mesh), np.asarray(x)), tree)


def replicate(tree: Any, mesh: Mesh) -> Any:
    """A copy of each leaf on every device, in new buffers."""
    return jax.tree.map(jax.numpy.copy, jax.device_put(tree, replicated(mesh)))


def check_batch(batch: int, parts: int, mesh: Mesh) -> None:
    """Refuse a batch that doesn't divide into `parts` equal parts, each shared equally by the devices."""
    if parts < 1 or batch % parts:
        raise UserError(f"a batch of {batch} rows doesn't divide into {parts} microbatches; change one of them")
    check_rows(batch // parts, mesh, "a batch" if parts == 1 else "a microbatch")


def check_rows(count: int, mesh: Mesh, name: str) -> None:
    """Refuse a batch that the devices can't share equally."""
    if count % mesh.size:
        raise UserError(
            f"{name} of {count} rows doesn't divide among {mesh.size} devices; use a multiple of {mesh.size}"
        )
