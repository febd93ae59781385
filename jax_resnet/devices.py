"""Data parallelism: every device of a mesh holds the whole state and a part of the batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

__all__ = ["data_mesh", "replicate", "shard_batch", "shardings"]


def data_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with one axis, "batch", by default over all devices of all processes."""
    return Mesh(np.asarray(jax.devices() if devices is None else devices), ("batch",))


def replicate(tree: Any, mesh: Mesh) -> Any:
    """Copies arrays to every device of a mesh. Each process must pass the same NumPy or local arrays."""
    sharding = NamedSharding(mesh, PartitionSpec())
    return jax.tree.map(lambda a: jax.make_array_from_process_local_data(sharding, np.asarray(a)), tree)


def shard_batch(arrays: Any, mesh: Mesh) -> Any:
    """Distributes a batch over the devices of a mesh along the first axis.

    Each process passes its own rows. The batch consists of the rows of all processes, in process order. Its size must
    be a multiple of the number of devices.
    """
    sharding = NamedSharding(mesh, PartitionSpec("batch"))
    return jax.tree.map(lambda a: jax.make_array_from_process_local_data(sharding, np.asarray(a)), arrays)


def shardings(mesh: Mesh | None, arguments: Sequence[str]) -> dict[str, Any]:
    """Returns jit's keywords that distribute arguments named "batch" and replicate other arguments and the results.

    Args:
      mesh: None returns {}.
      arguments: the names of the function's arguments, in order.
    """
    if mesh is None:
        return {}
    everywhere, spread = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("batch"))
    places = tuple(spread if name == "batch" else everywhere for name in arguments)
    return {"in_shardings": places, "out_shardings": everywhere}
