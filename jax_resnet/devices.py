"""Data parallelism: the state on every device of a mesh, a batch spread over them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

__all__ = ["data_mesh", "replicate", "shard_batch", "shardings"]


def data_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh for data parallelism, by default over all devices of all processes: one axis, "batch"."""
    return Mesh(np.asarray(jax.devices() if devices is None else devices), ("batch",))


def replicate(tree: Any, mesh: Mesh) -> Any:
    """The same arrays on every device of a mesh; each process hands over the same NumPy or local arrays."""
    sharding = NamedSharding(mesh, PartitionSpec())
    return jax.tree.map(lambda a: jax.make_array_from_process_local_data(sharding, np.asarray(a)), tree)


def shard_batch(arrays: Any, mesh: Mesh) -> Any:
    """Spreads a batch over the devices of a mesh by its first axis.

    Each process hands over its own rows, in the order of the processes; together they are the batch, whose size must
    be a multiple of the number of devices.
    """
    sharding = NamedSharding(mesh, PartitionSpec("batch"))
    return jax.tree.map(lambda a: jax.make_array_from_process_local_data(sharding, np.asarray(a)), arrays)


def shardings(mesh: Mesh | None, arguments: Sequence[str]) -> dict[str, Any]:
    """For jit: a batch is spread over a mesh, all else is on every device; so is what comes out."""
    if mesh is None:
        return {}
    everywhere, spread = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("batch"))
    places = tuple(spread if name == "batch" else everywhere for name in arguments)
    return {"in_shardings": places, "out_shardings": everywhere}
